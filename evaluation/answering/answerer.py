"""Answer batches of records: prepare the model's inputs, generate or choose, and write the lines of the output files."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from samf.cache.slice_cache import SliceCache
from samf.data.collator import SamfCollator
from samf.data.schema import FAILURES_FILE, OnError, Record, VolumeStore, volume_of
from samf.evaluation.answering.answer_folder import PREDICTIONS, TIMES, AnswerFolder
from samf.evaluation.answering.batches import WINDOW
from samf.evaluation.answering.digests import VolumeDigests
from samf.evaluation.answering.option_likelihood import OptionCollator, answer_log_likelihoods, option_texts
from samf.evaluation.answering.settings import GenerationSettings
from samf.evaluation.answering.volume_readers import EncodedVolumes, ReadAhead, VolumeMemo
from samf.evaluation.schema import Failure, PredictionRow, TimesLine
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.processing_samf import SamfProcessor

__all__ = ["Answerer", "Collator", "ModelInputs"]

logger = logging.getLogger(__name__)

Batch: TypeAlias = Mapping[str, torch.Tensor]
# Records → left-padded tensors for `model.generate`.
Collator: TypeAlias = Callable[[Sequence[Record]], Batch]
T = TypeVar("T")

# What an unreadable volume raises while a batch is assembled; anything else is a bug and always ends the run.
_RECORD_ERRORS = (OSError, ValueError)
_EMBEDDING_BYTES = 1 << 30  # of slice embeddings that stay in memory, so that a volume is encoded once for all tasks
# Inputs that are cast to the model's dtype; positions and masks keep theirs.
_FLOAT_INPUTS = ("pixel_values", "slice_embeddings")


class ModelInputs:
    """The collators of a run; by default over volumes that are read ahead in threads and encoded once each.

    Args:
        model: the model that encodes the volumes.
        processor: the model's processor.
        settings: batch size, and how multiple choice is answered.
        collator: replaces the default collator.
        volume_store: prepared volumes; None = the last few volumes are kept in memory.

    Raises:
        ValueError: a `collator` with settings.mcq="likelihood", which needs training batches.
    """

    def __init__(
        self,
        model: SamfForConditionalGeneration,
        processor: SamfProcessor,
        settings: GenerationSettings,
        *,
        collator: Collator | None = None,
        volume_store: VolumeStore | None = None,
    ):
        self.likelihood: OptionCollator | None = None
        self._ahead: ReadAhead | None = None
        self._volumes: EncodedVolumes | None = None
        if collator is not None:
            if settings.mcq == "likelihood":
                raise ValueError("mcq='likelihood' needs training batches of its own; leave out `collator`.")
            self.generate = collator
            return
        rows = settings.batch_size or 1
        kept = 2 * rows + 1  # this batch's volumes, the next one's, and one that is in both
        store = VolumeMemo(processor.image_processor, kept) if volume_store is None else volume_store
        # Other stores may use the model, which must not run in threads.
        self._ahead = ReadAhead(store) if isinstance(store, VolumeMemo | SliceCache) else None
        # Other stores' embeddings are counted as if they were a model's own.
        fitting = _EMBEDDING_BYTES // (4 * processor.image_processor.num_slices * model.config.slice_dim)
        self._volumes = EncodedVolumes(
            model, processor.image_processor, self._ahead or store, max(WINDOW + kept, fitting)
        )
        self.generate = SamfCollator(processor, generation=True, volume_store=self._volumes)
        if settings.mcq == "likelihood":
            self.likelihood = OptionCollator(SamfCollator(processor, volume_store=self._volumes), rows)

    def read_ahead(self, records: Sequence[Record]) -> None:
        """Begin to read the volumes of records, as far as they aren't encoded yet, in threads."""
        if self._ahead and self._volumes:
            self._ahead.start([record for record in records if not self._volumes.holds(volume_of(record))])

    def close(self) -> None:
        """Stop the reading threads."""
        if self._ahead:
            self._ahead.close()


class Answerer:
    """Batches of records → lines of predictions.jsonl, failures.jsonl and times.jsonl.

    Args:
        model: used on its own device and in its own dtype.
        processor: its `batch_decode` decodes the answers.
        inputs: the collators.
        settings: how answers are generated.
        folder: where the lines are written.
        on_error: what to do about a record whose volume can't be read.
    """

    def __init__(
        self,
        model: SamfForConditionalGeneration,
        processor: SamfProcessor,
        inputs: ModelInputs,
        settings: GenerationSettings,
        folder: AnswerFolder,
        on_error: OnError,
    ):
        self.model = model
        self.processor = processor
        self.inputs = inputs
        self.settings = settings
        self.folder = folder
        self.on_error = on_error
        self._digests = VolumeDigests()
        stops = model.generation_config.eos_token_id
        self._end_tokens = set(stops) if isinstance(stops, list | tuple) else {stops}

    def __call__(self, batch: list[Record], answered: set[str], new_volumes: int) -> None:
        """Answer a whole batch and write the answers that are not in the folder yet.

        Args:
            batch: records of one task.
            answered: ids that have an answer already.
            new_volumes: how many volumes were in no batch of this task before.
        """
        task, started = batch[0]["task"], time.perf_counter()
        by_likelihood = self.inputs.likelihood if task == "multiple_choice" else None
        if by_likelihood is not None:
            batch, chunks = self._collate(batch, by_likelihood)
            read = time.perf_counter()
            rows = self._choose(batch, chunks or [])
        else:
            batch, inputs = self._collate(batch, self.inputs.generate)
            read = time.perf_counter()
            rows = [] if inputs is None else self._generate(batch, inputs)
        if not batch:
            return
        self.folder.append(PREDICTIONS, [row for row in rows if row["id"] not in answered])
        line: TimesLine = {
            "task": task,
            "answers": len(rows),
            "volumes": new_volumes,
            "tokens": sum(row["tokens"] or 0 for row in rows),
            "read_seconds": read - started,
            "generate_seconds": time.perf_counter() - read,
        }
        self.folder.append(TIMES, [line])

    def _collate(self, batch: list[Record], collator: Callable[[Sequence[Record]], T]) -> tuple[list[Record], T | None]:
        """Return the records that can be read, and the model's inputs for them; None for no records."""
        try:
            return batch, collator(batch)
        except _RECORD_ERRORS as error:
            readable = [record for record in batch if self._is_readable(record, collator)]
            if len(readable) == len(batch):
                raise  # Each record can be read by itself: the batch as a whole fails.
            logger.debug("Batch taken apart after: %s", error)
            return readable, collator(readable) if readable else None

    def _is_readable(self, record: Record, collator: Callable[[Sequence[Record]], object]) -> bool:
        try:
            collator([record])
        except _RECORD_ERRORS as error:
            if self.on_error == "raise":
                error.add_note(
                    f"Record {record['id']}, volume {record['volume']}. --on_error skip lists it and continues."
                )
                raise
            logger.warning("Record %s is skipped: %s", record["id"], error)
            failure: Failure = {
                "id": record["id"],
                "scan_id": record.get("scan_id"),
                "task": record["task"],
                "volume": record["volume"],
                "error": f"{type(error).__name__}: {error}",
            }
            self.folder.append(FAILURES_FILE, [failure])
            return False
        return True

    def _generate(self, batch: list[Record], inputs: Batch) -> list[PredictionRow]:
        """Return the answers that `model.generate` gives in words."""
        inputs = self._to_model(inputs)
        try:
            with torch.no_grad():
                sequences = self.model.generate(**inputs, **self.settings.generate_arguments())  # (B, prompt + new)
        except torch.OutOfMemoryError as error:
            error.add_note(f"With --batch_size below {self.settings.batch_size} the run resumes where it stopped.")
            raise
        new = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [self._generated_row(record, ids, text) for record, ids, text in zip(batch, new, texts, strict=True)]

    def _choose(self, batch: list[Record], chunks: Sequence[Batch]) -> list[PredictionRow]:
        """Return the most likely option of each record; of equally likely ones the first."""
        scored = [pair for chunk in chunks for pair in answer_log_likelihoods(self.model, self._to_model(chunk))]
        rows, start = [], 0
        for record in batch:
            texts = option_texts(record)
            sums, counts = zip(*scored[start : start + len(texts)], strict=True)
            start += len(texts)
            best = sums.index(max(sums))
            row = self._row(record, texts[best])
            row["tokens"], row["truncated"] = counts[best], False
            row["option_log_likelihoods"], row["option_tokens"] = [round(x, 4) for x in sums], list(counts)
            rows.append(row)
        return rows

    def _generated_row(self, record: Record, ids: list[int], text: str) -> PredictionRow:
        end = next((position for position, token in enumerate(ids) if token in self._end_tokens), None)
        row = self._row(record, text.strip())
        row["tokens"] = len(ids) if end is None else end
        row["truncated"] = end is None and len(ids) >= self.settings.max_new_tokens
        return row

    def _row(self, record: Record, prediction: str) -> PredictionRow:
        """Return a line of predictions.jsonl; of the volume's path only the file name, which is the same elsewhere."""
        patient = {"patient_id": record["patient_id"]} if record.get("patient_id") is not None else {}
        return {
            "id": record["id"],
            "scan_id": record.get("scan_id"),
            "task": record["task"],
            "question": record.get("question"),
            "choices": record.get("choices"),
            **patient,  # type: ignore[typeddict-item]  # mypy allows no optional key here
            "reference": record["answer"],
            "prediction": prediction,
            "volume": None if record["volume"] is None else Path(record["volume"]).name,
            "volume_digest": self._digests.of(record),
        }

    def _to_model(self, inputs: Batch) -> dict[str, torch.Tensor]:
        def moved(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(self.model.device, self.model.dtype if name in _FLOAT_INPUTS else None)

        return {name: moved(name, value) for name, value in inputs.items()}
