"""`samf listen`, `samf watch` and `samf inbox` on the command line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from samf.cli.main import app
from samf.phantoms.dicom import write_series
from samf.phantoms.nifti import write_nifti
from samf.phantoms.volume import make_phantom
from samf.reporting.hospital.journal import Journal

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The commands silence libraries for the whole process."""
    monkeypatch.setattr("samf.cli.hospital._log_own_lines", lambda: None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--send-to", "PACS"], "--send-to PACS: expected AE@host:port"),
        (["--stow", "ftp://host"], "--stow ftp://host: expected the address of a DICOMweb service"),
        (["--format", "docx"], "--format docx: no such format"),
        (["--format", "seg"], "needs evidence"),
        (["--aet", "A" * 17], "1 to 16 ASCII characters"),
    ],
)
def test_options_that_can_t_be_used_are_said_before_the_model_is_loaded(options, words, tmp_path, monkeypatch):
    for name in ("pynetdicom", "highdicom", "dicomweb_client"):
        pytest.importorskip(name, reason="samf listen needs the extra hospital")
    monkeypatch.setattr("samf.cli.reporting.load_reporter", lambda *arguments: pytest.fail("loaded"))
    for command in (["listen"], ["watch", str(tmp_path)]):
        done = run(app, [*command, "--out", str(tmp_path / "out"), *options])
        assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_command_s_own_options_are_checked_before_the_model_is_loaded(tmp_path, monkeypatch):
    pytest.importorskip("pynetdicom", reason="samf listen needs the extra hospital")
    monkeypatch.setattr("samf.cli.reporting.load_reporter", lambda *arguments: pytest.fail("loaded"))
    out = ["--out", str(tmp_path / "out"), "--format", "txt"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for command, words in (
            (["listen", "--port", str(port)], f"127.0.0.1:{port}: can't listen there"),
            (["listen", "--port", "0", "--allow", "A" * 17], "--allow AAAA"),
            (["listen", "--port", "0", "--commit-to", "PACS"], "--commit-to PACS: expected AE@host:port"),
            (["watch", str(tmp_path / "none")], "no such folder; name the one that series are dropped into"),
        ):
            done = run(app, [*command, *out])
            assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_or_taken_is_one_line(tmp_path, monkeypatch):
    filelock = pytest.importorskip("filelock")
    pytest.importorskip("highdicom", reason="DICOM SR needs highdicom")
    monkeypatch.setattr("samf.cli.hospital._load", lambda asked: pytest.fail("nothing is reported here"))
    (tmp_path / "file").write_text("")
    done = run(app, ["watch", str(tmp_path), "--out", str(tmp_path / "file")])
    assert done.exit_code == 2 and "expected a folder" in done.stderr and done.stderr.count("\n") == 1

    (watched := tmp_path / "in").mkdir()
    (out := tmp_path / "out").mkdir()
    with filelock.FileLock(out / ".lock"):
        done = run(app, ["watch", str(watched), "--out", str(out)])
    assert done.exit_code == 2 and "another samf listen or samf watch" in done.stderr and done.stderr.count("\n") == 1


def test_inbox_counts_and_names_the_folder_that_is_none(tmp_path):
    done = run(app, ["inbox", str(tmp_path)])
    assert done.exit_code == 2 and "expected the --out folder" in done.stderr
    Journal(tmp_path).close()
    assert "series reported: 0 (0 reports)" in run(app, ["inbox", str(tmp_path)]).stdout
    found = json.loads(run(app, ["inbox", str(tmp_path), "--json"]).stdout)
    assert found["reported"] == 0 and found["failures"] == {"series": [], "refused": [], "undelivered": []}


@pytest.mark.slow
def test_watch_reports_what_is_dropped(tmp_path):
    """DICOM and NIfTI by the demo model in a process of its own, which SIGTERM ends."""
    pytest.importorskip("highdicom", reason="DICOM SR needs highdicom")
    phantom = make_phantom(np.random.default_rng(0), voxel_mm=9.0)
    folder, out = tmp_path / "in", tmp_path / "out"
    write_series(phantom, folder / "series", "watched")
    write_nifti(phantom, folder / "scan.nii.gz")
    (folder / "notes.txt").write_text("no scan")
    command = [sys.executable, "-m", "samf.cli.main", "watch", str(folder), "--out", str(out), "--quiet-time", "1"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(2400):
            found = run(app, ["inbox", str(out), "--json"])
            if found.exit_code == 0 and (counts := json.loads(found.stdout))["reported"] + counts["failed"] == 3:
                break
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert counts["reported"] == 2 and [item["series"] for item in counts["failures"]["series"]] == ["notes.txt"]
    (report,) = out.glob("reports/*/v1/report.sr.dcm")
    sources = [json.loads(file.read_text())["provenance"]["source"] for file in out.glob("reports/*/v1/report.json")]
    assert sorted(sources) == [str(folder / "scan.nii.gz"), str(folder / "series")]
    document = pydicom.dcmread(report)
    assert document.PatientName == "Phantom^Synthetic" and document.Modality == "SR"
    log = (tmp_path / "log").read_text()
    assert "Phantom^" not in log and "Traceback" not in log and "notes" not in log
