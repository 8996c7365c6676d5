"""NRRD files, with their voxels attached or in one other file; raw, gzip, bzip2 or ascii."""

import bz2
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .ct_common import EXPORT_AGAIN, MAX_VOXELS, CTReadError, Scale, StoredVolume, squeezed_shape
from .ct_headers import MAX_HEADER_LINES, MAX_VALUE, check_fields, detached_file, header_units, trusted_units
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

_MAX_TEXT = 1 << 26  # bytes of voxels as text: Python's own numbers take much memory
_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
_TO_RAS = {  # by space
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1.0, -1.0, 1.0)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1.0, 1.0, 1.0)),
}
_ENCODINGS = {"gz": "gzip", "bz2": "bzip2", "text": "ascii", "txt": "ascii"}


@dataclass(frozen=True)
class _Layout:
    """How the voxels are stored."""

    dtype: np.dtype
    sizes: list[int]  # of every axis
    encoding: str


@dataclass(frozen=True)
class _Geometry:
    """Which axes are spatial, and what the header says about them."""

    axes: list[int]
    affines: list[np.ndarray]
    zooms: np.ndarray  # (3,) mm


def read_nrrd(path: Path, as_hu: bool = False) -> StoredVolume:
    """Read a NRRD file.

    Args:
        path: the file, or the header of detached voxels.
        as_hu: turn values into int16 HU while they are read, in place of returning the stored ones.

    Raises:
        CTReadError: damaged, or not one 3-D volume of single values.
    """
    with damage_named(path, "the NRRD file"):
        with open(path, "rb") as stream:
            fields, start = _fields(path, stream), stream.tell()
        layout = _layout(path, fields)
        geometry = _geometry(path, fields, layout.sizes)
        data_path = path
        if "data file" in fields:
            data_path, start = detached_file(path, fields["data file"]), 0
        array, not_finite = _array(data_path, start, fields, layout, (1.0, 0.0) if as_hu else None)
        shape = squeezed_shape([layout.sizes[axis] for axis in geometry.axes], str(path))
        array = array.reshape(shape, order="F")
    own = not isinstance(array, np.memmap)
    return StoredVolume(array, str(path), geometry.affines, geometry.zooms, "LPS", own=own, not_finite=not_finite)


def _fields(path: Path, stream: BinaryIO) -> dict[str, str]:
    fields: dict[str, str] = {}
    stream.readline(64)  # NRRD000x
    for _ in range(MAX_HEADER_LINES):
        line = stream.readline(1 << 16).decode("latin-1").rstrip("\r\n")
        if not line:
            return fields
        name, separator, value = line.partition(":")
        name = name.strip().lower()
        if separator and not line.startswith("#") and not value.startswith("="):  # key:=value is free text
            fields[{"datafile": "data file"}.get(name, name)] = value.strip()[:MAX_VALUE]
    raise CTReadError(f"{path}: a NRRD header without an end. {EXPORT_AGAIN}")


def _layout(path: Path, fields: Mapping[str, str]) -> _Layout:
    check_fields(path, fields, ("type", "dimension", "sizes", "encoding"))
    kind = " ".join(fields["type"].lower().split())
    if kind not in _TYPES:
        raise CTReadError(
            f"{path}: voxels of type {kind[:24]!r}; expected integer or real HU values. Convert the scan again."
        )
    sizes = [int(n) for n in fields["sizes"].split()]
    if len(sizes) != int(fields["dimension"]) or min(sizes) < 1 or len(sizes) > 16:
        raise CTReadError(f"{path}: dimension {int(fields['dimension'])} against sizes {sizes[:16]}. {EXPORT_AGAIN}")
    dtype = np.dtype({"big": ">", "little": "<"}.get(fields.get("endian", "").lower(), "=") + _TYPES[kind])
    encoding = fields["encoding"].lower()
    encoding = _ENCODINGS.get(encoding, encoding)
    if encoding not in ("raw", "gzip", "bzip2", "ascii"):
        raise CTReadError(
            f"{path}: encoding {encoding[:24]!r}; expected raw, gzip, bzip2 or ascii. Save it in one of these."
        )
    return _Layout(dtype, sizes, encoding)


# --- Geometry ---------------------------------------------------------------------------------------------------------


def _geometry(path: Path, fields: Mapping[str, str], sizes: Sequence[int]) -> _Geometry:
    if "space directions" not in fields:
        return _geometry_of_spacings(path, fields, sizes)
    vectors = [
        None if part.lower() == "none" else [float(value) for value in part.strip("()").split(",")]
        for part in re.findall(r"\([^)]*\)|none", fields["space directions"], re.IGNORECASE)
    ]
    if len(vectors) != len(sizes):
        raise ValueError(f"{len(vectors)} space directions for {len(sizes)} axes")
    axes = [axis for axis, vector in enumerate(vectors) if vector is not None]
    _check_other_axes(path, sizes, axes)
    if len(axes) != 3:
        return _Geometry(axes, [], np.ones(3))
    space = fields.get("space", "").lower().removesuffix("-time")
    if space not in _TO_RAS:
        logger.warning("%s: its space is %r; read as left-posterior-superior. Check left and right.", path, space[:40])
    affine = np.eye(4)
    affine[:3, :3] = np.array([vectors[axis] for axis in axes], dtype=np.float64).T
    if "space origin" in fields:
        affine[:3, 3] = [float(value) for value in fields["space origin"].strip("() ").split(",")]
    units = header_units(path, fields.get("space units", ""), 3)
    units = trusted_units(str(path), np.linalg.norm(affine[:3, :3], axis=0), units, eager=True)
    to_ras = np.diag([*_TO_RAS.get(space, (-1.0, -1.0, 1.0)), 1.0])
    affine = to_ras @ np.diag([*units, 1.0]) @ affine
    return _Geometry(axes, [affine], np.linalg.norm(affine[:3, :3], axis=0))


def _geometry_of_spacings(path: Path, fields: Mapping[str, str], sizes: Sequence[int]) -> _Geometry:
    """Return the geometry of a header without directions: an axis without a spacing is not spatial."""
    axes = list(range(len(sizes)))
    spacings = np.array([float(mm) for mm in fields.get("spacings", "").split()])
    if spacings.shape != (len(sizes),):
        return _Geometry(axes, [], np.ones(len(squeezed_shape(sizes, str(path)))))
    if len(sizes) > 3 and np.isfinite(spacings).sum() == 3:
        axes = np.flatnonzero(np.isfinite(spacings)).tolist()
        _check_other_axes(path, sizes, axes)
    else:
        squeezed_shape(sizes, str(path))  # raises for a 4-D file
    units = header_units(path, fields.get("units", ""), len(sizes))[axes[:3]]
    spacings = spacings[axes[:3]]
    return _Geometry(axes, [], spacings * trusted_units(str(path), spacings, units, eager=True))


def _check_other_axes(path: Path, sizes: Sequence[int], axes: Sequence[int]) -> None:
    others = [size for axis, size in enumerate(sizes) if axis not in axes and size > 1]
    if others:
        raise CTReadError(
            f"{path}: found {others[0]} values per voxel (colour, vectors or several volumes in one file); "
            f"expected one HU value. Save a single volume."
        )


# --- Voxels -----------------------------------------------------------------------------------------------------------


def _array(
    path: Path, start: int, fields: Mapping[str, str], layout: _Layout, scale: Scale | None
) -> tuple[np.ndarray, int]:
    """Return the values as a flat array, and how many of them are not finite, as `read_values` and `map_values` do.

    Args:
        path: the file of the voxels.
        start: offset of the voxels in bytes.
        fields: of the header.
        layout: how the voxels are stored.
        scale: slope and intercept, for values in HU. Voxels as text are returned as they are.
    """
    lines, skip = (int(fields.get(f"{name} skip", fields.get(f"{name}skip", 0))) for name in ("line", "byte"))
    dtype, sizes, encoding = layout.dtype, layout.sizes, layout.encoding
    expected, size = math.prod(sizes) * dtype.itemsize, path.stat().st_size
    if math.prod(sizes) > MAX_VOXELS:
        squeezed_shape(sizes, str(path))
    with open(path, "rb") as stream:
        stream.seek(start)
        for _ in range(min(lines, MAX_HEADER_LINES)):
            stream.readline(1 << 16)
        if encoding == "raw":
            start = size - expected if skip == -1 else stream.tell() + skip
            check_claim(path, sizes, dtype, start, size)
            return map_values(path, start, expected, dtype, scale)
        if encoding == "ascii":  # at least one byte per number
            check_claim(path, sizes, np.dtype("u1"), stream.tell(), min(size, _MAX_TEXT))
            return np.array(stream.read(_MAX_TEXT).split()[: math.prod(sizes)], dtype=np.float64), 0
        decompressed = open_gzip(stream) if encoding == "gzip" else bz2.BZ2File(stream)
        # bzip2 compresses up to about 45,000 times: there only the limit of memory holds.
        limit = size * DEFLATE_MAX_RATIO if encoding == "gzip" else math.inf
        check_claim(path, sizes, dtype, max(skip, 0), limit, compressed=True)
        skip_bytes(decompressed, skip)
        return read_values(path, decompressed, expected, dtype, scale)
