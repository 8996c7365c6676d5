"""Fill the slice cache ahead of training: each volume is read once, and its slices are extracted and kept.

    python preprocess.py /data/CT-RATE --cache /scratch/slices --dry_run           # estimate size and time
    python preprocess.py /data/CT-RATE --cache /scratch/slices --on_error skip     # one machine, all cores
    python preprocess.py … --cluster tcp://head:8786                               # the workers of a dask scheduler
    python preprocess.py … --cluster slurm --cluster_options '{n_workers: 8, cores: 16, memory: 64GB}'
    python preprocess.py … --shard 3/16                                            # task 3 of an array job's 1 to 16
    torchrun --nproc_per_node 8 preprocess.py … --embeddings runs/slice_encoder    # and embed the slices, on 8 GPUs
    python preprocess.py … --verify                                                # compare all entries with their checksums
    python preprocess.py /data/atlas --pattern 'ct.nii.gz' --min_coverage 100      # from a tree with other files in it
    python preprocess.py owner/name --volume_column nifti --cache /scratch/slices  # any data set on the Hub
    python preprocess.py s3://bucket/scans --cache /scratch/slices                 # a folder in an object store

DATA is CT-RATE's folder (v1 or v2) or its name on the Hub, folders of volumes or of DICOM series, one of the paper's CSVs,
a .txt file with one path per line, single volumes, or with `--volume_column` a data set or table in any layout. Files that
are found in a folder and are no CT (masks, other modalities) are passed over and counted. `train.py --slice_cache` and
`eval.py --slice_cache` with the same folder and settings find the entries. Volumes on the Hub and in object stores (s3://,
gs://) are downloaded to $TMPDIR, and deleted after their slices were extracted. A run that was killed is resumed by the same
command, or with other shards: a volume is done when its entry exists.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import NoReturn, TypeVar

from torch import nn

from samf.cache.cluster_settings import ClusterSettings
from samf.cache.embedding_cache import EmbeddingCache
from samf.cache.entries import local_directory
from samf.cache.estimate import describe_bytes
from samf.cache.fill import dry_run, fill_slices, unsettled
from samf.cache.fill_embeddings import estimate_embeddings, fill_embeddings
from samf.cache.fill_options import FillOptions, PreprocessError
from samf.cache.manifest import Manifest, ManifestSummary, Origin, Stage
from samf.cache.settings import load_image_processor
from samf.cache.slice_cache import ENTRY_VERSION, SliceCache
from samf.cache.verify import Verification, verify
from samf.cache.volume_list import Shard, Volume, inspect_volumes
from samf.data.options import check_on_error, check_on_missing
from samf.data.source_arguments import SourceArguments
from samf.data.volume_discovery import SPLITS, FoundVolumes, search_volumes
from samf.model.ct_common import DownloadError
from samf.model.image_processing_samf import EXTRACT_VERSION, SamfImageProcessor
from samf.model.modeling_samf import SamfModel
from samf.model.slice_geometry import FIELDS
from samf.model.slice_resampling import SLABS
from samf.model.slice_settings import PRESETS
from samf.pretraining.contrastive import load_slice_encoder
from samf.utils.distributed import default_device, local_rank, processes_here
from samf.utils.parallel import usable_cores
from samf.utils.text_files import TextEncodingError

logger = logging.getLogger("samf.preprocess")

# Exit status if some volumes of this process are neither made nor noted as failed: EX_TEMPFAIL of sysexits.h.
TRY_AGAIN = 75

_Checked = TypeVar("_Checked")
_SOURCE_ARGUMENTS = ("dataset", "volume_column", "split_column", "dataset_split", "image_root", "min_coverage")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the checked options of the command line; `sources` are the SourceArguments among them."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    if args.num_workers is not None and args.num_workers < 1:
        parser.error(f"--num_workers {args.num_workers}: expected at least 1")
    if args.timeout < 0:
        parser.error(f"--timeout {args.timeout}: expected seconds, or 0")
    args.sources = SourceArguments(**{name: getattr(args, name) for name in _SOURCE_ARGUMENTS})
    try:
        args.sources.check_source()
        args.shard = Shard.choose(args.shard, os.environ)
        args.cluster = _choose_cluster(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _choose_cluster(args: argparse.Namespace) -> ClusterSettings | None:
    """Return the cluster that is asked for; raise ValueError if another option doesn't go with one."""
    if args.cluster is None:
        if args.cluster_options:
            raise ValueError("--cluster_options goes with --cluster")
        return None
    remedies = {
        "dry_run": "it measures this machine: omit --cluster",
        "verify": "it reads the entries on this machine: omit --cluster",
        "embeddings": "fill the slices with --cluster first, then run the same command with --embeddings instead",
    }
    for name, remedy in remedies.items():
        if getattr(args, name):
            raise ValueError(f"--cluster doesn't go with --{name}: {remedy}")
    if args.shard.count > 1:
        raise ValueError("--cluster divides the list itself: omit --shard, and start it without torchrun")
    if args.num_workers and args.cluster != "local":
        raise ValueError(
            "--num_workers is for --cluster local: other workers read a volume per thread (dask worker --nthreads)"
        )
    return ClusterSettings.parse(args.cluster, args.cluster_options, args.num_workers or usable_cores())


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_data_options(parser)

    slices = parser.add_argument_group("slices", "as for training; default: the processor's settings, or the defaults")
    slices.add_argument("--processor", help="model or slice encoder whose slice settings are used")
    slices.add_argument("--preset", choices=PRESETS)
    slices.add_argument("--slices_per_plane", type=int)
    slices.add_argument("--field", choices=FIELDS, help="field of view")
    slices.add_argument("--slab", nargs="+", choices=SLABS, help="one, or one for each HU window")
    slices.add_argument("--image_size", type=int, help="width and height in pixels")

    _add_work_options(parser.add_argument_group("work"))

    embeddings = parser.add_argument_group("embeddings of the slices, by a frozen encoder")
    embeddings.add_argument("--embeddings", help="SAMF model or slice encoder, folder or Hub id")
    embeddings.add_argument("--device", help="e.g. cuda:1; default: an accelerator if there is one")
    embeddings.add_argument("--dtype", default="auto", help="auto (as saved), float32 or bfloat16")
    return parser


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", help="CT-RATE's folder, folders, lists, CSVs, volumes")
    parser.add_argument(
        "--cache", type=_checked(local_directory), required=True, help="cache directory; may contain entries already"
    )
    parser.add_argument("--splits", nargs="+", default=list(SPLITS), choices=SPLITS, help="of CT-RATE; default: both")
    parser.add_argument(
        "--on_missing",
        type=_checked(check_on_missing),
        choices=("raise", "skip"),
        default="raise",
        help="for missing volumes that a table names",
    )
    parser.add_argument(
        "--pattern", nargs="+", default=[], help="of the files in folders: names (ct.nii.gz), paths (*/ct/*)"
    )
    sources = SourceArguments()
    for name in _SOURCE_ARGUMENTS:
        described = next(field for field in fields(sources) if field.name == name)
        parser.add_argument(
            f"--{name}",
            type=float if name == "min_coverage" else str,
            nargs="+" if name == "dataset_split" else None,
            default=getattr(sources, name),
            help=described.metadata["help"],
        )


def _add_work_options(work: argparse._ArgumentGroup) -> None:
    work.add_argument(
        "--num_workers", type=int, help="processes that read volumes; default: all cores, divided by ranks"
    )
    work.add_argument(
        "--cluster",
        help="local, slurm, or address of a dask scheduler (tcp://host:8786): its workers read the volumes; "
        "pip install 'samf[cluster]'",
    )
    work.add_argument(
        "--cluster_options",
        help="of dask's LocalCluster, dask-jobqueue's SLURMCluster or dask's Client: a mapping as YAML or JSON, or its file",
    )
    work.add_argument("--shard", help="3/16: the third of sixteen parts; under torchrun each rank takes a part of it")
    work.add_argument("--timeout", type=float, default=600, help="seconds that one volume may take; 0: no limit")
    work.add_argument(
        "--on_error",
        type=_checked(check_on_error),
        choices=("raise", "skip"),
        default="raise",
        help="for unreadable volumes: raise stops the run, skip lists them and continues",
    )
    work.add_argument("--retry_failed", action="store_true", help="with skip: retry volumes that failed before")
    work.add_argument("--force", action="store_true", help="start although the entries don't fit on the disk")
    work.add_argument("--dry_run", action="store_true", help="estimate size and time, and stop")
    work.add_argument(
        "--verify",
        nargs="?",
        const="report",
        choices=("report", "remove"),
        help="compare all entries with their checksums; remove deletes damaged ones",
    )


def _checked(check: Callable[[str], _Checked]) -> Callable[[str], _Checked]:
    """Return an argparse type that reports the ValueErrors of `check`."""

    def parse(text: str) -> _Checked:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def build_image_processor(args: argparse.Namespace) -> SamfImageProcessor:
    """Return the image processor that `train.py` and `eval.py` use: the model's or encoder's, with the settings given here."""
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
    """Return a model with the slice encoder of `--embeddings`, on its device."""
    model = load_slice_encoder(args.embeddings, args.dtype)
    encoder: nn.Module = model.slice_encoder
    encoder.to(args.device or default_device())
    return model


def fill_options(args: argparse.Namespace) -> FillOptions:
    """Return how the caches are filled."""
    return FillOptions(
        shard=args.shard,
        workers=args.num_workers or max(1, usable_cores() // processes_here()),
        timeout=args.timeout or None,
        on_error=args.on_error,
        retry_failed=args.retry_failed,
        force=args.force,
        show_progress=local_rank() == 0,
        cluster=args.cluster,
    )


def describe_origin(args: argparse.Namespace, image_processor: SamfImageProcessor) -> Origin:
    """Return what the manifest says about the origin of the entries."""
    return {
        "data": [os.path.abspath(source) if os.path.exists(source) else source for source in args.data],
        "settings_hash": image_processor.settings_hash(),
        "extract_version": EXTRACT_VERSION,
        "record_version": ENTRY_VERSION,
        "image_processor": image_processor.to_dict(),
        "min_coverage": args.min_coverage,
    }


def run(args: argparse.Namespace) -> int:
    """Fill, estimate or verify the caches; return the exit status."""
    image_processor = build_image_processor(args)
    cache, options = SliceCache(args.cache, image_processor, args.min_coverage), fill_options(args)
    found = search_volumes(args.data, args.sources.source_options(args.on_missing, args.pattern, tuple(args.splits)))
    volumes = inspect_volumes(found.volumes, cache, found.searched)
    origin = describe_origin(args, image_processor)
    status = _run_slices(args, volumes, cache, options, origin)
    if args.embeddings:
        embedding_status = _run_embeddings(args, found, volumes, cache, options, origin)
        status = (status | embedding_status) if args.verify else (status or embedding_status)
    return status


def _run_slices(
    args: argparse.Namespace, volumes: Sequence[Volume], cache: SliceCache, options: FillOptions, origin: Origin
) -> int:
    manifest = Manifest(args.cache, "slices")
    if args.verify:
        return report_verified(verify(volumes, manifest, options, remove=args.verify == "remove"), "slices")
    if args.dry_run:
        sys.stdout.write(f"slices: {dry_run(volumes, cache, manifest, options)}\n")
        return 0
    report_filled(fill_slices(volumes, cache, manifest, options, origin), manifest)
    return report_left(unsettled(volumes, manifest, options.shard))


def _run_embeddings(
    args: argparse.Namespace,
    found: FoundVolumes,
    volumes: Sequence[Volume],
    cache: SliceCache,
    options: FillOptions,
    origin: Origin,
) -> int:
    embeddings = EmbeddingCache(args.cache, cache, build_slice_encoder(args))
    manifest = Manifest(args.cache, "embeddings")
    encoded = inspect_volumes(found.volumes, embeddings, found.searched)
    origin = {**origin, "encoder": args.embeddings, "fingerprint": embeddings.fingerprint}
    if args.verify:
        return report_verified(verify(encoded, manifest, options, remove=args.verify == "remove"), "embeddings")
    if args.dry_run:
        sys.stdout.write(f"embeddings: {estimate_embeddings(encoded, embeddings, manifest, options.shard)[0]}\n")
        return 0
    report_filled(fill_embeddings(encoded, embeddings, volumes, manifest, options, origin), manifest)
    with_slices = Manifest(args.cache, "slices").keys().done
    extracted = {volume.path for volume in volumes if volume.key in with_slices}
    return report_left([volume for volume in unsettled(encoded, manifest, options.shard) if volume.path in extracted])


def report_left(left: Sequence[Volume]) -> int:
    """Print how many volumes are left; return the exit status."""
    if left:
        sys.stderr.write(
            f"{len(left)} volumes of this process's part are left (first: {left[0].label}): another process has them, or "
            "they failed for reasons that may be temporary. Run again.\n"
        )
    return TRY_AGAIN if left else 0


def report_filled(summary: ManifestSummary, manifest: Manifest) -> None:
    """Print the state of a cache."""
    state = "complete" if summary["complete"] else f"{summary['pending']} volumes are left to others or to another run"
    reasons = ", ".join(f"{count} {error}" for error, count in summary["failures"].items())
    file = manifest.path("failures.jsonl")
    failed = f", {summary['failed']} failed ({reasons}; see {file}; --retry_failed retries them)" if reasons else ""
    passed = f", {summary['passed_over']} no CT and passed over" if summary["passed_over"] else ""
    sys.stdout.write(
        f"{manifest.stage}: {summary['done']} of {summary['volumes']} volumes, {describe_bytes(summary['bytes'])}{failed}"
        f"{passed}: {state}. {manifest.path('manifest.json')}\n"
    )


def report_verified(result: Verification, stage: Stage) -> int:
    """Print the result of a verification; return the exit status."""
    for state, entries in (("damaged", result.damaged), ("unreadable", result.unreadable)):
        for entry, reason in entries.items():
            sys.stdout.write(f"{state}: {entry}: {reason}\n")
    remedy = " --verify remove deletes them; the next run makes them again." if result.damaged else ""
    sys.stdout.write(
        f"{stage}: {result.intact} entries intact, {len(result.damaged)} damaged, {len(result.unreadable)} unreadable, "
        f"{result.missing} missing.{remedy}\n"
    )
    return 1 if result.damaged or result.unreadable else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit status."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for name in ("samf.preprocess", "samf.cache", "samf.data"):  # not the readers: a message per volume is too many
        logging.getLogger(name).setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _leave)
    try:
        return run(args)
    except DownloadError as error:  # of a table or a listing
        sys.stderr.write(f"{error}\n")
        return TRY_AGAIN if error.is_temporary else 1
    except (PreprocessError, TextEncodingError) as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _leave(number: int, _: object) -> NoReturn:
    """End the process when a scheduler or launcher asks for it; the manifest is written first."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
