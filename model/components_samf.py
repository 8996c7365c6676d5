"""Build SAMF's slice encoder and language model from the library's, and refuse those that can't be used."""

import inspect

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .language_model_samf import CACHE_NAMES
from .model_card import hub_id


def build_language_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a new causal language model of `config`.

    Args:
        config: `SamfConfig.text_config`.

    Returns:
        The library's model with its head: SAMF uses its `base_model` and `get_output_embeddings()`.

    Raises:
        ValueError: the library has no causal language model for `config`, or SAMF can't run it; the message says why.
    """
    if config.get_text_config() is not config:
        raise _refused(type(config).__name__, "it is a multimodal model; pass only the configuration of its text model")
    try:
        causal = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise _refused(type(config).__name__, "the library has no causal language model for it") from error
    problem = language_model_problem(causal)
    if problem is not None:
        raise _refused(type(causal).__name__, problem)
    return causal


def _refused(name: str, problem: str) -> ValueError:
    return ValueError(
        f"SamfConfig.text_config: {name} can't be SAMF's language model: {problem}. Choose a decoder-only model such as "
        "Phi-3, Llama, Qwen or Gemma 2; docs/reference/components.md lists the models that were tried."
    )


def language_model_problem(causal: PreTrainedModel) -> str | None:
    """Return why SAMF can't run a causal language model, None where it can."""
    config, prefix = causal.config, causal.base_model_prefix
    if config.is_encoder_decoder:
        return "it has an encoder of its own"
    if prefix not in dict(causal.named_children()):
        return f"it has no part {prefix!r} without its head"
    heads = [name for name, _ in causal.named_children() if name != prefix]
    output = causal.get_output_embeddings()
    if len(heads) != 1 or output is not getattr(causal, heads[0]) or not isinstance(output, nn.Linear):
        return f"its head is {heads}; SAMF keeps one linear layer"
    taken = inspect.signature(type(causal.base_model).forward).parameters
    missing = [name for name in ("inputs_embeds", "attention_mask") if name not in taken]
    if not any(name in taken for name in CACHE_NAMES):
        missing.append(CACHE_NAMES[0])
    if "logits_to_keep" not in inspect.signature(type(causal).forward).parameters:
        missing.append("logits_to_keep")
    if missing:
        return f"its forward doesn't take {', '.join(missing)}"
    if getattr(config, "hidden_size_per_layer_input", None):
        return "its layers read the token ids again (hidden_size_per_layer_input), and an image token has none"
    return None


def load_components(
    slice_encoder: str, text_model: str, dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Load a pretrained slice encoder and a pretrained causal language model.

    Args:
        slice_encoder: Hub id or folder, for example `facebook/dino-vitb16`.
        text_model: Hub id or folder, for example `microsoft/Phi-3-mini-4k-instruct`.
        dtype: of all weights; None or `"auto"` = the language model's own.

    Returns:
        The slice encoder and the causal language model.
    """
    # Phi-3's repository names modelling code that no longer runs; the library's own class replaces it.
    text = AutoModelForCausalLM.from_pretrained(text_model, dtype=dtype or "auto", trust_remote_code=False)
    encoder = AutoModel.from_pretrained(slice_encoder, dtype=text.dtype)  # the modules between need one dtype
    for part, source in ((encoder.config, slice_encoder), (text.config, text_model)):
        # The card names base models by their Hub ids; a local path must not enter the saved configuration.
        part._name_or_path = hub_id(str(source)) or ""
    return encoder, text
