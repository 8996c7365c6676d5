"""Presets of the slice extraction, and validation of its settings."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, TypedDict

from .slice_geometry import ORIENTATION_LABELS, PLANES, Plane
from .slice_resampling import SLABS, Slab

Preset = Literal["triplanar", "paper", "published"]
Window: TypeAlias = tuple[float, float]  # lowest and highest HU of a channel


class PresetDefaults(TypedDict):
    """Settings that a preset chooses when they are not given."""

    planes: tuple[Plane, ...]
    hu_windows: tuple[Window, ...] | None
    do_normalize: bool


_WINDOWS: tuple[Window, ...] = ((-1350, 150), (-160, 240), (-1000, 1000))  # lung, mediastinum, wide
PRESETS: dict[Preset, PresetDefaults] = {
    "triplanar": {"planes": PLANES, "hu_windows": _WINDOWS, "do_normalize": True},
    "paper": {"planes": ("axial",), "hu_windows": _WINDOWS, "do_normalize": True},
    "published": {"planes": ("axial",), "hu_windows": None, "do_normalize": False},
}

# Properties that can't be set, by preset: saved for readers of the file. Files with other texts are refused.
DESCRIPTIONS: dict[str, dict[str, str | dict[Plane, str]]] = {
    "orientation": {"default": ORIENTATION_LABELS, "published": "as stored"},
    "pixel_spacing": {
        "default": "square: the longer side of the field in mm, over size",
        "published": "as stored: the shorter side over size",
    },
}


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError if a setting is not one of its choices.

    Args:
        name: name of the setting, for the message.
        value: the value given.
        choices: accepted values.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(choices)}")


def check_descriptions(described: Mapping[str, object]) -> None:
    """Raise ValueError if saved settings describe images that this code doesn't make."""
    for key, found in described.items():
        known = list(DESCRIPTIONS[key].values())
        if found not in known:
            raise ValueError(
                f"{key}={found!r}; this code supports only {' or '.join(map(repr, known))}. Leave it out: it can't be set."
            )


def checked_planes(planes: str | Sequence[str]) -> tuple[Plane, ...]:
    """Return the planes as a tuple.

    Raises:
        ValueError: unknown, repeated or no planes.
    """
    names = (planes,) if isinstance(planes, str) else tuple(planes)
    known = tuple(plane for name in names for plane in PLANES if plane == name)
    if not names or len(set(names)) != len(names) or len(known) != len(names):
        raise ValueError(f"planes={names}; expected some of {', '.join(PLANES)}, each at most once")
    return known


def checked_counts(counts: int | Sequence[int], planes: int) -> int | tuple[int, ...]:
    """Return the slices per plane: one number for all planes, or one for each of `planes` planes.

    Raises:
        ValueError: a number that is not a positive integer, or not one number per plane.
    """
    many = (counts,) if isinstance(counts, int) else tuple(counts)
    if any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in many):
        raise ValueError(f"slices_per_plane={counts}; expected positive whole numbers")
    if isinstance(counts, int):
        return counts
    if len(many) != planes:
        raise ValueError(f"slices_per_plane={counts} for {planes} planes; expected one number, or one for each plane")
    return many


def checked_slab(slab: Slab | Sequence[Slab], channels: int) -> Slab | tuple[Slab, ...]:
    """Return the projection of the channels: one for all, or one for each where they differ.

    "mean" and ("mean", "mean", "mean") are the same setting: both are saved, and enter `settings_hash`, as "mean".

    Args:
        slab: one of SLABS, or one for each channel.
        channels: number of channels.

    Raises:
        ValueError: an unknown projection, or another number of them than of channels.
    """
    slabs = (slab,) if isinstance(slab, str) else tuple(slab)
    for one in slabs:
        check_choice("slab", one, SLABS)
    if len(slabs) not in (1, channels):
        raise ValueError(f"slab={list(slabs)} for {channels} HU windows; expected one, or one for each window")
    return slabs[0] if len(set(slabs)) == 1 else slabs


def checked_windows(windows: Sequence[Sequence[float]] | None) -> tuple[Window, ...] | None:
    """Return the HU windows as tuples of numbers that are integers where possible; None (preset "published") as it is.

    150 and 150.0 are the same setting: both are saved, and enter `settings_hash`, as 150.

    Raises:
        ValueError: no window, or one that is not a (low, high) pair of finite numbers.
    """
    if windows is None:
        return None
    if not windows:
        raise ValueError("hu_windows is empty; expected (low, high) in HU for each channel")
    return tuple(_checked_window(tuple(window)) for window in windows)


def _checked_window(window: tuple[float, ...]) -> Window:
    if len(window) != 2 or not all(math.isfinite(limit) for limit in window) or window[0] >= window[1]:
        raise ValueError(f"hu_windows has {window}; expected (low, high) in HU with low below high")
    low, high = (int(limit) if float(limit).is_integer() else float(limit) for limit in window)
    return low, high


def checked_size(size: int | Mapping[str, int]) -> int:
    """Return the image size as one number; transformers also writes it as {"height": …, "width": …}.

    Raises:
        ValueError: not a positive integer, or height and width differ.
    """
    if isinstance(size, Mapping):
        if set(size) != {"height", "width"} or size["height"] != size["width"]:
            raise ValueError(f"size={dict(size)}; expected one number, or height and width that are equal")
        size = size["height"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"size={size!r}; expected a positive whole number of pixels")
    return size


def checked_channel_values(
    name: str, values: float | Sequence[float] | None, imagenet: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    """Return one value per channel.

    Args:
        name: name of the setting, for the message.
        values: one number per channel, one for all, or None for ImageNet's: as they are for three channels, their average
            for any other number.
        imagenet: ImageNet's values of red, green and blue.
        channels: number of channels.

    Raises:
        ValueError: another number of values than of channels.
    """
    if values is None:
        return imagenet if channels == len(imagenet) else (sum(imagenet) / len(imagenet),) * channels
    if isinstance(values, (int, float)):
        return (float(values),) * channels
    if len(values) != channels:
        raise ValueError(
            f"{name} has {len(values)} values for {channels} HU windows; expected one for each window, or one number"
        )
    return tuple(float(value) for value in values)
