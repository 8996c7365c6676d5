"""The records that stage 3 trains on and is measured on."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, cast

import datasets
import numpy as np
from transformers import TrainingArguments

from samf.cache.manifest import Manifest, inspect_volumes
from samf.cache.slice_cache import SliceCache
from samf.data.ct_rate.loader import CT_RATE_LABELS, check_patient_overlap
from samf.data.lengths import add_lengths, find_overlong
from samf.data.loading import load_records
from samf.data.mixture import TaskMixture, parse_weights
from samf.data.patients import PatientRule
from samf.data.schema import IGNORE_INDEX, JsonObject, OnError
from samf.data.shards.records import load_shard_records, shard_numbers
from samf.data.shards.store import ShardStore
from samf.data.table_columns import TableColumns
from samf.data.volume_discovery import distinct_volumes
from samf.evaluation.answering.generation import shuffle_volumes
from samf.model.processing_samf import SamfProcessor
from samf.model.text_labeller import label_report
from samf.training.arguments import DataArguments
from samf.training.sampling import order_seed
from samf.utils.distributed import Processes

logger = logging.getLogger(__name__)

_MOST_LISTED = 5
_COUNTS_FILE = "_records_{}.json"  # Trainer doesn't push names that begin with an underscore


class TrainerDatasets(TypedDict):
    """Trainer's arguments of these names; `eval_dataset` has the keys "own" and "shuffled"."""

    train_dataset: datasets.Dataset
    eval_dataset: dict[str, datasets.Dataset] | None


class LoadOptions(TypedDict, total=False):
    """Options of `load_records`."""

    report_sections: list[str]
    reconstructions: str
    image_root: str
    on_missing: OnError
    columns: TableColumns
    patient_rule: PatientRule
    patient_column: str


def load_datasets(
    args: DataArguments,
    processor: SamfProcessor,
    finding_names: list[str],
    *,
    with_lengths: bool,
    with_valid: bool,
    output_dir: str,
    shards: ShardStore | None = None,
) -> TrainerDatasets:
    """Load Trainer's datasets: training, and validation with each patient's own volume and with another's.

    A model that doesn't use the volume has the same loss on both validation sets. With objective "text", the validation
    loss is that of the text only. What was read and what was left out is counted in files in `output_dir` that Trainer
    doesn't push, because they name volumes.

    Args:
        args: What to load.
        processor: Tokenizer and image processor of the model.
        finding_names: Labels of the findings head; empty = no finding labels.
        with_lengths: Whether the records get a column `length`, in tokens.
        with_valid: Whether the validation split is read; otherwise `eval_dataset` is None.
        output_dir: The run's folder.
        shards: Shards that have the records; None = `args.data` has them.

    Raises:
        ValueError: Processes have different records, a patient is in both splits, or a record doesn't fit `max_length`.
        FileNotFoundError: Data or volumes are missing.
    """
    if shards is None:
        data = _load_splits(args, finding_names, with_valid, output_dir)
    else:
        data = _load_packed(args, shards, finding_names, with_valid)
    if args.on_error == "skip" and args.slice_cache is not None and shards is None:
        cache = SliceCache(args.slice_cache, processor.image_processor, args.min_coverage)
        data = {name: _without_failed(part, cache) for name, part in data.items()}
    data = {name: label_findings(part, args, name, finding_names, shards) for name, part in data.items()}
    if args.objective == "findings":
        data = {name: _one_record_per_volume(part) for name, part in data.items()}
    elif with_valid:
        data["valid"] = data["valid"].remove_columns("finding_labels")
    data["train"] = _repeat_tasks(data["train"], args.repeat)
    if with_valid:
        valid = data["valid"].shuffle(seed=0)
        data["valid"] = valid.select(range(min(len(valid), args.valid_limit or len(valid))))
    if args.max_length and args.objective == "text":
        data = {name: without_overlong(part, name, processor, args) for name, part in data.items()}
    if with_lengths:
        data = {name: add_lengths(part, processor.tokenizer) for name, part in data.items()}
    valid = data.get("valid")
    measured = None if valid is None else {"own": valid, "shuffled": shuffle_volumes(valid, seed=0)}
    if measured and shards is not None:  # each shard of the validation split once, not once per record
        measured = {
            name: part.select(np.argsort(shard_numbers(shards, part), kind="stable")) for name, part in measured.items()
        }
    return {"train_dataset": data["train"], "eval_dataset": measured}


def _load_splits(
    args: DataArguments, finding_names: list[str], with_valid: bool, output_dir: str
) -> dict[str, datasets.Dataset]:
    options: JsonObject = {"tasks": args.tasks, "finding_names": finding_names, **_load_options(args)}
    options["needs_text"] = args.objective == "text"
    vqa_files: JsonObject = {"vqa_files": args.vqa_files} if args.vqa_files else {}
    splits = {"train": vqa_files, "valid": {}} if with_valid else {"train": vqa_files}
    data = {
        name: load_records(args.data, name, **options, **own, counts_file=Path(output_dir, _COUNTS_FILE.format(name)))
        for name, own in splits.items()
    }
    for name, part in data.items():
        Processes().check_equal(f"{name} records", len(part))
    if with_valid:
        check_patient_overlap(data["train"], data["valid"])
    return data


def _load_packed(
    args: DataArguments, shards: ShardStore, finding_names: list[str], with_valid: bool
) -> dict[str, datasets.Dataset]:
    names = ("train", "valid") if with_valid else ("train",)
    data = {name: load_shard_records(shards, name, args.tasks, finding_names) for name in names}
    for name, part in data.items():
        Processes().check_equal(f"{name} records", len(part))
    if with_valid:
        check_patient_overlap(data["train"], data["valid"])
    return data


def _load_options(args: DataArguments) -> LoadOptions:
    """Return the options of `load_records` that were given; the others keep its defaults."""
    given = {name: getattr(args, name) for name in ("report_sections", "reconstructions")}
    options = {name: value for name, value in given.items() if value} | args.record_options()
    if args.on_error == "skip":
        options["on_missing"] = "skip"
    return cast("LoadOptions", options)


def _without_failed(records: datasets.Dataset, cache: SliceCache) -> datasets.Dataset:
    """Return the records without those whose volume `preprocess.py` couldn't read with the cache's settings."""

    def failed_paths() -> list[str]:
        failed = Manifest(cache.folder, "slices").keys()[1]
        listed = inspect_volumes(distinct_volumes(records), cache) if failed else []
        return [volume.path for volume in listed if volume.key in failed]

    volumes = Processes().from_first(failed_paths)  # one process decides: all must have the same records
    if not volumes:
        return records
    unreadable: set[str] = set(volumes)
    rows = [index for index, path in enumerate(records["volume"][:]) if path not in unreadable]
    logger.warning(
        "%d of %d records left out: preprocess.py couldn't read their %d volumes (first: %s); failures.jsonl in %s says why",
        len(records) - len(rows),
        len(records),
        len(volumes),
        volumes[0],
        cache.folder,
    )
    return records.select(rows)


def without_overlong(
    records: datasets.Dataset, split: str, processor: SamfProcessor, args: DataArguments
) -> datasets.Dataset:
    """Return the records that fit `max_length`, if necessary with a shorter answer.

    Args:
        records: Records of one split.
        split: Its name, for the message.
        processor: Tokenizer and chat template of the model.
        args: Have `max_length` and `on_error`.

    Raises:
        ValueError: Some records don't fit and `on_error` isn't "skip"; names them and the length that they need.
    """
    overlong = find_overlong(records, processor, args.max_length)
    if not overlong:
        return records
    ids = records.select(list(overlong)[:_MOST_LISTED])["id"][:]
    named = ", ".join(f"{name!r} ({tokens} tokens)" for name, tokens in zip(ids, overlong.values(), strict=False))
    found = (
        f"{len(overlong)} of {len(records)} {split} records don't fit max_length={args.max_length} even without their "
        f"answers: {named}{', …' if len(overlong) > _MOST_LISTED else ''}"
    )
    if args.on_error != "skip":
        raise ValueError(
            f"{found}. Raise max_length to more than {max(overlong.values())}, give volumes fewer image tokens, or leave "
            "these records out: --on_error skip."
        )
    logger.warning("%s; they are left out", found)
    return records.select([row for row in range(len(records)) if row not in overlong])


def label_findings(
    records: datasets.Dataset,
    args: DataArguments,
    split: str,
    finding_names: Sequence[str],
    shards: ShardStore | None = None,
) -> datasets.Dataset:
    """Return the records with finding labels: the data's own, or labels that rules read from the scans' reports.

    Args:
        records: Records of one split.
        args: Name the data, and say with `finding_labels` where labels come from.
        split: "train" or "valid".
        finding_names: Labels of the findings head; empty = the records stay as they are.
        shards: Shards that have the reports; None = `args.data` has them.

    Raises:
        ValueError: The rules don't know a finding, or the data has no reports.
    """
    if not finding_names:
        return records
    labels = records.select_columns("finding_labels").iter(1000)
    labelled = any(len(row) for batch in labels for row in batch["finding_labels"])
    if labelled and args.finding_labels == "auto":
        return records
    if unknown := sorted(set(finding_names) - set(CT_RATE_LABELS)):
        raise ValueError(
            f"finding_names has {unknown}, which {args.data} has no label file for and the rules can't read in reports; "
            f"they read {', '.join(CT_RATE_LABELS)}."
        )
    if shards is None:
        reports = load_records(args.data, split, tasks=("report",), **_load_options(args))
    else:
        reports = load_shard_records(shards, split, ("report",))
    found: dict[str, list[int]] = {}
    for scan, text in zip(reports["scan_id"][:], reports["answer"][:], strict=True):
        labels = label_report(text)
        found[scan] = [labels[name] for name in finding_names]
    # Unknown labels rather than none: under FSDP the findings head needs a gradient on every process.
    unknown_labels = [IGNORE_INDEX] * len(finding_names)
    rows = [found.get(scan, unknown_labels) for scan in records["scan_id"][:]]
    logger.warning("%s: findings of %d scans labelled by rules from their reports", split, len(found))
    feature = records.features["finding_labels"]
    return records.remove_columns("finding_labels").add_column("finding_labels", rows, feature=feature)


def has_text_only_records(*splits: datasets.Dataset | Mapping[str, datasets.Dataset] | None) -> bool:
    """Return whether some records have no volume: a batch of them uses the language model only."""
    parts = [part for split in splits for part in (split.values() if isinstance(split, dict) else [split])]
    return any("volume" in getattr(part, "column_names", ()) and None in part["volume"][:] for part in parts)


def build_mixture(args: DataArguments, records: datasets.Dataset, training: TrainingArguments) -> TaskMixture | None:
    """Return the mixture that chooses each epoch's records; None without weights of the tasks.

    The findings' loss doesn't depend on the task, so the objective "findings" has no mixture.

    Args:
        args: Have the weights, `mixture`.
        records: The training records.
        training: Have the seed and the sampling strategy.

    Raises:
        ValueError: The sampling strategy decides the order too.
    """
    weights = parse_weights(args.mixture)
    if not weights or args.objective == "findings":
        return None
    if training.train_sampling_strategy not in ("random", "group_by_length"):
        raise ValueError(
            f"mixture decides the order of training, and so does train_sampling_strategy={training.train_sampling_strategy}; "
            "use random or group_by_length with it."
        )
    return TaskMixture(records, weights, order_seed(training))


def _repeat_tasks(records: datasets.Dataset, repeat: list[str]) -> datasets.Dataset:
    """Return the records with those of some tasks repeated: `["report=3"]` has every report three times."""
    if not repeat:
        return records
    times = {task: int(number) for task, number in (item.split("=") for item in repeat)}
    rows = [index for index, task in enumerate(records["task"][:]) for _ in range(times.get(task, 1))]
    return records.select(rows)


def _one_record_per_volume(records: datasets.Dataset) -> datasets.Dataset:
    """Return the first record of each volume, for the findings' loss, which doesn't depend on the question."""
    first: dict[str, int] = {}
    for index, volume in enumerate(records["volume"][:]):
        if volume is not None:
            first.setdefault(volume, index)
    return records.select(sorted(first.values()))
