"""Answers during training: a few validation records are answered, scored and shown at every evaluation."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from torch import nn

from samf.cache.slice_cache import SliceCache
from samf.data.schema import VolumeStore, volume_of
from samf.evaluation.answering.answer_folder import PREDICTIONS
from samf.evaluation.answering.generation import GenerationSettings, generate_predictions
from samf.evaluation.metrics.multiple_choice import score_multiple_choice
from samf.evaluation.metrics.text_metrics import text_metrics
from samf.evaluation.prediction_rows import read_predictions
from samf.evaluation.schema import PredictionRow
from samf.model.ct_volume import VolumeRef, read_ct
from samf.model.processing_samf import SamfProcessor
from samf.reporting.slice_view import save_slice_image
from samf.utils.distributed import Processes

logger = logging.getLogger(__name__)

FOLDER = "_samples"  # shows patients; Trainer doesn't push names that begin with an underscore
_TEXT_SCORES = ("bleu_1", "bleu_4", "rouge_l", "meteor")
_SHOWN_WINDOW = 1

#: Takes a sample's name, its text in Markdown and the path of its image of slices.
ShowSample = Callable[[str, str, Path | None], None]


@dataclass
class SampleWriter:
    """Answers the same few records at every evaluation.

    Attributes:
        records: The records; see `choose_samples`.
        processor: Of the model.
        folder: Answers go to `folder`/_samples/step_…, as predictions.jsonl and images of the slices.
        settings: How answers are generated.
        shown: Number of reports that are shown with their references.
        volume_store: Prepared volumes; None = read from their files.
    """

    records: datasets.Dataset
    processor: SamfProcessor
    folder: Path
    settings: GenerationSettings
    shown: int = 2
    volume_store: VolumeStore | None = None

    def __call__(self, model: nn.Module, step: int, show: ShowSample | None = None) -> dict[str, float]:
        """Answer the records and return the answers' scores, on every process. Every process must call it.

        Args:
            model: The unwrapped model.
            step: Optimizer steps so far.
            show: Called on the first process for each report that is shown.
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

    def _show(self, folder: Path, rows: Sequence[PredictionRow], show: ShowSample) -> None:
        records = {record["id"]: record for record in self.records}
        reports = [row for row in rows if row["task"] == "report"][: self.shown]
        for number, row in enumerate(reports, start=1):
            volume, image = volume_of(records[row["id"]]), None
            if volume is not None:
                image = folder / f"report_{number}.png"
                slices = self._slices(volume)
                window = min(_SHOWN_WINDOW, slices["slices"].shape[1] - 1)
                save_slice_image(slices, image, window=window, image_processor=self.processor.image_processor)
            text = f"**Report**\n\n{row['prediction'] or '(empty)'}\n\n**Reference**\n\n{row['reference']}"
            show(f"report_{number}", text, image)

    def _slices(self, volume: VolumeRef) -> Mapping[str, np.ndarray]:
        """Return what the image processor extracts, from the slice cache where there is one."""
        cache = getattr(self.volume_store, "slices", self.volume_store)  # an EmbeddingCache has its slice cache
        if isinstance(cache, SliceCache):
            return cache.get(volume)
        return self.processor.image_processor.extract(read_ct(volume))


def choose_samples(records: datasets.Dataset, count: int) -> datasets.Dataset:
    """Return the first `count` records of each task."""
    by_task: dict[str, list[int]] = {}
    for index, task in enumerate(records["task"][:]):
        by_task.setdefault(task, []).append(index)
    return records.select(sorted(index for rows in by_task.values() for index in rows[:count]))


def score_samples(rows: Sequence[PredictionRow]) -> dict[str, float]:
    """Return BLEU, ROUGE and METEOR of texts and the accuracy of multiple choice, by task.

    Scores whose library is missing are left out.
    """
    found: dict[str, float | None] = {}
    for task in sorted({row["task"] for row in rows}):
        own = [row for row in rows if row["task"] == task]
        predictions, references = [row["prediction"] for row in own], [row["reference"] for row in own]
        if task == "multiple_choice":
            scores = score_multiple_choice(predictions, references, [row["choices"] for row in own])
            found[f"{task}_accuracy"] = scores["accuracy"]
        else:
            scores = text_metrics(predictions, references)["scores"]
            found |= {f"{task}_{name}": scores[name] for name in _TEXT_SCORES}
    return {name: score for name, score in found.items() if score is not None}
