"""DICOM files for tests, written by pydicom from arrays in which every voxel encodes its position."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
AXIAL = (1.0, 0, 0, 0, 1.0, 0)
ROWS, COLUMNS, SPACING = 14, 18, (1.5, 1.25)  # mm from row to row, from column to column
FIRST = (-12.0, 7.0, -30.0)  # LPS mm of the first pixel's centre
PRIVATE_TEXTS = (
    *("PatientName", "PatientID", "PatientComments", "PatientAddress", "ReferringPhysicianName", "OperatorsName"),
    *("InstitutionName", "StudyDescription", "SeriesDescription", "ProtocolName", "ImageComments"),
)
GRADIENT = np.array([11.0, -7.0, 5.0])  # HU for each mm to the left, back and head


def world_hu(lps: np.ndarray) -> np.ndarray:
    """Return HU that grow linearly in space, which linear interpolation reproduces exactly everywhere."""
    return lps @ GRADIENT


def slice_hu(position: Sequence[float], cosines: Sequence[float] = AXIAL) -> np.ndarray:
    """Return HU (rows, columns) of the slice whose first pixel is at `position`."""
    cosines = np.asarray(cosines, dtype=float)
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    places = (
        np.asarray(position, dtype=float)
        + columns[..., None] * SPACING[1] * cosines[:3]
        + rows[..., None] * SPACING[0] * cosines[3:]
    )
    return np.rint(world_hu(places)).astype(np.int32)


def stack_positions(count: int = 6, step: float = 2.5, axis: Sequence[float] = (0, 0, 1)) -> np.ndarray:
    return np.asarray(FIRST) + np.arange(count)[:, None] * step * np.asarray(axis, dtype=float)


def slice_dataset(hu: np.ndarray, position: Sequence[float], slope: float = 1, intercept: int = -1024, **tags: Any):
    """Return a CT slice that stores (hu - intercept) / slope in 16 bits. `tags` by keyword; None leaves one out."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = tags.get("SOPClassUID", CT_STORAGE)
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    values: dict[str, Any] = {
        "SOPClassUID": CT_STORAGE,
        "SOPInstanceUID": pydicom.uid.generate_uid(),
        "SeriesInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        **{keyword: f"SECRET {keyword}" for keyword in PRIVATE_TEXTS},
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Rows": hu.shape[0],
        "Columns": hu.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleSlope": slope,
        "RescaleIntercept": intercept,
        "PixelSpacing": list(SPACING),
        "SliceThickness": 2.5,
        "ImagePositionPatient": [float(value) for value in position],
        "ImageOrientationPatient": list(AXIAL),
        **tags,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    stored = np.rint((hu - intercept) / slope)
    dataset.PixelData = stored.astype(np.int16 if dataset.PixelRepresentation else np.uint16).tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def write_series(
    folder: Path,
    positions: Sequence[Sequence[float]] | None = None,
    cosines: Sequence[float] = AXIAL,
    names: Sequence[str] | None = None,
    **tags: Any,
) -> Path:
    """Write one file per position. A tag whose value is an `EachSlice` has its own value for each slice."""
    folder.mkdir(parents=True, exist_ok=True)
    positions = stack_positions() if positions is None else np.asarray(positions)
    for k, position in enumerate(positions):
        own = {key: value[k] if isinstance(value, EachSlice) else value for key, value in tags.items()}
        hu = own.pop("hu", None)
        dataset = slice_dataset(
            slice_hu(position, cosines) if hu is None else hu,
            position,
            ImageOrientationPatient=[float(value) for value in cosines],
            **own,
        )
        name = names[k] if names else f"slice{k:03d}.dcm"
        dataset.save_as(folder / name, enforce_file_format=True)
    return folder


class EachSlice(list):
    """Values of a tag, one for each slice of a series."""


def write_enhanced(path: Path, positions: np.ndarray, slopes: Sequence[float], **tags: Any) -> Path:
    """Write one multi-frame file: one frame per position, each with its own slope, in the given order."""
    frames = [slice_hu(position) for position in positions]
    dataset = slice_dataset(frames[0], positions[0], SOPClassUID=ENHANCED_CT, **tags)
    for keyword in ("RescaleSlope", "RescaleIntercept", "PixelSpacing", "SliceThickness"):
        delattr(dataset, keyword)
    del dataset.ImagePositionPatient, dataset.ImageOrientationPatient
    dataset.NumberOfFrames = len(frames)
    dataset.SharedFunctionalGroupsSequence = [
        _group(
            PixelMeasuresSequence={"PixelSpacing": list(SPACING), "SliceThickness": 2.5},
            PlaneOrientationSequence={"ImageOrientationPatient": list(AXIAL)},
        )
    ]
    dataset.PerFrameFunctionalGroupsSequence = [
        _group(
            PlanePositionSequence={"ImagePositionPatient": [float(value) for value in position]},
            PixelValueTransformationSequence={"RescaleSlope": slope, "RescaleIntercept": -1024, "RescaleType": "HU"},
        )
        for position, slope in zip(positions, slopes, strict=True)
    ]
    stored = [np.rint((hu + 1024) / slope).astype(np.int16) for hu, slope in zip(frames, slopes, strict=True)]
    dataset.PixelData = np.stack(stored).tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def _group(**sequences: dict[str, Any]) -> Dataset:
    group = Dataset()
    for name, values in sequences.items():
        item = Dataset()
        for keyword, value in values.items():
            setattr(item, keyword, value)
        setattr(group, name, [item])
    return group
