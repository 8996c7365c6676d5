"""Pretraining of a slice encoder on labels: which finding is in which quarter and in which patch of a phantom's slice."""

from copy import deepcopy
from functools import partial

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
from transformers import EvalPrediction, TrainingArguments, ViTConfig, ViTModel

from samf.model.hub_samf import publish_weights
from samf.model.image_processing_samf import SamfImageProcessor
from samf.phantoms.findings import DEMO_FINDINGS
from samf.phantoms.labelled_slices import LabelledSlice, LabelledSlices
from samf.training.trainer_base import StoppableTrainer, train_to_end
from samf.utils.files import atomic_update

_RAREST = 1e-4


def label_weights(labels: torch.Tensor) -> torch.Tensor:
    """Return a weight for each label, the inverse of its entropy, with a mean of 1.

    An unweighted cross-entropy is nearly zero for a finding that is in one patch of a thousand, even if it is never
    found. With these weights each label's loss is relative to that of a constant prediction.

    Args:
        labels: 0 or 1, (N, L).
    """
    shares = labels.double().mean(dim=0).clamp(_RAREST, 1 - _RAREST)
    entropies = -(shares * shares.log() + (1 - shares) * (1 - shares).log())
    weights = 1 / entropies
    return (weights / weights.mean()).float()


class LabelledEncoder(nn.Module):
    """A ViT that predicts the labels of a slice's quarters from its CLS token, and those of each patch from its token.

    Args:
        config: of the ViT.
        train: slices whose labels give the weights of the losses.
        patch_loss_weight: factor of the patches' loss; 0 trains on the quarters only.
    """

    def __init__(self, config: ViTConfig, train: LabelledSlices, patch_loss_weight: float):
        super().__init__()
        labels = torch.from_numpy(train.labels)
        patch_labels = torch.from_numpy(train.patch_labels).flatten(0, 1)  # (N * P, F)
        # The fused kernel's backward in bfloat16 takes longer on a CPU than all the rest of a step.
        self.vit = ViTModel._from_config(config, add_pooling_layer=False, attn_implementation="eager")
        self.quarters = nn.Linear(config.hidden_size, labels.shape[1])
        self.patches = nn.Linear(config.hidden_size, patch_labels.shape[1])
        self.patch_loss_weight = patch_loss_weight
        self.register_buffer("label_weights", label_weights(labels), persistent=False)
        self.register_buffer("patch_label_weights", label_weights(patch_labels), persistent=False)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, patch_labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the loss and the logits of the quarters.

        Args:
            pixel_values: (N, C, H, W).
            labels: of the quarters, (N, 4·F).
            patch_labels: (N, P, F).
        """
        tokens = self.vit(pixel_values=pixel_values).last_hidden_state  # (N, 1 + P, D)
        logits = self.quarters(tokens[:, 0])
        loss = F.binary_cross_entropy_with_logits(logits, labels, self.label_weights)
        if self.patch_loss_weight:
            places = self.patches(tokens[:, 1:])  # (N, P, F)
            patch_loss = F.binary_cross_entropy_with_logits(places, patch_labels, self.patch_label_weights)
            loss = loss + self.patch_loss_weight * patch_loss
        return {"loss": loss, "logits": logits}


def collate(rows: list[LabelledSlice], processor: SamfImageProcessor) -> dict[str, torch.Tensor]:
    """Return a batch: normalised `pixel_values` (N, C, H, W), `labels` (N, 4·F) and `patch_labels` (N, P, F)."""
    return {
        "pixel_values": processor.normalize_(torch.stack([row.pixels for row in rows]).float()),
        "labels": torch.stack([row.labels for row in rows]),
        "patch_labels": torch.stack([row.patch_labels for row in rows]).float(),
    }


def _auc_by_finding(prediction: EvalPrediction) -> dict[str, float]:
    """Return the area under the ROC curve of each finding, averaged over the quarters that have both values."""
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids[0])
    occurring = [column for column in range(labels.shape[1]) if 0 < labels[:, column].mean() < 1]
    areas = {column: roc_auc_score(labels[:, column], logits[:, column]) for column in occurring}
    by_finding = {
        f"auc_{name.lower().replace(' ', '_')}": float(np.mean(found))
        for number, name in enumerate(DEMO_FINDINGS)
        if (found := [area for column, area in areas.items() if column // 4 == number])
    }
    return {"auc": float(np.mean(list(areas.values()))), **by_finding}


def train_on_labels(
    config: ViTConfig,
    training: TrainingArguments,
    image_processor: SamfImageProcessor,
    patients: tuple[int, int],
    patch_loss_weight: float,
) -> None:
    """Train a ViT on generated phantoms, and save float16 weights and the preprocessor in `training.output_dir`.

    Args:
        config: of the ViT.
        training: arguments of the run.
        image_processor: extracts the slices.
        patients: number of phantoms to learn from, and of other phantoms, for the measured AUC.
        patch_loss_weight: factor of the patches' loss.
    """
    train, valid = (
        LabelledSlices(count, seed, image_processor, DEMO_FINDINGS, config.patch_size)
        for count, seed in zip(patients, (training.seed, training.seed + 1), strict=True)
    )
    training.label_names = ["labels", "patch_labels"]
    model = LabelledEncoder(config, train, patch_loss_weight)
    trainer = StoppableTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=valid,
        compute_metrics=_auc_by_finding,
        data_collator=partial(collate, processor=image_processor),
    )
    train_to_end(trainer)
    if trainer.is_world_process_zero():
        with atomic_update(training.output_dir) as temporary:  # before the evaluation, which may fail
            deepcopy(model.vit).half().save_pretrained(temporary)
            image_processor.save_pretrained(temporary)
            publish_weights(temporary)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
