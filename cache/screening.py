"""Detection of files that were found next to scans but are no CT, by their header or their values."""

import math
import struct
import zlib

from samf.model.ct_volume import CTVolume, NotCTError

_HEADER = 348  # bytes of a NIfTI-1 header
_PREFIX = 4096  # bytes of a .nii.gz from which the header can be decompressed
_BYTE_TYPES = (2, 256)  # NIfTI's codes of uint8 and int8
_BYTE_RANGE = (0, 255)


def mask_by_header(path: str) -> bool:
    """Return whether a NIfTI file holds unscaled 8-bit values, which can't be HU: a mask or an image.

    False for all other files, also unreadable ones, which are reported when they are read.
    """
    name = path.lower()
    if not name.endswith((".nii", ".nii.gz")):
        return False
    try:
        with open(path, "rb", buffering=0) as stream:
            head = stream.read(_PREFIX)
        if name.endswith(".gz"):
            head = zlib.decompressobj(wbits=31).decompress(head, _HEADER)
    except (OSError, zlib.error):
        return False
    if len(head) < _HEADER:
        return False
    order = next((order for order in "<>" if struct.unpack(f"{order}i", head[:4])[0] == _HEADER), None)
    if order is None:  # NIfTI-2, or no NIfTI
        return False
    (datatype,) = struct.unpack_from(f"{order}h", head, 70)
    slope, intercept = struct.unpack_from(f"{order}2f", head, 112)
    is_scaled = math.isfinite(slope) and slope != 0 and (slope, intercept) != (1.0, 0.0)
    return datatype in _BYTE_TYPES and not is_scaled


def refuse_mask(volume: CTVolume) -> None:
    """Raise NotCTError for a volume whose values all fit a byte: labels or grey values, without air and fat.

    Only for volumes that were found by searching: an empty mask has a single value, as a crop of a CT may have.
    """
    low, high = int(volume.hu.min()), int(volume.hu.max())
    if _BYTE_RANGE[0] <= low and high <= _BYTE_RANGE[1]:
        raise NotCTError(
            f"{volume.source}: values from {low} to {high}, without air or fat: a mask or an image. Expected a CT in "
            f"Hounsfield units; name the file itself if it is one."
        )
