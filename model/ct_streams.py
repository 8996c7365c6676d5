"""Voxels from plain and compressed streams, held against the size of their file before memory is taken."""

import gzip
import io
import lzma
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import Any, Protocol

import numpy as np

from .ct_common import EXPORT_AGAIN, CTReadError, is_disk_error, system_message

try:  # two to three times faster than zlib; optional
    from isal import igzip, isal_zlib
except ImportError:
    igzip, isal_zlib = gzip, zlib  # type: ignore[misc]

DEFLATE_MAX_RATIO = 1032  # deflate cannot compress more tightly, so that a header that claims more is wrong
_MAX_MEMORY = 4 << 30  # bytes: a decompressed file and the int16 volume made of it
_CHUNK = 1 << 20  # fits in the processor's cache
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
    done = _fill(stream, buffer)
    if done < expected:
        raise CTReadError(
            f"{path}: ends after {done} of {expected} bytes of voxels. It was cut short: download or export it again."
        )
    rest = 0
    while chunk := stream.read(_CHUNK):
        rest += len(chunk)
        if rest > _MAX_MEMORY:
            raise CTReadError(f"{path}: decompresses to far more than the {expected} bytes it declares. {EXPORT_AGAIN}")
    return buffer


def _fill(stream: Readable, buffer: np.ndarray) -> int:
    """Read a stream into a buffer (N,) of uint8; return the number of bytes read.

    A second thread copies, because touching new memory takes about as long as decompressing into it.
    """
    done = 0
    with ThreadPoolExecutor(1) as copier:
        copied = None
        while done < len(buffer) and (chunk := stream.read(min(_CHUNK, len(buffer) - done))):
            if copied is not None:
                copied.result()
            copied = copier.submit(np.copyto, buffer[done : done + len(chunk)], np.frombuffer(chunk, dtype=np.uint8))
            done += len(chunk)
    return done


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
