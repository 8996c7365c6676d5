"""Old module names work for one release, and say the new ones."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import samf
from samf.utils.moved import MOVED

ROOT = Path(samf.__file__).parent


@pytest.fixture
def imported(monkeypatch):
    """Import an old name as if for the first time; it is forgotten after the test."""

    def import_old(name: str):
        monkeypatch.delitem(sys.modules, name, raising=False)
        parent, _, attribute = name.rpartition(".")
        monkeypatch.delattr(importlib.import_module(parent), attribute, raising=False)
        return importlib.import_module(name)

    return import_old


@pytest.mark.parametrize(("old", "new"), MOVED.items(), ids=list(MOVED))
def test_every_new_name_is_a_module_and_no_old_one_is(old, new):
    assert importlib.util.find_spec(f"samf.{new}").origin.startswith(str(ROOT))
    path = ROOT.joinpath(*old.split("."))
    assert not path.with_suffix(".py").exists() and not (path / "__init__.py").exists()


@pytest.mark.parametrize(
    "old", ["data.tally", "data.text_files", "data.claims", "evaluation.statistics", "configuration_samf"]
)
def test_an_old_name_is_the_same_module_with_a_warning(imported, old):
    new = importlib.import_module(f"samf.{MOVED[old]}")
    spec = new.__spec__
    with pytest.warns(FutureWarning, match=f"samf.{old} is now samf.{MOVED[old]}"):
        found = imported(f"samf.{old}")
    assert found is new and sys.modules[f"samf.{MOVED[old]}"] is new
    assert new.__spec__ is spec and new.__name__ == f"samf.{MOVED[old]}"


def test_an_unknown_name_is_an_ordinary_error():
    with pytest.raises(ModuleNotFoundError, match=r"samf\.data\.nothing"):
        importlib.import_module("samf.data.nothing")


def test_an_old_command_runs_and_says_the_new_name():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "samf.data.phantom", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "python -m samf.data.phantom is now python -m samf.phantoms.dataset" in done.stderr
    assert done.stdout.startswith("usage: python -m samf.phantoms.dataset") and "--patients" in done.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("demo", "experiments.demo"),
        ("benchmark", "benchmarks.runner"),
        ("convert_published_checkpoint", "scripts.convert_published_checkpoint"),
    ],
)
def test_the_aliases_at_the_root_are_the_modules_themselves(old, new):
    assert importlib.import_module(f"samf.{old}") is importlib.import_module(f"samf.{new}")
