"""The `samf` command, by its exit codes, its output and the files that it leaves."""

import json
import logging
import os
import shutil
import subprocess
import sys

import huggingface_hub
import nibabel
import numpy as np
import pytest
from hub_stand_in import HubStandIn
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from samf.cli import reporting
from samf.cli.doors import DOORS
from samf.cli.errors import CHATTY
from samf.cli.main import app
from samf.cli.reporting import _is_quantised
from samf.model.model_card import is_generated
from samf.model.report_samf import Report
from samf.phantoms.findings import Finding
from samf.phantoms.volume import make_phantom
from samf.utils.packaged import DEMO_MODEL, HANDLER

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def levels_of_loggers():
    """The command silences libraries, in a test for all tests that follow."""
    before = {name: logging.getLogger(name).level for name in CHATTY}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def scans(tmp_path):
    """Two scans of one name in two folders, as data sets have them."""
    paths = []
    for seed in range(2):
        paths.append(tmp_path / "scans" / str(seed) / "ct_1.5mm.nii.gz")
        paths[-1].parent.mkdir(parents=True)
        hu = np.random.default_rng(seed).integers(-1000, 400, (20, 18, 16)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([-4.0, -4.0, 5.0, 1.0])), paths[-1])
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
    (out / "ct_1.5mm.evidence.png").unlink()
    done = run(app, ["report", str(scans[0]), *options, "--evidence", "--json"])  # a file of it is gone: answered again
    assert json.loads(done.stdout) == json.loads((out / "ct_1.5mm.json").read_text()) == found
    assert {file.name for file in out.iterdir()} == names


def test_evidence_of_several_answers_is_numbered(model, scans, tmp_path):
    asked = ["--question", "Is there emphysema?", "--question", "Is the heart enlarged?"]
    options = ["--model", model, "--out", str(tmp_path / "out"), "--max-new-tokens", "4", "--evidence"]
    assert run(app, ["ask", str(scans[0]), *asked, *options]).exit_code == 0
    answers = json.loads((tmp_path / "out" / "ct_1.5mm.json").read_text())
    listed = [name for answer in answers for name in answer["evidence"]["files"]]
    assert {*listed, "ct_1.5mm.json", "ct_1.5mm.txt"} == {file.name for file in (tmp_path / "out").iterdir()}
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


def save(path, hu, spacing=(4.0, 4.0, 4.0)):
    nibabel.save(nibabel.Nifti1Image(hu.astype(np.int16), np.diag([*spacing, 1.0])), path)
    return str(path)


def head(shape=(60, 60, 50)) -> np.ndarray:
    """A skull with a brain in air, on a head rest of foam."""
    x, y, z = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in shape), indexing="ij")
    radius = np.sqrt((x / 0.7) ** 2 + (y / 0.9) ** 2 + z**2)
    hu = np.where(y < -0.6, -930.0, -1000.0)
    hu[radius < 1] = 1100
    hu[radius < 0.9] = 30
    return hu


def test_the_demo_model_is_used_and_says_what_it_knows(tmp_path):
    """Without --model; its caution is one line for the reader, and stays with what is written."""
    scan, out = str(tmp_path / "phantom.nii.gz"), tmp_path / "out"
    assert run(app, ["phantom", scan, "--seed", "3", "--finding", "Lung nodule"]).stdout.startswith(f"{scan}: Lung nod")
    done = run(app, ["report", scan, "--out", str(out), "--max-new-tokens", "12"])
    assert (
        done.exit_code == 0 and done.stderr.splitlines()[0].startswith("Warning: ") and "phantoms only" in done.stderr
    )
    report = json.loads((out / "phantom.json").read_text())
    assert report["provenance"]["model"] == str(DEMO_MODEL) and any(
        "phantoms only" in text for text in report["warnings"]
    )
    assert "phantoms only" in (out / "phantom.txt").read_text()
    checks = Report.from_dict(report).checks()
    assert done.stdout.split() == " ".join([report["text"], *checks, report["disclaimer"]]).split(), "streamed"


def test_formats_are_written_and_later_ones_come_from_the_record(model, scans, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = ["report", str(scans[0]), "--model", model, "--out", str(out), "--max-new-tokens", "4", "--format"]
    assert run(app, [*options, "pdf"]).exit_code == 0
    assert {file.name for file in out.iterdir()} == {"ct_1.5mm.json", "ct_1.5mm.pdf"}
    assert (out / "ct_1.5mm.pdf").read_bytes().startswith(b"%PDF")
    monkeypatch.setattr(reporting, "_answer", None)  # a second answering would fail
    assert run(app, [*options, "txt,pdf"]).exit_code == 0
    assert json.loads((out / "ct_1.5mm.json").read_text())["text"] in (out / "ct_1.5mm.txt").read_text()


@pytest.mark.parametrize(("options", "message"), [(["doc", "--out", "x"], "txt, json, pdf"), (["pdf"], "--out FOLDER")])
def test_formats_that_nothing_can_be_done_with_are_one_line(options, message, scans, model):
    done = run(app, ["report", str(scans[0]), "--model", model, "--format", *options])
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def make_bad_input(kind, folder) -> str:
    path = folder / "bad.nii.gz"
    if kind == "text file":
        (folder / "notes.txt").write_text("no scan\n" * 50)
        return str(folder / "notes.txt")
    if kind == "MR":  # no negative values, dark background
        return save(path, np.random.default_rng(0).integers(0, 900, (60, 60, 50)) * (head() > -900))
    if kind == "head":
        return save(path, head())
    chest = make_phantom(np.random.default_rng(0), findings=[Finding("Emphysema")])
    return save(path, chest.hu[:, :, 20:23], chest.spacing)  # three slices


@pytest.mark.parametrize("kind", ["text file", "MR", "head", "three slices"])
def test_what_is_no_chest_ct_is_one_line_and_exit_code_2(kind, tmp_path):
    """By the demo model too, whose caution comes with a report only."""
    done = run(app, ["report", make_bad_input(kind, tmp_path), "--max-new-tokens", "4"])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stdout == "" and str(tmp_path) in done.stderr and "Traceback" not in done.output


def test_any_region_can_be_asked_for(model, tmp_path):
    path = make_bad_input("head", tmp_path)
    done = run(app, ["report", path, "--model", model, "--max-new-tokens", "4", "--any-region"])
    assert done.exit_code == 0 and "the report may mean nothing" in done.stderr
    assert "no chest" in run(app, ["info", path]).stdout


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


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_quantised_model_reports_and_says_what_computes(name, model, scans, tmp_path):
    """Its reports aren't taken for those of the whole model, or the other way round."""
    options = ["--model", model, "--device", "cpu", "--max-new-tokens", "4", "--json", "--out", str(tmp_path / "out")]
    done = run(app, ["report", str(scans[0]), *options, "--quantize", name])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["provenance"]["versions"]["quantization"] == f"samf {name}"
    assert f"{name} weights" in done.stderr and "activations" in done.stderr
    whole = run(app, ["report", str(scans[0]), *options])
    assert whole.exit_code == 2 and f"samf {name}, not by None" in whole.stderr


def test_threads_may_sleep_for_a_model_that_is_saved_quantised(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, saved in (
        ("rounded", {"quantization_config": {"quant_method": "samf", "bits": 4}}),
        ("whole", {"quantization_config": None}),
        ("other", {"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("list", []),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(saved), encoding="utf-8")
        assert _is_quantised(str(tmp_path / name), None) == (name == "rounded")
    (tmp_path / "whole" / "config.json").write_text("{", encoding="utf-8")
    assert not _is_quantised(str(tmp_path / "whole"), None)
    assert not _is_quantised("owner/model", None) and not _is_quantised(str(tmp_path / "no folder"), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize", "int3"], "expected int4 or int8"),
        (
            ["--quantize", "int4", "--device", "meta"],
            "--device cpu; on a GPU, from_pretrained takes quantization_config=",
        ),
    ],
)
def test_quantising_to_what_does_not_exist_is_one_line(options, message, model, scans):
    done = run(app, ["report", str(scans[0]), "--model", model, *options])
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_info(scans):
    facts = json.loads(run(app, ["info", str(scans[0]), "--json"]).stdout)
    hu = np.asarray(nibabel.load(scans[0]).dataobj)
    assert facts["shape"] == [20, 18, 16] and facts["spacing_mm"] == [4, 4, 5] and facts["coverage_mm"] == [80, 72, 80]
    assert facts["stored_orientation"] == "LPS" and facts["tilt_degrees"] == 0
    assert (facts["hu"][0], facts["hu"][2]) == (hu.min(), hu.max())
    assert "4 x 4 x 5 mm" in run(app, ["info", str(scans[0])]).stdout
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


def test_every_command_has_help_and_the_app_a_version():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    own = {"report", "ask", "info", "phantom", "recipe", "push"}
    assert names == {*own, "serve", "api", "challenge", "listen", "watch", "inbox", *DOORS}
    for name in names - set(DOORS):
        done = run(app, [name, "--help"])
        assert done.exit_code == 0 and f"samf {name}" in done.stdout.replace("root", "samf")
    shown = run(app, ["--help"]).stdout
    assert all(name in shown for name in names) and "--install-completion" in shown
    assert run(app, ["--version"]).stdout.startswith("samf")


def test_completion_knows_the_commands():
    """As a shell asks for it, and without the libraries of models, which would take seconds."""
    words = {"COMP_WORDS": "samf rep", "COMP_CWORD": "1", "_SAMF_COMPLETE": "complete_bash"}
    code = (
        "import sys; sys.argv = ['samf']; from samf.cli.main import app\n"
        "try: app()\nfinally: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **words}, capture_output=True, text=True)
    assert done.stdout.split() == ["report"] and done.returncode == 0, done.stderr


def _packages_after(*arguments: str) -> set[str]:
    """Return the top-level packages that a command of its own process has imported when it ends."""
    code = (
        "import sys; sys.argv = ['samf', *sys.argv[1:]]; from samf.cli.main import app\n"
        "try: app()\nfinally: sys.stderr.write(' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize("arguments", [[], ["report"]])
def test_help_imports_no_library_of_models(arguments):
    assert not _packages_after(*arguments, "--help") & {"torch", "transformers", "numpy", "huggingface_hub", "jinja2"}


def test_reading_a_format_imports_no_library_of_another(tmp_path):
    np.save(tmp_path / "scan.npy", np.full((8, 8, 8), -900, np.int16))
    packages = _packages_after("info", str(tmp_path / "scan.npy"))
    assert "numpy" in packages and not packages & {"nibabel", "pydicom", "SimpleITK", "torch", "transformers"}


@pytest.mark.slow
def test_a_report_imports_nothing_of_training_and_evaluation(scans, model):
    packages = _packages_after("report", str(scans[0]), "--model", str(model), "--max-new-tokens", "4")
    unused = {"datasets", "pandas", "matplotlib", "sklearn", "nltk", "peft", "lightly", "SimpleITK", "onnx", "gradio"}
    assert "torch" in packages and not packages & unused


def test_recipes_are_listed_and_printed():
    assert "demo/3_report" in run(app, ["recipe"]).stdout
    assert "base: ct_rate\n" in run(app, ["recipe", "ct_rate_ao2d"]).stdout
    unknown = run(app, ["recipe", "ct_rate_a2od"])
    assert unknown.exit_code == 2 and "Did you mean ct_rate_ao2d" in unknown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"), [(["a.nii"], "ends in .nii.gz"), (["a.nii.gz", "--finding", "x"], "Cardiom")]
)
def test_phantoms_that_cant_be_made_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(app, ["phantom", *arguments])
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_same_seed_and_finding_give_the_same_phantom(tmp_path):
    for name in ("a", "b"):
        run(app, ["phantom", str(tmp_path / f"{name}.nii.gz"), "--normal", "--seed", "5"])
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_push_uploads_a_whole_repository_with_the_folders_card(model, tmp_path):
    """With the demo model, which has no code in its folder: the Hub's copy has."""
    with HubStandIn() as hub:
        environment = {**os.environ, **hub.environment(tmp_path)}

        def push(*arguments: str) -> subprocess.CompletedProcess:
            code = "import sys; sys.argv[0] = 'samf'; from samf.cli.main import app; app()"
            command = [sys.executable, "-c", code, "push", *arguments]
            return subprocess.run(command, env=environment, capture_output=True, text=True)

        done = push(str(DEMO_MODEL), "someone/demo", "--private", "--with-handler", "--check", "files")
        assert done.returncode == 0, done.stderr
        files = hub.files("someone/demo")
        revision = hub.repositories["someone/demo"].oid("main")
    assert hub.repositories["someone/demo"].private
    assert f"someone/demo at {revision}: {len(files) - 1} files have the checksums" in done.stdout  # not .gitattributes
    assert {"modeling_samf.py", "pipeline_samf.py", "requirements.txt", "tokenizer.json", "model.safetensors"} <= set(
        files
    )
    assert files["handler.py"] == HANDLER.read_bytes()
    card = files["README.md"].decode()
    assert (
        'repository = "someone/demo"' in card and "phantoms only" in card and "macro-F1" in card and is_generated(card)
    )
    assert "AutoModelForImageTextToText" in json.loads(files["config.json"])["auto_map"]
