"""The lines about training: they run small on the CPU, and say what follows for CT-RATE."""

import pytest
import torch

from samf.benchmarks.train_lines import describe_steps, time_checkpointing, time_liger, time_training, training_batch
from samf.benchmarks.workloads import LineSkipped, Settings
from samf.training.flops import Work


def settings(size: str, tmp_path) -> Settings:
    return Settings(size, torch.device("cpu"), torch.float32, 0.0, tmp_path)


@pytest.mark.parametrize("stage", [time_training, time_checkpointing])
def test_steps_are_timed(stage, tmp_path):
    figures = {figure.name: figure for figure in stage(settings("tiny", tmp_path))}
    assert set(figures) == {"training step", "volumes", "tokens", "model operations"}  # no GPU, no MFU
    step = figures["training step"].values
    assert len(step) == 3
    assert figures["volumes"].values == pytest.approx([2 / seconds for seconds in step])
    assert figures["tokens"].values == pytest.approx([2 * 16 / seconds for seconds in step])


def test_a_step_at_full_size_says_how_long_an_epoch_takes(tmp_path):
    """47,149 reports and as many questions, four a step."""
    figures = describe_steps(settings("full", tmp_path), [2.0], Work(rows=4, volumes=4, tokens=2048), 3e12)
    by_name = {figure.name: figure.values[0] for figure in figures}
    assert by_name["an epoch of CT-RATE"] == pytest.approx(2 * 47149 / 4 * 2 / 3600)
    assert by_name["model operations"] == pytest.approx(1.5)


def test_the_batch_has_the_papers_length(tmp_path):
    batch = training_batch(settings("tiny", tmp_path))
    assert batch["pixel_values"].shape[:2] == (2, 6)
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [4, 4]
    assert batch["prompt_mask"].sum(dim=1).tolist() == [8, 8]
    assert not (batch["prompt_mask"] & (batch["labels"] != -100)).any()


def test_liger_is_skipped_without_a_gpu(tmp_path):
    with pytest.raises(LineSkipped, match="need a GPU"):
        time_liger(settings("tiny", tmp_path))
