"""The configuration of a converted model, from the shapes of its weights and the checkpoint's settings."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import ViTConfig

from samf.data.schema import JsonObject
from samf.model.configuration_samf import DEFAULT_TEXT_CONFIG, SamfConfig
from samf.scripts.conversion_arguments import ConvertArguments
from samf.scripts.conversion_checks import ConversionError
from samf.scripts.conversion_names import DINO_NAMES, MODEL_NAMES, TEXT_NAMES, Names
from samf.scripts.conversion_sources import Settings

# Settings of Phi-3 in config.json that no weight's shape shows.
_TEXT_SETTINGS = (
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)
# Numbers of dimensions of the slice encoder's weights, by the end of their names; all others are matrices.
_DIMENSIONS = {"cls_token": 3, "position_embeddings": 3, "patch_embeddings.projection.weight": 4}


def vision_config(
    weights: Mapping[str, torch.Tensor], known: JsonObject, args: ConvertArguments, names: Names, source: str
) -> ViTConfig:
    """Return the slice encoder's configuration.

    Args:
        weights: under transformers' names of a ViT.
        known: settings that come with the weights.
        args: options of the user, which take precedence.
        names: table of names, for messages.
        source: name of the checkpoint, for messages.

    Raises:
        ConversionError: a weight is missing, or its shape contradicts the options.
    """
    _, kernel, positions, up = _shapes(
        weights,
        (
            "embeddings.cls_token",
            "embeddings.patch_embeddings.projection.weight",
            "embeddings.position_embeddings",
            "layers.0.mlp.fc1.weight",
        ),
        names,
        source,
    )
    hidden, channels, patch, _ = kernel
    grid = round((positions[1] - 1) ** 0.5)  # patches per side
    if grid**2 + 1 != positions[1] or args.image_size not in (None, grid * patch):
        wanted = f"{args.image_size} x {args.image_size}" if args.image_size else "square"
        raise ConversionError(
            f"{source}: its position embeddings are for CLS and {positions[1] - 1} patches of {patch} pixels (image size "
            f"{grid * patch} if square); expected those of {wanted} images. Give the image size that it was trained for."
        )
    heads = args.slice_encoder_heads or known.get("num_attention_heads") or known.get("num_heads") or hidden / 64
    if hidden % heads:
        raise ConversionError(f"{source}: {heads:g} attention heads don't divide {hidden}; give --slice_encoder_heads.")
    return ViTConfig(
        image_size=grid * patch,
        patch_size=patch,
        num_channels=channels,
        hidden_size=hidden,
        num_hidden_layers=_count_layers(weights, "layers.", names, source),
        num_attention_heads=int(heads),
        intermediate_size=up[0],
        hidden_act=known.get("hidden_act", "gelu"),
        qkv_bias="layers.0.attention.q_proj.bias" in weights,
        layer_norm_eps=args.layer_norm_eps or known.get("layer_norm_eps", 1e-6),
    )


def text_config(
    weights: Mapping[str, torch.Tensor], known: JsonObject, args: ConvertArguments, source: str
) -> JsonObject:
    """Return Phi-3's configuration.

    Args:
        weights: under transformers' names of Phi-3.
        known: settings that come with the weights.
        args: options of the user, which take precedence.
        source: name of the checkpoint, for messages.

    Raises:
        ConversionError: a weight is missing, or the number of attention heads is unknown or doesn't fit.
    """
    wanted = ("embed_tokens.weight", "layers.0.mlp.down_proj.weight", "layers.0.self_attn.qkv_proj.weight")
    (rows, hidden), (_, intermediate), (stacked, _) = _shapes(weights, wanted, TEXT_NAMES, source)
    heads = args.text_heads or known.get("num_attention_heads") or (32 if hidden == 3072 else None)
    if heads is None:
        raise ConversionError(
            f"{source}: a language model of width {hidden}, not Phi-3-mini's 3072; give --text_heads."
        )
    # qkv_proj stacks `heads` queries with as many keys as values, each hidden / heads wide.
    key_values = (stacked * heads / hidden - heads) / 2
    if hidden % heads or key_values < 1 or key_values % 1 or heads % key_values:
        raise ConversionError(
            f"{source}: {heads} attention heads don't fit a language model of width {hidden} whose qkv_proj has "
            f"{stacked} rows; give --text_heads."
        )
    ids = {}
    if rows <= 32000 and not known:  # Phi-3's default end and padding tokens are beyond these embeddings
        ids = {"eos_token_id": None, "pad_token_id": None}
    return {
        **ids,
        **(DEFAULT_TEXT_CONFIG if not known else {"model_type": "phi3"}),
        **{name: known[name] for name in _TEXT_SETTINGS if name in known},
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": _count_layers(weights, "layers.", TEXT_NAMES, source),
        "num_attention_heads": heads,
        "num_key_value_heads": int(key_values),
    }


def model_config(
    weights: Mapping[str, torch.Tensor], settings: Settings, args: ConvertArguments, source: str
) -> SamfConfig:
    """Return the configuration that reproduces the reference implementation with these weights.

    Args:
        weights: under our names.
        settings: settings that come with the weights.
        args: options of the user, which take precedence.
        source: name of the checkpoint, for messages.

    Raises:
        ConversionError: a weight is missing, or shapes don't fit each other or the options.
    """
    wanted = (
        "model.aggregator.layers.0.up_proj.weight",
        "model.aggregator.projection.weight",
        "model.fusion.project_slices.weight",
        "model.fusion.mix.weight",
    )
    (ffn, _), (volume_dim, _), (dim, _), (_, mixed) = _shapes(weights, wanted, MODEL_NAMES, source)
    fusion_type = {3 * dim: "samf", 4 * dim: "ao2d"}.get(mixed)
    if fusion_type is None:
        raise ConversionError(
            f"{source}: its fusion_layer reads {mixed} values; expected 3 or 4 parts of {dim} (SAMF or Ao2D)."
        )
    encoder, text = (_part(weights, prefix) for prefix in ("model.slice_encoder.", "model.language_model."))
    return SamfConfig(
        vision_config=vision_config(encoder, settings["vision"], args, DINO_NAMES, source),
        text_config=text_config(text, settings["text"], args, source),
        num_image_tokens=args.num_image_tokens,
        slice_position_scope="none",
        aggregator_num_layers=_count_layers(weights, "model.aggregator.layers.", MODEL_NAMES, source),
        aggregator_num_heads=args.aggregator_heads or settings["aggregator"].get("nhead", 8),
        aggregator_ffn_dim=ffn,
        volume_dim=volume_dim,
        fusion_type=fusion_type,
        fusion_dim=dim,
        fusion_text_scope="sequence",
        project_text="model.fusion.project_text.weight" in weights,
    )


def _part(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _shapes(weights: Mapping[str, torch.Tensor], wanted: Sequence[str], names: Names, source: str) -> list[torch.Size]:
    """Return the shapes of the weights that determine the model's sizes."""
    absent = [names.theirs(name) for name in wanted if name not in weights]
    if absent:
        raise ConversionError(f"{source}: lacks {', '.join(absent)}. Is it a complete checkpoint of this kind?")
    for name in wanted:
        shape = weights[name].shape
        dimensions = next((n for end, n in _DIMENSIONS.items() if name.endswith(end)), 2)
        if len(shape) != dimensions:
            raise ConversionError(
                f"{source}: {names.theirs(name)} has shape {list(shape)}; expected {dimensions} dimensions."
            )
    return [weights[name].shape for name in wanted]


def _count_layers(weights: Iterable[str], prefix: str, names: Names, source: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {int(match[1]): name for name in weights if (match := pattern.match(name))}
    absent = next(number for number in range(len(numbers) + 1) if number not in numbers)
    if absent < len(numbers):
        last = numbers[max(numbers)]
        raise ConversionError(
            f"{source}: lacks layer {absent}, though it holds {names.theirs(last)}. Is it a complete checkpoint?"
        )
    return len(numbers)
