"""The runs that several tests of this folder look at; each is made once, when a test asks for it."""

from functools import cache
from pathlib import Path

import pytest
from launch import run_script
from launchers.harness import SAMPLES, Run, accelerate, full_options, need, succeed, without_cpu
from small_run import prepare


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    # A report and two questions of each: epochs of three whole steps on any number of processes.
    return prepare(tmp_path_factory.mktemp("launchers"), train_patients=8)


@pytest.fixture(scope="session")
def one(work) -> Run:
    """The full run on one process."""
    run_script("train.py", 1, full_options(work, work / "one", 1, **SAMPLES))
    return Run(work / "one")


@pytest.fixture(scope="session")
def full(work):
    """Return a function that makes, once, the full run under a recipe."""

    @cache
    def run(recipe: str) -> Run:
        need(recipe)
        samples = SAMPLES if recipe in ("ddp", "deepspeed_zero2") else {}
        options = full_options(work, work / recipe, 2, **samples)
        succeed(accelerate(recipe), "train.py", without_cpu(options))
        return Run(work / recipe)

    return run
