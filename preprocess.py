"""Fill the slice cache ahead of training: every volume is read once, cut into slices, and kept.

    python preprocess.py /data/CT-RATE --cache /scratch/slices --dry_run           # size and time, and nothing written
    python preprocess.py /data/CT-RATE --cache /scratch/slices --on_error skip     # one machine, all cores
    python preprocess.py … --shard 3/16                                            # task 3 of an array job's 1 to 16
    torchrun --nproc_per_node 8 preprocess.py … --embeddings runs/slice_encoder    # and embed the slices, on 8 GPUs
    python preprocess.py … --verify                                                # read all records again
    python preprocess.py /data/atlas --pattern 'ct.nii.gz' --min_coverage 100      # of a tree with other things in it
    python preprocess.py owner/name --volume_column nifti --cache /scratch/slices  # any data set on the Hub

DATA is CT-RATE's folder (v1 or v2) or its name on the Hub, folders of volumes or of DICOM series, one of the paper's CSVs,
a .txt file with a path a line, single volumes, or with `--volume_column` a data set or table in any layout. What is found
in a folder and is no CT (masks, other modalities) is passed over and counted. `train.py --slice_cache` and
`eval.py --slice_cache` with the same folder and settings find the records. Volumes on the Hub are fetched into $TMPDIR,
cut, and deleted again. A run that was killed is started again by the same command, or with other shards: what has a record
is done.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoConfig

from samf.cache.embedding_cache import EmbeddingCache
from samf.cache.fill import (
    FillOptions,
    PreprocessError,
    describe_bytes,
    dry_run,
    estimate_embeddings,
    fill_embeddings,
    fill_slices,
    unsettled,
    verify,
)
from samf.cache.manifest import Manifest, Shard, Volume, inspect_volumes
from samf.cache.settings import load_image_processor
from samf.cache.slice_cache import ENTRY_VERSION, SliceCache
from samf.data.source_arguments import SourceArguments
from samf.data.volume_discovery import SPLITS, search_volumes
from samf.model.image_processing_samf import EXTRACT_VERSION, FIELDS, PRESETS, SLABS, SamfImageProcessor
from samf.model.modeling_samf import SamfForConditionalGeneration, SamfModel
from samf.pretraining.contrastive import build_slices_model
from samf.utils.distributed import default_device, local_rank, processes_here
from samf.utils.parallel import usable_cores
from samf.utils.text_files import TextEncodingError

logger = logging.getLogger("samf.preprocess")

# The exit status when some of this process's volumes are neither made nor noted as failed: as sysexits.h has it for what
# is worth another try.
TRY_AGAIN = 75


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="CT-RATE's folder, folders, lists, CSVs, volumes")
    parser.add_argument("--cache", type=Path, required=True, help="folder that gets the records; may be filled already")
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=SPLITS, help="of CT-RATE; default: both")
    parser.add_argument(
        "--on_missing", choices=("raise", "skip", "error"), default="raise", help="of volumes that a table names"
    )
    parser.add_argument(
        "--pattern", nargs="+", default=[], help="of the files in folders: names (ct.nii.gz), paths (*/ct/*)"
    )
    sources = SourceArguments()
    for name in ("volume_column", "dataset_split", "min_coverage"):
        about = next(field for field in fields(sources) if field.name == name)
        several = {"nargs": "+"} if name == "dataset_split" else {}
        kind = float if name == "min_coverage" else str
        parser.add_argument(
            f"--{name}", type=kind, default=getattr(sources, name), help=about.metadata["help"], **several
        )

    slices = parser.add_argument_group("slices", "as for training; what is left out is the processor's, or the default")
    slices.add_argument("--processor", help="model or slice encoder whose slice settings count")
    slices.add_argument("--preset", choices=PRESETS)
    slices.add_argument("--slices_per_plane", type=int)
    slices.add_argument("--field", choices=FIELDS)
    slices.add_argument("--slab", choices=SLABS)
    slices.add_argument("--image_size", type=int, help="pixels a side")

    work = parser.add_argument_group("work")
    work.add_argument("--num_workers", type=int, help="processes that read; default: all cores, shared among ranks")
    work.add_argument("--shard", help="3/16: the third of sixteen parts; under torchrun each rank takes a part of it")
    work.add_argument("--timeout", type=float, default=600, help="seconds that one volume may take; 0: any number")
    work.add_argument("--on_error", choices=("stop", "skip"), default="stop", help="skip: list the volume, go on")
    work.add_argument("--retry_failed", action="store_true", help="with skip: try what failed before again")
    work.add_argument("--force", action="store_true", help="start although the records won't fit on the disk")
    work.add_argument("--dry_run", action="store_true", help="estimate size and time, and stop")
    work.add_argument(
        "--verify",
        nargs="?",
        const="report",
        choices=("report", "remove"),
        help="read all records; remove damaged ones",
    )

    embeddings = parser.add_argument_group("embeddings of the slices, by a frozen encoder")
    embeddings.add_argument("--embeddings", help="SAMF model or slice encoder, folder or Hub id")
    embeddings.add_argument("--device", help="e.g. cuda:1; default: an accelerator if there is one")
    embeddings.add_argument("--dtype", default="auto", help="auto (as saved), float32 or bfloat16")
    args = parser.parse_args(argv)
    if args.num_workers is not None and args.num_workers < 1:
        parser.error(f"--num_workers {args.num_workers}: expected at least 1")
    if args.timeout < 0:
        parser.error(f"--timeout {args.timeout}: expected seconds, or 0")
    named = {name: getattr(args, name) for name in ("volume_column", "dataset_split", "min_coverage")}
    args.sources = SourceArguments(**named)
    try:
        args.sources.check_source()
        args.shard = Shard.choose(args.shard, os.environ)
    except ValueError as error:
        parser.error(str(error))
    return args


def build_image_processor(args: argparse.Namespace) -> SamfImageProcessor:
    """As `train.py` and `eval.py` get it: the model's or encoder's if it has one, with what is set here."""
    settings = {
        "preset": args.preset,
        "slices_per_plane": args.slices_per_plane,
        "field": args.field,
        "slab": args.slab,
        "size": args.image_size,
    }
    if args.processor:
        return SamfImageProcessor.from_pretrained(
            args.processor, **{name: value for name, value in settings.items() if value is not None}
        )
    return load_image_processor(args.embeddings, **settings)


def build_slice_encoder(args: argparse.Namespace) -> SamfModel:
    """A model that has the slice encoder of `--embeddings`, on its device."""
    if AutoConfig.from_pretrained(args.embeddings).model_type == "samf":
        model = SamfForConditionalGeneration.from_pretrained(args.embeddings, dtype=args.dtype).model
        model.language_model = None  # its part is over
    else:
        model = build_slices_model(args.embeddings, args.dtype)
    model.slice_encoder.to(args.device or default_device())
    return model


def fill_options(args: argparse.Namespace) -> FillOptions:
    return FillOptions(
        shard=args.shard,
        workers=args.num_workers or max(1, usable_cores() // processes_here()),
        timeout=args.timeout or None,
        on_error=args.on_error,
        retry_failed=args.retry_failed,
        force=args.force,
        show_progress=local_rank() == 0,
    )


def describe(args: argparse.Namespace, image_processor: SamfImageProcessor) -> dict[str, Any]:
    """What the manifest says of the records' origin."""
    return {
        "data": [os.path.abspath(source) if os.path.exists(source) else source for source in args.data],
        "settings_hash": image_processor.settings_hash(),
        "extract_version": EXTRACT_VERSION,
        "record_version": ENTRY_VERSION,
        "image_processor": image_processor.to_dict(),
        "min_coverage": args.min_coverage,
    }


def run(args: argparse.Namespace) -> int:
    """Do what is asked; returns the exit status."""
    image_processor = build_image_processor(args)
    cache = SliceCache(args.cache, image_processor, args.min_coverage)
    manifest, options = Manifest(args.cache, "slices"), fill_options(args)
    found = search_volumes(args.data, args.sources.source_options(args.on_missing, args.pattern, tuple(args.splits)))
    volumes = inspect_volumes(found.keys, cache, found.searched)
    about = describe(args, image_processor)
    if args.verify:
        status = report_verified(verify(volumes, manifest, options, remove=args.verify == "remove"), "slices")
    elif args.dry_run:
        sys.stdout.write(f"slices: {dry_run(volumes, cache, manifest, options)}\n")
        status = 0
    else:
        report_filled(fill_slices(volumes, cache, manifest, options, about), manifest)
        status = status_of(unsettled(volumes, manifest, options.shard))
    if not args.embeddings:
        return status
    embeddings = EmbeddingCache(args.cache, cache, build_slice_encoder(args))
    manifest = Manifest(args.cache, "embeddings")
    encoded = inspect_volumes(found.keys, embeddings, found.searched)
    about |= {"encoder": args.embeddings, "fingerprint": embeddings.fingerprint}
    if args.verify:
        status |= report_verified(verify(encoded, manifest, options, remove=args.verify == "remove"), "embeddings")
    elif args.dry_run:
        sys.stdout.write(f"embeddings: {estimate_embeddings(encoded, embeddings, manifest, options.shard)[0]}\n")
    else:
        report_filled(fill_embeddings(encoded, embeddings, volumes, manifest, options, about), manifest)
        cut = Manifest(args.cache, "slices").keys()[0]
        made = {volume.path for volume in volumes if volume.key in cut}
        left = [volume for volume in unsettled(encoded, manifest, options.shard) if volume.path in made]
        status = status or status_of(left)
    return status


def status_of(left: Sequence[Volume]) -> int:
    """The exit status with these volumes left; says so."""
    if left:
        sys.stderr.write(
            f"{len(left)} volumes of this process's part are left (first: {left[0].path}): another process has them, or "
            "they failed for reasons that may be gone the next time. Run again.\n"
        )
    return TRY_AGAIN if left else 0


def report_filled(summary: dict[str, Any], manifest: Manifest) -> None:
    state = "complete" if summary["complete"] else f"{summary['pending']} volumes are left to others or to another run"
    reasons = ", ".join(f"{count} {error}" for error, count in summary["failures"].items())
    file = manifest.path("failures.jsonl")
    failed = f", {summary['failed']} failed ({reasons}; see {file}; --retry_failed tries them again)" if reasons else ""
    passed = f", {summary['passed_over']} no CT and passed over" if summary["passed_over"] else ""
    sys.stdout.write(
        f"{manifest.stage}: {summary['done']} of {summary['volumes']} volumes, {describe_bytes(summary['bytes'])}{failed}"
        f"{passed}: {state}. {manifest.path('manifest.json')}\n"
    )


def report_verified(report: dict[str, Any], stage: str) -> int:
    for state in ("damaged", "unreadable"):
        for record, reason in report[state].items():
            sys.stdout.write(f"{state}: {record}: {reason}\n")
    remedy = " --verify remove deletes them; the next run makes them anew." if report["damaged"] else ""
    sys.stdout.write(
        f"{stage}: {report['whole']} records whole, {len(report['damaged'])} damaged, {len(report['unreadable'])} unreadable, "
        f"{report['missing']} missing.{remedy}\n"
    )
    return 1 if report["damaged"] or report["unreadable"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for name in ("samf.preprocess", "samf.data"):  # the readers' accounts of each volume are too many here
        logging.getLogger(name).setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _leave)
    try:
        return run(args)
    except (PreprocessError, TextEncodingError) as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _leave(number: int, _: object) -> NoReturn:
    """A scheduler's or a launcher's way to end a process: the manifest is written before."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
