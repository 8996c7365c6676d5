"""The records that are packed beside shards."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samf.data.record_cache import build_once, default_cache
from samf.data.schema import IGNORE_INDEX, TASKS
from samf.data.shards.index import ShardIndex, ShardsError
from samf.data.shards.store import ShardStore


def load_shard_records(
    store: ShardStore, split: str, tasks: Sequence[str] = TASKS, finding_names: Sequence[str] = ()
) -> datasets.Dataset:
    """Load the records of a split, memory-mapped, in the packed order.

    Args:
        store: the shards.
        split: "train" or "valid".
        tasks: the records' tasks; others are left out.
        finding_names: findings of the labels, in this order; empty = no labels.

    Raises:
        ShardsError: the shards lack the split, a task or a finding, or the table is damaged.
    """
    index, shown = store.index, store.storage.shown
    if split not in index.tables:
        raise ShardsError(
            f"{shown}: no split {split!r}; the shards have {', '.join(index.tables)}. Pack it too: --splits."
        )
    table = index.tables[split]
    if not set(tasks) & set(table.records):
        raise ShardsError(f"{shown}: no {split} records of {', '.join(tasks)}; found {table.records}.")
    path = default_cache() / f"shards-{table.sha256[:40]}" / table.name
    build_once(path, lambda partial: _fetch_table(store, split, partial))
    records = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent))
    if set(table.records) - set(tasks):
        found = records.select_columns("task").with_format("arrow")[:].column("task")
        records = records.select(np.flatnonzero(pc.is_in(found, pa.array(tasks)).to_numpy()))
    return _with_labels(records, index, list(finding_names), shown)


def _fetch_table(store: ShardStore, split: str, path: Path) -> None:
    table = store.index.tables[split]
    content = store.storage.read(table.name)
    if hashlib.sha256(content).hexdigest() != table.sha256:
        raise ShardsError(
            f"{store.storage.shown}/{table.name}: {len(content)} bytes, not those that {table.size} bytes in the index stand "
            "for. Pack the shards again into an empty prefix."
        )
    path.write_bytes(content)


def _with_labels(
    records: datasets.Dataset, index: ShardIndex, finding_names: list[str], shown: str
) -> datasets.Dataset:
    """Return the records with the labels of these findings, in this order."""
    if finding_names == index.finding_names:
        return records
    if missing := sorted(set(finding_names) - set(index.finding_names)):
        raise ShardsError(
            f"{shown}: no labels of {', '.join(missing)}; packed were {', '.join(index.finding_names) or 'none'}. Pack them "
            "with --finding_names."
        )
    columns = [index.finding_names.index(name) for name in finding_names]
    rows = [
        [labels[column] if column < len(labels) else IGNORE_INDEX for column in columns] if labels else []
        for labels in records["finding_labels"][:]
    ]
    feature = records.features["finding_labels"]
    return records.remove_columns("finding_labels").add_column("finding_labels", rows, feature=feature)


def shard_numbers(store: ShardStore, records: datasets.Dataset) -> np.ndarray:
    """Return the number of each record's shard, (N,); -1 for records without a volume.

    Args:
        store: the shards.
        records: records of the shards, perhaps with other records' volumes.
    """
    column = records.select_columns("volume").with_format("arrow")[:].column("volume").dictionary_encode()
    column = column.unify_dictionaries().combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    known = np.array([store.number_of(path) for path in column.dictionary.to_pylist()] + [-1], np.int64)
    return known[column.indices.fill_null(len(known) - 1).to_numpy()]
