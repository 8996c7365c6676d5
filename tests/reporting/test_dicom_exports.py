"""Reports as DICOM objects: read back by pydicom and SimpleITK, with the patient, study and places of the source."""

import dataclasses
import shutil
import zipfile

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_reports import (
    DICOM,
    HU,
    NAMES,
    PATIENT,
    POSITIONS,
    TEXT,
    assert_points,
    hospital_series,
    items_of,
    report_on,
    run_tool,
    texts_of,
)
from dicom_series import EachSlice, stack_positions, write_enhanced, write_series

from samf.model.report_samf import DISCLAIMER
from samf.reporting.exports import ExportError, export, writer
from samf.reporting.exports.plain_words import without_names
from samf.reporting.exports.record import read_reports

hd = pytest.importorskip("highdicom", reason="the extra hospital is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hospital_series(tmp_path_factory.mktemp("scans") / "PATHSECRET")


@pytest.fixture(scope="module")
def report(folder):
    return report_on(folder)


@pytest.fixture(scope="module")
def objects(report, tmp_path_factory):
    """The three objects of a report by format, as pydicom reads them."""
    files = export([report], tmp_path_factory.mktemp("out"), "scan", list(DICOM))
    return {name: pydicom.dcmread(file) for name, file in zip(DICOM, files, strict=True)}


# --- Patient and study ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", [*PATIENT])
def test_each_attribute_of_the_source_is_in_each_object(keyword, objects, folder):
    source = pydicom.dcmread(sorted(folder.iterdir())[0])
    assert str(source[keyword].value) == PATIENT[keyword]
    for name, made in objects.items():
        placed = keyword in ("FrameOfReferenceUID", "PositionReferenceIndicator")
        if placed and name != "seg":
            assert keyword not in made, "text has no place"
        else:
            assert str(made[keyword].value) == PATIENT[keyword], name


def test_objects_identify_nothing_that_the_source_does_not(objects, folder, report):
    source = pydicom.dcmread(sorted(folder.iterdir())[0])
    known = {str(element.value) for element in source if element.VR != "SQ"} | {""}
    own = {str(pydicom.dcmread(file).SOPInstanceUID) for file in folder.iterdir()}
    for name, made in objects.items():
        assert made.SOPClassUID == DICOM[name] == made.file_meta.MediaStorageSOPClassUID
        for element in made.iterall():
            if element.VR in ("PN", "DA", "AE", "AS"):
                today = element.keyword in ("ContentDate", "InstanceCreationDate", "SeriesDate")
                assert str(element.value) in known or today, (name, element.keyword)
            if element.VR == "UI" and element.keyword == "ReferencedSOPInstanceUID":
                assert str(element.value) in own
        written = made.EncapsulatedDocument if name == "dicom-pdf" else b""
        raw = str(made).encode() + written
        assert b"PATHSECRET" not in raw and b"SECRET" not in raw and report.provenance.source.encode() not in raw
        assert made.SeriesInstanceUID != source.SeriesInstanceUID and "not verified" in made.SeriesDescription
        assert made.Manufacturer == "SAMF" and made.ManufacturerModelName == "someone/samf-model"
        assert "0123456789abcdef" in made.SoftwareVersions
    assert len({made.SeriesInstanceUID for made in objects.values()}) == 3, "a series of its own for each kind"


@pytest.mark.parametrize("name", NAMES)
def test_names_in_their_own_character_sets_survive(name, tmp_path):
    charset, person, stored = NAMES[name]
    study = person.partition("=")[2] or person.replace("^", " ")
    source = hospital_series(
        tmp_path / "scan", SpecificCharacterSet=charset, PatientName=person, StudyDescription=study
    )
    raw = sorted(source.iterdir())[0].read_bytes()
    assert stored in raw, "the source is in its own character set"
    kinds = list(DICOM) if name in ("cyrillic", "turkish", "japanese") else ["sr"]
    for file in export([report_on(source, text="One.")], tmp_path / "out", "scan", kinds):
        made = pydicom.dcmread(file)
        assert made.SpecificCharacterSet == "ISO_IR 192"
        assert str(made.PatientName) == person and made.StudyDescription == study
        assert made.PatientName.original_string.rstrip(b" ") == person.encode("utf-8"), "byte by byte"
        if name in ("cyrillic", "japanese", "katakana"):
            dump = run_tool("dcmdump", "+P", "PatientName", file)
            assert f"[{person}]" in dump


@pytest.mark.parametrize("name", DICOM)
def test_validators_find_no_error(name, report, tmp_path):
    answers = [
        report,
        dataclasses.replace(report, question="Is there emphysema?", text="", sentences=(), evidence=None),
    ]
    (file,) = export(answers, tmp_path, "scan", [name])
    found = run_tool("dciodvfy", file)
    assert not [line for line in found.splitlines() if "Error" in line], found
    if name == "sr":
        assert "Findings" in run_tool("dsrdump", file)
    run_tool("dcmdump", file)


# --- SR ---------------------------------------------------------------------------------------------------------------


def test_sr_says_every_sentence_and_what_it_is(objects, report):
    document = objects["sr"]
    assert texts_of(document, "121071") == [sentence.text for sentence in report.sentences]
    assert (document.VerificationFlag, document.PreliminaryFlag, document.CompletionFlag) == (
        "UNVERIFIED",
        "PRELIMINARY",
        "COMPLETE",
    )
    comments = texts_of(document, "121106")
    assert comments[0].startswith(DISCLAIMER) and "Warning: the scan: axes 20° off" in comments
    assert report.checks()[0] in comments
    assert texts_of(document, "111001") == ["SAMF, model someone/samf-model"]
    assert texts_of(document, "111003")[0].endswith(", 0123456789abcdef")


def test_sr_points_to_the_source_images_that_the_evidence_crosses(objects, report, folder):
    """By plain loops: of each place the image whose plane is nearest; of an axial slice the image it shows."""
    heads = [pydicom.dcmread(file) for file in folder.iterdir()]

    def nearest(z):
        return min(heads, key=lambda head: abs(float(head.ImagePositionPatient[2]) - z)).SOPInstanceUID

    lowest = POSITIONS[0][2]
    found = [item for item in items_of(objects["sr"], "TEXT") if item.ConceptNameCodeSequence[0].CodeValue == "121071"]
    for item, evidence in zip(found, report.evidence.sentences, strict=True):
        expected = {nearest(evidence.peak.lps_mm[2])} if evidence.peak else set()
        for piece in evidence.top_slices:
            if piece.score > 0:
                axial = piece.plane == "axial"
                expected.add(nearest(lowest + 6.0 * piece.index if axial else piece.place.lps_mm[2]))
        assert {
            image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for image in items_of(item, "IMAGE")
        } == expected
        assert all(image.RelationshipType == "INFERRED FROM" for image in item.get("ContentSequence", []))
    counts = [len(list(items_of(item, "IMAGE"))) for item in found]
    assert counts[0] >= 2 and counts[-1] == 0, "the last sentence rests on nothing"


def test_answers_stand_under_their_questions(folder, tmp_path):
    answers = [report_on(folder, question, f"{question} Yes.") for question in ("Is it A?", "Is it B?")]
    (file,) = export(answers, tmp_path, "scan", ["sr"])
    containers = list(items_of(pydicom.dcmread(file), "CONTAINER"))
    assert [texts_of(item, "121062") for item in containers] == [["Is it A?"], ["Is it B?"]]
    assert [texts_of(item, "121071") for item in containers] == [["Is it A?", "Yes."], ["Is it B?", "Yes."]]


def test_the_same_again_is_the_same_object_and_anything_else_is_another(folder, tmp_path):
    report = report_on(folder, text="One. Two.")

    def uids(reports, kind):
        (file,) = export(reports, tmp_path, "scan", [kind])
        made = pydicom.dcmread(file)
        return made.SeriesInstanceUID, made.SOPInstanceUID

    first = {kind: uids([report], kind) for kind in DICOM}
    assert {kind: uids([report], kind) for kind in DICOM} == first
    model = dataclasses.replace(report, provenance=dataclasses.replace(report.provenance, model="someone/other"))
    assert not set(uids([model], "sr")) & set(first["sr"])
    other = report_on(folder, text="Something else.", evidence=False)
    for kind in ("sr", "dicom-pdf"):
        series, instance = uids([other], kind)
        assert series == first[kind][0] and instance != first[kind][1]


# --- PDF --------------------------------------------------------------------------------------------------------------


def test_the_encapsulated_pdf_is_a_pdf_with_the_key_slices_and_no_file_name(objects, report, tmp_path):
    made = objects["dicom-pdf"]
    pdf = made.EncapsulatedDocument[: made.EncapsulatedDocumentLength]
    assert pdf.startswith(b"%PDF") and pdf.rstrip().endswith(b"%%EOF") and made.BurnedInAnnotation == "NO"
    drawn = sum(len(sentence.slice_heat.numbers) for sentence in report.evidence.sentences)
    assert pdf.count(b"/Subtype /Image") >= drawn, "each slice with its heat"
    (tmp_path / "a.pdf").write_bytes(pdf)
    words = run_tool("pdftotext", tmp_path / "a.pdf", "-")
    flat = "".join(words.split())
    for sentence in report.sentences:
        assert "".join(sentence.text.split()) in flat
    assert DISCLAIMER in words and "SECRET" not in words and "Doe" not in words


# --- SEG --------------------------------------------------------------------------------------------------------------


def assert_in_register(file, report, source_files):
    """The SEG, as SimpleITK reads it, has the source's geometry, and the heat at each point of it."""
    made = sitk.ReadImage(str(file))
    scan = sitk.ReadImage([str(path) for path in source_files])
    assert made.GetSize() == scan.GetSize()
    assert np.allclose(made.GetSpacing(), scan.GetSpacing(), atol=1e-3)
    assert_points(made, report)
    ends = (0, scan.GetSize()[2] - 1)  # highdicom sorts from head to foot
    corners = [sorted(image.TransformIndexToPhysicalPoint((0, 0, k)) for k in ends) for image in (made, scan)]
    assert np.allclose(*corners, atol=1e-3)


def test_seg_is_in_register_with_the_scan(report, folder, tmp_path):
    (file,) = export([report], tmp_path, "scan", ["seg"])
    assert_in_register(file, report, sorted(folder.iterdir()))
    made = hd.seg.segread(file)
    assert made.segmentation_type.value == "FRACTIONAL" and made.number_of_segments == 1
    assert made.NumberOfFrames == len(POSITIONS) and made.ContentDescription == DISCLAIMER


def test_seg_and_sr_of_a_record_are_those_of_the_run(report, tmp_path):
    """The record has no arrays: heat comes from the NIfTI file, references from the places in the record."""
    named, _ = report.save_maps(tmp_path, "scan")
    first = [pydicom.dcmread(file) for file in export([named], tmp_path, "scan", ["sr", "seg", "json"])[:2]]
    (read,) = read_reports(tmp_path / "scan.json")
    assert read.evidence.maps() is None
    again = [pydicom.dcmread(file) for file in export([read], tmp_path, "scan", ["sr", "seg"])]
    assert [made.SOPInstanceUID for made in again] == [made.SOPInstanceUID for made in first]
    assert again[1].PixelData == first[1].PixelData
    (tmp_path / "scan.evidence.nii.gz").unlink()
    with pytest.raises(ExportError, match=r"scan\.evidence\.nii\.gz isn't there"):
        export([read], tmp_path, "scan", ["seg"])


# --- Sources ----------------------------------------------------------------------------------------------------------


def test_an_enhanced_multi_frame_file_is_referred_to_by_frames(tmp_path):
    tags = {**PATIENT, "SeriesInstanceUID": "1.2.826.0.1.99.7", "InstanceNumber": 1, "SeriesNumber": 1}
    file = write_enhanced(tmp_path / "scan.dcm", stack_positions(8), [1.0] * 8, **tags)
    report = report_on(file)
    sr, pdf = (pydicom.dcmread(path) for path in export([report], tmp_path, "scan", ["sr", "dicom-pdf"]))
    assert pdf.StudyInstanceUID == PATIENT["StudyInstanceUID"]
    (image, *_) = items_of(sr, "IMAGE")
    found = image.ReferencedSOPSequence[0]
    assert found.ReferencedSOPInstanceUID == pydicom.dcmread(file).SOPInstanceUID
    frames = {int(item.ReferencedSOPSequence[0].ReferencedFrameNumber) for item in items_of(sr, "IMAGE")}
    heights = {float(stack_positions(8)[frame - 1][2]) for frame in frames}
    peak = report.evidence.sentences[0].peak.lps_mm[2]
    assert min(abs(height - peak) for height in heights) <= 1.26
    (seg,) = export([report], tmp_path, "scan", ["seg"])
    assert_points(sitk.ReadImage(str(seg)), report)


def test_a_tilted_gantry(tmp_path):
    """SEG and SR refer to the slices as they were taken, not to the straightened volume."""
    tilted = [(x, y + 1.5 * k, z) for k, (x, y, z) in enumerate(POSITIONS)]
    report = report_on(hospital_series(tmp_path / "scan", positions=tilted))
    sr, seg = (pydicom.dcmread(file) for file in export([report], tmp_path, "scan", ["sr", "seg"]))
    frames = [item.PlanePositionSequence[0].ImagePositionPatient for item in seg.PerFrameFunctionalGroupsSequence]
    assert np.allclose(sorted((list(map(float, frame)) for frame in frames), key=lambda place: place[2]), tilted)
    assert seg.pixel_array.max() > 100 and list(items_of(sr, "IMAGE"))


def test_a_zip_and_a_list_of_files_and_a_compressed_series_are_found_again(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    expected = pydicom.dcmread(export([report_on(folder)], tmp_path, "a", ["sr"])[0])
    (file,) = export([report_on(tmp_path / "scan.zip")], tmp_path, "b", ["sr"])
    assert pydicom.dcmread(file).SOPInstanceUID == expected.SOPInstanceUID, "the same slices and words: the same object"
    files = sorted(folder.iterdir())
    listed = report_on(files)
    with pytest.raises(ExportError, match=r"can't be read again.*source="):
        export([listed], tmp_path, "c", ["sr"])
    (file,) = export([listed], tmp_path, "c", ["sr"], source=files)
    assert pydicom.dcmread(file).StudyInstanceUID == PATIENT["StudyInstanceUID"]
    compressed = tmp_path / "compressed"
    compressed.mkdir()
    for path in files:
        dataset = pydicom.dcmread(path)
        dataset.compress(pydicom.uid.RLELossless)
        dataset.SOPInstanceUID = pydicom.dcmread(path).SOPInstanceUID
        dataset.save_as(compressed / path.name)
    for file in export([report_on(compressed)], tmp_path, "d", ["sr", "seg"]):
        assert pydicom.dcmread(file).PatientID == PATIENT["PatientID"]


def test_the_series_that_was_read_is_found_among_others(tmp_path):
    hospital_series(tmp_path / "study")
    report = report_on(tmp_path / "study")
    names = [f"other{k}" for k in range(16)]
    positions = [(-60.0, -50.0, -30.0 + 3.0 * k) for k in range(16)]
    write_series(
        tmp_path / "study",
        positions,
        names=names,
        **{**PATIENT, "SeriesInstanceUID": "1.2.826.0.1.99.8", "PixelSpacing": [9.0, 7.0], "hu": HU},
    )
    (file,) = export([report], tmp_path, "scan", ["sr"])
    found = {
        item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in items_of(pydicom.dcmread(file), "IMAGE")
    }
    own = {str(pydicom.dcmread(path).SOPInstanceUID) for path in (tmp_path / "study").glob("slice*")}
    assert found and found <= own, "a larger series has come, and the report is about the first"


def test_uids_that_only_the_file_meta_information_has_and_odd_values(tmp_path):
    source = hospital_series(tmp_path / "scan", PatientSex="U", StudyDate="2024.05.06", AccessionNumber=None)
    for file in source.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.SOPInstanceUID = ""
        dataset.save_as(file, enforce_file_format=False)
    (file,) = export([report_on(source)], tmp_path, "scan", ["sr"])
    made = pydicom.dcmread(file)
    metas = {pydicom.dcmread(path).file_meta.MediaStorageSOPInstanceUID for path in source.iterdir()}
    assert {item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in items_of(made, "IMAGE")} <= metas
    assert (made.PatientSex, made.StudyDate, made.AccessionNumber) == ("", "20240506", "")


def change_a_slice(folder):
    file = sorted(folder.iterdir())[3]
    dataset = pydicom.dcmread(file)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset.save_as(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_a_slice, "no longer the DICOM series"),
        (lambda folder: sorted(folder.iterdir())[-1].unlink(), "no longer the DICOM series"),
        (shutil.rmtree, "can't be read again"),
        (lambda folder: [file.write_bytes(b"no DICOM") for file in folder.iterdir()], "no longer the DICOM series"),
    ],
)
def test_a_series_that_has_changed_or_gone_is_refused(change, message, tmp_path):
    source = hospital_series(tmp_path / "scan")
    report = report_on(source)
    change(source)
    for name in (*DICOM, "fhir"):
        with pytest.raises(ExportError, match=message) as caught:
            export([report], tmp_path / "out", "scan", [name])
        assert len(str(caught.value).splitlines()) == 1 and "Doe" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "nothing is begun"


def test_what_no_object_can_refer_to_is_refused(tmp_path):
    eight = range(8)
    for number, (tags, message) in enumerate(
        [
            ({"SOPInstanceUID": "1.2.3.4"}, "SOPInstanceUID of its own"),
            ({"StudyInstanceUID": ""}, "without StudyInstanceUID"),
            ({"PatientID": EachSlice(f"P{k % 2}" for k in eight)}, "several patients"),
        ]
    ):
        report = report_on(hospital_series(tmp_path / str(number), **tags))
        with pytest.raises(ExportError, match=message):
            export([report], tmp_path, "scan", ["sr"])
    report = report_on(hospital_series(tmp_path / "placeless", FrameOfReferenceUID=None))
    with pytest.raises(ExportError, match="FrameOfReferenceUID"):
        export([report], tmp_path, "scan", ["seg"])
    assert len(export([report], tmp_path, "scan", ["sr", "dicom-pdf"])) == 2


def test_reports_without_a_series_or_without_evidence_are_refused(report, folder, tmp_path):
    other = dataclasses.replace(report, provenance=dataclasses.replace(report.provenance, series=None))
    for name in DICOM:
        with pytest.raises(ExportError, match=rf"not read from DICOM.*format {name}.*txt, json, pdf, fhir"):
            export([other], tmp_path, "scan", [name])
    with pytest.raises(ExportError, match="without evidence. Add --evidence"):
        export([report_on(folder, evidence=False)], tmp_path, "scan", ["seg"])
    assert list(tmp_path.iterdir()) == []
    (file,) = export([report_on(folder, evidence=False)], tmp_path, "scan", ["sr"])
    made = pydicom.dcmread(file)
    assert not list(items_of(made, "IMAGE")) and texts_of(made, "121071")[0] in TEXT


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'samf\[hospital\]'"):
        writer("sr")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/Doe^Jane: axes 20° off", "the scan: axes 20° off"),
        ("/data/Doe^Jane/Doe1.dcm: damaged", "the scan: damaged"),
        ("left out 3 damaged (ValueError, e.g. Doe1.dcm), 2 scouts", "left out 3 damaged (ValueError), 2 scouts"),
        ("/tmp/samf-x/000001: cut short", "the scan: cut short"),
        ("air is -1024 HU, 3/4 of it; see /", "air is -1024 HU, 3/4 of it; see /"),
    ],
)
def test_names_of_files_do_not_leave_with_warnings(text, expected):
    assert without_names(text, "/data/Doe^Jane") == expected
    assert without_names(text, "/data/Doe^Jane and 3 more") == expected
