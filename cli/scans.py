"""The scans that a command line names."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samf.cli.errors import UsageError

if TYPE_CHECKING:
    from samf.model.ct_common import VolumeRef


def find_scans(paths: Sequence[str]) -> list[str]:
    """Return the scans that paths, globs, folders and addresses name, each once and in order.

    Args:
        paths: files, DICOM folders, folders with volumes or DICOM folders below them, addresses, or patterns with `*`.

    Raises:
        UsageError: a path that isn't there, or a folder or pattern without a scan.
    """
    from samf.model.ct_download import is_address

    found: dict[str, None] = {}
    for path in paths:
        if is_address(path):
            found |= dict.fromkeys(_scans_at(path))
            continue
        names = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not Path(path).exists() else [path]
        if not names:
            raise UsageError(f"{path}: no file fits this pattern.")
        for name in names:
            if Path(name).is_file():
                found[name] = None
            elif not Path(name).is_dir():
                raise UsageError(f"{name}: no such file or folder.")
            else:
                try:
                    found |= dict.fromkeys(volume.path for volume in _scans_of_folder(name))
                except FileNotFoundError as error:
                    raise UsageError(f"{name}: no scan in it or below it: {error}") from error
    return list(found)


def _scans_at(address: str) -> list[str]:
    """Return the scans that an address names: those below a folder in an object store, or itself."""
    from samf.data.file_kinds import has_volume_suffix
    from samf.model.ct_common import CTReadError
    from samf.model.ct_object_store import is_store_address

    if not is_store_address(address) or has_volume_suffix(address):
        return [address]
    from samf.data.store_search import volumes_stored_below

    try:
        return [volume.path for volume in volumes_stored_below(address)] or [address]
    except CTReadError as error:
        raise UsageError(str(error)) from error


def _scans_of_folder(folder: str) -> "list[VolumeRef]":
    """Return the scans in a folder and below it."""
    if not any(entry.is_dir() for entry in os.scandir(folder)):  # as most DICOM folders
        from samf.data.folder_search import volumes_below

        if found := list(volumes_below(Path(folder).absolute())):
            return found
    from samf.data.volume_discovery import search_volumes  # imports datasets, which takes a second

    return search_volumes([folder]).volumes


def report_names(scans: Sequence[str]) -> dict[str, str]:
    """Return a file name without an ending for each scan; scans of one name in different folders get numbers."""
    from samf.data.file_kinds import VOLUME_SUFFIXES
    from samf.model.ct_download import is_address, redacted

    names: dict[str, str] = {}
    taken: set[str] = set()
    for scan in scans:
        stem = Path((redacted(scan) if is_address(scan) else scan).rstrip("/")).name
        ending = max((end for end in VOLUME_SUFFIXES if stem.lower().endswith(end)), key=len, default="")
        stem = stem[: len(stem) - len(ending)] or "scan"
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name)
        names[scan] = name
    return names
