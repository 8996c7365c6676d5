"""Entries of a cache directory: one safetensors file of arrays per volume, with a checksum."""

import hashlib
import json
import logging
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias, TypedDict

import numpy as np
from safetensors.numpy import save

from samf.cache.locks import EntryLocks
from samf.cache.volume_identity import Identity, volume_identity
from samf.data.schema import VolumeLike
from samf.model.ct_download import is_address, redacted
from samf.model.ct_volume import CTReadError, VolumeRef
from samf.utils.files import atomic_write

logger = logging.getLogger(__name__)

Arrays: TypeAlias = dict[str, np.ndarray]
Namer: TypeAlias = Callable[[VolumeRef, Identity], str]

_DTYPES = {"U8": np.uint8, "I64": np.int64, "F32": np.float32, "F16": np.float16}
_CHECKSUM = "crc32"
# What damaged contents raise; an OSError is the file system's.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, struct.error)


class _ArrayHeader(TypedDict):
    """Description of one array in a safetensors header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class VolumeCache(ABC):
    """Base of the caches: names the entries of a directory by volume and settings, looks them up and adds missing ones.

    Args:
        folder: the cache directory; it is created when the first entry is written.

    Raises:
        ValueError: an address in place of a directory.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = local_directory(folder)
        self._downloads = EntryLocks(self.folder / "downloads.lock")

    @abstractmethod
    def namer(self) -> Namer:
        """Return the function that names the entries of many volumes, by the settings of this moment.

        Names are equal exactly when everything that an entry depends on is equal.
        """

    def key(self, volume: VolumeRef, identity: Identity) -> str:
        """Return the name of a volume's entry; `namer` names many."""
        return self.namer()(volume, identity)

    def entry_path(self, volume: VolumeLike) -> Path:
        """Return the file of a volume's entry, whether it exists or not."""
        volume = VolumeRef.of(volume)
        return entry_file(self.folder, self.key(volume, volume_identity(volume.path)))

    def has(self, volume: VolumeLike) -> bool:
        """Return whether there is an intact entry of a volume."""
        return read_entry(self.entry_path(volume)) is not None

    def _get(self, volume: VolumeRef, make: Callable[[VolumeRef], Mapping[str, np.ndarray]]) -> Arrays:
        """Return read-only memory maps of an entry's arrays; without an intact entry, write what `make` returns first.

        Raises:
            CTReadError: the volume changed meanwhile. No entry is written.
            OSError: the entry can't be written or read.
        """
        entry_path = self.entry_path(volume)
        arrays = read_entry(entry_path)
        if arrays is None:
            with self._fetched_once(volume, entry_path):
                arrays = read_entry(entry_path)
                if arrays is None:
                    self._write_new(volume, entry_path, make)
                    arrays = read_entry(entry_path)
        if arrays is None:
            raise OSError(f"{entry_path}: the entry that was just written can't be read. Is the disk full or faulty?")
        return arrays

    def _write_new(
        self, volume: VolumeRef, entry_path: Path, make: Callable[[VolumeRef], Mapping[str, np.ndarray]]
    ) -> None:
        made = make(volume)
        if self.entry_path(volume) != entry_path:  # it would be stored under the old file's name
            raise CTReadError(f"{volume.path}: changed while it was read. Wait until it is written, then try again.")
        write_entry(entry_path, made)

    @contextmanager
    def _fetched_once(self, volume: VolumeRef, entry_path: Path) -> Iterator[None]:
        """Let other processes that share the cache wait while this one downloads the volume and makes its entry."""
        if not is_address(volume.path):
            yield
            return
        with self._downloads.hold(entry_path.stem, wait=True):
            yield


def local_directory(folder: str | os.PathLike) -> Path:
    """Return the path of a cache directory.

    Raises:
        ValueError: it is an address; says what to do instead.
    """
    text = os.fspath(folder)
    if "://" in text:
        raise ValueError(
            f"{redacted(text)}: a cache is a folder on a disk, because its entries are mapped into memory and locked. Fill "
            f"one on a local disk, then copy it to the store, or pack it into shards there; each machine that trains "
            f"copies it back."
        )
    return Path(folder)


def entry_key(*parts: object) -> str:
    """Return the name of an entry from everything that it depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def entry_file(folder: Path, key: str) -> Path:
    """Return the file of an entry: in one of 256 subdirectories, so that none is too long to list."""
    return folder / key[:2] / f"{key}.safetensors"


def write_entry(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays and their checksum atomically as one safetensors file."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    atomic_write(path, save(contiguous, metadata={_CHECKSUM: _checksum(contiguous)}))


def read_entry(path: Path) -> Arrays | None:
    """Return read-only memory maps of an entry's arrays, or None if there is no intact entry.

    The checksum is not compared: that would read the whole file.

    Args:
        path: the entry's file.

    Raises:
        OSError: the entry can't be read at the moment, which doesn't mean that it is damaged.
    """
    try:
        return _map_entry(path)[0]
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
        logger.warning("%s: damaged cache entry (%s); it will be regenerated", path, error)
        return None


def check_entry(path: Path) -> str | None:
    """Read a whole entry; return what is wrong with it, or None if it is intact.

    Args:
        path: the entry's file.

    Raises:
        FileNotFoundError: there is no entry.
        OSError: the entry can't be read at the moment, which doesn't mean that it is damaged.
    """
    try:
        arrays, metadata = _map_entry(path)
        found = _checksum(arrays)
    except _DAMAGE as error:
        return str(error) or type(error).__name__
    if _CHECKSUM not in metadata:
        return "no checksum"
    return None if found == metadata[_CHECKSUM] else f"checksum {found}, written with {metadata[_CHECKSUM]}"


def map_member(path: Path, start: int, size: int) -> Arrays:
    """Return read-only memory maps of the arrays of an entry that is part of a larger file.

    Args:
        path: the file.
        start: the entry's first byte.
        size: the entry's bytes.

    Raises:
        ValueError: there is no intact entry at that place.
        OSError: the file can't be read.
    """
    try:
        return _map_entry(path, start, size)[0]
    except _DAMAGE as error:
        raise ValueError(f"{path}: no intact entry at byte {start} ({error}).") from error


def _map_entry(path: Path, start: int = 0, size: int | None = None) -> tuple[Arrays, dict[str, str]]:
    """Return an entry's arrays and metadata.

    safetensors' own reader copies the arrays. The format is a length, a JSON header and the bytes, which numpy can map.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size if size is None else size
        stream.seek(start)
        (length,) = struct.unpack("<Q", stream.read(8))
        if 8 + length >= size:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(stream.read(length))
    body = np.memmap(path, dtype=np.uint8, mode="r", offset=start + 8 + length, shape=(size - 8 - length,))
    metadata: dict[str, str] = header.pop("__metadata__", {})
    return {name: _map_array(body, described) for name, described in header.items()}, metadata


def _map_array(body: np.memmap, described: _ArrayHeader) -> np.ndarray:
    start, stop = described["data_offsets"]
    if stop > body.size:
        raise ValueError(f"{body.size} bytes of {stop}")
    return body[start:stop].view(_DTYPES[described["dtype"]]).reshape(described["shape"])


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the checksum of the arrays' bytes, in the order of their names."""
    value = 0
    for _, array in sorted(arrays.items()):
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value)
    return f"{value:08x}"
