"""A Trainer for DINO that also measures nearest neighbours and draws attention maps, and ends in an encoder's folder."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, TrainingArguments

from samf.model.image_processing_samf import SamfImageProcessor
from samf.pretraining.attention_maps import cls_attention, save_attention_picture
from samf.pretraining.dino import DinoArguments, DinoModel, DinoSchedules, DinoViews
from samf.pretraining.neighbours import knn_accuracy
from samf.pretraining.slice_datasets import LabelledSet
from samf.training.trainer_base import ResumableTrainer, order_seed, share_rows, written_whole

logger = logging.getLogger(__name__)

ATTENTION = "_attention"  # Trainer pushes nothing that begins with an underscore, and these pictures show patients


class DinoTrainer(ResumableTrainer):
    """Trains a DinoModel. `evaluate` gives the teacher's `eval_knn_accuracy` on held-out labelled slices.

    Args:
        encoder: the slice encoder to train.
        args, dino_args: training and DINO.
        slices: to learn from, uint8 (3, H, W) each.
        bank, queries: labelled slices, and held-out ones whose labels their neighbours in the bank shall tell.
        image_processor: normalises pixels; saved beside the encoder.
        neighbours: that vote.
        attention_slices: how many queries an evaluation draws attention maps of, below `output_dir`/_attention.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        args: TrainingArguments,
        dino_args: DinoArguments,
        *,
        slices: Dataset,
        bank: LabelledSet,
        queries: LabelledSet,
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
        """Nearest neighbours of the queries in the bank; on the main process also attention maps."""
        bank, queries = self.embed(self.bank), self.embed(self.queries)
        accuracy = knn_accuracy(bank, self.bank.labels, queries, self.queries.labels, self.neighbours)
        spread = float(np.std(queries / np.linalg.norm(queries, axis=1, keepdims=True), axis=0).mean())
        if self.shown and self.is_world_process_zero():
            self._draw_attention()
        return self.report(
            {f"{metric_key_prefix}_knn_accuracy": accuracy, f"{metric_key_prefix}_embedding_spread": spread}
        )

    def embed(self, slices: Dataset) -> np.ndarray:
        """The teacher's CLS embeddings float32 (N, D) of whole slices; each process makes its share."""
        encoder = self.dino.teacher.encoder

        def compute(rows: Sequence[int]) -> np.ndarray:
            loader = DataLoader(
                Subset(slices, rows),
                batch_size=self.args.eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                generator=torch.Generator(),  # or it would take a number from the generator that training draws from
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
        """uint8 (N, C, H, W) as the image processor gives them to the encoder, on the device."""
        slices = slices.to(self.args.device).float() * self.image_processor.rescale_factor
        mean, std = (
            torch.tensor(values, device=slices.device)[:, None, None]
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return (slices - mean) / std

    def _draw_attention(self) -> None:
        slices = torch.stack([self.queries[index] for index in self.shown])
        attention = cls_attention(self.dino.teacher.encoder, self._pixels(slices))
        names = [self.queries.label_names[self.queries.labels[index]] for index in self.shown]
        path = Path(self.args.output_dir, ATTENTION, f"step_{self.state.global_step:07d}.png")
        save_attention_picture(slices.numpy(), attention.cpu().numpy(), names, path)

    def save_encoder(self) -> None:
        """The teacher's encoder with its preprocessor in `output_dir`, as `slice_encoder` takes it; the student's below it."""
        if not self.is_world_process_zero():
            return
        for branch, folder in ((self.dino.teacher, ""), (self.dino.student, "student")):
            branch.encoder.config._name_or_path = ""  # a local path would mean nothing to others
            with written_whole(Path(self.args.output_dir, folder)) as temporary:
                branch.encoder.save_pretrained(temporary)
                self.image_processor.save_pretrained(temporary)
        logger.info("slice encoder: %s", self.args.output_dir)
