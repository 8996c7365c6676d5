"""Stage 1: train a slice encoder on CT slices of three planes, without reports.

    python pretrain_encoder.py --config recipes/dino_medmnist.yaml --data /data/medmnist --output_dir runs/slice_encoder
    torchrun --nproc_per_node 8 pretrain_encoder.py --config recipes/dino_ct.yaml --data /data/CT-RATE …

`--objective dino` (default) needs no labels: slices come from MedMNIST's OrganA/C/S, from any folder of CTs, or from a
slice cache. `--objective labels` learns from the findings' masks of phantoms (the demo's encoder). Pass the output folder to
`train.py --slice_encoder` and `warmup_aggregator.py --slice_encoder`. Ctrl-C and SIGTERM save a checkpoint;
`--resume_from_checkpoint last` resumes from the newest one.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import AutoConfig, AutoModel, PreTrainedModel, TrainingArguments, ViTConfig, ViTModel, set_seed

from samf.cache.settings import has_slice_settings
from samf.model.image_processing_samf import SLABS, SamfImageProcessor
from samf.pretraining.dino import DinoArguments
from samf.pretraining.dino_trainer import DinoTrainer
from samf.pretraining.labelled_sets import SliceSets, some_slices
from samf.pretraining.labels import train_on_labels
from samf.pretraining.medmnist_slices import MEDMNIST_WINDOWS, holds_medmnist
from samf.pretraining.scans import ScanArguments
from samf.pretraining.slice_datasets import SLICES, slice_sets
from samf.training.checkpoints import checkpoint_to_resume
from samf.training.launchers import check_launcher, refuse_shards
from samf.training.trainer_base import train_to_end
from samf.utils.distributed import leaves_processes
from samf.utils.recipe import parse_recipe
from samf.utils.script_errors import input_errors

logger = logging.getLogger("samf.pretrain_encoder")
SCRIPT = "pretrain_encoder.py"


@dataclass
class EncoderArguments(ScanArguments):
    """The slice encoder and the slices it learns from; by default a ViT-B/16 from scratch."""

    objective: Literal["dino", "labels"] = field(
        default="dino", metadata={"help": "labels: findings of phantoms, which are generated"}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "folder or Hub id of an encoder to continue; the sizes below are then its own"}
    )
    image_size: int = field(default=224, metadata={"help": "pixels per side"})
    patch_size: int = field(default=16)
    hidden_size: int = field(default=768)
    num_hidden_layers: int = field(default=12)
    num_attention_heads: int = field(default=12)
    intermediate_size: int = field(default=3072)
    initializer_range: float = field(default=0.02, metadata={"help": "standard deviation of new weights"})
    slices_per_plane: int = field(default=24, metadata={"help": "of each CT"})
    slab: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={
            "help": "projection of the voxels between two slices, one or one for each HU window",
            "choices": SLABS,
        },
    )
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "folder of MedMNIST's organ sets, or medmnist; folders of CTs; slice caches"},
    )
    splits: list[str] = field(
        default_factory=lambda: ["train"], metadata={"help": "of MedMNIST: train, val, test; the paper uses all"}
    )
    slice_cache: str | None = field(
        default=None, metadata={"help": "folder that keeps the slices of CTs; default: _slices, in the output folder"}
    )
    knn_data: list[str] = field(
        default_factory=list, metadata={"help": "labelled slices for the nearest neighbours; default: those of data"}
    )
    knn_slices: int = field(default=5000, metadata={"help": "most slices in the bank, and most queries"})
    knn_neighbours: int = field(default=20)
    depth_bins: int = field(
        default=8, metadata={"help": "depths per plane that are the labels of slices without labels"}
    )
    attention_slices: int = field(default=6, metadata={"help": "slices whose attention maps an evaluation draws"})
    train_patients: int = field(default=1500, metadata={"help": "objective labels: phantoms to learn from"})
    valid_patients: int = field(
        default=150, metadata={"help": "objective labels: other phantoms, for the measured AUC"}
    )
    patch_loss_weight: float = field(
        default=0.0,
        metadata={"help": "objective labels: factor of the loss of each patch's own labels; small findings need it"},
    )


def vit_config(args: EncoderArguments) -> ViTConfig:
    """Return the configuration of a new encoder."""
    return ViTConfig(
        image_size=args.image_size,
        patch_size=args.patch_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        intermediate_size=args.intermediate_size,
        initializer_range=args.initializer_range,
        layer_norm_eps=1e-6,
    )


def build_encoder(args: EncoderArguments) -> PreTrainedModel:
    """Return the encoder to train, without a pooler, which would get no gradient."""
    if args.encoder is None:
        return ViTModel(vit_config(args), add_pooling_layer=False)
    encoder = AutoModel.from_pretrained(args.encoder, dtype="float32")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def build_image_processor(args: EncoderArguments) -> SamfImageProcessor:
    """Return the encoder's own image processor, or a new one of the encoder's size.

    For an encoder that learns from MedMNIST it has that data's HU window in each channel, so that later stages show the
    encoder CTs as it has learned them.
    """
    if args.encoder is not None and has_slice_settings(args.encoder):
        return SamfImageProcessor.from_pretrained(args.encoder)
    size = args.image_size if args.encoder is None else AutoConfig.from_pretrained(args.encoder).image_size
    windows = MEDMNIST_WINDOWS if holds_medmnist(args.data) else None
    return SamfImageProcessor(slices_per_plane=args.slices_per_plane, slab=args.slab, size=size, hu_windows=windows)


def load_slices(args: EncoderArguments, image_processor: SamfImageProcessor, output_dir: str) -> SliceSets:
    """Return the slices of `data`, with at most `knn_slices` of bank and queries, from `knn_data` where it is given.

    Args:
        args: Name the data.
        image_processor: Extracts slices of CTs.
        output_dir: Has the slice cache where the arguments name none.
    """

    def load(data: list[str]) -> SliceSets:
        return slice_sets(
            data,
            image_processor,
            args.slice_cache or Path(output_dir, SLICES),
            splits=args.splits,
            depth_bins=args.depth_bins,
            valid_share=args.valid_share,
            on_error=args.on_error,
            options=args.source_options(args.on_missing, args.pattern),
            min_coverage=args.min_coverage,
        )

    sets = load(args.data)
    labelled = load(args.knn_data) if args.knn_data else sets
    bank, queries = (some_slices(part, args.knn_slices) for part in (labelled.bank, labelled.queries))
    logger.info("%d slices to learn from; neighbours of %d among %d", len(sets.train), len(queries), len(bank))
    return SliceSets(sets.train, bank, queries)


def train_by_dino(args: EncoderArguments, dino_args: DinoArguments, training: TrainingArguments) -> None:
    """Train by DINO, save the encoder and evaluate it.

    Args:
        args: Encoder and data.
        dino_args: Crops, head and schedules.
        training: Arguments of the run.
    """
    image_processor = build_image_processor(args)
    with input_errors(SCRIPT):
        sets = load_slices(args, image_processor, training.output_dir)
    if not training.weight_decay and dino_args.weight_decay_end:
        logger.warning("weight_decay is 0, so none is applied; DINO's rises from 0.04 to weight_decay_end")
    trainer = DinoTrainer(
        build_encoder(args),
        training,
        dino_args,
        slices=sets.train,
        bank=sets.bank,
        queries=sets.queries,
        image_processor=image_processor,
        neighbours=args.knn_neighbours,
        attention_slices=args.attention_slices,
    )
    train_to_end(trainer)
    trainer.save_encoder()  # before the evaluation, which may fail
    if training.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_state()


@leaves_processes
def main(argv: list[str] | None = None) -> None:
    """Train a slice encoder from a recipe and the command line."""
    with input_errors(SCRIPT):
        args, dino_args, training = parse_recipe((EncoderArguments, DinoArguments, TrainingArguments), argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    check_launcher(training)
    refuse_shards(training, "The slice encoder's pretraining")
    set_seed(training.seed)
    training.remove_unused_columns = False
    training.resume_from_checkpoint = checkpoint_to_resume(training)  # before the volumes are read
    if args.objective == "dino":
        train_by_dino(args, dino_args, training)
        return
    image_processor = build_image_processor(args)
    patients = (args.train_patients, args.valid_patients)
    train_on_labels(vit_config(args), training, image_processor, patients, args.patch_loss_weight)


if __name__ == "__main__":
    main(sys.argv[1:])
