"""Runs that end early: non-finite losses or weights save nothing, unreadable data saves a checkpoint."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from launch import command, environment
from safetensors.torch import load_file
from torch import nn
from toy_training import toy
from transformers.trainer_utils import get_last_checkpoint

from samf.training.checkpoint_damage import find_damage
from samf.training.checkpoints import last_checkpoint
from samf.training.divergence import DivergenceError, LossWatch, has_finite_weights
from samf.training.trainer_base import train_to_end


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_loss_that_is_not_finite_ends_training_before_anything_is_saved(tmp_path):
    with pytest.raises(
        DivergenceError, match=r"step 4: the loss is nan.*checkpoint is .*checkpoint-3\. Lower learning_"
    ):
        train_to_end(toy(tmp_path, "nan", bad=7, save_steps=1, save_total_limit=2))
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The gradient of the last step isn't finite, which no loss shows."""
    with pytest.raises(DivergenceError, match="step 4: some weights aren't finite"):
        train_to_end(toy(tmp_path, "gradient", bad=7, max_steps=4))
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    weights = load_file(tmp_path / "checkpoint-2/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_on_a_device_the_loss_is_looked_at_before_it_is_used(tmp_path, monkeypatch):
    """Between reads nothing waits for the device; the test counts the reads."""
    looks = []
    first = LossWatch.first
    monkeypatch.setattr(LossWatch, "first", lambda self: looks.append(trainer.state.global_step) or first(self))
    trainer = toy(tmp_path, "nan", bad=0, save_steps=5, max_steps=6, logging_steps=3)
    # As on an accelerator: the check that is free on CPUs isn't.
    monkeypatch.setattr(type(trainer.args), "device", property(lambda self: NotTheCpu()))
    monkeypatch.setattr(trainer, "check_weights", lambda: None)
    monkeypatch.setattr(trainer, "_maybe_log_save_evaluate", trainer._maybe_log_save_evaluate)
    trainer.control.should_log = False
    for step, used in ((1, False), (2, False), (3, True)):
        trainer.state.global_step, trainer.control.should_log = step, used
        trainer.watch.note(torch.tensor(torch.nan), step)
        if used:
            with pytest.raises(DivergenceError, match="step 1: the loss is nan"):
                trainer._maybe_log_save_evaluate()
        else:
            monkeypatch.setattr("transformers.Trainer._maybe_log_save_evaluate", lambda *_, **__: None)
            trainer._maybe_log_save_evaluate()
    assert looks == [3]


class NotTheCpu:
    type = "cuda"


def test_the_watch_names_the_first_bad_micro_batch():
    watch = LossWatch()
    assert watch.first() is None
    for step, loss in ((1, 2.0), (2, torch.inf), (2, 1.0), (3, torch.nan)):
        watch.note(torch.tensor(loss), step)
    assert watch.first() == (2, torch.inf)


def test_frozen_weights_do_not_count():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.data[0, 0] = torch.inf
    assert not has_finite_weights(model)
    model[0].requires_grad_(False)
    assert has_finite_weights(model)


def test_data_that_cannot_be_read_leaves_the_last_step_in_a_checkpoint(tmp_path):
    """The batch of step 5 is fetched in step 4, one ahead. The resumed run equals an unbroken one."""
    with pytest.raises(OSError, match="row 9 is on a disk that went away"):
        train_to_end(toy(tmp_path / "broken", "data", bad=9, save_steps=2 + 100, max_steps=6))
    assert checkpoints(tmp_path / "broken") == ["checkpoint-3"]
    assert find_damage(tmp_path / "broken/checkpoint-3") is None
    train_to_end(toy(tmp_path / "broken", resume_from_checkpoint="last"))
    train_to_end(toy(tmp_path / "whole"))
    found, expected = (
        load_file(get_last_checkpoint(tmp_path / name) + "/model.safetensors") for name in ("broken", "whole")
    )
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_data_of_an_evaluation_leaves_its_step_in_a_checkpoint(tmp_path):
    with pytest.raises(OSError, match="row 3 is on a disk"):
        train_to_end(toy(tmp_path, "eval"))
    assert checkpoints(tmp_path) == ["checkpoint-3"] and find_damage(tmp_path / "checkpoint-3") is None


def test_a_worker_process_that_fails_leaves_a_checkpoint_too(tmp_path):
    with pytest.raises(OSError, match="row 9 is on a disk"):
        train_to_end(toy(tmp_path, "data", bad=9, save_steps=100, dataloader_num_workers=1))
    assert checkpoints(tmp_path) == ["checkpoint-3"]


@pytest.mark.slow
def test_a_run_that_fails_ends_although_its_workers_ignore_signals(tmp_path):
    """Python would send them SIGTERM at exit, and wait for them."""
    done = subprocess.run(
        [*command("tests/toy_training.py", 1, {}), str(tmp_path), "data"],
        env={**environment(), "WORKERS": "2"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 1 and "row 9 is on a disk that went away" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kept", "message"),
    [
        ("nan", ["checkpoint-2", "checkpoint-4"], "step 5: the loss is nan"),
        ("data", ["checkpoint-2", "checkpoint-3"], "row 9 is on a disk that went away"),
        ("eval", ["checkpoint-3"], "row 3 is on a disk that went away"),
    ],
)
def test_processes_stop_together(tmp_path, kind, kept, message):
    """When one process fails, the other doesn't wait for it, and both end with an error."""
    launcher = command("tests/toy_training.py", 2, {})
    done = subprocess.run(
        [*launcher, str(tmp_path), kind], env=environment(), capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 1 and message in done.stderr, done.stderr[-3000:]
    assert checkpoints(tmp_path) == kept
    newest = last_checkpoint(tmp_path)
    assert newest is not None and Path(newest).name == kept[-1]
    assert json.loads(Path(newest, "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == int(
        kept[-1][11:]
    )
