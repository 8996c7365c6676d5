"""Records become padded batches."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from samf.data.prompts import record_conversation
from samf.data.schema import IGNORE_INDEX, VolumeStore
from samf.model.ct_volume import read_ct
from samf.model.processing_samf import SamfProcessor

logger = logging.getLogger(__name__)


class SamfCollator:
    """A list of records to one batch for `SamfForConditionalGeneration`.

    Args:
        processor: tokenizer, chat template and image processor.
        generation: False: right-padded, with `labels` on the answer and its end token. True: left-padded prompts.
        volume_store: a store whose `get(path)` gives a volume's slices or embeddings; None reads the file each time.
        max_length: longest sequence in training. A longer record loses the end of its answer, but never the end token,
            the prompt or an image token; `truncated` counts them. None = no limit.
        findings_only: volumes and `finding_targets` without any text, for training the findings head.
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

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors with one row a record: `input_ids`, `attention_mask`, `prompt_mask` (B, T), the volumes' tensors,
        in training `labels` (B, T), and `finding_targets` (B, L) where a record has finding labels."""
        volumes = [self.read_volume(record) for record in records]
        if self.findings_only:
            batch = self._volumes_alone(records, volumes)
        elif self.generation:
            batch = self._encode(records, volumes, add_generation_prompt=True, padding=True, padding_side="left")
        else:
            batch = self._training_batch(records, volumes)
        labels = [record.get("finding_labels") or [] for record in records]
        if not self.generation and any(labels):
            unknown = [IGNORE_INDEX] * max(map(len, labels))
            batch["finding_targets"] = torch.tensor([row or unknown for row in labels])
        return batch

    def read_volume(self, record: Mapping[str, Any]) -> Any:
        """A record's volume: from the store, or read from its file; None for text alone. Raises CTReadError."""
        path, rescale = record["volume"], record.get("rescale")
        if path is None:
            return None
        if self.volume_store is None:
            return read_ct(path, rescale=rescale)
        return self.volume_store.get(path, rescale=rescale)

    def uncuttable_lengths(self, records: Sequence[Mapping[str, Any]]) -> list[int]:
        """Count each record's tokens that `max_length` can't cut: all but its answer's."""
        volumes = [self.read_volume(record) for record in records]
        encoded = self._encode(records, volumes, answer=True, padding=False)
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        return [len(ids) - sum(answer) for ids, answer in pairs]

    def _encode(
        self, records: Sequence[Mapping[str, Any]], volumes: list[Any], *, answer: bool = False, **options: Any
    ) -> dict[str, Any]:
        conversations = [
            record_conversation(record, volume, answer=answer) for record, volume in zip(records, volumes, strict=True)
        ]
        template = {key: options.pop(key) for key in ("add_generation_prompt",) if key in options}
        if options.get("padding"):
            options["return_tensors"] = "pt"
        encoded = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=answer,
            processor_kwargs=options,
            **template,
        )
        return dict(encoded)

    def _volumes_alone(self, records: Sequence[Mapping[str, Any]], volumes: list[Any]) -> dict[str, Any]:
        missing = [record["id"] for record, volume in zip(records, volumes, strict=True) if volume is None]
        if missing:
            raise ValueError(f"Records {missing[:5]} have no volume; training on findings needs one in each record.")
        return dict(self.processor(volumes=volumes, return_tensors="pt"))

    def _training_batch(self, records: Sequence[Mapping[str, Any]], volumes: list[Any]) -> dict[str, Any]:
        encoded = self._encode(records, volumes, answer=True, padding=False)
        rows = list(
            zip(encoded.pop("input_ids"), encoded.pop("assistant_masks"), encoded.pop("prompt_mask"), strict=True)
        )
        encoded.pop("attention_mask")
        rows = [self._fit(record, *row) for record, row in zip(records, rows, strict=True)]
        width = max(len(ids) for ids, _, _ in rows)
        pad = self.processor.tokenizer.pad_token_id

        def padded(sequence: Sequence[int], value: int) -> list[int]:
            return [*sequence, *[value] * (width - len(sequence))]

        encoded["input_ids"] = torch.tensor([padded(ids, pad) for ids, _, _ in rows])
        encoded["attention_mask"] = torch.tensor([padded([1] * len(ids), 0) for ids, _, _ in rows])
        encoded["prompt_mask"] = torch.tensor([padded(prompt, False) for _, _, prompt in rows])
        answers = torch.tensor([padded(answer, 0) for _, answer, _ in rows]).bool()
        encoded["labels"] = encoded["input_ids"].masked_fill(~answers, IGNORE_INDEX)
        return encoded

    def _fit(
        self, record: Mapping[str, Any], ids: list[int], answer: list[int], prompt: list[bool]
    ) -> tuple[list[int], list[int], list[bool]]:
        """Cut the answer's end, but not its end token, until the sequence fits `max_length`."""
        excess = len(ids) - self.max_length if self.max_length else 0
        if excess <= 0:
            return ids, answer, prompt
        last = max((position for position, marked in enumerate(answer) if marked), default=-1)
        if sum(answer) <= excess:
            raise ValueError(
                f"Record {record['id']!r} is {len(ids)} tokens long, of which {sum(answer)} are the answer's; it can't be cut "
                f"to max_length={self.max_length}. Raise max_length, or give the volume fewer image tokens."
            )
        self.truncated += 1
        if self.truncated == 1:
            logger.warning(
                "Record %r loses the last %d tokens of its answer: max_length=%d.",
                record["id"],
                excess,
                self.max_length,
            )
        return tuple(row[: last - excess] + row[last:] for row in (ids, answer, prompt))
