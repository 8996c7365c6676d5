"""DINO's Trainer: it measures nearest neighbours, draws attention maps, and saves a slice encoder."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, TrainingArguments

from samf.model.hub_samf import publish_weights
from samf.model.image_processing_samf import SamfImageProcessor
from samf.pretraining.attention_maps import cls_attention, save_attention_image
from samf.pretraining.dino import DinoArguments, DinoModel, DinoSchedules, DinoViews
from samf.pretraining.labelled_sets import LabelledDataset
from samf.pretraining.neighbours import knn_accuracy
from samf.pretraining.pixels import normalise_pixels
from samf.pretraining.row_shares import share_rows
from samf.training.sampling import order_seed
from samf.training.trainer_base import ResumableTrainer
from samf.utils.files import atomic_update

logger = logging.getLogger(__name__)

ATTENTION = "_attention"  # shows patients; Trainer doesn't push names that begin with an underscore


class DinoTrainer(ResumableTrainer):
    """Trains a DinoModel. `evaluate` measures the teacher's accuracy by nearest neighbours on held-out labelled slices.

    Args:
        encoder: The slice encoder to train.
        args: Of the training.
        dino_args: Of DINO.
        slices: To learn from, uint8 (3, H, W) each.
        bank: Labelled slices.
        queries: Held-out labelled slices, whose labels are predicted by their neighbours in the bank.
        image_processor: Normalises pixels; saved with the encoder.
        neighbours: Number of neighbours that vote.
        attention_slices: Number of queries whose attention maps an evaluation draws, below `output_dir`/_attention.

    Raises:
        ValueError: An image or crop size isn't a multiple of the encoder's patch size.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        args: TrainingArguments,
        dino_args: DinoArguments,
        *,
        slices: Dataset,
        bank: LabelledDataset,
        queries: LabelledDataset,
        image_processor: SamfImageProcessor,
        neighbours: int = 20,
        attention_slices: int = 0,
    ):
        size, patch = image_processor.size, encoder.config.patch_size
        for name, side in (("image_size", size), ("local_crop_size", dino_args.local_crop_size)):
            if side % patch:
                raise ValueError(f"{name}={side} isn't a multiple of the encoder's patch size, {patch}.")
        self.dino = DinoModel(encoder, dino_args)
        self.bank, self.queries, self.neighbours = bank, queries, neighbours
        self.image_processor = image_processor
        self.shown = [int(i) for i in np.linspace(0, len(queries) - 1, attention_slices)]
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        mean, std = image_processor.image_mean, image_processor.image_std
        super().__init__(
            model=self.dino,
            args=args,
            train_dataset=DinoViews(slices, dino_args, size, mean, std, order_seed(args)),
            eval_dataset=queries,
            callbacks=[DinoSchedules(self.dino, dino_args)],
        )

    def evaluate(self, *args: object, metric_key_prefix: str = "eval", **kwargs: object) -> dict[str, float]:
        """Return the accuracy by nearest neighbours and the embeddings' spread; the main process draws attention maps.

        Args:
            *args: Ignored; Trainer's.
            metric_key_prefix: Of `…_knn_accuracy` and `…_embedding_spread`.
            **kwargs: Ignored; Trainer's.
        """
        bank, queries = self.embed(self.bank), self.embed(self.queries)
        accuracy = knn_accuracy(bank, self.bank.labels, queries, self.queries.labels, self.neighbours)
        spread = float(np.std(queries / np.linalg.norm(queries, axis=1, keepdims=True), axis=0).mean())
        if self.shown and self.is_world_process_zero():
            self._draw_attention()
        return self.report(
            {f"{metric_key_prefix}_knn_accuracy": accuracy, f"{metric_key_prefix}_embedding_spread": spread}
        )

    def embed(self, slices: LabelledDataset) -> np.ndarray:
        """Return the teacher's CLS embeddings, float32 (N, D), of whole slices; each process computes its share."""
        encoder = self.dino.teacher.encoder

        def compute(rows: Sequence[int]) -> np.ndarray:
            loader = DataLoader(
                Subset(slices, rows),
                batch_size=self.args.eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                generator=torch.Generator(),  # the default draws a seed from the generator of training
            )
            with torch.no_grad(), self.accelerator.autocast():
                parts = [encoder(pixel_values=self._pixels(batch)).last_hidden_state[:, 0].float() for batch in loader]
            return torch.cat(parts).cpu().numpy()

        was_training = encoder.training
        encoder.eval()
        embeddings = share_rows(compute, len(slices))
        encoder.train(was_training)
        return embeddings

    def _pixels(self, slices: torch.Tensor) -> torch.Tensor:
        return normalise_pixels(slices.to(self.args.device), self.image_processor)

    def _draw_attention(self) -> None:
        slices = torch.stack([self.queries[index] for index in self.shown])
        attention = cls_attention(self.dino.teacher.encoder, self._pixels(slices))
        names = [self.queries.label_names[self.queries.labels[index]] for index in self.shown]
        path = Path(self.args.output_dir, ATTENTION, f"step_{self.state.global_step:07d}.png")
        save_attention_image(slices.numpy(), attention.cpu().numpy(), names, path)

    def save_encoder(self) -> None:
        """Save the teacher's encoder and its preprocessor in `output_dir`, and the student's below it."""
        if not self.is_world_process_zero():
            return
        for branch, folder in ((self.dino.teacher, ""), (self.dino.student, "student")):
            branch.encoder.config._name_or_path = ""  # a local folder means nothing on other machines
            with atomic_update(Path(self.args.output_dir, folder)) as temporary:
                branch.encoder.save_pretrained(temporary)
                self.image_processor.save_pretrained(temporary)
                publish_weights(temporary)
        logger.info("slice encoder: %s", self.args.output_dir)
