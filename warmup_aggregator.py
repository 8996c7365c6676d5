"""Stage 2: warm the aggregator up by contrast, on the embeddings of a frozen slice encoder.

    python warmup_aggregator.py --config recipes/warmup_ct_rate.yaml --slice_encoder runs/slice_encoder --data /data/CT-RATE

The paper's whole account (section 2.1): the aggregator is trained "by maximizing the mutual information between
embeddings of adjacent slices from different planes of a CT scan using InfoNCE loss", the slice encoder staying frozen.
We read it so: a run of adjacent slices of one plane goes through the aggregator and gives z_3d; so does a run of another
plane of the same scan. These two embeddings belong together; those of other scans in the batch, on all processes, are what
they are told from. No head stands between z_3d and the loss. Slices of different planes always cross, so nothing more is
asked of where the two runs lie; `adjacent_slices` says how long they are.

The slice embeddings are computed once and kept in `slice_cache`, where `train.py` finds them again if it freezes the same
encoder. The output folder holds the aggregator and its position embeddings, which
`samf.pretraining.aggregator_weights.load_aggregator` puts into a model.
"""

import logging
import sys
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from samf.data.embedding_cache import EmbeddingCache
from samf.data.slice_cache import SliceCache
from samf.data.slice_images import Scan, fill_slice_cache, find_scans
from samf.image_processing_samf import SamfImageProcessor
from samf.modeling_samf import SamfModel
from samf.pretraining.contrast import ContrastTrainer, build_slices_model
from samf.pretraining.resumable import train_to_end
from samf.recipe import parse_recipe

logger = logging.getLogger("samf.warmup_aggregator")


@dataclass
class WarmupArguments:
    """The aggregator, by the same names and defaults as in `train.py`, and the scans it learns from."""

    slice_encoder: str = field(
        default="facebook/dino-vitb16", metadata={"help": "folder or Hub id of the slice encoder, which stays frozen"}
    )
    data: list[str] = field(default_factory=list, metadata={"help": "CT-RATE's folder, or folders of CTs"})
    slice_cache: str | None = field(
        default=None, metadata={"help": "keeps slices and their embeddings; default: slices, in the output folder"}
    )
    on_error: str = field(default="stop", metadata={"help": "stop, or skip: unreadable CTs are left out and counted"})
    on_missing: str = field(default="error", metadata={"help": "of CT-RATE's volumes: error, or skip (counted)"})
    valid_share: float = field(default=0.1, metadata={"help": "of the patients, where there is no validation split"})
    adjacent_slices: int = field(default=8, metadata={"help": "slices of a run; a pair is two runs, of two planes"})
    temperature: float = field(default=0.1)
    slice_position_scope: str = field(default="aggregator", metadata={"help": "none, aggregator or all"})
    volume_dim: int = field(default=256, metadata={"help": "width of the volume embedding"})
    aggregator_num_heads: int = field(default=8)
    aggregator_ffn_dim: int = field(default=1024)
    aggregator_dropout: float = field(default=0.1)
    initializer_range: float = field(default=0.02, metadata={"help": "standard deviation of new weights"})
    vision_chunk_size: int | None = field(default=None, metadata={"help": "most slices the encoder reads in one call"})
    slices_per_plane: int | None = field(default=None, metadata={"help": "the image processor's; its default is 24"})
    slab: str | None = field(default=None, metadata={"help": "none, mean or mip over the voxels between two slices"})
    image_size: int | None = field(
        default=None, metadata={"help": "pixels a side; the image processor's default is 224"}
    )
    dtype: str = field(default="auto", metadata={"help": "of the slice encoder: auto, float32 or bfloat16"})


MODEL_SETTINGS = (
    *("slice_position_scope", "volume_dim", "aggregator_num_heads", "aggregator_ffn_dim", "aggregator_dropout"),
    *("initializer_range", "vision_chunk_size"),
)


def build_image_processor(args: WarmupArguments) -> SamfImageProcessor:
    """The slice encoder's, if it has one in its folder, with the settings that are given here."""
    settings = {"slices_per_plane": args.slices_per_plane, "slab": args.slab, "size": args.image_size}
    settings = {key: value for key, value in settings.items() if value is not None}
    if (Path(args.slice_encoder) / "preprocessor_config.json").is_file():
        return SamfImageProcessor.from_pretrained(args.slice_encoder, **settings)
    return SamfImageProcessor(**settings)


def embed_scans(
    args: WarmupArguments, model: SamfModel, output_dir: str
) -> tuple[dict[str, list[Scan]], EmbeddingCache]:
    """The scans that can be read, and a cache with all their embeddings; each process makes its share."""
    folder = args.slice_cache or Path(output_dir, "slices")
    slices = SliceCache(folder, build_image_processor(args))
    scans = find_scans(args.data, on_missing=args.on_missing, valid_share=args.valid_share)
    kept = set(
        fill_slice_cache(
            slices, [key for part in scans.values() for scan in part for key in scan.volumes], args.on_error
        )
    )
    scans = {split: keep_volumes(part, kept) for split, part in scans.items()}
    embeddings = EmbeddingCache(folder, slices, model)
    state = PartialState()
    embeddings.fill(sorted(kept)[state.process_index :: state.num_processes])
    state.wait_for_everyone()
    return scans, copy(embeddings)  # a copy is without the model


def keep_volumes(scans: list[Scan], kept: set) -> list[Scan]:
    """The scans with those of their volumes that are in `kept`; a scan without any is left out."""
    reduced = [Scan(s.scan_id, s.patient, tuple(key for key in s.volumes if key in kept)) for s in scans]
    return [scan for scan in reduced if scan.volumes]


def main(argv: list[str] | None = None) -> None:
    args, training = parse_recipe((WarmupArguments, TrainingArguments), argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    set_seed(training.seed)
    training.remove_unused_columns = False

    settings = {name: getattr(args, name) for name in MODEL_SETTINGS}
    model = build_slices_model(args.slice_encoder, args.dtype, **settings).to(training.device)
    scans, embeddings = embed_scans(args, model, training.output_dir)
    logger.info("%d scans to learn from, %d to retrieve", len(scans["train"]), len(scans["valid"]))
    model.slice_encoder = None  # its embeddings are all that is needed now
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
    if training.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_aggregator()
    trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1:])
