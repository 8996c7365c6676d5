"""Reports on real DICOM series as DICOM and FHIR, read back and validated by other tools."""

import json
import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_reports import DICOM, NAMES, assert_points, items_of, report_on, run_tool, texts_of
from typer.testing import CliRunner

from samf.cli.main import app
from samf.reporting.exports import ExportError, export

pytest.importorskip("highdicom", reason="the extra hospital is not installed")

ATTRIBUTES = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientBirthTime", "PatientSex", "PatientComments"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "AccessionNumber", "StudyID", "StudyDescription"),
    "ReferringPhysicianName",
)
SERIES = {"cip_ct-64_79sl": 79, "totalseg_abdomen_20sl_j2k": 20}


@pytest.fixture
def filed(test_data, tmp_path):
    """A function that returns a real series; the anonymised JPEG 2000 one, whose UIDs are empty, with a study."""

    def find(name):
        folder = test_data / "dicom" / name
        first = pydicom.dcmread(min(folder.iterdir()), stop_before_pixels=True)
        if first.StudyInstanceUID:
            return folder
        with pytest.raises(ExportError, match="without StudyInstanceUID"):
            export([report_on(folder, text="One.", evidence=False)], tmp_path, "scan", ["sr"])
        (tmp_path / name).mkdir()
        for file in folder.iterdir():
            dataset = pydicom.dcmread(file)
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.826.0.1.99.5", "1.2.826.0.1.99.6"
            dataset.save_as(tmp_path / name / file.name, enforce_file_format=False)
        return tmp_path / name

    return find


@pytest.mark.parametrize("name", ["cip_ct-64_79sl", pytest.param("totalseg_abdomen_20sl_j2k", marks=pytest.mark.slow)])
def test_objects_of_a_real_series_are_valid_and_have_its_attributes(name, filed, tmp_path):
    folder = filed(name)
    sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in sorted(folder.iterdir())]
    uids = {source.get("SOPInstanceUID") or source.file_meta.MediaStorageSOPInstanceUID for source in sources}
    assert len(uids) == SERIES[name]
    report = report_on(folder)
    for kind, file in zip(DICOM, export([report], tmp_path, "scan", list(DICOM)), strict=True):
        made = pydicom.dcmread(file)
        for keyword in ATTRIBUTES:
            assert str(made.get(keyword) or "") == str(sources[0].get(keyword) or ""), (kind, keyword)
        found = run_tool("dciodvfy", file)
        assert not [line for line in found.splitlines() if "Error" in line], found
        run_tool("dcmdump", file)
        if kind == "sr":
            run_tool("dsrdump", file)
            assert texts_of(made, "121071") == [sentence.text for sentence in report.sentences]
            images = {str(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) for item in items_of(made, "IMAGE")}
            assert images and images <= set(map(str, uids))
        if kind == "seg":
            assert made.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
            image = sitk.ReadImage(str(file))
            assert_points(image, report)
            rows, columns = map(float, sources[0].PixelSpacing)
            heights = sorted(float(source.ImagePositionPatient[2]) for source in sources)
            step = (heights[-1] - heights[0]) / (len(heights) - 1)
            assert np.allclose(image.GetSpacing(), (columns, rows, step), atol=1e-3)
            assert image.GetSize() == (sources[0].Columns, sources[0].Rows, len(sources))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cyrillic", "turkish", "japanese", "katakana"])
def test_a_real_series_under_other_names(name, test_data, tmp_path):
    charset, person, stored = NAMES[name]
    (tmp_path / "scan").mkdir()
    for file in sorted((test_data / "dicom" / "cip_ct-64_79sl").iterdir()):
        dataset = pydicom.dcmread(file)
        dataset.SpecificCharacterSet, dataset.PatientName = charset, person
        dataset.save_as(tmp_path / "scan" / file.name)
    assert stored in (tmp_path / "scan" / "IMG0001.dcm").read_bytes()
    for file in export([report_on(tmp_path / "scan", text="One.")], tmp_path / "out", "scan", list(DICOM)):
        made = pydicom.dcmread(file)
        assert str(made.PatientName) == person
        assert made.PatientName.original_string.rstrip(b" ") == person.encode("utf-8")
        assert f"[{person}]" in run_tool("dcmdump", "+P", "PatientName", file)


@pytest.mark.slow
def test_samf_report_writes_every_format_of_a_real_series(test_data, tmp_path):
    folder = tmp_path / "cip_ct-64_79sl"
    shutil.copytree(test_data / "dicom" / "cip_ct-64_79sl", folder)
    formats = "txt,json,pdf,sr,dicom-pdf,seg,fhir"
    arguments = ["report", str(folder), "--out", str(tmp_path / "out"), "--format", formats, "--evidence"]
    done = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "60"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "cip_ct-64_79sl.json").read_text())
    document = pydicom.dcmread(tmp_path / "out" / "cip_ct-64_79sl.sr.dcm")
    assert texts_of(document, "121071") == [sentence["text"] for sentence in record["sentences"]]
    assert len(list(items_of(document, "IMAGE"))) >= len(record["sentences"])
    for file in (tmp_path / "out").glob("*.dcm"):
        found = run_tool("dciodvfy", file)
        assert not [line for line in found.splitlines() if "Error" in line], found
    run_tool("dsrdump", tmp_path / "out" / "cip_ct-64_79sl.sr.dcm")
