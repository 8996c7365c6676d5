"""Slice stacks on disk: what `SamfImageProcessor.extract` makes of each volume is made once.

A record is one safetensors file a volume, named by what it depends on: path, size and time of change of the volume's
files, its rescale, the image processor's `settings_hash()`, and the code's versions (`ENTRY_VERSION`, and
`EXTRACT_VERSION` within the hash). A changed volume, setting or version is therefore another record; nothing needs
invalidating, and old records can be deleted at any time. Records are written under a temporary name and then renamed: a
reader never sees half of one, and several processes may fill one cache. Each carries a checksum of its arrays, which
`check_entry` compares. `entry_key`, `read_entry` and `write_entry` serve any further stage that keeps arrays of one
volume, such as slice embeddings.
"""

import hashlib
import json
import logging
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from samf.cache.screening import refuse_mask
from samf.model.ct_dicom_files import walk_once
from samf.model.ct_download import file_path, is_address, not_kept
from samf.model.ct_signatures import other_half
from samf.model.ct_volume import CTReadError, CTVolume, read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.utils.files import atomic_write

logger = logging.getLogger(__name__)

# Counts up whenever `read_ct` gives other HU for the same file, or a record's layout changes.
ENTRY_VERSION = 3
_DTYPES = {"U8": np.uint8, "I64": np.int64, "F32": np.float32, "F16": np.float16}
_CHECKSUM = "crc32"
# The line of a MetaImage or NRRD header that names another file with the voxels.
_DATA_FILE = re.compile(
    rb"^(?:ElementDataFile[ \t]*=|data ?file:)[ \t]*([^\r\n]+?)[ \t]*$", re.MULTILINE | re.IGNORECASE
)
_DETACHED_HEADERS = (".mhd", ".nhdr")

# A volume's path, and what it was identified by: path, then name below it, bytes and time of change (ns) of its files.
Identity = tuple[str, list[tuple[str, int, int]]]


class SliceCache:
    """`get(path)` gives a volume's slice stack, from disk if it is there.

    Picklable, so that the workers of a DataLoader can share it; each process writes what it makes.

    Args:
        folder: where the records lie; made if it is missing.
        image_processor: makes the stacks. Its `settings_hash()` is part of every record's name.
        min_coverage: mm that a volume must cover along each axis, as for `read_ct`; part of the name where it is set.
    """

    def __init__(self, folder: str | os.PathLike, image_processor: SamfImageProcessor, min_coverage: float = 0.0):
        self.folder = Path(folder)
        self.image_processor = image_processor
        self.min_coverage = min_coverage

    def get(
        self, path: str | os.PathLike, *, rescale: Sequence[float] | None = None, searched: bool = False
    ) -> dict[str, np.ndarray]:
        """What `image_processor.extract` gives for the volume at `path`; its arrays are read-only maps of the record.

        Args:
            path: as for `read_ct`, but one file, folder or address. What is fetched from the Hub is deleted again.
            rescale: as for `read_ct`; part of the record's name.
            searched: nobody named this volume: what may be a mask is refused.

        Raises:
            CTReadError: the volume can't be read, or changed meanwhile. Nothing is written then.
            OSError: the record can't be written, or not read.
        """
        entry_path = self.entry_path(path, rescale=rescale)
        record = read_entry(entry_path)
        if record is None:
            with not_kept(path):
                arrays = self.image_processor.extract(self.read(path, rescale, searched))
            if self.entry_path(path, rescale=rescale) != entry_path:  # or it would stand under the old file's name
                raise CTReadError(f"{path}: changed while it was read. Wait until it is written, then try again.")
            write_entry(entry_path, arrays)
            record = read_entry(entry_path)
        if record is None:
            raise OSError(f"{entry_path}: the record that was just written can't be read. Is the disk full or faulty?")
        return record

    def read(self, path: str | os.PathLike, rescale: Sequence[float] | None = None, searched: bool = False) -> CTVolume:
        """Read a volume that records are made of; see `get`."""
        coverage = {"min_coverage": self.min_coverage} if self.min_coverage else {}
        volume = read_ct(path, rescale=rescale, **coverage)
        if searched:
            refuse_mask(volume)
        return volume

    def has(self, path: str | os.PathLike, *, rescale: Sequence[float] | None = None) -> bool:
        """Whether there is a whole record of the volume at `path`, read with this rescale."""
        return read_entry(self.entry_path(path, rescale=rescale)) is not None

    def entry_path(self, path: str | os.PathLike, *, rescale: Sequence[float] | None = None) -> Path:
        """Where the record of the volume at `path` lies or would lie."""
        return entry_file(self.folder, self.key(volume_identity(path), rescale))

    def key(self, identity: Identity, rescale: Sequence[float] | None = None) -> str:
        """A record's name from its volume's identity."""
        rescale = None if rescale is None else [float(number) for number in rescale]  # 1 and 1.0 are one rescale
        limits = [self.min_coverage] if self.min_coverage else []
        return entry_key(identity, rescale, self.image_processor.settings_hash(), ENTRY_VERSION, *limits)


def entry_file(folder: Path, key: str) -> Path:
    """Where the record of this name lies in `folder`: one of 256 folders, none of which gets too long to list."""
    return folder / key[:2] / f"{key}.safetensors"


def volume_identity(path: str | os.PathLike) -> Identity:
    """Absolute path of a volume, and name, size in bytes and time of change (ns) of its files.

    These are the file itself and the one with the voxels that a detached header names or goes with, or all files in and below a
    folder. Looking takes no more than a `stat` of each, on network file systems too: the contents are not read, so all
    machines that share a cache must mount the volumes at the same path. An address stands for itself, so that its record
    is found without the network: what lies there is taken not to change. One on the Hub can name a revision.

    Raises:
        CTReadError: the file or folder can't be looked at.
    """
    path = file_path(path)
    if is_address(path):
        return str(path), []
    path = Path(os.path.abspath(path))
    try:
        if path.is_dir():
            return str(path), sorted(_files_below(path))
        files = [("", *_size_and_time(path))]
        voxels = _voxel_file(path) if path.suffix.lower() in _DETACHED_HEADERS else other_half(path)
        if voxels is not None:
            files.append((voxels.name, *_size_and_time(voxels)))
    except OSError as error:
        raise CTReadError(
            f"{path}: cannot be looked at ({error.strerror}). Check the path and its permissions."
        ) from error
    return str(path), files


def identity_bytes(identity: Identity) -> int:
    """How large a volume's files are together."""
    return sum(size for _, size, _ in identity[1])


def _size_and_time(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _files_below(folder: Path) -> list[tuple[str, int, int]]:
    """Those that reading the folder sees: links are followed, as `read_ct` does."""
    files = []
    for parent, names in walk_once(folder):
        for name in names:
            file = Path(parent, name)
            if file.exists():  # and no link that leads nowhere
                files.append((file.relative_to(folder).as_posix(), *_size_and_time(file)))
    return files


def _voxel_file(header: Path) -> Path | None:
    with open(header, "rb") as stream:
        line = _DATA_FILE.search(stream.read(1 << 16))
    file = header.parent / os.fsdecode(line[1]) if line else header
    return file if file != header and file.is_file() else None


def entry_key(*parts: object) -> str:
    """A record's name from all that it depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def write_entry(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `arrays` with their checksum as one safetensors file, whole or not at all."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    atomic_write(path, save(arrays, metadata={_CHECKSUM: _checksum(arrays)}))


def read_entry(path: Path) -> dict[str, np.ndarray] | None:
    """Read-only memory maps of a record's arrays, or None when there is no whole record at `path`.

    The contents aren't compared with their checksum: that would read all of them.

    Raises:
        OSError: it can't be read just now, which says nothing of the record.
    """
    try:
        return _map_record(path)[0]
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
        logger.warning("%s: a damaged record (%s); it will be made anew", path, error)
        return None


def check_entry(path: Path) -> str | None:
    """Reads the whole record and says what is wrong with it; None if nothing is.

    Raises:
        FileNotFoundError: there is none.
        OSError: it can't be read just now, which says nothing of the record.
    """
    try:
        arrays, metadata = _map_record(path)
        found = _checksum(arrays)
    except _DAMAGE as error:
        return str(error) or type(error).__name__
    if _CHECKSUM not in metadata:
        return "no checksum"
    return None if found == metadata[_CHECKSUM] else f"checksum {found}, written with {metadata[_CHECKSUM]}"


# What a record's contents raise; OSErrors are the file system's.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, struct.error)


def _map_record(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata. safetensors' own reader copies; its format is a length, a JSON header and the bytes, which
    numpy can map."""
    with open(path, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if 8 + length >= os.fstat(stream.fileno()).st_size:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(stream.read(length))
    body = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    metadata = header.pop("__metadata__", {})
    return {name: _view(body, entry) for name, entry in header.items()}, metadata


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Of the arrays' bytes, in the order of their names."""
    value = 0
    for _, array in sorted(arrays.items()):
        value = zlib.crc32(array.reshape(-1).view(np.uint8), value)
    return f"{value:08x}"


def _view(body: np.memmap, entry: Mapping) -> np.ndarray:
    start, stop = entry["data_offsets"]
    if stop > body.size:
        raise ValueError(f"{body.size} bytes of {stop}")
    return body[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
