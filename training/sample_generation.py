"""Answers during training: a few validation records answered and scored at every evaluation, and shown."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import nn

from samf.cache.slice_cache import SliceCache
from samf.data.schema import VolumeStore
from samf.evaluation.answering.answer_folder import PREDICTIONS
from samf.evaluation.answering.generation import GenerationSettings, generate_predictions
from samf.evaluation.metrics.multiple_choice import score_multiple_choice
from samf.evaluation.metrics.text_metrics import text_metrics
from samf.evaluation.scoring import read_predictions
from samf.model.ct_volume import read_ct
from samf.model.processing_samf import SamfProcessor
from samf.reporting.slice_view import save_slice_image
from samf.utils.distributed import Processes

logger = logging.getLogger(__name__)

FOLDER = "_samples"  # Trainer pushes nothing that begins with an underscore, and these show patients
TEXT_SCORES = ("bleu_1", "bleu_4", "rouge_l", "meteor")
SHOWN_WINDOW = 1


@dataclass
class SampleWriter:
    """Answers the same few records at every evaluation.

    Args:
        records: what is answered; see `choose_samples`.
        folder: answers go to `folder`/_samples/step_…, as predictions.jsonl and pictures of the slices.
        shown: how many reports are shown beside their references.
        volume_store: prepared volumes.
    """

    records: datasets.Dataset
    processor: SamfProcessor
    folder: Path
    settings: GenerationSettings
    shown: int = 2
    volume_store: VolumeStore | None = None

    def __call__(self, model: nn.Module, step: int, show: Callable[..., None] | None = None) -> dict[str, float]:
        """Figures of the answers, on every process.

        Args:
            model: the unwrapped model; every process must call.
            show: gets each report's name, text and picture's path, on the first process.
        """
        folder, processes = self.folder / FOLDER / f"step_{step:07d}", Processes()
        with processes.main_process_first():
            if processes.is_first:
                shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        generate_predictions(
            model,
            self.processor,
            self.records,
            folder,
            self.settings,
            volume_store=self.volume_store,
            described_by={"step": step},
        )
        rows = read_predictions(folder / PREDICTIONS)
        if show is not None and processes.is_first:
            self._show(folder, rows, show)
        return score_samples(rows)

    def _show(self, folder: Path, rows: Sequence[Mapping[str, Any]], show: Callable[..., None]) -> None:
        volumes = {record["id"]: record for record in self.records}
        reports = [row for row in rows if row["task"] == "report"][: self.shown]
        for number, row in enumerate(reports, start=1):
            record, picture = volumes[row["id"]], None
            if record["volume"] is not None:
                picture = folder / f"report_{number}.png"
                slices = self._slices(record)
                window = min(SHOWN_WINDOW, slices["slices"].shape[1] - 1)
                save_slice_image(slices, picture, window=window, image_processor=self.processor.image_processor)
            text = f"**Report**\n\n{row['prediction'] or '(empty)'}\n\n**Reference**\n\n{row['reference']}"
            show(f"report_{number}", text, picture)

    def _slices(self, record: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
        """What the image processor extracts, from the cache of slices where there is one."""
        cache = getattr(self.volume_store, "slices", self.volume_store)  # an EmbeddingCache has one below it
        if isinstance(cache, SliceCache):
            return cache.get(record["volume"], rescale=record.get("rescale"))
        return self.processor.image_processor.extract(read_ct(record["volume"], rescale=record.get("rescale")))


def choose_samples(records: datasets.Dataset, count: int) -> datasets.Dataset:
    """The first `count` records of each task."""
    seen: dict[str, list[int]] = {}
    for index, task in enumerate(records["task"][:]):
        seen.setdefault(task, []).append(index)
    return records.select(sorted(index for rows in seen.values() for index in rows[:count]))


def score_samples(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """BLEU, ROUGE and METEOR of texts, accuracy of multiple choice, by task, as far as they can be computed here."""
    figures: dict[str, float | None] = {}
    for task in sorted({row["task"] for row in rows}):
        own = [row for row in rows if row["task"] == task]
        predictions, references = [row["prediction"] for row in own], [row["reference"] for row in own]
        if task == "multiple_choice":
            scores = score_multiple_choice(predictions, references, [row["choices"] for row in own])
            figures[f"{task}_accuracy"] = scores["accuracy"]
        else:
            scores = text_metrics(predictions, references)["scores"]
            figures |= {f"{task}_{name}": scores[name] for name in TEXT_SCORES}
    return {name: figure for name, figure in figures.items() if figure is not None}
