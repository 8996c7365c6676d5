"""`samf challenge`: the JSON that the organisers' evaluation reads, whatever happens to single scans."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from samf.cli.main import app
from samf.serving.challenge import Challenge, image_name, wrapped

UUID = "70a7d410-7d69-4cd8-b990-6a6d8f3c1d52"


@pytest.fixture
def folders(scans, tmp_path) -> tuple[Path, Path]:
    """Two scans as MetaImage by SimpleITK, whose voxels are the phantoms', and an empty folder."""
    source = tmp_path / "input"
    source.mkdir()
    for name in ("healthy", "ill"):
        sitk.WriteImage(sitk.ReadImage(str(scans / f"{name}.nii.gz")), str(source / f"{name}.mha"), name == "ill")
    return source, tmp_path / "output"


def test_two_metaimages_have_the_reports_of_their_scans(folders, scans, reporter):
    source, target = folders
    assert Challenge(source, target).run(reporter, {"do_sample": False}) == 0
    found = json.loads((target / "results.json").read_text(encoding="utf-8"))
    assert {**found, "generated_reports": 2} == {
        "name": "Generated reports",
        "type": "Report generation",
        "generated_reports": 2,
        "version": {"major": 1, "minor": 0},
    }
    own = {name: reporter(scans / f"{name}.nii.gz", do_sample=False).text for name in ("healthy", "ill")}
    assert {entry["input_image_name"]: entry["report"] for entry in found["generated_reports"]} == own
    assert [path.name for path in target.iterdir()] == ["results.json"]


def test_the_present_layout_as_the_evaluation_reads_it(folders, reporter):
    source, target = folders
    (source / "ill.mha").rename(source / f"batch_patient_{UUID}.mha")
    assert Challenge(source, target, "predictions").run(reporter, {"max_new_tokens": 3}) == 0
    value = json.loads((target / "predictions.json").read_text())[0]["outputs"][0]["value"]
    assert value["version"] == "1.0"
    assert [entry["input_image_name"] for entry in value["generated_reports"]] == [UUID, "healthy"]


def test_bad_scans_lose_no_others_and_the_exit_code_tells(folders, reporter, capsys):
    source, target = folders
    (source / "bad.mha").write_bytes((source / "ill.mha").read_bytes()[:5000])
    (source / "text.nii.gz").write_text("no scan")
    (source / "notes.txt").write_text("no scan either")
    assert Challenge(source, target).run(reporter, {"max_new_tokens": 3}) == 1
    found = json.loads((target / "results.json").read_text())
    assert [entry["input_image_name"] for entry in found["generated_reports"]] == ["healthy", "ill"]
    said = capsys.readouterr().err
    assert "bad.mha" in said and "text.nii.gz" in said and "notes" not in said and "2 of 4" in said
    (source / "healthy.mha").unlink(), (source / "ill.mha").unlink()
    assert Challenge(source, target / "none").run(reporter, {}) == 2


def test_a_run_that_was_stopped_is_resumed(folders, reporter):
    source, target = folders

    class Stopped(Exception):
        pass

    def stop_after_first(path, **options):
        if path.name == "ill.mha":
            raise KeyboardInterrupt
        return reporter(path, **options)

    with pytest.raises(KeyboardInterrupt):
        Challenge(source, target).run(stop_after_first, {"max_new_tokens": 3})
    kept = json.loads((target / "results.json").read_text())["generated_reports"]
    assert [entry["input_image_name"] for entry in kept] == ["healthy"]
    read = []

    def watched(path, **options):
        read.append(path.name)
        return reporter(path, **options)

    assert Challenge(source, target, resume=True).run(watched, {"max_new_tokens": 3}) == 0
    assert read == ["ill.mha"]
    assert json.loads((target / "results.json").read_text())["generated_reports"][0] == kept[0]


def test_names_keep_their_dots_and_equal_ones_are_refused(tmp_path):
    assert image_name(Path("1.2.840.6_B.NII.GZ"), "results") == "1.2.840.6_B"
    assert image_name(Path(f"b_p_{UUID}.nii.gz"), "results") == f"b_p_{UUID}"
    assert wrapped({"a": "é"}, "results")["generated_reports"] == [{"input_image_name": "a", "report": "é"}]
    for name in ("a.mha", "a.nii"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="also that of"):
        Challenge(tmp_path, tmp_path)


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_nothing_to_do_is_one_line(make, tmp_path):
    make(tmp_path / "input")
    done = CliRunner().invoke(app, ["challenge", "--input", str(tmp_path / "input"), "--output", str(tmp_path / "out")])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_needs_no_network_and_writes_nowhere_else(folders, tmp_path):
    """As the container runs it: a process with an empty home, no proxy, and sockets that fail."""
    source, target = folders
    code = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('a connection')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "sys.argv[0] = 'samf'\n"
        "from samf.cli.main import app; app()"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code, "challenge", "--input", str(source), "--output", str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((target / "results.json").read_text())["generated_reports"]) == 2
    assert not [path for path in home.rglob("*") if path.is_file() and "matplotlib" not in str(path)]
