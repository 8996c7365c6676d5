"""What the listener reads of DICOM headers, without a word about what it finds."""

from io import BytesIO
from pathlib import Path
from typing import Any

from samf.model.ct_dicom_storage import PARSE_ERRORS

_IDENTITY = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"]


def read_header(file: Path | bytes) -> Any | None:
    """Return the UIDs of a DICOM file as a pydicom dataset with `file_meta`; None if it can't be read.

    Args:
        file: path, or the bytes of a whole file.
    """
    import pydicom

    source = BytesIO(file) if isinstance(file, bytes) else file
    try:
        header = pydicom.dcmread(source, stop_before_pixels=True, specific_tags=_IDENTITY)
        for keyword in _IDENTITY:  # values are decoded when they are asked for
            header.get(keyword)
    except PARSE_ERRORS:
        return None
    return header
