"""Stage 2: contrastive warm-up of the aggregator on the embeddings of a frozen slice encoder.

    python warmup_aggregator.py --config recipes/warmup_ct_rate.yaml --slice_encoder runs/slice_encoder --data /data/CT-RATE

The paper says of it only (section 2.1) that the aggregator is trained "by maximizing the mutual information between
embeddings of adjacent slices from different planes of a CT scan using InfoNCE loss", with a frozen slice encoder. Our
reading: the aggregator computes z_3d from a run of adjacent slices of one plane, and from a run of another plane of the same
scan. These two embeddings are a positive pair; those of other scans in the batch, on all processes, are the negatives. There
is no head between z_3d and the loss. Slices of different planes always cross, so the positions of the two runs are free;
`adjacent_slices` is their length.

The slice embeddings are computed once and kept in `slice_cache`, where `train.py` finds them if it freezes the same encoder
in the same `dtype`. The output folder holds the aggregator and its position embeddings, for
`samf.training.aggregator_weights.load_aggregator`.
"""

import logging
import sys
from copy import copy
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from transformers import TrainingArguments, set_seed

from samf.cache.embedding_cache import EmbeddingCache
from samf.cache.settings import load_image_processor
from samf.cache.slice_cache import SliceCache
from samf.model.modeling_samf import SamfModel
from samf.pretraining.contrastive import ContrastTrainer, build_slices_model
from samf.pretraining.scans import Scan, ScanArguments, readable_scans
from samf.pretraining.slice_datasets import SLICES
from samf.training.aggregator_arguments import AggregatorArguments
from samf.training.checkpoints import checkpoint_to_resume
from samf.training.launchers import check_launcher, refuse_shards
from samf.training.trainer_base import train_to_end
from samf.utils.distributed import leaves_processes
from samf.utils.recipe import parse_recipe
from samf.utils.script_errors import input_errors

logger = logging.getLogger("samf.warmup_aggregator")
SCRIPT = "warmup_aggregator.py"


@dataclass
class WarmupArguments(ScanArguments, AggregatorArguments):
    """The aggregator over a frozen slice encoder, and the scans it learns from."""

    data: list[str] = field(default_factory=list, metadata={"help": "CT-RATE's folder, or folders of CTs"})
    slice_cache: str | None = field(
        default=None, metadata={"help": "keeps slices and their embeddings; default: _slices, in the output folder"}
    )
    adjacent_slices: int = field(default=8, metadata={"help": "slices per run; a pair is two runs, from two planes"})
    temperature: float = field(default=0.1)
    dtype: str = field(default="auto", metadata={"help": "of the slice encoder: auto, float32 or bfloat16"})


_MODEL_SETTINGS = (
    *("slice_position_scope", "volume_dim", "aggregator_num_heads", "aggregator_ffn_dim", "aggregator_dropout"),
    "aggregator_pooling",
    *("initializer_range", "vision_chunk_size"),
)


def embed_scans(
    args: WarmupArguments, model: SamfModel, output_dir: str
) -> tuple[dict[str, list[Scan]], EmbeddingCache]:
    """Return the scans that can be read, and a cache with all their embeddings; each process computes its share.

    Args:
        args: Name the data.
        model: Its slice encoder computes the embeddings.
        output_dir: Has the slice cache where the arguments name none.
    """
    folder = args.slice_cache or Path(output_dir, SLICES)
    slices = SliceCache(folder, load_image_processor(args.slice_encoder, **args.slice_settings()), args.min_coverage)
    options = args.source_options(args.on_missing, args.pattern)
    with input_errors(SCRIPT):
        scans = readable_scans(args.data, slices, on_error=args.on_error, valid_share=args.valid_share, options=options)
    embeddings = EmbeddingCache(folder, slices, model)
    volumes = {volume for part in scans.values() for scan in part for volume in scan.volumes}
    embeddings.fill_together(sorted(volumes, key=attrgetter("path")))
    return scans, copy(embeddings)  # the copy has no model


@leaves_processes
def main(argv: list[str] | None = None) -> None:
    """Warm the aggregator up, from a recipe and the command line."""
    with input_errors(SCRIPT):
        args, training = parse_recipe((WarmupArguments, TrainingArguments), argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    check_launcher(training)
    refuse_shards(training, "The aggregator's warm-up")
    set_seed(training.seed)
    training.remove_unused_columns = False
    training.resume_from_checkpoint = checkpoint_to_resume(training)  # before the volumes are read

    settings = {name: getattr(args, name) for name in _MODEL_SETTINGS}
    model = build_slices_model(args.slice_encoder, args.dtype, **settings).to(training.device)
    scans, embeddings = embed_scans(args, model, training.output_dir)
    logger.info("%d scans to learn from, %d to retrieve", len(scans["train"]), len(scans["valid"]))
    model.slice_encoder = None  # only its embeddings are needed from here on
    trainer = ContrastTrainer(
        model.float(),
        training,
        train=scans["train"],
        valid=scans["valid"],
        embeddings=embeddings,
        run=args.adjacent_slices,
        temperature=args.temperature,
    )
    train_to_end(trainer)
    trainer.save_aggregator()  # before the evaluation, which may fail
    if training.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1:])
