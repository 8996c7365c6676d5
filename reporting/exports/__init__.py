"""Reports of a scan as files: one writer per format."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from samf.model.report_samf import Report

# Writes all reports of one scan, its report or its answers, to a file, whole or not at all.
Writer: TypeAlias = Callable[[Sequence[Report], Path], None]

# Format, which is also the file's ending → module of this package with a function `write`. They are imported when they are
# used: some need libraries that others don't.
FORMATS = {"txt": "text", "json": "record", "pdf": "pdf"}
RECORD = "json"  # what `read_reports` reads


def writer(name: str) -> Writer:
    """Return the function that writes a format.

    Raises:
        KeyError: no format of this name.
    """
    module = importlib.import_module(f"{__name__}.{FORMATS[name]}")
    write: Writer = module.write
    return write


def report_file(folder: Path, scan: str, name: str) -> Path:
    """Return the file of a scan in one format.

    Args:
        folder: of all files.
        scan: name of the scan's files, without an ending.
        name: the format.
    """
    return folder / f"{scan}.{name}"


def export(reports: Sequence[Report], folder: Path, scan: str, formats: Sequence[str]) -> list[Path]:
    """Write the reports of one scan in several formats and return the files.

    Args:
        reports: one report, or the answers about one scan.
        folder: of the files; made when missing.
        scan: name of the files, without an ending.
        formats: keys of `FORMATS`.
    """
    files = [report_file(folder, scan, name) for name in formats]
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in zip(formats, files, strict=True):
        writer(name)(reports, file)
    return files
