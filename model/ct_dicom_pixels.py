"""The voxels of DICOM files, frame by frame, as they are stored.

Native voxels are read straight from the file. Compressed ones are decoded by processes of their own (`ct_dicom_decoders`).
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .ct_common import EXPORT_AGAIN, CTReadError, is_disk_error, system_message
from .ct_dicom_codestream import DECODED, check_codestream, check_fragments, decoder_of, single_frame, stored_type
from .ct_dicom_decoders import FREE_SPACE, Decoders
from .ct_dicom_storage import NATIVE, PARSE_ERRORS, DicomPixels, contents, quiet_pydicom

try:
    from pydicom.encaps import generate_frames
except ImportError:
    generate_frames = None  # type: ignore[assignment]

_BATCH = 1 << 28  # bytes of voxels that are decoded at a time
_BATCH_FILES = 512
_DAMAGE: tuple[type[Exception], ...] = (*PARSE_ERRORS, MemoryError)


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
        self._names = {}
        stop, compressed = self._batch(start)
        if compressed:
            first = self.pieces[start][0]
            with _damage_named(first), Decoders(len(compressed), first.file) as decoders:
                self._write(compressed)
                decoders.decode(list(self._names.values()))
            for name in self._names.values():
                Path(name).unlink()
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
        stored = stored.reshape(pixels.rows, pixels.columns).astype(stored_type(pixels), copy=False)
        return _meaningful_bits(stored, pixels.stored, pixels.stored - 1)

    def _batch(self, start: int) -> tuple[int, list[int]]:
        """Return the end of the batch that starts with a frame, and the numbers of its compressed frames."""
        compressed: list[int] = []
        size, stop = 0, start
        while stop < len(self.pieces) and size < _BATCH and len(compressed) < _BATCH_FILES:
            pixels = self.pieces[stop][0]
            if pixels.syntax not in NATIVE:
                compressed.append(stop)
                size += pixels.rows * pixels.columns * pixels.allocated // 8
            stop += 1
        return stop, compressed

    def _write(self, compressed: Sequence[int]) -> None:
        """Write frames as files of single frames."""
        for i in compressed:
            pixels, frame = self.pieces[i]
            _check_readable(pixels)
            with _damage_named(pixels):
                fragment = self._stream(pixels, frame)
                name = f"{i:06d}.{pixels.rows * pixels.columns}.{stored_type(pixels)}.{decoder_of(pixels, fragment)}"
                self._names[i] = str(Path(self._folder.name, name))
                Path(self._names[i]).write_bytes(single_frame(pixels, fragment))

    def _stream(self, pixels: DicomPixels, frame: int) -> bytes:
        """Return a frame's compressed bytes once their own size is known to be the header's."""
        if pixels.syntax not in DECODED:
            raise CTReadError(
                f"{pixels.file}: transfer syntax {pixels.syntax[:64]}; expected native, RLE, JPEG, JPEG-LS, "
                f"JPEG 2000 or HTJ2K voxels. Export the series uncompressed (Explicit VR Little Endian)."
            )
        if self._fragments[0] != pixels.file:
            with contents(pixels.file) as (stream, _):
                stream.seek(pixels.offset)
                data = stream.read(pixels.file.stat().st_size)
            check_fragments(pixels, data)
            with quiet_pydicom():
                self._fragments = (pixels.file, list(generate_frames(data, number_of_frames=pixels.frames)))
        fragment = self._fragments[1][frame]
        check_codestream(pixels, fragment)
        return fragment


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
                f"{FREE_SPACE}"
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
    dtype = np.dtype(NATIVE[pixels.syntax] + stored_type(pixels))
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
