"""Reading checkpoints: the files of a folder or a Hub repository, their tensors and their settings."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from huggingface_hub import list_repo_files, snapshot_download
from safetensors import SafetensorError, safe_open

from samf.data.schema import JsonObject
from samf.scripts.conversion_arguments import ConvertArguments, Part
from samf.scripts.conversion_checks import (
    ADAPTER_CONFIG,
    ConversionError,
    Entries,
    as_object,
    check_indexed,
    check_tensors,
    read_index,
    read_json,
)

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

# Entries of a recorded run in addition to its weights, which are then called weights/….
RECORDED = re.compile(r"(input|output)/.*")
# What torch.load raises for a damaged or a foreign file.
_UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk.

    Attributes:
        name: Hub id, or name of the folder or file.
        files: weight files.
        folder: folder with its config.json and tokenizer; None for a single file.
        places: tensor → file, according to the index of a checkpoint in several files.
    """

    name: str
    files: tuple[Path, ...]
    folder: Path | None
    places: Mapping[str, str] = field(default_factory=dict)


class Settings(TypedDict):
    """Settings that come with the weights, of the three parts of a model."""

    text: JsonObject
    vision: JsonObject
    aggregator: JsonObject


def find_checkpoint(args: ConvertArguments) -> Checkpoint:
    """Return the checkpoint that `args.source` names; only what is needed is fetched from a Hub repository.

    Raises:
        ConversionError: there is no such source, or its weights file isn't clear.
    """
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
    """Return the weights file, or the index of several files.

    Args:
        names: files of the source.
        source: its name, for messages.
        file: the file that the user names; default: the usual name, or the only weights file.

    Raises:
        ConversionError: there is no such file, or the choice isn't clear.
    """
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
    """Return the files of an index, their folder, and tensor → file."""
    places = read_index(index)
    return tuple(index.parent / name for name in sorted(set(places.values()))), index.parent, places


def read_weights(file: Path) -> tuple[Entries, dict[str, str]]:
    """Return the entries of a weights file, memory-mapped where possible, and a safetensors file's metadata.

    Raises:
        ConversionError: the file is damaged, or isn't a dictionary of plain data by name.
    """
    if file.suffix != ".safetensors":
        return _read_pickle(file), {}
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ConversionError(f"{file}: not a complete safetensors file ({error}). Fetch it again.") from error


def _read_pickle(file: Path) -> Entries:
    # Facebook's DINO checkpoints also hold the command line and numpy numbers: plain data.
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    plain: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    plain = [argparse.Namespace, np.dtype, np.ndarray, type(np.dtype(np.float64)), type(np.dtype(np.int64))]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        plain += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    try:
        with torch.serialization.safe_globals(plain):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except _UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ConversionError(
            f"{file}: can't be read as plain tensors ({reason}). A file that pickles a whole model could run any code: "
            f"if you trust it, load it with its own code and save `model.state_dict()`; if it is damaged, fetch it again."
        ) from error
    if not isinstance(loaded, Mapping):
        raise ConversionError(f"{file}: holds a {type(loaded).__name__}; expected a dictionary of tensors.")
    odd = [name for name in loaded if not isinstance(name, str)]
    if odd:
        raise ConversionError(f"{file}: names an entry {odd[0]!r}, not text; expected a dictionary of tensors by name.")
    return dict(loaded)


def read_checkpoint(checkpoint: Checkpoint, part: Part) -> tuple[Entries, Settings]:
    """Return all entries of a checkpoint's files by name, and the settings that come with them.

    Every tensor of a "model" is checked here, file by file; of a slice encoder's file only some are the backbone's.

    Raises:
        ConversionError: a file is damaged, or lacks or repeats a tensor.
    """
    weights: dict[str, object] = {}
    settings: Settings = {"text": {}, "vision": {}, "aggregator": {}}
    for file in checkpoint.files:
        loaded, metadata = read_weights(file)
        check_indexed(file, loaded, checkpoint.places)
        if part == "model":
            check_tensors({name: value for name, value in loaded.items() if not RECORDED.fullmatch(name)}, file)
        twice = sorted(weights.keys() & loaded.keys())
        if twice:
            raise ConversionError(
                f"{file}: holds tensors that another file of the checkpoint holds too: {', '.join(twice)}."
            )
        weights |= loaded
        for key, values in (
            ("config", settings["text"]),
            ("vision", settings["vision"]),
            ("aggregator", settings["aggregator"]),
        ):
            values |= as_object(metadata.get(key, "{}"), f"{file}, its metadata {key!r}")
    config = checkpoint.folder and checkpoint.folder / "config.json"
    if config and config.is_file():
        settings["text"] |= read_json(config)
    return weights, settings
