"""The files of one report, which appear as a whole and are on the disk when they do."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from samf.model.report_samf import Report
from samf.reporting.exports import FORMATS, RECORD
from samf.reporting.hospital.durable import make_folder, sync, sync_below
from samf.reporting.hospital.journal import Outgoing
from samf.utils.files import atomic_folder

NAME = "report"  # of the files, without an ending
_PLAIN = "txt"  # what a scan without DICOM headers gets at least


class Exporter(Protocol):
    """What `samf.reporting.exports.export` is."""

    def __call__(
        self, reports: Sequence[Report], folder: Path, scan: str, formats: Sequence[str], source: Path, /
    ) -> list[Path]:
        """Write reports in several formats and return the files."""
        ...


@dataclass(frozen=True)
class Source:
    """What a report was made from.

    Attributes:
        scan: the path that the pipeline read.
        origin: the path by which people know it; the files name it.
    """

    scan: Path
    origin: Path


def formats_for(report: Report, formats: Sequence[str]) -> list[str]:
    """Return the formats of a report: those asked for that its source allows, and the record.

    A scan without DICOM headers, such as a NIfTI file, belongs to no study that a DICOM object could be filed under: its
    report is plain text then.
    """
    if report.provenance.series is not None:
        return list(dict.fromkeys([*formats, RECORD]))
    kept = [name for name in formats if FORMATS[name].series != "required"]
    return list(dict.fromkeys([*kept, *([] if kept else [_PLAIN]), RECORD]))


def write_report(
    root: Path, folder: Path, report: Report, source: Source, formats: Sequence[str], export: Exporter
) -> list[Outgoing]:
    """Write the files of a report and return those that are DICOM objects.

    What an interrupted call left is replaced. The objects' UIDs follow from the source's, the model and what they say, so
    that a report that is written again is the same object.

    Args:
        root: folder of the journal, to which paths are relative.
        folder: of the report, below it.
        report: to write.
        source: what it was made from.
        formats: of `samf.reporting.exports`; the record is always written.
        export: writes them.

    Raises:
        ValueError: a format can't be written for this source.
        OSError: the disk refuses.
    """
    make_folder(folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
    named = dataclasses.replace(report.provenance, source=str(source.origin))
    report = dataclasses.replace(report, provenance=named)
    with atomic_folder(folder) as temporary:
        files = export([report], temporary, NAME, formats_for(report, formats), source.scan)
        objects = [(file.name, instance) for file in files if (instance := _object_of(file)) is not None]
        sync_below(temporary)
    sync(folder.parent)
    return [Outgoing(os.fspath((folder / name).relative_to(root)), instance) for name, instance in objects]


def _object_of(file: Path) -> str | None:
    """Return the SOPInstanceUID of a DICOM file; None for another file."""
    with open(file, "rb") as stream:
        if stream.read(132)[128:] != b"DICM":
            return None
    from pydicom.filereader import read_file_meta_info

    return str(read_file_meta_info(file).MediaStorageSOPInstanceUID)
