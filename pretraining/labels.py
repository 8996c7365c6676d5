"""A slice encoder that learns to tell which finding lies in which quarter of a phantom's slice."""

from copy import deepcopy

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from samf.model.image_processing_samf import SamfImageProcessor
from samf.phantoms.findings import DEMO_FINDINGS
from samf.phantoms.labelled_slices import LabelledSlices
from samf.training.trainer_base import StoppableTrainer, train_to_end, written_whole

MAX_SHIFT = 3  # pixels


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]], processor: SamfImageProcessor, shift: int) -> dict:
    """pixel_values (N, C, H, W) normalised as the image processor does, moved by up to `shift` pixels; labels (N, L)."""
    slices = torch.stack([pixels for pixels, _ in rows]).float()
    if shift:
        slices = slices.roll(tuple(np.random.randint(-shift, shift + 1, size=2)), dims=(2, 3))
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return {
        "pixel_values": (slices * processor.rescale_factor - mean) / std,
        "labels": torch.stack([labels for _, labels in rows]),
    }


def mean_auc(prediction) -> dict[str, float]:
    """Area under the ROC curve, averaged over the labels that occur."""
    logits, labels = prediction.predictions, prediction.label_ids
    occur = [column for column in range(labels.shape[1]) if 0 < labels[:, column].mean() < 1]
    return {"auc": float(np.mean([roc_auc_score(labels[:, column], logits[:, column]) for column in occur]))}


class SliceTrainer(StoppableTrainer):
    """A trainer whose training batches are moved by some pixels and whose evaluation batches aren't."""

    def __init__(self, *args, image_processor: SamfImageProcessor, **kwargs):
        super().__init__(*args, data_collator=lambda rows: collate(rows, image_processor, MAX_SHIFT), **kwargs)
        self.still = lambda rows: collate(rows, image_processor, 0)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        moving, self.data_collator = self.data_collator, self.still
        loader = super().get_eval_dataloader(eval_dataset)
        self.data_collator = moving
        return loader


def train_on_labels(
    config: ViTConfig,
    training: TrainingArguments,
    image_processor: SamfImageProcessor,
    train_patients: int,
    valid_patients: int,
) -> None:
    """Train a ViT on phantoms drawn for it; float16 weights and the preprocessor go to `training.output_dir`."""
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
        compute_metrics=mean_auc,
        image_processor=image_processor,
    )
    train_to_end(trainer)
    if trainer.is_world_process_zero():
        with written_whole(training.output_dir) as temporary:  # first: an evaluation can fail
            deepcopy(model.vit).half().save_pretrained(temporary)
            image_processor.save_pretrained(temporary)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
