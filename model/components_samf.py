"""Run the library's language models and slice encoders by their own code, and refuse by name those that can't be run.

A language model is more than its layers: some cap or scale their logits, have a bias on their head, add a loss of their
experts, or have to fill their cache anew at some length. SAMF keeps the layers as `model.language_model` and the head as
`lm_head`, and asks the class of the causal language model for the rest.

A slice encoder gives one vector a slice. Which one, and which of its weights take no part in it, is found by running its
class once on shapes alone.
"""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

logger = logging.get_logger(__name__)

CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
# What generate() asks a model class for; a composite model must answer as its language model does.
GENERATION_FACTS = ("_is_stateful", "_can_compile_fullgraph")
CLS_NAMES = ("cls_token", "class_embedding", "class_token")
RANDOMLY_MASKED = ("vit_mae",)  # drop most patches, in inference too
DEFAULT_IMAGE_SIZE = 224
KEPT_OUTPUTS = ("last_hidden_state", *CACHE_NAMES, "hidden_states", "attentions", "router_logits")


# ---------------------------------------------------------------------------------------------------- language model


def build_language_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a new causal language model of `config`.

    Args:
        config: `SamfConfig.text_config`.

    Returns:
        The library's model with its head: `base_model` and `get_output_embeddings()` are SAMF's parts.

    Raises:
        ValueError: the library has no causal language model for it, or SAMF can't run it; says why.
    """
    if config.get_text_config() is not config:
        raise _refused(
            type(config).__name__, "it is a multimodal model; give the configuration of its text model alone"
        )
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
        "Phi-3, Llama, Qwen or Gemma 2; docs/reference/components.md lists those that were tried."
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


def _rope_parameters(config: PretrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of each rotary embedding: one, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]


def rope_sets(config: PretrainedConfig, length: int) -> list[int]:
    """Return which factors rotate a sequence of `length` positions, for each embedding whose factors depend on it.

    That is 0 or 1 for "longrope", the short or the long factors, and for "dynamic" 0 or, past the original length, the
    length itself. Keys that were rotated by other factors can't be used: a cache must be filled anew where this changes.
    """
    sets = []
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") == "longrope":
            original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            sets.append(int(length > original))
        elif _is_dynamic(parameters):
            sets.append(length if length > config.max_position_embeddings else 0)
    return sets


def rope_stretch(config: PretrainedConfig) -> float:
    """Return how many times `max_position_embeddings` positions the rotary embeddings are made for."""
    factors = [parameters["factor"] for parameters in _rope_parameters(config) if _is_dynamic(parameters)]
    return min(factors, default=1.0)


def forget_longest_sequence(language_model: nn.Module, config: PretrainedConfig) -> None:
    """Give "dynamic" rotary embeddings their first factors again.

    The library's keep those of the longest sequence that they have seen, so that logits would depend on earlier calls.
    From the first factors they go to those of the sequence that comes.
    """
    if not any(map(_is_dynamic, _rope_parameters(config))):
        return
    for module in language_model.modules():
        kinds = getattr(module, "rope_type", None)
        for layers, kind in kinds.items() if isinstance(kinds, Mapping) else [(None, kinds)]:
            if not _is_dynamic({"rope_type": kind}):
                continue
            prefix = f"{layers}_" if layers else ""
            inv_freq, first = getattr(module, f"{prefix}inv_freq"), getattr(module, f"{prefix}original_inv_freq")
            module.register_buffer(f"{prefix}inv_freq", first.to(inv_freq.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _is_dynamic(parameters: Mapping[str, Any]) -> bool:
    return "dynamic" in (parameters.get("rope_type") or "")


def takes_positions(language_model: nn.Module) -> bool:
    """Whether the layers take position_ids: not those of ALiBi and recurrent models, which have no positions."""
    return "position_ids" in inspect.signature(type(language_model).forward).parameters


class _Output:
    """A language model's output to its head's class: a field that SAMF's has not is None, as in that class's own."""

    def __init__(self, output: ModelOutput):
        self._output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name, None)

    def __getitem__(self, index: Any) -> Any:
        return self._output[index]


class _Given:
    """Stand in for a language model that has run: whatever calls it gets its output; other attributes are its own."""

    def __init__(self, language_model: nn.Module, output: ModelOutput):
        self._language_model = language_model
        self._output = _Output(output)
        self.decoder = self  # OPT's head calls its model's decoder

    def __call__(self, *args: Any, **kwargs: Any) -> _Output:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._language_model, name)


class _Runner:
    """The `self` of a causal language model's own forward: its class's facts, with SAMF's modules in place of its own.

    One a call, for two threads may generate with one model.
    """

    def __init__(self, causal: PreTrainedModel, parts: Mapping[str, Any]):
        self._causal = causal
        for name, part in parts.items():
            setattr(self, name, part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._causal, name)


class CausalLanguageModel:
    """The class of a causal language model without its weights: computes logits and prepares inputs as that class does.

    Args:
        causal: as `build_language_model` gives it. Its modules are taken out of it.
    """

    def __init__(self, causal: PreTrainedModel):
        self.base_name = causal.base_model_prefix
        (self.head_name,) = (name for name, _ in causal.named_children() if name != self.base_name)
        self.takes_router_logits = "output_router_logits" in inspect.signature(type(causal).forward).parameters
        self.tied = dict(causal._tied_weights_keys or {})
        self.facts = {name: getattr(causal, name) for name in GENERATION_FACTS if hasattr(causal, name)}
        causal._modules.clear()
        self.causal = causal

    def tied_weights_keys(self, prefix: str) -> dict[str, str]:
        """Return which weights are tied, by SAMF's names; `prefix` is the language model's, `"model.language_model"`."""
        names = {self.base_name: prefix, self.head_name: "lm_head"}

        def renamed(key: str) -> str:
            first, dot, rest = key.partition(".")
            return names.get(first, first) + dot + rest

        return {renamed(target): renamed(source) for target, source in self.tied.items()}

    def run_head(
        self,
        head: nn.Module,
        language_model: nn.Module,
        output: ModelOutput,
        loss_function: Callable[..., torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_logits: bool | None = None,
    ) -> ModelOutput:
        """Run the class's own forward on the output of its layers.

        Args:
            head: SAMF's `lm_head`, in whatever wrapper.
            language_model: SAMF's; it isn't run.
            output: of the language model, `last_hidden_state` (B, T, D) and what else they gave.
            loss_function: of logits, labels and further arguments that it may ignore.
            attention_mask, labels (B, T), logits_to_keep, output_router_logits: as that forward takes them.

        Returns:
            The class's own output: logits (B, kept, vocabulary), with labels the loss, of experts `aux_loss`.
        """
        parts = {self.base_name: _Given(language_model, output), self.head_name: head, "loss_function": loss_function}
        options = {"output_router_logits": output_router_logits} if self.takes_router_logits else {}
        return type(self.causal).forward(
            _Runner(self.causal, parts),
            inputs_embeds=output.last_hidden_state,
            attention_mask=attention_mask,
            labels=labels,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **options,
        )

    def prepare_inputs(self, head: nn.Module, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], bool]:
        """Prepare the inputs of a step of generate() as the class does.

        Returns:
            The inputs, and whether the class or its rotary embedding wants the cache filled anew: the inputs then hold
            the whole sequence and no cache.
        """
        self.causal._modules[self.head_name] = head  # it looks its weights' type up
        name = next((name for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if name is not None and self._outgrows_cache(kwargs[name], input_ids, kwargs.get("position_ids")):
            kwargs = {**kwargs, name: None, "next_sequence_length": None}
        inputs = self.causal.prepare_inputs_for_generation(*args, **kwargs)
        rebuilt = name is not None and all(inputs.get(other) is None for other in CACHE_NAMES)
        if rebuilt and kwargs.get("next_sequence_length") is not None:
            # Older transformers: Phi-3 drops its cache, and then gives the new tokens alone.
            kwargs = {**kwargs, name: None, "next_sequence_length": None}
            inputs = self.causal.prepare_inputs_for_generation(*args, **kwargs)
        return inputs, rebuilt

    def _outgrows_cache(self, cache: Any, input_ids: torch.Tensor | None, position_ids: torch.Tensor | None) -> bool:
        """Whether the step that comes rotates by other factors than the keys in the cache were rotated by."""
        config = self.causal.config
        if input_ids is None or not rope_sets(config, 0):
            return False
        filled = int(cache.get_seq_length())
        length = input_ids.shape[1] if position_ids is None else int(position_ids.max()) + 1
        return filled > 0 and rope_sets(config, length) != rope_sets(config, length - (input_ids.shape[1] - filled))


# ----------------------------------------------------------------------------------------------------- slice encoder


def pool_slices(output: ModelOutput, pooling: str) -> torch.Tensor:
    """Return one embedding a slice (N, D).

    Args:
        output: of the slice encoder; last_hidden_state (N, tokens, D) or a map (N, D, H, W).
        pooling: `"cls"` the first token, `"mean"` over all tokens or places, `"pooler"` the encoder's own.
    """
    if pooling == "pooler":
        return output.pooler_output.flatten(1)
    tokens = output.last_hidden_state
    if pooling == "cls":
        return tokens[:, 0]
    return tokens.mean(dim=1) if tokens.ndim == 3 else tokens.flatten(2).mean(dim=2)


def encode_pixels(encoder: PreTrainedModel, pixel_values: torch.Tensor, **kwargs: Any) -> ModelOutput:
    """Run a slice encoder on slices (N, C, H, W); one that would order its patches at random keeps them in order."""
    if encoder.config.model_type in RANDOMLY_MASKED:
        patches = (pixel_values.shape[-2] // encoder.config.patch_size) * (
            pixel_values.shape[-1] // encoder.config.patch_size
        )
        kwargs["noise"] = torch.arange(patches, device=pixel_values.device).expand(pixel_values.shape[0], -1)
    return encoder(pixel_values=pixel_values, return_dict=True, **kwargs)


@dataclasses.dataclass(frozen=True)
class SliceReadout:
    """How z_2d is read out of an encoder.

    Args:
        pooling: the `slice_pooling` that holds.
        unused: names of the weights that z_2d doesn't depend on.
    """

    pooling: str
    unused: tuple[str, ...]


def prepare_slice_encoder(encoder: PreTrainedModel, config: PretrainedConfig) -> None:
    """Make an encoder give z_2d and nothing else: choose its pooling, and keep what doesn't reach z_2d from training.

    `config.slice_pooling` is set where it is None. Weights that z_2d doesn't depend on become buffers: they are saved and
    loaded as before, but a launcher that waits for every gradient (DDP) doesn't wait for theirs.

    Args:
        encoder: changed in place.
        config: the SamfConfig.

    Raises:
        ValueError: the encoder takes no pixel_values, or more; it has no CLS token or no pooler for the `slice_pooling`
            that is asked for; its width isn't what its configuration says.
    """
    if encoder.config.model_type in RANDOMLY_MASKED and encoder.config.mask_ratio:
        logger.warning_once(
            f"{type(encoder).__name__} would drop {encoder.config.mask_ratio:.0%} of each slice's patches at random: "
            "mask_ratio is set to 0."
        )
        encoder.config.mask_ratio = 0.0
    drops_pooler = "add_pooling_layer" in inspect.signature(type(encoder).__init__).parameters
    asked = config.slice_pooling
    readout = _find_readout(
        type(encoder), encoder.config.to_json_string(use_diff=False), asked, drops_pooler, config.slice_dim
    )
    if asked is None and readout.pooling != "cls":
        logger.warning_once(
            f"{type(encoder).__name__} has no CLS token: slice_pooling={readout.pooling!r}, which is "
            + ("its own pooled output." if readout.pooling == "pooler" else "the mean over its tokens.")
        )
    config.slice_pooling = readout.pooling
    if drops_pooler and readout.pooling != "pooler":
        encoder.pooler = None  # it would never get a gradient, and few checkpoints have one
    if is_deepspeed_zero3_enabled():
        return  # weights are in pieces already, and ZeRO doesn't wait for every gradient
    for name in readout.unused:
        module = encoder.get_submodule(name.rpartition(".")[0])
        parameter = module._parameters.pop(name.rpartition(".")[2], None)
        if parameter is not None:
            module.register_buffer(name.rpartition(".")[2], parameter.detach())


@functools.lru_cache(maxsize=64)
def _find_readout(
    encoder_class: type[PreTrainedModel], settings: str, asked: str | None, drops_pooler: bool, dim: int
) -> SliceReadout:
    """Run an encoder of these settings on shapes alone, and see what z_2d can be and depends on."""
    name = encoder_class.__name__
    config = encoder_class.config_class.from_dict(json.loads(settings))
    _check_inputs(encoder_class)
    with torch.device("meta"), init.no_init_weights(), torch.inference_mode(False), torch.enable_grad():
        encoder = encoder_class(config).eval()
        if drops_pooler and asked != "pooler":
            encoder.pooler = None
        size = getattr(config, "image_size", None) or DEFAULT_IMAGE_SIZE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        output = encode_pixels(encoder, torch.zeros(1, getattr(config, "num_channels", 3), height, width))
        tokens, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        has_cls = tokens.ndim == 3 and _reaches_cls_token(encoder, tokens)
        pooling = asked or ("cls" if has_cls else "pooler" if pooled is not None else "mean")
        _check_pooling(name, pooling, has_cls, pooled is not None)
        slices = pool_slices(output, pooling)
        if slices.shape[-1] != dim:
            raise ValueError(
                f"SamfConfig.vision_config: {name} with slice_pooling={pooling!r} gives {slices.shape[-1]} numbers a slice, "
                f"its configuration says {dim}. Choose another slice_pooling."
            )
        slices.sum().backward()
    unused = [parameter for parameter, value in encoder.named_parameters() if value.grad is None]
    return SliceReadout(pooling, tuple(unused))


def _reaches_cls_token(encoder: PreTrainedModel, tokens: torch.Tensor) -> bool:
    """Whether a CLS token is among those that the layers read: AIMv2's belongs to its pooling head, behind them."""
    named = [parameter for name, parameter in encoder.named_parameters() if name.rpartition(".")[2] in CLS_NAMES]
    gradients = torch.autograd.grad(tokens.sum(), named, retain_graph=True, allow_unused=True) if named else ()
    return any(gradient is not None for gradient in gradients)


def _check_inputs(encoder_class: type[PreTrainedModel]) -> None:
    """Raise ValueError for an encoder that needs anything but pixel_values."""
    parameters = inspect.signature(encoder_class.forward).parameters
    needed = {
        name
        for name, parameter in parameters.items()
        if name != "self" and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    if "pixel_values" not in parameters or needed - {"pixel_values"}:
        raise ValueError(
            f"SamfConfig.vision_config: {encoder_class.__name__} can't be the slice encoder: its forward needs "
            f"{sorted(needed)}, and a slice is pixel_values alone. Choose an image encoder such as ViT, DINOv2 or SigLIP; "
            "docs/reference/components.md lists those that were tried."
        )


def _check_pooling(name: str, pooling: str, has_cls: bool, has_pooler: bool) -> None:
    """Raise ValueError where an encoder doesn't have what `slice_pooling` reads."""
    if pooling == "cls" and not has_cls:
        raise ValueError(
            f"SamfConfig.slice_pooling is 'cls', but {name} has no CLS token: its first token is the top left patch. Leave "
            f"slice_pooling out, or set {'pooler' if has_pooler else 'mean'!r}."
        )
    if pooling == "pooler" and not has_pooler:
        raise ValueError(
            f"SamfConfig.slice_pooling is 'pooler', but {name} has none; set {'cls' if has_cls else 'mean'!r}."
        )
