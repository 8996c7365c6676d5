"""Files and renames that survive a power cut, and errors of the disk."""

import errno
import os
import uuid
from pathlib import Path

# The disk refuses now and may not later: full, over quota, read-only after an error.
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_below(folder: Path) -> None:
    """Flush all files below a folder, and the folders themselves, to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def make_folder(folder: Path) -> None:
    """Create a folder with its parents so that it is still there after a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def write_part(folder: Path, content: bytes) -> Path:
    """Write bytes to a new file of a random name, flush it to the disk and return its path.

    Raises:
        OSError: there is no room; nothing is left behind.
    """
    path = folder / uuid.uuid4().hex
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def is_passing(error: OSError) -> bool:
    """Return whether an error is about the disk as a whole, so that the same may work later."""
    return error.errno in _PASSING
