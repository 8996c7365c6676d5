"""Stage 1: train a small slice encoder on phantoms.

    python pretrain_encoder.py --config recipes/demo/slice_encoder.yaml

A ViT learns to tell which finding lies in which quarter of a slice. Its folder is what `train.py --slice_encoder` takes.
"""

import logging
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from samf.data.labelled_slices import LabelledSlices
from samf.data.phantom_findings import DEMO_FINDINGS
from samf.image_processing_samf import SamfImageProcessor
from samf.recipe import parse_recipe

MAX_SHIFT = 3  # pixels


@dataclass
class EncoderArguments:
    """The ViT and the slices it learns from."""

    image_size: int = field(default=64, metadata={"help": "pixels a side"})
    patch_size: int = field(default=8)
    hidden_size: int = field(default=128)
    num_hidden_layers: int = field(default=4)
    num_attention_heads: int = field(default=4)
    intermediate_size: int = field(default=512)
    slices_per_plane: int = field(default=12)
    slab: str = field(default="mean", metadata={"help": "none, mean or mip over the voxels between two slices"})
    train_patients: int = field(default=1500, metadata={"help": "phantoms to learn from"})
    valid_patients: int = field(default=150, metadata={"help": "other phantoms, for the measured AUC"})


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


class SliceTrainer(Trainer):
    """Trainer whose training batches are moved by some pixels and whose evaluation batches aren't."""

    def __init__(self, *args, image_processor: SamfImageProcessor, **kwargs):
        super().__init__(*args, data_collator=lambda rows: collate(rows, image_processor, MAX_SHIFT), **kwargs)
        self.still = lambda rows: collate(rows, image_processor, 0)

    def get_eval_dataloader(self, eval_dataset=None):
        moving, self.data_collator = self.data_collator, self.still
        loader = super().get_eval_dataloader(eval_dataset)
        self.data_collator = moving
        return loader


def main(argv: list[str] | None = None) -> None:
    args, training = parse_recipe((EncoderArguments, TrainingArguments), argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    set_seed(training.seed)
    training.remove_unused_columns = False
    image_processor = SamfImageProcessor(slices_per_plane=args.slices_per_plane, slab=args.slab, size=args.image_size)
    train, valid = (
        LabelledSlices(patients, seed, image_processor, DEMO_FINDINGS)
        for patients, seed in ((args.train_patients, training.seed), (args.valid_patients, training.seed + 1))
    )
    config = ViTConfig(
        image_size=args.image_size,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=args.intermediate_size,
        layer_norm_eps=1e-6,
        num_labels=train.labels.shape[1],
        problem_type="multi_label_classification",
    )
    model = ViTForImageClassification(config)
    trainer = SliceTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=valid,
        compute_metrics=mean_auc,
        image_processor=image_processor,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.log_metrics("eval", trainer.evaluate())
    model.vit.half().save_pretrained(training.output_dir)
    image_processor.save_pretrained(training.output_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
