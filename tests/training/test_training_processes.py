"""Several processes against one, sharded weights, and runs that were killed, against unbroken ones."""

import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from launch import command, environment, kill_script, logged, run_script
from safetensors.torch import load_file
from small_run import options_of, prepare

from samf.training.checkpoints import last_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 2, "lora_dropout": 0.0, "lora_embeddings": True}], ids=["full", "LoRA"]
)
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_two_processes_train_as_one(work, tmp_path, strategy, options):
    options = {
        **options,
        "max_steps": 20,
        "learning_rate": 3e-3,
        "aggregator_dropout": 0.0,
        "train_sampling_strategy": strategy,
        "logging_steps": 1,
        "dataloader_drop_last": True,
    }
    for processes in (1, 2):
        settings = options_of(work, "", **options, per_device_train_batch_size=4 // processes)
        run_script("train.py", processes, {**settings, "output_dir": tmp_path / str(processes)})
    one, two = logged(tmp_path / "1"), logged(tmp_path / "2")
    assert len(one) == 20 and max(one) - min(one) > 0.5  # it learns
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4, (one, two)
    name = "adapter_model.safetensors" if "lora_rank" in options else "model.safetensors"
    weights, others = load_file(tmp_path / "1" / name), load_file(tmp_path / "2" / name)
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=0, atol=2e-3, msg=key)


def test_two_processes_that_accumulate_train_as_one_that_does(work, tmp_path):
    """Two processes with two batches per step train as one with four; with the findings' loss and checkpointing."""
    options = {"max_steps": 6, "learning_rate": 3e-3, "aggregator_dropout": 0.0, "logging_steps": 1}
    options |= {"finding_names": ["Cardiomegaly", "Pleural effusion"], "gradient_checkpointing": True}
    options |= {"train_sampling_strategy": "random", "dataloader_drop_last": True}
    for processes in (1, 2):
        sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // processes}
        settings = options_of(work, "", **options, **sizes)
        run_script("train.py", processes, {**settings, "output_dir": tmp_path / str(processes)})
    one, two = logged(tmp_path / "1"), logged(tmp_path / "2")
    assert len(one) == 6
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4, (one, two)


def test_processes_train_on_batches_without_a_volume(work, tmp_path):
    """A process whose record has only text doesn't use parts that the other process's record uses."""
    options = {"vqa_files": work / "phantoms/dataset/vqa/train_text_vqa.json", "gradient_checkpointing": True}
    options |= {"train_parts": ["aggregator", "fusion", "language_model"], "cache_embeddings": True}
    options |= {"slice_cache": tmp_path / "cache", "aggregator_dropout": 0.0, "max_steps": 8, "logging_steps": 1}
    settings = options_of(work, "", **options, per_device_train_batch_size=1)
    run_script("train.py", 2, {**settings, "output_dir": tmp_path / "out"})
    assert len(logged(tmp_path / "out")) == 8


def test_processes_train_on_batches_without_labels_of_findings(work, tmp_path):
    """One process has a record with only unknown findings, the other one with known ones."""
    shutil.copytree(work / "phantoms", tmp_path / "phantoms")
    table = tmp_path / "phantoms/dataset/multi_abnormality_labels/train_predicted_labels.csv"
    header, *rows = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join([header, *rows[::2]]) + "\n", encoding="utf-8")
    options = {"finding_names": ["Cardiomegaly", "Pleural effusion"], "gradient_checkpointing": True}
    options |= {"data": tmp_path / "phantoms", "aggregator_dropout": 0.0, "max_steps": 12, "logging_steps": 1}
    options |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "random"}
    run_script("train.py", 2, options_of(work, "", **options, output_dir=tmp_path / "out"))
    losses = logged(tmp_path / "out")
    assert len(losses) == 12 and all(math.isfinite(loss) for loss in losses)


def test_a_signal_to_the_whole_group_leaves_a_checkpoint(work, tmp_path, monkeypatch):
    """Schedulers and terminals send the signal to the loader's workers too, which end with their parent."""
    monkeypatch.setenv("RECORD", str(tmp_path / "batches"))
    options = options_of(work, "", max_steps=100_000, dataloader_num_workers=2, output_dir=tmp_path / "out")
    process = subprocess.Popen(
        command("tests/recorded_training.py", 1, options),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    batches, started = tmp_path / "batches.0", time.monotonic()
    try:
        while process.poll() is None and time.monotonic() - started < 120:
            # Two workers prepare two batches each before the first step.
            if batches.is_file() and len(batches.read_text(encoding="utf-8").splitlines()) > 5:
                break
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=120) == 128 + signal.SIGTERM
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert last_checkpoint(tmp_path / "out") is not None
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.parametrize(("processes", "strategy"), [(1, "group_by_length"), (1, "random"), (2, "random")])
def test_a_killed_run_resumes_as_if_unbroken(work, tmp_path, processes, strategy, monkeypatch):
    """SIGKILL at a random step after the first epoch, with dropout: the losses and the order of records stay the same."""
    step = random.SystemRandom().randrange(14, 24)
    options = options_of(
        work,
        "",
        max_steps=26,
        per_device_train_batch_size=4 // processes,
        learning_rate=1e-3,
        train_sampling_strategy=strategy,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        lora_rank=2,
        lora_dropout=0.1,
    )
    script, broken = "tests/recorded_training.py", {**options, "output_dir": tmp_path / "broken"}
    monkeypatch.setenv("RECORD", str(tmp_path / "unbroken"))
    run_script(script, processes, {**options, "output_dir": tmp_path / "whole", "save_strategy": "no"})
    monkeypatch.setenv("RECORD", str(tmp_path / "killed"))
    kill_script(script, processes, broken, when=tmp_path / "broken" / f"checkpoint-{step}")
    monkeypatch.setenv("RECORD", str(tmp_path / "resumed"))
    run_script(script, processes, {**broken, "resume_from_checkpoint": "last"})

    losses = logged(tmp_path / "whole")
    assert len(losses) == 26 and len(set(losses)) == 26
    assert logged(tmp_path / "broken") == losses, f"killed at {step}"
    for rank in range(processes):
        order, start, rest = (
            Path(f"{tmp_path / name}.{rank}").read_text(encoding="utf-8").splitlines()
            for name in ("unbroken", "killed", "resumed")
        )
        assert start == order[: len(start)]
        assert 26 - step - 1 <= len(rest) - (len(order) - 26) <= 26 - step + 2, f"killed at {step}"
        assert rest == order[-len(rest) :]
    weights, others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(others[key], value) for key, value in weights.items())
