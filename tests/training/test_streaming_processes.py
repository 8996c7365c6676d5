"""Streaming from shards on two processes: every record once per epoch, and resuming to the sample after SIGKILL."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from launch import kill_script, run_script
from small_run import options_of, prepare

from samf import preprocess
from samf.data.shards import command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TASKS = ("report", "multiple_choice", "short_answer", "long_answer")
PER_STEP, EPOCHS = 6, 2


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("streaming"))
    encoder, cache = str(folder / "encoder"), str(folder / "cache")
    preprocess.main([str(folder / "phantoms"), "--cache", cache, "--processor", encoder, "--num_workers", "1"])
    sizes = ["--shard_mb", "0.04", "--num_workers", "1"]  # two volumes in each shard
    packed = [str(folder / "phantoms"), "--slice_cache", cache, "--processor", encoder, "--out", str(folder / "shards")]
    assert command.main([*packed, *sizes]) == 0
    return folder


def streaming(work: Path, folder: Path, processes: int) -> dict:
    options = options_of(
        work,
        "",
        output_dir=folder,
        data_shards=f"local://{work / 'shards'}",  # fetched like those of an object store
        shard_cache=folder / "fetched",
        shuffle_volumes=3,
        shard_prefetch=1,
        tasks=list(TASKS),
        num_train_epochs=EPOCHS,
        max_steps=-1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=PER_STEP // 3 // processes,
        dataloader_num_workers=1,
        logging_steps=1,
        aggregator_dropout=0.0,
        save_strategy="steps",
        save_steps=4,
    )
    del options["data"]
    return options


def seen(record: Path, processes: int) -> list[list[list[str]]]:
    """Return the ids of the batches of each rank."""
    files = [record.with_name(f"{record.name}.{rank}") for rank in range(processes)]
    return [[line.split() for line in file.read_text(encoding="utf-8").splitlines()] for file in files]


@pytest.fixture(scope="module")
def unbroken(work, tmp_path_factory):
    """Return the batches of each rank of an undisturbed run, and its folder."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECORD", str(folder / "batches"))
        run_script("tests/recorded_training.py", 2, streaming(work, folder / "out", 2))
    return seen(folder / "batches", 2), folder / "out"


def test_the_ranks_see_each_record_once_per_epoch(unbroken):
    batches, folder = unbroken
    steps = len(batches[0]) // EPOCHS
    epochs = []
    for epoch in range(EPOCHS):
        ids = [name for rank in batches for batch in rank[epoch * steps : (epoch + 1) * steps] for name in batch]
        assert set(Counter(ids).values()) == {1} and len(ids) == 54
        epochs.append(ids)
    assert set(epochs[0]) == set(epochs[1]) and epochs[0] != epochs[1]
    assert len(list((folder / "fetched").glob("*/train-*.tar"))) == 3


@pytest.mark.parametrize("processes", [2, 1])
def test_a_killed_run_resumes_to_the_sample(work, unbroken, tmp_path, monkeypatch, processes):
    """On as many processes the batches of each rank, on another number the records of each step are the undisturbed run's."""
    monkeypatch.setenv("RECORD", str(tmp_path / "killed"))
    folder = tmp_path / "out"
    kill_script(
        "tests/recorded_training.py", 2, streaming(work, folder, 2), folder / "checkpoint-4" / "trainer_state.json"
    )
    for later in folder.glob("checkpoint-*"):  # the run may have come further before it was killed
        if later.name != "checkpoint-4":
            shutil.rmtree(later)
    monkeypatch.setenv("RECORD", str(tmp_path / "resumed"))
    options = {**streaming(work, folder, processes), "resume_from_checkpoint": "last"}
    run_script("tests/recorded_training.py", processes, options)
    whole, before = unbroken[0], seen(tmp_path / "killed", 2)
    after = seen(tmp_path / "resumed", processes)
    assert [rank[:4] for rank in before] == [rank[:4] for rank in whole]
    if processes == 2:
        assert after == [rank[4:] for rank in whole]
    else:
        steps = [sorted(after[0][k] + after[0][k + 1]) for k in range(0, len(after[0]), 2)]
        assert steps == [sorted(first + second) for first, second in zip(whole[0][4:], whole[1][4:], strict=True)]
