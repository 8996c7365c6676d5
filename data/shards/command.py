"""Pack a filled cache and its records into shards, which training streams from an object store.

    samf data pack /data/CT-RATE --slice_cache /scratch/slices --processor runs/encoder --out s3://bucket/ct-rate
    python train.py --config recipes/ct_rate_ao2d.yaml --data_shards s3://bucket/ct-rate --output_dir runs/ao2d

The cache is one that preprocess.py has filled with the same data and settings. A run that was interrupted continues when the
same command is given again. Exit status: 0, or 2 for input that can't be packed.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from samf.cache.embedding_cache import EmbeddingCache
from samf.cache.entries import VolumeCache
from samf.cache.settings import load_image_processor
from samf.cache.slice_cache import SliceCache
from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.data.loading import load_records
from samf.data.options import check_on_error
from samf.data.schema import TASKS, JsonObject
from samf.data.shards.index import ShardIndex, ShardsError, slice_settings
from samf.data.shards.packing import PackOptions, pack
from samf.data.shards.storage import Storage
from samf.data.source_arguments import SourceArguments
from samf.utils.recipe import parse_recipe

BAD_INPUT = 2


@dataclass
class PackArguments(SourceArguments):
    """Arguments of samf data pack."""

    data: str = field(default="", metadata={"help": "the data set; may be given first, without its flag"})
    slice_cache: str = field(default="", metadata={"help": "the filled cache"})
    out: str = field(default="", metadata={"help": "empty folder or address (s3://bucket/prefix) for the shards"})
    processor: str | None = field(
        default=None,
        metadata={"help": "model or slice encoder whose slice settings filled the cache; default: defaults"},
    )
    embeddings: str | None = field(
        default=None, metadata={"help": "pack the embeddings of this model or slice encoder instead of the slices"}
    )
    dtype: str = field(default="auto", metadata={"help": "of --embeddings, as it was for preprocess.py"})
    splits: list[str] = field(default_factory=lambda: ["train", "valid"])
    tasks: list[str] = field(
        default_factory=list, metadata={"help": f"of {', '.join(TASKS)}; default: all that the data has"}
    )
    vqa_files: list[str] = field(
        default_factory=list, metadata={"help": "question files for training instead of the split's own"}
    )
    report_sections: list[str] = field(default_factory=list, metadata={"help": "of CT-RATE's reports, as for train.py"})
    reconstructions: Literal["all", "first", "sample"] | None = field(
        default=None, metadata={"help": "of each of CT-RATE's scans; default: all"}
    )
    finding_names: list[str] = field(
        default_factory=list, metadata={"help": "findings whose labels are packed; default: CT-RATE's 18"}
    )
    shard_mb: float = field(default=64.0, metadata={"help": "approximate size of a shard"})
    num_workers: int = field(default=4, metadata={"help": "shards that are written and uploaded at the same time"})
    on_error: str = field(default="raise", metadata={"help": "volumes without an entry: raise, or skip their records"})
    work_folder: str | None = field(
        default=None, metadata={"help": "folder for shards on their way to an object store; default: the system's"}
    )

    def __post_init__(self) -> None:
        self.check_source()
        for name in ("data", "slice_cache", "out"):
            if not getattr(self, name):
                raise ValueError(
                    f"no {name}: samf data pack DATA --slice_cache FOLDER --out FOLDER or s3://bucket/prefix."
                )
        if self.shard_mb <= 0 or self.num_workers < 1:
            raise ValueError(
                f"shard_mb is {self.shard_mb} and num_workers {self.num_workers}; expected more than 0, and at least 1."
            )
        check_on_error(self.on_error)
        if unknown := sorted(set(self.tasks) - set(TASKS)):
            raise ValueError(f"tasks has {unknown}; expected some of {', '.join(TASKS)}.")


def pack_arguments(args: PackArguments) -> ShardIndex:
    """Pack what the arguments name.

    Args:
        args: of the command.

    Raises:
        ShardsError: it can't be packed; says what to do.
        FileNotFoundError: data is missing.
    """
    image_processor = load_image_processor(args.processor or args.embeddings)
    slices = SliceCache(args.slice_cache, image_processor, args.min_coverage)
    cache: VolumeCache = slices
    encoder = None
    if args.embeddings:
        from samf.pretraining.contrastive import load_slice_encoder  # most runs don't need the model's code

        embeddings = EmbeddingCache(args.slice_cache, slices, load_slice_encoder(args.embeddings, args.dtype))
        cache, encoder = embeddings, embeddings.fingerprint
    options: JsonObject = {name: getattr(args, name) for name in ("report_sections", "reconstructions")}
    options = {name: value for name, value in options.items() if value} | {**args.record_options()}
    if args.tasks:
        options["tasks"] = args.tasks
    findings = args.finding_names or list(CT_RATE_LABELS)
    splits = {}
    for split in args.splits:
        vqa_files = {"vqa_files": args.vqa_files} if args.vqa_files and split == "train" else {}
        splits[split] = load_records(args.data, split, finding_names=findings, **options, **vqa_files)
    about = ShardIndex(
        "embeddings" if encoder else "slices",
        slice_settings(image_processor, args.min_coverage),
        encoder,
        findings,
        tables={},
        shards=[],
    )
    how = PackOptions(round(args.shard_mb * 1e6), args.num_workers, check_on_error(args.on_error), args.work_folder)
    return pack(splits, cache, Storage(args.out), about, how)


def main(argv: Sequence[str] | None = None) -> int:
    """Pack as the command line says; return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and not given[0].startswith("-"):
        given = ["--data", *given]
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        (args,) = parse_recipe(PackArguments, given)
        index = pack_arguments(args)
    except (ShardsError, ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"samf data pack: {' '.join(str(error).split())}\n")
        return BAD_INPUT
    for split, table in index.tables.items():
        records, shards = sum(table.records.values()), [shard for shard in index.shards if shard.split == split]
        size = sum(shard.size for shard in shards) / 1e9
        sys.stdout.write(f"{split}: {table.volumes} volumes, {records} records, {len(shards)} shards, {size:.2f} GB\n")
    return 0
