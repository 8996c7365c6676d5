"""The voxels of DICOM files: where they lie, and single frames of them as they are stored.

What is native is read straight from the file. JPEG, JPEG-LS, JPEG 2000, HTJ2K and RLE are unpacked by SimpleITK (GDCM) in a
process of its own, since damaged streams can crash, hang or flood a decoder: whatever they do to it, here it is an error.
"""

import logging
import math
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .ct_formats import CTReadError, is_disk_error

try:
    import pydicom
    from pydicom.encaps import encapsulate, generate_frames
    from pydicom.errors import BytesLengthException, InvalidDicomError
except ImportError:
    pydicom = None
    BytesLengthException = InvalidDicomError = ValueError

# pydicom lets through what Python raises on the bytes that it meets.
PARSE_ERRORS = (
    BytesLengthException,
    InvalidDicomError,
    AttributeError,
    EOFError,
    KeyError,
    IndexError,
    LookupError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
NATIVE = {"1.2.840.10008.1.2": "<", "1.2.840.10008.1.2.1": "<", "1.2.840.10008.1.2.2": ">"}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_HTJ2K = {f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203)}
_JPEG_2000 = {f"1.2.840.10008.1.2.4.{n}" for n in (90, 91)} | _HTJ2K
_GDCM = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81)} | {"1.2.840.10008.1.2.5"} | _JPEG_2000
_PIXEL_TAG = (0x7FE0, 0x0010)
_MAX_FRAME_PIXELS = 1 << 26  # 8192 x 8192: a compressed frame may claim any size
_MAX_INFLATED = 1 << 30
_BATCH = 1 << 28  # bytes of voxels that one process unpacks
_BATCH_FILES = 256
_SECONDS_A_PROCESS, _SECONDS_A_FRAME = 15, 5  # half a second and a tenth are usual
# Each thread's stack would count against the process's memory limit.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1")
ANEW = "Fetch or export it anew."
_ROOM = "Free space there or set $TMPDIR."
# Each frame stands in a file of its own; what the decoder cannot unpack is missing afterwards. The process ends with the
# one that started it, though that be killed or ignore SIGTERM itself, and, whatever befalls, after its seconds of CPU time.
_UNPACK_SCRIPT = """
import os, signal, sys
parent, seconds, *names = sys.argv[1:]
signal.signal(signal.SIGTERM, signal.SIG_DFL)
for name, limit in ("RLIMIT_AS", 4 << 30), ("RLIMIT_CPU", int(seconds)):
    try:
        import resource
        resource.setrlimit(getattr(resource, name), (limit, limit))
    except (ImportError, AttributeError, ValueError, OSError):
        pass
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which Linux alone has
    if os.getppid() != int(parent):
        sys.exit(1)
except (ImportError, AttributeError, TypeError, OSError):
    pass
try:
    import numpy, SimpleITK
except ImportError:
    sys.exit(3)
version = SimpleITK.Version.MajorVersion(), SimpleITK.Version.MinorVersion()
if version < (2, 5) and any(name.endswith(".htj2k") for name in names):
    sys.exit(5)
SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
reader = SimpleITK.ImageFileReader()
reader.SetImageIO("GDCMImageIO")
for name in names:
    reader.SetFileName(name)
    array = SimpleITK.GetArrayFromImage(reader.Execute())
    try:
        numpy.save(name + ".npy", array)
    except OSError:
        sys.exit(4)
"""


@dataclass(frozen=True)
class DicomPixels:
    """How one file stores its frames."""

    file: Path
    syntax: str
    offset: int  # of the pixel data's value, -1 where there is none
    length: int  # of it, 0xFFFFFFFF where it is compressed
    rows: int
    columns: int
    frames: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Without pydicom's warnings: what matters of them is checked and said here, and they may quote the file."""
    log = logging.getLogger("pydicom")
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def pixel_element(stream: Any, order: str, implicit: bool) -> tuple[int, int]:
    """Where the value of the pixel data begins, and its length. pydicom has stopped at the element's first byte."""
    start, head = stream.tell(), stream.read(12)
    if len(head) < 12 or struct.unpack(order + "HH", head[:4]) != _PIXEL_TAG:
        return -1, 0
    if implicit:
        return start + 8, struct.unpack(order + "I", head[4:8])[0]
    return start + 12, struct.unpack(order + "I", head[8:])[0]


class _Map(mmap.mmap):
    """Past its end there is nothing, as in a file, instead of an error."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: len(self)}[whence]
        super().seek(min(max(start + offset, 0), len(self)))


@contextmanager
def contents(path: Path) -> Iterator[tuple[Any, str]]:
    """A file to read from, and its transfer syntax where it had to be unpacked to be read at all.

    A map gives no more bytes than the file holds, whatever length a damaged element claims.
    """
    with open(path, "rb") as stream, _Map(stream.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        # "1.2.840.10008.1.2.1.99" stands in the first few hundred bytes where the rest is deflated.
        if _DEFLATED.encode() not in contents[:1024]:
            yield contents, ""
            return
        meta = pydicom.filereader.read_file_meta_info(path)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflater.decompress(contents[144 + int(meta.FileMetaInformationGroupLength) :], _MAX_INFLATED)
        if inflater.unconsumed_tail:
            raise ValueError("unpacks to more than a gigabyte")
        yield BytesIO(data), "1.2.840.10008.1.2.1"


class Frames:
    """Stored values of frames, native or compressed: `frames[i]` (rows, columns), signed or not as the header says.

    Args:
        pieces: files and the numbers of their frames, in the order in which they will be asked for.
    """

    def __init__(self, pieces: Sequence[tuple[DicomPixels, int]]):
        self.pieces = pieces

    def __enter__(self) -> "Frames":
        self._folder = tempfile.TemporaryDirectory(prefix="samf-")
        self._packed: tuple[Path | None, list[bytes]] = (None, [])
        return self

    def __exit__(self, *_: Any) -> None:
        self._folder.cleanup()

    def __getitem__(self, i: int) -> np.ndarray:
        pixels, frame = self.pieces[i]
        _check_readable(pixels)
        with _damage_named(pixels):
            return _native(pixels, frame) if pixels.syntax in NATIVE else self._compressed(i)

    def _compressed(self, i: int) -> np.ndarray:
        pixels = self.pieces[i][0]
        unpacked = Path(f"{self._file(i)}.npy")
        if not unpacked.is_file():
            self._unpack_from(i)
        if not unpacked.is_file():
            raise CTReadError(f"{pixels.file}: its compressed voxels are damaged. {ANEW}")
        stored = np.load(unpacked)
        unpacked.unlink()
        if stored.size != pixels.rows * pixels.columns or stored.dtype.kind not in "iu":
            raise CTReadError(f"{pixels.file}: unpacks to shape {stored.shape} of {stored.dtype}. {ANEW}")
        kind = np.dtype(f"{'i' if pixels.signed else 'u'}{pixels.allocated // 8}")
        stored = stored.reshape(pixels.rows, pixels.columns).astype(kind)
        return _meaningful_bits(stored, pixels.stored, pixels.stored - 1)

    def _file(self, i: int) -> Path:
        kind = "htj2k" if self.pieces[i][0].syntax in _HTJ2K else "dcm"
        return Path(self._folder.name, f"{i:06d}.{kind}")

    def _unpack_from(self, i: int) -> None:
        """Unpacks frame i and as many of those behind it as make a batch."""
        first, batch, size = self.pieces[i][0].file, [], 0
        while i < len(self.pieces) and size < _BATCH and len(batch) < _BATCH_FILES:
            pixels, frame = self.pieces[i]
            if pixels.syntax not in NATIVE:
                _check_readable(pixels)
                with _damage_named(pixels):
                    dataset = _bare_dataset(pixels, self._stream(pixels, frame))
                    pydicom.dcmwrite(self._file(i), dataset, enforce_file_format=True)
                batch.append(str(self._file(i)))
                size += pixels.rows * pixels.columns * pixels.allocated // 8
            i += 1
        seconds = _SECONDS_A_PROCESS + _SECONDS_A_FRAME * len(batch)
        limits = [str(os.getpid()), str(math.ceil(seconds))]
        command = [sys.executable or "python3", "-P", "-c", _UNPACK_SCRIPT, *limits, *batch]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **_ONE_THREAD},
                capture_output=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CTReadError(f"{first}: unpacking its voxels takes far too long. {ANEW}") from error
        if done.returncode == 3:
            raise CTReadError(f"{first}: compressed voxels need SimpleITK: pip install SimpleITK")
        if done.returncode == 5:
            raise CTReadError(
                f"{first}: its voxels are packed as HTJ2K, which SimpleITK unpacks from version 2.5 on: "
                f"pip install -U 'SimpleITK>=2.5', or export the series uncompressed."
            )
        if done.returncode == 4:
            raise CTReadError(f"{first}: cannot be unpacked into {self._folder.name}. {_ROOM}")
        for file in batch:
            Path(file).unlink()

    def _stream(self, pixels: DicomPixels, frame: int) -> bytes:
        """A frame's compressed bytes, once it is sure that they are of the size that the header tells."""
        if pixels.syntax not in _GDCM:
            raise CTReadError(
                f"{pixels.file}: transfer syntax {pixels.syntax[:64]}; expected native, RLE, JPEG, JPEG-LS, "
                f"JPEG 2000 or HTJ2K voxels. Export the series uncompressed (Explicit VR Little Endian)."
            )
        if self._packed[0] != pixels.file:
            with contents(pixels.file) as (stream, _):
                stream.seek(pixels.offset)
                data = stream.read(pixels.file.stat().st_size)
            _check_fragments(pixels, data)
            with quiet_pydicom():
                self._packed = (pixels.file, list(generate_frames(data, number_of_frames=pixels.frames)))
        packed = self._packed[1][frame]
        _check_codestream(pixels, packed)
        return packed


def _check_readable(pixels: DicomPixels) -> None:
    if pixels.offset < 0:
        raise CTReadError(f"{pixels.file}: ends before its voxels. It was cut short: fetch or write it anew.")
    if pixels.allocated not in (8, 16, 32) or not 1 <= pixels.stored <= pixels.allocated:
        raise CTReadError(
            f"{pixels.file}: {pixels.stored} of {pixels.allocated} bits a voxel; expected 8, 16 or 32. {ANEW}"
        )


@contextmanager
def _damage_named(pixels: DicomPixels) -> Iterator[None]:
    """Whatever damaged voxels make Python raise becomes a CTReadError that names their file."""
    try:
        yield
    except CTReadError:
        raise
    except (*PARSE_ERRORS, MemoryError) as error:
        if is_disk_error(error):
            raise CTReadError(
                f"{pixels.file}: cannot be read, or unpacked into {tempfile.gettempdir()} ({error.strerror}). {_ROOM}"
            ) from error
        raise CTReadError(
            f"{pixels.file}: its voxels cannot be unpacked ({type(error).__name__}, transfer syntax "
            f"{pixels.syntax[:64]}): damaged or cut short. {ANEW}"
        ) from error


def _native(pixels: DicomPixels, frame: int) -> np.ndarray:
    dtype = np.dtype(f"{NATIVE[pixels.syntax]}{'i' if pixels.signed else 'u'}{pixels.allocated // 8}")
    expected = pixels.rows * pixels.columns * dtype.itemsize
    with contents(pixels.file) as (stream, _):
        stream.seek(pixels.offset + frame * expected)
        data = stream.read(max(min(expected, pixels.length - frame * expected), 0))
    if len(data) < expected:
        raise CTReadError(
            f"{pixels.file}: {len(data)} of {expected} bytes of voxels for frame {frame + 1}. "
            f"It was cut short: fetch or write it anew."
        )
    stored = np.frombuffer(data, dtype=dtype).reshape(pixels.rows, pixels.columns)
    return _meaningful_bits(stored, pixels.stored, pixels.high_bit)


def _meaningful_bits(stored: np.ndarray, bits: int, high_bit: int) -> np.ndarray:
    """Values from the bits that count: overlays or rubbish may stand in the others."""
    allocated = stored.dtype.itemsize * 8
    if bits == allocated or not bits <= high_bit + 1 <= allocated:
        return stored
    left = allocated - 1 - high_bit
    return (stored << left) >> (allocated - bits)  # of a signed type, the second shift carries the sign down


def _bare_dataset(pixels: DicomPixels, frame: bytes) -> Any:
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pixels.syntax
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"  # a capture
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = pixels.rows, pixels.columns
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = pixels.allocated, pixels.stored, pixels.stored - 1
    data.PixelRepresentation = int(pixels.signed)
    data.PixelData = encapsulate([frame])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    return data


def _check_fragments(pixels: DicomPixels, data: bytes) -> None:
    """Refuses compressed data that end inside a piece: not every decoder minds."""
    place = 0
    while place + 8 <= len(data):
        group, element, length = struct.unpack("<HHI", data[place : place + 8])
        if (group, element) != (0xFFFE, 0xE000):
            return
        place += 8 + length
    if place > len(data):
        raise CTReadError(
            f"{pixels.file}: ends inside its compressed voxels. It was cut short: fetch or write it anew."
        )


def _check_codestream(pixels: DicomPixels, frame: bytes) -> None:
    """Compressed frames tell their own size, for which the decoder takes memory: it must be the header's."""
    if pixels.rows * pixels.columns > _MAX_FRAME_PIXELS:
        raise CTReadError(f"{pixels.file}: compressed pictures of {pixels.columns} x {pixels.rows} pixels. {ANEW}")
    if pixels.syntax.endswith(".1.2.5"):
        segments = struct.unpack("<I", frame[:4])[0]
        good = segments == pixels.allocated // 8
    elif pixels.syntax in _JPEG_2000:
        start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
        good = start >= 0
        if good:
            width, height, left, top, tile, tile_height, *_ = struct.unpack(">8I", frame[start + 8 : start + 40])
            components = struct.unpack(">H", frame[start + 40 : start + 42])[0]
            good = (width - left, height - top, components) == (pixels.columns, pixels.rows, 1)
            good = good and tile > 0 and tile_height > 0 and -(-width // tile) * -(-height // tile_height) <= 65535
    else:
        good = _jpeg_size(frame) == (pixels.rows, pixels.columns, 1)
    if not good:
        raise CTReadError(
            f"{pixels.file}: compressed voxels that are not one greyscale picture of {pixels.columns} x {pixels.rows}, "
            f"as its header says. {ANEW}"
        )


def _jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    """(rows, columns, components) of a JPEG or JPEG-LS stream, from its frame header."""
    place = 2
    while frame[:2] == b"\xff\xd8" and place + 10 <= len(frame):
        marker, length = frame[place + 1], struct.unpack(">H", frame[place + 2 : place + 4])[0]
        if frame[place] != 0xFF:
            return None
        if marker == 0xFF:  # fill
            place += 1
            continue
        if marker in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7):
            rows, columns, components = struct.unpack(">HHB", frame[place + 5 : place + 10])
            return rows, columns, components
        place += 2 + length
    return None
