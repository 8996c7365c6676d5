"""NIfTI-1 and NIfTI-2 files: single, in `.hdr`/`.img` pairs, and compressed."""

import logging
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .ct_common import EXPORT_AGAIN, CTReadError, Scale, StoredVolume, check_dtype, squeezed_shape
from .ct_headers import trusted_units
from .ct_signatures import GZIP_MAGIC, describe_bytes, nifti_header_size, other_half, read_head
from .ct_streams import (
    DEFLATE_MAX_RATIO,
    check_claim,
    damage_named,
    map_values,
    open_gzip,
    read_values,
    skip_bytes,
)

logger = logging.getLogger(__name__)

_ROUNDED_LENGTH = 1 + 1e-4  # of a unit quaternion whose numbers have four digits


def read_nifti(path: Path, compressed: bool, as_hu: bool = False) -> StoredVolume:
    """Read a `.nii` file, or a `.hdr` with its `.img`.

    Args:
        path: the file, or the `.hdr` of a pair.
        compressed: by gzip; such voxels are decompressed into memory, others are mapped.
        as_hu: scale values as the header says while they are read, in place of returning the stored ones.

    Raises:
        CTReadError: damaged, not one 3-D volume, or without its other half.
    """
    try:
        import nibabel  # noqa: F401  # not above: it imports pydicom, and both take 0.15 s, which other formats don't need
    except ImportError as error:
        raise CTReadError(f"{path}: reading NIfTI needs nibabel: pip install nibabel") from error
    with damage_named(path, "the file"):
        with open_gzip(path) if compressed else open(path, "rb") as stream:
            header, position, pair = _header(path, stream, compressed)
            scale = _scaling(path, header) if as_hu else None
            found = None if pair else _array(path, stream, header, position, compressed, scale)
        array, not_finite = _pair_array(path, header, scale) if found is None else found
    slope, intercept = (1.0, 0.0) if as_hu else _scaling(path, header)
    affines, zooms = nifti_affines(str(path), header), nifti_zooms(str(path), header)
    own = not isinstance(array, np.memmap)
    return StoredVolume(
        array, str(path), affines, zooms, slope=slope, intercept=intercept, own=own, not_finite=not_finite
    )


# --- Voxels -----------------------------------------------------------------------------------------------------------


def _pair_array(path: Path, header: Any, scale: Scale | None) -> tuple[np.ndarray, int]:
    voxels = other_half(path)
    if voxels is None:
        raise CTReadError(
            f"{path}: found half of a .hdr/.img pair; the .img is missing next to it. Download both files, under one name."
        )
    compressed = read_head(voxels, 2) == GZIP_MAGIC
    with open_gzip(voxels) if compressed else open(voxels, "rb") as stream:
        return _array(voxels, stream, header, 0, compressed, scale)


def _header(path: Path, stream: BinaryIO, compressed: bool) -> tuple[Any, int, bool]:
    """Return nibabel's header, its length in bytes, and whether its voxels are in another file."""
    block = stream.read(348)
    size = nifti_header_size(block)
    if size is None or len(block) < 348:
        raise CTReadError(
            f"{path}: found {describe_bytes(block)}{' inside of a gzip file' if compressed else ''}; expected a NIfTI "
            f"header. Unpack it and name the file or folder, or convert the scan, e.g. with dcm2niix."
        )
    block += stream.read(size - 348)
    if len(block) < size:
        raise CTReadError(f"{path}: ends inside its header. It was cut short: download or export it again.")
    magic = block[344:348] if size == 348 else block[4:8]
    pair = magic in (b"ni1\0", b"ni2\0")
    if not pair and magic not in (b"n+1\0", b"n+2\0"):
        raise CTReadError(
            f"{path}: found an Analyze 7.5 header, which has no orientation (nibabel assumes that its axes point left, "
            f"front, head; ITK left, back, head); expected NIfTI. Convert the scan again from its DICOM series, e.g. with "
            f"dcm2niix, or save it as NIfTI with the affine that you know."
        )
    import nibabel as nib

    header_class = nib.Nifti1Header if size == 348 else nib.Nifti2Header
    return header_class(block, check=False), size, pair


def _array(
    path: Path, stream: BinaryIO, header: Any, position: int, compressed: bool, scale: Scale | None
) -> tuple[np.ndarray, int]:
    """Return the values (X, Y, Z), and how many of them are not finite, as `read_values` and `map_values` do.

    Args:
        path: the file.
        stream: the file, decompressed, behind its header.
        header: nibabel's.
        position: bytes of the stream that the header took, 0 where the header is another file.
        compressed: by gzip.
        scale: slope and intercept, for values in HU.
    """
    dtype = header.get_data_dtype()
    check_dtype(dtype, str(path))
    shape = squeezed_shape(header.get_data_shape(), str(path))
    offset = float(header["vox_offset"]) or (position + 4.0 if position else 0.0)
    limit = path.stat().st_size * (DEFLATE_MAX_RATIO if compressed else 1)
    if offset < position:
        raise CTReadError(
            f"{path}: voxels from byte {offset:.0f} on, inside its own header of {position}. {EXPORT_AGAIN}"
        )
    expected = check_claim(path, shape, dtype, offset, limit, compressed=compressed)
    if compressed:
        skip_bytes(stream, int(offset) - position)
        array, not_finite = read_values(path, stream, expected, dtype, scale)
    else:
        array, not_finite = map_values(path, int(offset), expected, dtype, scale)
    return array.reshape(shape, order="F"), not_finite


def _scaling(path: Path, header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):  # the standard's "no scaling"
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise CTReadError(
            f"{path}: the header has slope {slope} and intercept {intercept}; expected finite ones. Correct the header, "
            f"e.g. image.header.set_slope_inter(1, 0) in nibabel if the stored values are HU."
        )
    return slope, intercept


# --- Geometry ---------------------------------------------------------------------------------------------------------


def nifti_zooms(source: str, header: Any) -> np.ndarray:
    """Return the voxel sizes (3,) in mm of a nibabel header, for images without a form."""
    with np.errstate(invalid="ignore"):
        zooms = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    return zooms * _unit(source, header, zooms)


def nifti_affines(source: str, header: Any, known: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the affines of a nibabel header in mm: sform, then qform, those whose code is set.

    Args:
        source: name in messages.
        header: nibabel's.
        known: affine (4, 4) of an image in memory. It comes first, unless the header has no form: then nibabel has
            made it up.

    Returns:
        float64 arrays (4, 4), best first. They may be unusable.
    """
    forms = []
    if header["sform_code"] > 0:
        forms.append(_sform(header))
    if header["qform_code"] > 0:
        usable = bool(forms) and np.isfinite(forms[0]).all()
        forms.append(_qform(source, header, warn=not usable))
    if len(forms) == 2 and np.isfinite(forms[0]).all() and np.isfinite(forms[1]).all():
        largest = np.abs(forms[0][:3, :3]).max()
        if np.abs(forms[0][:3, :3] - forms[1][:3, :3]).max() > 0.05 * largest:
            logger.warning("%s: its sform and qform disagree; uses the sform. Check left and right.", source)
    if known is not None and forms:
        forms.insert(0, known)
    if not forms:
        return forms
    unit = _unit(source, header, np.linalg.norm(forms[0][:3, :3], axis=0))
    return forms if unit == 1 else [np.diag([unit, unit, unit, 1.0]) @ form for form in forms]


def _unit(source: str, header: Any, sizes: np.ndarray) -> float:
    """Return mm in the header's unit. Many writers leave a wrong one: it counts only where it makes CT's sizes."""
    unit = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # metres, micrometres
    if unit == 1 or not np.isfinite(sizes).all() or not sizes.all():
        return 1.0
    return float(trusted_units(source, sizes, np.full(3, unit), eager=False)[0])


def _sform(header: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(header.get_sform(), dtype=np.float64)


def _qform(source: str, header: Any, warn: bool) -> np.ndarray:
    """Return the qform after the repairs that the standard's own library makes; `warn`: name them in a warning.

    A qfac of 0 counts as 1 (by the standard), any other by its sign; a size by its magnitude, or as 1 mm where it is 0 or
    NaN; a quaternion longer than 1 by its direction.
    """
    header, repairs = header.copy(), []
    pixdim = header["pixdim"].astype(np.float64)
    quaternion = np.array([float(header[f"quatern_{letter}"]) for letter in "bcd"])
    if not np.isfinite(quaternion).all():
        return np.full((4, 4), np.nan)
    if pixdim[0] not in (1, -1):
        qfac = -1 if pixdim[0] < 0 else 1
        repairs.append(f"pixdim[0] (qfac) is {pixdim[0]:g}, read as {qfac}")
        pixdim[0] = qfac
    for axis in (1, 2, 3):
        size = abs(pixdim[axis]) if np.isfinite(pixdim[axis]) and pixdim[axis] else 1.0
        if pixdim[axis] != size:
            repairs.append(f"pixdim[{axis}] is {pixdim[axis]:g}, read as {size:g} mm")
            pixdim[axis] = size
    header["pixdim"] = pixdim
    length = float(np.linalg.norm(quaternion))
    if length > _ROUNDED_LENGTH:
        repairs.append(f"its quaternion's length is {length:.4g}, read as 1")
    if repairs and warn:
        logger.warning("%s: in the header of its qform %s.", source, "; ".join(repairs))
    from nibabel.quaternions import quat2mat
    from nibabel.spatialimages import HeaderDataError

    try:
        with np.errstate(all="ignore"):
            return np.asarray(header.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):  # a length beyond what nibabel takes for rounding
        form = np.eye(4)
        form[:3, :3] = quat2mat([0, *quaternion]) * pixdim[1:4] * (1, 1, pixdim[0])
        form[:3, 3] = [float(header[f"qoffset_{letter}"]) for letter in "xyz"]
        return form
