"""Token counts of records, computed once, and the records that are too long."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict, cast

import datasets
import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from samf.data.collator import SamfCollator
from samf.data.prompts import record_prompt
from samf.data.record_cache import build_once, default_cache
from samf.data.schema import Record, VolumeLike
from samf.model.processing_samf import SamfProcessor

_TEXTS = ("id", "question", "choices", "answer")
_BATCH = 1000
_EXACT_BATCH = 32
# Tokens by which a text within a prompt can differ from the text by itself, at its two ends.
_ENDS = 8
CACHED_FROM = 20_000  # records; fewer are counted again in a few seconds


class _Texts(TypedDict):
    """The columns of a record from which its prompt is made."""

    id: str
    question: str
    choices: list[str] | None
    answer: str


def add_lengths(
    records: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path | None = None
) -> datasets.Dataset:
    """Return the records with a column `length`, the tokens of question, choices and answer, for batches of equal length.

    The lengths of many records are kept in a file that one process writes while the others wait.

    Args:
        records: a Dataset of records; its fingerprint names the file, so tables in memory and selections have one too.
        tokenizer: counts the tokens, batch by batch; a fast one uses all cores.
        cache_dir: the folder for lengths; default: that of the records of large tables.
    """
    if len(records) < CACHED_FROM:
        return records.add_column("length", count_tokens(records, tokenizer))
    folder = Path(cache_dir or default_cache()) / "lengths"
    path = folder / f"{records._fingerprint}-{_tokenizer_hash(tokenizer)}.npy"
    build_once(path, lambda partial: _save(partial, count_tokens(records, tokenizer)))
    return records.add_column("length", np.load(path))


def count_tokens(records: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the number of tokens of question, choices and answer of each record, (len(records),) int64."""
    lengths = np.zeros(len(records), np.int64)
    with tqdm(
        total=len(records), desc="counting tokens", unit_scale=True, disable=len(records) < CACHED_FROM
    ) as progress:
        for start, texts in _batches(records):
            lengths[start : start + len(texts)] = [len(ids) for ids in tokenizer(texts)["input_ids"]]
            progress.update(len(texts))
    return lengths


def _batches(records: datasets.Dataset) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first record of each batch, and the batch's texts."""
    for start, rows in _rows(records):
        yield start, [f"{record_prompt(row)} {row['answer']}" for row in rows]


def _rows(records: datasets.Dataset) -> Iterator[tuple[int, list[_Texts]]]:
    """Yield the number of the first record of each batch, and the batch's records with the columns of their texts."""
    named = records.select_columns([name for name in _TEXTS if name in records.column_names])
    for start in range(0, len(named), _BATCH):
        columns = named[start : start + _BATCH]
        yield (
            start,
            [cast(_Texts, dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)],
        )


def find_overlong(records: datasets.Dataset, processor: SamfProcessor, max_length: int) -> dict[int, int]:
    """Find the records that don't fit `max_length` even without their answers, which training truncates.

    Most prompts fit by their number of characters, most others by their tokens; only the rest are encoded exactly as in
    training. No volume is read.

    Args:
        records: a Dataset of records.
        processor: encodes the records as in training.
        max_length: the longest sequence in training, in tokens.

    Returns:
        {row: tokens without the answer} of the records that don't fit.
    """
    collator = SamfCollator(processor, volume_store=_NoSlices(processor.image_processor.num_slices))
    short: Record = {
        "id": "",
        "scan_id": "",
        "patient_id": None,
        "volume": "",
        "finding_labels": [],
        "task": "report",
        "question": "?",
        "choices": None,
        "answer": ".",
    }
    around = collator.uncuttable_lengths([short])[0] + _ENDS
    suspects: list[int] = []
    for start, rows in _rows(records):
        prompts = [record_prompt(row) for row in rows]
        # In ASCII a token has at least one character. Other characters may become several, or be split into bytes.
        rest = [k for k, text in enumerate(prompts) if not text.isascii() or len(text) + around >= max_length]
        lengths = processor.tokenizer([prompts[k] for k in rest])["input_ids"] if rest else []
        suspects += [start + k for k, ids in zip(rest, lengths, strict=True) if len(ids) + around >= max_length]
    found: dict[int, int] = {}
    for start in range(0, len(suspects), _EXACT_BATCH):
        chosen = suspects[start : start + _EXACT_BATCH]
        exact = collator.uncuttable_lengths([records[row] for row in chosen])
        found |= {row: length for row, length in zip(chosen, exact, strict=True) if length >= max_length}
    return found


class _NoSlices:
    """A volume store that returns as many slice embeddings as a volume has, all zero."""

    def __init__(self, count: int):
        self.embeddings: dict[str, np.ndarray] = {
            "slice_embeddings": np.zeros((count, 1), np.float32),
            "slice_planes": np.zeros(count, np.int64),
            "slice_positions": np.zeros(count, np.float32),
        }

    def get(self, volume: VolumeLike) -> Mapping[str, np.ndarray]:
        """Return the embeddings of any volume."""
        return self.embeddings


def _save(partial: Path, lengths: np.ndarray) -> None:
    with partial.open("wb") as file:
        np.save(file, lengths)


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what a tokenizer does, without its padding and truncation, which calls change."""
    if tokenizer.is_fast:
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        settings.pop("padding", None)
        settings.pop("truncation", None)
    else:
        settings = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
