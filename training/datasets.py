"""The records that stage 3 trains and is measured on, and where their volumes come from."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainingArguments

from samf.cache.manifest import Manifest, inspect_volumes
from samf.cache.slice_cache import SliceCache
from samf.data.ct_rate.loader import CT_RATE_LABELS, check_patient_overlap
from samf.data.lengths import add_lengths, find_overlong
from samf.data.loading import load_records
from samf.data.mixture import TaskMixture, parse_weights
from samf.data.schema import IGNORE_INDEX
from samf.data.volume_discovery import distinct_volumes
from samf.evaluation.answering.generation import shuffle_volumes
from samf.evaluation.metrics.finding_labeller import label_report
from samf.model.processing_samf import SamfProcessor
from samf.training.arguments import DataArguments
from samf.training.trainer_base import order_seed
from samf.utils.distributed import Processes

logger = logging.getLogger(__name__)

LISTED = 5
COUNTS = "_records_{}.json"  # Trainer pushes nothing that begins with an underscore


def load_datasets(
    args: DataArguments,
    processor: SamfProcessor,
    finding_names: list[str],
    *,
    with_lengths: bool,
    with_valid: bool,
    output_dir: str,
) -> dict:
    """Trainer's datasets: train, and validation twice, with each patient's own volume and with another's.

    A model that doesn't look at the volume has the same loss on both. With text, the validation loss is the text's alone.
    What was read and what was left out is counted in `output_dir`, in files that Trainer doesn't push: they name volumes.
    Without `with_valid` the validation split isn't read, and `eval_dataset` is None.
    """
    options = {"tasks": args.tasks, "finding_names": finding_names, **chosen_options(args)}
    vqa_files = {"vqa_files": args.vqa_files} if args.vqa_files else {}
    splits = {"train": vqa_files, "valid": {}} if with_valid else {"train": vqa_files}
    data = {
        name: load_records(args.data, name, **options, **own, counts_file=Path(output_dir, COUNTS.format(name)))
        for name, own in splits.items()
    }
    for name, part in data.items():
        Processes().check_equal(f"{name} records", len(part))
    if with_valid:
        check_patient_overlap(data["train"], data["valid"])
    if args.on_error == "skip" and args.slice_cache is not None:
        cache = SliceCache(args.slice_cache, processor.image_processor, args.min_coverage)
        data = {name: without_failed(part, cache) for name, part in data.items()}
    data = {name: label_findings(part, args, name, finding_names) for name, part in data.items()}
    if args.objective == "findings":
        data = {name: one_record_per_volume(part) for name, part in data.items()}
    elif with_valid:
        data["valid"] = data["valid"].remove_columns("finding_labels")
    data["train"] = repeat_tasks(data["train"], args.repeat)
    if with_valid:
        valid = data["valid"].shuffle(seed=0)
        data["valid"] = valid.select(range(min(len(valid), args.valid_limit or len(valid))))
    if args.max_length and args.objective == "text":
        data = {name: without_overlong(part, name, processor, args) for name, part in data.items()}
    if with_lengths:
        data = {name: add_lengths(part, processor.tokenizer) for name, part in data.items()}
    valid = data.get("valid")
    measured = None if valid is None else {"own": valid, "shuffled": shuffle_volumes(valid, seed=0)}
    return {"train_dataset": data["train"], "eval_dataset": measured}


def chosen_options(args: DataArguments) -> dict[str, Any]:
    """Options of `load_records` that were given, and its own defaults where they weren't."""
    given = {name: getattr(args, name) for name in ("report_sections", "reconstructions", "image_root")}
    options = {name: value for name, value in given.items() if value} | args.record_options()
    return {**options, "on_missing": "skip"} if args.on_error == "skip" else options


def without_failed(records: datasets.Dataset, cache: SliceCache) -> datasets.Dataset:
    """The records without those whose volume `preprocess.py` found that it can't read with these settings."""

    def look() -> list[str]:
        failed = Manifest(cache.folder, "slices").keys()[1]
        listed = inspect_volumes(distinct_volumes(records), cache) if failed else []
        return [volume.path for volume in listed if volume.key in failed]

    volumes = Processes().from_first(look)  # the first process decides for all: they must have the same records
    if not volumes:
        return records
    unread = set(volumes)
    rows = [index for index, path in enumerate(records["volume"][:]) if path not in unread]
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
    """The records that fit `max_length`, if need be with a shorter answer.

    Raises:
        ValueError: some don't, and `on_error` isn't "skip"; names them and the length that they need.
    """
    overlong = find_overlong(records, processor, args.max_length)
    if not overlong:
        return records
    ids = records.select(list(overlong)[:LISTED])["id"][:]
    named = ", ".join(f"{name!r} ({tokens} tokens)" for name, tokens in zip(ids, overlong.values(), strict=False))
    found = (
        f"{len(overlong)} of {len(records)} {split} records don't fit max_length={args.max_length} even without their "
        f"answers: {named}{', …' if len(overlong) > LISTED else ''}"
    )
    if args.on_error != "skip":
        raise ValueError(
            f"{found}. Raise max_length to more than {max(overlong.values())}, give volumes fewer image tokens, or leave "
            "these records out: --on_error skip."
        )
    logger.warning("%s; they are left out", found)
    return records.select([row for row in range(len(records)) if row not in overlong])


def label_findings(
    records: datasets.Dataset, args: DataArguments, split: str, finding_names: Sequence[str]
) -> datasets.Dataset:
    """The records with labels read from their scans' reports by rules, where the data has no label file.

    Raises:
        ValueError: a finding that the rules don't know, or data without reports.
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
    reports = load_records(args.data, split, tasks=("report",), **chosen_options(args))
    found: dict[str, list[int]] = {}
    for scan, text in zip(reports["scan_id"][:], reports["answer"][:], strict=True):
        labels = label_report(text)
        found[scan] = [labels[name] for name in finding_names]
    blank = [IGNORE_INDEX] * len(finding_names)  # and no empty row: under FSDP every process's head needs a gradient
    rows = [found.get(scan, blank) for scan in records["scan_id"][:]]
    logger.warning("%s: findings of %d scans labelled by rules from their reports", split, len(found))
    feature = records.features["finding_labels"]
    return records.remove_columns("finding_labels").add_column("finding_labels", rows, feature=feature)


def holds_text_only(*splits: datasets.Dataset | Mapping[str, datasets.Dataset] | None) -> bool:
    """Whether some records have no volume: a batch of them leaves the parts before the language model unused."""
    parts = [part for split in splits for part in (split.values() if isinstance(split, dict) else [split])]
    return any("volume" in getattr(part, "column_names", ()) and None in part["volume"][:] for part in parts)


def build_mixture(args: DataArguments, records: datasets.Dataset, training: TrainingArguments) -> TaskMixture | None:
    """Which records each epoch has, if the tasks are weighed; for the findings' loss tasks don't matter."""
    weights = parse_weights(args.mixture)
    if not weights or args.objective == "findings":
        return None
    if training.train_sampling_strategy not in ("random", "group_by_length"):
        raise ValueError(
            f"mixture decides the order of training, and so does train_sampling_strategy={training.train_sampling_strategy}; "
            "use random or group_by_length with it."
        )
    return TaskMixture(records, weights, order_seed(training))


def repeat_tasks(records: datasets.Dataset, repeat: list[str]) -> datasets.Dataset:
    """The records with those of some tasks several times: `["report=3"]` has every report three times."""
    if not repeat:
        return records
    times = {task: int(number) for task, number in (item.split("=") for item in repeat)}
    rows = [index for index, task in enumerate(records["task"][:]) for _ in range(times.get(task, 1))]
    return records.select(rows)


def one_record_per_volume(records: datasets.Dataset) -> datasets.Dataset:
    """The first record of each volume: for the findings' loss the questions don't matter."""
    first: dict[str, int] = {}
    for index, volume in enumerate(records["volume"][:]):
        if volume is not None:
            first.setdefault(volume, index)
    return records.select(sorted(first.values()))
