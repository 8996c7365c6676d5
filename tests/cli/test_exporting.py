"""Formats of `samf report` that need a DICOM series or evidence: refused early, written late, and said so."""

import json

import nibabel
import numpy as np
import pytest
from dicom_reports import hospital_series
from typer.testing import CliRunner

from samf.cli import reporting
from samf.cli.main import app

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom", reason="the extra hospital is not installed")
run = CliRunner().invoke


@pytest.fixture
def series(tmp_path):
    return hospital_series(tmp_path / "scans" / "series")


@pytest.fixture
def nifti(tmp_path):
    path = tmp_path / "scans" / "other" / "scan.nii.gz"
    path.parent.mkdir(parents=True)
    hu = np.random.default_rng(0).integers(-1000, 400, (20, 18, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([-4.0, -4.0, 5.0, 1.0])), path)
    return path


def options(model, tmp_path, formats):
    common = ["--model", model, "--max-new-tokens", "4", "--any-region"]
    return [*common, "--out", str(tmp_path / "out"), "--format", formats]


def test_all_formats_of_a_dicom_series(model, series, tmp_path):
    formats = "txt,pdf,sr,dicom-pdf,seg,fhir"
    done = run(app, ["report", str(series), *options(model, tmp_path, formats), "--evidence"])
    assert done.exit_code == 0, done.output
    endings = ("txt", "json", "pdf", "sr.dcm", "pdf.dcm", "seg.dcm", "fhir.json", "evidence.png", "evidence.nii.gz")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"series.{ending}" for ending in endings}
    made = json.loads((tmp_path / "out" / "series.json").read_text())["provenance"]
    assert made["series"].count("-") == 1 and "1.2.826" not in json.dumps(made), "no UIDs"


def test_what_is_not_dicom_is_refused_before_the_model_is_loaded(nifti, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "load_reporter", None)
    done = run(app, ["report", str(nifti), *options("model", tmp_path, "txt,sr")])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert f"{nifti}: not read from DICOM" in done.stderr and "fhir" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_heat_map_without_evidence_is_refused_before_the_model_is_loaded(series, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "load_reporter", None)
    done = run(app, ["report", str(series), *options("model", tmp_path, "seg")])
    assert done.exit_code == 2 and "add --evidence" in done.stderr and len(done.stderr.splitlines()) == 1


def test_in_a_folder_of_mixed_scans_each_has_its_own_error(model, series, nifti, tmp_path):
    done = run(app, ["report", str(tmp_path / "scans"), *options(model, tmp_path, "sr")])
    assert done.exit_code == 1 and f"{nifti}: not read from DICOM" in done.stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"series.json", "series.sr.dcm", "failures.json"}
    assert list(json.loads((tmp_path / "out" / "failures.json").read_text())) == [str(nifti)]


def test_formats_that_are_missing_come_from_the_record_and_the_source(model, series, tmp_path, monkeypatch):
    assert run(app, ["report", str(series), *options(model, tmp_path, "txt")]).exit_code == 0
    monkeypatch.setattr(reporting, "_answer", None)  # a second answering would fail
    assert run(app, ["report", str(series), *options(model, tmp_path, "sr")]).exit_code == 0
    file = tmp_path / "out" / "series.sr.dcm"
    assert pydicom.dcmread(file).PatientID == "HOSP-4711"
    file.unlink()
    sorted(series.iterdir())[0].unlink()
    done = run(app, ["report", str(series), *options(model, tmp_path, "sr")])
    assert done.exit_code == 2 and "no longer the DICOM series" in done.stderr and not file.exists()


def test_a_format_that_fails_leaves_the_others(model, tmp_path):
    """Without a frame of reference there is no SEG; the report is kept, and the exit code tells."""
    series = hospital_series(tmp_path / "placeless", FrameOfReferenceUID=None)
    done = run(app, ["report", str(series), *options(model, tmp_path, "txt,seg,sr"), "--evidence"])
    assert done.exit_code == 2 and "FrameOfReferenceUID" in done.stderr
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"placeless.txt", "placeless.json", "placeless.sr.dcm", "failures.json"} <= names
    assert "placeless.seg.dcm" not in names
