"""One CT series of DICOM slices as a volume in Hounsfield units.

pydicom reads the headers. Files are recognised by their bytes and sorted by their location in the patient, never by names or
instance numbers. Log lines and errors hold no patient data and no identifiers: only technical tags are read, and a series
is named by a short digest of its UID (`series_label`), which `series_uid` takes as well.

What is repaired and what is refused:
- scouts, reports, colour captures, captures without a position, other modalities and units: left out, counted;
- slices of which each is a series by itself, as some anonymisers leave them: one series, if they were passed as a list, or
  if they share study, frame of reference, orientation, matrix and pixel size;
- several stacks in one enhanced file: the largest axial one, like a series; the log gives each a label;
- numbers that can't be read, such as those with a decimal comma: refused, with the tag's name;
- up to three slices, or a tenth, of another orientation, matrix or pixel size: left out, counted. More: refused;
- a CT slice that is damaged or was cut short: its series is refused, never read in part;
- copies of a slice: left out, counted. Different slices at one location (time points, reconstructions): refused;
- distances that differ by at most a tenth, or 0.1 mm, of their median: even. Otherwise the stack is interpolated onto
  even distances, unless a gap is wider than `MAX_GAP_STEPS` medians (or 5 mm, and never above 10 mm): refused;
- slices that deviate by more than 1 mm from one straight line: refused;
- a tilted gantry: the stack keeps its sheared affine, and the caller straightens the volume.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .ct_common import AIR_HU, LPS_TO_RAS, MAX_VOXELS, CTReadError, StoredVolume, scale_to_hu
from .ct_dicom_files import MAX_FILES
from .ct_dicom_geometry import Stack, interpolate, one_plane, stack_slices
from .ct_dicom_headers import DicomSlice, Headers, read_headers
from .ct_dicom_pixels import Frames
from .ct_dicom_series import choose_series, describe_left_out, series_fingerprint
from .ct_dicom_storage import pydicom
from .ct_threads import run_parallel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundSeries:
    """The slices that make the volume of a source, without their voxels.

    Attributes:
        stack: the slices in the order of their locations, and where they are.
        fingerprint: which series they are, see `series_fingerprint`.
        notes: irregularities that were found and repaired, in words.
    """

    stack: Stack
    fingerprint: str
    notes: list[str]


def read_dicom(
    source: str,
    files: Sequence[Path],
    *,
    series_uid: str | None = None,
    allow_non_ct: bool = False,
    listed: bool = False,
) -> StoredVolume:
    """Read the largest axial CT series among files, or the named one, as a volume in HU.

    Args:
        source: name in messages.
        files: to look through; those that are no DICOM slices are left out.
        series_uid: SeriesInstanceUID of the series to read, or the label of a series or stack (see `series_label`).
        allow_non_ct: take any modality and any unit.
        listed: the caller named each of these files: they are one volume, if they can be.

    Raises:
        CTReadError: no such series, or one that doesn't make a volume; see this module's rules.
    """
    found = find_series(source, files, series_uid=series_uid, allow_non_ct=allow_non_ct, listed=listed)
    stack, notes = found.stack, found.notes
    _check_size(source, stack.slices, stack.indices)
    hu = _read_pixels(source, stack.slices)
    if stack.indices is not None:
        hu = interpolate(hu, stack.indices)
    for note in notes:
        logger.warning("%s: %s", source, note)
    zooms = np.linalg.norm(stack.affine[:3, :3], axis=0)
    # hu.T: (slices, rows, columns) → (X, Y, Z)
    return StoredVolume(
        hu.T, source, [LPS_TO_RAS @ stack.affine], zooms, own_scaling=True, notes=notes, series=found.fingerprint
    )


def find_series(
    source: str,
    files: Sequence[Path],
    *,
    series_uid: str | None = None,
    allow_non_ct: bool = False,
    listed: bool = False,
) -> FoundSeries:
    """Return the slices that `read_dicom` reads of the same arguments; voxels are read only to compare copies.

    Args:
        source: name in messages.
        files: to look through.
        series_uid: SeriesInstanceUID of the series, or the label of a series or stack.
        allow_non_ct: take any modality and any unit.
        listed: the caller named each of these files.

    Raises:
        CTReadError: as `read_dicom`.
    """
    if pydicom is None:
        raise CTReadError(f"{source}: reading DICOM needs pydicom 3: pip install pydicom")
    if len(files) > MAX_FILES:
        raise CTReadError(f"{source}: {len(files)} files; expected at most {MAX_FILES}. Name the folder of one study.")
    headers = read_headers(files, allow_non_ct)
    _report_left_out(source, headers)
    if not headers.series and headers.broken:
        path, error = next(iter(headers.broken.items()))
        raise CTReadError(f"{path}: {error}")
    name, slices = choose_series(source, headers, series_uid, listed)
    _check_broken(headers, slices, series_uid)
    notes: list[str] = []
    slices = one_plane(source, slices, notes)
    stack = stack_slices(source, slices, notes, partial(_read_pixels, source))
    return FoundSeries(stack, series_fingerprint(name, stack.slices), notes)


def _report_left_out(source: str, headers: Headers) -> None:
    if headers.left_out:
        suspicious = ("damaged", "not DICOM", "can't be read")
        wrong = any(word in reason for reason in headers.left_out for word in suspicious)
        level = logging.WARNING if wrong else logging.INFO
        logger.log(level, "%s: left out %s", source, describe_left_out(headers.left_out))


def _check_broken(headers: Headers, chosen: Sequence[DicomSlice], series_uid: str | None) -> None:
    """Raise CTReadError when the chosen series has a slice that can't be read, or may have one.

    A broken slice whose UID was itself cut short may belong to any series.
    """
    uids = {piece.series for piece in chosen}
    for path, error in headers.broken.items():
        if error.uid in uids or (error.uid not in headers.series and series_uid is None):
            raise CTReadError(f"{path}: {error}")


# --- Voxels -----------------------------------------------------------------------------------------------------------


def _check_size(source: str, slices: Sequence[DicomSlice], indices: np.ndarray | None) -> None:
    """Raise CTReadError when the slices, and those onto which they are interpolated, would not fit in memory."""
    count = len(slices) + (0 if indices is None else len(indices))
    voxels = count * slices[0].pixels.rows * slices[0].pixels.columns
    if voxels > MAX_VOXELS:
        raise CTReadError(f"{source}: {voxels} voxels; expected at most {MAX_VOXELS}. Crop or coarsen the scan.")


def _read_pixels(source: str, slices: Sequence[DicomSlice]) -> np.ndarray:
    """Return int16 HU (slices, rows, columns): each slice with its own slope and intercept, padding as air."""
    _check_size(source, slices, None)
    rows, columns = slices[0].pixels.rows, slices[0].pixels.columns
    padded = np.zeros(len(slices), dtype=np.int64)
    with Frames([(piece.pixels, piece.frame) for piece in slices]) as frames:
        stop = frames.prepare(0)
        frames.read(0, np.empty((rows, columns), dtype=np.int16))  # if it is unreadable, before memory is taken
        hu = np.empty((len(slices), rows, columns), dtype=np.int16)

        def place(i: int) -> None:
            padded[i] = _stored_to_hu(frames.read(i, hu[i]), slices[i], hu[i])

        run_parallel(place, range(stop))
        while stop < len(slices):
            start, stop = stop, frames.prepare(stop)
            run_parallel(place, range(start, stop))
    if padded.any():
        logger.info("%s: %d voxels hold the padding value; read as air (%d HU)", source, padded.sum(), AIR_HU)
    return hu


def _stored_to_hu(stored: np.ndarray, piece: DicomSlice, out: np.ndarray) -> int:
    """Write the HU of a slice's stored values, which `out` may share its memory with; return how many are padding."""
    outside = None
    if piece.padding is not None:
        outside = (stored >= piece.padding[0]) & (stored <= piece.padding[1])
    scale_to_hu(stored, piece.slope, piece.intercept, out)
    if outside is None:
        return 0
    out[outside] = AIR_HU
    return int(outside.sum())
