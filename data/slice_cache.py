"""Slice stacks on disk: what `SamfImageProcessor.extract` makes of each volume is made once.

A record is one safetensors file a volume, named by what it depends on: the volume's path, size and time of change, and
the image processor's `settings_hash()`. A changed volume or setting is therefore another record; nothing needs
invalidating, and old records can be deleted at any time. Records are written under a temporary name and then renamed: a
reader never sees half of one, and several processes may fill one cache. `record_key`, `read_record` and `write_record`
serve any further stage that keeps arrays of one volume, such as slice embeddings.
"""

import hashlib
import json
import logging
import os
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from samf.ct_volume import CTReadError, read_ct
from samf.image_processing_samf import SamfImageProcessor

logger = logging.getLogger(__name__)

_DTYPES = {"U8": np.uint8, "I64": np.int64, "F32": np.float32, "F16": np.float16}


class SliceCache:
    """`get(path)` gives a volume's slice stack, from disk if it is there.

    Picklable, so that the workers of a DataLoader can share it; each process writes what it makes.

    Args:
        folder: where the records lie; made if it is missing.
        image_processor: makes the stacks. Its `settings_hash()` is part of every record's name.
    """

    def __init__(self, folder: str | os.PathLike, image_processor: SamfImageProcessor):
        self.folder = Path(folder)
        self.image_processor = image_processor

    def get(self, path: str | os.PathLike, *, rescale: tuple[float, float] | None = None) -> dict[str, np.ndarray]:
        """What `image_processor.extract` gives for the volume at `path`; its arrays are read-only maps of the record.

        Args:
            path: as for `read_ct`.
            rescale: as for `read_ct`; part of the record's name.

        Raises:
            CTReadError: the volume can't be read. Nothing is written then.
        """
        record_path = self.record_path(path, rescale=rescale)
        record = read_record(record_path)
        if record is None:
            write_record(record_path, self.image_processor.extract(read_ct(path, rescale=rescale)))
            record = read_record(record_path)
        if record is None:
            raise OSError(f"{record_path}: the record that was just written can't be read. Is the disk full or faulty?")
        return record

    def __contains__(self, path: str | os.PathLike) -> bool:
        return read_record(self.record_path(path)) is not None

    def record_path(self, path: str | os.PathLike, *, rescale: tuple[float, float] | None = None) -> Path:
        """Where the record of the volume at `path` lies or would lie."""
        key = record_key(volume_identity(path), rescale, self.image_processor.settings_hash())
        return self.folder / key[:2] / f"{key}.safetensors"


def volume_identity(path: str | os.PathLike) -> list:
    """Absolute path, size and time of change (ns) of a file; of every file in it, for a folder of slices."""
    path = Path(os.path.abspath(path))
    try:
        if path.is_dir():
            files = [(entry.name, entry.stat()) for entry in sorted(os.scandir(path), key=lambda entry: entry.name)]
            return [str(path), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]]
        stat = path.stat()
    except OSError as error:
        raise CTReadError(
            f"{path}: cannot be looked at ({error.strerror}). Check the path and its permissions."
        ) from error
    return [str(path), stat.st_size, stat.st_mtime_ns]


def record_key(*parts: object) -> str:
    """A record's name from all that it depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def write_record(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `arrays` as one safetensors file, whole or not at all."""
    write_whole(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name beside it, then renames: nobody ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # tempfile's would be readable by us alone
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, np.ndarray] | None:
    """Read-only memory maps of a record's arrays, or None when there is no whole record at `path`.

    safetensors' own reader copies; its format is a length, a JSON header and the bytes, which numpy can map.
    """
    try:
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if 8 + length >= os.fstat(stream.fileno()).st_size:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        body = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
        header.pop("__metadata__", None)
        return {name: _view(body, entry) for name, entry in header.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        logger.warning("%s: a damaged record (%s); it will be made anew", path, error)
        return None


def _view(body: np.memmap, entry: Mapping) -> np.ndarray:
    start, stop = entry["data_offsets"]
    if stop > body.size:
        raise ValueError(f"{body.size} bytes of {stop}")
    return body[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
