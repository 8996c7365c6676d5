"""MetaImage: `.mha` files, and `.mhd` headers with one data file; raw or compressed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .ct_common import EXPORT_AGAIN, LPS_TO_RAS, CTReadError, Scale, StoredVolume, squeezed_shape
from .ct_headers import MAX_HEADER_LINES, MAX_VALUE, check_fields, detached_file, header_units, trusted_units
from .ct_streams import DEFLATE_MAX_RATIO, ZlibStream, check_claim, damage_named, map_values, read_values

_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def read_metaimage(path: Path, as_hu: bool = False) -> StoredVolume:
    """Read a MetaImage file.

    Args:
        path: the `.mha` or `.mhd`.
        as_hu: turn values into int16 HU while they are read, in place of returning the stored ones.

    Raises:
        CTReadError: damaged, or not one 3-D volume of single values.
    """
    with damage_named(path, "the MetaImage file"):
        with open(path, "rb") as stream:
            fields, start = _fields(path, stream), stream.tell()
        dtype, sizes = _layout(path, fields)
        shape = squeezed_shape(sizes, str(path))
        data_path = path
        if fields["ElementDataFile"].upper() != "LOCAL":
            data_path, start = detached_file(path, fields["ElementDataFile"]), 0
        scale = (1.0, 0.0) if as_hu else None
        array, not_finite = _array(data_path, start, fields, dtype, shape, scale)
        affine, zooms = _affine(path, fields, len(sizes))
    own = not isinstance(array, np.memmap)
    return StoredVolume(
        array.reshape(shape, order="F"), str(path), [affine], zooms, "LPS", own=own, not_finite=not_finite
    )


def _fields(path: Path, stream: BinaryIO) -> dict[str, str]:
    fields: dict[str, str] = {}
    for _ in range(MAX_HEADER_LINES):
        line = stream.readline(1 << 16).decode("latin-1")
        name, separator, value = line.partition("=")
        if separator:
            fields[name.strip()] = value.strip()[:MAX_VALUE]
        if name.strip() == "ElementDataFile":
            return fields
        if not line:
            break
    raise CTReadError(f"{path}: a MetaImage header without ElementDataFile. {EXPORT_AGAIN}")


def _layout(path: Path, fields: Mapping[str, str]) -> tuple[np.dtype, list[int]]:
    """Return the voxels' type and the size of every axis."""
    check_fields(path, fields, ("NDims", "DimSize", "ElementType"))
    sizes = [int(n) for n in fields["DimSize"].split()]
    if len(sizes) != int(fields["NDims"]) or not sizes or min(sizes) < 1:
        raise ValueError(f"NDims {int(fields['NDims'])} against DimSize {sizes[:16]}")
    channels, kind = int(fields.get("ElementNumberOfChannels", 1)), fields["ElementType"]
    if channels != 1 or kind.endswith("_ARRAY"):
        raise CTReadError(
            f"{path}: found {channels} values per voxel (colour or vectors); expected one HU value. Save a single volume."
        )
    if kind not in _TYPES:
        raise CTReadError(
            f"{path}: voxels of type {kind[:24]!r}; expected integer or real HU values. Convert the scan again."
        )
    big_endian = _is_true(fields, "BinaryDataByteOrderMSB") or _is_true(fields, "ElementByteOrderMSB")
    return np.dtype("<>"[big_endian] + _TYPES[kind]), sizes


def _is_true(fields: Mapping[str, str], name: str, default: str = "False") -> bool:
    return fields.get(name, default).lower() in ("true", "1", "yes")


def _array(
    path: Path, start: int, fields: Mapping[str, str], dtype: np.dtype, shape: Sequence[int], scale: Scale | None
) -> tuple[np.ndarray, int]:
    """Return the values as a flat array, and how many of them are not finite, as `read_values` and `map_values` do.

    Args:
        path: the file of the voxels.
        start: offset of the voxels in bytes.
        fields: of the header.
        dtype: of the stored values.
        shape: (X, Y, Z).
        scale: slope and intercept, for values in HU.
    """
    if not _is_true(fields, "BinaryData", default="True"):
        raise CTReadError(f"{path}: voxels written as text; expected binary ones. Convert the scan again.")
    size, expected = path.stat().st_size, math.prod(shape) * dtype.itemsize
    skip = int(fields.get("HeaderSize", 0))
    if not _is_true(fields, "CompressedData"):
        start = size - expected if skip == -1 else start + skip
        check_claim(path, shape, dtype, start, size)
        return map_values(path, start, expected, dtype, scale)
    check_claim(path, shape, dtype, 0, size * DEFLATE_MAX_RATIO, compressed=True)
    with open(path, "rb") as stream:
        stream.seek(start + max(skip, 0))
        return read_values(path, ZlibStream(stream), expected, dtype, scale)


def _affine(path: Path, fields: Mapping[str, str], dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the RAS+ affine (4, 4) and the voxel sizes (3,) in mm of a header that is in LPS.

    Row i of its matrix is the direction of axis i; a negative spacing reverses it.
    """
    rows = _numbers(fields, ("TransformMatrix", "Rotation", "Orientation"), np.eye(dimension).ravel())
    spacing = _numbers(fields, ("ElementSpacing", "ElementSize"), np.ones(dimension))[:3]
    affine = np.eye(4)
    affine[:3, :3] = rows.reshape(dimension, dimension)[:3, :3].T * spacing
    affine[:3, 3] = _numbers(fields, ("Offset", "Position", "Origin"), np.zeros(dimension))[:3]
    unit = header_units(path, fields.get("DistanceUnits", ""), 1).repeat(3)
    unit = trusted_units(str(path), spacing, unit, eager=True)
    return LPS_TO_RAS @ np.diag([*unit, 1.0]) @ affine, spacing * unit


def _numbers(fields: Mapping[str, str], names: Sequence[str], default: np.ndarray) -> np.ndarray:
    """Return the numbers of the first field of these names that is there."""
    text = next((fields[name] for name in names if name in fields), None)
    values = default if text is None else np.array([float(value) for value in text.split()], dtype=np.float64)
    if values.size != default.size:
        raise ValueError(f"{names[0]} holds {values.size} numbers")
    return values
