"""The wheel, installed outside of the clone and used in an empty folder, does what the clone does."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = ("recipes", "demo_model", "requirements.txt", "evaluation/report_generation", "web/assets", "web/space")
BUILD = "from setuptools import build_meta as backend; import sys; {}(sys.argv[1])"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, since building writes into them."""
    if find_spec("setuptools") is None:
        pytest.skip("setuptools, which builds the wheel, is not installed")
    sources, out = tmp_path_factory.mktemp("sources") / "samf", tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(REPOSITORY, sources, ignore=left_out)
    for kind in ("backend.build_sdist", "backend.build_wheel"):
        subprocess.run(
            [sys.executable, "-c", BUILD.format(kind), str(out)], cwd=sources, check=True, capture_output=True
        )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return folder


@pytest.fixture
def samf(site, tmp_path) -> Callable[..., str]:
    """Runs the installed command in an empty folder and returns its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> str:
        command = [sys.executable, str(site / "bin" / "samf"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"samf {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


def data_files() -> set[str]:
    files = [path for name in DATA for path in ([REPOSITORY / name] if "." in name else (REPOSITORY / name).rglob("*"))]
    return {
        path.relative_to(REPOSITORY).as_posix() for path in files if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_and_source_distribution_hold_all_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"samf/{name}" for name in data_files()} <= names
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "reporting").rglob("*.py")}
    assert {f"samf/{name}" for name in modules} <= names
    assert not [name for name in names if name.startswith(("samf/tests/", "samf/docs/", "samf/runs/"))]
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert data_files() <= held


def test_reports_without_a_clone(samf, site, tmp_path):
    samf("phantom", "phantom.nii.gz")
    assert "not for diagnosis" in samf("report", "phantom.nii.gz", "--out", "reports", "--format", "txt,pdf")
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {
        f"phantom.{end}" for end in ("txt", "json", "pdf")
    }
    made = json.loads((tmp_path / "reports" / "phantom.json").read_text())["provenance"]
    assert Path(made["model"]).is_relative_to(site)


def test_training_and_evaluation_without_a_clone(samf, site, tmp_path):
    """The demo trains by the packaged recipes and slice encoder; then one stage and the evaluation by themselves."""
    before = {path for path in site.rglob("*") if path.suffix != ".pyc"}
    few = ["--train_patients", "8", "--valid_patients", "3", "--max_steps", "2"]
    assert "reports: findings, macro-F1" in samf("demo", *few)
    data, model = "runs/demo/phantoms", "runs/again"
    start = ["--model", "runs/demo/2_language", "--slice_cache", "runs/demo/cache"]
    samf("train", "--config", "demo/3_report", *start, "--data", data, "--max_steps", "2", "--output_dir", model)
    few = ["--limit", "3", "--resamples", "0", "--max_new_tokens", "8"]
    samf("evaluate", "--model", model, "--data", data, "--split", "valid", "--output_dir", "runs/eval", *few)
    assert json.loads((tmp_path / "runs" / "eval" / "results.json").read_text())["tasks"]
    assert {path for path in site.rglob("*") if path.suffix != ".pyc"} == before
