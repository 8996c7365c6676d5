"""DICOM files in folders."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from .ct_common import CTReadError
from .ct_signatures import looks_like_dicom, read_head

MAX_FILES = 100_000


def walk_once(
    folder: str | os.PathLike[str], on_error: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and those below it, each with the names of its files, both sorted.

    Links to folders are followed, but each folder comes once, however many links lead to it. Hidden folders below
    `folder` are skipped, hidden files are not.

    Args:
        folder: where to begin.
        on_error: called with the error of a folder that can't be listed; the walk then continues.

    Raises:
        OSError: a folder can't be listed and there is no `on_error`.
    """
    top = os.fspath(folder)
    visited, real_paths = set(), {top: os.path.realpath(top)}
    for parent, folders, names in os.walk(top, onerror=on_error or _raise, followlinks=True):
        real_path = real_paths.pop(parent)
        if real_path in visited:
            folders.clear()
            continue
        visited.add(real_path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:  # realpath would look up every part of each path again
            path = os.path.join(parent, name)
            real_paths[path] = os.path.realpath(path) if os.path.islink(path) else os.path.join(real_path, name)
        yield parent, sorted(names)


def _raise(error: OSError) -> None:
    raise error


def dicom_files(folder: Path) -> list[Path]:
    """Return the files in and below a folder that begin as DICOM does, without disc directories (see `walk_once`).

    Raises:
        CTReadError: more than 100,000 files, or one that cannot be read.
    """
    found, count = [], 0
    try:
        for parent, names in walk_once(folder):
            count += len(names)
            if count > MAX_FILES:
                raise CTReadError(f"{folder}: more than {MAX_FILES} files in it. Name the folder of one study.")
            for name in names:
                path = Path(parent, name)
                if path.is_file() and not name.upper().startswith("DICOMDIR") and looks_like_dicom(read_head(path)):
                    found.append(path)
    except OSError as error:
        raise CTReadError(
            f"{error.filename or folder}: cannot be read ({error.strerror}). Check its permissions and its disk."
        ) from error
    return found
