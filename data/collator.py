"""The collator: a list of records becomes one padded batch."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from samf.data.prompts import record_conversation
from samf.data.schema import IGNORE_INDEX, ChatMessage, Record, VolumeStore, volume_of
from samf.model.ct_volume import CTVolume, read_ct
from samf.model.processing_samf import SamfProcessor

logger = logging.getLogger(__name__)

Volume: TypeAlias = CTVolume | Mapping[str, np.ndarray] | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Row:
    """The sequence of one record, without padding."""

    ids: list[int]
    answer: list[int]  # 1 where the token is the answer's or its end token
    prompt: list[bool]  # True where the token is text of the prompt

    def __len__(self) -> int:
        return len(self.ids)

    def without(self, start: int, stop: int) -> "_Row":
        """Return the sequence without the tokens from `start` to `stop`."""
        ids, answer, prompt = self.ids, self.answer, self.prompt
        return _Row(ids[:start] + ids[stop:], answer[:start] + answer[stop:], prompt[:start] + prompt[stop:])


class SamfCollator:
    """A collator of records into batches for `SamfForConditionalGeneration`.

    Args:
        processor: tokenizer, chat template and image processor.
        generation: False gives right-padded sequences with `labels` on the answer and its end token, True left-padded
            prompts.
        volume_store: its `get(path)` returns the slices or the embeddings of a volume; None reads the file each time.
        max_length: longest sequence in training, in tokens; None = no limit. A longer record loses the end of its answer,
            but never the end token, the prompt or an image token. `truncated` counts these records.
        findings_only: gives volumes and `finding_targets` without text, for training the findings head.

    Attributes:
        truncated: how many records have lost the end of their answers.
    """

    def __init__(
        self,
        processor: SamfProcessor,
        generation: bool = False,
        volume_store: VolumeStore | None = None,
        max_length: int | None = None,
        findings_only: bool = False,
    ):
        self.processor = processor
        self.generation = generation
        self.volume_store = volume_store
        self.max_length = max_length
        self.findings_only = findings_only
        self.truncated = 0

    def __call__(self, records: Sequence[Record]) -> dict[str, torch.Tensor]:
        """Return one batch.

        `input_ids`, `attention_mask` and `prompt_mask` (B, T), and the tensors of the volumes; in training also `labels`
        (B, T) and, if any record has finding labels, `finding_targets` (B, L), IGNORE_INDEX where they are unknown.

        Raises:
            CTReadError: a volume can't be read.
            ValueError: a record doesn't fit `max_length` even without its answer.
        """
        volumes = [self.read_volume(record) for record in records]
        if self.findings_only:
            batch = self._volumes_only(records, volumes)
        elif self.generation:
            batch = self._generation_batch(records, volumes)
        else:
            batch = self._training_batch(records, volumes)
        labels = [record.get("finding_labels") or [] for record in records]
        if not self.generation and any(labels):
            unknown = [IGNORE_INDEX] * max(map(len, labels))
            batch["finding_targets"] = torch.tensor([row or unknown for row in labels])
        return batch

    def read_volume(self, record: Record) -> Volume | None:
        """Return the volume of a record, from the store or its file; None for text only. Raises CTReadError."""
        volume = volume_of(record)
        if volume is None:
            return None
        return read_ct(volume) if self.volume_store is None else self.volume_store.get(volume)

    def uncuttable_lengths(self, records: Sequence[Record]) -> list[int]:
        """Return the number of tokens of each record without its answer, which `max_length` can't shorten."""
        rows, _ = self._encode_with_answers(records, [self.read_volume(record) for record in records])
        return [len(row) - sum(row.answer) for row in rows]

    def _volumes_only(self, records: Sequence[Record], volumes: Sequence[Volume | None]) -> dict[str, torch.Tensor]:
        missing = [record["id"] for record, volume in zip(records, volumes, strict=True) if volume is None]
        if missing:
            raise ValueError(f"Records {missing[:5]} have no volume; training on findings needs one in each record.")
        return dict(self.processor(volumes=volumes, return_tensors="pt"))

    def _generation_batch(self, records: Sequence[Record], volumes: Sequence[Volume | None]) -> dict[str, torch.Tensor]:
        encoded = self.processor.apply_chat_template(
            _conversations(records, volumes, answer=False),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=False,
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
        )
        return dict(encoded)

    def _training_batch(self, records: Sequence[Record], volumes: Sequence[Volume | None]) -> dict[str, torch.Tensor]:
        rows, batch = self._encode_with_answers(records, volumes)
        rows = [self._truncated(record, row) for record, row in zip(records, rows, strict=True)]
        width = max(map(len, rows))
        pad = self.processor.tokenizer.pad_token_id

        def padded(sequence: Sequence[int], value: int) -> list[int]:
            return [*sequence, *[value] * (width - len(sequence))]

        batch["input_ids"] = torch.tensor([padded(row.ids, pad) for row in rows])
        batch["attention_mask"] = torch.tensor([padded([1] * len(row), 0) for row in rows])
        batch["prompt_mask"] = torch.tensor([padded(row.prompt, False) for row in rows])
        is_answer = torch.tensor([padded(row.answer, 0) for row in rows]).bool()
        batch["labels"] = batch["input_ids"].masked_fill(~is_answer, IGNORE_INDEX)
        return batch

    def _encode_with_answers(
        self, records: Sequence[Record], volumes: Sequence[Volume | None]
    ) -> tuple[list[_Row], dict[str, torch.Tensor]]:
        """Return the sequence of each record with its answer, and the tensors of the volumes."""
        encoded = dict(
            self.processor.apply_chat_template(
                _conversations(records, volumes, answer=True),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                processor_kwargs={"padding": False},
            )
        )
        columns = [encoded.pop(name) for name in ("input_ids", "assistant_masks", "prompt_mask")]
        encoded.pop("attention_mask")
        return [_Row(*row) for row in zip(*columns, strict=True)], encoded

    def _truncated(self, record: Record, row: _Row) -> _Row:
        """Cut the end of the answer, but not its end token, until the sequence fits `max_length`."""
        excess = len(row) - self.max_length if self.max_length else 0
        if excess <= 0:
            return row
        last = max((position for position, marked in enumerate(row.answer) if marked), default=-1)
        if sum(row.answer) <= excess:
            raise ValueError(
                f"Record {record['id']!r} is {len(row)} tokens long, of which {sum(row.answer)} are the answer's; it can't be "
                f"cut to max_length={self.max_length}. Raise max_length, or give the volume fewer image tokens."
            )
        self.truncated += 1
        if self.truncated == 1:
            logger.warning(
                "Record %r loses the last %d tokens of its answer: max_length=%d.",
                record["id"],
                excess,
                self.max_length,
            )
        return row.without(last - excess, last)


def _conversations(
    records: Sequence[Record], volumes: Sequence[Volume | None], answer: bool
) -> list[list[ChatMessage]]:
    return [record_conversation(record, volume, answer=answer) for record, volume in zip(records, volumes, strict=True)]
