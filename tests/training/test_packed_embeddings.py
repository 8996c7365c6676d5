"""train.py from packed embeddings: the weights that the local cache of embeddings gives, also after an interruption."""

import shutil
from pathlib import Path

import pytest
import torch
from launch import flags, kill_script, run_script
from safetensors.torch import load_file
from small_run import options_of, prepare

from samf import preprocess, train
from samf.data.shards import command

RECORDS = 6
STEPS, SAVED = 8, 2  # three steps per epoch: the checkpoint is in the midst of one


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Return a folder with a cache of embeddings, shards of them, and components, without the scans."""
    folder = prepare(tmp_path_factory.mktemp("embeddings"), train_patients=RECORDS)
    data, encoder, cache = (str(folder / name) for name in ("phantoms", "encoder", "cache"))
    assert preprocess.main([data, "--cache", cache, "--embeddings", encoder, "--num_workers", "1"]) == 0
    packed = [data, "--slice_cache", cache, "--embeddings", encoder, "--out", str(folder / "shards")]
    assert command.main([*packed, "--shard_mb", "0.004", "--num_workers", "1"]) == 0
    assert len(list((folder / "shards").glob("train-*.tar"))) > 1
    return folder


def options(work: Path, folder: Path | str, **changed) -> dict:
    settings = {
        "train_parts": ["aggregator", "fusion", "language_model"],
        "tasks": ["report"],
        "aggregator_dropout": 0.0,
        "do_eval": False,
        "output_dir": folder,
    }
    return options_of(work, "", **settings, **changed)


def streamed(work: Path, folder: Path, **changed) -> dict:
    shards = {
        "data_shards": f"local://{work / 'shards'}",
        "shard_cache": folder / "fetched",
    }  # fetched, as from a store
    steps = {"per_device_train_batch_size": 2, "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED}
    found = options(work, folder, **shards, shuffle_volumes=3, shard_prefetch=1, **steps, **changed)
    del found["data"]
    return found


def run_here(settings: dict) -> dict[str, torch.Tensor]:
    """Run train.py in this process; return the weights."""
    train.main(flags(settings))
    return load_file(settings["output_dir"] / "model.safetensors")


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return the folder and the weights of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_here(streamed(work, folder))


def test_packed_embeddings_train_as_those_of_the_local_cache(work, tmp_path):
    """All records are in one step, because shards give another order."""
    step = {"per_device_train_batch_size": RECORDS, "max_steps": 2}
    cached = run_here(options(work, tmp_path / "local", slice_cache=work / "cache", cache_embeddings=True, **step))
    shutil.move(work / "phantoms", tmp_path / "phantoms")
    try:
        packed = run_here(streamed(work, tmp_path / "packed") | step)
    finally:
        shutil.move(tmp_path / "phantoms", work / "phantoms")
    assert packed.keys() == cached.keys()
    for name, value in cached.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_resumes_within_an_epoch(work, whole, tmp_path):
    before, weights = whole
    name = f"checkpoint-{SAVED}"
    shutil.copytree(before / name, tmp_path / name)
    resumed = run_here(streamed(work, tmp_path, resume_from_checkpoint="last"))
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(work, whole, tmp_path):
    weights = whole[1]
    settings = streamed(work, tmp_path)
    kill_script("train.py", 1, settings, tmp_path / f"checkpoint-{SAVED}" / "trainer_state.json")
    assert not (tmp_path / "model.safetensors").exists()
    run_script("train.py", 1, {**settings, "resume_from_checkpoint": "last"})
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
