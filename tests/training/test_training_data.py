"""Data that would end a run: prompts that are too long, volumes that can't be read, caches that can't be written."""

import errno
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import history, prepare, train_here
from tiny import TEXTS, tiny_model

from samf import SamfImageProcessor, SamfProcessor
from samf.cache import slice_cache
from samf.cache.slice_cache import SliceCache
from samf.data.collator import SamfCollator
from samf.data.lengths import find_overlong
from samf.data.loading import load_records
from samf.data.schema import VolumeLike
from samf.model.ct_volume import CTReadError, VolumeRef
from samf.model.hub_samf import publish_weights
from samf.phantoms.tokenizer import train_small_tokenizer
from samf.training import volume_stores as stores
from samf.training.aggregator_weights import save_aggregator
from samf.training.arguments import DataArguments
from samf.training.datasets import without_overlong
from samf.training.skipping import SkippingCollator
from samf.training.volume_stores import OptionalSliceCache, why_not_write


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def processor() -> SamfProcessor:
    images = SamfImageProcessor(slices_per_plane=2, size=32)
    return SamfProcessor(images, train_small_tokenizer(TEXTS, 400), num_image_tokens=4)


@pytest.fixture(scope="module")
def records(work):
    return load_records(str(work / "phantoms"), "train", tasks=("report", "multiple_choice"))


# ---- prompts -------------------------------------------------------------------------------------------------------


def with_question(records, row: int, question: str):
    questions = records["question"][:]
    questions[row] = question
    return records.remove_columns("question").add_column("question", questions)


@pytest.mark.parametrize("question", ["word " * 90, "größer ﷺ " * 30], ids=["ASCII", "others"])
def test_records_are_too_long_where_the_collator_would_refuse_them(records, processor, work, question):
    """For every `max_length` near the records' lengths, exactly those are left out that would end training."""
    chosen = with_question(records.select(range(12)), 7, question)
    store = SliceCache(work / "cache", processor.image_processor)
    exact = SamfCollator(processor, volume_store=store).uncuttable_lengths(list(chosen))
    for max_length in sorted({length + more for length in exact for more in (0, 1)}):
        expected = {row: length for row, length in enumerate(exact) if length >= max_length}
        assert find_overlong(chosen, processor, max_length) == expected, max_length
        collate = SamfCollator(processor, volume_store=store, max_length=max_length)
        for row in (0, 7):
            if row in expected:
                with pytest.raises(ValueError, match="can't be cut"):
                    collate([chosen[row]])
            else:
                collate([chosen[row]])


def test_too_long_records_are_named_or_left_out_before_the_first_step(records, processor, caplog):
    chosen = with_question(records.select(range(12)), 7, "word " * 300)
    with pytest.raises(ValueError, match=r"1 of 12 train records don't fit max_length=400.*'.*' \(\d+ tokens\).*skip"):
        without_overlong(chosen, "train", processor, DataArguments(max_length=400))
    kept = without_overlong(chosen, "train", processor, DataArguments(max_length=400, on_error="skip"))
    assert kept["id"][:] == [name for row, name in enumerate(chosen["id"][:]) if row != 7]
    assert "1 of 12 train records don't fit" in caplog.text


# ---- volumes -------------------------------------------------------------------------------------------------------


class Store:
    """Slices of a few volumes; those in `bad` can't be read."""

    def __init__(self, bad: set[str]):
        self.bad = bad

    def get(self, volume: VolumeLike) -> dict[str, np.ndarray]:
        path = VolumeRef.of(volume).path
        if path in self.bad:
            raise CTReadError(f"{path}: damaged")
        sizes = {"slice_embeddings": np.full((2, 1), float(path[1:]), np.float32)}
        return {**sizes, "slice_planes": np.zeros(2, np.int64), "slice_positions": np.zeros(2, np.float32)}


def rows(*volumes: str | None) -> list[dict]:
    return [
        {"volume": volume, "id": f"r{k}", "question": "?", "choices": None, "answer": f"Answer {k}.", "task": "report"}
        for k, volume in enumerate(volumes)
    ]


def test_a_record_of_the_batch_takes_an_unreadable_ones_place(processor, caplog):
    data = rows("v1", "v2", None, "v3")
    collate = SkippingCollator(SamfCollator(processor, volume_store=Store({"v2"})), data)
    batch, whole = (
        collate(data),
        SamfCollator(processor, volume_store=Store(set()))([data[0], data[3], data[2], data[3]]),
    )
    assert batch.keys() == whole.keys() and all(torch.equal(batch[name], value) for name, value in whole.items())
    assert collate.unreadable == 1 and "v2: damaged" in caplog.text
    collate(data)
    assert collate.unreadable == 2 and caplog.text.count("v2: damaged") == 1


def test_without_fellows_the_id_chooses_a_substitute(processor):
    data = rows(*(f"v{k}" for k in range(8)), None)
    found = []
    for _ in range(2):
        collate = SkippingCollator(SamfCollator(processor, volume_store=Store({"v2"})), data)
        found.append(collate([data[2]])["slice_embeddings"][0, 0, 0].item())
    assert found[0] == found[1] != 2
    collate = SkippingCollator(SamfCollator(processor, volume_store=Store({f"v{k}" for k in range(8)})), data)
    with pytest.raises(CTReadError, match="v2: can't be read, and neither can 7 others"):
        collate([data[2]])


def test_a_damaged_volume_costs_a_run_its_records_alone(work, tmp_path):
    """preprocess.py hasn't run, so train.py meets the damaged volume first."""
    damaged = tmp_path / "damaged"
    shutil.copytree(work / "phantoms", damaged)
    file = next(damaged.rglob("train_3_a_1.nii.gz"))
    file.write_bytes(file.read_bytes()[:2000])
    options = {"data": damaged, "slice_cache": tmp_path / "cache", "max_steps": 8, "logging_steps": 1}
    train_here(work, "skipped", **options, on_error="skip")
    counts = [row.get("unreadable_volumes", 0) for row in history(work / "skipped") if "loss" in row]
    assert len(counts) == 8 and counts[-1] > 0
    with pytest.raises(CTReadError, match="train_3_a_1"):
        train_here(work, "stopped", **options, save_strategy="steps", save_steps=100)


# ---- caches --------------------------------------------------------------------------------------------------------


def test_training_goes_on_without_a_cache_that_cannot_be_written(work, processor, tmp_path, monkeypatch, caplog):
    images, volumes = processor.image_processor, sorted(map(str, (work / "phantoms").rglob("train_*.nii.gz")))[:3]
    OptionalSliceCache(tmp_path, images).get(volumes[0])
    writes = []

    def full(path: Path, *_: object) -> None:
        writes.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("samf.cache.entries.write_entry", full)
    cache = OptionalSliceCache(tmp_path, images)
    for path in volumes * 2:
        for name, array in images.extract(path).items():
            np.testing.assert_array_equal(cache.get(path)[name], array)
    assert len(writes) == 1 and caplog.text.count("Training continues without adding to the cache") == 1
    with pytest.raises(CTReadError, match="nowhere"):
        cache.get(str(tmp_path / "nowhere.nii.gz"))


def test_what_does_not_fit_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "free_bytes", lambda folder: 10_000)
    assert why_not_write(tmp_path / "new", missing=10, bytes_each=1000) is None
    assert why_not_write(tmp_path / "new", missing=11, bytes_each=1000) == (
        "lacks 11 entries of 11.0 kB together, and 10.0 kB are free"
    )
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    assert why_not_write(tmp_path / "file" / "cache", missing=1, bytes_each=1) == "can't be written (Not a directory)"


# ---- what others can read ------------------------------------------------------------------------------------------


@pytest.fixture
def group_umask():
    before = os.umask(0o027)
    yield 0o640
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*.safetensors")}


def test_weights_can_be_read_by_those_whom_the_umask_lets(tmp_path, group_umask):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    save_aggregator(model, tmp_path / "aggregator")
    slice_cache.write_entry(tmp_path / "record.safetensors", {"a": np.zeros(2, np.float32)})
    assert modes(tmp_path) == {group_umask}
    save_file({"a": torch.ones(2)}, tmp_path / "record.safetensors")
    (tmp_path / "record.safetensors").chmod(0o606)  # what somebody has allowed stays so
    publish_weights(tmp_path)
    assert stat.S_IMODE((tmp_path / "record.safetensors").stat().st_mode) == 0o646
    assert torch.equal(load_file(tmp_path / "record.safetensors")["a"], torch.ones(2))
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
