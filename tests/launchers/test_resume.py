"""Runs of which one process was killed, resumed under the same recipe, on as many processes and on another number."""

import shutil
from pathlib import Path

import pytest
import torch
from launchers.harness import (
    RECIPES,
    STEPS,
    Run,
    accelerate,
    assert_same_weights,
    full_options,
    start,
    succeed,
    without_cpu,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_whose_process_was_killed_resumes_as_if_unbroken(work, full, recipe):
    unbroken, folder = full(recipe), work / f"{recipe}_killed"
    options = without_cpu(full_options(work, folder, 2))
    assert start(accelerate(recipe), "train.py", options, DIE_AT="1:4").returncode != 0
    assert (folder / "_facts/died").exists() and not (folder / f"checkpoint-{STEPS}").exists()
    succeed(accelerate(recipe), "train.py", {**options, "resume_from_checkpoint": "last"})
    resumed = Run(folder)
    for name in ("loss", "eval_own_loss", "eval_shuffled_loss"):
        assert resumed.logged(name) == unbroken.logged(name), name
    for file in ("model.safetensors", f"checkpoint-{STEPS}/model.safetensors"):
        weights, wanted = resumed.weights(file), unbroken.weights(file)
        assert all(torch.equal(weights[name], weight) for name, weight in wanted.items()), file


@pytest.fixture
def elsewhere(work, full, tmp_path):
    """Return a function that copies a checkpoint of a recipe's full run to a new folder and returns the path."""

    def copy(recipe: str, step: int = 2) -> Path:
        name = f"checkpoint-{step}"
        return Path(shutil.copytree(full(recipe).folder / name, tmp_path / name))

    return copy


@pytest.mark.parametrize(("recipe", "processes"), [("ddp", 1), ("fsdp2", 4)])
def test_a_run_resumes_on_another_number_of_processes(work, full, elsewhere, tmp_path, recipe, processes):
    unbroken, checkpoint = full(recipe), elsewhere(recipe)
    options = full_options(work, tmp_path, processes, resume_from_checkpoint=checkpoint)
    succeed(accelerate(recipe, processes=processes), "train.py", without_cpu(options))
    resumed = Run(tmp_path)
    for name in ("loss", "eval_own_loss", "eval_shuffled_loss"):
        assert resumed.logged(name) == pytest.approx(unbroken.logged(name), abs=1e-4), name
    file = f"checkpoint-{STEPS}/model.safetensors"
    assert_same_weights(resumed.weights(file), unbroken.weights(file), atol=2e-4)


@pytest.mark.parametrize("recipe", ["deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_resumes_only_on_as_many_processes(work, full, tmp_path, recipe):
    options = full_options(work, tmp_path, 1, resume_from_checkpoint=full(recipe).folder / "checkpoint-2")
    done = start(accelerate(recipe, processes=1), "train.py", without_cpu(options))
    assert done.returncode != 0
    assert "optimizer states are those of 2 processes, and this run has 1. Resume with --num_processes 2" in done.stderr
