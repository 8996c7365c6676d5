"""Datasets of records: small tables are read into memory, large ones converted once to a memory-mapped Arrow file.

The name of an Arrow file is a hash of what it depends on: path, size and modification time of the tables, and the options.
A changed table or option gives a new file; old ones can be deleted at any time. One process writes, the others wait.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import datasets
import pyarrow as pa
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # re-exported without a stub
from tqdm import tqdm

from samf.cache.entries import entry_key
from samf.data.load_stats import LoadStats
from samf.data.schema import JsonObject, Record
from samf.utils.files import atomic_path

logger = logging.getLogger(__name__)

RECORDS, COUNTS = "records.arrow", "counts.json"
_FORMAT = 2  # bump when the same tables give other records
CACHED_FROM = 32 << 20  # bytes of tables; smaller ones are read again in a second or two
ROWS_PER_CHUNK = 5_000  # as Python objects at a time: a fifth of a gigabyte less than with 20,000 reports

_MakeRecords: TypeAlias = Callable[[LoadStats], Iterator[Record]]


def default_cache() -> Path:
    """Return the folder for Arrow files of records, in the cache of `datasets` ($HF_DATASETS_CACHE)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "samf_records"


def load_or_make(
    make: _MakeRecords,
    features: datasets.Features,
    tables: Sequence[Path],
    options: JsonObject,
    cache_dir: str | Path | None = None,
) -> tuple[datasets.Dataset, LoadStats]:
    """Return a Dataset of records, and their counts.

    Args:
        make: yields the records and counts them; not called if there is an Arrow file.
        features: the columns of a record.
        tables: the files that `make` reads.
        options: everything else that its records depend on, as JSON has it.
        cache_dir: the folder for Arrow files; default `default_cache()`.
    """
    if sum(table.stat().st_size for table in tables) < CACHED_FROM:
        load_stats = LoadStats()
        return in_memory(make(load_stats), features), load_stats
    key = entry_key(_FORMAT, str(features), [_identity(table) for table in tables], dict(options))
    folder = Path(cache_dir or default_cache()) / key
    build_once(folder / RECORDS, lambda partial: _write(partial, make, features, options))
    counts = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    return datasets.Dataset.from_file(str(folder / RECORDS)), LoadStats.from_summary(counts)


def _identity(table: Path) -> list[str | int]:
    """Return path, size in bytes and modification time in ns."""
    stat = table.stat()
    return [str(table.absolute()), stat.st_size, stat.st_mtime_ns]


def build_once(path: Path, build: Callable[[Path], None]) -> None:
    """Build a file, unless it exists, while other processes that want it wait.

    Args:
        path: the file.
        build: writes it under a temporary name.
    """
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            return
        with atomic_path(path) as temporary:
            build(temporary)


def _write(partial: Path, make: _MakeRecords, features: datasets.Features, options: JsonObject) -> None:
    load_stats, count = LoadStats(), 0
    schema = features.arrow_schema
    with (
        pa.OSFile(str(partial), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
        tqdm(desc=f"reading {options.get('split', 'records')}", unit=" records", unit_scale=True) as progress,
    ):
        for table in _tables(make(load_stats), features):
            writer.write_table(table)
            count += len(table)
            progress.update(len(table))
    load_stats.save(partial.with_name(COUNTS), **options)  # before the Arrow file has its final name
    logger.info("%s: %d records written", partial.parent, count)


def in_memory(records: Iterable[Record], features: datasets.Features) -> datasets.Dataset:
    """Return a Dataset of records in memory, with at most one chunk of them as Python objects at a time."""
    return datasets.concatenate_datasets([datasets.Dataset(table) for table in _tables(records, features)])


def _tables(records: Iterable[Record], features: datasets.Features) -> Iterator[pa.Table]:
    """Yield Arrow tables of at most ROWS_PER_CHUNK records; at least one table."""
    rows: Iterator[Mapping[str, object]] = iter(records)
    is_first = True
    while (chunk := list(islice(rows, ROWS_PER_CHUNK))) or is_first:
        columns = {name: [row[name] for row in chunk] for name in features}
        yield pa.Table.from_pydict(columns, schema=features.arrow_schema)
        is_first = False
