"""Reports as FHIR R4: a transaction Bundle of a DiagnosticReport, Observations and the algorithm as their Device.

There is an Observation for each finding's probability and one for the text of each report or answer.

A Bundle, because findings and algorithm are to be searched for by themselves: R4 keeps contained resources for what has no
life of its own. A transaction, because a server takes it as it is (POST to its base address); every entry is created only
where none of its identifier exists, so that a second POST changes nothing. The patient is referred to by identifier: only the
hospital's systems make patients.

R4B's classes validate it; for these resources R4B's fields are R4's.
"""

import base64
import html
import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fhir.resources.R4B.bundle import Bundle
from fhir.resources.R4B.diagnosticreport import DiagnosticReport
from pydantic import ValidationError

from samf.model.report_samf import REPORT_QUESTION, Report
from samf.reporting.exports import ExportError
from samf.reporting.exports.dicom_object import MANUFACTURER, Algorithm, quiet_libraries
from samf.reporting.exports.finding_codes import SNOMED, finding_code
from samf.reporting.exports.pdf import TITLE, pdf_bytes
from samf.reporting.exports.plain_words import CAUTION, is_report, warnings_of
from samf.reporting.exports.source_series import SourceSeries
from samf.utils.files import atomic_write

STATUS = "preliminary"
_LOINC, _UCUM, _URI = "http://loinc.org", "http://unitsofmeasure.org", "urn:ietf:rfc:3986"
_SECTION = "http://terminology.hl7.org/CodeSystem/v2-0074"
_CATEGORY = "http://terminology.hl7.org/CodeSystem/observation-category"
_XHTML = "http://www.w3.org/1999/xhtml"
_NAME_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "samf:fhir")
_EMPTY = "(no text)"


def write(reports: Sequence[Report], file: Path, series: SourceSeries | None) -> None:
    """Write reports as one Bundle in JSON; without a series it refers to no patient and no study."""
    atomic_write(file, report_bundle(reports, series).model_dump_json(indent=2) + "\n")


def report_bundle(reports: Sequence[Report], series: SourceSeries | None) -> Bundle:
    """Return reports as a validated Bundle.

    Args:
        reports: one report, or the answers about one scan.
        series: that they were made from; None for a scan that isn't DICOM.

    Raises:
        ExportError: what comes out is no valid Bundle.
    """
    with quiet_libraries():
        values = _Resources(reports, series).bundle()
    pdf = base64.b64decode(_attachment(values))
    try:
        bundle = Bundle.model_validate(values)
        read = DiagnosticReport.model_validate_json(json.dumps(values["entry"][0]["resource"]))
    except ValidationError as error:
        places = ", ".join(
            ".".join(map(str, item["loc"])) for item in error.errors()[:3]
        )  # no values: they may be names
        raise ExportError(f"{reports[0].provenance.source}: not valid as FHIR R4 ({places}).") from None
    forms = read.presentedForm or []
    if [form.data for form in forms] != [pdf]:  # the library decodes leniently
        raise ExportError(f"{reports[0].provenance.source}: its PDF doesn't survive as FHIR.")
    return bundle


def _attachment(bundle: dict[str, Any]) -> str:
    return str(bundle["entry"][0]["resource"]["presentedForm"][0]["data"])


class _Resources:
    """The resources of one Bundle, which refer to each other by identifiers that equal reports give again."""

    def __init__(self, reports: Sequence[Report], series: SourceSeries | None):
        self.reports, self.series = reports, series
        self.algorithm = Algorithm.of(reports[0])
        scan = "" if series is None else "|".join(str(header.SOPInstanceUID) for header in series.headers)
        content = [f"{report.question}|{report.text}" for report in reports]
        findings = [f"{name}={probability:.6f}" for name, probability in sorted(reports[0].findings.items())]
        made = reports[0].provenance
        where = scan or f"{made.source}|{made.shape}|{made.spacing}"
        self.base = [where, *self.algorithm.parts, *content, *findings]
        self.about = self._about()

    def bundle(self) -> dict[str, Any]:
        """Return the Bundle as plain values."""
        device = self._entry("Device", self._device(), self._urn("device", *self.algorithm.parts))
        observations = [
            *(
                self._entry(
                    "Observation", self._probability(name, value, device), self._urn(*self.base, "finding", name)
                )
                for name, value in self.reports[0].findings.items()
            ),
            *(
                self._entry(
                    "Observation", self._answer(report, device), self._urn(*self.base, "answer", report.question)
                )
                for report in self.reports
            ),
        ]
        report = self._entry("DiagnosticReport", self._report(observations), self._urn(*self.base))
        return {"resourceType": "Bundle", "type": "transaction", "entry": [report, *observations, device]}

    def _urn(self, *parts: str) -> str:
        return f"urn:uuid:{uuid.uuid5(_NAME_SPACE, chr(0).join(parts))}"

    @staticmethod
    def _entry(kind: str, resource: dict[str, Any], urn: str) -> dict[str, Any]:
        """Return an entry that a server creates unless it has a resource of the same identifier."""
        named = {"resourceType": kind, **resource, "identifier": [{"system": _URI, "value": urn}]}
        request = {"method": "POST", "url": kind, "ifNoneExist": f"identifier={_URI}|{urn}"}
        return {"fullUrl": urn, "resource": named, "request": request}

    def _about(self) -> dict[str, Any]:
        """Return patient and date as the source has them."""
        if self.series is None:
            return {}
        header, about = self.series.header, dict[str, Any]()
        if patient := str(header.get("PatientID") or "").strip():
            identifier: dict[str, Any] = {"value": patient}
            if issuer := str(header.get("IssuerOfPatientID") or "").strip():
                identifier["assigner"] = {"display": issuer}
            about["subject"] = {"type": "Patient", "identifier": identifier}
        if day := str(header.get("StudyDate") or ""):  # without its time, which has no zone in DICOM
            about["effectiveDateTime"] = f"{day[:4]}-{day[4:6]}-{day[6:8]}"
        return about

    def _report(self, observations: Sequence[dict[str, Any]]) -> dict[str, Any]:
        text = _conclusion(self.reports)
        pdf = base64.b64encode(pdf_bytes(self.reports)).decode()
        resource: dict[str, Any] = {
            "text": {"status": "generated", "div": _narrative(self.reports)},
            "status": STATUS,
            "category": [{"coding": [{"system": _SECTION, "code": "RAD", "display": "Radiology"}]}],
            "code": {"coding": [{"system": _LOINC, "code": "24627-2", "display": "CT Chest"}], "text": TITLE},
            **self.about,
            "issued": _now(),
            "conclusion": f"{text}\n\n{CAUTION}",
            "presentedForm": [{"contentType": "application/pdf", "data": pdf, "title": TITLE}],
        }
        if observations:
            resource["result"] = [{"reference": entry["fullUrl"]} for entry in observations]
        if self.series is not None and self.series.header.StudyInstanceUID:
            resource["imagingStudy"] = [{"type": "ImagingStudy", "identifier": _study(self.series)}]
        return resource

    def _probability(self, name: str, value: float, device: dict[str, Any]) -> dict[str, Any]:
        words = f"{name}: probability that it is present, by a model"
        code = finding_code(name)
        coding = [] if code is None else [{"system": SNOMED, "code": code[0], "display": code[1]}]
        quantity = {"value": round(value, 6), "unit": "probability", "system": _UCUM, "code": "1"}
        return {
            **self._observed({**({"coding": coding} if coding else {}), "text": words}, device),
            "valueQuantity": quantity,
        }

    def _answer(self, report: Report, device: dict[str, Any]) -> dict[str, Any]:
        return {
            **self._observed({"text": TITLE if is_report(report) else report.question}, device),
            "valueString": report.text.strip() or _EMPTY,
        }

    def _observed(self, code: dict[str, Any], device: dict[str, Any]) -> dict[str, Any]:
        return {
            "status": STATUS,
            "category": [{"coding": [{"system": _CATEGORY, "code": "imaging", "display": "Imaging"}]}],
            "code": code,
            **self.about,
            "device": {"reference": device["fullUrl"]},
            "note": [{"text": CAUTION}],
        }

    def _device(self) -> dict[str, Any]:
        algorithm = self.algorithm
        versions = [("package", algorithm.version), ("model revision", algorithm.revision)]
        versions.append(("weights", algorithm.quantization))
        return {
            "status": "active",
            "manufacturer": MANUFACTURER,
            "deviceName": [
                {"name": "SAMF", "type": "manufacturer-name"},
                {"name": algorithm.name, "type": "model-name"},
            ],
            "type": {"text": "software: language model for chest CT, for research only"},
            "version": [{"type": {"text": kind}, "value": value} for kind, value in versions if value],
        }


def _study(series: SourceSeries) -> dict[str, str]:
    return {"system": "urn:dicom:uid", "value": f"urn:oid:{series.header.StudyInstanceUID}"}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _conclusion(reports: Sequence[Report]) -> str:
    """Return the text of reports; answers under their questions."""
    parts = []
    for report in reports:
        text = report.to_text().strip() or _EMPTY
        parts.append(text if report.question == REPORT_QUESTION else f"{report.question}\n{text}")
    return "\n\n".join(parts)


def _narrative(reports: Sequence[Report]) -> str:
    """Return reports as XHTML."""
    lines = [CAUTION, *(f"Warning: {text}" for text in warnings_of(reports))]
    for report in reports:
        lines += [] if is_report(report) else [report.question]
        lines += [sentence.text for sentence in report.sentences] or [_EMPTY]
        lines += report.checks()
    paragraphs = "".join(f"<p>{html.escape(_printable(line), quote=False)}</p>" for line in lines)
    return f'<div xmlns="{_XHTML}">{paragraphs}</div>'


def _printable(text: str) -> str:
    """Return a text without the control characters that XML doesn't allow."""
    return "".join(letter for letter in text if letter in "\t\n" or ord(letter) >= 32)
