"""The files of one report: written as a whole, with DICOM identifiers that follow from what they say."""

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from samf.model.report_samf import Report
from samf.reporting.hospital.durable import make_folder, sync, sync_below
from samf.reporting.hospital.journal import Outgoing
from samf.utils.files import atomic_folder

# `samf.reporting.exports.export`: reports, folder, name without an ending, formats → files.
Exporter = Callable[[Sequence[Report], Path, str, Sequence[str]], list[Path]]
NAME, RECORD = "report", "json"
# Of version 5 (RFC 4122): the same text gives the same UID in every process.
_NAMESPACE = uuid.UUID("0f0e3d2c-5d0f-4f6c-9f57-0b5f3c3d6a15")


@dataclass(frozen=True)
class Source:
    """What a report was made from.

    Attributes:
        scan: the path that the pipeline read.
        origin: the path by which people know it; the record names it.
        name: SeriesInstanceUID, or the name of the file or folder.
    """

    scan: Path
    origin: Path
    name: str


def make_uid(*parts: str) -> str:
    """Return a UID of the root 2.25 that follows from texts."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps(parts)).int}"


def content_digest(report: Report) -> str:
    """Return a digest of what a report says and of what it was made with, but not of where its files are."""
    values = report.to_dict()
    values["provenance"]["source"] = ""
    values["warnings"] = []  # they name the source
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_report(
    root: Path, folder: Path, report: Report, source: Source, formats: Sequence[str], export: Exporter
) -> list[Outgoing]:
    """Write the files of a report and return those that are DICOM objects.

    The folder appears at once, with all files in it and on the disk. What an interrupted call left is replaced.

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
    with atomic_folder(folder) as temporary:
        # Writers of DICOM read the source's headers, and the record is to name what people know.
        files = export([report], temporary, NAME, [name for name in formats if name != RECORD])
        named = dataclasses.replace(report.provenance, source=str(source.origin))
        export([dataclasses.replace(report, provenance=named)], temporary, NAME, [RECORD])
        objects = [(file.name, _identify(file, source.name, report)) for file in files if _is_dicom(file)]
        sync_below(temporary)
    sync(folder.parent)
    return [Outgoing(os.fspath((folder / name).relative_to(root)), instance) for name, instance in objects]


def _is_dicom(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _identify(file: Path, source: str, report: Report) -> str:
    """Give a DICOM file the UIDs that follow from its source, class, model and content; return its SOPInstanceUID.

    So a report that is written again, as after a kill between the file and the journal's entry, is the same object.
    """
    import pydicom

    dataset = pydicom.dcmread(file)
    model = json.dumps([report.provenance.model, report.provenance.revision])
    kind = str(dataset.SOPClassUID)
    dataset.SeriesInstanceUID = make_uid("series", source, kind, model)
    dataset.SOPInstanceUID = make_uid("instance", source, kind, model, content_digest(report))
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(file, enforce_file_format=True)
    return str(dataset.SOPInstanceUID)
