"""How many tokens records have, counted once, and which records are too long."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from samf.data.collator import SamfCollator
from samf.data.prompts import record_prompt
from samf.data.record_cache import build_once, default_cache
from samf.model.processing_samf import SamfProcessor

TEXTS = ("id", "question", "choices", "answer")
BATCH = 1000
EXACT_BATCH = 32
# Tokens by which a text can differ within a prompt from the text alone, at its two ends.
ENDS = 8
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
    for start, rows in _rows(records):
        yield start, [f"{record_prompt(row)} {row['answer']}" for row in rows]


def _rows(records: datasets.Dataset) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The texts' columns of a batch's records, and the number of its first."""
    named = records.select_columns([name for name in TEXTS if name in records.column_names])
    for start in range(0, len(named), BATCH):
        columns = named[start : start + BATCH]
        yield start, [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def find_overlong(records: datasets.Dataset, processor: SamfProcessor, max_length: int) -> dict[int, int]:
    """Find the records that don't fit `max_length` even without their answers, which training cuts.

    Nearly all prompts are known to fit by their characters, the others by their tokens; only what is left is written out
    exactly as in training, and no volume is read.

    Returns:
        {row: tokens without the answer} of those records.
    """
    collator = SamfCollator(processor, volume_store=_NoSlices(processor.image_processor.num_slices))
    short = {"id": "", "question": "?", "choices": None, "answer": ".", "volume": ""}
    around = collator.uncuttable_lengths([short])[0] + ENDS
    suspects: list[int] = []
    for start, rows in _rows(records):
        prompts = [record_prompt(row) for row in rows]
        # A token has at least one character, of ASCII. Others may be normalised into several, or be split into bytes.
        rest = [k for k, text in enumerate(prompts) if not text.isascii() or len(text) + around >= max_length]
        lengths = processor.tokenizer([prompts[k] for k in rest])["input_ids"] if rest else []
        suspects += [start + k for k, ids in zip(rest, lengths, strict=True) if len(ids) + around >= max_length]
    found = {}
    for start in range(0, len(suspects), EXACT_BATCH):
        chosen = suspects[start : start + EXACT_BATCH]
        exact = collator.uncuttable_lengths([records[row] for row in chosen])
        found |= {row: length for row, length in zip(chosen, exact, strict=True) if length >= max_length}
    return found


class _NoSlices:
    """A store that gives each volume as many slices as it will have, without their contents."""

    def __init__(self, count: int):
        self.embeddings = {
            "slice_embeddings": np.zeros((count, 1), np.float32),
            "slice_planes": np.zeros(count, np.int64),
            "slice_positions": np.zeros(count, np.float32),
        }

    def get(self, path: str, *, rescale: Sequence[float] | None = None) -> Mapping[str, np.ndarray]:
        return self.embeddings


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
