"""Single-file volumes as they are stored: NIfTI-1/2, NRRD, MetaImage, NumPy.

Each reader gives a `StoredVolume`: values and what the header says of them, nothing applied yet. What a header claims is
held against the size of its file before memory is taken. `ct_volume` makes Hounsfield units and RAS+ order of it.
"""

import bz2
import errno
import gzip
import io
import logging
import lzma
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np

try:
    import nibabel as nib
    from nibabel.spatialimages import HeaderDataError
except ImportError:
    nib = None
    HeaderDataError = ValueError

try:  # two to three times faster than zlib; not needed
    from isal import igzip, isal_zlib
    from isal.isal_zlib import IsalError
except ImportError:
    igzip, isal_zlib = None, zlib
    IsalError = zlib.error

logger = logging.getLogger(__name__)

AIR_HU = -1024  # what stands outside a scanner's field of view, and what we put where there is no value
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# 3.4 GiB in int16. CT-RATE's largest, 1024 x 1024 x 1617, fits; a header that claims more is damaged or is no CT.
MAX_VOXELS = 1_850_000_000
_MAX_MEMORY = 4 << 30  # bytes: what a compressed file unpacks to, and the int16 volume that other types become
DEFLATE_MAX_RATIO = 1032  # deflate cannot compress more tightly, so a header that claims more lies
_CHUNK = 1 << 20  # small enough for the processor's cache
_MAX_HEADER_LINES = 2000
_MAX_VALUE = 400  # characters of a header's line that count
_MAX_TEXT = 1 << 26  # bytes of a file that holds its voxels as text: Python's own numbers take much memory
PLAUSIBLE_MM = (0.05, 50.0)  # voxels of a CT lie between these
_QUATERNION_ROUNDING = 1e-4  # what numbers of four digits make of a length of 1
_UNPACK_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, IsalError, zipfile.BadZipFile)
_HEADER_ERRORS = (ValueError, KeyError, IndexError, TypeError, OverflowError, SyntaxError, TokenError, struct.error)
_ANEW = "Fetch or write it anew."
_SIGNATURES = {
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89HDF": "an HDF5 file",
    b"BZh": "a file packed by bzip2",
    b"\xfd7zXZ": "a file packed by xz",
    b"\x28\xb5\x2f\xfd": "a file packed by zstd",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"version https://git-lfs": "a Git LFS pointer in place of the file (git lfs pull fetches it)",
    b"NRRD": "an NRRD file",
    b"\x1f\x8b": "a file packed by gzip",
}


class CTReadError(ValueError):
    """A file or folder that cannot be read as one CT volume. The message names it, what was found, and the remedy."""


class NotCTError(CTReadError):
    """What was read is whole, but no CT: a mask, a picture, another modality, or a few slices of a body."""


@dataclass
class StoredVolume:
    """One volume as it is stored.

    Attributes:
        array: (X, Y, Z), stored values of any real type. May be a read-only memory map.
        source: for messages.
        affines: the header's voxel → RAS+ mm matrices (4, 4), best first. They may be unusable.
        zooms: voxel sizes in mm along X, Y, Z, for want of a usable affine. A negative one: the axis runs the other way.
        assumed_axes: where X, Y and Z are taken to run to without a usable affine, such as "LPS".
        bare: of a format that has no place for geometry: what nobody gives is assumed, and said.
        slope, intercept: the header's: HU = stored * slope + intercept.
        own: the array belongs to nobody else and may be changed in place.
        own_scaling: slope and intercept were applied already, as DICOM's each slice's own are: there are no others.
        notes: what was found odd and mended, in words.
    """

    array: np.ndarray
    source: str
    affines: list[np.ndarray] = field(default_factory=list)
    zooms: Sequence[float] = (1.0, 1.0, 1.0)
    assumed_axes: str = "LAS"
    bare: bool = False
    slope: float = 1.0
    intercept: float = 0.0
    own: bool = True
    own_scaling: bool = False
    notes: list[str] = field(default_factory=list)


# ----------------------------------------------------------------------------------------------- what all formats share


def squeezed_shape(shape: Sequence[int], source: str, leading: bool = False) -> tuple[int, int, int]:
    """`shape` without trailing ones (and leading ones too), when it is three-dimensional and not empty."""
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
            f"{source}: its header tells of {math.prod(kept)} voxels, shape {tuple(shape)}; expected at most "
            f"{MAX_VOXELS}. If the scan is that large, crop or coarsen it; else fetch it anew."
        )
    return tuple(kept)


def seen(head: bytes) -> str:
    """What a file that begins so is, in words. Text is never repeated: it may be about a patient."""
    if not head:
        return "an empty file"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[128:132] == b"DICM":
        return "a DICOM file"
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return name
    text = head[:64].decode("utf-8", errors="replace").rstrip("\ufffd")  # the last character may be cut in two
    if text and all(character.isprintable() or character in "\t\r\n\ufeff" for character in text):
        return "a web page" if text.lstrip().startswith("<") else "a text file"
    return f"a file that starts with the bytes {head[:4].hex(' ')}"


def check_dtype(dtype: np.dtype, source: str) -> None:
    """Refuses colours, complex numbers and whatever else is no real number."""
    if dtype.fields is not None:
        raise CTReadError(f"{source}: a colour (RGB) image is not CT; expected one HU value a voxel.")
    if dtype.kind not in "iufb":
        raise CTReadError(f"{source}: voxels of type {dtype}; expected integer or real HU values. Save the real part.")


def scale_to_hu(stored: np.ndarray, slope: float, intercept: float, out: np.ndarray) -> int:
    """Writes stored * slope + intercept into `out` (int16), rounded and saturated.

    Returns the number of voxels that are NaN or infinite: they become air.
    """
    limits, kind, size = np.iinfo(np.int16), stored.dtype.kind, stored.dtype.itemsize
    whole = float(slope).is_integer() and float(intercept).is_integer() and abs(slope) * 2**16 + abs(intercept) < 2**31
    if kind in "iub" and size <= 2 and whole:  # as most scanners store: several times faster
        values = stored.astype(np.int32)
        values *= int(slope)
        values += int(intercept)
        np.clip(values, limits.min, limits.max, out=out, casting="unsafe")
        return 0
    plain = (slope, intercept) == (1.0, 0.0)
    # float64 keeps every 32-bit value exact.
    values = stored.astype(np.float32 if kind == "f" and size <= 4 and plain else np.float64)
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


def is_disk_error(error: Exception) -> bool:
    """Whether the system refused to read or write. Damage is no such error: gzip's and bzip2's own have no number, and
    EINVAL is what a seek to before the beginning gives, where a damaged file's own figures lead.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


@contextmanager
def _damage_named(path: Path, what: str):
    """Whatever damaged bytes make a reader raise becomes a CTReadError that names the file."""
    try:
        yield
    except CTReadError:
        raise
    except (*_UNPACK_ERRORS, *_HEADER_ERRORS, HeaderDataError) as error:
        if is_disk_error(error):
            raise CTReadError(
                f"{error.filename or path}: cannot be read ({error.strerror}). Check the path, its permissions and its disk."
            ) from error
        raise CTReadError(f"{path}: {what} ends early or its bytes are damaged ({_why(error)}). {_ANEW}") from error


def _why(error: Exception) -> str:
    """An error's own words, but for those that quote the file: what stands there may be about a patient."""
    words = str(error)
    return type(error).__name__ if "'" in words or '"' in words else words[:200]


def _check_fields(path: Path, fields: dict[str, str], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in fields]
    if missing:
        raise CTReadError(f"{path}: its header lacks {', '.join(missing)}. {_ANEW}")


def _check_claim(
    path: Path, shape: Sequence[int], dtype: np.dtype, start: float, limit: float, packed: bool = False
) -> int:
    """Bytes of voxels that a header tells of, when a file of `limit` bytes (once unpacked) can hold them.

    `packed`: they will stand in memory, beside the int16 ones that other types are made into.
    """
    expected = math.prod(shape) * dtype.itemsize
    if not (start >= 0 and start + expected <= limit):
        raise CTReadError(
            f"{path}: its header tells of {expected} bytes of voxels from byte {start:.0f} on, shape {tuple(shape)}; "
            f"the file holds {path.stat().st_size} bytes. It was cut short: fetch or write it anew."
        )
    needed = expected + (0 if dtype == np.int16 else 2 * math.prod(shape))
    if packed and needed > _MAX_MEMORY:
        raise CTReadError(
            f"{path}: {' x '.join(map(str, shape))} voxels of type {dtype} take {needed / 2**30:.1f} GiB once unpacked; "
            f"expected at most {_MAX_MEMORY >> 30}. Save them as int16 HU, or uncompressed: then they are mapped."
        )
    return expected


def _unpack(path: Path, stream: BinaryIO, expected: int) -> np.ndarray:
    """The next `expected` bytes of a stream, uint8, and the rest of it read past: checksums stand at the end."""
    buffer, done = np.empty(expected, dtype=np.uint8), 0
    with ThreadPoolExecutor(1) as copier:  # memory that is touched first costs time: beside the unpacking, not after it
        copied = None
        while done < expected:
            chunk = stream.read(min(_CHUNK, expected - done))
            if not chunk:
                raise CTReadError(
                    f"{path}: ends after {done} of {expected} bytes of voxels. It was cut short: fetch or write it anew."
                )
            if copied is not None:
                copied.result()
            copied = copier.submit(np.copyto, buffer[done : done + len(chunk)], np.frombuffer(chunk, dtype=np.uint8))
            done += len(chunk)
    rest = 0
    while chunk := stream.read(1 << 20):
        rest += len(chunk)
        if rest > _MAX_MEMORY:
            raise CTReadError(f"{path}: unpacks to far more than the {expected} bytes of voxels it tells of. {_ANEW}")
    return buffer


def _skip(stream: BinaryIO, count: int) -> None:
    """Reads past the next `count` bytes of a stream that can't be sought in."""
    while count > 0 and (chunk := stream.read(min(count, _CHUNK))):
        count -= len(chunk)


def _open_gzip(stream_or_path: Any) -> BinaryIO:
    if igzip is not None:
        return igzip.open(stream_or_path, "rb")
    return gzip.open(stream_or_path, "rb")


class _ZlibStream(io.RawIOBase):
    """What a zlib stream unpacks to, as a file."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.inflater = stream, isal_zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self.inflater.eof:
            packed = self.inflater.unconsumed_tail or self.stream.read(1 << 16)
            # Even without more input there may be output that the inflater holds back.
            data = self.inflater.decompress(packed, len(target))
            if data:
                target[: len(data)] = data
                return len(data)
            if not packed:
                raise EOFError("the compressed stream has no end")
        return 0


# ---------------------------------------------------------------------------------------------------------------- NIfTI


def nifti_header_size(head: bytes) -> int | None:
    """348 (NIfTI-1) or 540 (NIfTI-2) as the header's first number in either byte order, else None."""
    if len(head) < 4:
        return None
    return next((n for order in "<>" for n in struct.unpack(f"{order}i", head[:4]) if n in (348, 540)), None)


def read_nifti(path: Path, compressed: bool) -> StoredVolume:
    """A `.nii` file, or a `.hdr` with its `.img` beside it; what is compressed is unpacked into memory, else mapped."""
    if nib is None:
        raise CTReadError(f"{path}: reading NIfTI needs nibabel: pip install nibabel")
    with _damage_named(path, "the file"):
        with _open_gzip(path) if compressed else open(path, "rb") as stream:
            header, position, pair = _nifti_header(path, stream, compressed)
            array = None if pair else _nifti_array(path, stream, header, position, compressed)
        if array is None:
            array = _pair_array(path, header)
    slope, intercept = _nifti_scaling(path, header)
    affines, zooms = nifti_affines(str(path), header), nifti_zooms(str(path), header)
    own = not isinstance(array, np.memmap)
    return StoredVolume(array, str(path), affines, zooms, slope=slope, intercept=intercept, own=own)


def other_half(path: Path) -> Path | None:
    """The `.img` beside a `.hdr`, or the `.hdr` beside an `.img`, either perhaps with `.gz`; None where there is none."""
    match = re.fullmatch(r"(.+)\.(hdr|img)(\.gz)?", path.name, re.IGNORECASE)
    if match is None:
        return None
    suffix = "img" if match[2].lower() == "hdr" else "hdr"
    suffix = suffix.upper() if match[2].isupper() else suffix
    names = [f"{match[1]}.{suffix}{packed}" for packed in dict.fromkeys((match[3] or "", "", ".gz"))]
    return next((file for name in names if (file := path.with_name(name)).is_file()), None)


def _pair_array(path: Path, header: Any) -> np.ndarray:
    voxels = other_half(path)
    if voxels is None:
        raise CTReadError(
            f"{path}: found half of a .hdr/.img pair; the .img is missing beside it. Fetch both files, under one name."
        )
    with open(voxels, "rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    with _open_gzip(voxels) if compressed else open(voxels, "rb") as stream:
        return _nifti_array(voxels, stream, header, 0, compressed)


def _nifti_header(path: Path, stream: BinaryIO, compressed: bool) -> tuple[Any, int, bool]:
    """nibabel's header, how many bytes of the stream it took, and whether its voxels are in another file."""
    block = stream.read(348)
    size = nifti_header_size(block)
    if size is None or len(block) < 348:
        raise CTReadError(
            f"{path}: found {seen(block)}{' inside of a gzip file' if compressed else ''}; expected a NIfTI header. "
            f"Unpack it and name the file or folder, or convert the scan, e.g. with dcm2niix."
        )
    block += stream.read(size - 348)
    if len(block) < size:
        raise CTReadError(f"{path}: ends inside its header. It was cut short: fetch or write it anew.")
    magic = block[344:348] if size == 348 else block[4:8]
    pair = magic in (b"ni1\0", b"ni2\0")
    if not pair and magic not in (b"n+1\0", b"n+2\0"):
        raise CTReadError(
            f"{path}: found an Analyze 7.5 header, which has no orientation (nibabel takes its axes to run left, front, "
            f"head, ITK left, back, head); expected NIfTI. Convert the scan anew from its DICOM series, e.g. with "
            f"dcm2niix, or save it as NIfTI with the affine that you know."
        )
    header_class = nib.Nifti1Header if size == 348 else nib.Nifti2Header
    return header_class(block, check=False), size, pair


def _nifti_array(path: Path, stream: BinaryIO, header: Any, position: int, compressed: bool) -> np.ndarray:
    """The stored values (X, Y, Z), a memory map where the file isn't compressed.

    `position`: bytes of the stream that the header took, 0 in a file of its own.
    """
    dtype = header.get_data_dtype()
    check_dtype(dtype, str(path))
    shape = squeezed_shape(header.get_data_shape(), str(path))
    offset = float(header["vox_offset"]) or (position + 4.0 if position else 0.0)
    limit = path.stat().st_size * (DEFLATE_MAX_RATIO if compressed else 1)
    if offset < position:
        raise CTReadError(f"{path}: voxels from byte {offset:.0f} on, inside its own header of {position}. {_ANEW}")
    expected = _check_claim(path, shape, dtype, offset, limit, packed=compressed)
    offset = int(offset)
    if not compressed:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F")
    _skip(stream, offset - position)
    return _unpack(path, stream, expected).view(dtype).reshape(shape, order="F")


def _nifti_scaling(path: Path, header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):  # the standard's "no scaling"
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise CTReadError(
            f"{path}: the header has slope {slope} and intercept {intercept}. Mend the header, "
            f"e.g. image.header.set_slope_inter(1, 0) in nibabel if the stored values are HU."
        )
    return slope, intercept


def nifti_zooms(source: str, header: Any) -> np.ndarray:
    """Voxel sizes in mm of a nibabel header of NIfTI, for want of a form."""
    with np.errstate(invalid="ignore"):
        zooms = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    return zooms * _nifti_unit(source, header, zooms)


def nifti_affines(source: str, header: Any, known: np.ndarray | None = None) -> list[np.ndarray]:
    """sform, then qform, in millimetres; those whose code says that there is one.

    `known`: the affine that an image in memory goes by. It stands first, unless the header has no form at all: then
    nibabel has made it up.
    """
    forms = []
    if header["sform_code"] > 0:
        forms.append(_sform(header))
    if header["qform_code"] > 0:
        usable = bool(forms) and np.isfinite(forms[0]).all()
        forms.append(_qform(source, header, said=not usable))
    if len(forms) == 2 and np.isfinite(forms[0]).all() and np.isfinite(forms[1]).all():
        largest = np.abs(forms[0][:3, :3]).max()
        if np.abs(forms[0][:3, :3] - forms[1][:3, :3]).max() > 0.05 * largest:
            logger.warning("%s: its sform and qform disagree; takes the sform. Check the pictures' sides.", source)
    if known is not None and forms:
        forms.insert(0, known)
    if not forms:
        return forms
    unit = _nifti_unit(source, header, np.linalg.norm(forms[0][:3, :3], axis=0))
    return forms if unit == 1 else [np.diag([unit, unit, unit, 1.0]) @ form for form in forms]


def _nifti_unit(source: str, header: Any, sizes: np.ndarray) -> float:
    """Millimetres in the header's unit. Many writers leave a wrong one: it counts only where it makes CT's sizes."""
    unit = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # metres, micrometres
    if unit == 1 or not np.isfinite(sizes).all() or not sizes.all():
        return 1.0
    return _trusted_units(source, sizes, np.full(3, unit), eager=False)[0]


def _trusted_units(source: str, sizes: np.ndarray, units: np.ndarray, eager: bool) -> np.ndarray:
    """Millimetres in each axis' unit, or ones where the header's units make voxels that no scanner has.

    `eager`: they count as well where the bare numbers could be millimetres.
    """
    if (units == 1).all():
        return units
    plain, scaled = is_plausible(sizes), is_plausible(sizes * units)
    if scaled and (eager or not plain):
        logger.info("%s: its sizes are in units of %s mm; turned into mm", source, " x ".join(f"{u:g}" for u in units))
        return units
    logger.warning(
        "%s: in its header's units voxels would measure %s mm; reads its numbers as mm. Mend the header's units.",
        source,
        " x ".join(f"{mm:g}" for mm in sizes * units),
    )
    return np.ones_like(units)


def is_plausible(sizes: np.ndarray) -> bool:
    """Whether voxels of CT can have such sizes in mm."""
    sizes = np.abs(sizes)
    return bool(np.all((sizes > PLAUSIBLE_MM[0]) & (sizes < PLAUSIBLE_MM[1])))


def _sform(header: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(header.get_sform(), dtype=np.float64)


def _qform(source: str, header: Any, said: bool) -> np.ndarray:
    """The qform, its header mended as the standard's own library does; `said`: with a warning of what was wrong.

    A qfac of 0 counts as 1 (so says the standard), any other by its sign; of a size its magnitude, or 1 mm where there is
    none; of a quaternion longer than 1 its direction.
    """
    header, wrong = header.copy(), []
    pixdim = header["pixdim"].astype(np.float64)
    quaternion = np.array([float(header[f"quatern_{letter}"]) for letter in "bcd"])
    if not np.isfinite(quaternion).all():
        return np.full((4, 4), np.nan)
    if pixdim[0] not in (1, -1):
        qfac = -1 if pixdim[0] < 0 else 1
        wrong.append(f"pixdim[0] (qfac) is {pixdim[0]:g}, read as {qfac}")
        pixdim[0] = qfac
    for axis in (1, 2, 3):
        size = abs(pixdim[axis]) if np.isfinite(pixdim[axis]) and pixdim[axis] else 1.0
        if pixdim[axis] != size:
            wrong.append(f"pixdim[{axis}] is {pixdim[axis]:g}, read as {size:g} mm")
            pixdim[axis] = size
    header["pixdim"] = pixdim
    length = float(np.linalg.norm(quaternion))
    if length > 1 + _QUATERNION_ROUNDING:
        wrong.append(f"its quaternion's length is {length:.4g}, read as 1")
    if wrong and said:
        logger.warning("%s: in the header of its qform %s.", source, "; ".join(wrong))
    try:
        with np.errstate(all="ignore"):
            return np.asarray(header.get_qform(), dtype=np.float64)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):  # a length that nibabel does not put down to rounding
        form = np.eye(4)
        form[:3, :3] = nib.quaternions.quat2mat([0, *quaternion]) * pixdim[1:4] * (1, 1, pixdim[0])
        form[:3, 3] = [float(header[f"qoffset_{letter}"]) for letter in "xyz"]
        return form


# ----------------------------------------------------------------------------------------------------------------- NRRD

_NRRD_TYPES = {
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
_NRRD_SPACES = {  # space coordinates → RAS+
    **dict.fromkeys(("left-posterior-superior", "lps"), (-1.0, -1.0, 1.0)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (1.0, 1.0, 1.0)),
    **dict.fromkeys(("left-anterior-superior", "las"), (-1.0, 1.0, 1.0)),
}
_UNITS = {  # in mm; nothing said is taken as mm. "âµm" is what Latin-1 makes of "µm" in UTF-8
    **dict.fromkeys(("", "?", "???", "none", "mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1000.0),
    **dict.fromkeys(("um", "µm", "âµm", "micron", "microns", "micrometer", "micrometers", "micrometre"), 0.001),
}
_NRRD_ENCODINGS = {"gz": "gzip", "bz2": "bzip2", "text": "ascii", "txt": "ascii"}


def read_nrrd(path: Path) -> StoredVolume:
    """NRRD with its data attached or in one file beside it; raw, gzip, bzip2 or ascii."""
    with _damage_named(path, "the NRRD file"):
        with open(path, "rb") as stream:
            fields, start = _nrrd_fields(path, stream), stream.tell()
        dtype, sizes, encoding = _nrrd_layout(path, fields)
        axes, affines, zooms = _nrrd_geometry(path, fields, sizes)
        data_path = path
        if "data file" in fields:
            data_path, start = _beside(path, fields["data file"]), 0
        array = _nrrd_array(data_path, start, fields, dtype, sizes, encoding)
        shape = squeezed_shape([sizes[axis] for axis in axes], str(path))
        array = array.reshape(shape, order="F")
    return StoredVolume(array, str(path), affines, zooms, "LPS", own=not isinstance(array, np.memmap))


def _nrrd_fields(path: Path, stream: BinaryIO) -> dict[str, str]:
    fields = {}
    stream.readline(64)  # NRRD000x
    for _ in range(_MAX_HEADER_LINES):
        line = stream.readline(1 << 16).decode("latin-1").rstrip("\r\n")
        if not line:
            return fields
        name, separator, value = line.partition(":")
        if separator and not line.startswith("#") and not value.startswith("="):  # key:=value is free text
            fields[{"datafile": "data file"}.get(name.strip().lower(), name.strip().lower())] = value.strip()[
                :_MAX_VALUE
            ]
    raise CTReadError(f"{path}: a NRRD header without an end. {_ANEW}")


def _nrrd_layout(path: Path, fields: dict[str, str]) -> tuple[np.dtype, list[int], str]:
    _check_fields(path, fields, ("type", "dimension", "sizes", "encoding"))
    kind = " ".join(fields["type"].lower().split())
    if kind not in _NRRD_TYPES:
        raise CTReadError(
            f"{path}: voxels of type {kind[:24]!r}; expected integer or real HU values. Save the scan anew."
        )
    sizes = [int(n) for n in fields["sizes"].split()]
    if len(sizes) != int(fields["dimension"]) or min(sizes) < 1 or len(sizes) > 16:
        raise CTReadError(f"{path}: dimension {int(fields['dimension'])} against sizes {sizes[:16]}. {_ANEW}")
    dtype = np.dtype({"big": ">", "little": "<"}.get(fields.get("endian", "").lower(), "=") + _NRRD_TYPES[kind])
    encoding = fields["encoding"].lower()
    encoding = _NRRD_ENCODINGS.get(encoding, encoding)
    if encoding not in ("raw", "gzip", "bzip2", "ascii"):
        raise CTReadError(f"{path}: encoding {encoding[:24]!r}; expected raw, gzip, bzip2 or ascii. Save it so.")
    return dtype, sizes, encoding


def _nrrd_geometry(
    path: Path, fields: dict[str, str], sizes: Sequence[int]
) -> tuple[list[int], list[np.ndarray], np.ndarray]:
    """The axes that are space's, the affine, and voxel sizes for want of one."""
    if "space directions" not in fields:
        return _nrrd_spacings(path, fields, sizes)
    vectors = [
        None if part.lower() == "none" else [float(value) for value in part.strip("()").split(",")]
        for part in re.findall(r"\([^)]*\)|none", fields["space directions"], re.IGNORECASE)
    ]
    if len(vectors) != len(sizes):
        raise ValueError(f"{len(vectors)} space directions for {len(sizes)} axes")
    axes = [axis for axis, vector in enumerate(vectors) if vector is not None]
    _check_other_axes(path, sizes, axes)
    if len(axes) != 3:
        return axes, [], np.ones(3)
    space = fields.get("space", "").lower().removesuffix("-time")
    if space not in _NRRD_SPACES:
        logger.warning(
            "%s: its space is %r; read as left-posterior-superior. Check the pictures' sides.", path, space[:40]
        )
    affine = np.eye(4)
    affine[:3, :3] = np.array([vectors[axis] for axis in axes], dtype=np.float64).T
    if "space origin" in fields:
        affine[:3, 3] = [float(value) for value in fields["space origin"].strip("() ").split(",")]
    units = _header_units(path, fields.get("space units", ""), 3)
    units = _trusted_units(str(path), np.linalg.norm(affine[:3, :3], axis=0), units, eager=True)
    to_ras = np.diag([*_NRRD_SPACES.get(space, (-1.0, -1.0, 1.0)), 1.0])
    affine = to_ras @ np.diag([*units, 1.0]) @ affine
    return axes, [affine], np.linalg.norm(affine[:3, :3], axis=0)


def _nrrd_spacings(
    path: Path, fields: dict[str, str], sizes: Sequence[int]
) -> tuple[list[int], list[np.ndarray], np.ndarray]:
    """The same of a header without directions: an axis of no spacing is none of space's."""
    axes = list(range(len(sizes)))
    spacings = np.array([float(mm) for mm in fields.get("spacings", "").split()])
    if spacings.shape != (len(sizes),):
        return axes, [], np.ones(len(squeezed_shape(sizes, str(path))))
    if len(sizes) > 3 and np.isfinite(spacings).sum() == 3:
        axes = np.flatnonzero(np.isfinite(spacings)).tolist()
        _check_other_axes(path, sizes, axes)
    else:
        squeezed_shape(sizes, str(path))  # says what is wrong with a 4-D file
    units = _header_units(path, fields.get("units", ""), len(sizes))[axes[:3]]
    spacings = spacings[axes[:3]]
    return axes, [], spacings * _trusted_units(str(path), spacings, units, eager=True)


def _check_other_axes(path: Path, sizes: Sequence[int], axes: Sequence[int]) -> None:
    others = [size for axis, size in enumerate(sizes) if axis not in axes and size > 1]
    if others:
        raise CTReadError(
            f"{path}: found {others[0]} values a voxel (colour, vectors or several volumes in one file); "
            f"expected one HU value. Save a single volume."
        )


def _header_units(path: Path, text: str, count: int) -> np.ndarray:
    """Millimetres in the unit of each axis, from a field such as `"cm" "cm" "cm"`; 1 where none is known."""
    names = re.findall(r'"([^"]*)"', text) or text.split()
    unknown = sorted({name for name in names if name.lower() not in _UNITS})
    if unknown or len(names) not in (0, count):
        logger.warning("%s: its units %s are not known; reads its numbers as mm.", path, text[:40])
        return np.ones(count)
    return np.array([_UNITS[name.lower()] for name in names] or [1.0] * count)


def _nrrd_array(
    path: Path, start: int, fields: dict[str, str], dtype: np.dtype, sizes: Sequence[int], encoding: str
) -> np.ndarray:
    lines, skip = (int(fields.get(f"{name} skip", fields.get(f"{name}skip", 0))) for name in ("line", "byte"))
    expected, size = math.prod(sizes) * dtype.itemsize, path.stat().st_size
    if math.prod(sizes) > MAX_VOXELS:
        squeezed_shape(sizes, str(path))
    with open(path, "rb") as stream:
        stream.seek(start)
        for _ in range(min(lines, _MAX_HEADER_LINES)):
            stream.readline(1 << 16)
        if encoding == "raw":
            start = size - expected if skip == -1 else stream.tell() + skip
            _check_claim(path, sizes, dtype, start, size)
            return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(math.prod(sizes),))
        if encoding == "ascii":
            _check_claim(path, sizes, np.dtype("u1"), stream.tell(), min(size, _MAX_TEXT))  # a byte a number, at least
            return np.array(stream.read(_MAX_TEXT).split()[: math.prod(sizes)], dtype=np.float64)
        unpacked = _open_gzip(stream) if encoding == "gzip" else bz2.BZ2File(stream)
        # bzip2 packs up to some 45,000 times: the limit alone holds there.
        limit = size * DEFLATE_MAX_RATIO if encoding == "gzip" else math.inf
        _check_claim(path, sizes, dtype, max(skip, 0), limit, packed=True)
        _skip(unpacked, skip)
        return _unpack(path, unpacked, expected).view(dtype)


def _beside(path: Path, name: str) -> Path:
    """The data file that a header names, which must lie beside it or below."""
    parts = Path(name.replace("\\", "/")).parts
    if re.search(r"%[0-9]*d", name) or name.split()[:1] == ["LIST"]:
        raise CTReadError(f"{path}: its data lie in several files ({name!r}); expected one. Save the scan in one file.")
    if not name or Path(name).is_absolute() or ".." in parts or ":" in name:
        raise CTReadError(
            f"{path}: its data file {name!r} lies elsewhere; expected one beside the header. Move it there."
        )
    data_path = path.parent.joinpath(*parts)
    if not data_path.is_file():
        raise CTReadError(f"{path}: its data file {name!r} is missing beside it. Fetch both files.")
    return data_path


# ------------------------------------------------------------------------------------------------------------ MetaImage

_META_TYPES = {
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


def read_metaimage(path: Path) -> StoredVolume:
    """`.mha`, or `.mhd` with one data file beside it; raw or compressed."""
    with _damage_named(path, "the MetaImage file"):
        with open(path, "rb") as stream:
            fields, start = _meta_fields(path, stream), stream.tell()
        _check_fields(path, fields, ("NDims", "DimSize", "ElementType"))
        sizes = [int(n) for n in fields["DimSize"].split()]
        if len(sizes) != int(fields["NDims"]) or not sizes or min(sizes) < 1:
            raise ValueError(f"NDims {int(fields['NDims'])} against DimSize {sizes[:16]}")
        channels = int(fields.get("ElementNumberOfChannels", 1))
        if channels != 1 or fields["ElementType"].endswith("_ARRAY"):
            raise CTReadError(
                f"{path}: found {channels} values a voxel (colour or vectors); "
                f"expected one HU value. Save a single volume."
            )
        if fields["ElementType"] not in _META_TYPES:
            kind = fields["ElementType"][:24]
            raise CTReadError(
                f"{path}: voxels of type {kind!r}; expected integer or real HU values. Save the scan anew."
            )
        shape = squeezed_shape(sizes, str(path))
        big = _meta_true(fields, "BinaryDataByteOrderMSB") or _meta_true(fields, "ElementByteOrderMSB")
        dtype = np.dtype("<>"[big] + _META_TYPES[fields["ElementType"]])
        data_path = path
        if fields["ElementDataFile"].upper() != "LOCAL":
            data_path, start = _beside(path, fields["ElementDataFile"]), 0
        array = _meta_array(data_path, start, fields, dtype, shape)
        affine, zooms = _meta_affine(path, fields, len(sizes))
    own = not isinstance(array, np.memmap)
    return StoredVolume(array.reshape(shape, order="F"), str(path), [affine], zooms, "LPS", own=own)


def _meta_fields(path: Path, stream: BinaryIO) -> dict[str, str]:
    fields = {}
    for _ in range(_MAX_HEADER_LINES):
        line = stream.readline(1 << 16).decode("latin-1")
        name, separator, value = line.partition("=")
        if separator:
            fields[name.strip()] = value.strip()[:_MAX_VALUE]
        if name.strip() == "ElementDataFile":
            return fields
        if not line:
            break
    raise CTReadError(f"{path}: a MetaImage header without ElementDataFile. {_ANEW}")


def _meta_true(fields: dict[str, str], name: str) -> bool:
    return fields.get(name, "False").lower() in ("true", "1", "yes")


def _meta_array(path: Path, start: int, fields: dict[str, str], dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    if not _meta_true({"BinaryData": "True", **fields}, "BinaryData"):
        raise CTReadError(f"{path}: voxels written as text; expected binary ones. Save the scan anew.")
    size, expected = path.stat().st_size, math.prod(shape) * dtype.itemsize
    skip = int(fields.get("HeaderSize", 0))
    if not _meta_true(fields, "CompressedData"):
        start = size - expected if skip == -1 else start + skip
        _check_claim(path, shape, dtype, start, size)
        return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(math.prod(shape),))
    _check_claim(path, shape, dtype, 0, size * DEFLATE_MAX_RATIO, packed=True)
    with open(path, "rb") as stream:
        stream.seek(start + max(skip, 0))
        return _unpack(path, _ZlibStream(stream), expected).view(dtype)


def _meta_affine(path: Path, fields: dict[str, str], dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """LPS header → RAS+ affine. Row i of the matrix is the direction of axis i; a minus in its spacing turns it round."""

    def numbers(names: Sequence[str], default: Sequence[float]) -> np.ndarray:
        text = next((fields[name] for name in names if name in fields), None)
        values = np.array([float(value) for value in text.split()] if text is not None else default, dtype=np.float64)
        if values.size != len(default):
            raise ValueError(f"{names[0]} holds {values.size} numbers")
        return values

    rows = numbers(("TransformMatrix", "Rotation", "Orientation"), np.eye(dimension).ravel())
    spacing = numbers(("ElementSpacing", "ElementSize"), np.ones(dimension))[:3]
    affine = np.eye(4)
    affine[:3, :3] = rows.reshape(dimension, dimension)[:3, :3].T * spacing
    affine[:3, 3] = numbers(("Offset", "Position", "Origin"), np.zeros(dimension))[:3]
    unit = _header_units(path, fields.get("DistanceUnits", ""), 1).repeat(3)
    unit = _trusted_units(str(path), spacing, unit, eager=True)
    return LPS_TO_RAS @ np.diag([*unit, 1.0]) @ affine, spacing * unit


# ---------------------------------------------------------------------------------------------------------------- NumPy


def read_npy(path: Path) -> StoredVolume:
    """An array (X, Y, Z) in HU: the format has no place for geometry."""
    with _damage_named(path, "the NumPy file"), open(path, "rb") as stream:
        shape, order, dtype = _npy_header(stream)
        check_dtype(dtype, str(path))
        squeezed = squeezed_shape(shape, str(path), leading=True)
        _check_claim(path, shape, dtype, stream.tell(), path.stat().st_size)
        array = np.memmap(path, dtype=dtype, mode="r", offset=stream.tell(), shape=squeezed, order=order)
    return StoredVolume(array, str(path), assumed_axes="RAS", bare=True, own=False)


def read_npz(path: Path) -> StoredVolume:
    """The one array of three dimensions in an `.npz`, with `affine` (4, 4), voxel → RAS+ mm, or `spacing` (3,) in mm."""
    with _damage_named(path, "the npz file"), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        volumes = [name for name, info in members.items() if _npz_dimensions(archive, info) >= 3]
        if len(volumes) != 1:
            raise CTReadError(
                f"{path}: {len(volumes)} arrays of three dimensions (keys {', '.join(sorted(members)[:8])}); expected "
                f"one beside `affine` or `spacing`. Save one volume, e.g. numpy.savez(path, hu=..., affine=...)."
            )
        array = _npz_array(path, archive, members[volumes[0]])
        small = {name: _npz_array(path, archive, members[name]) for name in ("affine", "spacing") if name in members}
    array = array.reshape(squeezed_shape(array.shape, str(path), leading=True), order="A")
    affines, zooms = _npz_affines(path, small)
    return StoredVolume(
        array, str(path), affines, (1.0, 1.0, 1.0) if zooms is None else zooms, "RAS", bare=zooms is None
    )


def _npz_affines(path: Path, small: dict[str, np.ndarray]) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The affine, and voxel sizes, if they are there."""
    for name, shapes in (("affine", ((4, 4), (3, 4))), ("spacing", ((3,),))):
        if name in small and small[name].shape not in shapes:
            raise CTReadError(f"{path}: `{name}` of shape {small[name].shape}; expected {shapes[0]}. Save it so.")
    affines = []
    zooms = small["spacing"].astype(np.float64) if "spacing" in small else None
    if "affine" in small:
        affines.append(np.vstack([small["affine"][:3], [0, 0, 0, 1]]).astype(np.float64))
        affines += [] if zooms is None else [np.diag([*zooms, 1.0])]
    return affines, zooms


def _npy_header(stream: BinaryIO) -> tuple[tuple[int, ...], str, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
    shape, fortran, dtype = read(stream)
    return shape, "F" if fortran else "C", dtype


def _npz_dimensions(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Of any type: notes on a volume, say text, may stand beside it."""
    with archive.open(info) as stream:
        return len(_npy_header(stream)[0])


def _npz_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as stream:
        shape, order, dtype = _npy_header(stream)
        check_dtype(dtype, str(path))
        expected = _check_claim(path, shape, dtype, 0, info.file_size, packed=True)
        return _unpack(path, stream, expected).view(dtype).reshape(shape, order=order)
