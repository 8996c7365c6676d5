"""Read one embedding of each slice out of the library's image encoders.

What z_2d is for an encoder, and which of the encoder's weights don't affect it, is found by running its class once on the
meta device.
"""

import dataclasses
import functools
import inspect
import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .configuration_samf import Pooling, SamfConfig

logger = logging.get_logger(__name__)

_CLS_NAMES = ("cls_token", "class_embedding", "class_token")
_RANDOMLY_MASKED = ("vit_mae",)  # drop most patches, also in inference
_DEFAULT_IMAGE_SIZE = 224


def pool_slices(output: BaseModelOutputWithPooling, pooling: Pooling | None) -> torch.Tensor:
    """Return one embedding for each slice, (N, D).

    Args:
        output: of the slice encoder; `last_hidden_state` is (N, tokens, D) or a map (N, D, H, W).
        pooling: `"cls"` the first token, `"mean"` over all tokens or places, `"pooler"` the encoder's own.
    """
    if pooling == "pooler":
        return cast(torch.Tensor, output.pooler_output).flatten(1)
    tokens = cast(torch.Tensor, output.last_hidden_state)
    if pooling == "cls":
        return tokens[:, 0]
    return tokens.mean(dim=1) if tokens.ndim == 3 else tokens.flatten(2).mean(dim=2)


def encode_pixels(encoder: PreTrainedModel, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
    """Run a slice encoder, with patches in their order even if the encoder would shuffle them.

    Args:
        encoder: the slice encoder.
        pixel_values: slices (N, C, H, W).
        kwargs: further arguments of the encoder's forward.
    """
    if encoder.config.model_type in _RANDOMLY_MASKED:
        patches = (pixel_values.shape[-2] // encoder.config.patch_size) * (
            pixel_values.shape[-1] // encoder.config.patch_size
        )
        kwargs["noise"] = torch.arange(patches, device=pixel_values.device).expand(pixel_values.shape[0], -1)
    return encoder(pixel_values=pixel_values, return_dict=True, **kwargs)


def join_layers(outputs: Sequence[BaseModelOutputWithPooling], name: str) -> tuple[torch.Tensor, ...] | None:
    """Return what an encoder has recorded of each layer, of all slices; None where it hasn't.

    Args:
        outputs: of the encoder for the first slices, the next ones, and so on.
        name: "hidden_states" or "attentions".
    """
    if outputs[0].get(name) is None:
        return None
    if len(outputs) == 1:
        return cast(tuple[torch.Tensor, ...], outputs[0][name])
    return tuple(torch.cat(parts) for parts in zip(*(output[name] for output in outputs), strict=True))


@dataclasses.dataclass(frozen=True)
class SliceReadout:
    """How z_2d is read out of an encoder.

    Args:
        pooling: the `slice_pooling` in effect.
        unused: names of the weights that z_2d doesn't depend on.
    """

    pooling: Pooling
    unused: tuple[str, ...]


def prepare_slice_encoder(encoder: PreTrainedModel, config: SamfConfig) -> None:
    """Choose an encoder's pooling and exclude from training the weights that don't affect z_2d.

    `config.slice_pooling` is set where it is None. Weights that z_2d doesn't depend on become buffers: they are saved and
    loaded as before, but DDP, which waits for every gradient, doesn't wait for theirs.

    Args:
        encoder: changed in place.
        config: the model's configuration, changed in place.

    Raises:
        ValueError: the encoder needs other inputs than pixel_values; it has no CLS token or no pooler for the
            `slice_pooling` that is asked for; its width differs from its configuration's.
    """
    if encoder.config.model_type in _RANDOMLY_MASKED and encoder.config.mask_ratio:
        logger.warning_once(
            f"{type(encoder).__name__} would drop {encoder.config.mask_ratio:.0%} of each slice's patches at random: "
            "mask_ratio is set to 0."
        )
        encoder.config.mask_ratio = 0.0
    drops_pooler = "add_pooling_layer" in inspect.signature(type(encoder).__init__).parameters
    asked = config.slice_pooling
    settings = encoder.config.to_json_string(use_diff=False)
    readout = _find_readout(type(encoder), settings, asked, drops_pooler, config.slice_dim)  # type: ignore[arg-type]
    if asked is None and readout.pooling != "cls":
        logger.warning_once(
            f"{type(encoder).__name__} has no CLS token: slice_pooling={readout.pooling!r}, which is "
            + ("its own pooled output." if readout.pooling == "pooler" else "the mean over its tokens.")
        )
    config.slice_pooling = readout.pooling
    if drops_pooler and readout.pooling != "pooler":
        encoder.pooler = None  # type: ignore[assignment]  # it would never get a gradient, and few checkpoints have one
    if is_deepspeed_zero3_enabled():
        return  # weights are already partitioned, and ZeRO doesn't wait for every gradient
    for name in readout.unused:
        module = encoder.get_submodule(name.rpartition(".")[0])
        parameter = module._parameters.pop(name.rpartition(".")[2], None)
        if parameter is not None:
            module.register_buffer(name.rpartition(".")[2], parameter.detach())


@functools.lru_cache(maxsize=64)
def _find_readout(
    encoder_class: type[PreTrainedModel], settings: str, asked: Pooling | None, drops_pooler: bool, dim: int
) -> SliceReadout:
    """Run an encoder of these settings on the meta device, and return what z_2d is and depends on."""
    name = encoder_class.__name__
    if encoder_class.config_class is None:
        raise ValueError(f"SamfConfig.vision_config: {name} has no configuration class; choose another image encoder.")
    config = encoder_class.config_class.from_dict(json.loads(settings))
    _check_inputs(encoder_class)
    with torch.device("meta"), init.no_init_weights(), torch.inference_mode(False), torch.enable_grad():
        encoder = encoder_class(config).eval()
        if drops_pooler and asked != "pooler":
            encoder.pooler = None
        size = getattr(config, "image_size", None) or _DEFAULT_IMAGE_SIZE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        output = encode_pixels(encoder, torch.zeros(1, getattr(config, "num_channels", 3), height, width))
        tokens, pooled = cast(torch.Tensor, output.last_hidden_state), getattr(output, "pooler_output", None)
        has_cls = tokens.ndim == 3 and _reaches_cls_token(encoder, tokens)
        pooling: Pooling = asked or ("cls" if has_cls else "pooler" if pooled is not None else "mean")
        _check_pooling(name, pooling, has_cls, pooled is not None)
        slices = pool_slices(output, pooling)
        if slices.shape[-1] != dim:
            raise ValueError(
                f"SamfConfig.vision_config: {name} with slice_pooling={pooling!r} returns {slices.shape[-1]} values per "
                f"slice, its configuration says {dim}. Choose another slice_pooling."
            )
        slices.sum().backward()
    unused = [parameter for parameter, value in encoder.named_parameters() if value.grad is None]
    return SliceReadout(pooling, tuple(unused))


def _reaches_cls_token(encoder: PreTrainedModel, tokens: torch.Tensor) -> bool:
    """Return whether the layers read a CLS token; AIMv2's belongs to its pooling head, after the layers."""
    named = [parameter for name, parameter in encoder.named_parameters() if name.rpartition(".")[2] in _CLS_NAMES]
    gradients = torch.autograd.grad(tokens.sum(), named, retain_graph=True, allow_unused=True) if named else ()
    return any(gradient is not None for gradient in gradients)


def _check_inputs(encoder_class: type[PreTrainedModel]) -> None:
    """Raise ValueError for an encoder that needs other inputs than pixel_values."""
    parameters = inspect.signature(encoder_class.forward).parameters
    needed = {
        name
        for name, parameter in parameters.items()
        if name != "self" and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    if "pixel_values" not in parameters or needed - {"pixel_values"}:
        raise ValueError(
            f"SamfConfig.vision_config: {encoder_class.__name__} can't be the slice encoder: its forward needs "
            f"{sorted(needed)}, and a slice is only pixel_values. Choose an image encoder such as ViT, DINOv2 or SigLIP; "
            "docs/reference/components.md lists the encoders that were tried."
        )


def _check_pooling(name: str, pooling: Pooling, has_cls: bool, has_pooler: bool) -> None:
    """Raise ValueError if an encoder doesn't have what `slice_pooling` reads."""
    if pooling == "cls" and not has_cls:
        raise ValueError(
            f"SamfConfig.slice_pooling is 'cls', but {name} has no CLS token: its first token is the top left patch. Leave "
            f"slice_pooling out, or set {'pooler' if has_pooler else 'mean'!r}."
        )
    if pooling == "pooler" and not has_pooler:
        raise ValueError(
            f"SamfConfig.slice_pooling is 'pooler', but {name} has none; set {'cls' if has_cls else 'mean'!r}."
        )
