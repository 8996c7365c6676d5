"""Identity of a volume: by path, size and modification time of its files, or what a store says about an object."""

import os
import re
import stat
from pathlib import Path
from typing import TypeAlias

from samf.model.ct_dicom_files import walk_once
from samf.model.ct_download import file_path, is_address
from samf.model.ct_object_store import is_store_address, normalised, stored_state
from samf.model.ct_signatures import other_half
from samf.model.ct_volume import CTReadError

# A volume's path, and of each of its files the name below that path, the size in bytes and the modification time in ns; of
# an object in a store, its ETag in place of the time.
Identity: TypeAlias = tuple[str, list[tuple[str, int, int | str]]]

# The line of a MetaImage or NRRD header that names another file with the voxels.
_DATA_FILE = re.compile(
    rb"^(?:ElementDataFile[ \t]*=|data ?file:)[ \t]*([^\r\n]+?)[ \t]*$", re.MULTILINE | re.IGNORECASE
)
_DETACHED_HEADERS = (".mhd", ".nhdr")
_HALVES = tuple(f"{suffix}{gz}" for suffix in (".hdr", ".img") for gz in ("", ".gz"))


def volume_identity(path: str | os.PathLike) -> Identity:
    """Return a volume's absolute path, and name, size in bytes and modification time (ns) of its files.

    The files are the file itself and, for a detached header or half of a pair, the file with the voxels; or all files in and
    below a folder. Each takes a `stat`, also on network file systems, and contents are not read, so all machines that
    share a cache must mount the volumes at the same path. Of an object in a store the ETag counts in place of the time; the
    store is asked once per process. An address on the Hub or the web is its own identity, so that its entry is found
    without the network: its content is assumed not to change. An address on the Hub can name a revision.

    Args:
        path: a file, a folder or an address.

    Raises:
        CTReadError: the file or folder can't be accessed.
    """
    path = file_path(path)
    if is_store_address(path):
        return normalised(str(path)), [(file.name, file.size, file.tag) for file in stored_state(str(path)).files]
    if is_address(path):
        return str(path), []
    path = os.path.abspath(path)
    try:
        state = os.stat(path)
        if stat.S_ISDIR(state.st_mode):
            return path, sorted(_files_below(Path(path)))
        files: list[tuple[str, int, int | str]] = [("", state.st_size, state.st_mtime_ns)]
        voxels = _voxels_of(path)
        if voxels is not None:
            files.append((voxels.name, *_size_and_time(voxels)))
    except OSError as error:
        raise CTReadError(
            f"{path}: cannot be accessed ({error.strerror}). Check the path and its permissions."
        ) from error
    return path, files


def identity_bytes(identity: Identity) -> int:
    """Return the total size of a volume's files."""
    return sum(size for _, size, _ in identity[1])


def _size_and_time(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _files_below(folder: Path) -> list[tuple[str, int, int | str]]:
    """Return the files that reading the folder finds; links are followed, as `read_ct` does."""
    files: list[tuple[str, int, int | str]] = []
    for parent, names in walk_once(folder):
        for name in names:
            file = Path(parent, name)
            if file.exists():  # not for broken links
                files.append((file.relative_to(folder).as_posix(), *_size_and_time(file)))
    return files


def _voxels_of(path: str) -> Path | None:
    """Return the other file of a detached header or of half a pair."""
    lowered = path.lower()
    if lowered.endswith(_DETACHED_HEADERS):
        return _voxel_file(Path(path))
    return other_half(Path(path)) if lowered.endswith(_HALVES) else None


def _voxel_file(header: Path) -> Path | None:
    """Return the file that a detached header names, if it exists."""
    with open(header, "rb") as stream:
        line = _DATA_FILE.search(stream.read(1 << 16))
    file = header.parent / os.fsdecode(line[1]) if line else header
    return file if file != header and file.is_file() else None
