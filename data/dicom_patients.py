"""Patients of DICOM files and folders: digests of the PatientID in their headers."""

import hashlib
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from samf.data.file_kinds import has_volume_suffix, is_dicom_file
from samf.model.ct_dicom_files import walk_once
from samf.model.ct_dicom_storage import PARSE_ERRORS, pydicom
from samf.model.ct_download import is_address

logger = logging.getLogger(__name__)

_THREADS = 16  # each opens one file of a series, which means waiting on a network file system
_FILES_PER_FOLDER = 20  # of which at least one must be DICOM


def dicom_patients(paths: Iterable[str]) -> dict[str, str | None]:
    """Return the patients of those `paths` that may be DICOM: folders, and files without the suffix of another format.

    Returns:
        {path: digest of the PatientID}; None where there is no PatientID, or no DICOM file.
    """
    asked = [path for path in dict.fromkeys(paths) if not is_address(path) and not has_volume_suffix(path)]
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(asked, threads.map(_dicom_patient, asked), strict=True))


def _dicom_patient(path: str) -> str | None:
    """Return a digest of the PatientID of a DICOM file or folder; None where there is no PatientID, or no DICOM file."""
    if pydicom is None or is_address(path):
        return None
    file = _first_dicom_file(Path(path))
    if file is None:
        return None
    tags = ["PatientID", "IssuerOfPatientID"]
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=tags)
        number, issuer = (str(header.get(tag, "") or "").strip() for tag in tags)
    except PARSE_ERRORS as error:  # reading the volume reports it
        logger.debug("%s: no PatientID (%s)", file, type(error).__name__)
        return None
    return f"dicom-{digest(f'{issuer} {number}')}" if number else None


def _first_dicom_file(path: Path) -> Path | None:
    """Return the first DICOM file of a folder, or the file itself if it is one."""
    try:
        if path.is_file():
            return path if is_dicom_file(path) else None
        for parent, names in walk_once(path):
            candidates = [Path(parent, name) for name in names[:_FILES_PER_FOLDER]]
            if found := next(filter(is_dicom_file, candidates), None):
                return found
    except OSError as error:
        logger.debug("%s: can't be searched for DICOM files (%s)", path, error.strerror)
    return None


def digest(text: str) -> str:
    """Return twelve hexadecimal digits that replace an identifier in files and messages."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
