"""The order, the affine and the spacing of the slices of one DICOM stack."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .ct_common import CTReadError
from .ct_dicom_headers import DicomSlice
from .ct_dicom_series import SAME_LOCATION_MM, group_by_fit, is_mostly_one, remedy_for_several, step_tolerance

logger = logging.getLogger(__name__)

MAX_GAP_STEPS = 3
_MIN_GAP_LIMIT, _MAX_GAP_LIMIT = 5.0, 10.0  # mm
_MAX_SIDEWAYS_MM = 1.0


@dataclass(frozen=True)
class Stack:
    """The slices of one volume.

    Attributes:
        slices: in the order of their locations.
        affine: (4, 4), column, row and slice index → LPS mm.
        indices: fractional slice indices onto which the stack is interpolated; None for an even stack.
    """

    slices: list[DicomSlice]
    affine: np.ndarray
    indices: np.ndarray | None = None


def one_plane(source: str, slices: list[DicomSlice], notes: list[str]) -> list[DicomSlice]:
    """Return the slices that share orientation, matrix and pixel size with most others.

    Args:
        source: name in messages.
        slices: of one series.
        notes: gets a note of slices that are left out.

    Raises:
        CTReadError: too many others.
    """
    stacks = group_by_fit(slices)
    chosen = max(stacks, key=len)
    if not is_mostly_one(stacks):
        raise CTReadError(
            f"{source}: {len(slices)} slices in {len(stacks)} orientations, matrices or pixel sizes; expected one stack. "
            f"{remedy_for_several(slices, 'stack')}"
        )
    if others := len(slices) - len(chosen):
        notes.append(
            f"{others} of {len(slices)} slices have another orientation, matrix or pixel size and are left out"
        )
    return chosen


def stack_slices(
    source: str,
    slices: list[DicomSlice],
    notes: list[str],
    read_pixels: Callable[[Sequence[DicomSlice]], np.ndarray],
) -> Stack:
    """Sort slices by their locations, without copies.

    Args:
        source: name in messages.
        slices: of one orientation, matrix and pixel size.
        notes: gets notes of copies and of uneven distances.
        read_pixels: returns the HU (slices, rows, columns) of slices, to compare those at one location.

    Raises:
        CTReadError: slices without geometry, several at one location, missing ones, or not on one straight line.
    """
    if len(slices) == 1:
        return Stack(slices, _single_slice_affine(source, slices[0]))
    if not all(piece.is_placed for piece in slices):
        raise CTReadError(
            f"{source}: slices without a readable position, orientation or pixel size (tags 0020,0032, 0020,0037 and "
            f"0028,0030); expected them in every slice. Export the series again."
        )
    normal = slices[0].normal
    slices = sorted(slices, key=lambda piece: (piece.location_along(normal), piece.instance))
    slices = _without_copies(source, slices, notes, read_pixels)
    first = slices[0]
    if len(slices) == 1:
        return Stack(slices, _single_slice_affine(source, first))
    positions = np.array([piece.position for piece in slices])
    locations = positions @ first.normal
    run = (positions[-1] - positions[0]) / (locations[-1] - locations[0])  # mm in space per mm along the normal
    _check_sideways(source, positions - positions[0] - np.outer(locations - locations[0], run))
    indices = _even_indices(source, locations, notes)
    count = len(slices) if indices is None else len(indices)
    affine = _in_plane_affine(first)
    affine[:3, 2] = (positions[-1] - positions[0]) / (count - 1)
    return Stack(slices, affine, indices)


def _single_slice_affine(source: str, piece: DicomSlice) -> np.ndarray:
    """Return the LPS affine of one slice, axial with pixels of 1 mm where it does not say."""
    geometry = {"position": piece.position, "orientation": piece.cosines, "pixel size": piece.spacing}
    missing = [name for name, value in geometry.items() if value is None]
    if missing:
        logger.warning("%s: one slice without %s: taken as axial, 1 mm.", source, " and ".join(missing))
    affine = _in_plane_affine(piece)
    cosines = _cosines(piece)
    affine[:3, 2] = np.cross(cosines[:3], cosines[3:]) * (piece.thickness or 1.0)
    return affine


def _in_plane_affine(piece: DicomSlice) -> np.ndarray:
    """Return the LPS affine of a slice, without the direction from slice to slice."""
    cosines, (row_mm, column_mm) = _cosines(piece), piece.spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0] = cosines[:3] * column_mm
    affine[:3, 1] = cosines[3:] * row_mm
    affine[:3, 3] = 0.0 if piece.position is None else piece.position
    return affine


def _cosines(piece: DicomSlice) -> np.ndarray:
    return np.array([1.0, 0, 0, 0, 1, 0]) if piece.cosines is None else piece.cosines


# --- Copies -----------------------------------------------------------------------------------------------------------


def _without_copies(
    source: str,
    slices: list[DicomSlice],
    notes: list[str],
    read_pixels: Callable[[Sequence[DicomSlice]], np.ndarray],
) -> list[DicomSlice]:
    """Return one slice per location. Equal images at one location are copies; different ones are refused."""
    locations = np.array([piece.location_along(slices[0].normal) for piece in slices])
    fresh = np.concatenate([[True], np.diff(locations) >= SAME_LOCATION_MM])
    if fresh.all():
        return slices
    # By the voxels, because anonymisers copy and invent instance UIDs.
    firsts = np.flatnonzero(fresh)[np.cumsum(fresh) - 1]  # for each slice, the first one at its location
    doubled = np.unique(np.concatenate([np.flatnonzero(~fresh), firsts[~fresh]]))
    images = dict(zip(doubled, read_pixels([slices[k] for k in doubled]), strict=True))
    if any(not np.array_equal(images[k], images[firsts[k]]) for k in np.flatnonzero(~fresh)):
        raise CTReadError(
            f"{source}: {len(slices)} slices at {int(fresh.sum())} positions; expected one for each. "
            f"{_time_points(slices)}{remedy_for_several(slices, 'of them')}"
        )
    kept = [piece for piece, new in zip(slices, fresh, strict=True) if new]
    notes.append(f"{len(slices) - len(kept)} of {len(slices)} slices are copies of others and are left out")
    return kept


def _time_points(slices: Sequence[DicomSlice]) -> str:
    """Return which tag distinguishes the passes over one location, and how many slices each has."""
    for keyword in dict.fromkeys(name for piece in slices for name, _ in piece.time_point):
        counts = Counter(dict(piece.time_point).get(keyword, "none") for piece in slices)
        if 1 < len(counts) <= len(slices) // 2:
            # The time of a scan may identify the patient: number the passes instead.
            names = [f"no. {k}" if "Time" in keyword else value[:24] for k, value in enumerate(sorted(counts), 1)]
            sizes = [counts[value] for value in sorted(counts)]
            passes = ", ".join(f"{name} ({size} slices)" for name, size in list(zip(names, sizes, strict=True))[:6])
            return f"They differ in {keyword}: {passes}: time points or reconstructions. "
    return "They are time points, reconstructions or overlapping passes. "


# --- Distances --------------------------------------------------------------------------------------------------------


def _check_sideways(source: str, offsets: np.ndarray) -> None:
    largest = float(np.linalg.norm(offsets, axis=1).max())
    if largest > _MAX_SIDEWAYS_MM:
        raise CTReadError(
            f"{source}: slices deviate by up to {largest:.1f} mm from one straight line; expected at most "
            f"{_MAX_SIDEWAYS_MM:g} mm. They were cropped differently: pass the files of one stack as a list."
        )


def _even_indices(source: str, locations: np.ndarray, notes: list[str]) -> np.ndarray | None:
    """Return the fractional indices of evenly spaced slices among those there are; None if these are even.

    `locations`: mm along the normal, rising.
    """
    steps = np.diff(locations)
    median = float(np.sort(steps)[(len(steps) - 1) // 2])  # the finer one of two
    tolerance = step_tolerance(median)
    uneven = np.abs(steps - median) > tolerance
    drift = np.abs(locations - np.linspace(locations[0], locations[-1], len(locations))).max()
    if not uneven.any() and drift <= max(0.5 * median, tolerance):
        return None
    limit = min(max(MAX_GAP_STEPS * median, _MIN_GAP_LIMIT), _MAX_GAP_LIMIT)
    widest = int(steps.argmax())
    if steps[widest] > max(limit, median + tolerance):
        raise CTReadError(
            f"{source}: uneven distances between slices: {steps[widest]:.2f} mm after slice {widest + 1}, "
            f"{median:.2f} mm elsewhere ({int(uneven.sum())} such gaps; up to {limit:.1f} mm would be filled). "
            f"Slices are missing: export the series again."
        )
    count = max(round((locations[-1] - locations[0]) / median), 1) + 1
    if count > 10 * len(locations):
        raise CTReadError(
            f"{source}: distances between slices from {steps.min():.2f} to {steps.max():.2f} mm; expected even ones. "
            f"Export the series again."
        )
    even = np.linspace(locations[0], locations[-1], count)
    indices = np.interp(even, locations, np.arange(len(locations)))
    filled = float(steps[uneven].sum() if uneven.any() else locations[-1] - locations[0])
    notes.append(
        f"uneven distances between slices, {steps.min():.2f} to {steps.max():.2f} mm (median {median:.2f}): interpolated "
        f"onto {count} slices {even[1] - even[0]:.2f} mm apart; {filled:.1f} of {locations[-1] - locations[0]:.1f} mm are in "
        f"{int(uneven.sum())} uneven gaps"
    )
    return indices


def interpolate(hu: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return HU (slices, rows, columns) at fractional slice indices, linearly, as int16."""
    out = np.empty((len(indices), *hu.shape[1:]), dtype=np.int16)
    for target, index in zip(out, indices, strict=True):
        below = min(int(index), len(hu) - 1)
        share = index - below
        if share < 1e-3 or below + 1 == len(hu):
            target[...] = hu[below]
        elif share > 1 - 1e-3:
            target[...] = hu[below + 1]
        else:
            mixed = hu[below] * np.float32(1 - share) + hu[below + 1] * np.float32(share)
            target[...] = np.rint(mixed)
    return out
