"""Records from data sets in any layout, by the names of their columns.

One column holds the volume (a `datasets.Nifti`, a path or an address), others its report, or a question with its answer.
A data set on the Hub is fetched by `datasets.load_dataset` into its cache; paths relative to the repository become hf://
addresses, which are fetched when they are read. Volumes within Parquet or Arrow files are unpacked once, next to the cache
of records.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from samf.data.labels import LabelReader, find_label_columns
from samf.data.load_stats import LoadStats
from samf.data.missing_volumes import check_volumes
from samf.data.open_table import open_table, select_part, split_by_column
from samf.data.options import check_choice, check_on_missing
from samf.data.record_cache import in_memory
from samf.data.records import FEATURES, RecordBuilder, VolumeChoice
from samf.data.schema import TASKS, Task
from samf.data.table_rows import TableRows
from samf.data.table_volumes import TablePaths
from samf.utils.distributed import Processes

logger = logging.getLogger(__name__)

_VALID_NAMES = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table.

    Attributes:
        volume: paths, addresses, or `datasets.Nifti`.
        report: reports.
        question: questions about the volume; needs `answer`.
        answer: their answers.
        choices: options of multiple-choice questions, as lists or as "(a) … (b) …"; None takes those in the question.
        patient: the patient of each volume.
        split: the name of each row's split; it takes the place of the data set's own splits.
        scan: what each volume is a reconstruction of; it also names the records.
        labels: {finding: its column of labels}; other findings have columns of their own names.
        splits: {"train" or "valid": a split of the data set or a part of one, such as "test" or "train[90%:]"}; the key ""
            is for both. By default "train" is the split of that name, and "valid" the first of "validation", "valid",
            "val" and "dev".
        image_root: the folder from which relative paths start; None takes the table's, or the Hub's repository.
        opener: opens the data set; default: `open_table`.
        name: of a data set that is known by name, for messages.
    """

    volume: str
    report: str | None = None
    question: str | None = None
    answer: str | None = None
    choices: str | None = None
    patient: str | None = None
    split: str | None = None
    scan: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    image_root: str | None = None
    opener: Callable[[str | Path, str], datasets.Dataset | datasets.DatasetDict] = open_table
    name: str | None = None

    def __post_init__(self) -> None:
        if (self.question is None) != (self.answer is None):
            raise ValueError("question_column and answer_column go together; give both or none.")
        if self.choices is not None and self.question is None:
            raise ValueError("choices_column needs question_column and answer_column.")

    def load(
        self,
        source: str | Path,
        split: str,
        *,
        tasks: Sequence[str] | None = None,
        on_missing: str = "raise",
        image_root: str | Path | None = None,
        finding_names: Sequence[str] = (),
        needs_text: bool = True,
        counts_file: str | Path | None = None,
        **_unused: object,
    ) -> datasets.Dataset:
        """Load the records of a split: one of a row's report, one of its question; or one of its labels only.

        Args:
            source: owner/name of a data set on the Hub, a folder (`save_to_disk`'s, or one that `load_dataset` reads), or a
                .csv, .tsv, .json, .jsonl or .parquet file; "{split}" in it is replaced by the split.
            split: "train" or "valid".
            tasks: some of TASKS; None takes all that the columns give.
            on_missing: as for `load_ct_rate`.
            image_root: takes precedence over the columns' own.
            finding_names: findings whose labels the records get, where the table has columns of them.
            needs_text: False makes one record per row that has labels, with an empty report, where there are labels.
            counts_file: as for `load_ct_rate`.
            _unused: options of other loaders.

        Raises:
            FileNotFoundError: no such source, or volumes are missing.
            ValueError: a column or split that isn't there, or no column for the tasks.
        """
        on_missing = check_on_missing(on_missing)
        chosen = self._tasks(tasks) if needs_text else TASKS
        rows = self._open(source, split, finding_names)
        has_labels_only = not needs_text and bool(rows.labels)
        if not needs_text and not has_labels_only:
            chosen = self._tasks(tasks)
        builder = self._builder(source, image_root, chosen)
        load_stats = builder.load_stats
        with Processes().main_process_first():  # volumes within the table are unpacked once
            records = in_memory(rows.volumes(builder) if has_labels_only else rows.records(builder, chosen), FEATURES)
        records = check_volumes(records, on_missing, load_stats)
        load_stats.log(f"{source} {split}")
        if counts_file is not None:
            load_stats.save(counts_file, source=str(source), split=split)
        return records

    def load_splits(
        self, source: str, splits: Sequence[str], on_missing: str, image_root: str | Path | None = None
    ) -> Iterator[tuple[str, datasets.Dataset]]:
        """Yield each split that the data set has with a record per volume, whose texts are empty.

        Args:
            source: as for `load`.
            splits: "train", "valid" or both.
            on_missing: as for `load`.
            image_root: as for `load`.
        """
        present = [split for split in splits if self.has_split(source, split)]
        for split in present or splits[:1]:
            builder = self._builder(source, image_root, TASKS)
            records = in_memory(self._open(source, split).volumes(builder), FEATURES)
            yield split, check_volumes(records, on_missing, builder.load_stats)
            builder.load_stats.log(f"{source} {split}")

    def has_split(self, source: str, split: str) -> bool:
        """Return whether the data set has this split; a table without splits is all "train", unless parts are named."""
        loaded = self.load_table(source, split)
        if isinstance(loaded, datasets.Dataset):
            return split in self.splits or (split == "train" and not self.splits) or "{split}" in str(source)
        return self._split_name(loaded, split) is not None

    def load_table(self, source: str | Path, split: str) -> datasets.Dataset | datasets.DatasetDict:
        """Open a data set with all its columns, by its splits where it has them.

        Args:
            source: as for `load`.
            split: replaces "{split}" in `source`.
        """
        loaded = self.opener(source, split)
        return loaded if self.split is None else split_by_column(loaded, self.split, source)

    def split_names(self, source: str | Path) -> list[str] | None:
        """Return the names of all splits of a data set; None for a table without splits."""
        loaded = self.load_table(source, "train")
        return None if isinstance(loaded, datasets.Dataset) else list(loaded)

    def findings(self, source: str | Path) -> list[str]:
        """Return the findings that a data set has labels of: those in `labels`, and other columns of small integers."""
        loaded = self.load_table(source, "train")
        features = (loaded if isinstance(loaded, datasets.Dataset) else next(iter(loaded.values()))).features
        named = [name for name, column in self.labels.items() if column in features]
        taken = {self.labels[name] for name in named}
        small = [name for name, kind in features.items() if getattr(kind, "dtype", None) in ("int8", "bool")]
        return named + [name for name in small if name not in taken]

    def _tasks(self, wanted: Sequence[str] | None) -> tuple[Task, ...]:
        possible: tuple[Task, ...] = ("report",) if self.report else ()
        possible += ("multiple_choice", "short_answer") if self.question else ()
        if not possible and self.name:
            raise ValueError(
                f"dataset {self.name} has no reports and no questions. Its volumes are for preprocess.py and pretraining, "
                f"and its labels, where it has them, for --objective findings."
            )
        if not possible:
            raise ValueError("No column holds texts: name --report_column, or --question_column and --answer_column.")
        if wanted is not None:
            check_choice("tasks", wanted, TASKS)
        tasks = tuple(task for task in possible if wanted is None or task in wanted)
        if not tasks:
            raise ValueError(f"tasks={list(wanted or ())}; the columns named here give {', '.join(possible)}.")
        return tasks

    def _split_name(self, loaded: datasets.DatasetDict, split: str) -> str | None:
        named = self.splits.get(split) or self.splits.get("")
        if named:
            return named
        names = ("train",) if split == "train" else _VALID_NAMES
        return next((name for name in names if name in loaded), None)

    def _builder(self, source: str | Path, image_root: str | Path | None, tasks: Collection[str]) -> RecordBuilder:
        load_stats = LoadStats()
        paths = TablePaths(source, image_root or self.image_root)
        return RecordBuilder(VolumeChoice(paths.locate, load_stats), load_stats, tasks)

    def _open(self, source: str | Path, split: str, finding_names: Sequence[str] = ()) -> TableRows:
        """Return the rows of a split, with the named columns only."""
        loaded = self.load_table(source, split)
        if isinstance(loaded, datasets.Dataset):
            loaded = datasets.DatasetDict({"train": loaded})
            spec: str | None = self.splits.get(split) or self.splits.get("") or "train"
        else:
            spec = self._split_name(loaded, split)
        if spec is None:
            raise ValueError(
                f"{source}: no split for {split!r}; it has {', '.join(loaded)}. Name one, or a part of one: --dataset_split "
                f"{split}={next(iter(loaded))}, or {split}={next(iter(loaded))}[90%:]."
            )
        table = select_part(loaded, spec, source)
        columns = (self.volume, self.report, self.question, self.answer, self.choices, self.patient, self.scan)
        wanted = [name for name in columns if name is not None]
        if absent := [name for name in wanted if name not in table.column_names]:
            raise ValueError(
                f"{source}: no column {', '.join(absent)}; its columns are {', '.join(table.column_names[:50])}."
            )
        found = find_label_columns(finding_names, self.labels, set(table.column_names), str(source))
        labels = LabelReader(found, str(source))
        table = table.select_columns(list(dict.fromkeys([*wanted, *labels.columns])))
        if isinstance(table.features[self.volume], datasets.Nifti):
            table = table.cast_column(self.volume, datasets.Nifti(decode=False))
        return TableRows(self, table, labels, source)


def parse_splits(items: Sequence[str]) -> dict[str, str]:
    """Parse `--dataset_split`: "test" for whichever split is asked for, or "train=…" and "valid=…"."""
    splits: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        name, value = (name, value) if equals else ("", item)
        if name not in ("", "train", "valid") or not value or name in splits:
            raise ValueError(f"dataset_split has {item!r}; expected a split, or train=SPLIT and valid=SPLIT once each.")
        splits[name] = value
    return splits
