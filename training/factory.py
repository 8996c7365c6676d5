"""The processor and the model that train.py trains."""

import dataclasses
import logging

from transformers import AutoTokenizer

from samf.cache.settings import load_image_processor
from samf.model.configuration_samf import SamfConfig
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.processing_samf import SamfProcessor
from samf.training.aggregator_weights import load_aggregator
from samf.training.arguments import ModelArguments
from samf.training.param_groups import train_parts

logger = logging.getLogger(__name__)


def build_processor(args: ModelArguments) -> SamfProcessor:
    """Return the processor of `args.model`, or a new one from the language model's tokenizer and the slice settings."""
    if args.model is not None:
        return SamfProcessor.from_pretrained(args.model)
    image_processor = load_image_processor(args.slice_encoder, **args.slice_settings())
    tokenizer = AutoTokenizer.from_pretrained(args.text_model, trust_remote_code=False)
    num_image_tokens = None if args.fusion_type == "slice_tokens" else args.num_image_tokens
    return SamfProcessor(image_processor, tokenizer, num_image_tokens=num_image_tokens)


def build_model(args: ModelArguments, processor: SamfProcessor) -> SamfForConditionalGeneration:
    """Return `args.model`, or a new model from its components; parts that aren't trained are frozen.

    Raises:
        ValueError: The tokenizer's image token has no row in the language model's embeddings, or the chat template doesn't
            mark the end of an answer.
    """
    if args.model is not None:
        model = SamfForConditionalGeneration.from_pretrained(args.model, dtype=args.dtype)
        forget_calibration(model)
    else:
        own = {field.name for field in dataclasses.fields(ModelArguments)}
        config = {name: getattr(args, name) for name in own if name in SamfConfig.__init__.__annotations__}
        model = SamfForConditionalGeneration.from_component_pretrained(
            args.slice_encoder, args.text_model, dtype=args.dtype, image_token_id=processor.image_token_id, **config
        )
    if args.aggregator is not None:
        load_aggregator(model, args.aggregator)
    rows = model.get_input_embeddings().num_embeddings
    if model.config.image_token_id >= rows:
        raise ValueError(
            f"The placeholder {processor.image_token} has id {model.config.image_token_id}, but {args.text_model} embeds "
            f"{rows} tokens. Use a tokenizer that has the token, or a language model with a spare row."
        )
    agree_on_stop_tokens(model, processor)
    train_parts(model, args.train_parts)
    return model


def forget_calibration(model: SamfForConditionalGeneration) -> None:
    """Remove the calibration of the findings' probabilities, which training makes invalid."""
    if model.config.finding_temperature is None and model.config.finding_bias is None:
        return
    logger.warning("The calibration of the findings is removed: fit it again after training (samf calibrate).")
    model.config.finding_temperature = model.config.finding_bias = None


def agree_on_stop_tokens(model: SamfForConditionalGeneration, processor: SamfProcessor) -> None:
    """Add the token that ends a trained answer to the tokens at which generation stops.

    A chat model often ends its turns with another token than its configuration names (ChatML's `<|im_end|>` on a base
    model, Gemma's `<end_of_turn>`); the token that training teaches as the end must stop generation.

    Raises:
        ValueError: The chat template marks no answers, or they end in plain text.
    """
    end, tokenizer = processor.answer_end(), processor.tokenizer
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    if end is None or end not in control or tokenizer.decode([end]).isspace():
        found = "marks no answers" if end is None else f"ends an answer with {tokenizer.decode([end])!r}, plain text"
        raise ValueError(
            f"The processor's chat template {found}: nothing could be learned, or no end. Put {{% generation %}} around the "
            "assistant's content and its end token, a control token of the tokenizer."
        )
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if end not in stops:
        logger.warning(
            "Answers end with %s (%d), at which generation didn't stop (%s); now it does.",
            tokenizer.decode([end]),
            end,
            stops,
        )
        model.generation_config.eos_token_id = [*stops, end]


def apply_liger(model: SamfForConditionalGeneration) -> None:
    """Use Liger's kernels (norms, rotary positions, feed-forward) in the language model.

    Trainer looks the kernels up by the whole model's type, finds none for "samf" and continues without them. Liger's fused
    head and loss aren't used: they replace the forward method of a language model that has its own head.

    Raises:
        ImportError: liger-kernel is missing.
        ValueError: It has no kernels for this language model.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ImportError("use_liger_kernel needs Liger's kernels, and a GPU: pip install liger-kernel") from error
    language_model = model.get_decoder()
    kind = language_model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"Liger has no kernels for a language model of type {kind!r}; it has some for "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}. Leave use_liger_kernel out."
        )
    _apply_liger_kernel_to_instance(model=language_model, fused_linear_cross_entropy=False, cross_entropy=False)
    logger.info("Liger's kernels for %s in the language model", kind)
