"""A report as files to download: whatever formats `reporting.exports` has, and the evidence as an overlay."""

import dataclasses
from pathlib import Path

from samf.model.report_samf import Report
from samf.reporting.exports import FORMATS, export

OVERLAY = "overlay"
# Formats in which the scan's path is of no use to the reader; others look for the DICOM files there.
_WITHOUT_PATH = ("txt", "json", "pdf")
_TITLES = {
    "txt": "Text",
    "json": "JSON",
    "pdf": "PDF",
    "sr": "DICOM SR",
    "dicom-pdf": "DICOM PDF",
    "fhir": "FHIR",
    "seg": "DICOM SEG",
    OVERLAY: "NIfTI overlay",
}


def kinds() -> dict[str, str]:
    """Return the kinds of files with their titles."""
    return {name: _TITLES.get(name, name.upper()) for name in (*FORMATS, OVERLAY)}


def write_file(report: Report, kind: str, folder: Path) -> Path:
    """Write a report as one kind of file.

    Args:
        report: with its evidence, if that has been found.
        kind: key of `kinds`.
        folder: of the file; made when missing.

    Raises:
        ValueError: the kind can't be made of this report or scan; says why.
        KeyError: no such kind.
    """
    if kind == OVERLAY:
        if report.evidence is None or not (files := report.evidence.save_maps(folder, "report")):
            raise ValueError("The evidence has not been found yet; the overlay is made of it.")
        return files[0]
    if kind not in FORMATS:
        raise KeyError(kind)
    if kind in _WITHOUT_PATH:
        report = dataclasses.replace(report, provenance=dataclasses.replace(report.provenance, source="scan"))
    return export([report], folder, "report", [kind])[0]
