"""Packing a filled cache and its records into shards."""

import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from samf.cache.entries import VolumeCache, check_entry, entry_file
from samf.cache.volume_list import Volume, inspect_volumes
from samf.data.schema import OnError
from samf.data.shards.index import INDEX, Member, ShardFile, ShardIndex, ShardsError, TableFile
from samf.data.shards.storage import Storage
from samf.data.volume_discovery import distinct_volumes

logger = logging.getLogger(__name__)

_PARTS = "parts"  # what an interrupted run has finished
_LISTED = 5
_HEADER = 512  # bytes of a tar member's header
_CHUNK = 1 << 20


@dataclass(frozen=True)
class PackOptions:
    """How shards are packed.

    Attributes:
        shard_bytes: approximate size of a shard.
        workers: shards that are written and uploaded at the same time.
        on_error: volumes without an entry: "raise", or "skip" their records.
        work_folder: a folder for shards on their way to an object store; None = the system's.
        show_progress: show a progress bar.
    """

    shard_bytes: int = 64_000_000
    workers: int = 4
    on_error: OnError = "raise"
    work_folder: str | None = None
    show_progress: bool = True


def pack(
    splits: Mapping[str, datasets.Dataset],
    cache: VolumeCache,
    storage: Storage,
    about: ShardIndex,
    options: PackOptions,
) -> ShardIndex:
    """Write shards, tables of records and the index, which comes last. A run that was interrupted is resumed.

    Volumes are assigned to shards at random, by a fixed seed: neighbours are not of one patient.

    Args:
        splits: the records by split.
        cache: has the volumes' entries.
        storage: gets the shards.
        about: settings for the index; its tables and shards are replaced.
        options: how to pack.

    Raises:
        ShardsError: entries are missing or damaged, or there are other shards.
    """
    chosen = {
        split: _choose(records, cache, f"{split} volumes", about.kind, options.on_error)
        for split, records in splits.items()
    }
    plan = [
        (f"{split}-{number:05}", split, group)
        for split, (_, volumes) in chosen.items()
        for number, group in enumerate(_groups(volumes, cache, options.shard_bytes))
    ]
    _refuse_other_shards(storage, plan)
    tables = {split: _write_table(storage, split, *part, len(splits[split])) for split, part in chosen.items()}
    total = sum(len(group) for _, _, group in plan)
    with (
        tqdm(total=total, desc="packing", unit=" volumes", disable=not options.show_progress) as progress,
        tempfile.TemporaryDirectory(prefix="samf-pack-", dir=options.work_folder or _beside(storage)) as folder,
        ThreadPoolExecutor(options.workers) as threads,
    ):

        def make(item: tuple[str, str, list[Volume]]) -> ShardFile:
            shard = _pack_once(item, cache.folder, storage, Path(folder))
            progress.update(len(item[2]))
            return shard

        shards = list(threads.map(make, plan))
    index = ShardIndex(about.kind, about.settings, about.encoder, about.finding_names, tables, shards)
    storage.write(INDEX, index.to_json())
    for name, _, _ in plan:
        storage.remove(f"{_PARTS}/{name}.json")
    if not storage.is_remote:
        shutil.rmtree(storage.local(_PARTS), ignore_errors=True)
    return index


def _beside(storage: Storage) -> str | None:
    """Return the shards' own folder, so that a finished shard is only renamed; None for an object store."""
    if storage.is_remote:
        return None
    storage.local("").mkdir(parents=True, exist_ok=True)
    return str(storage.local(""))


def _choose(
    records: datasets.Dataset, cache: VolumeCache, what: str, kind: str, on_error: OnError
) -> tuple[datasets.Dataset, list[Volume]]:
    """Return the records whose volume has an entry, or that have none, and these volumes."""
    volumes = inspect_volumes(distinct_volumes(records), cache)
    absent = {
        volume.path for volume in volumes if volume.key is None or not entry_file(cache.folder, volume.key).is_file()
    }
    if not absent:
        return records, volumes
    named = ", ".join(sorted(absent)[:_LISTED])
    found = f"{len(absent)} of {len(volumes)} {what} have no {kind} in {cache.folder} (first: {named})"
    if on_error == "raise" or len(absent) == len(volumes):
        raise ShardsError(
            f"{found}. Fill the cache first, with the same settings: python preprocess.py DATA --cache {cache.folder} "
            f"--{'embeddings' if kind == 'embeddings' else 'processor'} MODEL; --on_error skip packs the others only."
        )
    logger.warning("%s; their records are left out", found)
    rows = [row for row, path in enumerate(records["volume"][:]) if path not in absent]
    return records.select(rows), [volume for volume in volumes if volume.path not in absent]


def _groups(volumes: Sequence[Volume], cache: VolumeCache, shard_bytes: int) -> Iterator[list[Volume]]:
    """Yield the volumes of each shard."""
    group: list[Volume] = []
    size = 0
    for number in np.random.default_rng(0).permutation(len(volumes)):
        volume = volumes[number]
        entry = entry_file(cache.folder, volume.name).stat().st_size
        if group and size + entry > shard_bytes:
            yield group
            group, size = [], 0
        group.append(volume)
        size += entry
    if group:
        yield group


def _plan_name(group: Sequence[Volume]) -> str:
    return hashlib.sha256("".join(volume.name for volume in group).encode()).hexdigest()


def _refuse_other_shards(storage: Storage, plan: Sequence[tuple[str, str, list[Volume]]]) -> None:
    if not storage.exists(INDEX):
        return
    found = ShardIndex.read(storage)
    keys = [[member.key for member in shard.members] for shard in found.shards]
    if keys == [[volume.name for volume in group] for _, _, group in plan]:
        raise ShardsError(
            f"{storage.shown}: complete, with these volumes. To pack their records again, delete {INDEX}."
        )
    raise ShardsError(
        f"{storage.shown}: has shards of other volumes or settings. Give --out an empty folder or prefix."
    )


def _write_table(
    storage: Storage, split: str, records: datasets.Dataset, volumes: Sequence[Volume], before: int
) -> TableFile:
    """Write the records of a split as Parquet."""
    name, buffer = f"records-{split}.parquet", io.BytesIO()
    records.to_parquet(buffer, batch_size=20_000)
    content = buffer.getvalue()
    if pq.ParquetFile(io.BytesIO(content)).metadata.num_rows != len(records):
        raise ShardsError(f"{storage.shown}/{name}: the table that was written isn't whole.")
    storage.write(name, content)
    counts = Counter(records["task"][:])
    digest = hashlib.sha256(content).hexdigest()
    return TableFile(name, len(content), digest, dict(sorted(counts.items())), len(volumes), before - len(records))


def _pack_once(item: tuple[str, str, list[Volume]], cache: Path, storage: Storage, folder: Path) -> ShardFile:
    """Return a shard that an earlier run has finished, or write it."""
    name, split, group = item
    note, plan = f"{_PARTS}/{name}.json", _plan_name(group)
    if storage.exists(note):
        found = json.loads(storage.read(note))
        if found.pop("plan") == plan:
            return ShardFile(**{**found, "members": [Member(**member) for member in found["members"]]})
    file = folder / f"{name}.tar"
    members = _write_tar(file, group, cache)
    digest = file_sha256(file)
    shard = ShardFile(f"{name}.tar", split, file.stat().st_size, digest, members)
    storage.put(file, shard.name)
    storage.write(note, json.dumps({**asdict(shard), "plan": plan}).encode())
    return shard


def _write_tar(file: Path, group: Sequence[Volume], cache: Path) -> list[Member]:
    """Write the entries of some volumes into a tar file, each after its checksum was compared."""
    members = []
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for volume in group:
            entry = entry_file(cache, volume.name)
            if problem := check_entry(entry):
                raise ShardsError(
                    f"{entry}: damaged ({problem}). Delete it and fill the cache again: preprocess.py --verify remove."
                )
            info = tarfile.TarInfo(entry.name)  # without times and owners: the same entries give the same bytes
            info.size = entry.stat().st_size
            members.append(Member(volume.path, volume.name, tar.offset + _HEADER, info.size))
            with entry.open("rb") as stream:
                tar.addfile(info, stream)
    return members


def file_sha256(file: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
