"""Reports as FHIR: read back by the library's R4B models, with the texts, numbers and identifiers that went in."""

import dataclasses
import xml.etree.ElementTree as ET

import pytest
from dicom_reports import PATIENT, hospital_series, report_on

from samf.model.report_samf import DISCLAIMER
from samf.reporting.exports import export
from samf.reporting.exports.finding_codes import finding_code
from samf.reporting.exports.pdf import pdf_bytes

bundles = pytest.importorskip("fhir.resources.R4B.bundle", reason="the extra hospital is not installed")


def resources(reports, folder):
    (file,) = export(reports, folder, "scan", ["fhir"])
    assert file.name == "scan.fhir.json"
    bundle = bundles.Bundle.model_validate_json(file.read_text(encoding="utf-8"))
    found = {}
    for entry in bundle.entry:
        found.setdefault(entry.resource.get_resource_type(), []).append(entry)
    return bundle, found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hospital_series(tmp_path_factory.mktemp("scans") / "PATHSECRET")


def test_a_report_with_findings_and_study(folder, tmp_path):
    report = report_on(folder, evidence=False)
    bundle, found = resources([report], tmp_path)
    (entry,) = found["DiagnosticReport"]
    made = entry.resource
    assert bundle.type == "transaction" and made.status == "preliminary"
    assert made.imagingStudy[0].identifier.value == f"urn:oid:{PATIENT['StudyInstanceUID']}"
    assert made.imagingStudy[0].identifier.system == "urn:dicom:uid"
    assert made.subject.identifier.value == PATIENT["PatientID"] and str(made.effectiveDateTime) == "2024-05-06"
    assert made.code.coding[0].code == "24627-2"
    assert made.conclusion.startswith(report.to_text()) and DISCLAIMER in made.conclusion
    assert made.presentedForm[0].data == pdf_bytes([report])
    words = "".join(ET.fromstring(made.text.div).itertext())
    assert all(sentence.text in words for sentence in report.sentences) and DISCLAIMER in words
    raw = (tmp_path / "scan.fhir.json").read_text(encoding="utf-8")
    assert "SECRET" not in raw and "Doe" not in raw and "Jane" not in raw, "the patient by identifier only"


def test_observations_have_probabilities_codes_and_the_algorithm(folder, tmp_path):
    report = report_on(folder, evidence=False)
    bundle, found = resources([report], tmp_path)
    (device,) = found["Device"]
    probabilities, texts = {}, []
    for entry in found["Observation"]:
        made = entry.resource
        assert made.status == "preliminary" and made.device.reference == device.fullUrl
        assert DISCLAIMER in made.note[0].text
        if made.valueQuantity is None:
            texts.append(made.valueString)
        else:
            probabilities[made.code.text.partition(":")[0]] = (float(made.valueQuantity.value), made.code.coding)
    assert {name: value for name, (value, _) in probabilities.items()} == report.findings
    assert probabilities["Emphysema"][1][0].code == "87433001" and probabilities["Lung nodule"][1] is None
    assert texts == [report.text]
    names = {name.name for name in device.resource.deviceName}
    assert names == {"SAMF", "someone/samf-model"}
    assert "0123456789abcdef" in {version.value for version in device.resource.version}
    known = {entry.fullUrl for entry in bundle.entry}
    results = {reference.reference for reference in found["DiagnosticReport"][0].resource.result}
    assert results == {entry.fullUrl for entry in found["Observation"]} <= known


def test_a_second_post_would_create_nothing(folder, tmp_path):
    """Every entry is created only where its identifier isn't known, and equal reports give equal identifiers."""
    report = report_on(folder, evidence=False)
    first, second = (resources([report], tmp_path / name)[0] for name in "ab")
    for entry, again in zip(first.entry, second.entry, strict=True):
        assert entry.fullUrl == again.fullUrl and entry.request.ifNoneExist == again.request.ifNoneExist
        identifier = entry.resource.identifier[0]
        assert entry.request.ifNoneExist == f"identifier={identifier.system}|{identifier.value}"
    other = resources([dataclasses.replace(report, text="Other.")], tmp_path / "c")[0]
    assert other.entry[0].fullUrl != first.entry[0].fullUrl


def test_answers_and_a_scan_without_a_study(folder, tmp_path):
    answers = [report_on(folder, f"Is it {name}?", f"{name} <b>.", evidence=False) for name in "AB"]
    answers = [dataclasses.replace(one, provenance=dataclasses.replace(one.provenance, series=None)) for one in answers]
    _, found = resources(answers, tmp_path)
    made = found["DiagnosticReport"][0].resource
    assert made.imagingStudy is None and made.subject is None and made.effectiveDateTime is None
    assert made.conclusion.startswith("Is it A?\nA <b>.")
    said = {entry.resource.code.text: entry.resource.valueString for entry in found["Observation"]}
    assert said["Is it A?"] == "A <b>." and said["Is it B?"] == "B <b>."
    assert "A <b>." in "".join(ET.fromstring(made.text.div).itertext())


def test_an_anonymised_series_without_uids_has_a_patient_and_no_study(tmp_path):
    source = hospital_series(tmp_path / "scan", StudyInstanceUID="", SeriesInstanceUID="", FrameOfReferenceUID="")
    _, found = resources([report_on(source, evidence=False)], tmp_path)
    made = found["DiagnosticReport"][0].resource
    assert made.imagingStudy is None and made.subject.identifier.value == PATIENT["PatientID"]


def test_an_empty_report_is_valid(folder, tmp_path):
    empty = report_on(folder, text="", evidence=False, findings={}, disagreements=())
    _, found = resources([empty], tmp_path)
    assert "(no text)" in found["DiagnosticReport"][0].resource.conclusion and len(found["Observation"]) == 1


def test_codes_are_those_of_findings_that_mean_the_same():
    assert finding_code("Pleural effusion") == ("60046008", "Pleural effusion")
    assert finding_code("Lung nodule") is None, "the concept at hand means a solitary one"
    codes = pytest.importorskip("pydicom.sr.codedict").codes.SCT
    for name, concept in (
        ("Pleural effusion", codes.PleuralEffusion),
        ("Pericardial effusion", codes.PericardialEffusion),
        ("Lymphadenopathy", codes.Lymphadenopathy),
    ):
        assert finding_code(name)[0] == concept.value
