"""The choice of one series, or of one stack of it, among the slices of a study."""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from .ct_common import CTReadError, NotCTError
from .ct_dicom_headers import DicomSlice, Headers

logger = logging.getLogger(__name__)

SAME_LOCATION_MM = 0.01
_STEP_TOLERANCE, _STEP_TOLERANCE_MM = 0.1, 0.1
_MAX_ODD_SLICES, _MAX_ODD_SHARE = 3, 0.1  # of another orientation, matrix or pixel size, whichever is more
_MAX_LISTED = 12  # series in one message
_MAX_COPIES = 3  # of one slice under its SeriesInstanceUID
_MIN_JOINED = 3  # series of one slice that a folder must hold to be one volume
_NON_CT_REMEDY = "Expected one greyscale value per voxel and modality CT; allow_non_ct=True takes other modalities."


def series_label(uid: str) -> str:
    """Return the name of a series in messages: eight digits of a digest, from which its UID cannot be recovered."""
    return hashlib.sha256(uid.encode()).hexdigest()[:8]


def series_fingerprint(name: str, slices: Sequence[DicomSlice]) -> str:
    """Return the label of a series, a dash, and sixteen digits of a digest of its slices.

    Equal fingerprints are equal slices: by UIDs, frames and positions. The UIDs cannot be recovered from it.

    Args:
        name: of the series or stack.
        slices: that were read, in their order.
    """
    digest = hashlib.sha256()
    for piece in slices:
        place = [] if piece.position is None else [float(value) for value in piece.position]
        digest.update(f"{piece.space[0]}|{piece.series}|{piece.instance}|{place}\n".encode())
    return f"{series_label(name)}-{digest.hexdigest()[:16]}"


def choose_series(source: str, headers: Headers, series_uid: str | None, listed: bool) -> tuple[str, list[DicomSlice]]:
    """Return name and slices of the named series or stack, or of the largest axial one; the log lists the others.

    Args:
        source: name in messages.
        headers: of all files.
        series_uid: SeriesInstanceUID, or label of a series or stack.
        listed: the caller named each file, so that they are one volume if they can be.

    Raises:
        NotCTError: no CT series at all.
        CTReadError: none of that name.
    """
    series = headers.series
    if not series:
        found = describe_left_out(headers.left_out) or "no DICOM file"
        raise NotCTError(f"{source}: no CT series here (found {found}). {_NON_CT_REMEDY}")
    stacks = {name: stack for uid, slices in series.items() for name, stack in _split(uid, slices).items()}
    if series_uid is None:
        choices = _joined(source, stacks, listed)
    else:
        choices = _named(stacks, series_uid) or _named(_joined(source, stacks, listed), series_uid)
    if not choices:
        raise CTReadError(
            f"{source}: series_uid names no CT series here; there are {_listing(stacks)}. Pass one of these labels, or a "
            f"SeriesInstanceUID."
        )
    chosen = max(sorted(choices), key=lambda name: _rank(choices[name]))
    if len(choices) > 1:
        single = len(choices[chosen]) == 1
        logger.warning(
            "%s: %d %s; reads %s, the largest axial one. All: %s. Choose another by series_uid=.%s",
            source,
            len(choices),
            "series" if set(choices) <= set(series) else "series or stacks",
            series_label(chosen),
            _listing(choices),
            " They are single slices: if they are one volume, pass their files as a list." if single else "",
        )
    return chosen, choices[chosen]


def describe_left_out(left_out: "Counter[str]") -> str:
    """Return the most frequent reasons for leaving files out, each with its count."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.most_common(6))


def remedy_for_several(slices: Sequence[DicomSlice], what: str) -> str:
    """Return how to read one of the stacks that slices make: `what` is its name."""
    if len({piece.pixels.file for piece in slices}) == 1:
        return f"Export only one {what}."
    return f"Pass the files of one {what} as a list."


def _named(choices: Mapping[str, list[DicomSlice]], name: str) -> dict[str, list[DicomSlice]]:
    """Return those of a SeriesInstanceUID (several where it has several stacks), or the one of a label."""
    of_uid = {key: stack for key, stack in choices.items() if {piece.series for piece in stack} == {name}}
    return of_uid or {key: stack for key, stack in choices.items() if series_label(key) == name}


def _listing(series: Mapping[str, list[DicomSlice]]) -> str:
    largest = sorted(series, key=lambda name: (-len(series[name]), name))
    listing = "; ".join(f"{series_label(name)}: {_described(series[name])}" for name in largest[:_MAX_LISTED])
    return listing + (f"; and {len(series) - _MAX_LISTED} more" if len(series) > _MAX_LISTED else "")


def _described(slices: list[DicomSlice]) -> str:
    number = f"number {slices[0].series_number}, " if slices[0].series_number else ""
    first = slices[0].pixels
    return f"{number}{slices[0].modality or 'no modality'}, {len(slices)} slices of {first.columns} x {first.rows}"


def _rank(slices: list[DicomSlice]) -> tuple[bool, int]:
    stack = max(group_by_fit(slices), key=len)
    axial = stack[0].cosines is not None and abs(stack[0].normal[2]) > 0.8
    return axial and len(stack) > 1, len(stack)


# --- Stacks of one series ---------------------------------------------------------------------------------------------


def group_by_fit(slices: Sequence[DicomSlice]) -> list[list[DicomSlice]]:
    """Return the slices in groups of one orientation, matrix and pixel size."""
    stacks: list[list[DicomSlice]] = []
    for piece in slices:
        home = next((stack for stack in stacks if piece.fits(stack[0])), None)
        if home is None:
            stacks.append([piece])
        else:
            home.append(piece)
    return stacks


def is_mostly_one(stacks: Sequence[Sequence[DicomSlice]]) -> bool:
    """Return whether so few slices are outside of the largest stack that they can be left out."""
    count, largest = sum(map(len, stacks)), max(map(len, stacks))
    return count - largest <= max(_MAX_ODD_SLICES, _MAX_ODD_SHARE * count) and count - largest < largest


def step_tolerance(median: float) -> float:
    """Return by how many mm the distances between even slices may differ from their median in mm."""
    return max(_STEP_TOLERANCE * median, _STEP_TOLERANCE_MM)


def _split(uid: str, slices: list[DicomSlice]) -> dict[str, list[DicomSlice]]:
    """Return the stacks of a series in enhanced files, each under its own name; any other series as it is.

    Frames belong to the stack of their StackID or, where there is none and one file holds them all, to that of their
    orientation, matrix and pixel size. Stacks that together make one even volume stay one.
    """
    by_id = defaultdict(list)
    for piece in slices:
        by_id[piece.stack].append(piece)
    stacks = list(by_id.values())
    if len(stacks) == 1 and len({piece.pixels.file for piece in slices}) == 1:
        stacks = group_by_fit(slices)
        if is_mostly_one(stacks):
            return {uid: slices}
    # Frames that each have their own number are no stacks, nor are radial ones.
    if sum(len(stack) > 1 for stack in stacks) < 2 or _is_even(slices):
        return {uid: slices}
    return {f"{uid} stack {number:04d}": stack for number, stack in enumerate(stacks, 1)}


def _is_even(slices: Sequence[DicomSlice]) -> bool:
    """Return whether slices make one volume without gaps, copies and odd ones."""
    first = slices[0]
    if len(slices) < 2 or not all(piece.is_placed and piece.fits(first) for piece in slices):
        return False
    steps = np.diff(np.sort([piece.location_along(first.normal) for piece in slices]))
    median = float(np.median(steps))
    return median > SAME_LOCATION_MM and bool(np.abs(steps - median).max() <= step_tolerance(median))


# --- Series of one slice each -----------------------------------------------------------------------------------------


def _joined(source: str, series: Mapping[str, list[DicomSlice]], listed: bool) -> dict[str, list[DicomSlice]]:
    """Return the series, with those of one slice that belong together as one: some anonymisers make each file a series.

    Files that the caller listed belong together if they fit, or if all of them, series of many slices too, make one even
    stack. Those of a folder must also share study and frame of reference, and have different locations.
    """
    slices = [piece for stack in series.values() for piece in stack]
    if listed and len(series) > 1 and _is_even(slices):
        logger.warning("%s: %d series in the list make one even stack; read as one volume.", source, len(series))
        return {"all that was listed": slices}
    joined = dict(series)
    for names in _alike({name: stack[0] for name, stack in series.items() if _is_one_location(stack)}, listed):
        slices = [piece for name in names for piece in series[name]]
        locations = {round(piece.location_along(slices[0].normal) / SAME_LOCATION_MM) for piece in slices}
        if len(names) < 2 or not (listed or len(locations) >= max(_MIN_JOINED, len(slices) / 2)):
            continue
        logger.warning(
            "%s: %d slices of which each has a SeriesInstanceUID of its own%s; read as one series.",
            source,
            len(slices),
            "" if listed else ", in one study, frame of reference and orientation",
        )
        joined = {name: stack for name, stack in joined.items() if name not in set(names)}
        joined[f"{names[0]} and others"] = slices
    return joined


def _is_one_location(slices: Sequence[DicomSlice]) -> bool:
    """Return whether a series is one slice, perhaps with copies of it."""
    first = slices[0]
    if len(slices) > _MAX_COPIES or first.position is None:
        return False
    for piece in slices:
        if piece.position is None or piece.cosines is None or not piece.fits(first):
            return False
        if np.abs(piece.position - first.position).max() >= SAME_LOCATION_MM:
            return False
    return True


def _alike(slices: Mapping[str, DicomSlice], listed: bool) -> list[list[str]]:
    """Return the names of slices in groups that could be one stack.

    They fit each other and, unless the caller listed them, share study, frame of reference and modality.
    """
    candidates: dict[tuple[int, int, tuple[tuple[str, str], str] | None], list[str]] = defaultdict(list)
    for name, piece in slices.items():
        candidates[piece.pixels.rows, piece.pixels.columns, None if listed else (piece.space, piece.modality)].append(
            name
        )
    groups = []
    for names in candidates.values():
        by_piece = {id(slices[name]): name for name in names}
        stacks = group_by_fit([slices[name] for name in names])
        groups += [[by_piece[id(piece)] for piece in stack] for stack in stacks]
    return groups
