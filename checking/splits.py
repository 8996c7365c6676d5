"""What the splits of a data set hold, from their tables, and what they have in common."""

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.data.ct_rate.sources import is_hub_name
from samf.data.loading import load_records
from samf.data.patient_splits import pseudonym
from samf.data.patients import PATIENT_COLUMN
from samf.data.schema import JsonObject, volume_of
from samf.data.source_arguments import SourceArguments
from samf.data.table_columns import TableColumns
from samf.data.volume_discovery import SPLITS, ct_rate_folders, find_splits
from samf.model.ct_common import VolumeRef

_LISTED = 10
_ROWS = 1000  # of a table that are read at once


@dataclass
class Split:
    """One split of a data set.

    Attributes:
        volumes: {path: patient, None where unknown}.
        refs: {path: the volume with its rescale}.
        tasks: number of records by task.
        left_out: what the loader left out: {"reason", "count", "first"}.
        reports: {record id: report}.
        answers: number of words of each answer of a question.
        labels: {finding: labels by volume: 1, 0, or IGNORE_INDEX where unknown}.
    """

    volumes: dict[str, str | None] = field(default_factory=dict)
    refs: dict[str, VolumeRef] = field(default_factory=dict)
    tasks: Counter[str] = field(default_factory=Counter)
    left_out: list[JsonObject] = field(default_factory=list)
    reports: dict[str, str] = field(default_factory=dict)
    answers: list[int] = field(default_factory=list)
    labels: dict[str, list[int]] = field(default_factory=dict)

    @property
    def patients(self) -> set[str]:
        """Return the known patients."""
        return {patient for patient in self.volumes.values() if patient is not None}

    @property
    def unknown_patients(self) -> int:
        """Return the number of volumes whose patient is unknown."""
        return sum(patient is None for patient in self.volumes.values())


def load_splits(source: str, args: SourceArguments, patterns: list[str] | None = None) -> dict[str, Split]:
    """Load all splits of a source; whether volumes are there is not checked.

    Args:
        source: as for `load_records`, or a folder of volumes without texts.
        args: names the data set or its columns.
        patterns: of the files in a folder without tables.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: an option that the source doesn't have, or a table without a column that it needs.
    """
    columns = args.table_columns()
    if columns is not None:
        return _table_splits(source, columns, args)
    path = Path(source).expanduser()
    if (path.is_dir() and ct_rate_folders(path.absolute(), SPLITS)) or (is_hub_name(source) and not path.exists()):
        splits = [folder.split for folder in ct_rate_folders(path.absolute(), SPLITS)] if path.is_dir() else SPLITS
        return {split: _load(source, split, args, finding_names=CT_RATE_LABELS) for split in splits}
    if any(Path(part.strip()).suffix.lower() == ".csv" for part in source.split(",")):
        return {split: _load(source, split, args) for split in (SPLITS if "{split}" in source else SPLITS[:1])}
    found = find_splits(source, args.source_options(patterns=patterns))
    return {
        split: Split(
            volumes={ref.path: own.patients.get(ref.path) for ref in own.volumes},
            refs={ref.path: ref for ref in own.volumes},
            left_out=[{"reason": reason, "count": count} for reason, count in own.passed_over.items()],
        )
        for split, own in found.items()
    }


def _table_splits(source: str, columns: TableColumns, args: SourceArguments) -> dict[str, Split]:
    """Return the splits of a table; of rows that are in none, the first split counts how many there are."""
    opened = lru_cache(maxsize=4)(columns.opener)  # once for all splits
    whole = replace(columns, opener=opened)
    splits = _splits_of(source, replace(whole, opener=lru_cache(maxsize=4)(whole.load_table), split=None), args)
    if columns.split is not None and "{split}" not in source:
        rows = _row_count(opened(source, "train")) - _row_count(whole.load_table(source, "train"))
        unnamed = {"reason": f"rows of the table without a split in column {columns.split}", "count": rows}
        next(iter(splits.values())).left_out += [unnamed] if rows else []
    return splits


def _row_count(loaded: datasets.Dataset | datasets.DatasetDict) -> int:
    return len(loaded) if isinstance(loaded, datasets.Dataset) else sum(map(len, loaded.values()))


def _splits_of(source: str, columns: TableColumns, args: SourceArguments) -> dict[str, Split]:
    names = columns.split_names(source)
    findings = columns.findings(source)
    has_text = columns.report is not None or columns.question is not None
    options: dict[str, Any] = {"finding_names": findings, "needs_text": has_text}
    if not has_text and not findings:
        return {split: _without_texts(source, split, columns, args) for split in names or ["train"]}
    if names is None or args.dataset_split or "{split}" in source:
        splits = [split for split in SPLITS if columns.has_split(source, split)] or ["train"]
        return {split: _load(source, split, args, columns=columns, **options) for split in splits}
    return {
        name: _load(source, "train", args, columns=replace(columns, splits={"": name}), **options) for name in names
    }


def _without_texts(source: str, split: str, columns: TableColumns, args: SourceArguments) -> Split:
    own = replace(columns, splits={"": split} if columns.split_names(source) else {})
    options = replace(args.source_options(on_missing="keep", splits=("train",)), columns=own)
    found = find_splits(source, options)["train"]
    return Split(
        volumes={ref.path: found.patients.get(ref.path) for ref in found.volumes},
        refs={ref.path: ref for ref in found.volumes},
    )


def _load(source: str, split: str, args: SourceArguments, **options: Any) -> Split:
    """Load the records of a split and what its loader counted."""
    with tempfile.TemporaryDirectory(prefix="samf-") as folder:
        counts = Path(folder, "counts.json")
        given = {**args.record_options(), **options}
        records = load_records(source, split, on_missing="keep", counts_file=counts, **given)
        left_out = json.loads(counts.read_text(encoding="utf-8"))["left_out"] if counts.is_file() else []
    return summarise(records, options.get("finding_names", ()), left_out)


def summarise(
    records: datasets.Dataset, finding_names: Sequence[str] = (), left_out: Sequence[JsonObject] = ()
) -> Split:
    """Return what a split's records hold.

    Args:
        records: of the split.
        finding_names: of their finding labels.
        left_out: what the loader counted.
    """
    split = Split(left_out=list(left_out))
    for batch in records.iter(_ROWS):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            _add(split, dict(zip(names, values, strict=True)), finding_names)
    return split


def _add(split: Split, row: Mapping[str, Any], finding_names: Sequence[str]) -> None:
    ref = volume_of(row)  # type: ignore[arg-type]  # a row of `datasets` with a record's columns
    is_new = ref is not None and ref.path not in split.volumes
    if ref is not None:
        split.volumes[ref.path] = split.volumes.get(ref.path) or row[PATIENT_COLUMN]
        split.refs[ref.path] = ref
    if row["task"] != "report":
        split.tasks[row["task"]] += 1
        split.answers.append(len(row["answer"].split()))
    elif row["answer"]:
        split.tasks["report"] += 1
        split.reports[row["id"]] = row["answer"]
    if is_new and row["finding_labels"]:
        for name, label in zip(finding_names, row["finding_labels"], strict=True):
            split.labels.setdefault(name, []).append(label)


# --- What splits have in common ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """What two splits have in common.

    Attributes:
        splits: their names.
        patients: patients with volumes in both.
        volumes: paths in both, and files in one whose copy is in the other.
        reports: texts that are reports in both.
        report_records: number of the records with such a text, in each split.
    """

    splits: tuple[str, str]
    patients: list[str]
    volumes: list[str]
    reports: list[str]
    report_records: tuple[int, int]

    @property
    def is_problem(self) -> bool:
        """Return whether scores on one split would not be held out. Reports of normal scans may well be equal."""
        return bool(self.patients or self.volumes)

    def to_json(self) -> JsonObject:
        """Return counts and the first examples; patients as pseudonyms, and no text of a report."""
        return {
            "splits": list(self.splits),
            "patients": {"count": len(self.patients), "first": [pseudonym(name) for name in self.patients[:_LISTED]]},
            "volumes": {"count": len(self.volumes), "first": self.volumes[:_LISTED]},
            "reports": {
                "texts": len(self.reports),
                "records": dict(zip(self.splits, self.report_records, strict=True)),
            },
        }


def find_overlaps(splits: Mapping[str, Split], copies: Sequence[Sequence[str]] = ()) -> list[Overlap]:
    """Return what each pair of splits has in common; pairs without anything are left out.

    Args:
        splits: of a data set.
        copies: groups of paths that hold the same volume.
    """
    texts = {name: Counter(map(_normalised, split.reports.values())) for name, split in splits.items()}
    found = []
    for first, second in combinations(splits, 2):
        one, other = splits[first], splits[second]
        both = {*one.volumes} & {*other.volumes}
        for group in copies:
            if {*group} & {*one.volumes} and {*group} & {*other.volumes}:
                both |= {*group} & {*one.volumes, *other.volumes}
        same = sorted({*texts[first]} & {*texts[second]})
        counts = (sum(texts[first][text] for text in same), sum(texts[second][text] for text in same))
        overlap = Overlap(
            (first, second), sorted(one.patients & other.patients), sorted(both), same, report_records=counts
        )
        if overlap.patients or overlap.volumes or overlap.reports:
            found.append(overlap)
    return found


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())
