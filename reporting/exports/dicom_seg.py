"""The evidence's heat map as a DICOM SEG on the grid of the source series.

One segment for the whole report, with the largest heat of any sentence: viewers and ITK stack the frames of all segments into
one volume, and few show fractional segments apart. The sentences' own maps are in the NIfTI file of the evidence.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import highdicom as hd
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from samf.model.ct_common import LPS_TO_RAS
from samf.model.heat_map_samf import resample_heat
from samf.model.report_samf import DISCLAIMER, Report
from samf.reporting.exports import ExportError
from samf.reporting.exports.dicom_object import Algorithm, complete, general_values, quiet_libraries, save, unnamed
from samf.reporting.exports.heat import check_evidence, whole_map
from samf.reporting.exports.source_series import SourceSeries

_DESCRIPTION = "AI evidence heat, not verified"
_LABEL = "Evidence of the AI report"
_LARGEST = 255
_LONG_STRING = 64


def write(reports: Sequence[Report], file: Path, series: SourceSeries) -> None:
    """Write the evidence of reports as one segmentation of the source's study."""
    check_evidence(reports, "seg")
    if not series.header.get("FrameOfReferenceUID"):
        raise ExportError(
            f"{reports[0].provenance.source}: its slices have no FrameOfReferenceUID, without which a SEG has no place. "
            f"Leave out the format seg; the evidence's NIfTI file opens without."
        )
    with quiet_libraries():
        segmentation = heat_segmentation(reports, series, file.parent)
    save(segmentation, file)


def heat_segmentation(reports: Sequence[Report], series: SourceSeries, folder: Path) -> Dataset:
    """Return the evidence's heat as a SEG dataset: FRACTIONAL, a frame for each slice of the source.

    Args:
        reports: about one scan, with evidence.
        series: that they were made from.
        folder: of the evidence's files.
    """
    heat = heat_on_slices(reports, series, folder)
    algorithm = Algorithm.of(reports[0])
    identification = hd.AlgorithmIdentificationSequence(
        name=f"SAMF, model {algorithm.name}"[:_LONG_STRING],
        version=", ".join(part for part in (algorithm.version, algorithm.revision) if part)[:_LONG_STRING],
        family=codes.DCM.ArtificialIntelligence,
    )
    segment = hd.seg.SegmentDescription(
        segment_number=1,
        segment_label=_LABEL,
        segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
        segmented_property_type=codes.DCM.ImageRegion,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=identification,
    )
    values = general_values(reports, series, "seg", hashlib.sha256(heat.tobytes()).hexdigest())
    segmentation = hd.seg.Segmentation(
        source_images=unnamed(series.headers),
        pixel_array=heat[..., None].astype(np.float32) / _LARGEST,
        segmentation_type=hd.seg.SegmentationTypeValues.FRACTIONAL,
        fractional_type=hd.seg.SegmentationFractionalTypeValues.PROBABILITY,
        max_fractional_value=_LARGEST,
        segment_descriptions=[segment],
        omit_empty_frames=False,  # else the spacing of what is left is lost
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_description=DISCLAIMER,
        content_label="EVIDENCE",
        manufacturer_model_name=algorithm.name[-_LONG_STRING:],
        software_versions=algorithm.version,
        device_serial_number="none",
        **values,
    )
    complete(segmentation, reports, series, _DESCRIPTION)
    return segmentation


def heat_on_slices(reports: Sequence[Report], series: SourceSeries, folder: Path) -> np.ndarray:
    """Return the heat as uint8 (slices, rows, columns), 255 = 1, on the slices of the source.

    Args:
        reports: about one scan, with evidence.
        series: that they were made from.
        folder: of the evidence's files.
    """
    heat, affine = whole_map(reports, folder)
    count, rows, columns = series.shape
    result = np.empty((count, rows, columns), dtype=np.uint8)
    for number in range(count):  # uneven slices have no common affine
        own = LPS_TO_RAS @ series.slice_affine(number)
        target = own[:, [2, 1, 0, 3]]  # index of the slice (0), row, column
        result[number] = resample_heat(heat, affine, (1, rows, columns), target)[0]
    return result
