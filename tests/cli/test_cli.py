"""The `samf` command, by its exit codes, its output and the files that it leaves."""

import json
import shutil

import nibabel
import numpy as np
import pytest
from tiny import model_for, tiny_processor
from typer.testing import CliRunner

from samf.cli.main import DOORS, app

run = CliRunner().invoke


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder, processor = tmp_path_factory.mktemp("model"), tiny_processor()
    model_for(processor, finding_names=["Emphysema"]).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def scans(tmp_path):
    """Two scans of one name in two folders, as data sets have them."""
    paths = []
    for seed in range(2):
        paths.append(tmp_path / "scans" / str(seed) / "ct_1.5mm.nii.gz")
        paths[-1].parent.mkdir(parents=True)
        hu = np.random.default_rng(seed).integers(-1000, 400, (20, 18, 16)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([-2.0, -2.0, 3.0, 1.0])), paths[-1])
    return paths


def test_reports_of_a_folder_are_written_and_resumed(model, scans, tmp_path):
    out = tmp_path / "out"
    options = ["--model", model, "--out", str(out), "--max-new-tokens", "6"]
    first = run(app, ["report", str(tmp_path / "scans"), *options])
    assert first.exit_code == 0 and first.stdout.count("not for diagnosis") == 2
    names = {"ct_1.5mm.json", "ct_1.5mm.txt", "ct_1.5mm_2.json", "ct_1.5mm_2.txt"}
    assert {file.name for file in out.iterdir()} == names
    sources = {json.loads((out / name).read_text())["provenance"]["source"] for name in names if name.endswith("json")}
    assert sources == set(map(str, scans))
    (out / "ct_1.5mm_2.json").unlink()
    again = run(app, ["report", str(tmp_path / "scans"), *options])
    assert again.exit_code == 0 and again.stdout.count("not for diagnosis") == 1 and "1 of 2 scans" in again.stderr


def test_reports_of_other_scans_questions_and_models_are_never_taken_for_these(model, scans, tmp_path):
    """Two scans of one name, and a question in the folder of a report: an error, and the file stays as it was."""
    options = ["--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    assert run(app, ["report", str(scans[0]), "--model", model, *options]).exit_code == 0
    before = (tmp_path / "out" / "ct_1.5mm.json").read_bytes()
    shutil.copytree(model, tmp_path / "other")
    for arguments, message in (
        (["report", str(scans[1]), "--model", model], f"is about {scans[0]}"),
        (["ask", str(scans[0]), "--question", "Is there emphysema?", "--model", model], "answers other questions"),
        (["report", str(scans[0]), "--model", str(tmp_path / "other")], f"was written by {model}"),
    ):
        done = run(app, [*arguments, *options])
        assert done.exit_code == 2 and message in done.stderr
    assert (tmp_path / "out" / "ct_1.5mm.json").read_bytes() == before


def test_failures_of_an_earlier_run_are_gone_when_all_scans_were_read(model, scans, tmp_path):
    whole = scans[0].read_bytes()
    scans[0].write_bytes(whole[:100])
    options = ["--model", model, "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    assert run(app, ["report", str(scans[0]), *options]).exit_code == 2
    assert (tmp_path / "out" / "failures.json").exists()
    scans[0].write_bytes(whole)
    assert run(app, ["report", str(scans[0]), *options]).exit_code == 0
    assert not (tmp_path / "out" / "failures.json").exists()


def test_evidence_is_written_next_to_the_report_and_resumed(model, scans, tmp_path):
    out = tmp_path / "out"
    options = ["--model", model, "--out", str(out), "--max-new-tokens", "6"]
    assert run(app, ["report", str(scans[0]), *options]).exit_code == 0
    done = run(app, ["report", str(scans[0]), *options, "--evidence"])  # the report is there, its evidence isn't
    assert done.exit_code == 0, done.output
    names = {"ct_1.5mm.json", "ct_1.5mm.txt", "ct_1.5mm.evidence.nii.gz", "ct_1.5mm.evidence.png"}
    assert {file.name for file in out.iterdir()} == names
    found = json.loads((out / "ct_1.5mm.json").read_text())
    assert set(found["evidence"]["files"]) == {name for name in names if "evidence" in name}
    assert len(found["evidence"]["sentences"]) == len(found["sentences"]) > 0
    image = nibabel.load(out / "ct_1.5mm.evidence.nii.gz")
    assert image.shape == (*found["evidence"]["grid_shape"], len(found["sentences"]))
    assert (out / "ct_1.5mm.evidence.png").read_bytes()[:4] == b"\x89PNG"
    again = run(app, ["report", str(scans[0]), *options, "--evidence"])
    assert again.exit_code == 0 and "1 of 1 scans" in again.stderr


def test_evidence_of_several_answers_is_numbered(model, scans, tmp_path):
    asked = ["--question", "Is there emphysema?", "--question", "Is the heart enlarged?"]
    options = ["--model", model, "--out", str(tmp_path / "out"), "--max-new-tokens", "4", "--evidence"]
    assert run(app, ["ask", str(scans[0]), *asked, *options]).exit_code == 0
    answers = json.loads((tmp_path / "out" / "ct_1.5mm.json").read_text())
    listed = [name for answer in answers for name in answer["evidence"]["files"]]
    assert set(listed) | {"ct_1.5mm.json"} == {file.name for file in (tmp_path / "out").iterdir()}
    assert len(set(listed)) == 4


def test_evidence_without_a_folder_is_one_line(model, scans):
    done = run(app, ["report", str(scans[0]), "--model", model, "--evidence"])
    assert done.exit_code == 2 and "--out" in done.stderr and len(done.stderr.splitlines()) == 1


def test_questions_and_json(model, scans):
    asked = ["--question", "Is there emphysema?", "--question", "Is the heart enlarged?"]
    done = run(app, ["ask", str(scans[0]), *asked, "--model", model, "--json", "--max-new-tokens", "4"])
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 0 and [answer["question"] for answer in answers] == asked[1::2]
    assert all(0 < answer["findings"]["Emphysema"] < 1 for answer in answers)


def test_a_bad_scan_among_good_ones_is_told_by_the_exit_code(model, scans, tmp_path):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no scan")
    options = ["--model", model, "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    some = run(app, ["report", str(scans[0]), str(bad), *options])
    assert some.exit_code == 1 and "bad.nii.gz" in some.stderr
    assert list(json.loads((tmp_path / "out" / "failures.json").read_text())) == [str(bad)]
    assert run(app, ["report", str(bad), *options]).exit_code == 2


@pytest.mark.parametrize(
    ("paths", "message"),
    [(["/none.nii.gz"], "no such file"), (["*.none"], "no file fits"), (["."], "no scan in it")],
)
def test_what_is_no_scan_is_one_line_and_exit_code_2(paths, message, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(app, ["report", *paths, "--model", model])
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_folder_without_a_model_is_one_line(scans, tmp_path):
    done = run(app, ["report", str(scans[0]), "--model", str(tmp_path)])
    assert done.exit_code == 2 and str(tmp_path) in done.stderr.splitlines()[-1]


def test_info(scans):
    facts = json.loads(run(app, ["info", str(scans[0]), "--json"]).stdout)
    hu = np.asarray(nibabel.load(scans[0]).dataobj)
    assert facts["shape"] == [20, 18, 16] and facts["spacing_mm"] == [2, 2, 3] and facts["coverage_mm"] == [40, 36, 48]
    assert facts["stored_orientation"] == "LPS" and facts["tilt_degrees"] == 0
    assert (facts["hu"][0], facts["hu"][2]) == (hu.min(), hu.max())
    assert "2 x 2 x 3 mm" in run(app, ["info", str(scans[0])]).stdout
    assert run(app, ["info", "/none.nii.gz"]).exit_code == 2


@pytest.mark.parametrize(("degrees", "tilt", "resampled"), [(5, 5, False), (20, 0, True)])
def test_info_tells_the_tilt_and_what_was_resampled(degrees, tilt, resampled, tmp_path):
    """Turned about the axis from foot to head."""
    turned, angle = np.eye(4), np.radians(degrees)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nibabel.save(nibabel.Nifti1Image(np.zeros((12, 12, 12), np.int16) - 900, turned), tmp_path / "tilted.nii.gz")
    facts = json.loads(run(app, ["info", str(tmp_path / "tilted.nii.gz"), "--json"]).stdout)
    assert facts["tilt_degrees"] == tilt
    assert any("resampled" in warning for warning in facts["warnings"]) == resampled


@pytest.mark.parametrize("name", sorted(DOORS))
def test_doors_hand_over_to_the_scripts(name):
    done = run(app, [name, "--help"])
    assert done.exit_code == 0 and "usage:" in done.stdout and "--" in done.stdout
