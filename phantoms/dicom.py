"""Phantoms as DICOM series."""

from pathlib import Path
from typing import Any

import numpy as np

from samf.phantoms.volume import Phantom

_CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
_INTERCEPT = -1024


def write_series(phantom: Phantom, folder: Path, name: str, **tags: Any) -> Path:
    """Write a phantom as one file per axial slice and return the folder.

    Equal arguments give equal files.

    Args:
        phantom: the phantom, whose axes are those of the patient.
        folder: of the files; made when missing.
        name: from which all UIDs follow.
        tags: values by keyword; None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(phantom.hu.shape[2]):
        dataset = slice_dataset(phantom, number, name, **tags)
        dataset.save_as(folder / f"slice{number:03d}.dcm", enforce_file_format=True)
    return folder


def slice_dataset(phantom: Phantom, number: int, name: str, **tags: Any) -> Any:
    """Return one axial slice of a phantom as a pydicom dataset.

    Args:
        phantom: the phantom.
        number: of the slice, from the feet.
        name: from which all UIDs follow.
        tags: as in `write_series`.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    # Rows run to the back and columns to the left (LPS); the array's axes to the right and to the front (RAS).
    stored = (phantom.hu[::-1, ::-1, number].T.astype(np.int32) - _INTERCEPT).astype(np.uint16)
    last_x, last_y = phantom.hu.shape[0] - 1, phantom.hu.shape[1] - 1
    right, front, top = (phantom.affine @ [last_x, last_y, number, 1])[:3]
    x_mm, y_mm, z_mm = phantom.spacing
    values = {
        "SOPClassUID": _CT_STORAGE,
        "SOPInstanceUID": generate_uid(entropy_srcs=[name, "instance", str(number)]),
        "StudyInstanceUID": generate_uid(entropy_srcs=[name, "study"]),
        "SeriesInstanceUID": generate_uid(entropy_srcs=[name, "series"]),
        "FrameOfReferenceUID": generate_uid(entropy_srcs=[name, "frame"]),
        "Modality": "CT",
        "PatientName": "Phantom^Synthetic",
        "PatientID": f"PHANTOM-{generate_uid(prefix='1.', entropy_srcs=[name])[-8:]}",
        "PatientBirthDate": "",
        "PatientSex": "",
        "StudyDate": "20200101",
        "StudyTime": "120000",
        "StudyID": "1",
        "AccessionNumber": "",
        "ReferringPhysicianName": "",
        "Manufacturer": "SAMF phantoms",
        "SeriesNumber": 1,
        "InstanceNumber": number + 1,
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "ImagePositionPatient": [float(f"{value:.6g}") for value in (-right, -front, top)],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [float(f"{y_mm:.6g}"), float(f"{x_mm:.6g}")],
        "SliceThickness": float(f"{z_mm:.6g}"),
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "RescaleSlope": 1,
        "RescaleIntercept": _INTERCEPT,
        "PixelData": stored.tobytes(),
        **tags,
    }
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = values["SOPClassUID"]
    meta.MediaStorageSOPInstanceUID = values["SOPInstanceUID"] or generate_uid(entropy_srcs=[name, str(number)])
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OW"
    return dataset
