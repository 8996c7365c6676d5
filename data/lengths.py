"""How many tokens records have, counted once."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from samf.data.prompts import record_prompt
from samf.data.record_cache import build_once, default_cache

TEXTS = ("id", "question", "choices", "answer")
BATCH = 1000
CACHED_FROM = 20_000  # records: fewer are counted anew in a few seconds


def add_lengths(
    records: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path | None = None
) -> datasets.Dataset:
    """The records with `length`, the tokens of question, choices and answer, for batches of about equal length.

    Tokenises batch by batch, a fast tokenizer on all cores. The lengths of many records are kept; of several processes one
    counts, and the others wait.

    Args:
        records: see `samf.data.records`. Those of a table in memory, or of a selection, are known again too.
        cache_dir: where lengths are kept; default: where the records of large tables are.
    """
    if len(records) < CACHED_FROM:
        return records.add_column("length", count_tokens(records, tokenizer))
    folder = Path(cache_dir or default_cache()) / "lengths"
    path = folder / f"{records._fingerprint}-{_tokenizer_hash(tokenizer)}.npy"
    build_once(path, lambda partial: _save(partial, count_tokens(records, tokenizer)))
    return records.add_column("length", np.load(path))


def count_tokens(records: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The tokens of question, choices and answer of each record, (len(records),) int64."""
    lengths = np.zeros(len(records), np.int64)
    with tqdm(
        total=len(records), desc="counting tokens", unit_scale=True, disable=len(records) < CACHED_FROM
    ) as progress:
        for start, texts in _batches(records):
            lengths[start : start + len(texts)] = [len(ids) for ids in tokenizer(texts)["input_ids"]]
            progress.update(len(texts))
    return lengths


def _batches(records: datasets.Dataset) -> Iterator[tuple[int, list[str]]]:
    """The texts of a batch's records, and the number of its first."""
    named = records.select_columns([name for name in TEXTS if name in records.column_names])
    for start in range(0, len(named), BATCH):
        columns = named[start : start + BATCH]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        yield start, [f"{record_prompt(row)} {row['answer']}" for row in rows]


def _save(partial: Path, lengths: np.ndarray) -> None:
    with partial.open("wb") as file:
        np.save(file, lengths)


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names what a tokenizer does. Its padding and truncation, which a call leaves behind, don't count."""
    if tokenizer.is_fast:
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        settings.pop("padding", None)
        settings.pop("truncation", None)
    else:
        settings = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
