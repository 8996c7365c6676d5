"""What happens to a visitor's scan, with the demo model and without a browser: report, evidence, answers, files, errors."""

import json
import shutil
import threading
import time
import zipfile

import nibabel
import numpy as np
import pytest

from samf.cli.reporting import load_reporter
from samf.model.report_samf import Report
from samf.reporting.exports import FORMATS
from samf.web import visits as module
from samf.web.downloads import OVERLAY, kinds
from samf.web.visits import Visits
from samf.web.workflow import Workflow

NAME = "Doe^Jane"


@pytest.fixture(scope="module")
def reporter():
    return load_reporter(None, "cpu", None)


@pytest.fixture
def flow(reporter, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("samf.web.uploads._PHANTOM_MM", 5.0)  # coarser than on the page: quick
    visits = Visits()
    yield Workflow(reporter, visits, 10**8, "fast")
    visits.close()


def upload(flow, content, name="scan"):
    folder = flow.visits.uploads / f"hash-{name}"
    folder.mkdir()
    (folder / name).write_bytes(content)
    return {"files": [str(folder / name)]}


def last(updates):
    """The parts of the page as they are at the end."""
    page = {}
    for update in updates:
        page |= {name: value for name, value in vars(update).items() if value is not None}
    return page


def test_a_phantom_is_read_explained_asked_about_and_downloaded(flow, tmp_path):
    page = last(flow.report("a", {"phantom": "effusion"}))
    assert "Done in" in page["status"] and page["report"].count("<button") >= 5 and page["files"] is True
    assert "Pleural effusion" in page["findings"] and "knows synthetic phantoms only" in page["facts"]
    study = flow.visits.study("a")
    shown = nibabel.load(study.folder / "heat.nii.gz")
    assert shown.shape[3] == len(page["viewer"]["peaks"]) == len(study.report.sentences)
    number = page["viewer"]["first"]
    peak = page["viewer"]["peaks"][number]
    index = np.rint(np.linalg.inv(shown.affine) @ (*peak, 1))[:3].astype(int)
    assert shown.get_fdata()[(*index, number)] > 0.7, "the crosshair goes where the heat is"
    assert all((study.folder / f"sentence{n}.png").exists() for n in range(shown.shape[3]))
    answered = last(flow.ask("a", "  Is there a\npleural effusion? "))
    assert "Is there a pleural effusion?" in answered["answers"] and answered["answers"].count("<dd>") == 1
    assert last(flow.ask("a", "Is the heart enlarged?"))["answers"].count("<dd>") == 2
    for kind in (*FORMATS, OVERLAY):
        path, reason = flow.file("a", kind)
        assert (path is None) == bool(reason), kind
        assert path is None or path.is_relative_to(study.folder)
        assert str(flow.visits.root) not in reason
    told = json.loads((study.folder / "files" / "report.json").read_text())
    assert told["provenance"]["source"] == "scan" and Report.from_dict(told).text == study.report.text
    assert nibabel.load(study.folder / "files" / "report.evidence.nii.gz").shape[3] == shown.shape[3]
    flow.leave("a")
    assert list(flow.visits.studies.iterdir()) == [] and len(flow.turns) == 0
    assert "Choose a scan first" in last(flow.ask("a", "And now?"))["status"]
    assert flow.file("a", "txt") == (None, "There is no report yet.")


def test_bad_files_are_one_sentence_and_leave_nothing(flow, caplog):
    image = nibabel.Nifti1Image(np.zeros((9, 9, 9, 4), np.int16), np.eye(4)).to_bytes()
    for number, (content, words) in enumerate(
        ((b"Dear colleague, here is the report.\n" * 9, "This scan: "), (b"", "This scan"), (image, "4-D image"))
    ):
        page = last(flow.report("a", upload(flow, content, f"{NAME}{number}.nii.gz")))
        assert words in page["status"] and "Traceback" not in page["status"] and NAME not in page["status"]
        assert str(flow.visits.root) not in page["status"] and page["report"] == "" and page["viewer"] == {}
        assert list(flow.visits.uploads.iterdir()) == [] == list(flow.visits.studies.iterdir())
    for chosen in (None, 3, [], {}, {"phantom": "../x"}, {"files": ["/etc/passwd"]}, {"files": [{"path": {}}]}):
        page = last(flow.report("a", chosen))
        assert 'role="alert"' in page["status"], chosen
    assert len(flow.turns) == 0 and list(flow.visits.studies.iterdir()) == []
    assert NAME not in caplog.text


def test_real_dicom_as_zip_and_as_files_gives_one_report(flow, test_data, tmp_path):
    series = test_data / "dicom" / "cip_ct-64_79sl"
    archive = tmp_path / "series.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in series.iterdir():
            packed.write(file, f"{NAME}/{file.name}")
    flow.evidence = "none"
    zipped = last(flow.report("a", upload(flow, archive.read_bytes(), "z")))
    chosen = {"files": []}
    for file in sorted(series.iterdir()):
        chosen["files"] += upload(flow, file.read_bytes(), file.name)["files"]
    files = last(flow.report("b", chosen))
    assert zipped["report"] == files["report"] != ""
    assert "64 × 64 × 79" in zipped["facts"] and list(flow.visits.uploads.iterdir()) == []
    mr = [
        upload(flow, f.read_bytes(), f.name) for f in (test_data / "dicom/torchio_MR_labelled_CT_17sl_rot180").iterdir()
    ]
    page = last(flow.report("c", {"files": [file for part in mr for file in part["files"]]}))
    assert 'role="alert"' in page["status"] and str(flow.visits.root) not in page["status"]


def test_a_visitor_who_goes_gives_the_turn_back_and_leaves_nothing(flow):
    updates = flow.report("a", {"phantom": "normal"})
    for update in updates:
        if update.report and "draft" in update.report:
            break
    updates.close()
    flow.leave("a")
    flow.evidence = "none"
    page = last(flow.report("b", {"phantom": "normal"}))  # isn't held up
    assert "Done in" in page["status"]
    flow.leave("b")
    assert list(flow.visits.studies.iterdir()) == []


def test_evidence_is_given_up_when_the_visitor_goes(flow, monkeypatch):
    ended = threading.Event()

    def search(report, encoded, mode, before_pass):
        try:
            for _ in range(6000):
                before_pass()
                time.sleep(0.01)
        finally:
            ended.set()

    monkeypatch.setattr(flow.reporter, "explain", search)
    updates = flow.report("a", {"phantom": "normal"})
    for update in updates:
        if update.status and "rests on …" in update.status:
            break
    assert not ended.is_set()
    updates.close()
    assert ended.wait(5)


def test_what_nobody_expected_is_a_sentence_without_the_error_s_words(flow, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError(f"{NAME} in an error")

    monkeypatch.setattr(flow.reporter, "encode", broken)
    page = last(flow.report("a", {"phantom": "normal"}))
    assert "Something went wrong" in page["status"] and NAME not in page["status"] + caplog.text
    assert "RuntimeError" in caplog.text and list(flow.visits.studies.iterdir()) == []


def test_a_writer_that_fails_says_so_for_its_format_only(flow, monkeypatch):
    flow.evidence = "none"
    list(flow.report("a", {"phantom": "normal"}))
    shutil.rmtree(flow.visits.study("a").folder / "files", ignore_errors=True)

    def refuse(*_):
        raise ValueError(f"{flow.visits.root}/studies/x/scan: a NIfTI; expected DICOM.")

    monkeypatch.setattr("samf.web.downloads.export", refuse)
    assert flow.file("a", "txt") == (None, "This scan: a NIfTI; expected DICOM.")
    monkeypatch.setattr("samf.web.downloads.export", lambda *_: {}[NAME])
    assert flow.file("a", "pdf") == (None, "This file can't be made of this scan.")
    for kind in (OVERLAY, "no such", None, 3):
        assert flow.file("a", kind)[0] is None
    assert set(kinds()) == {*FORMATS, OVERLAY}
