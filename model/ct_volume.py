"""One CT volume from a file, a folder or an address: Hounsfield units, spacing and canonical orientation.

`read_ct` takes NIfTI-1/2 (`.nii`, `.nii.gz`), NRRD, MetaImage (`.mha`, `.mhd`), `.npy` and `.npz`; DICOM as a folder,
a list of files, one slice or a multi-frame file; a zip of any of these; and http(s):// or hf:// addresses. Formats are
told apart by their first bytes, never by their suffix. Whatever the file's own axes, the result is RAS+: the first
index grows from the patient's left to the right, the second from back to front, the third from foot to head.

Rules of geometry. The sform counts before the qform, the qform before bare voxel sizes. Axes within 10° of the
patient's, and at right angles within 0.5°, stay as they are, each named after the nearest patient axis. Otherwise
(oblique reformats, a tilted gantry, affines sheared by up to 40°) the volume is resampled linearly onto the patient's axes.

Rules of intensity. Slope and intercept count once. What is NaN, infinite or below -1500 HU (padding) becomes air, and is
counted. Then a sample of the voxels is judged by its percentiles and its air: see `judge_intensity`.

Whoever changes the HU that a file gives counts `ENTRY_VERSION` in data/slice_cache.py up.
"""

import logging
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .ct_dicom import dicom_files, is_dicomdir, looks_like_dicom, read_dicom
from .ct_download import file_path, is_address, local_copy, shown, unpack_zip
from .ct_formats import (
    AIR_HU,
    MAX_VOXELS,
    CTReadError,
    NotCTError,
    StoredVolume,
    check_dtype,
    is_plausible,
    nifti_header_size,
    other_half,
    read_metaimage,
    read_nifti,
    read_npy,
    read_npz,
    read_nrrd,
    scale_to_hu,
    seen,
    squeezed_shape,
)
from .ct_memory import is_file, local_files, source_of, stored_image

try:  # for volumes that must be resampled
    from scipy.ndimage import affine_transform
except ImportError:
    affine_transform = None

logger = logging.getLogger(__name__)

__all__ = ["AIR_HU", "CTReadError", "CTVolume", "NotCTError", "judge_intensity", "read_ct", "to_ct_volume"]

_DIRECTIONS = ("LR", "PA", "IS")  # of the axes R, A and S: where they come from and where they run to
_AXIS_OF = {letter: axis for axis, pair in enumerate(_DIRECTIONS) for letter in pair}
_OPPOSITE = {pair[side]: pair[1 - side] for pair in _DIRECTIONS for side in (0, 1)}
_SIDES = {"L": "left", "R": "right", "P": "back", "A": "front", "I": "foot", "S": "head"}
_MAX_OBLIQUE_DEGREES = 10.0
_MAX_SHEAR_DEGREES = 0.5
_MAX_MENDED_SHEAR_DEGREES = 40.0  # gantries tilt up to 30°
_PADDING_HU = -1500  # noise and streaks reach down to some -1300; nothing measured lies below this
_SAMPLE = 1 << 18
_MAX_UPRIGHT, _MAX_GROWTH = 50_000_000, 20  # voxels, and times as many as before: what resampling may make of a volume
_MIN_JUDGED = 10_000  # voxels: fewer say nothing about the whole
_CHEST_MM = 60.0  # a newborn's chest has more, along each axis


@dataclass(frozen=True)
class CTVolume:
    """One CT volume in canonical orientation.

    Attributes:
        hu: int16 array (X, Y, Z) of Hounsfield units in RAS+ order. May be a read-only view of the file (memory map).
        spacing: voxel size in mm along X, Y, Z.
        affine: float64 (4, 4), voxel index → RAS+ millimetres. For oblique scans its axes are not the patient's.
        source: where it came from.
        stored_orientation: where the axes of the file's own array run to, such as "LPS"; "RAS" if they are those of `hu`.
            Of a resampled volume: where they ran to most nearly.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    source: str
    stored_orientation: str = "RAS"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.hu.shape

    @property
    def stored_axes(self) -> tuple[tuple[int, int], ...]:
        """For each axis of the file's own array: the axis of `hu` that it is, and 1 or -1, whether it runs that way."""
        return tuple(
            (axis, 1 if letter == direction[1] else -1)
            for letter in self.stored_orientation
            for axis, direction in enumerate(_DIRECTIONS)
            if letter in direction
        )

    @property
    def coverage_mm(self) -> tuple[float, float, float]:
        """How much of the body the voxels cover, in mm along X, Y, Z."""
        return tuple(count * size for count, size in zip(self.shape, self.spacing, strict=True))

    def stored_hu(self) -> np.ndarray:
        """`hu` in the axis order of the file's own array: a view."""
        axes, signs = zip(*self.stored_axes, strict=True)
        return self.hu.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]


def read_ct(
    path: Any,
    *,
    rescale: Sequence[float] | None = None,
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    series_uid: str | None = None,
    allow_non_ct: bool = False,
    min_coverage: float = 0.0,
) -> CTVolume:
    """Reads one CT volume.

    Args:
        path: a file (NIfTI, NRRD, MetaImage, NumPy, DICOM, or a zip of one of them), a folder with DICOM slices in it or
            in its sub-folders, a list of the DICOM files of one volume, or a file://, http(s):// or hf:// address of a
            file. In place of a path: a file that is open for reading bytes, or io.BytesIO, a pydicom dataset, or a row of
            an undecoded column of `datasets`, {"bytes": …, "path": …}. An open file is read from its beginning, and stays
            open at the position where it was.
        rescale: (slope, intercept) for a file that holds raw stored values under a header that says nothing, as in
            CT-RATE's first release. Never for values that are HU already: that is noticed and refused. Five numbers are
            slope, intercept and spacing: what a record of such a volume carries.
        spacing: voxel size in mm along the stored axes, for a file whose header has no geometry, as in the same
            release. Without `axes`, these are then taken as DICOM's: to the patient's left, back and head (those of a
            NumPy file as RAS+).
        axes: where the stored axes run to, for a file whose header does not say: three of the letters R or L, A or P,
            S or I. Slices from head to foot, rows from front to back, columns from right to left are "IPL". Without
            `spacing`, the header's sizes count, or 1 mm.
        series_uid: which series of a DICOM study to read, or which stack of an enhanced file, by the label that the log
            gives it, or a series by its SeriesInstanceUID. Default: the largest axial CT series.
        allow_non_ct: take other modalities, and values that are no Hounsfield units.
        min_coverage: mm that the volume must cover along each axis; less is refused. Without it less than a chest has is
            only warned of: a single slice, a localizer, one reformatted plane.

    Returns:
        CTVolume in RAS+ order, HU in int16 (saturated). NaN, infinite and padding voxels are air (-1024).

    Raises:
        CTReadError: the path holds no single CT volume; says what was found, what was expected and what to do.
        NotCTError: a CTReadError: what is there is whole, but no CT, or covers less than `min_coverage`.
        TypeError: no path at all.
    """
    if not is_file(path):
        raise TypeError(
            f"expected a path, an address or a list of DICOM files, or a file that is open; got {type(path)}"
        )
    path = file_path(path)
    source = source_of(path)
    if rescale is not None:
        if len(rescale) not in (2, 5):
            raise CTReadError(f"{source}: rescale={rescale}; expected (slope, intercept), or those and three sizes.")
        rescale, spacing = tuple(rescale[:2]), (tuple(rescale[2:]) or spacing)
    try:
        with local_files(path) as (local, passing):
            stored = _read_stored(local, source, rescale, series_uid, allow_non_ct)
            if passing:
                stored = _unmapped(stored)
        volume = _build(stored, rescale=rescale, spacing=spacing, axes=axes, judge=not allow_non_ct)
        _check_coverage(volume, source, min_coverage)
        return volume
    except CTReadError as error:
        if source in str(error):
            raise
        raise type(error)(f"{source}: {error}") from error  # the message names a file in a cache or a zip
    except MemoryError as error:
        raise CTReadError(f"{source}: not enough memory for this volume. Crop or coarsen it.") from error
    except OSError as error:
        raise CTReadError(
            f"{source}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error


def _check_coverage(volume: CTVolume, source: str, least: float) -> None:
    voxels = " x ".join(map(str, volume.shape))
    covered = " x ".join(f"{mm:.0f}" for mm in volume.coverage_mm)
    found = f"{source}: {voxels} voxels cover {covered} mm (left to right, back to front, foot to head)"
    if min(volume.coverage_mm) < least:
        raise NotCTError(
            f"{found}; expected at least {least:g} mm along each axis. Name another series of the study, or lower min_coverage."
        )
    if min(volume.coverage_mm) < _CHEST_MM:
        logger.log(
            logging.WARNING if volume.hu.size >= _MIN_JUDGED else logging.INFO,
            "%s: too little to be a chest. Is it one slice, a localizer or a reformatted plane? min_coverage= "
            "(--min_coverage MM) refuses such volumes.",
            found,
        )


def to_ct_volume(image: Any, *, spacing: Sequence[float] | None = None, axes: str | None = None) -> CTVolume:
    """Return a CTVolume of what people hold in memory, or of a path.

    Args:
        image: a CTVolume (returned as it is); whatever `read_ct` takes; an image of nibabel, SimpleITK, MONAI (a
            MetaTensor), TorchIO or highdicom, with its own geometry; or an array or tensor (X, Y, Z) of HU, taken as RAS+
            with voxels of 1 mm. Values in memory that are no Hounsfield units are warned of, not refused.
        spacing, axes: as for `read_ct`, for what has no geometry of its own.

    Returns:
        CTVolume in RAS+ order, HU in int16.

    Raises:
        CTReadError: not one 3-D volume.
        TypeError: none of these, or an affine in coordinates that nothing tells; says what to do.
    """
    if isinstance(image, CTVolume):
        _check_given(image.source, image.affine, *_checked_geometry(image.source, spacing, axes))
        return image
    if is_file(image):
        return read_ct(image, spacing=spacing, axes=axes)
    return _build(stored_image(image), spacing=spacing, axes=axes)


# ------------------------------------------------------------------------------------------------ telling formats apart


def _read_stored(
    path: Any, source: str, rescale: tuple[float, float] | None, series_uid: str | None, allow_non_ct: bool
) -> StoredVolume:
    if isinstance(path, (list, tuple)):
        files = [Path(file) for file in path]
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None or not files:
            raise CTReadError(f"{missing or source}: no such file. Expected a list of the DICOM files of one series.")
        return _dicom(source, files, rescale, series_uid, allow_non_ct, listed=True)
    _check_path(path)
    path = local_copy(path) if is_address(path) else Path(path)
    if path.is_dir():
        return _read_folder(path, source, rescale, series_uid, allow_non_ct)
    if not path.is_file():
        raise CTReadError(f"{path}: no such file or folder. Check the path; a relative one starts at {Path.cwd()}.")
    if path.suffix.lower() in (".img", ".gz") and _is_pair(header := other_half(path)):
        path = header
    kind = _sniff(path)
    if kind == "zip":
        return _read_zip(path, source, rescale, series_uid, allow_non_ct)
    if kind == "dicom" and is_dicomdir(path):
        logger.info("%s: the directory of a disc; reads the folder that it lies in", source)
        return _read_folder(path.parent, source, rescale, series_uid, allow_non_ct)
    if kind == "dicom":
        return _dicom(source, [path], rescale, series_uid, allow_non_ct)
    if series_uid is not None:
        raise CTReadError(f"{source}: series_uid is for DICOM, and this is {kind}. Leave it out.")
    return replace(_READERS[kind](path), source=source)


def _check_path(path: str | os.PathLike) -> None:
    """An empty path would mean the current folder; an address of another kind, a file of that name."""
    text = os.fspath(path)
    if not text:
        raise CTReadError("an empty path; expected a file, a folder of DICOM slices or an address. Name one.")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) and not is_address(text):
        kind = text.partition("://")[0]
        raise CTReadError(
            f"{shown(text)}: an address of kind {kind}; expected file://, http(s):// or hf://. Fetch the file first."
        )


_READERS = {
    "NIfTI": lambda path: read_nifti(path, compressed=False),
    "compressed NIfTI": lambda path: read_nifti(path, compressed=True),
    "NRRD": read_nrrd,
    "MetaImage": read_metaimage,
    "NumPy": read_npy,
    "npz": read_npz,
}


def _sniff(path: Path) -> str:
    """One of `_READERS`, "dicom" or "zip", from the first bytes."""
    head = _head(path)
    if head[:2] == b"\x1f\x8b":
        return "compressed NIfTI"  # what is inside is checked where it is unpacked
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "npz" if path.suffix.lower() == ".npz" or _first_member(head).endswith(b".npy") else "zip"
    if head.startswith(b"\x93NUMPY"):
        return "NumPy"
    if nifti_header_size(head) is not None:
        return "NIfTI"
    if looks_like_dicom(head):
        return "dicom"
    if head.startswith(b"NRRD"):
        return "NRRD"
    if b"NDims" in head:
        return "MetaImage"
    raise CTReadError(
        f"{path}: found {seen(head)}; expected NIfTI, NRRD, MetaImage, NumPy, DICOM or a zip. "
        f"Unpack an archive, convert a scan (e.g. with dcm2niix), or fetch the file anew if it was one of these."
    )


def _is_pair(header: Path | None) -> bool:
    """Whether it is the `.hdr` of a pair: the `.img` beside it may hold any bytes."""
    if header is None or ".hdr" not in header.name.lower():
        return False
    head = _head(header)
    return head.startswith(b"\x1f\x8b") or nifti_header_size(head) is not None


def _head(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(512)


def _first_member(head: bytes) -> bytes:
    length = int.from_bytes(head[26:28], "little")
    return head[30 : 30 + length]


def _read_folder(
    folder: Path, source: str, rescale: tuple[float, float] | None, series_uid: str | None, allow_non_ct: bool
) -> StoredVolume:
    files = dicom_files(folder)
    if files:
        return _dicom(source, files, rescale, series_uid, allow_non_ct)
    entries = sorted(folder.iterdir())
    if not entries:
        raise CTReadError(f"{source}: an empty folder; expected the DICOM slices of one CT series.")
    kinds = ["folders" if entry.is_dir() else f"{entry.suffix or 'suffixless'} files" for entry in entries]
    found = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds), key=kinds.count, reverse=True)[:4])
    raise CTReadError(
        f"{source}: a folder without DICOM slices (found {found}); expected the slices of one CT series. "
        f"Name the folder that holds them, or the volume file itself."
    )


def _read_zip(
    path: Path, source: str, rescale: tuple[float, float] | None, series_uid: str | None, allow_non_ct: bool
) -> StoredVolume:
    """DICOM slices, or the one volume file that there is."""
    with tempfile.TemporaryDirectory(prefix="samf-") as folder:
        unpack_zip(path, Path(folder))
        files = dicom_files(Path(folder))
        if files:
            return _dicom(source, files, rescale, series_uid, allow_non_ct)
        volumes = [file for file in sorted(Path(folder).iterdir()) if _is_volume(file)]
        volumes = [file for file in volumes if not _is_pair(other_half(file))]  # the .hdr stands for both
        if len(volumes) != 1:
            raise CTReadError(
                f"{source}: a zip with {len(volumes)} volumes; expected DICOM slices or one volume file. "
                f"Unpack it and name one."
            )
        return _unmapped(replace(_READERS[_sniff(volumes[0])](volumes[0]), source=source))


def _unmapped(stored: StoredVolume) -> StoredVolume:
    """The volume in memory of its own: a map would outlive its file."""
    return stored if stored.own else replace(stored, array=np.array(stored.array, order="K"), own=True)


def _is_volume(file: Path) -> bool:
    try:
        return _sniff(file) in _READERS
    except CTReadError:
        return False


def _dicom(
    source: str,
    files: Sequence[Path],
    rescale: tuple[float, float] | None,
    series_uid: str | None,
    allow_non_ct: bool,
    listed: bool = False,
) -> StoredVolume:
    if rescale is not None:
        raise CTReadError(f"{source}: DICOM slices carry their own slope and intercept; leave rescale out.")
    return read_dicom(source, files, series_uid=series_uid, allow_non_ct=allow_non_ct, listed=listed)


# --------------------------------------------------------------------------------------------------- one volume of these


def _build(
    stored: StoredVolume,
    *,
    rescale: tuple[float, float] | None = None,
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    judge: bool | None = None,
) -> CTVolume:
    """CTVolume from stored values and what the header says of them.

    `judge`: refuse values that are no HU (True), let them pass (False), or warn of them (None).
    """
    source = stored.source
    check_dtype(stored.array.dtype, source)
    array = stored.array.reshape(squeezed_shape(stored.array.shape, source), order="A")
    affine = _affine(stored, array.shape, *_checked_geometry(source, spacing, axes))
    oblique, shear = _angles(affine)
    if shear > _MAX_SHEAR_DEGREES:
        stored.notes.append(f"tilted gantry or sheared axes: {shear:.1f}° off a right angle")
    slope, intercept = _scaling(stored, rescale)
    hu = _to_hu(array, slope, intercept, source)
    if judge is not False:
        _check_intensity(stored, array, hu, rescale, refuse=bool(judge))
    hu = _padding_to_air(hu, source, own=stored.own or hu is not array)
    orientation = _orientation(affine)
    if oblique > _MAX_OBLIQUE_DEGREES or shear > _MAX_SHEAR_DEGREES:
        hu, affine = _resample(hu, affine, source, oblique, shear)
    hu, affine = _canonical(hu, affine)
    size = tuple(float(norm) for norm in np.linalg.norm(affine[:3, :3], axis=0))
    if not is_plausible(np.array(size)):
        sizes = " x ".join(f"{mm:g}" for mm in size)
        logger.warning("%s: voxels of %s mm, which no scanner makes. Is its header's unit wrong?", source, sizes)
    return CTVolume(hu=hu, spacing=size, affine=affine, source=source, stored_orientation=orientation)


def _scaling(stored: StoredVolume, rescale: tuple[float, float] | None) -> tuple[float, float]:
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
    logger.info("%s: HU = stored value * %g + %g, as the caller says", stored.source, slope, intercept)
    return slope, intercept


def _to_hu(stored: np.ndarray, slope: float, intercept: float, source: str) -> np.ndarray:
    """int16 HU, saturated. Native int16 without scaling stays what it is, a memory map included."""
    plain = (slope, intercept) == (1.0, 0.0)
    if plain and stored.dtype == np.int16:
        return stored
    if plain and stored.dtype.kind in "iub" and np.can_cast(stored.dtype, np.int16):
        return stored.astype(np.int16)
    hu = np.empty_like(stored, dtype=np.int16, subok=False)
    # One plane at a time keeps what stands between small.
    axis = int(np.argmax(np.abs(stored.strides)))
    planes = zip(np.moveaxis(stored, axis, 0), np.moveaxis(hu, axis, 0), strict=True)
    not_finite = sum(scale_to_hu(source_plane, slope, intercept, plane) for source_plane, plane in planes)
    if not_finite:
        logger.warning("%s: %d voxels are NaN or infinite; read as air (%d HU)", source, not_finite, AIR_HU)
    return hu


# ------------------------------------------------------------------------------------------------------------- intensity


def judge_intensity(hu: np.ndarray) -> tuple[str, str]:
    """Whether values can be a CT's Hounsfield units, by their percentiles and their air.

    Padding (below -1500) is set aside first; then, of a sample of some 260,000 voxels:
    - the 99th percentile below -300, or 5 % padding of more than three values: rescaled twice, or no CT ("not HU");
    - at least half a per cent between -1150 and -700: there is air where it belongs ("HU");
    - else a first percentile above -200, with a dark background of at least 5 % at -50 or above, a median above 600, or
      a range of less than 4: raw stored values, another modality, a mask or a picture ("not HU");
    - else a crop without air, which nobody can judge ("no air").

    Args:
        hu: int16, any shape.

    Returns:
        "HU", "no air" or "not HU", and what was found, in words. Less than 10,000 voxels, or one value alone, are "no air".
    """
    counts = np.bincount(_sample(hu).astype(np.int32) + 32768, minlength=65536)
    total = counts.sum()
    if total < _MIN_JUDGED or np.count_nonzero(counts) == 1:
        return "no air", "too few voxels, or one value alone"
    far_below = counts[: _PADDING_HU + 32768].copy()
    padding = far_below.sum() / total
    spread = padding - np.sort(far_below)[-3:].sum() / total
    if padding < 0.99:
        counts[: _PADDING_HU + 32768] = 0
    below = np.cumsum(counts) / counts.sum()  # share of voxels at each value or below
    low, first, middle, high, highest = np.searchsorted(below, [0.001, 0.01, 0.5, 0.99, 0.999]) - 32768
    found = f"1st percentile {first}, median {middle}, 99th {high}"
    found += f", {100 * padding:.0f} % below {_PADDING_HU}" if padding > 0.001 else ""
    if high < -300 or spread >= 0.05:
        return "not HU", f"{found}: too low for air, lungs and soft tissue"
    if below[-700 + 32768] - below[-1151 + 32768] >= 0.005:
        return "HU", found
    if first > -200:
        background = below[int(low + 0.03 * (highest - low)) + 32768]
        if high - first < 4 or middle > 600 or (first >= -50 and background >= 0.05):
            return "not HU", f"{found}: no air near -1000, and a background or tissue where CT has none"
    return "no air", f"{found}: no air near -1000, a crop perhaps"


def _sample(hu: np.ndarray) -> np.ndarray:
    """Some 260,000 voxels, spread evenly: the step shares no factor with the volume's sides."""
    flat = hu.ravel(order="K")
    step = max(1, flat.size // _SAMPLE)
    while step > 1 and math.gcd(step, math.prod(hu.shape)) > 1:
        step += 1
    return np.asarray(flat[::step])


def _check_intensity(
    stored: StoredVolume, array: np.ndarray, hu: np.ndarray, rescale: tuple[float, float] | None, refuse: bool
) -> None:
    verdict, found = judge_intensity(hu)
    source = stored.source
    if verdict == "HU":
        logger.info("%s: Hounsfield units (%s)", source, found)
        return
    if verdict == "no air":
        level = logging.WARNING if hu.size >= _MIN_JUDGED else logging.INFO
        logger.log(level, "%s: %s. Check that its values are Hounsfield units.", source, found)
        return
    if not refuse:
        logger.warning("%s: %s. Its values don't look like Hounsfield units.", source, found)
        return
    before = f" Also found: {'; '.join(stored.notes)}." if stored.notes else ""
    if rescale is not None and judge_intensity(_to_hu(array, 1.0, 0.0, source))[0] == "HU":
        raise CTReadError(
            f"{source}: its values are Hounsfield units already (air lies near -1000), and rescale={tuple(rescale)} makes "
            f"{found}. Leave rescale out: it would rescale twice.{before}"
        )
    raise NotCTError(
        f"{source}: its values are no Hounsfield units: {found}. Expected air near -1000 and soft tissue near 0. "
        f"{_intensity_remedy(found, rescale, stored.own_scaling)} allow_non_ct=True takes them as they are.{before}"
    )


def _intensity_remedy(found: str, rescale: tuple[float, float] | None, own_scaling: bool) -> str:
    if rescale is not None:
        return f"rescale={tuple(rescale)} is not this file's: look its slope and intercept up, or leave rescale out."
    if "too low" in found:
        return "If they were rescaled twice, write the file anew from its source."
    if own_scaling:
        return "Its slices carry a wrong slope and intercept, or it is no CT: export the series again."
    return "If they are raw stored values, pass rescale=(slope, intercept) of the scan's metadata; if not, it is no CT."


def _padding_to_air(hu: np.ndarray, source: str, own: bool) -> np.ndarray:
    lowest = int(hu.min())
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


# -------------------------------------------------------------------------------------------------------------- geometry


def _checked_geometry(
    source: str, spacing: Sequence[float] | None, axes: str | None
) -> tuple[np.ndarray | None, str | None]:
    """The caller's voxel sizes (3,) and axes, of three letters."""
    sizes = None if spacing is None else np.array([float(mm) for mm in spacing])
    if sizes is not None and (sizes.shape != (3,) or not np.isfinite(sizes).all() or sizes.min() <= 0):
        raise CTReadError(f"{source}: spacing={spacing}; expected three positive numbers of mm.")
    if axes is None:
        return sizes, None
    letters = axes.upper() if isinstance(axes, str) else ""
    if len(letters) != 3 or sorted(_AXIS_OF.get(letter, -1) for letter in letters) != [0, 1, 2]:
        raise CTReadError(
            f"{source}: axes={axes!r}; expected one letter for each stored axis, where it runs to: R or L, A or P, S or I, "
            f'such as "LPS".'
        )
    return sizes, letters


def _affine(stored: StoredVolume, shape: Sequence[int], sizes: np.ndarray | None, axes: str | None) -> np.ndarray:
    """The first affine that maps voxels to a real volume; failing that, one made of voxel sizes and axes."""
    usable = [affine for affine in stored.affines if _is_regular(affine)]
    given = sizes is not None or axes is not None
    if not usable or (given and _is_blank(usable[0])):
        return _assumed_affine(stored, shape, sizes, axes)
    if given:
        _check_given(stored.source, usable[0], sizes, axes)
    elif _is_blank(usable[0]) and min(shape[:2]) >= 400:
        logger.warning(
            "%s: voxels of exactly 1 mm, unturned: a blank header? If so, pass spacing= and axes= (and rescale=) from "
            "the scan's metadata.",
            stored.source,
        )
    if stored.affines[0] is not usable[0]:
        logger.warning("%s: its first affine is NaN or singular; takes the next (qform, spacing).", stored.source)
    return usable[0]


def _check_given(source: str, affine: np.ndarray, sizes: np.ndarray | None, axes: str | None) -> None:
    """What the caller says must be what the header says, where it says something."""
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    if sizes is not None and np.abs(norms / sizes - 1).max() > 0.02:
        raise CTReadError(
            f"{source}: its header tells of voxels of {norms.round(4).tolist()} mm, spacing of {sizes.tolist()}. "
            f"Leave spacing out, or look it up anew."
        )
    if axes is not None and axes != (stored := _orientation(affine)):
        raise CTReadError(f"{source}: its header tells of axes to {stored}, axes of {axes}. Leave axes out.")


def _assumed_affine(
    stored: StoredVolume, shape: Sequence[int], sizes: np.ndarray | None, axes: str | None
) -> np.ndarray:
    """Of the caller's sizes and axes, the header's own sizes, and what stands for the rest, with a word of it.

    The makeshift for NIfTI without a form follows nibabel: axes run left, front, head, the centre is the origin. A blank
    header under the caller's sizes is taken as DICOM's: left, back, head.
    """
    known = stored.assumed_axes if sizes is None or stored.assumed_axes != "LAS" else "LPS"
    zooms = np.asarray(stored.zooms, dtype=np.float64)
    sound = np.isfinite(zooms) & (np.abs(zooms) > 1e-6) & (np.abs(zooms) < 1e6)
    zooms = np.where(sound, zooms, 1.0)
    mm = np.abs(zooms) if sizes is None else sizes
    known = "".join(letter if zoom > 0 else _OPPOSITE[letter] for letter, zoom in zip(known, zooms, strict=True))
    if stored.bare:
        _tell_bare(stored.source, known, sizes is not None, axes is not None)
    else:
        _tell_assumed(stored, mm, axes or known, bool(sound.all()), sizes is not None, axes is not None)
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for column, letter in enumerate(axes or known):
        row = _AXIS_OF[letter]
        affine[row, column] = mm[column] if letter == _DIRECTIONS[row][1] else -mm[column]
    return _centred(affine, shape)


def _tell_bare(source: str, known: str, sized: bool, placed: bool) -> None:
    """Of an array whose format has no place for geometry: what the caller did not give, and how to give it."""
    assumed = []
    if not sized:
        assumed.append(("voxels of 1 mm", "spacing= in mm"))
    if not placed:
        runs = ", ".join(_SIDES[letter] for letter in known)
        assumed.append((f"axes running {runs}", 'axes= ("IPL": slices first, from head to foot)'))
    if assumed:
        logger.warning(
            "%s: an array without geometry; assumes %s. If that is wrong, so are planes, sides and sizes: pass %s, or "
            "save `affine` (4, 4) beside it in an .npz.",
            source,
            *(" and ".join(words) for words in zip(*assumed, strict=True)),
        )


def _tell_assumed(stored: StoredVolume, mm: np.ndarray, known: str, sound: bool, sized: bool, placed: bool) -> None:
    """Of a header without a usable affine: what was assumed. `sound`: its voxel sizes are numbers."""
    runs = ", ".join(_SIDES[letter] for letter in known)
    if sized or (placed and sound):
        known = "" if placed else f", axes running {runs}"
        logger.info("%s: voxels of %s mm%s, as the caller says", stored.source, tuple(mm.tolist()), known)
        return
    if sound and not stored.affines and stored.assumed_axes == "RAS":  # an .npz with `spacing` is defined so
        return
    found = "its affine is NaN or singular" if stored.affines else "its header has no orientation"
    logger.warning(
        "%s: %s; assumes voxels of %s mm with axes running %s. Check the pictures' sides, or pass axes=.",
        stored.source,
        found if sound else f"{found}, and voxel sizes that are no lengths",
        " x ".join(f"{value:g}" for value in mm),
        runs,
    )


def _centred(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape[:3]) - 1) / 2)
    return affine


def _is_regular(affine: np.ndarray) -> bool:
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or np.abs(affine).max() > 1e9:
        return False
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(norms.min() > 1e-6 and abs(np.linalg.det(affine[:3, :3] / norms)) > 1e-3)


def _is_blank(affine: np.ndarray) -> bool:
    """Voxels of 1 mm along unturned axes, as libraries write where they know nothing."""
    return np.array_equal(np.abs(affine[:3, :3]), np.eye(3)) and not np.abs(affine[:3, 3]).any()


def _angles(affine: np.ndarray) -> tuple[float, float]:
    """Degrees between the axes and the patient's, and by which the axes miss right angles among themselves; the largest."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    axes, _ = _nearest_axes(affine)
    nearest = np.abs([cosines[row, column] for row, column in enumerate(axes)])
    oblique = np.degrees(np.arccos(np.clip(nearest, 0, 1))).max()
    products = np.abs((cosines.T @ cosines)[np.triu_indices(3, 1)])
    return float(oblique), float(np.degrees(np.arcsin(np.clip(products, 0, 1))).max())


def _resample(
    hu: np.ndarray, affine: np.ndarray, source: str, oblique: float, shear: float
) -> tuple[np.ndarray, np.ndarray]:
    """The volume on the patient's axes, linearly, with voxels as large as along the nearest stored axes; air around."""
    if shear > _MAX_MENDED_SHEAR_DEGREES:
        raise CTReadError(
            f"{source}: its axes miss right angles by {shear:.1f}°; expected at most {_MAX_MENDED_SHEAR_DEGREES:g}°. "
            f"The header is damaged: export or write the scan anew."
        )
    if affine_transform is None:
        raise CTReadError(f"{source}: oblique or tilted ({max(oblique, shear):.1f}°); needs scipy: pip install scipy")
    axes, _ = _nearest_axes(affine)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)[axes]
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (np.array(hu.shape) - 1)
    corners = corners @ affine[:3, :3].T + affine[:3, 3]
    start = corners.min(axis=0)
    counts = np.ceil((corners.max(axis=0) - start) / sizes - 1e-3) + 1
    limit = min(max(_MAX_UPRIGHT, _MAX_GROWTH * hu.size), MAX_VOXELS - hu.size)  # both stand in memory
    if counts.prod() > limit:
        raise CTReadError(
            f"{source}: {counts.prod():.3g} voxels once turned upright; expected at most {limit:.3g}. Its header is "
            f"damaged, or crop or coarsen the scan."
        )
    target = np.diag([*sizes, 1.0])
    target[:3, 3] = start
    mapping = np.linalg.inv(affine) @ target
    upright = affine_transform(
        hu,
        mapping[:3, :3],
        mapping[:3, 3],
        output_shape=tuple(int(n) for n in counts),
        output=np.int16,
        order=1,
        mode="grid-constant",  # "constant" makes air of border voxels that rounding puts outside
        cval=AIR_HU,
    )
    logger.warning(
        "%s: axes %.1f° off the patient's%s; resampled linearly to %s voxels of %s mm",
        source,
        oblique,
        f", {shear:.1f}° off a right angle (tilted gantry)" if shear > _MAX_SHEAR_DEGREES else "",
        " x ".join(str(n) for n in upright.shape),
        " x ".join(f"{mm:g}" for mm in sizes.round(3)),
    )
    return upright, target


def _canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`array` as a RAS+ view, by the nearest axis permutation and flips, and the affine that fits it."""
    axes, signs = _nearest_axes(affine)
    transform = np.zeros((4, 4))
    transform[3, 3] = 1
    for axis, (stored_axis, sign) in enumerate(zip(axes, signs, strict=True)):
        transform[stored_axis, axis] = sign
        if sign < 0:
            transform[stored_axis, 3] = array.shape[stored_axis] - 1
    array = array.transpose(axes)
    array = array[tuple(slice(None, None, sign) for sign in signs)]
    return array, affine @ transform + 0.0  # + 0.0 turns -0.0 into 0.0


def _orientation(affine: np.ndarray) -> str:
    """Where each axis of the stored array runs to, by the nearest patient axis: three letters."""
    axes, signs = _nearest_axes(affine)
    ends = {stored: _DIRECTIONS[axis][sign > 0] for axis, (stored, sign) in enumerate(zip(axes, signs, strict=True))}
    return "".join(ends[stored] for stored in range(3))


def _nearest_axes(affine: np.ndarray) -> tuple[list[int], list[int]]:
    """For R, A and S: which stored axis runs nearest to it, and its sign.

    Of the six ways to assign axes, the one with the largest sum of squared cosines.
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    axes = max(orders, key=lambda order: sum(cosines[row, column] ** 2 for row, column in enumerate(order)))
    return list(axes), [1 if cosines[row, column] > 0 else -1 for row, column in enumerate(axes)]
