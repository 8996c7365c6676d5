"""Records as Datasets: small tables are read into memory, large ones once into an Arrow file that is mapped.

An Arrow file is named by what it depends on: path, size and time of change of the tables, and the options. A changed
table or option is another file; old ones can be deleted at any time. Of several processes one writes, the others wait.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

from samf.cache.slice_cache import entry_key
from samf.data.load_stats import LoadStats
from samf.utils.files import atomic_path

logger = logging.getLogger(__name__)

RECORDS, COUNTS = "records.arrow", "counts.json"
FORMAT = 2  # goes up when the same tables would give other records
CACHED_FROM = 32 << 20  # bytes of tables: what is smaller is read anew in a second or two
ROWS_A_CHUNK = 20_000

MakeRecords = Callable[[LoadStats], Iterator[dict[str, Any]]]


def default_cache() -> Path:
    """Where Arrow files of records lie: a folder in the cache of `datasets` ($HF_DATASETS_CACHE)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "samf_records"


def load_or_make(
    make: MakeRecords,
    features: datasets.Features,
    tables: Sequence[Path],
    options: Mapping[str, Any],
    cache_dir: str | Path | None = None,
) -> tuple[datasets.Dataset, LoadStats]:
    """The Dataset of `make`'s records, and their counts.

    Args:
        make: yields the records and counts them; not called where there is an Arrow file.
        features: of a record.
        tables: the files that `make` reads.
        options: all else that its records depend on, as JSON has it.
        cache_dir: where Arrow files lie; default `default_cache()`.
    """
    if sum(table.stat().st_size for table in tables) < CACHED_FROM:
        load_stats = LoadStats()
        return in_memory(make(load_stats), features), load_stats
    key = entry_key(FORMAT, str(features), [_identity(table) for table in tables], dict(options))
    folder = Path(cache_dir or default_cache()) / key
    build_once(folder / RECORDS, lambda partial: _write(partial, make, features, options))
    counts = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    return datasets.Dataset.from_file(str(folder / RECORDS)), LoadStats.from_summary(counts)


def _identity(table: Path) -> list[Any]:
    """Path, size in bytes and time of change (ns)."""
    stat = table.stat()
    return [str(table.absolute()), stat.st_size, stat.st_mtime_ns]


def build_once(path: Path, build: Callable[[Path], None]) -> None:
    """Let `build` write a file that isn't there, under a temporary name; other processes wait for it meanwhile."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            return
        with atomic_path(path) as temporary:
            build(temporary)


def _write(partial: Path, make: MakeRecords, features: datasets.Features, options: Mapping[str, Any]) -> None:
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
    load_stats.save(partial.with_name(COUNTS), **options)  # before the records appear under their name
    logger.info("%s: %d records written", partial.parent, count)


def in_memory(records: Iterable[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    """Records → Dataset, never more than one chunk of them as Python objects."""
    return datasets.concatenate_datasets([datasets.Dataset(table) for table in _tables(records, features)])


def _tables(records: Iterable[dict[str, Any]], features: datasets.Features) -> Iterator[pa.Table]:
    """Arrow tables of at most ROWS_A_CHUNK records; at least one."""
    rows, is_first = iter(records), True
    while (chunk := list(islice(rows, ROWS_A_CHUNK))) or is_first:
        columns = {name: [row[name] for row in chunk] for name in features}
        yield pa.Table.from_pydict(columns, schema=features.arrow_schema)
        is_first = False
