"""The files of a report's evidence: a sheet for the eye and heat maps for a viewer."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from samf.model.image_processing_samf import SamfImageProcessor
from samf.model.report_samf import Report
from samf.reporting.evidence_sheet import save_evidence_sheet
from samf.reporting.slice_view import has_orientation


def save_evidence(
    reports: Sequence[Report], folder: Path, name: str, image_processor: SamfImageProcessor
) -> list[Report]:
    """Write the evidence of reports as `name`.evidence.nii.gz and .evidence.png.

    That of several answers gets their numbers: `name`.1.evidence.nii.gz and so on. Reports without evidence stay as they are.

    Args:
        reports: one report, or the answers about one scan.
        folder: where to write; made when missing.
        name: of the files, without an ending.
        image_processor: that read the scan.

    Returns:
        The reports; their evidence names its files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = has_orientation(image_processor)
    names = [name] if len(reports) == 1 else [f"{name}.{number}" for number in range(1, len(reports) + 1)]
    return [_save(report, folder, own, letters) for report, own in zip(reports, names, strict=True)]


def _save(report: Report, folder: Path, name: str, letters: bool) -> Report:
    if report.evidence is None:
        return report
    sheet = save_evidence_sheet(report, folder / f"{name}.evidence.png", orientation=letters)
    named = dataclasses.replace(report.evidence, files=(sheet.name,))
    return dataclasses.replace(report, evidence=named).save_maps(folder, name)[0]
