"""What convert_published_checkpoint.py checks before it trusts a checkpoint: its JSON files, its tensors, its adapters."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ADAPTER_CONFIG = "adapter_config.json"
UNMERGEABLE = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "fan_in_fan_out")
_SHOWN = 5  # names in one message


class ConversionError(ValueError):
    """A checkpoint that can't be converted; the message names it, what was found, what was expected and the remedy."""


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        return as_object(file.read_text(encoding="utf-8-sig"), str(file))
    except OSError as error:
        raise ConversionError(f"{file}: can't be read ({error.strerror}). Check its permissions.") from error
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"{file}: is no UTF-8 text ({error.reason}). Save it as UTF-8, or fetch it anew."
        ) from error


def as_object(text: str, source: str) -> dict[str, Any]:
    """Return the object that JSON `text` of `source` holds."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConversionError(f"{source}: is no whole JSON ({error}). Fetch it anew.") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{source}: holds a {type(found).__name__}; expected a JSON object.")
    return found


def read_index(file: Path) -> dict[str, str]:
    """Return which file holds which tensor, from the index of a checkpoint in several files.

    Raises:
        ConversionError: it isn't such an index, or names files that aren't there.
    """
    places = read_json(file).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ConversionError(f"{file}: has no weight_map of tensors to files. Fetch it anew, or name a weights file.")
    outside = sorted({name for name in places.values() if Path(name).name != name})
    if outside:
        raise ConversionError(f"{file}: names files of other folders: {_some(outside)}; expected names alone.")
    absent = sorted({name for name in places.values() if not (file.parent / name).is_file()})
    if absent:
        raise ConversionError(f"{file}: lists files that aren't there: {', '.join(absent)}. Fetch them too.")
    return places


def check_tensors(weights: Mapping[str, Any], source: str | Path) -> None:
    """Raise ConversionError that names the tensors which no training leaves so: empty ones, NaN, infinite, whole numbers."""
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    problems = {
        "holds tensors without values (as a process of ZeRO-3 sees them; gather the weights before you save them)": (
            name for name, value in tensors.items() if value.numel() == 0
        ),
        f"holds tensors of other types than {_some([str(dtype) for dtype in WEIGHT_DTYPES])} (save it unquantised)": (
            f"{name} ({value.dtype})" for name, value in tensors.items() if value.dtype not in WEIGHT_DTYPES
        ),
        "holds NaN or infinite values (its training has diverged, or the file is damaged; take an earlier one)": (
            name for name, value in tensors.items() if value.dtype in WEIGHT_DTYPES and not value.isfinite().all()
        ),
    }
    for problem, found in problems.items():
        names = sorted(found)
        if names:
            raise ConversionError(f"{source}: {problem}: {_some(names)}.")


def check_indexed(file: Path, loaded: Iterable[str], places: Mapping[str, str]) -> None:
    """Whether a file holds all that the index says it does."""
    absent = sorted({name for name, place in places.items() if place == file.name} - set(loaded))
    if absent:
        raise ConversionError(f"{file}: lacks tensors that the index says it holds: {_some(absent)}. Fetch it anew.")


class UniqueNames(dict[str, Any]):
    """Tensors under new names, of which no two may become one."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.former = source, {}

    def add(self, name: str, value: Any, former: str) -> None:
        """Enter what was called `former` as `name`."""
        if name in self:
            raise ConversionError(
                f"{self.source}: {self.former[name]} and {former} are both {name} here, and only one can be meant. Remove "
                "the other from the file."
            )
        self[name], self.former[name] = value, former


def check_adapter(name: str, weight: Any, down: torch.Tensor, up: torch.Tensor, source: str) -> None:
    """Whether W (out, in), A (r, in) and B (out, r) make W + B A."""
    shapes = [list(getattr(part, "shape", ())) for part in (weight, down, up)]
    (rank, *_), fits = shapes[1] or [0], False
    if all(len(shape) == 2 for shape in shapes):
        fits = rank > 0 and shapes[1] == [rank, shapes[0][1]] and shapes[2] == [shapes[0][0], rank]
    if not fits:
        raise ConversionError(
            f"{source}: the LoRA adapter of {name} doesn't fit it: weight {shapes[0]}, lora_A {shapes[1]}, lora_B {shapes[2]}; "
            "expected [out, in], [r, in] and [out, r] with r of at least 1. Empty ones are what one process of ZeRO-3 sees: "
            "gather the weights before you save them."
        )


def check_adapter_config(folder: Path, weights: Iterable[str], alpha: float, *, alone: bool = False) -> None:
    """Whether the adapter_config.json beside the weights tells of the adapters in them, merged as they were trained.

    Args:
        folder: where the weights were found.
        weights: names of the tensors.
        alpha: what the adapters will be merged with.
        alone: the weights file was given by its own name: another adapter beside it isn't meant.

    Raises:
        ConversionError: the weights hold no adapter, or the file asks for what merging with `alpha` doesn't do.
    """
    file = folder / ADAPTER_CONFIG
    merges = any(".lora_A." in name for name in weights)
    if not file.is_file() or (alone and not merges):
        return
    config = read_json(file)
    others = [] if alone else sorted(path.name for path in folder.glob("adapter_model.*"))
    if others or not merges:
        where = f"in {', '.join(others)}" if others else "not in these weights"
        raise ConversionError(
            f"{file}: tells of an adapter, which is {where}: its changes would be lost. Merge it into the model first "
            "(peft's merge_and_unload) and convert the result, or give the weights file itself as --source to go without."
        )
    unable = [name for name in UNMERGEABLE if config.get(name)]
    if config.get("peft_type", "LORA") != "LORA":
        unable.append(f"peft_type {config['peft_type']}")
    if unable:
        raise ConversionError(
            f"{file}: the adapter was trained with {', '.join(unable)}; this merges plain LoRA alone. Merge it with peft's "
            "merge_and_unload and convert the result."
        )
    theirs = config.get("lora_alpha")
    if not isinstance(theirs, (int, float)) or not math.isclose(theirs, alpha):
        raise ConversionError(
            f"{file}: lora_alpha is {theirs!r}, but the adapters would be merged with {alpha:g}. Give --lora_alpha {theirs}."
        )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
