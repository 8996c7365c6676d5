"""Voxels from plain and compressed streams, held against the size of their file before memory is taken."""

import gzip
import io
import lzma
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any, Protocol

import numpy as np

from .ct_common import EXPORT_AGAIN, CTReadError, Scale, is_disk_error, scale_to_hu, system_message

try:  # two to three times faster than zlib; optional
    from isal import igzip, isal_zlib
except ImportError:
    igzip, isal_zlib = gzip, zlib  # type: ignore[misc]

DEFLATE_MAX_RATIO = 1032  # deflate cannot compress more tightly, so that a header that claims more is wrong
_MAX_MEMORY = 4 << 30  # bytes: a decompressed file and the int16 volume made of it
_CHUNK = 1 << 20  # fits in the processor's cache
_PIECE = 1 << 16  # voxels: so does one in the 64 bits of a scaling
# isal declares its exception class as an instance.
_DAMAGE: tuple[type[Exception], ...] = (  # type: ignore[assignment]
    *(EOFError, OSError, zlib.error, isal_zlib.error, lzma.LZMAError, zipfile.BadZipFile),  # while decompressing
    *(ValueError, KeyError, IndexError, TypeError, OverflowError, SyntaxError, TokenError, struct.error),  # of headers
)


class Readable(Protocol):
    """A binary stream that is read from its beginning to its end."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes; none at the end."""
        ...


def _damage() -> tuple[type[Exception], ...]:
    """Return what damaged bytes raise; nibabel's own error only where a reader has imported nibabel."""
    nibabel = sys.modules.get("nibabel.spatialimages")
    return _DAMAGE if nibabel is None else (*_DAMAGE, nibabel.HeaderDataError)


@contextmanager
def damage_named(path: Path, what: str) -> Iterator[None]:
    """Turn every error that damaged bytes cause in the block into a CTReadError.

    Args:
        path: the file that the message names.
        what: the part of the file that is read.
    """
    try:
        yield
    except CTReadError:
        raise
    except _damage() as error:
        if is_disk_error(error):
            name = getattr(error, "filename", None) or path
            raise CTReadError(
                f"{name}: cannot be read ({system_message(error)}). Check the path, its permissions and its disk."
            ) from error
        raise CTReadError(f"{path}: {what} ends early or is damaged ({_reason(error)}). {EXPORT_AGAIN}") from error


def _reason(error: Exception) -> str:
    """Return an error's message unless it quotes the file, which may concern a patient."""
    words = str(error)
    return type(error).__name__ if "'" in words or '"' in words else words[:200]


def check_claim(
    path: Path, shape: Sequence[int], dtype: np.dtype, start: float, limit: float, compressed: bool = False
) -> int:
    """Return how many bytes of voxels a header declares.

    Args:
        path: the file, for messages.
        shape: of the array that the header declares.
        dtype: of its voxels.
        start: offset of the first voxel in bytes.
        limit: bytes that the file holds at most, once decompressed.
        compressed: the voxels are decompressed into memory, where other types are converted to a second array of int16.

    Raises:
        CTReadError: more than the file can hold, or more memory than 4 GiB.
    """
    expected = math.prod(shape) * dtype.itemsize
    if not (start >= 0 and start + expected <= limit):
        raise CTReadError(
            f"{path}: its header declares {expected} bytes of voxels from byte {start:.0f} on, shape {tuple(shape)}; "
            f"the file holds {path.stat().st_size} bytes. It was cut short: download or export it again."
        )
    needed = expected + (0 if dtype == np.int16 else 2 * math.prod(shape))
    if compressed and needed > _MAX_MEMORY:
        raise CTReadError(
            f"{path}: {' x '.join(map(str, shape))} voxels of type {dtype} take {needed / 2**30:.1f} GiB once decompressed; "
            f"expected at most {_MAX_MEMORY >> 30}. Save them as int16 HU, or uncompressed so that they can be mapped."
        )
    return expected


def decompress(path: Path, stream: Readable, expected: int) -> np.ndarray:
    """Return the next bytes of a stream and read the rest of it, whose end holds checksums.

    Args:
        path: the file, for messages.
        stream: a decompressing stream.
        expected: number of bytes.

    Returns:
        uint8 array (expected,).

    Raises:
        CTReadError: the stream holds fewer bytes, or far more.
    """
    buffer = np.empty(expected, dtype=np.uint8)

    def copy(chunk: bytes, done: int) -> None:
        buffer[done : done + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)

    _consume(path, stream, expected, copy)
    _check_rest(path, stream, expected)
    return buffer


def read_values(
    path: Path, stream: Readable, expected: int, dtype: np.dtype, scale: Scale | None
) -> tuple[np.ndarray, int]:
    """Return the next values of a decompressing stream, and read the rest of it, whose end holds checksums.

    Args:
        path: the file, for messages.
        stream: a decompressing stream.
        expected: number of bytes.
        dtype: of the stored values.
        scale: slope and intercept, for values in HU; None for the stored ones.

    Returns:
        Array (N,), and the number of voxels that are NaN or infinite where it holds HU; these are air.

    Raises:
        CTReadError: the stream holds fewer bytes, or far more.
    """
    if scale is None or is_hu(dtype, scale):
        return decompress(path, stream, expected).view(dtype), 0
    values = _read_hu(path, stream, expected, dtype, scale)
    _check_rest(path, stream, expected)
    return values


def map_values(path: Path, start: int, expected: int, dtype: np.dtype, scale: Scale | None) -> tuple[np.ndarray, int]:
    """Return uncompressed values of a file, as a memory map if they need no scaling.

    Args:
        path: the file.
        start: offset of the first value in bytes.
        expected: number of bytes.
        dtype: of the stored values.
        scale: as for `read_values`.

    Returns:
        As `read_values`.

    Raises:
        CTReadError: the file ends early.
    """
    if scale is None or is_hu(dtype, scale):
        return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(expected // dtype.itemsize,)), 0
    with open(path, "rb") as stream:
        stream.seek(start)
        return _read_hu(path, stream, expected, dtype, scale)


def is_hu(dtype: np.dtype, scale: Scale) -> bool:
    """Return whether stored values of a type are HU in native int16 as they are."""
    return dtype == np.int16 and tuple(scale) == (1.0, 0.0)


def _read_hu(path: Path, stream: Readable, expected: int, dtype: np.dtype, scale: Scale) -> tuple[np.ndarray, int]:
    """Return values in HU, each scaled as it is read, so that no array of stored values takes memory.

    Args:
        path: the file, for messages.
        stream: to read from.
        expected: number of bytes.
        dtype: of the stored values.
        scale: slope and intercept.

    Returns:
        int16 array (N,), and the number of voxels that are NaN or infinite; these are air.

    Raises:
        CTReadError: the stream holds fewer bytes, or far more.
    """
    hu = np.empty(expected // dtype.itemsize, dtype=np.int16)
    carry, not_finite = b"", 0

    def convert(chunk: bytes, done: int) -> None:
        nonlocal carry, not_finite
        start = (done - len(carry)) // dtype.itemsize
        chunk = carry + chunk if carry else chunk
        whole = len(chunk) // dtype.itemsize * dtype.itemsize
        carry, values = chunk[whole:], np.frombuffer(chunk, dtype=dtype, count=whole // dtype.itemsize)
        for first in range(0, len(values), _PIECE):
            piece = values[first : first + _PIECE]
            target = hu[start + first : start + first + len(piece)]
            not_finite += scale_to_hu(piece, *scale, target)

    _consume(path, stream, expected, convert)
    return hu, not_finite


def _consume(path: Path, stream: Readable, expected: int, task: Callable[[bytes, int], None]) -> None:
    """Call `task` with each chunk of the next bytes of a stream, and the number of bytes before it.

    A second thread does so, because touching new memory takes about as long as decompressing into it.

    Raises:
        CTReadError: fewer than `expected` bytes.
    """
    done = 0
    with ThreadPoolExecutor(1) as worker:
        pending = None
        while done < expected and (chunk := stream.read(min(_CHUNK, expected - done))):
            if pending is not None:
                pending.result()
            pending = worker.submit(task, chunk, done)
            done += len(chunk)
        if pending is not None:
            pending.result()
    if done < expected:
        raise CTReadError(
            f"{path}: ends after {done} of {expected} bytes of voxels. It was cut short: download or export it again."
        )


def _check_rest(path: Path, stream: Readable, expected: int) -> None:
    """Read a stream to its end. Raise CTReadError when there is far more than the voxels."""
    rest = 0
    while chunk := stream.read(_CHUNK):
        rest += len(chunk)
        if rest > _MAX_MEMORY:
            raise CTReadError(f"{path}: decompresses to far more than the {expected} bytes it declares. {EXPORT_AGAIN}")


def skip_bytes(stream: Readable, count: int) -> None:
    """Read past the next `count` bytes of a stream that cannot seek."""
    while count > 0 and (chunk := stream.read(min(count, _CHUNK))):
        count -= len(chunk)


def open_gzip(file: Any) -> Any:
    """Open a gzip file, by its path or as a stream, for reading bytes."""
    return igzip.open(file, "rb")


class ZlibStream(io.RawIOBase):
    """The decompressed content of a zlib stream, as a file."""

    def __init__(self, stream: Readable):
        self.stream, self.inflater = stream, isal_zlib.decompressobj()

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` decompressed bytes."""
        return super().read(size) or b""

    def readinto(self, target: Any) -> int:
        """Fill a buffer from its start; return the number of bytes read."""
        while not self.inflater.eof:
            chunk = self.inflater.unconsumed_tail or self.stream.read(1 << 16)
            # The inflater may hold output back even without more input.
            data = self.inflater.decompress(chunk, len(target))
            if data:
                target[: len(data)] = data
                return len(data)
            if not chunk:
                raise EOFError("the compressed stream has no end")
        return 0
