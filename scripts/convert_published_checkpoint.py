"""Checkpoints of the paper's published code, and DINO backbones, as folders that this project loads.

    python convert_published_checkpoint.py --source serag-ai/SAMF --output_dir models/published
    python convert_published_checkpoint.py --source runs/model_with_lora.bin --output_dir models/published \\
        --tokenizer microsoft/Phi-3-mini-4k-instruct
    python convert_published_checkpoint.py --part slice_encoder --source dino_backbone.pth --output_dir encoders/dino

The first two write a complete Hub repository that repeats the published model: its weights, its preprocessing (preset
"published" of the image processor), its prompt's form and its fusion, which reads every token. The third writes what
`train.py --slice_encoder` takes. Sizes come from the weights' shapes, the rest from a config.json beside them, the
options below, or the paper. Every tensor of the source is used, merged or left out by name; any other is an error.
"""

import argparse
import logging
import pickle
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import list_repo_files, snapshot_download
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, ViTConfig, ViTModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from samf.model.configuration_samf import DEFAULT_TEXT_CONFIG, SamfConfig
from samf.model.hub_samf import publish_weights
from samf.model.image_processing_samf import SamfImageProcessor
from samf.model.model_card import make_card, write_model_card
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.processing_samf import IMAGE_TOKEN, SamfProcessor
from samf.scripts.conversion_checks import (
    ADAPTER_CONFIG,
    ConversionError,
    UniqueNames,
    as_object,
    check_adapter,
    check_adapter_config,
    check_indexed,
    check_tensors,
    read_index,
    read_json,
)
from samf.utils.files import atomic_folder
from samf.utils.recipe import parse_recipe

logger = logging.getLogger("samf.convert")

MAX_SHARD_SIZE = "2GB"  # a shard is copied once more while it is written
MODEL_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "merged_model.bin",
    "model_with_lora.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
PUBLISHED_IMAGE_TOKEN = "<im_patch>"
DEFAULT_IMAGE_TOKEN_ID = 32011  # Phi-3's first free row, which the published code gives to its placeholder

# Names: published ↔ ours. {n} is a layer's number, {p} weight or bias. {qkv} on our side alone: three of our tensors
# stand stacked in one of theirs.
DINO_NAMES = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.{p}", "embeddings.patch_embeddings.projection.{p}"),
    ("blocks.{n}.norm1.{p}", "layers.{n}.layernorm_before.{p}"),
    ("blocks.{n}.attn.qkv.{p}", "layers.{n}.attention.{qkv}_proj.{p}"),
    ("blocks.{n}.attn.proj.{p}", "layers.{n}.attention.o_proj.{p}"),
    ("blocks.{n}.norm2.{p}", "layers.{n}.layernorm_after.{p}"),
    ("blocks.{n}.mlp.fc1.{p}", "layers.{n}.mlp.fc1.{p}"),
    ("blocks.{n}.mlp.fc2.{p}", "layers.{n}.mlp.fc2.{p}"),
    ("norm.{p}", "layernorm.{p}"),
)
# transformers' ViT, under its names of today and of older releases.
VIT_NAMES = (
    *((ours, ours) for _, ours in DINO_NAMES),
    ("encoder.layer.{n}.layernorm_before.{p}", "layers.{n}.layernorm_before.{p}"),
    ("encoder.layer.{n}.attention.attention.query.{p}", "layers.{n}.attention.q_proj.{p}"),
    ("encoder.layer.{n}.attention.attention.key.{p}", "layers.{n}.attention.k_proj.{p}"),
    ("encoder.layer.{n}.attention.attention.value.{p}", "layers.{n}.attention.v_proj.{p}"),
    ("encoder.layer.{n}.attention.output.dense.{p}", "layers.{n}.attention.o_proj.{p}"),
    ("encoder.layer.{n}.layernorm_after.{p}", "layers.{n}.layernorm_after.{p}"),
    ("encoder.layer.{n}.intermediate.dense.{p}", "layers.{n}.mlp.fc1.{p}"),
    ("encoder.layer.{n}.output.dense.{p}", "layers.{n}.mlp.fc2.{p}"),
)
AGGREGATOR_NAMES = (
    ("cls_token", "cls_token"),
    ("transformer_encoder.layers.{n}.self_attn.in_proj_{p}", "layers.{n}.attention.{qkv}_proj.{p}"),
    ("transformer_encoder.layers.{n}.self_attn.out_proj.{p}", "layers.{n}.attention.o_proj.{p}"),
    ("transformer_encoder.layers.{n}.norm1.{p}", "layers.{n}.attention_norm.{p}"),
    ("transformer_encoder.layers.{n}.linear1.{p}", "layers.{n}.up_proj.{p}"),
    ("transformer_encoder.layers.{n}.linear2.{p}", "layers.{n}.down_proj.{p}"),
    ("transformer_encoder.layers.{n}.norm2.{p}", "layers.{n}.feed_forward_norm.{p}"),
    ("volume_proj.{p}", "projection.{p}"),
)
FUSION_NAMES = (
    ("project_2d.{p}", "project_slices.{p}"),
    ("project_3d.{p}", "project_volume.{p}"),
    ("project_text.{p}", "project_text.{p}"),
    ("fusion_layer.{p}", "mix.{p}"),
)
TEXT_NAMES = (
    ("embed_tokens.weight", "embed_tokens.weight"),
    ("layers.{n}.{rest}", "layers.{n}.{rest}"),
    ("norm.weight", "norm.weight"),
)
PARTS = (
    ("model.vision_tower.vision_tower.", "model.slice_encoder.", DINO_NAMES),
    ("model.mm_projector.", "model.aggregator.", AGGREGATOR_NAMES),
    ("model.mm_fusion.", "model.fusion.", FUSION_NAMES),
    ("model.", "model.language_model.", TEXT_NAMES),
    ("", "", (("lm_head.weight", "lm_head.weight"),)),
)
MODEL_NAMES = tuple((theirs + a, ours + b) for theirs, ours, names in PARTS for a, b in names)
FIELDS = {"n": r"\d+", "p": "weight|bias", "qkv": "[qkv]", "rest": ".+"}

# What config.json says of Phi-3 that no weight's shape shows.
TEXT_SETTINGS = (
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
RECORDED = re.compile(r"(input|output)/.*")  # beside the weights of a recorded run, which are then called weights/…
# What a damaged or a foreign file makes torch.load raise.
UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)
DIMENSIONS = {"cls_token": 3, "position_embeddings": 3, "patch_embeddings.projection.weight": 4}
WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "vit.")
NOT_THE_BACKBONE = re.compile(
    r"((projection_|prediction_)?heads?|classifier|pooler|fc|criterion|dino_loss)\..*|(embeddings\.)?mask_token"
)

# The published prompt: placeholders and the question, with no marks of who speaks; the answer follows after a space.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{{ ' ' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for block in message['content'] -%}{{ block['text'] }}{%- endfor -%}{%- endif -%}
{{ eos_token }}
{%- endgeneration -%}
{%- elif message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for block in message['content'] -%}
{%- if block['type'] in ('volume', 'image') -%}{{ '<image>' }}
{%- elif block['type'] == 'text' -%}{{ block['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""


@dataclass
class ConvertArguments:
    source: str = field(metadata={"help": "Hub id, folder or file of the checkpoint"})
    output_dir: str = field(metadata={"help": "new folder"})
    part: str = field(
        default="model", metadata={"help": "what the source is: model, or slice_encoder (a DINO backbone)"}
    )
    file: str | None = field(default=None, metadata={"help": "weights file in the source, if it holds several"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub source"})
    tokenizer: str | None = field(default=None, metadata={"help": "folder or Hub id; default: the source's own"})
    dtype: str = field(
        default="auto", metadata={"help": "of the weights: auto (as they are), float32, bfloat16, float16"}
    )
    lora_alpha: float = field(default=32.0, metadata={"help": "alpha of the LoRA adapters; the rank is their shape's"})
    branch: str | None = field(default=None, metadata={"help": "of a DINO checkpoint: teacher (default) or student"})
    image_size: int | None = field(default=None, metadata={"help": "pixels a side that the slice encoder must be for"})
    slice_encoder_heads: int | None = field(
        default=None, metadata={"help": "attention heads; default: one for 64 units"}
    )
    layer_norm_eps: float | None = field(
        default=None, metadata={"help": "of the slice encoder; default 1e-6, as DINO's"}
    )
    aggregator_heads: int | None = field(default=None, metadata={"help": "attention heads; default 8"})
    text_heads: int | None = field(
        default=None, metadata={"help": "attention heads of the language model; default: Phi-3-mini's 32"}
    )
    num_image_tokens: int = field(default=256, metadata={"help": "placeholders a volume takes in the prompt"})
    image_token_id: int | None = field(
        default=None, metadata={"help": "the placeholder's id; default: the tokenizer's"}
    )

    def __post_init__(self):
        choices = {
            "part": ("model", "slice_encoder"),
            "branch": (None, "teacher", "student"),
            "dtype": ("auto", "float32", "bfloat16", "float16"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ConversionError(f"{name} is {getattr(self, name)!r}; expected one of {values}.")
        positive = (
            "lora_alpha",
            "image_size",
            "slice_encoder_heads",
            "layer_norm_eps",
            "aggregator_heads",
            "text_heads",
        )
        for name in (*positive, "num_image_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConversionError(f"{name} is {value!r}; expected a positive number.")


# ---------------------------------------------------------------------------------------------------------- the source


@dataclass(frozen=True)
class Checkpoint:
    """A source on this disk: weight files, and the folder with its config.json and tokenizer, if it is one."""

    name: str
    files: tuple[Path, ...]
    folder: Path | None
    places: Mapping[str, str] = field(default_factory=dict)  # which of several files an index says holds which tensor


def find_checkpoint(args: ConvertArguments) -> Checkpoint:
    """The files of `args.source`. Of a Hub repository only what is needed is fetched."""
    path = Path(args.source)
    if path.is_file() and not path.name.endswith(".index.json"):
        return Checkpoint(path.name, (path,), None)
    if path.is_file():
        return Checkpoint(path.parent.name, *_indexed(path))
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if entry.is_file()]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", args.source):
        names = list_repo_files(args.source, revision=args.revision)
    else:
        raise ConversionError(f"{args.source}: no such file or folder, and not a Hub id like serag-ai/SAMF.")
    chosen = choose_file(names, args.source, args.file)
    if not path.is_dir():
        weights = re.sub(r"(\.\w+)\.index\.json$", r"*\1", chosen)  # an index and all its shards
        wanted = [chosen, weights, "config.json", "generation_config.json", ADAPTER_CONFIG, *TOKENIZER_FILES]
        path = Path(snapshot_download(args.source, revision=args.revision, allow_patterns=wanted))
    name = path.resolve().name if Path(args.source).is_dir() else args.source
    chosen_path = path / chosen
    return (
        Checkpoint(name, *_indexed(chosen_path))
        if chosen.endswith(".index.json")
        else Checkpoint(name, (chosen_path,), path)
    )


def choose_file(names: Iterable[str], source: str, file: str | None = None) -> str:
    """The weights file, or index of several, among a source's `names`: `file`, else the usual one, else the only one."""
    names = sorted(names)
    if file is not None:
        if file not in names:
            raise ConversionError(f"{source}: holds no file {file!r}; it holds {', '.join(names)}.")
        return file
    usual = [name for name in MODEL_FILES if name in names]
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES) and name != "training_args.bin"]
    if usual:
        return usual[0]
    if len(weights) != 1:
        raise ConversionError(
            f"{source}: found {len(weights)} weight files ({', '.join(weights) or 'none'}); expected one of "
            f"{', '.join(MODEL_FILES)}, or a single one. Name it with --file."
        )
    return weights[0]


def _indexed(index: Path) -> tuple[tuple[Path, ...], Path, dict[str, str]]:
    """The files of an index, their folder, and which tensor is where."""
    places = read_index(index)
    return tuple(index.parent / name for name in sorted(set(places.values()))), index.parent, places


def read_weights(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a weights file holds, and a safetensors file's metadata. Tensors are maps of the file where it allows that."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ConversionError(f"{file}: not a whole safetensors file ({error}). Fetch it anew.") from error
    # Facebook's DINO checkpoints hold the command line and numpy numbers beside the weights: plain data.
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    plain = [argparse.Namespace, np.dtype, np.ndarray, type(np.dtype(np.float64)), type(np.dtype(np.int64))]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        plain += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    try:
        with torch.serialization.safe_globals(plain):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ConversionError(
            f"{file}: can't be read as tensors alone ({reason}). A file that pickles a whole model could run any code: "
            f"where you trust it, load it with its own code and save `model.state_dict()`; a damaged one, fetch anew."
        ) from error
    if not isinstance(loaded, Mapping):
        raise ConversionError(f"{file}: holds a {type(loaded).__name__}; expected a dictionary of tensors.")
    odd = [name for name in loaded if not isinstance(name, str)]
    if odd:
        raise ConversionError(f"{file}: names an entry {odd[0]!r}, no text; expected a dictionary of tensors by name.")
    return dict(loaded), {}


def read_checkpoint(checkpoint: Checkpoint, part: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """All tensors by name, and what is known beside them: the settings of "text", "vision" and "aggregator".

    Of a "model" every tensor is checked here, file by file; of a slice encoder's file only some are the backbone's.
    """
    weights: dict[str, Any] = {}
    facts: dict[str, dict[str, Any]] = {"text": {}, "vision": {}, "aggregator": {}}
    for file in checkpoint.files:
        loaded, metadata = read_weights(file)
        check_indexed(file, loaded, checkpoint.places)
        if part == "model":
            check_tensors({name: value for name, value in loaded.items() if not RECORDED.fullmatch(name)}, file)
        twice = sorted(weights.keys() & loaded.keys())
        if twice:
            raise ConversionError(f"{file}: holds tensors that another file of its holds too: {', '.join(twice)}.")
        weights |= loaded
        for key, name in (("config", "text"), ("vision", "vision"), ("aggregator", "aggregator")):
            facts[name] |= as_object(metadata.get(key, "{}"), f"{file}, its metadata {key!r}")
    config = checkpoint.folder and checkpoint.folder / "config.json"
    if config and config.is_file():
        facts["text"] |= read_json(config)
    return weights, facts


# ---------------------------------------------------------------------------------------------------------------- names


@cache
def _pattern(template: str) -> re.Pattern:
    pieces = re.split(r"\{(\w+)\}", template)  # text, field, text, field, …
    return re.compile(
        "".join(f"(?P<{piece}>{FIELDS[piece]})" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
    )


def translate(name: str, names: Iterable[tuple[str, str]]) -> str | None:
    """`name` by the first pair of templates whose left side it fits; a field that only the right side has stays."""
    for theirs, ours in names:
        match = _pattern(theirs).fullmatch(name)
        if match:
            return ours.format(**{"qkv": "{qkv}", **match.groupdict()})
    return None


def rename(weights: Mapping[str, Any], names: tuple[tuple[str, str], ...], source: str) -> dict[str, torch.Tensor]:
    """`weights` under our names, stacked ones cut in three. Raises ConversionError that lists what has no name here."""
    ours, unknown = UniqueNames(source), []
    for name, value in weights.items():
        target = translate(name, names)
        if target is None or not isinstance(value, torch.Tensor):
            unknown.append(name)
        elif "{qkv}" in target:
            if value.ndim == 0 or len(value) % 3:
                raise ConversionError(
                    f"{source}: {name} has shape {list(value.shape)}; expected queries, keys and values."
                )
            for letter, third in zip("qkv", value.tensor_split(3), strict=True):
                # Cloned, being small: a file can't hold three views of one tensor.
                ours.add(target.format(qkv=letter), third.clone(), name)
        else:
            ours.add(target, value, name)
    if unknown:
        raise ConversionError(f"{source}: holds what this conversion doesn't know: {', '.join(sorted(unknown))}.")
    return ours


def fill(model: PreTrainedModel, weights: dict[str, torch.Tensor], names: Iterable, source: str, dtype: str) -> None:
    """Gives a model without memory of its own these `weights`, which are cast where they are.

    Raises ConversionError that lists all that doesn't fit.
    """
    back = tuple((ours, theirs) for theirs, ours in names)
    expected = model.state_dict()
    lists = {
        "lacks": sorted({translate(name, back) or name for name in expected.keys() - weights.keys()}),
        "holds what this conversion doesn't know": sorted(
            translate(name, back) or name for name in weights.keys() - expected.keys()
        ),
        "has unexpected shapes": [
            f"{translate(name, back)} {list(weights[name].shape)}, expected {list(expected[name].shape)}"
            for name in sorted(expected.keys() & weights.keys())
            if weights[name].shape != expected[name].shape
        ],
    }
    wrong = "; ".join(f"{what}: {', '.join(found)}" for what, found in lists.items() if found)
    if wrong:
        raise ConversionError(f"{source}: {wrong}. Is it a whole checkpoint of this kind?")
    if dtype != "auto":
        for name in weights:
            weights[name] = weights[name].to(getattr(torch, dtype))  # one by one, so that few are there twice
            if not weights[name].isfinite().all():
                raise ConversionError(
                    f"{source}: {translate(name, back) or name} is too large for {dtype}. Give --dtype bfloat16 or float32."
                )
    model.load_state_dict(weights, strict=True, assign=True)


def _need(weights: Mapping[str, torch.Tensor], wanted: Iterable[str], names: Iterable, source: str) -> list[torch.Size]:
    """Shapes of the tensors that tell the model's sizes: matrices, but for the slice encoder's own."""
    back = tuple((ours, theirs) for theirs, ours in names)
    absent = [translate(name, back) or name for name in wanted if name not in weights]
    if absent:
        raise ConversionError(f"{source}: lacks {', '.join(absent)}. Is it a whole checkpoint of this kind?")
    for name in wanted:
        shape, dimensions = weights[name].shape, next((n for end, n in DIMENSIONS.items() if name.endswith(end)), 2)
        if len(shape) != dimensions:
            raise ConversionError(
                f"{source}: {translate(name, back) or name} has shape {list(shape)}; expected {dimensions} dimensions."
            )
    return [weights[name].shape for name in wanted]


def _count_layers(weights: Iterable[str], prefix: str, names: Iterable, source: str) -> int:
    pattern, back = re.compile(re.escape(prefix) + r"(\d+)\."), tuple((ours, theirs) for theirs, ours in names)
    numbers = {int(match[1]): name for name in weights if (match := pattern.match(name))}
    absent = next(number for number in range(len(numbers) + 1) if number not in numbers)
    if absent < len(numbers):
        last = numbers[max(numbers)]
        raise ConversionError(
            f"{source}: lacks layer {absent}, though it holds {translate(last, back) or last}. Is it a whole checkpoint?"
        )
    return len(numbers)


# -------------------------------------------------------------------------------------------------- the published model


def plain_names(weights: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`weights` without the marks of parallel training, and without inputs and outputs recorded beside them."""
    if any(name.startswith("weights/") for name in weights):
        weights = {name.removeprefix("weights/"): v for name, v in weights.items() if not RECORDED.fullmatch(name)}
    plain = UniqueNames(source)
    for name, value in weights.items():
        plain.add(_strip(name, ("module.", "_orig_mod.")), value, name)
    return plain


def merge_lora(weights: Mapping[str, Any], alpha: float, source: str, dtype: str = "auto") -> dict[str, Any]:
    """peft's names → the wrapped model's, with W + (alpha / r) B A in place of each W that has an adapter (A, B).

    Of a module that was trained whole (`modules_to_save`) the trained copy is kept and the original left out. Sums are
    made in float32, then rounded to `dtype`; "auto" = that of W.
    """
    merged = UniqueNames(source)
    adapters = {"A": UniqueNames(source), "B": UniqueNames(source)}
    for full_name, value in weights.items():
        name = full_name.removeprefix("base_model.model.")
        adapter = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", name)
        if adapter:
            adapters[adapter[2]].add(f"{adapter[1]}.weight", value, full_name)
        elif ".original_module." in name:
            logger.info("%s: left out %s, of which a trained copy is there", source, name)
        else:
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            merged.add(plain, value, full_name)
    down, up = adapters["A"], adapters["B"]
    halves = sorted((down.keys() ^ up.keys()) | (down.keys() - merged.keys()))
    if halves:
        raise ConversionError(f"{source}: LoRA adapters without their other half or weight: {', '.join(halves)}.")
    for name in down:
        check_adapter(name, merged[name], down[name], up[name], source)
    if down:
        ranks = sorted({value.shape[0] for value in down.values()})
        logger.info("%s: merges %d LoRA adapters of rank %s, alpha %g", source, len(down), ranks, alpha)
    for name in tqdm(down, desc="Merging adapters", disable=not down):
        weight, scale = merged[name], alpha / down[name].shape[0]
        whole = torch.addmm(weight.float(), up[name].float(), down[name].float(), alpha=scale)
        merged[name] = whole.to(weight.dtype if dtype == "auto" else getattr(torch, dtype))
        check_tensors({name: merged[name]}, f"{source}, with its adapters merged")
    return merged


def vision_config(
    weights: Mapping[str, torch.Tensor], known: Mapping[str, Any], args: ConvertArguments, names: Iterable, source: str
) -> ViTConfig:
    """The slice encoder's configuration from weights under the ViT's names and what else is `known`."""
    _, kernel, positions, up = _need(
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
    grid = round((positions[1] - 1) ** 0.5)
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
    weights: Mapping[str, torch.Tensor], known: Mapping[str, Any], args: ConvertArguments, source: str
) -> dict[str, Any]:
    """Phi-3's configuration from weights under its own names and what else is `known`."""
    wanted = ("embed_tokens.weight", "layers.0.mlp.down_proj.weight", "layers.0.self_attn.qkv_proj.weight")
    (rows, hidden), (_, intermediate), (stacked, _) = _need(weights, wanted, TEXT_NAMES, source)
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
    if rows <= 32000 and not known:  # Phi-3's usual end and padding token are beyond these embeddings
        ids = {"eos_token_id": None, "pad_token_id": None}
    return {
        **ids,
        **(DEFAULT_TEXT_CONFIG if not known else {"model_type": "phi3"}),
        **{name: known[name] for name in TEXT_SETTINGS if name in known},
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": _count_layers(weights, "layers.", TEXT_NAMES, source),
        "num_attention_heads": heads,
        "num_key_value_heads": int(key_values),
    }


def model_config(
    weights: Mapping[str, torch.Tensor], facts: Mapping[str, Mapping[str, Any]], args: ConvertArguments, source: str
) -> SamfConfig:
    """The configuration that repeats the published model with these weights (under our names)."""
    wanted = (
        "model.aggregator.layers.0.up_proj.weight",
        "model.aggregator.projection.weight",
        "model.fusion.project_slices.weight",
        "model.fusion.mix.weight",
    )
    (ffn, _), (volume_dim, _), (dim, _), (_, mixed) = _need(weights, wanted, MODEL_NAMES, source)
    fusion_type = {3 * dim: "samf", 4 * dim: "ao2d"}.get(mixed)
    if fusion_type is None:
        raise ConversionError(
            f"{source}: its fusion_layer reads {mixed} values; expected 3 or 4 parts of {dim} (SAMF or Ao2D)."
        )
    encoder, text = (_part(weights, prefix) for prefix in ("model.slice_encoder.", "model.language_model."))
    return SamfConfig(
        vision_config=vision_config(encoder, facts["vision"], args, DINO_NAMES, source),
        text_config=text_config(text, facts["text"], args, source),
        num_image_tokens=args.num_image_tokens,
        slice_position_scope="none",
        aggregator_num_layers=_count_layers(weights, "model.aggregator.layers.", MODEL_NAMES, source),
        aggregator_num_heads=args.aggregator_heads or facts["aggregator"].get("nhead", 8),
        aggregator_ffn_dim=ffn,
        volume_dim=volume_dim,
        fusion_type=fusion_type,
        fusion_dim=dim,
        fusion_text_scope="sequence",
        project_text="model.fusion.project_text.weight" in weights,
    )


def _part(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def build_processor(
    checkpoint: Checkpoint, config: SamfConfig, args: ConvertArguments
) -> SamfProcessor | SamfImageProcessor:
    """The published preprocessing, with the tokenizer that is given or found; alone where there is none.

    Sets `config.image_token_id`.
    """
    image_processor = SamfImageProcessor(preset="published", size=config.vision_config.image_size)
    tokenizer = load_tokenizer(checkpoint, args)
    config.image_token_id = DEFAULT_IMAGE_TOKEN_ID if args.image_token_id is None else args.image_token_id
    processor: SamfProcessor | SamfImageProcessor = image_processor
    if tokenizer is None:
        logger.warning(
            "%s: has no tokenizer, so the folder gets an image processor alone. Give --tokenizer, e.g. "
            "microsoft/Phi-3-mini-4k-instruct.",
            checkpoint.name,
        )
    else:
        processor = SamfProcessor(image_processor, tokenizer, CHAT_TEMPLATE, num_image_tokens=args.num_image_tokens)
        if args.image_token_id not in (None, processor.image_token_id):
            raise ConversionError(
                f"The tokenizer's placeholder has id {processor.image_token_id}, but image_token_id is "
                f"{args.image_token_id}. Give the tokenizer that the checkpoint was trained with."
            )
        config.image_token_id = processor.image_token_id
    rows = config.text_config.vocab_size
    if config.image_token_id >= rows:
        raise ConversionError(
            f"{checkpoint.name}: the placeholder's id is {config.image_token_id}, but the language model embeds {rows} "
            f"tokens. Give the right --image_token_id or --tokenizer."
        )
    return processor


def load_tokenizer(checkpoint: Checkpoint, args: ConvertArguments) -> PreTrainedTokenizerBase | None:
    """The tokenizer that is given, else the checkpoint's own, else None; its placeholder is called as ours."""
    folder = checkpoint.folder
    if args.tokenizer is not None:
        folder = Path(args.tokenizer)
        if not folder.is_dir():
            folder = Path(snapshot_download(args.tokenizer, allow_patterns=list(TOKENIZER_FILES)))
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()] if folder else []
    if not any(path.name in ("tokenizer.json", "tokenizer.model") for path in found):
        if args.tokenizer is not None:
            raise ConversionError(f"{args.tokenizer}: holds neither tokenizer.json nor tokenizer.model.")
        return None
    if not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise ConversionError(
            f"{folder}: reading tokenizer.model needs sentencepiece: pip install sentencepiece protobuf. Or give a "
            f"--tokenizer with a tokenizer.json, e.g. microsoft/Phi-3-mini-4k-instruct."
        )
    with tempfile.TemporaryDirectory() as copy:
        for path in found:
            if path.suffix == ".json":
                text = path.read_text(encoding="utf-8").replace(PUBLISHED_IMAGE_TOKEN, IMAGE_TOKEN)
                (Path(copy) / path.name).write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(path, Path(copy) / path.name)
        tokenizer = AutoTokenizer.from_pretrained(copy, trust_remote_code=False)
    tokenizer.name_or_path = ""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def convert_model(args: ConvertArguments) -> None:
    """A checkpoint of the published code → `args.output_dir`, a complete Hub repository."""
    with new_folder(args.output_dir) as folder:
        checkpoint = find_checkpoint(args)
        weights, facts = read_checkpoint(checkpoint, args.part)
        check_adapter_config(checkpoint.files[0].parent, weights, args.lora_alpha, alone=checkpoint.folder is None)
        weights = merge_lora(plain_names(weights, checkpoint.name), args.lora_alpha, checkpoint.name, args.dtype)
        weights = rename(weights, MODEL_NAMES, checkpoint.name)
        config = model_config(weights, facts, args, checkpoint.name)
        processor = build_processor(checkpoint, config, args)
        model = _empty(lambda: SamfForConditionalGeneration(config))
        fill(model, weights, MODEL_NAMES, checkpoint.name, args.dtype)
        del weights
        _take_token_ids(model.generation_config, checkpoint.folder)
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        processor.save_pretrained(folder)
        shutil.copyfile(Path(__file__).resolve().parent.parent / "requirements.txt", folder / "requirements.txt")
        facts = {
            "Converted from": checkpoint.name + (f" at {args.revision}" if args.revision else ""),
            "Image processor": "preset `published`: 24 slices about the middle, HU cast to uint8",
            "Fusion's text": "every token, placeholders and padding included, as published",
        }
        write_model_card(folder, make_card(config, base_models=[args.source], facts=facts))
    logger.info(
        "%s: %s, %d parameters, in %s", checkpoint.name, config.fusion_type, model.num_parameters(), args.output_dir
    )
    logger.warning(
        "fusion_text_scope='sequence' repeats the published fusion, which reads every token. In training that is the "
        "answer too, which so leaks into the image tokens, and inference sees something else; and it always is the image "
        "placeholders and the padding, so that a prompt's result depends on what it is batched with."
    )


def _take_token_ids(generation_config: GenerationConfig, folder: Path | None) -> None:
    """Where the published folder says with which tokens texts begin and end, say it too. Its sampling is left behind."""
    file = folder and folder / "generation_config.json"
    if file and file.is_file():
        theirs = read_json(file)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if name in theirs:
                setattr(generation_config, name, theirs[name])


# ---------------------------------------------------------------------------------------------------- the slice encoder


def backbone_weights(loaded: Mapping[str, Any], branch: str | None, source: str) -> dict[str, Any]:
    """The backbone's weights out of a DINO checkpoint: one branch of it, without wrappers and heads.

    Args:
        loaded: a state dict, or one that holds it as `teacher`, `student`, `state_dict` or `model`.
        branch: "teacher" or "student"; None = the teacher's if it is there, as DINO uses it.
    """
    left_out: list[str] = []
    branches = (branch,) if branch else ("teacher", "student")
    while inner := next((k for k in (*branches, "state_dict", "model") if isinstance(loaded.get(k), Mapping)), None):
        left_out += [name for name in loaded if name != inner]
        branches = () if inner in branches else branches
        loaded = loaded[inner]
    names = {name: _strip(name, WRAPPERS) for name in loaded}
    found = {match[1] for name in names.values() if (match := re.match(r"(teacher|student)[._]", name))}
    chosen = next((name for name in branches if name in found), None)
    if branch and branches and not chosen:
        raise ConversionError(f"{source}: has no {branch}; leave --branch out to take the weights that it has.")
    weights: dict[str, Any] = {}
    for name, short in names.items():
        if chosen:
            own = re.sub(rf"^{chosen}[._]", "", short)
            short = short if own == short and re.match(r"(teacher|student)[._]", short) else _strip(own, WRAPPERS)
        if NOT_THE_BACKBONE.fullmatch(short) or (chosen and re.match(r"(teacher|student)[._]", short)):
            left_out.append(name)
        elif short in weights:
            raise ConversionError(f"{source}: holds {short} more than once, the last time as {name}.")
        else:
            weights[short] = loaded[name]
    if left_out:
        logger.info("%s: left out, not the backbone's: %s", source, ", ".join(left_out))
    return weights


def convert_slice_encoder(args: ConvertArguments) -> None:
    """A DINO backbone, timm's or transformers' ViT → `args.output_dir`, for `train.py --slice_encoder`."""
    with new_folder(args.output_dir) as folder:
        checkpoint = find_checkpoint(args)
        loaded, facts = read_checkpoint(checkpoint, args.part)
        known = facts["text"]  # config.json, which here is the ViT's
        if known.get("model_type", "vit") != "vit":
            raise ConversionError(
                f"{checkpoint.name}: its config.json is of a {known['model_type']!r}; expected 'vit'."
            )
        weights = backbone_weights(loaded, args.branch, checkpoint.name)
        check_tensors(weights, checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.name)
        names = VIT_NAMES if "embeddings.cls_token" in weights else DINO_NAMES
        weights = rename(weights, names, checkpoint.name)
        config = vision_config(weights, known, args, names, checkpoint.name)
        model = _empty(lambda: ViTModel(config, add_pooling_layer=False))
        fill(model, weights, names, checkpoint.name, args.dtype)
        model.save_pretrained(folder)
    logger.info(
        "%s: a ViT of %d layers, width %d, patches of %d pixels, images of %d, in %s",
        checkpoint.name,
        config.num_hidden_layers,
        config.hidden_size,
        config.patch_size,
        config.image_size,
        args.output_dir,
    )


# -------------------------------------------------------------------------------------------------------- what both use


def _strip(name: str, prefixes: tuple[str, ...]) -> str:
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _empty(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return build()


@contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """A folder under a temporary name, which becomes `path` once it is whole."""
    target = Path(path).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConversionError(f"{target}: is there already. Give a new folder, or move it away.")
    with atomic_folder(target) as temporary:
        yield temporary
        publish_weights(temporary)


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        (args,) = parse_recipe(ConvertArguments, argv)
        {"model": convert_model, "slice_encoder": convert_slice_encoder}[args.part](args)
    except ValueError as error:
        sys.exit(f"convert_published_checkpoint.py: {error}")


if __name__ == "__main__":
    main()
