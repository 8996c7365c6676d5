"""Checks of a checkpoint before it is converted: its JSON files, its tensors, its adapters."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from samf.data.schema import JsonObject

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_UNMERGEABLE = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "fan_in_fan_out")
_SHOWN = 5  # names in one message

T = TypeVar("T")
# What a weights file may hold, by name: tensors, and other objects of plain data.
Entries = Mapping[str, object]


class ConversionError(ValueError):
    """A checkpoint can't be converted; the message names it, what was found, what was expected and the remedy."""


def read_json(file: Path) -> JsonObject:
    """Return the object in a JSON file.

    Raises:
        ConversionError: the file can't be read, or holds no JSON object.
    """
    try:
        return as_object(file.read_text(encoding="utf-8-sig"), str(file))
    except OSError as error:
        raise ConversionError(f"{file}: can't be read ({error.strerror}). Check its permissions.") from error
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"{file}: not UTF-8 text ({error.reason}). Save it as UTF-8, or fetch it again."
        ) from error


def as_object(text: str, source: str) -> JsonObject:
    """Parse the JSON object in `text`; `source` names it in messages.

    Raises:
        ConversionError: `text` isn't a JSON object.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConversionError(f"{source}: not complete JSON ({error}). Fetch it again.") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{source}: holds a {type(found).__name__}; expected a JSON object.")
    return found


def read_index(file: Path) -> dict[str, str]:
    """Return tensor → file, from the index of a checkpoint in several files.

    Raises:
        ConversionError: it isn't such an index, or names files that aren't there.
    """
    places = read_json(file).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ConversionError(f"{file}: has no weight_map of tensors to files. Fetch it again, or name a weights file.")
    outside = sorted({name for name in places.values() if Path(name).name != name})
    if outside:
        raise ConversionError(f"{file}: names files of other folders: {_some(outside)}; expected plain file names.")
    absent = sorted({name for name in places.values() if not (file.parent / name).is_file()})
    if absent:
        raise ConversionError(f"{file}: lists files that aren't there: {', '.join(absent)}. Fetch them too.")
    return places


def check_tensors(weights: Entries, source: str | Path) -> None:
    """Check that tensors are usable weights; other entries are ignored.

    Raises:
        ConversionError: tensors are empty, hold NaN or infinite values, or have integer types; the message names them.
    """
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    problems = {
        "holds tensors without values (as a rank of ZeRO-3 sees them; gather the weights before saving)": (
            name for name, value in tensors.items() if value.numel() == 0
        ),
        f"holds tensors of other types than {_some([str(dtype) for dtype in _WEIGHT_DTYPES])} (save it unquantised)": (
            f"{name} ({value.dtype})" for name, value in tensors.items() if value.dtype not in _WEIGHT_DTYPES
        ),
        "holds NaN or infinite values (training has diverged, or the file is damaged; use an earlier checkpoint)": (
            name for name, value in tensors.items() if value.dtype in _WEIGHT_DTYPES and not value.isfinite().all()
        ),
    }
    for problem, found in problems.items():
        names = sorted(found)
        if names:
            raise ConversionError(f"{source}: {problem}: {_some(names)}.")


def check_indexed(file: Path, loaded: Iterable[str], places: Mapping[str, str]) -> None:
    """Check that a file holds all tensors that the index assigns to it.

    Args:
        file: weights file.
        loaded: names of its tensors.
        places: tensor → file, as the index says.

    Raises:
        ConversionError: a tensor is missing.
    """
    absent = sorted({name for name, place in places.items() if place == file.name} - set(loaded))
    if absent:
        raise ConversionError(f"{file}: lacks tensors that the index assigns to it: {_some(absent)}. Fetch it again.")


class UniqueNames(dict[str, T]):
    """Tensors under new names, which must stay unique.

    Args:
        source: name of the checkpoint, for messages.
    """

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.former: dict[str, str] = {}

    def add(self, name: str, value: T, former: str) -> None:
        """Add a tensor.

        Args:
            name: new name.
            value: the tensor.
            former: name in the checkpoint.

        Raises:
            ConversionError: another tensor has the same new name.
        """
        if name in self:
            raise ConversionError(
                f"{self.source}: {self.former[name]} and {former} are both {name} here; only one of them can be used. "
                "Remove the other from the file."
            )
        self[name], self.former[name] = value, former


def check_adapter(name: str, weight: object, down: torch.Tensor, up: torch.Tensor, source: str) -> None:
    """Check that the shapes of a LoRA adapter allow W + B A.

    Args:
        name: of the weight.
        weight: W, (out, in).
        down: A, (r, in).
        up: B, (out, r).
        source: name of the checkpoint, for messages.

    Raises:
        ConversionError: they don't.
    """
    shapes = [list(getattr(part, "shape", ())) for part in (weight, down, up)]
    (rank, *_), fits = shapes[1] or [0], False
    if all(len(shape) == 2 for shape in shapes):
        fits = rank > 0 and shapes[1] == [rank, shapes[0][1]] and shapes[2] == [shapes[0][0], rank]
    if not fits:
        raise ConversionError(
            f"{source}: the LoRA adapter of {name} doesn't fit it: weight {shapes[0]}, lora_A {shapes[1]}, lora_B {shapes[2]}; "
            "expected [out, in], [r, in] and [out, r] with r of at least 1. Empty tensors are what a rank of ZeRO-3 sees: "
            "gather the weights before saving."
        )


def check_adapter_config(folder: Path, weights: Iterable[str], alpha: float, *, single_file: bool = False) -> None:
    """Check that adapter_config.json, if there is one, describes the adapters in the weights and how they will be merged.

    Args:
        folder: where the weights were found.
        weights: names of the tensors.
        alpha: what the adapters will be merged with.
        single_file: the user named the weights file itself: other adapters in its folder don't matter.

    Raises:
        ConversionError: the weights hold no adapter, or the file asks for more than merging with `alpha`.
    """
    file = folder / ADAPTER_CONFIG
    merges = any(".lora_A." in name for name in weights)
    if not file.is_file() or (single_file and not merges):
        return
    config = read_json(file)
    others = [] if single_file else sorted(path.name for path in folder.glob("adapter_model.*"))
    if others or not merges:
        where = f"in {', '.join(others)}" if others else "not in these weights"
        raise ConversionError(
            f"{file}: describes an adapter, which is {where}: its changes would be lost. Merge it into the model first "
            "(peft's merge_and_unload) and convert the result, or give the weights file itself as --source to ignore it."
        )
    unsupported = [name for name in _UNMERGEABLE if config.get(name)]
    if config.get("peft_type", "LORA") != "LORA":
        unsupported.append(f"peft_type {config['peft_type']}")
    if unsupported:
        raise ConversionError(
            f"{file}: the adapter was trained with {', '.join(unsupported)}; only plain LoRA can be merged here. Merge it "
            "with peft's merge_and_unload and convert the result."
        )
    trained = config.get("lora_alpha")
    if not isinstance(trained, (int, float)) or not math.isclose(trained, alpha):
        raise ConversionError(
            f"{file}: lora_alpha is {trained!r}, but the adapters would be merged with {alpha:g}. Give --lora_alpha {trained}."
        )


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
