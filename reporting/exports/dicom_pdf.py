"""Reports as a PDF in DICOM (Encapsulated PDF Storage), in a series of its own in the source's study."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from highdicom.base import SOPClass
from pydicom.dataset import Dataset
from pydicom.uid import EncapsulatedPDFStorage, ExplicitVRLittleEndian

from samf.model.report_samf import Report
from samf.reporting.exports.dicom_object import complete, general_values, quiet_libraries, save, unnamed
from samf.reporting.exports.pdf import TITLE, pdf_bytes
from samf.reporting.exports.source_series import UTF8, SourceSeries

_DESCRIPTION = "AI report, not verified (PDF)"


def write(reports: Sequence[Report], file: Path, series: SourceSeries) -> None:
    """Write reports as one encapsulated PDF of the source's study."""
    with quiet_libraries():
        document = encapsulated_pdf(reports, series)
    save(document, file)


def encapsulated_pdf(reports: Sequence[Report], series: SourceSeries) -> Dataset:
    """Return reports as an Encapsulated PDF dataset. The PDF names neither the patient nor the scan's file.

    Args:
        reports: one report, or the answers about one scan.
        series: that they were made from.
    """
    pdf = pdf_bytes(reports)
    (header,) = unnamed([series.header])
    values = general_values(reports, series, "dicom-pdf", hashlib.sha256(pdf).hexdigest())
    document = SOPClass(
        study_instance_uid=header.StudyInstanceUID,
        modality="DOC",
        sop_class_uid=EncapsulatedPDFStorage,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=UTF8,
        **values,
    )
    document.copy_patient_and_study_information(header)
    document.ConversionType = "WSD"
    document.BurnedInAnnotation = "YES" if header.get("BurnedInAnnotation") == "YES" else "NO"
    document.AcquisitionDateTime = ""
    document.ConceptNameCodeSequence = []
    document.DocumentTitle = TITLE
    document.VerificationFlag = "UNVERIFIED"
    document.MIMETypeOfEncapsulatedDocument = "application/pdf"
    document.EncapsulatedDocument = pdf + bytes(len(pdf) % 2)
    document.EncapsulatedDocumentLength = len(pdf)
    complete(document, reports, series, _DESCRIPTION)
    return document
