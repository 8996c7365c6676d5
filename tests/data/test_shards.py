"""Shards: what is packed is what comes back, packing resumes, settings are compared, and the local folder keeps its limit."""

import multiprocessing
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from samf import SamfImageProcessor
from samf.cache.entries import entry_file
from samf.cache.slice_cache import SliceCache
from samf.data.records import FEATURES
from samf.data.shards import store as store_module
from samf.data.shards.index import INDEX, ShardIndex, ShardsError, slice_settings
from samf.data.shards.packing import PackOptions, pack
from samf.data.shards.records import load_shard_records, shard_numbers
from samf.data.shards.storage import Storage
from samf.data.shards.store import ShardStore
from samf.model.ct_volume import CTReadError
from samf.training.shard_order import order_for_trainer

PROCESSOR = SamfImageProcessor(slices_per_plane=2, size=32)
SHARD = 80_000  # bytes: four entries of 18 kB


class Slices(SliceCache):
    """A cache of random slices, drawn by the volume's name."""

    def extract(self, volume, *, searched=False):
        if "unreadable" in volume.path:
            raise CTReadError(f"{volume.path}: no volume")
        rng = np.random.default_rng(len(volume.path) + sum(volume.path.encode()))
        slices = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
        return {"slices": slices, "slice_planes": np.arange(6) // 2, "slice_positions": rng.random(6, np.float32)}


def record(volume: Path | None, number: int, labels: list[int]) -> dict:
    task = "report" if number == 0 else "multiple_choice"
    scan = volume.stem if volume else "none"
    return {
        "volume": volume and str(volume),
        "task": task,
        "question": f"question {number}?",
        "choices": None,
        "answer": f"answer {number} of {scan}",
        "id": f"{scan}_{number}",
        "scan_id": scan,
        "patient_id": scan,
        "finding_labels": labels,
    }


@pytest.fixture
def source(tmp_path):
    """Return a filled cache and the records by split: 14 and 3 volumes, three records of each, and one without."""
    cache, splits = Slices(tmp_path / "cache", PROCESSOR), {}
    for split, count in (("train", 14), ("valid", 3)):
        volumes = [tmp_path / f"{split}_{number}.nii.gz" for number in range(count)]
        for number, volume in enumerate(volumes):
            volume.write_bytes(bytes(number))
            cache.get(volume)
        rows = [record(volume, number, [k % 2, 1]) for k, volume in enumerate(volumes) for number in range(3)]
        splits[split] = datasets.Dataset.from_list([*rows, record(None, 1, [])], features=FEATURES)
    return cache, splits


def pack_into(out: str | Path, source, **options) -> ShardIndex:
    cache, splits = source
    about = ShardIndex("slices", slice_settings(PROCESSOR, 0.0), None, ["Nodule", "Effusion"], {}, [])
    how = PackOptions(**{"shard_bytes": SHARD, "workers": 2, "show_progress": False, **options})
    return pack(splits, cache, Storage(out), about, how)


def opened(out: Path, folder: Path, limit: float = 1e9) -> ShardStore:
    """Return the shards as if they were remote: fsspec's local:// files are fetched like those of any other address."""
    storage = Storage(f"local://{out}")
    return ShardStore(storage, ShardIndex.read(storage), folder, int(limit))


def test_volumes_and_records_come_back(source, tmp_path):
    cache, splits = source
    index = pack_into(tmp_path / "out", source)
    assert {split: (table.volumes, table.records) for split, table in index.tables.items()} == {
        "train": (14, {"multiple_choice": 29, "report": 14}),
        "valid": (3, {"multiple_choice": 7, "report": 3}),
    }
    assert sum(len(shard.members) for shard in index.shards) == 17 and len(index.shards) == 5
    local = ShardStore(Storage(tmp_path / "out"), ShardIndex.read(Storage(tmp_path / "out")), tmp_path / "unused", 0)
    for store in (local, opened(tmp_path / "out", tmp_path / "fetched")):
        for split, records in splits.items():
            packed = load_shard_records(store, split, finding_names=["Nodule", "Effusion"])
            assert packed.to_list() == records.to_list()
            for path in filter(None, packed["volume"][:]):
                found, expected = store.get(path), cache.get(path)
                assert found.keys() == expected.keys()
                assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert store.fetched == 5 and local.fetched == 0 and not (tmp_path / "unused").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".tar") == [
        INDEX,
        "records-train.parquet",
        "records-valid.parquet",
    ]


def test_shards_are_tar_files_of_cache_entries(source, tmp_path):
    cache, _ = source
    index = pack_into(tmp_path / "out", source)
    for shard in index.shards:
        with tarfile.open(tmp_path / "out" / shard.name) as tar:
            assert tar.getnames() == [f"{member.key}.safetensors" for member in shard.members]
            for member in shard.members:
                content = tar.extractfile(f"{member.key}.safetensors").read()
                assert content == entry_file(cache.folder, member.key).read_bytes()
                whole = (tmp_path / "out" / shard.name).read_bytes()
                assert whole[member.start : member.start + member.size] == content


def test_tasks_and_labels_are_chosen_at_reading(source, tmp_path):
    pack_into(tmp_path / "out", source)
    store = opened(tmp_path / "out", tmp_path / "fetched")
    reports = load_shard_records(store, "train", ("report",), ["Effusion"])
    assert set(reports["task"]) == {"report"} and reports["finding_labels"][:] == [[1]] * 14
    numbers = shard_numbers(store, load_shard_records(store, "train"))
    assert numbers[-1] == -1 and len(numbers) == 43
    members = [{member.volume for member in shard.members} for shard in store.shards]
    volumes = load_shard_records(store, "train")["volume"][:]
    assert all(volumes[row] in members[number] for row, number in enumerate(numbers[:-1]))
    with pytest.raises(ShardsError, match="no labels of Cyst; packed were Nodule, Effusion"):
        load_shard_records(store, "train", finding_names=["Cyst"])
    with pytest.raises(ShardsError, match="no train records of long_answer"):
        load_shard_records(store, "train", ["long_answer"])
    with pytest.raises(ShardsError, match="no split 'test'"):
        load_shard_records(store, "test")


def test_packing_that_was_interrupted_resumes(source, tmp_path, monkeypatch):
    whole = pack_into(tmp_path / "whole", source)
    put, stored = Storage.put, []

    def dying(self, file, name):
        if len(stored) == 2:
            raise ConnectionError("the store went away")
        stored.append(name)
        put(self, file, name)

    monkeypatch.setattr(Storage, "put", dying)
    with pytest.raises(ConnectionError):
        pack_into(tmp_path / "out", source, workers=1)
    with pytest.raises(FileNotFoundError, match="run the same command again"):
        ShardIndex.read(Storage(tmp_path / "out"))
    monkeypatch.setattr(Storage, "put", lambda self, file, name: (stored.append(name), put(self, file, name)))
    assert pack_into(tmp_path / "out", source, workers=1) == whole
    assert len(stored) == len(set(stored)) == 5  # none was written twice
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_volumes_without_an_entry_are_refused_or_left_out(source, tmp_path):
    cache, splits = source
    entry = cache.entry_path(tmp_path / "train_3.nii.gz")
    entry.unlink()
    with pytest.raises(
        ShardsError, match=r"1 of 14 train volumes have no slices in .*preprocess.py .* --processor MODEL"
    ):
        pack_into(tmp_path / "out", source)
    index = pack_into(tmp_path / "out", source, on_error="skip")
    assert index.tables["train"].volumes == 13 and index.tables["train"].left_out == 3
    entry = cache.entry_path(tmp_path / "train_4.nii.gz")
    content = bytearray(entry.read_bytes())
    content[-100] ^= 1
    entry.write_bytes(content)
    with pytest.raises(ShardsError, match=f"{entry.name}: damaged"):
        pack_into(tmp_path / "other", source, on_error="skip")


def test_other_shards_are_not_overwritten(source, tmp_path):
    cache, splits = source
    pack_into(tmp_path / "out", source)
    with pytest.raises(ShardsError, match="complete, with these volumes"):
        pack_into(tmp_path / "out", source)
    with pytest.raises(ShardsError, match="has shards of other volumes"):
        pack_into(tmp_path / "out", (cache, {"valid": splits["valid"]}))


def test_other_settings_are_refused_naming_both(source, tmp_path):
    index = pack_into(tmp_path / "out", source)
    index.check_settings(SamfImageProcessor(slices_per_plane=2, size=32, image_mean=[0.1] * 3), "here")
    with pytest.raises(ShardsError, match="size is 32 in the shards and 64 in the model"):
        index.check_settings(SamfImageProcessor(slices_per_plane=2, size=64), "here")


def test_a_damaged_shard_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_PAUSE", 0.0)
    pack_into(tmp_path / "out", source)
    store = opened(tmp_path / "out", tmp_path / "fetched")
    file = tmp_path / "out" / store.shards[0].name
    content = bytearray(file.read_bytes())
    content[600] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match=r"train-00000.tar: 81920 bytes with SHA-256"):
        store.get(store.shards[0].members[0].volume)
    assert not list(store.folder.glob("*.tar*"))
    with pytest.raises(ShardsError, match="not in the shards"):
        store.get("/elsewhere.nii.gz")


def test_the_folder_keeps_its_limit(source, tmp_path):
    cache, splits = source
    index = pack_into(tmp_path / "out", source, shard_bytes=20_000)  # a shard for each volume
    largest = max(shard.size for shard in index.shards)
    store = opened(tmp_path / "out", tmp_path / "fetched", 3 * largest)
    volumes = list(dict.fromkeys(filter(None, splits["train"]["volume"][:])))
    for path in [*volumes, *volumes[:2]]:  # the first two have been evicted
        assert np.array_equal(store.get(path)["slices"], cache.get(path)["slices"])
        assert sum(file.stat().st_size for file in store.folder.glob("*.tar")) <= 3 * largest
    assert store.fetched == 16


def _read_all(store: ShardStore, volumes: list[str], fetched) -> None:
    for path in volumes:
        store.get(path)
    fetched.put(store.fetched)


def test_the_librarys_trainer_fetches_each_shard_once_where_records_are_in_shard_order(source, tmp_path):
    pack_into(tmp_path / "out", source, shard_bytes=40_000)  # seven shards of training, four of which fit
    fetched, ids = {}, {}
    for strategy in ("random", "sequential"):
        store = opened(tmp_path / "out", tmp_path / strategy, limit=170_000)
        records = load_shard_records(store, "train")
        if strategy == "sequential":
            records = order_for_trainer(store, records, volumes=1)
        options = {"remove_unused_columns": False, "use_cpu": True, "report_to": "none"}
        args = TrainingArguments(tmp_path, train_sampling_strategy=strategy, per_device_train_batch_size=2, **options)

        def read(rows, store=store):
            return [(row["id"], row["volume"] and store.get(row["volume"])) for row in rows]

        trainer = Trainer(torch.nn.Linear(1, 1), args, data_collator=read, train_dataset=records)
        ids[strategy] = sorted(name for batch in trainer.get_train_dataloader() for name, _ in batch)
        fetched[strategy] = store.fetched
    assert fetched["sequential"] == 7 < fetched["random"]
    assert ids["sequential"] == ids["random"] and len(ids["random"]) == 43
    with pytest.raises(ShardsError, match="lower shuffle_volumes"):
        order_for_trainer(opened(tmp_path / "out", tmp_path / "small", limit=50_000), records)


def test_processes_of_a_machine_fetch_each_shard_once(source, tmp_path):
    index = pack_into(tmp_path / "out", source)
    store = opened(tmp_path / "out", tmp_path / "fetched")
    volumes = [member.volume for shard in index.shards for member in shard.members]
    context = multiprocessing.get_context("fork")
    fetched = context.Queue()
    workers = [context.Process(target=_read_all, args=(store, volumes, fetched)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert sum(fetched.get(timeout=60) for _ in workers) == len(index.shards)
    for worker in workers:
        worker.join()


def test_errors_of_a_stores_library_are_os_errors(tmp_path):
    storage = Storage(f"local://{tmp_path}")

    class System:
        def cat_file(self, path):
            raise RuntimeError("no credentials")

    storage._open = lambda: (System(), "root")
    with pytest.raises(OSError, match=r"index.json: RuntimeError: no credentials"):
        ShardIndex.read(storage)
    with pytest.raises(ImportError, match=r"unknownscheme"):
        Storage("unknownscheme://bucket/x").read(INDEX)


class NoCredentialsError(Exception):
    """Has the name of botocore's."""


@pytest.mark.parametrize("error", [NoCredentialsError("GET https://store/?secret"), PermissionError("Forbidden")])
def test_a_store_without_access_says_what_to_check_as_for_volumes(error):
    storage = Storage("s3://user:secret@bucket/ct-rate")

    class System:
        def cat_file(self, path):
            raise error

    storage._open = lambda: (System(), "root")
    with pytest.raises(OSError, match=r"^s3://bucket/ct-rate/index.json: no access .* AWS_PROFILE") as raised:
        ShardIndex.read(storage)
    assert "secret" not in str(raised.value)


def test_a_store_whose_package_is_missing_names_it(monkeypatch):
    def fail(address):
        raise ImportError("No module named 'gcsfs'")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(ImportError, match=r"^gs://bucket/x: gs:// addresses need gcsfs: pip install gcsfs$"):
        Storage("gs://bucket/x").read(INDEX)
