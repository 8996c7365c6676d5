"""The voxels of DICOM files, frame by frame, as they are stored.

Native voxels are read straight from the file. SimpleITK (GDCM) decodes JPEG, JPEG-LS, JPEG 2000, HTJ2K and RLE in processes
of their own: damaged streams can crash, hang or flood a decoder, and here each of these becomes an error. Where imagecodecs
is installed, it decodes lossless JPEG-LS, JPEG 2000, HTJ2K and RLE there, which is faster; what it refuses is left to GDCM.
"""

import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .ct_common import EXPORT_AGAIN, CTReadError, is_disk_error, system_message
from .ct_dicom_storage import NATIVE, PARSE_ERRORS, DicomPixels, contents, pydicom, quiet_pydicom
from .ct_threads import thread_count

try:
    from pydicom.encaps import encapsulate, generate_frames
except ImportError:
    encapsulate = generate_frames = None  # type: ignore[assignment]

_RLE = "1.2.840.10008.1.2.5"
_JPEG_LS = "1.2.840.10008.1.2.4.80"
_PERHAPS_LOSSY = {f"1.2.840.10008.1.2.4.{n}" for n in (91, 203)}  # where decoders may round differently
_HTJ2K = {f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203)}
_JPEG_2000 = {f"1.2.840.10008.1.2.4.{n}" for n in (90, 91)} | _HTJ2K
_GDCM = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81)} | {_RLE} | _JPEG_2000
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_MAX_FRAME_PIXELS = 1 << 26  # 8192 x 8192: a compressed frame may claim any size
_BATCH = 1 << 28  # bytes of voxels that are decoded at a time
_BATCH_FILES = 512
_LEAST_FRAMES = 8  # per process: starting one takes as long as decoding about as many
_SECONDS_PER_PROCESS, _SECONDS_PER_FRAME = 15, 5  # half a second and a tenth are usual
# Each thread's stack would count against the process's memory limit.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1")
_NO_SIMPLEITK, _DISK_FULL, _OLD_SIMPLEITK = 3, 4, 5  # exit codes of the script
_DAMAGE: tuple[type[Exception], ...] = (*PARSE_ERRORS, MemoryError)
_FREE_SPACE = "Free space there or set $TMPDIR."
# Each frame is a file of its own; the output of one that cannot be decoded is missing afterwards. The process ends with its
# parent, even one that is killed or that ignores SIGTERM, and in any case after its seconds of CPU time.
_DECODE_SCRIPT = """
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
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, only on Linux
    if os.getppid() != int(parent):
        sys.exit(1)
except (ImportError, AttributeError, TypeError, OSError):
    pass
import numpy
try:
    import imagecodecs
except ImportError:
    imagecodecs = None

def planes(frame, pixels):
    starts = [int.from_bytes(frame[4 * k : 4 * k + 4], "little") for k in range(1, 1 + frame[0])] + [len(frame)]
    bytes_of = [imagecodecs.packbits_decode(frame[a:b]) for a, b in zip(starts, starts[1:])]
    image = numpy.empty((pixels, len(starts) - 1), dtype="u1")
    for k, plane in enumerate(reversed(bytes_of)):
        if not pixels <= len(plane) <= pixels + 1:
            raise ValueError
        image[:, k] = numpy.frombuffer(plane, "u1", pixels)
    return image.view(f"<u{len(bytes_of)}")

def decode(name):
    *_, pixels, _, way, kind = name.split(".")
    if way != "plain" or imagecodecs is None:
        return None
    with open(name, "rb") as stream:
        data = stream.read()
    start = data.index(bytes.fromhex("e07f1000 4f420000 ffffffff")) + 12
    start += 8 + int.from_bytes(data[start + 4 : start + 8], "little")  # the table of offsets
    frame = data[start + 8 : start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")]
    try:
        if kind == "rle":
            return planes(frame, int(pixels))
        codec = {"jls": "jpegls_decode", "j2k": "jpeg2k_decode", "htj2k": "htj2k_decode"}[kind]
        return getattr(imagecodecs, codec)(frame)
    except Exception:  # of a damaged codestream, whatever a codec raises: the other reader tries it
        return None

def open_reader():
    try:
        import SimpleITK
    except ImportError:
        sys.exit(3)
    version = SimpleITK.Version.MajorVersion(), SimpleITK.Version.MinorVersion()
    if version < (2, 5) and any(name.endswith(".htj2k") for name in names):
        sys.exit(5)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    return reader, SimpleITK.GetArrayFromImage

opened = None
for name in names:
    array = decode(name)
    if array is None:
        reader, array_of = opened = opened or open_reader()
        reader.SetFileName(name)
        array = array_of(reader.Execute())
    if array.dtype.kind in "iu":
        array = array.astype(name.split(".")[-3], copy=False)
    try:
        numpy.save(name + ".npy", array)
    except OSError:
        sys.exit(4)
"""


class Frames:
    """Stored values of frames, native or compressed.

    Frames are read in batches: `prepare` decodes the compressed frames of the next batch, each on one of as many processes
    as torch uses threads, and `read` returns frames of that batch on any thread. Use it as a context manager.

    Args:
        pieces: files and the numbers of their frames, in the order in which they will be asked for.
    """

    def __init__(self, pieces: Sequence[tuple[DicomPixels, int]]):
        self.pieces = pieces

    def __enter__(self) -> "Frames":
        self._folder = tempfile.TemporaryDirectory(prefix="samf-")
        self._fragments: tuple[Path | None, list[bytes]] = (None, [])
        self._names: dict[int, str] = {}  # the files of the batch, by frame
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def prepare(self, start: int) -> int:
        """Decode a batch of compressed frames; the batch before it is dropped.

        Args:
            start: the first frame of the batch.

        Returns:
            The end of the batch: frames from `start` up to it can be read.

        Raises:
            CTReadError: a frame's file or compressed data don't match its header, or it can't be decoded.
        """
        for name in self._names.values():
            Path(f"{name}.npy").unlink(missing_ok=True)
        stop = self._write_batch(start)
        if self._names:
            with _damage_named(self.pieces[start][0]):
                self._decode(list(self._names.values()), self.pieces[start][0].file)
        return stop

    def read(self, i: int, out: np.ndarray) -> np.ndarray:
        """Return the stored values of a frame, signed or not as its header says.

        Args:
            i: number of the piece, of the batch that was prepared.
            out: contiguous int16 (rows, columns) that may hold them.

        Returns:
            Array (rows, columns), a view of `out` or a new one.

        Raises:
            CTReadError: damaged, or cut short.
        """
        pixels, frame = self.pieces[i]
        _check_readable(pixels)
        with _damage_named(pixels):
            if pixels.syntax not in NATIVE:
                return self._compressed(i)
            if pixels.allocated == 16 and not pixels.deflated:
                return _native_into(pixels, frame, out)
            return _native(pixels, frame)

    def _compressed(self, i: int) -> np.ndarray:
        pixels = self.pieces[i][0]
        decoded = Path(f"{self._names[i]}.npy")
        if not decoded.is_file():
            raise CTReadError(f"{pixels.file}: its compressed voxels are damaged. {EXPORT_AGAIN}")
        stored = np.load(decoded)
        if stored.size != pixels.rows * pixels.columns or stored.dtype.kind not in "iu":
            raise CTReadError(f"{pixels.file}: decodes to shape {stored.shape} of {stored.dtype}. {EXPORT_AGAIN}")
        stored = stored.reshape(pixels.rows, pixels.columns).astype(_kind(pixels), copy=False)
        return _meaningful_bits(stored, pixels.stored, pixels.stored - 1)

    def _decode(self, batch: list[str], first: Path) -> None:
        """Decode files on all processors. Each process stops at a damaged frame, and other processes take other frames.

        Args:
            batch: paths of single compressed frames.
            first: the file that messages name.
        """
        processes = max(min(thread_count(), len(batch) // _LEAST_FRAMES), 1)
        parts = [batch[k::processes] for k in range(processes)]
        with ThreadPoolExecutor(processes) as pool:
            codes = list(pool.map(partial(run_decoder, first), parts))
        for code in codes:
            self._check_exit(code, first)
        for file in batch:
            Path(file).unlink()

    def _write_batch(self, i: int) -> int:
        """Write frame i and following ones as files of single frames; return the end of the batch."""
        self._names, size = {}, 0
        while i < len(self.pieces) and size < _BATCH and len(self._names) < _BATCH_FILES:
            pixels, frame = self.pieces[i]
            if pixels.syntax not in NATIVE:
                _check_readable(pixels)
                with _damage_named(pixels):
                    fragment = self._stream(pixels, frame)
                    name = f"{i:06d}.{pixels.rows * pixels.columns}.{_kind(pixels)}.{_codec(pixels, fragment)}"
                    self._names[i] = str(Path(self._folder.name, name))
                    Path(self._names[i]).write_bytes(_single_frame(pixels, fragment))
                size += pixels.rows * pixels.columns * pixels.allocated // 8
            i += 1
        return i

    def _check_exit(self, code: int, file: Path) -> None:
        if code == _NO_SIMPLEITK:
            raise CTReadError(f"{file}: compressed voxels need SimpleITK: pip install SimpleITK")
        if code == _OLD_SIMPLEITK:
            raise CTReadError(
                f"{file}: its voxels are compressed as HTJ2K, which SimpleITK decodes from version 2.5 on: "
                f"pip install -U 'SimpleITK>=2.5', or export the series uncompressed."
            )
        if code == _DISK_FULL:
            raise CTReadError(f"{file}: cannot be decoded into {self._folder.name}. {_FREE_SPACE}")

    def _stream(self, pixels: DicomPixels, frame: int) -> bytes:
        """Return a frame's compressed bytes once their own size is known to be the header's."""
        if pixels.syntax not in _GDCM:
            raise CTReadError(
                f"{pixels.file}: transfer syntax {pixels.syntax[:64]}; expected native, RLE, JPEG, JPEG-LS, "
                f"JPEG 2000 or HTJ2K voxels. Export the series uncompressed (Explicit VR Little Endian)."
            )
        if self._fragments[0] != pixels.file:
            with contents(pixels.file) as (stream, _):
                stream.seek(pixels.offset)
                data = stream.read(pixels.file.stat().st_size)
            _check_fragments(pixels, data)
            with quiet_pydicom():
                self._fragments = (pixels.file, list(generate_frames(data, number_of_frames=pixels.frames)))
        fragment = self._fragments[1][frame]
        _check_codestream(pixels, fragment)
        return fragment


def run_decoder(first: Path, batch: Sequence[str]) -> int:
    """Decode files in a process of its own and return its exit code; `first`: the file that an error names."""
    seconds = _SECONDS_PER_PROCESS + _SECONDS_PER_FRAME * len(batch)
    limits = [str(os.getpid()), str(math.ceil(seconds))]
    command = [sys.executable or "python3", "-P", "-c", _DECODE_SCRIPT, *limits, *batch]
    environment = {**os.environ, **_ONE_THREAD}
    try:
        return subprocess.run(command, env=environment, capture_output=True, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired as error:
        raise CTReadError(f"{first}: decoding its voxels takes far too long. {EXPORT_AGAIN}") from error


def _kind(pixels: DicomPixels) -> str:
    """Return the type of the stored values, such as "i2"."""
    return f"{'i' if pixels.signed else 'u'}{pixels.allocated // 8}"


def _check_readable(pixels: DicomPixels) -> None:
    if pixels.offset < 0:
        raise CTReadError(f"{pixels.file}: ends before its voxels. It was cut short: download or export it again.")
    if pixels.allocated not in (8, 16, 32) or not 1 <= pixels.stored <= pixels.allocated:
        raise CTReadError(
            f"{pixels.file}: {pixels.stored} of {pixels.allocated} bits per voxel; expected 8, 16 or 32. {EXPORT_AGAIN}"
        )


@contextmanager
def _damage_named(pixels: DicomPixels) -> Iterator[None]:
    """Turn every error that damaged voxels cause in the block into a CTReadError that names their file."""
    try:
        yield
    except CTReadError:
        raise
    except _DAMAGE as error:
        if is_disk_error(error):
            raise CTReadError(
                f"{pixels.file}: cannot be read, or decoded into {tempfile.gettempdir()} ({system_message(error)}). "
                f"{_FREE_SPACE}"
            ) from error
        raise CTReadError(
            f"{pixels.file}: its voxels cannot be decoded ({type(error).__name__}, transfer syntax "
            f"{pixels.syntax[:64]}): damaged or cut short. {EXPORT_AGAIN}"
        ) from error


# --- Native voxels ----------------------------------------------------------------------------------------------------


def _native_into(pixels: DicomPixels, frame: int, out: np.ndarray) -> np.ndarray:
    """Read a frame of 16 bits per voxel straight into int16 (rows, columns); return its stored values there, as a view."""
    stored = out.view(np.int16 if pixels.signed else np.uint16)
    target = out.view(np.uint8).reshape(-1).data
    allowed = max(min(len(target), pixels.length - frame * len(target)), 0)
    done = 0
    with open(pixels.file, "rb", buffering=0) as stream:
        stream.seek(pixels.offset + frame * len(target))
        while done < allowed and (count := stream.readinto(target[done:allowed])):
            done += count
    _check_complete(pixels, frame, done, len(target))
    if np.dtype(f"{NATIVE[pixels.syntax]}i2") != out.dtype:
        stored.byteswap(inplace=True)
    return _meaningful_bits(stored, pixels.stored, pixels.high_bit, in_place=True)


def _check_complete(pixels: DicomPixels, frame: int, found: int, expected: int) -> None:
    if found < expected:
        raise CTReadError(
            f"{pixels.file}: {found} of {expected} bytes of voxels for frame {frame + 1}. "
            f"It was cut short: download or export it again."
        )


def _native(pixels: DicomPixels, frame: int) -> np.ndarray:
    dtype = np.dtype(NATIVE[pixels.syntax] + _kind(pixels))
    expected = pixels.rows * pixels.columns * dtype.itemsize
    with contents(pixels.file) as (stream, _):
        stream.seek(pixels.offset + frame * expected)
        data = stream.read(max(min(expected, pixels.length - frame * expected), 0))
    _check_complete(pixels, frame, len(data), expected)
    stored = np.frombuffer(data, dtype=dtype).reshape(pixels.rows, pixels.columns)
    return _meaningful_bits(stored, pixels.stored, pixels.high_bit)


def _meaningful_bits(stored: np.ndarray, bits: int, high_bit: int, in_place: bool = False) -> np.ndarray:
    """Return the values of the bits that count; the others may hold overlays or anything else."""
    allocated = stored.dtype.itemsize * 8
    if bits == allocated or not bits <= high_bit + 1 <= allocated:
        return stored
    out = stored if in_place else np.empty_like(stored)
    np.left_shift(stored, allocated - 1 - high_bit, out=out)
    return np.right_shift(out, allocated - bits, out=out)  # this shift extends the sign of a signed type


# --- Compressed voxels ------------------------------------------------------------------------------------------------


def _codec(pixels: DicomPixels, frame: bytes) -> str:
    """Return the end of a frame's file name, by which the process chooses its decoder.

    It is "plain." and a kind for frames that any decoder of that kind reads alike: their own header agrees with the
    file's. These are imagecodecs', where it is installed; all others are GDCM's.
    """
    if pixels.syntax == _RLE:
        return "plain.rle" if pixels.allocated in (8, 16) else "any.dcm"
    if pixels.syntax == _JPEG_LS:
        start = frame.find(b"\xff\xf7", 0, 4096)
        return "plain.jls" if start >= 0 and frame[start + 4] == pixels.stored else "any.dcm"
    kind = "htj2k" if pixels.syntax in _HTJ2K else "j2k" if pixels.syntax in _JPEG_2000 else "dcm"
    if kind != "dcm" and pixels.syntax not in _PERHAPS_LOSSY:
        start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
        depth, signed = (frame[start + 42] & 127) + 1, frame[start + 42] >> 7
        if pixels.stored <= depth <= pixels.allocated and signed == pixels.signed:
            return f"plain.{kind}"
    return f"any.{kind}"


def _single_frame(pixels: DicomPixels, frame: bytes) -> bytes:
    """Return a DICOM file of one compressed frame and nothing else that a decoder does not need."""
    header = _bare_header(pixels.syntax, pixels.rows, pixels.columns, pixels.allocated, pixels.stored, pixels.signed)
    pixel_data = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return b"".join((header, pixel_data, encapsulate([frame]), end))


@lru_cache(maxsize=8)
def _bare_header(syntax: str, rows: int, columns: int, allocated: int, stored: int, signed: bool) -> bytes:
    """Return a DICOM file of one compressed frame up to its pixel data."""
    data: Any = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = _SECONDARY_CAPTURE
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = rows, columns
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = allocated, stored, stored - 1
    data.PixelRepresentation = int(signed)
    file = BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


def _check_fragments(pixels: DicomPixels, data: bytes) -> None:
    """Raise CTReadError for compressed data that end inside a fragment, which not every decoder notices."""
    offset = 0
    while offset + 8 <= len(data):
        group, element, length = struct.unpack("<HHI", data[offset : offset + 8])
        if (group, element) != (0xFFFE, 0xE000):
            return
        offset += 8 + length
    if offset > len(data):
        raise CTReadError(
            f"{pixels.file}: ends inside its compressed voxels. It was cut short: download or export it again."
        )


def _check_codestream(pixels: DicomPixels, frame: bytes) -> None:
    """Raise CTReadError unless a compressed frame's own size, for which the decoder takes memory, is the header's."""
    if pixels.rows * pixels.columns > _MAX_FRAME_PIXELS:
        raise CTReadError(
            f"{pixels.file}: compressed images of {pixels.columns} x {pixels.rows} pixels. {EXPORT_AGAIN}"
        )
    if pixels.syntax == _RLE:
        good = struct.unpack("<I", frame[:4])[0] == pixels.allocated // 8  # segments
    elif pixels.syntax in _JPEG_2000:
        good = _is_jpeg_2000_of(frame, pixels.rows, pixels.columns)
    else:
        good = _jpeg_size(frame) == (pixels.rows, pixels.columns, 1)
    if not good:
        raise CTReadError(
            f"{pixels.file}: compressed voxels that are not one greyscale image of {pixels.columns} x {pixels.rows}, "
            f"as its header says. {EXPORT_AGAIN}"
        )


def _is_jpeg_2000_of(frame: bytes, rows: int, columns: int) -> bool:
    """Return whether a JPEG 2000 codestream declares one component of this size and few enough tiles."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start < 0:
        return False
    width, height, left, top, tile, tile_height, *_ = struct.unpack(">8I", frame[start + 8 : start + 40])
    components = struct.unpack(">H", frame[start + 40 : start + 42])[0]
    if (width - left, height - top, components) != (columns, rows, 1):
        return False
    return tile > 0 and tile_height > 0 and -(-width // tile) * -(-height // tile_height) <= 65535


def _jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    """Return (rows, columns, components) of a JPEG or JPEG-LS stream, from its frame header."""
    offset = 2
    while frame[:2] == b"\xff\xd8" and offset + 10 <= len(frame):
        marker, length = frame[offset + 1], struct.unpack(">H", frame[offset + 2 : offset + 4])[0]
        if frame[offset] != 0xFF:
            return None
        if marker == 0xFF:  # fill
            offset += 1
            continue
        if marker in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7):
            rows, columns, components = struct.unpack(">HHB", frame[offset + 5 : offset + 10])
            return rows, columns, components
        offset += 2 + length
    return None
