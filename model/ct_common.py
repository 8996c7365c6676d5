"""What all CT readers share: errors, stored volumes, limits, and the conversion of stored values to Hounsfield units."""

import errno
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

import numpy as np

AIR_HU = -1024  # outside a scanner's field of view, and wherever there is no value
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# 3.4 GiB in int16. CT-RATE's largest volume, 1024 x 1024 x 1617, fits; a larger claim means a damaged header or no CT.
MAX_VOXELS = 1_850_000_000
EXPORT_AGAIN = "Download or export it again."
_LEAST_LOOKED_UP = 1 << 14  # voxels; fewer are scaled sooner than a table is made

Scale: TypeAlias = tuple[float, float]  # slope and intercept
Sizes: TypeAlias = Sequence[float] | np.ndarray  # mm along three axes


class CTReadError(ValueError):
    """A file or folder that cannot be read as one CT volume.

    The message names the file and says what was found, what was expected and what to do.
    """


class NotCTError(CTReadError):
    """An intact volume that is no chest CT: a mask, an image, another modality, or only a few slices."""


class DownloadError(CTReadError):
    """A file at an address that cannot be fetched.

    Args:
        message: as of every CTReadError.
        is_temporary: the same address may be fetched later, such as when the network or an access right is back.
    """

    def __init__(self, message: str, is_temporary: bool = True):
        super().__init__(message)
        self.is_temporary = is_temporary


@dataclass(frozen=True)
class VolumeRef:
    """A volume's path and its rescaling, as one hashable value.

    `read_ct` and `to_ct_volume` take it in place of a path.

    Attributes:
        path: path or address, as `read_ct` takes it.
        rescale: None where the file's own header counts; else slope and intercept, or those and the three voxel sizes in
            mm (see `read_ct`).
    """

    path: str
    rescale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.fspath(self.path))
        if self.rescale is not None:
            object.__setattr__(self, "rescale", tuple(float(value) for value in self.rescale))

    @classmethod
    def of(cls, path: "str | os.PathLike[str] | VolumeRef", rescale: Sequence[float] | None = None) -> "VolumeRef":
        """Return the reference of a path and its rescaling; a reference is returned unchanged.

        Args:
            path: path, address or reference.
            rescale: slope and intercept, perhaps with three voxel sizes in mm. Only for a path.

        Raises:
            CTReadError: `rescale` contradicts the reference's own.
        """
        if not isinstance(path, VolumeRef):
            return cls(os.fspath(path), None if rescale is None else tuple(rescale))
        if rescale is not None and tuple(float(value) for value in rescale) != path.rescale:
            raise CTReadError(
                f"{path.path}: rescale={tuple(rescale)} next to a VolumeRef with rescale={path.rescale}; expected one. "
                f"Leave rescale out."
            )
        return path


@dataclass
class StoredVolume:
    """One volume as it is stored, with nothing of its header applied.

    Attributes:
        array: (X, Y, Z), stored values of any real type. May be a read-only memory map.
        source: name in messages.
        affines: the header's voxel → RAS+ mm matrices (4, 4), best first. They may be unusable.
        zooms: voxel sizes in mm along X, Y, Z, used without a usable affine. A negative size reverses its axis.
        assumed_axes: orientation of X, Y and Z without a usable affine, such as "LPS".
        known_axes: `zooms` and `assumed_axes` are the format's definition, not a guess that needs a warning.
        bare: the format cannot store geometry, so that what the caller leaves out is assumed, with a warning.
        slope: the header's slope in HU = stored * slope + intercept.
        intercept: the header's intercept.
        own: no other object shares the array, so that it may be changed in place.
        own_scaling: `array` holds HU already, because each DICOM slice has its own slope and intercept.
        not_finite: voxels that were NaN or infinite, where `array` holds HU because its values were scaled as they were
            read. Slope and intercept are then 1 and 0.
        notes: irregularities that were found and repaired, in words.
        series: which DICOM series it is, as a digest; None for other formats.
    """

    array: np.ndarray
    source: str
    affines: list[np.ndarray] = field(default_factory=list)
    zooms: Sizes = (1.0, 1.0, 1.0)
    assumed_axes: str = "LAS"
    known_axes: bool = False
    bare: bool = False
    slope: float = 1.0
    intercept: float = 0.0
    own: bool = True
    own_scaling: bool = False
    not_finite: int = 0
    notes: list[str] = field(default_factory=list)
    series: str | None = None


def is_disk_error(error: BaseException) -> bool:
    """Return whether the operating system refused to read or write.

    Damaged data is no such error: those of gzip and bzip2 have no errno, and EINVAL is what a seek to a negative offset
    gives, as in damaged files.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def system_message(error: BaseException) -> str:
    """Return the operating system's message of an error, or the error's type."""
    return getattr(error, "strerror", None) or type(error).__name__


def check_dtype(dtype: np.dtype, source: str) -> None:
    """Raise CTReadError for colours, complex numbers and everything else but real numbers."""
    if dtype.fields is not None:
        raise CTReadError(f"{source}: a colour (RGB) image is not CT; expected one HU value per voxel.")
    if dtype.kind not in "iufb":
        raise CTReadError(f"{source}: voxels of type {dtype}; expected integer or real HU values. Save the real part.")


def squeezed_shape(shape: Sequence[int], source: str, leading: bool = False) -> tuple[int, int, int]:
    """Return a shape without axes of length 1, when it is three-dimensional and not empty.

    Args:
        shape: of the stored array.
        source: name in messages.
        leading: drop leading axes of length 1 as well as trailing ones.

    Raises:
        CTReadError: not three axes, an empty one, or more than `MAX_VOXELS` voxels.
    """
    kept = [int(n) for n in shape]
    while len(kept) > 3 and kept[-1] == 1:
        kept.pop()
    while leading and len(kept) > 3 and kept[0] == 1:
        kept.pop(0)
    if len(kept) != 3:
        remedy = (
            "Save one time point, e.g. nibabel.funcs.four_to_three(image)[0]."
            if len(kept) > 3
            else "Save all slices as one volume."
        )
        raise CTReadError(
            f"{source}: {len(kept)}-D image of shape {tuple(shape)}; one CT volume has 3 dimensions. {remedy}"
        )
    if min(kept) < 1:
        raise CTReadError(f"{source}: empty image of shape {tuple(shape)}; expected voxels along every axis.")
    if math.prod(kept) > MAX_VOXELS:
        raise CTReadError(
            f"{source}: its header declares {math.prod(kept)} voxels, shape {tuple(shape)}; expected at most "
            f"{MAX_VOXELS}. Crop or coarsen the scan if it is that large; otherwise download it again."
        )
    return kept[0], kept[1], kept[2]


def scale_to_hu(stored: np.ndarray, slope: float, intercept: float, out: np.ndarray) -> int:
    """Write stored * slope + intercept into `out`, rounded half to even and saturated.

    Args:
        stored: stored values of any real type.
        slope: HU per stored unit.
        intercept: HU of a stored 0.
        out: int16 array of the same shape; it may be the same memory as `stored`, seen as int16.

    Returns:
        Number of voxels that are NaN or infinite; they become air.
    """
    limits, kind, size = np.iinfo(np.int16), stored.dtype.kind, stored.dtype.itemsize
    whole = float(slope).is_integer() and float(intercept).is_integer() and abs(slope) * 2**16 + abs(intercept) < 2**31
    if kind in "iu" and size == 2 and stored.dtype.isnative and slope == 1 and whole and stored.size:
        lowest, highest = int(stored.min()) + intercept, int(stored.max()) + intercept
        if limits.min <= lowest and highest <= limits.max:  # modulo 2^16, so that the sign of neither matters
            np.add(stored.view(np.int16), np.uint16(int(intercept) % (1 << 16)).view(np.int16), out=out)
            return 0
    if kind in "iub" and size <= 2 and whole:  # as most scanners store: several times faster
        whole_values = stored.astype(np.int32)
        whole_values *= int(slope)
        whole_values += int(intercept)
        np.clip(whole_values, limits.min, limits.max, out=out, casting="unsafe")
        return 0
    if kind in "iu" and size == 2 and stored.size >= _LEAST_LOOKED_UP:
        bits = stored.view(stored.dtype.str.replace("i", "u"))
        np.take(_hu_of_all_bits(kind, float(slope), float(intercept)), bits, out=out, mode="clip")
        return 0
    return _scale_floats(stored, slope, intercept, out)


@lru_cache(maxsize=8)
def _hu_of_all_bits(kind: str, slope: float, intercept: float) -> np.ndarray:
    """Return the HU of each pattern of 16 bits, signed or not (`kind` "i" or "u"): int16 (65536,)."""
    table = np.empty(1 << 16, dtype=np.int16)
    _scale_floats(np.arange(1 << 16, dtype=np.uint16).view(f"{kind}2"), slope, intercept, table)
    table.setflags(write=False)
    return table


def _scale_floats(stored: np.ndarray, slope: float, intercept: float, out: np.ndarray) -> int:
    """Do what `scale_to_hu` does, in floating point."""
    limits, kind, size = np.iinfo(np.int16), stored.dtype.kind, stored.dtype.itemsize
    plain = (slope, intercept) == (1.0, 0.0)
    # float64 keeps every 32-bit value exact.
    values: np.ndarray = stored.astype(np.float32 if kind == "f" and size <= 4 and plain else np.float64)
    bad = ~np.isfinite(values) if kind == "f" else None
    if not plain:
        with np.errstate(over="ignore", invalid="ignore"):
            values *= slope
            values += intercept
    count = 0
    if bad is not None and bad.any():
        values[bad] = AIR_HU
        count = int(bad.sum())
    np.clip(np.rint(values, out=values), limits.min, limits.max, out=out, casting="unsafe")
    return count


@contextmanager
def collected_warnings(package: str) -> Iterator[list[str]]:
    """Yield a list that fills with the warnings of a package's loggers; they are also logged as usual.

    Args:
        package: dotted name of the package.
    """
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Collector(logging.WARNING)
    logger = logging.getLogger(package)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
