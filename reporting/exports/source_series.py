"""The DICOM series that reports are about: its headers, put in order once, and where its slices are."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage
from pydicom.valuerep import PersonName

from samf.model.ct_common import CTReadError
from samf.model.ct_dicom_storage import PARSE_ERRORS, contents, quiet_pydicom
from samf.model.ct_formats import find_dicom_series
from samf.model.ct_source import open_source
from samf.model.report_samf import Report
from samf.reporting.exports import FORMATS, WITHOUT_SERIES, ExportError, not_dicom

UTF8 = "ISO_IR 192"
# Attributes that DICOM wants even if they are empty.
_TYPE_2 = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"),
    *("StudyDate", "StudyTime", "ReferringPhysicianName"),
)
_DATES = {"PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"}
_TIMES = {"PatientBirthTime", "StudyTime", "SeriesTime", "AcquisitionTime", "ContentTime"}
_SEXES = ("M", "F", "O", "")


@dataclass(frozen=True)
class SourceSeries:
    """The slices of the volume that reports were made from.

    Attributes:
        headers: one per file, without voxels, normalised by `normalised_header`, in the order of their first slices.
        slices: for each slice of the volume its header's index, and its frame (from 1) in a multi-frame file, else None.
        positions: (N, 3), LPS mm of the slices' first pixels.
        normal: (3,), direction across the slices, LPS.
        pixels: (4, 4), column, row and slice index → LPS mm; of uneven slices as if they were even.
        fingerprint: as in the reports' provenance.
    """

    headers: tuple[Dataset, ...]
    slices: tuple[tuple[int, int | None], ...]
    positions: np.ndarray
    normal: np.ndarray
    pixels: np.ndarray
    fingerprint: str

    @property
    def header(self) -> Dataset:
        """Return the first header, which patient and study are taken from."""
        return self.headers[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the numbers of slices, rows and columns."""
        return len(self.slices), int(self.header.Rows), int(self.header.Columns)

    def slice_affine(self, number: int) -> np.ndarray:
        """Return column, row and 0 → LPS mm of one slice, (4, 4)."""
        affine = self.pixels.copy()
        affine[:3, 3] = self.positions[number]
        return affine

    def slice_at(self, lps: np.ndarray) -> int | None:
        """Return the number of the slice that a point (3,) in LPS mm lies in; None outside of the volume."""
        locations = self.positions @ self.normal
        distances = np.abs(locations - float(np.asarray(lps) @ self.normal))
        nearest = int(distances.argmin())
        steps = np.diff(np.sort(locations))
        reach = 0.5 * float(steps.max()) if len(steps) else np.inf
        return nearest if distances[nearest] <= reach + 0.1 else None


def series_of(reports: Sequence[Report], name: str, source: Any = None) -> SourceSeries | None:
    """Return the series that reports were made from, for one format; None where it needs none and there is none.

    Args:
        reports: about one scan.
        name: of the format.
        source: the scan, where it isn't what the reports' provenance names.

    Raises:
        ExportError: they weren't made from DICOM, or the series can't be found, or is another one now.
    """
    made = reports[0].provenance
    if made.series is None:
        if FORMATS[name].series == "optional":
            return None
        raise ExportError(not_dicom(made.source, name))
    return read_series(made.source if source is None else source, made.series, made.source)


def read_series(source: Any, fingerprint: str, name: str) -> SourceSeries:
    """Return the series of a source that has this fingerprint.

    Args:
        source: as `read_ct` takes it.
        fingerprint: of the provenance.
        name: of the source in messages.

    Raises:
        ExportError: it can't be read, holds another series now, or slices of several patients.
    """
    label = fingerprint.partition("-")[0]
    try:
        with open_source(source) as local:
            found = find_dicom_series(local, series_uid=label)
            if found is None or found.fingerprint != fingerprint:
                raise ExportError(
                    f"{name}: no longer the DICOM series that this report was made from (series {label}). Put that series "
                    f"back, or report again into another folder."
                )
            pieces = found.stack.slices
            files = list(dict.fromkeys(piece.pixels.file for piece in pieces))
            headers = tuple(normalised_header(file) for file in files)
    except (CTReadError, OSError, TypeError) as error:
        raise ExportError(
            f"{name}: the DICOM series {label} of this report can't be read again ({error}) Put it back, or name it by "
            f"source= in Python."
        ) from error
    _check_patient(headers, name)
    frames = [(files.index(piece.pixels.file), piece.frame + 1 if _has_frames(piece) else None) for piece in pieces]
    affine = found.stack.affine
    positions = np.array([affine[:3, 3] if piece.position is None else piece.position for piece in pieces])
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    return SourceSeries(headers, tuple(frames), positions, normal / np.linalg.norm(normal), affine, fingerprint)


def _has_frames(piece: Any) -> bool:
    return piece.pixels.frames > 1 or piece.stack != ""


def _check_patient(headers: Sequence[Dataset], name: str) -> None:
    """Raise ExportError for headers of several patients or studies."""
    for keyword, what in (("StudyInstanceUID", "studies"), ("PatientID", "patients")):
        if len({str(header.get(keyword, "")) for header in headers}) > 1:
            raise ExportError(f"{name}: its slices are of several {what}; expected one. Name the files of one.")


def check_references(series: SourceSeries, name: str) -> None:
    """Raise ExportError unless other objects can be filed with a series and refer to its files; `name` is the source's."""
    uids = [str(header.SOPInstanceUID) for header in series.headers]
    whole = all(header.StudyInstanceUID and header.SeriesInstanceUID for header in series.headers)
    if not whole or not all(uids) or len(set(uids)) < len(uids):
        raise ExportError(
            f"{name}: without StudyInstanceUID or SeriesInstanceUID, or without a SOPInstanceUID of its own for each file: "
            f"nothing can be filed with it or refer to it. Export the series again, or write {WITHOUT_SERIES}."
        )


def normalised_header(file: Path) -> Dataset:
    """Return the header of a DICOM file as other objects can copy from it.

    Text is decoded from the file's own character set and goes on as UTF-8. UIDs that only the file's meta information has
    are filled in. Dates, times and a sex that are not DICOM's become empty. Private and unreadable attributes are left out.
    """
    with contents(file) as (stream, _), quiet_pydicom():
        read = pydicom.dcmread(stream, stop_before_pixels=True, force=True)
        header = _readable(read)
        meta = getattr(read, "file_meta", Dataset())
    for keyword, own in (("SOPInstanceUID", "MediaStorageSOPInstanceUID"), ("SOPClassUID", "MediaStorageSOPClassUID")):
        if not header.get(keyword):
            setattr(header, keyword, str(meta.get(own, "") or ""))
    header.SOPClassUID = header.SOPClassUID or CTImageStorage
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
        setattr(header, keyword, str(header.get(keyword) or ""))
    for keyword in _TYPE_2:
        if header.get(keyword) is None:
            setattr(header, keyword, "")
    if header.PatientSex not in _SEXES:
        header.PatientSex = ""
    for keywords, repair in ((_DATES, _date), (_TIMES, _time)):
        for keyword in keywords & {element.keyword for element in header}:
            setattr(header, keyword, repair(str(header.get(keyword) or "")))
    return header


def _readable(header: Dataset) -> Dataset:
    """Return the standard attributes of a dataset that can be read, with their text decoded."""
    kept = Dataset()
    for tag in sorted(header.keys()):
        if tag.is_private or tag.group in (0x0000, 0x0002) or tag == 0x00080005:
            continue
        try:
            element = header[tag]
            if element.VR == "SQ":
                element = pydicom.DataElement(tag, "SQ", [_readable(item) for item in element.value or ()])
            elif element.VR == "PN":
                values = element.value if element.VM > 1 else [element.value]
                names = [PersonName(str(value or "")) for value in values]
                element = pydicom.DataElement(tag, "PN", names if len(names) > 1 else names[0])
            kept.add(element)
        except PARSE_ERRORS:
            continue
    return kept


def _date(text: str) -> str:
    digits = text.strip().replace(".", "").replace("-", "")
    try:
        return datetime.strptime(digits, "%Y%m%d").strftime("%Y%m%d")
    except ValueError:
        return ""


def _time(text: str) -> str:
    clean = text.strip().replace(":", "")
    whole, _, fraction = clean.partition(".")
    good = whole.isdigit() and len(whole) in (2, 4, 6) and (not fraction or (fraction.isdigit() and len(whole) == 6))
    return clean[:13] if good and whole < "24" else ""
