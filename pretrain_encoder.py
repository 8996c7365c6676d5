"""Stage 1: train a slice encoder on CT slices of three planes, without reports.

    python pretrain_encoder.py --config recipes/dino_medmnist.yaml --data /data/medmnist --output_dir runs/slice_encoder
    torchrun --nproc_per_node 8 pretrain_encoder.py --config recipes/dino_ct.yaml --data /data/CT-RATE …

`--objective dino` (default) needs no labels: slices come from MedMNIST's OrganA/C/S, from any folder of CTs, or from a
slice cache. `--objective labels` learns from the findings' masks of phantoms (the demo's encoder). The output folder is
what `train.py --slice_encoder` and `warmup_aggregator.py --slice_encoder` take. Ctrl-C and SIGTERM save a checkpoint;
`--resume_from_checkpoint last` goes on from the newest.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig, AutoModel, PreTrainedModel, TrainingArguments, ViTConfig, ViTModel, set_seed

from samf.cache.settings import has_slice_settings
from samf.data.source_arguments import SourceArguments
from samf.model.image_processing_samf import SamfImageProcessor
from samf.pretraining.dino import DinoArguments
from samf.pretraining.dino_trainer import DinoTrainer
from samf.pretraining.labels import train_on_labels
from samf.pretraining.slice_datasets import MEDMNIST_WINDOWS, SLICES, SliceSets, holds_medmnist, slice_sets, some_slices
from samf.training.checkpoints import checkpoint_to_resume
from samf.training.launchers import refuse_shards
from samf.training.trainer_base import train_to_end
from samf.utils.distributed import leaves_processes
from samf.utils.recipe import parse_recipe

logger = logging.getLogger("samf.pretrain_encoder")

OBJECTIVES = ("dino", "labels")


@dataclass
class EncoderArguments(SourceArguments):
    """The slice encoder and the slices it learns from; by default a ViT-B/16 from scratch."""

    objective: str = field(default="dino", metadata={"help": f"one of {', '.join(OBJECTIVES)}"})
    encoder: str | None = field(
        default=None, metadata={"help": "folder or Hub id to go on from; the sizes below are then its own"}
    )
    image_size: int = field(default=224, metadata={"help": "pixels a side"})
    patch_size: int = field(default=16)
    hidden_size: int = field(default=768)
    num_hidden_layers: int = field(default=12)
    num_attention_heads: int = field(default=12)
    intermediate_size: int = field(default=3072)
    initializer_range: float = field(default=0.02, metadata={"help": "standard deviation of new weights"})
    slices_per_plane: int = field(default=24, metadata={"help": "of each CT"})
    slab: str = field(default="none", metadata={"help": "none, mean or mip over the voxels between two slices"})
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "folder of MedMNIST's organ sets, or medmnist; folders of CTs; slice caches"},
    )
    splits: list[str] = field(
        default_factory=lambda: ["train"], metadata={"help": "of MedMNIST: train, val, test; all is the paper's choice"}
    )
    slice_cache: str | None = field(
        default=None, metadata={"help": "folder that keeps the slices of CTs; default: _slices, in the output folder"}
    )
    on_error: str = field(default="stop", metadata={"help": "stop, or skip: unreadable CTs are left out and counted"})
    on_missing: str = field(
        default="raise", metadata={"help": "of volumes that a table names: raise, or skip (counted)"}
    )
    pattern: list[str] = field(
        default_factory=list, metadata={"help": "of the files in folders: names (ct.nii.gz), or paths (*/ct/*)"}
    )
    valid_share: float = field(default=0.1, metadata={"help": "of the patients, where there is no validation split"})
    knn_data: list[str] = field(
        default_factory=list, metadata={"help": "labelled slices for the nearest neighbours; default: those of data"}
    )
    knn_slices: int = field(default=5000, metadata={"help": "at most so many in the bank, and as many queries"})
    knn_neighbours: int = field(default=20)
    depth_bins: int = field(
        default=8, metadata={"help": "depths of a plane that are told apart where labels are missing"}
    )
    attention_slices: int = field(default=6, metadata={"help": "slices whose attention maps an evaluation draws"})
    train_patients: int = field(default=1500, metadata={"help": "objective labels: phantoms to learn from"})
    valid_patients: int = field(
        default=150, metadata={"help": "objective labels: other phantoms, for the measured AUC"}
    )

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}; it must be one of {', '.join(OBJECTIVES)}.")
        self.check_source()


def vit_config(args: EncoderArguments) -> ViTConfig:
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
    """The encoder to train, without a pooler, which would get no gradient."""
    if args.encoder is None:
        return ViTModel(vit_config(args), add_pooling_layer=False)
    encoder = AutoModel.from_pretrained(args.encoder, dtype="float32")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def build_image_processor(args: EncoderArguments) -> SamfImageProcessor:
    """The encoder's own, if it has one in its folder; `size` follows the encoder.

    Of an encoder that learns from MedMNIST it has that data's HU window in each channel, so that later stages show it CTs
    as it knows them.
    """
    if args.encoder is not None and has_slice_settings(args.encoder):
        return SamfImageProcessor.from_pretrained(args.encoder)
    size = args.image_size if args.encoder is None else AutoConfig.from_pretrained(args.encoder).image_size
    windows = MEDMNIST_WINDOWS if holds_medmnist(args.data) else None
    return SamfImageProcessor(slices_per_plane=args.slices_per_plane, slab=args.slab, size=size, hu_windows=windows)


def load_slices(args: EncoderArguments, image_processor: SamfImageProcessor, output_dir: str) -> SliceSets:
    """The slices of `data`; bank and queries of `knn_data` if there is one, at most `knn_slices` each."""

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
    image_processor = build_image_processor(args)
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
    trainer.save_encoder()  # first: an evaluation can fail
    if training.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_state()


@leaves_processes
def main(argv: list[str] | None = None) -> None:
    args, dino_args, training = parse_recipe((EncoderArguments, DinoArguments, TrainingArguments), argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    refuse_shards(training, "The slice encoder's pretraining")
    set_seed(training.seed)
    training.remove_unused_columns = False
    training.resume_from_checkpoint = checkpoint_to_resume(training)  # before the volumes are read
    if args.objective == "dino":
        train_by_dino(args, dino_args, training)
        return
    image_processor = build_image_processor(args)
    train_on_labels(vit_config(args), training, image_processor, args.train_patients, args.valid_patients)


if __name__ == "__main__":
    main(sys.argv[1:])
