"""Stored values as Hounsfield units: scaling, padding, and the check that they are a CT's."""

import logging
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .ct_common import AIR_HU, CTReadError, NotCTError, StoredVolume, scale_to_hu
from .ct_threads import run_parallel

logger = logging.getLogger(__name__)

Verdict = Literal["HU", "no air", "not HU"]

MIN_JUDGED = 10_000  # voxels: fewer are not representative
_PADDING_HU = -1500  # noise and streaks reach down to about -1300; no measured value is below this
_SAMPLE, _SAMPLE_PIECES = 1 << 18, 16
_ZERO = 32768  # index of HU 0 in a histogram of int16


def scaling(stored: StoredVolume, rescale: Sequence[float] | None) -> tuple[float, float]:
    """Return slope and intercept: the header's or, where it has none, the caller's.

    Args:
        stored: the volume with its header's scaling.
        rescale: (slope, intercept) of the caller.

    Raises:
        CTReadError: both are given, or the caller's are not finite or the slope is zero.
    """
    if rescale is None:
        return stored.slope, stored.intercept
    if (stored.slope, stored.intercept) != (1.0, 0.0):
        raise CTReadError(
            f"{stored.source}: its header holds slope {stored.slope:g} and intercept {stored.intercept:g}, so "
            f"rescale={tuple(rescale)} would rescale twice. Leave rescale out."
        )
    slope, intercept = (float(value) for value in rescale)
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope != 0):
        raise CTReadError(f"{stored.source}: rescale={rescale}; expected two finite numbers, the slope not zero.")
    logger.info("%s: HU = stored value * %g + %g, as given by the caller", stored.source, slope, intercept)
    return slope, intercept


def to_hu(stored: np.ndarray, slope: float, intercept: float, source: str) -> np.ndarray:
    """Return HU as saturated int16. Native int16 without scaling is returned as it is, even as a memory map.

    Args:
        stored: array (X, Y, Z) of any real type.
        slope: HU per stored unit.
        intercept: HU of a stored 0.
        source: name in messages.
    """
    plain = (slope, intercept) == (1.0, 0.0)
    if plain and stored.dtype == np.int16:
        return stored
    if plain and stored.dtype.kind in "iub" and np.can_cast(stored.dtype, np.int16):
        return stored.astype(np.int16)
    hu = np.empty_like(stored, dtype=np.int16, subok=False)
    # One plane at a time keeps the intermediate arrays small.
    axis = int(np.argmax(np.abs(stored.strides)))
    planes = zip(np.moveaxis(stored, axis, 0), np.moveaxis(hu, axis, 0), strict=True)
    not_finite = sum(scale_to_hu(source_plane, slope, intercept, plane) for source_plane, plane in planes)
    warn_of_not_finite(source, not_finite)
    return hu


def warn_of_not_finite(source: str, count: int) -> None:
    """Log how many voxels of a volume are NaN or infinite, if any are."""
    if count:
        logger.warning("%s: %d voxels are NaN or infinite; read as air (%d HU)", source, count, AIR_HU)


def padding_to_air(hu: np.ndarray, source: str, own: bool) -> np.ndarray:
    """Return HU with air in place of padding, which is everything below -1500.

    Args:
        hu: int16 array (X, Y, Z).
        source: name in messages.
        own: change the array in place.
    """
    lowest = _lowest(hu)
    if lowest >= _PADDING_HU:
        return hu
    if not own:
        hu = hu.copy(order="K")
    count = 0
    for plane in np.moveaxis(hu, int(np.argmax(np.abs(hu.strides))), 0):
        padding = plane < _PADDING_HU
        count += int(padding.sum())
        plane[padding] = AIR_HU
    logger.info("%s: %d voxels below %d HU (down to %d) are padding; read as air", source, count, _PADDING_HU, lowest)
    return hu


def _lowest(hu: np.ndarray) -> int:
    """Return the lowest value of an array (X, Y, Z)."""
    planes = np.moveaxis(hu, int(np.argmax(np.abs(hu.strides))), 0)
    lowest = np.empty(len(planes), dtype=hu.dtype)

    def find(i: int) -> None:
        lowest[i] = planes[i].min()

    run_parallel(find, range(len(planes)))
    return int(lowest.min())


# --- The check --------------------------------------------------------------------------------------------------------


def judge_intensity(hu: np.ndarray) -> tuple[Verdict, str]:
    """Judge whether values can be a CT's Hounsfield units, by their percentiles and their air.

    Of a sample of about 260,000 voxels, without the padding (below -1500):
    - the 99th percentile below -300, or 5 % padding of more than three values: rescaled twice, or no CT ("not HU");
    - at least half a per cent between -1150 and -700: there is air where it belongs ("HU");
    - else a first percentile above -200, with a dark background of at least 5 % at -50 or above, a median above 600, or
      a range of less than 4: raw stored values, another modality, a mask or an image ("not HU");
    - else a crop without air, which cannot be judged ("no air").

    Args:
        hu: int16, any shape.

    Returns:
        "HU", "no air" or "not HU", and what was found, in words. Fewer than 10,000 voxels, or only one value, are "no
        air".
    """
    counts = np.bincount(_sample(hu).astype(np.int32) + _ZERO, minlength=1 << 16)
    total = counts.sum()
    if total < MIN_JUDGED or np.count_nonzero(counts) == 1:
        return "no air", "too few voxels, or only one value"
    far_below = counts[: _PADDING_HU + _ZERO].copy()
    padding = far_below.sum() / total
    spread = padding - np.sort(far_below)[-3:].sum() / total
    if padding < 0.99:
        counts[: _PADDING_HU + _ZERO] = 0
    below = np.cumsum(counts) / counts.sum()  # share of voxels at each value or below
    low, first, middle, high, highest = np.searchsorted(below, [0.001, 0.01, 0.5, 0.99, 0.999]) - _ZERO
    found = f"1st percentile {first}, median {middle}, 99th {high}"
    found += f", {100 * padding:.0f} % below {_PADDING_HU}" if padding > 0.001 else ""
    if high < -300 or spread >= 0.05:
        return "not HU", f"{found}: too low for air, lungs and soft tissue"
    if below[-700 + _ZERO] - below[-1151 + _ZERO] >= 0.005:
        return "HU", found
    if first > -200:
        background = below[int(low + 0.03 * (highest - low)) + _ZERO]
        if high - first < 4 or middle > 600 or (first >= -50 and background >= 0.05):
            return "not HU", f"{found}: no air near -1000, and a background or tissue where CT has none"
    return "no air", f"{found}: no air near -1000, possibly a crop"


def _sample(hu: np.ndarray) -> np.ndarray:
    """Return about 260,000 voxels, evenly spread: the step shares no factor with the volume's shape."""
    flat = hu.ravel(order="K")
    step = max(1, flat.size // _SAMPLE)
    while step > 1 and math.gcd(step, math.prod(hu.shape)) > 1:
        step += 1
    sample = np.empty(-(-flat.size // step), dtype=flat.dtype)
    piece = -(-len(sample) // _SAMPLE_PIECES)

    def gather(i: int) -> None:  # mostly waits for memory
        sample[i * piece : (i + 1) * piece] = flat[i * piece * step : (i + 1) * piece * step : step]

    run_parallel(gather, range(_SAMPLE_PIECES))
    return sample


def check_intensity(
    stored: StoredVolume, array: np.ndarray, hu: np.ndarray, rescale: Sequence[float] | None, refuse: bool
) -> None:
    """Log whether values are Hounsfield units, and refuse or warn of those that are not.

    Args:
        stored: the volume, for its name, notes and kind of scaling.
        array: its stored values (X, Y, Z).
        hu: int16 array made of them.
        rescale: (slope, intercept) of the caller.
        refuse: raise for values that are not HU; otherwise warn.

    Raises:
        NotCTError: values that are not HU.
        CTReadError: values that were HU before the caller's `rescale`.
    """
    verdict, found = judge_intensity(hu)
    source = stored.source
    if verdict == "HU":
        logger.info("%s: Hounsfield units (%s)", source, found)
        return
    if verdict == "no air":
        level = logging.WARNING if hu.size >= MIN_JUDGED else logging.INFO
        logger.log(level, "%s: %s. Check that its values are Hounsfield units.", source, found)
        return
    if not refuse:
        logger.warning("%s: %s. Its values don't look like Hounsfield units.", source, found)
        return
    notes = f" Also found: {'; '.join(stored.notes)}." if stored.notes else ""
    if rescale is not None and judge_intensity(to_hu(array, 1.0, 0.0, source))[0] == "HU":
        raise CTReadError(
            f"{source}: its values are Hounsfield units already (with air near -1000), and rescale={tuple(rescale)} makes "
            f"{found}. Leave rescale out: it would rescale twice.{notes}"
        )
    raise NotCTError(
        f"{source}: its values are not Hounsfield units: {found}. Expected air near -1000 and soft tissue near 0. "
        f"{_remedy(found, rescale, stored.own_scaling)} allow_non_ct=True takes them as they are.{notes}"
    )


def _remedy(found: str, rescale: Sequence[float] | None, own_scaling: bool) -> str:
    if rescale is not None:
        return f"rescale={tuple(rescale)} is not this file's: look its slope and intercept up, or leave rescale out."
    if "too low" in found:
        return "If they were rescaled twice, convert the scan again from its source."
    if own_scaling:
        return "Its slices carry a wrong slope and intercept, or it is no CT: export the series again."
    return "If they are raw stored values, pass rescale=(slope, intercept) of the scan's metadata; if not, it is no CT."
