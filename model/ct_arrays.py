"""NumPy files: one array in `.npy`, or one with its geometry in `.npz`."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Literal

import numpy as np

from .ct_common import CTReadError, StoredVolume, check_dtype, squeezed_shape
from .ct_streams import check_claim, damage_named, decompress


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
    affines, zooms = _geometry(path, geometry)
    bare = zooms is None
    return StoredVolume(array, str(path), affines, (1.0, 1.0, 1.0) if zooms is None else zooms, "RAS", bare=bare)


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
