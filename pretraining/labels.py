"""Pretraining of a slice encoder on labels: which finding is in which quarter of a phantom's slice."""

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainingArguments, ViTConfig, ViTForImageClassification

from samf.model.hub_samf import publish_weights
from samf.model.image_processing_samf import SamfImageProcessor
from samf.phantoms.findings import DEMO_FINDINGS
from samf.phantoms.labelled_slices import LabelledSlices
from samf.pretraining.pixels import normalise_pixels
from samf.training.trainer_base import StoppableTrainer, train_to_end
from samf.utils.files import atomic_update

_MAX_SHIFT = 3  # pixels


def collate(
    rows: list[tuple[torch.Tensor, torch.Tensor]], processor: SamfImageProcessor, shift: int
) -> dict[str, torch.Tensor]:
    """Return a batch: `pixel_values` (N, C, H, W), randomly shifted and normalised, and `labels` (N, L).

    Args:
        rows: Slices uint8 (C, H, W) with their labels (L,).
        processor: Has mean and standard deviation of each channel.
        shift: Largest shift in pixels, in either direction; the whole batch is shifted alike.
    """
    slices = torch.stack([pixels for pixels, _ in rows]).float()
    if shift:
        slices = slices.roll(tuple(np.random.randint(-shift, shift + 1, size=2)), dims=(2, 3))
    return {
        "pixel_values": normalise_pixels(slices, processor),
        "labels": torch.stack([labels for _, labels in rows]),
    }


def _mean_auc(prediction: EvalPrediction) -> dict[str, float]:
    """Return the area under the ROC curve, averaged over the labels that have both values."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    occurring = [column for column in range(labels.shape[1]) if 0 < labels[:, column].mean() < 1]
    return {"auc": float(np.mean([roc_auc_score(labels[:, column], logits[:, column]) for column in occurring]))}


class SliceTrainer(StoppableTrainer):
    """A trainer that shifts the images of training batches by some pixels, but not those of evaluation batches.

    Args:
        *args: As for `StoppableTrainer`.
        image_processor: See `collate`.
        **kwargs: As for `StoppableTrainer`.
    """

    def __init__(self, *args: Any, image_processor: SamfImageProcessor, **kwargs: Any):
        super().__init__(*args, data_collator=lambda rows: collate(rows, image_processor, _MAX_SHIFT), **kwargs)
        self._eval_collator = lambda rows: collate(rows, image_processor, 0)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return Trainer's loader with images that aren't shifted."""
        train_collator, self.data_collator = self.data_collator, self._eval_collator
        loader = super().get_eval_dataloader(eval_dataset)
        self.data_collator = train_collator
        return loader


def train_on_labels(
    config: ViTConfig,
    training: TrainingArguments,
    image_processor: SamfImageProcessor,
    train_patients: int,
    valid_patients: int,
) -> None:
    """Train a ViT on generated phantoms, and save float16 weights and the preprocessor in `training.output_dir`.

    Args:
        config: Of the ViT; gets the labels.
        training: Arguments of the run.
        image_processor: Extracts the slices.
        train_patients: Number of phantoms to learn from.
        valid_patients: Number of other phantoms, for the measured AUC.
    """
    train, valid = (
        LabelledSlices(patients, seed, image_processor, DEMO_FINDINGS)
        for patients, seed in ((train_patients, training.seed), (valid_patients, training.seed + 1))
    )
    config.num_labels = train.labels.shape[1]
    config.problem_type = "multi_label_classification"
    model = ViTForImageClassification(config)
    trainer = SliceTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=valid,
        compute_metrics=_mean_auc,
        image_processor=image_processor,
    )
    train_to_end(trainer)
    if trainer.is_world_process_zero():
        with atomic_update(training.output_dir) as temporary:  # before the evaluation, which may fail
            deepcopy(model.vit).half().save_pretrained(temporary)
            image_processor.save_pretrained(temporary)
            publish_weights(temporary)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
