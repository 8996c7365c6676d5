"""The evidence of reports for other systems: the whole heat map, and the source slices that a sentence rests on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samf.model.evidence_samf import NAME_ENDING, Evidence, SentenceEvidence, SliceEvidence
from samf.model.report_samf import Report
from samf.model.slice_geometry import PLANE_AXES
from samf.reporting.exports import ExportError
from samf.reporting.exports.source_series import SourceSeries

_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
_LEVELS = 255  # of heat in the evidence's file
_PARALLEL = 0.8  # cosine between the normals of a slice image and the source's slices


def check_evidence(reports: Sequence[Report], name: str) -> None:
    """Raise ExportError unless a report has evidence; `name` is the format that needs it."""
    if all(report.evidence is None for report in reports):
        raise ExportError(
            f"The format {name} is the evidence's heat map, and {reports[0].provenance.source} has a report without "
            f"evidence. Add --evidence (in Python: evidence=True)."
        )


def whole_map(reports: Sequence[Report], folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest heat of any sentence (X, Y, Z) in [0, 1], and its affine, cell index → RAS+ mm.

    Args:
        reports: about one scan, at least one with evidence.
        folder: where the evidence's files are, for reports that were read from a record and have no arrays.

    Raises:
        ExportError: the arrays are neither in the reports nor in the folder.
    """
    found = [report.evidence for report in reports if report.evidence is not None]
    maps = [_maps(evidence, folder) for evidence in found]
    return np.maximum.reduce([own.max(axis=-1) for own in maps]), np.array(found[0].grid_affine)


def _maps(evidence: Evidence, folder: Path) -> np.ndarray:
    maps = evidence.maps()
    if maps is not None:
        return (np.rint(maps * _LEVELS) / _LEVELS).astype(np.float32)  # as in the file
    import nibabel as nib

    file = next((folder / name for name in evidence.files if name.endswith(NAME_ENDING)), None)
    if file is None or not file.exists():
        raise ExportError(f"{folder}: the heat map {file.name if file else NAME_ENDING} isn't there. Report again.")
    return np.asarray(nib.nifti1.Nifti1Image.from_filename(file).dataobj, dtype=np.float32).reshape(
        *evidence.grid_shape, -1
    )


def source_slices(report: Report, series: SourceSeries) -> list[list[int]]:
    """Return for each sentence of a report the slices of the source that its evidence points to, sorted.

    These are the slice through the peak of the sentence's 3-D map, and for each slice image that speaks for the sentence
    the source slice that it shows or, where it stands across the source's slices, the one that its hottest place lies in.

    Args:
        report: with or without evidence.
        series: that it was made from.
    """
    if report.evidence is None or len(report.evidence.sentences) != len(report.sentences):
        return [[] for _ in report.sentences]
    affine = _volume_affine(report)
    return [_slices_of(sentence, series, affine, report.provenance.shape) for sentence in report.evidence.sentences]


def _volume_affine(report: Report) -> np.ndarray:
    """Return voxel index → RAS+ mm (4, 4) of the volume whose slices the model read; the map's grid covers the same box."""
    assert report.evidence is not None
    step = np.array(report.provenance.shape) / np.array(report.evidence.grid_shape)
    to_voxel = np.diag([*step, 1.0])
    to_voxel[:3, 3] = (step - 1) / 2
    affine: np.ndarray = np.array(report.evidence.grid_affine) @ np.linalg.inv(to_voxel)
    return affine


def _slices_of(
    sentence: SentenceEvidence, series: SourceSeries, affine: np.ndarray, shape: tuple[int, int, int]
) -> list[int]:
    points = [] if sentence.peak is None else [np.array(sentence.peak.lps_mm)]
    for found in sentence.top_slices:
        if found.score > 0:
            points += _point_of(found, series, affine, shape)
    numbers = {series.slice_at(point) for point in points}
    return sorted(number for number in numbers if number is not None)


def _point_of(
    found: SliceEvidence, series: SourceSeries, affine: np.ndarray, shape: tuple[int, int, int]
) -> list[np.ndarray]:
    """Return a point, LPS mm, in the source slice that a slice image points to; none where it points to no single one."""
    axis = PLANE_AXES[found.plane][0]  # type: ignore[index]
    normal = affine[:3, axis] * _RAS_TO_LPS
    if abs(float(normal @ series.normal)) >= _PARALLEL * np.linalg.norm(normal):
        voxel = (np.array(shape) - 1) / 2.0
        voxel[axis] = found.index
        return [(affine[:3, :3] @ voxel + affine[:3, 3]) * _RAS_TO_LPS]
    return [] if found.place is None else [np.array(found.place.lps_mm)]
