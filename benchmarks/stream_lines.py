"""Benchmarks of streaming shards from an S3 server on this machine: volumes per second against a local cache, and memory."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from samf.benchmarks.measuring import Measurement, ratios
from samf.benchmarks.workloads import LineSkipped, Settings
from samf.cache.entries import Arrays
from samf.cache.slice_cache import SliceCache
from samf.data.records import FEATURES
from samf.data.schema import VolumeLike, VolumeStore
from samf.data.shards.index import ShardIndex, slice_settings
from samf.data.shards.packing import PackOptions, pack
from samf.data.shards.records import load_shard_records, shard_numbers
from samf.data.shards.storage import Storage
from samf.data.shards.store import ShardStore
from samf.model.image_processing_samf import SamfImageProcessor
from samf.training.sampling import RecordOrder
from samf.training.shard_order import ShardWindow

_VOLUMES = {"full": 96, "medium": 32, "tiny": 6}
_RECORDS = {"full": 5_000, "medium": 5_000, "tiny": 160}
_ROUNDS = {"full": 3, "medium": 1, "tiny": 1}
_WORKERS = 2
_AHEAD = 4
_NO_LIMIT = 10**15
_BUCKET = "shards"
MOST_GROWTH = 20.0  # MB
PACKAGES = ("moto", "flask", "s3fs")


class _RandomSlices(SliceCache):
    """A cache of random slices: how they are made doesn't matter here."""

    def extract(self, volume: VolumeLike, *, searched: bool = False) -> Arrays:
        """Return slices without reading the volume."""
        count, size = self.image_processor.num_slices, self.image_processor.size
        slices = np.frombuffer(os.urandom(count * 3 * size * size), np.uint8).reshape(count, 3, size, size)
        positions = np.linspace(0, 1, count, dtype=np.float32)
        return {"slices": slices, "slice_planes": np.repeat(np.arange(3), count // 3), "slice_positions": positions}


class _Volumes(Dataset[torch.Tensor]):
    """The slices of a record's volume, copied out of the store."""

    def __init__(self, paths: list[str], store: VolumeStore):
        self.paths, self.store = paths, store

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.store.get(self.paths[index])["slices"]))


@contextmanager
def _local_s3(folder: Path) -> Iterator[None]:
    """Run an S3 server on loopback, with an empty bucket, and point the environment to it.

    Raises:
        LineSkipped: its packages aren't installed.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise LineSkipped(f"{', '.join(missing)} missing: pip install 'moto[server]' s3fs")
    import s3fs

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    before = dict(os.environ)
    s3fs.S3FileSystem.clear_instance_cache()  # those of a former server in this process
    os.environ.update(keys, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", TMPDIR=str(folder))
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if server.poll() is not None or time.monotonic() > deadline:
                raise LineSkipped("moto_server doesn't start")
            time.sleep(0.1)
        s3fs.S3FileSystem().mkdir(_BUCKET)
        yield
    finally:
        server.kill()
        server.wait()
        os.environ.clear()
        os.environ.update(before)


def _filled(folder: Path, image_processor: SamfImageProcessor, count: int) -> tuple[SliceCache, datasets.Dataset]:
    """Return a cache with an entry for each of `count` volumes, and a record of each."""
    cache, rows = _RandomSlices(folder / "cache", image_processor), []
    (folder / "volumes").mkdir(parents=True)
    for number in range(count):
        path = folder / "volumes" / f"{number:05}.nii.gz"
        path.write_bytes(number.to_bytes(4, "little"))
        cache.get(path)
        row = {"volume": str(path), "task": "report", "question": "?", "choices": None, "answer": "", "id": str(number)}
        rows.append({**row, "scan_id": str(number), "patient_id": str(number), "finding_labels": []})
    return cache, datasets.Dataset.from_list(rows, features=FEATURES)


def _packed(name: str, cache: SliceCache, records: datasets.Dataset, shard_bytes: int) -> tuple[Storage, ShardIndex]:
    storage = Storage(f"s3://{_BUCKET}/{name}")
    about = ShardIndex("slices", slice_settings(cache.image_processor, 0.0), None, [], {}, [])
    return storage, pack({"train": records}, cache, storage, about, PackOptions(shard_bytes, _WORKERS))


def _stream(store: ShardStore, volumes: int, seed: int = 0) -> DataLoader:
    records = load_shard_records(store, "train")
    window = ShardWindow(store, shard_numbers(store, records), volumes, _AHEAD)
    order = RecordOrder(len(records), seed, window=window)
    return DataLoader(_Volumes(records["volume"][:], store), batch_size=None, sampler=order, num_workers=_WORKERS)


def _rate(loader: DataLoader) -> float:
    """Return the volumes per second of an epoch."""
    started, count = time.perf_counter(), 0
    for slices in loader:
        count += 1
        slices[::8, 0, 0].sum()  # it has arrived
    return count / (time.perf_counter() - started)


def time_streaming(settings: Settings) -> list[Measurement]:
    """Time an epoch from a local cache, from the server with nothing fetched, and with all shards fetched."""
    count, rounds = _VOLUMES[settings.size], _ROUNDS[settings.size]
    folder, small = settings.folder / "speed", settings.size == "tiny"
    image_processor = SamfImageProcessor(slices_per_plane=2, size=32) if small else SamfImageProcessor()
    with _local_s3(settings.folder):
        cache, records = _filled(folder, image_processor, count)
        entry_bytes = cache.entry_path(records[0]["volume"]).stat().st_size
        started = time.perf_counter()
        storage, index = _packed("speed", cache, records, 6 * entry_bytes)
        packed = count / (time.perf_counter() - started)
        disk, cold, warm, fetched = [], [], [], []
        for number in range(rounds):
            local = _Volumes(records["volume"][:], cache)
            order = RecordOrder(count, number)
            disk.append(_rate(DataLoader(local, batch_size=None, sampler=order, num_workers=_WORKERS)))
            store = ShardStore(storage, index, folder / "fetched", _NO_LIMIT)
            cold.append(_rate(_stream(store, count // 3, number)))
            fetched.append(len(list(store.folder.glob("*.tar"))))
            warm.append(_rate(_stream(store, count // 3, number)))
            shutil.rmtree(store.folder)
    note = f"{count} volumes of {entry_bytes / 1e6:.1f} MB in {len(index.shards)} shards, {_WORKERS} workers"
    return [
        Measurement("pack into the server", "volumes/s", [packed], note=note),
        Measurement("local slice cache", "volumes/s", disk),
        Measurement("shards, nothing fetched yet", "volumes/s", cold, note="server and readers share the cores"),
        Measurement("shards, all fetched", "volumes/s", warm),
        Measurement("shards, all fetched / local slice cache", "x", ratios(warm, disk), settings.limit(0.7)),
        Measurement(
            "shards on the disk / shards",
            "x",
            [number / len(index.shards) for number in fetched],
            at_least=settings.limit(1),
            at_most=settings.limit(1),
        ),
    ]


def measure_streaming_memory(settings: Settings) -> list[Measurement]:
    """Measure the memory of a process and its workers early and late in an epoch, and the most that the folder held."""
    count, folder = _RECORDS[settings.size], settings.folder / "memory"
    with _local_s3(settings.folder):
        cache, records = _filled(folder, SamfImageProcessor(slices_per_plane=2, size=32), count)
        entry_bytes = cache.entry_path(records[0]["volume"]).stat().st_size
        storage, index = _packed("memory", cache, records, max(count // 100, 2) * entry_bytes)
        limit = count * entry_bytes // 2
        store = ShardStore(storage, index, folder / "fetched", limit)
        used, held = [], []
        for number, _ in enumerate(_stream(store, count // 20)):
            if number % (count // 20) == count // 40:
                used.append(_unshared())
                held.append(sum(file.stat().st_size for file in store.folder.glob("*.tar")))
    early, late = np.median(used[2:6]), np.median(used[-4:])
    note = f"{count} records; median of 4 readings from 10 % of the epoch on, and at its end"
    return [
        Measurement("memory of all processes", "MB", [late], note=note),
        Measurement("memory added", "MB", [late - early], at_most=settings.limit(MOST_GROWTH)),
        Measurement("fetched shards on the disk / limit", "x", [max(held) / limit], at_most=settings.limit(1)),
    ]


def _unshared() -> float:
    """Return the memory that belongs to this process and its workers alone, in MB."""
    me = psutil.Process()
    processes = [me, *(child for child in me.children() if "moto" not in " ".join(child.cmdline()))]
    return sum(process.memory_full_info().uss for process in processes) / 1e6


STAGES = {"streaming": {"speed": time_streaming, "memory": measure_streaming_memory}}
