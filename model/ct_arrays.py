"""NumPy files: one array in `.npy`, or one with its geometry in `.npz`.

RAD-ChestCT's `.npz` has no geometry, but a known one: a single int16 array `ct` of HU, clipped to ±1000 and resampled to
0.8 mm, whose axes run from head to foot, from front to back and from right to left. The authors' preprocess_volumes.py
(github.com/rachellea/ct-volume-preprocessing) sorts the slices by falling position, refuses any ImageOrientationPatient but
1, 0, 0, 0, 1, 0 and transposes to (slices, rows, columns); their table of extrema names the ends of the axes `sup_axis0min`,
`ant_axis1min` and `rig_axis2min`. The in-plane matrix is square, and 512 only where the pixels were of 0.8 mm.
"""

import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Literal

import numpy as np

from .ct_common import CTReadError, StoredVolume, check_dtype, squeezed_shape
from .ct_streams import check_claim, damage_named, decompress

logger = logging.getLogger(__name__)

_RAD_CHEST_CT = "ct"  # the only member of RAD-ChestCT's files
_RAD_CHEST_CT_FILE = re.compile(r"(trn|val|tst)\d+\.npz")
_RAD_CHEST_CT_AXES, _RAD_CHEST_CT_MM, _RAD_CHEST_CT_LIMIT_HU = "IPL", 0.8, 1000


def read_npy(path: Path) -> StoredVolume:
    """Read an array (X, Y, Z) of HU, as a memory map; the format cannot store geometry.

    Raises:
        CTReadError: damaged, or not one 3-D array of real numbers.
    """
    with damage_named(path, "the NumPy file"), open(path, "rb") as stream:
        shape, order, dtype = _header(stream)
        check_dtype(dtype, str(path))
        squeezed = squeezed_shape(shape, str(path), leading=True)
        check_claim(path, shape, dtype, stream.tell(), path.stat().st_size)
        array = np.memmap(path, dtype=dtype, mode="r", offset=stream.tell(), shape=squeezed, order=order)
    return StoredVolume(array, str(path), assumed_axes="RAS", bare=True, own=False)


def read_npz(path: Path) -> StoredVolume:
    """Read the one 3-D array in an `.npz`, with `affine` (4, 4), voxel → RAS+ mm, or `spacing` (3,) in mm.

    A file that looks like RAD-ChestCT's gets its geometry, with a warning unless it has the name of one, too.

    Raises:
        CTReadError: damaged, no or several 3-D arrays, or geometry of another shape.
    """
    with damage_named(path, "the npz file"), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        volumes = [name for name, info in members.items() if _dimensions(archive, info) >= 3]
        if len(volumes) != 1:
            raise CTReadError(
                f"{path}: {len(volumes)} arrays of three dimensions (keys {', '.join(sorted(members)[:8])}); expected "
                f"one, with `affine` or `spacing`. Save one volume, e.g. numpy.savez(path, hu=..., affine=...)."
            )
        array = _array(path, archive, members[volumes[0]])
        names = [name for name in ("affine", "spacing") if name in members]
        geometry: dict[str, np.ndarray] = {name: _array(path, archive, members[name]) for name in names}
    array = array.reshape(squeezed_shape(array.shape, str(path), leading=True), order="A")
    if set(members) == {_RAD_CHEST_CT} and _is_rad_chest_ct(array):
        return _rad_chest_ct(path, array)
    affines, zooms = _geometry(path, geometry)
    bare = zooms is None
    return StoredVolume(array, str(path), affines, (1.0, 1.0, 1.0) if zooms is None else zooms, "RAS", bare=bare)


def _is_rad_chest_ct(array: np.ndarray) -> bool:
    """Return whether an array (slices, rows, columns) can be RAD-ChestCT's: int16, square slices, clipped HU with air."""
    if array.dtype != np.int16 or array.ndim != 3 or not array.size or array.shape[1] != array.shape[2]:
        return False
    return int(array.min()) == -_RAD_CHEST_CT_LIMIT_HU and int(array.max()) <= _RAD_CHEST_CT_LIMIT_HU


def _rad_chest_ct(path: Path, array: np.ndarray) -> StoredVolume:
    logger.log(
        logging.INFO if _RAD_CHEST_CT_FILE.fullmatch(path.name) else logging.WARNING,
        "%s: an array `ct` without geometry, as in RAD-ChestCT; takes its voxels of %g mm and axes to foot, back and left. "
        "If it is from elsewhere, pass axes= and spacing=.",
        path,
        _RAD_CHEST_CT_MM,
    )
    # Sizes of the format's definition, so that nothing is assumed and nothing more is logged.
    return StoredVolume(array, str(path), [], (_RAD_CHEST_CT_MM,) * 3, _RAD_CHEST_CT_AXES, known_axes=True)


def _geometry(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Return the affines, best first, and the voxel sizes (3,), None without them."""
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {"affine": ((4, 4), (3, 4)), "spacing": ((3,),)}
    for name, array in arrays.items():
        if array.shape not in shapes[name]:
            raise CTReadError(
                f"{path}: `{name}` of shape {array.shape}; expected {shapes[name][0]}. Save it in that shape."
            )
    affines = []
    zooms = arrays["spacing"].astype(np.float64) if "spacing" in arrays else None
    if "affine" in arrays:
        affines.append(np.vstack([arrays["affine"][:3], [0, 0, 0, 1]]).astype(np.float64))
        affines += [] if zooms is None else [np.diag([*zooms, 1.0])]
    return affines, zooms


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], Literal["C", "F"], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
    shape, fortran, dtype = read(stream)
    return shape, "F" if fortran else "C", dtype


def _dimensions(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Return the number of axes of a member of any type, since notes as text may accompany a volume."""
    with archive.open(info) as stream:
        return len(_header(stream)[0])


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as stream:
        shape, order, dtype = _header(stream)
        check_dtype(dtype, str(path))
        expected = check_claim(path, shape, dtype, 0, info.file_size, compressed=True)
        return decompress(path, stream, expected).view(dtype).reshape(shape, order=order)
