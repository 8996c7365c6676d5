"""Atomic writes of files and folders: what has the final name is complete."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samf.model.files_samf import TEMPORARY_SUFFIX, atomic_path

__all__ = ["TEMPORARY_SUFFIX", "atomic_folder", "atomic_path", "atomic_update", "atomic_write", "write_json"]


def atomic_write(path: str | os.PathLike, content: str | bytes) -> None:
    """Write bytes, or a text as UTF-8, to a file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` to an indented JSON file in UTF-8, whole or not at all."""
    atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends without an error.

    Args:
        folder: the final path; missing, or an empty folder.
    """
    folder = Path(folder).absolute()
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_update(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those of `folder`, which may exist, when the block ends without an error.

    Other files of `folder` stay. Each file is replaced atomically, one after the other.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
