"""Data sets in any layout, by the names of their columns: from the Hub, from `save_to_disk`, from Parquet, CSV or JSON.

One column holds the volume (a `datasets.Nifti`, a path or an address), others its report, or a question with its answer.
A data set on the Hub is fetched by `datasets.load_dataset`, into its cache; paths below the repository become hf:// addresses,
which are fetched when they are read. Volumes that lie within Parquet or Arrow files are unpacked once, beside the records'
cache.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets.utils.file_utils import xopen
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

from samf.data.ct_rate.loader import ON_MISSING, check_choice, check_volumes
from samf.data.ct_rate.questions import NO_OPTION, settle_answer, split_options
from samf.data.ct_rate.sources import HUB_NAME
from samf.data.ct_rate.tables import given, squeeze
from samf.data.load_stats import LoadStats
from samf.data.prompts import REPORT_QUESTION
from samf.data.record_cache import default_cache, in_memory
from samf.data.records import FEATURES, RecordReader, VolumeChoice
from samf.data.schema import TASKS
from samf.model.ct_download import file_path, is_address
from samf.utils.distributed import Processes
from samf.utils.files import atomic_write
from samf.utils.text_files import open_csv, read_text

logger = logging.getLogger(__name__)

VALID_NAMES = ("validation", "valid", "val", "dev")
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class TableColumns:
    """Which columns of a table hold what.

    Attributes:
        volume: paths, addresses, or `datasets.Nifti`.
        report: texts of reports.
        question, answer: of questions about the volume; both or none.
        choices: options of multiple-choice questions, as lists or as "(a) … (b) …"; None: options may stand in the question.
        patient: the patient of each volume.
        splits: {"train" or "valid": a split of the data set or a part of it, such as "test" or "train[90%:]"}; "" is for
            both. Splits that aren't named here are "train", and "validation", "valid", "val" or "dev".
    """

    volume: str
    report: str | None = None
    question: str | None = None
    answer: str | None = None
    choices: str | None = None
    patient: str | None = None
    splits: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
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
        on_missing: str = "error",
        image_root: str | Path | None = None,
        counts_file: str | Path | None = None,
        **_unused: Any,
    ) -> datasets.Dataset:
        """Return a split's records: a row's report and its question are one each.

        Args:
            source: owner/name of a data set on the Hub, a folder (`save_to_disk`'s, or one that `load_dataset` reads), or a
                .csv, .tsv, .json, .jsonl or .parquet file; "{split}" in it stands for the split.
            split: "train" or "valid".
            tasks: of TASKS; None = all that the columns give.
            on_missing, counts_file: as for `load_ct_rate`.
            image_root: folder that relative paths start from; default: the table's, or the Hub's repository.

        Raises:
            FileNotFoundError: no such source, or volumes are missing.
            ValueError: a column or split that isn't there, or no column for the tasks.
        """
        check_choice("on_missing", [on_missing], ON_MISSING)
        tasks = self._tasks(tasks)
        table, load_stats = self._open(source, split), LoadStats()
        reader = RecordReader(VolumeChoice(Volumes(source, image_root).locate, load_stats), load_stats, tasks)
        with Processes().main_process_first():  # volumes within the table are unpacked once
            records = in_memory(self._records(table, source, reader, tasks), FEATURES)
        records = check_volumes(records, on_missing, load_stats)
        load_stats.log(f"{source} {split}")
        if counts_file is not None:
            load_stats.save(counts_file, source=str(source), split=split)
        return records

    def load_splits(
        self, source: str, splits: Sequence[str], on_missing: str, image_root: str | Path | None = None
    ) -> Iterator[tuple[str, datasets.Dataset]]:
        """Give each split that the data set has with a record a volume, whose texts are empty."""
        present = [split for split in splits if self.has_split(source, split)]
        for split in present or splits[:1]:
            table, load_stats = self._open(source, split), LoadStats()
            reader = RecordReader(VolumeChoice(Volumes(source, image_root).locate, load_stats), load_stats, TASKS)
            rows = (
                reader.record(name, name, task="report", question="", answer="", patient=self._patient(row))
                for name, row in self._rows(table, source, load_stats)
            )
            records = in_memory(filter(None, rows), FEATURES)
            yield split, check_volumes(records, on_missing, load_stats)
            load_stats.log(f"{source} {split}")

    def has_split(self, source: str, split: str) -> bool:
        """Return whether the data set has this split; a table without splits is all "train", unless parts are named."""
        loaded = open_table(source, split)
        if isinstance(loaded, datasets.Dataset):
            return split in self.splits or (split == "train" and not self.splits) or "{split}" in str(source)
        return self._split_name(loaded, split) is not None

    def _tasks(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        possible = ("report",) if self.report else ()
        possible += ("multiple_choice", "short_answer") if self.question else ()
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
        names = ("train",) if split == "train" else VALID_NAMES
        return next((name for name in names if name in loaded), None)

    def _open(self, source: str | Path, split: str) -> datasets.Dataset:
        loaded = open_table(source, split)
        if isinstance(loaded, datasets.Dataset):
            loaded = datasets.DatasetDict({"train": loaded})
            spec = self.splits.get(split) or self.splits.get("") or "train"
        else:
            spec = self._split_name(loaded, split)
        if spec is None:
            raise ValueError(
                f"{source}: no split for {split!r}; it has {', '.join(loaded)}. Name one, or a part of one: --dataset_split "
                f"{split}={next(iter(loaded))}, or {split}={next(iter(loaded))}[90%:]."
            )
        table = _part(loaded, spec, source)
        wanted = [name for name in (self.volume, *self._text_columns(), self.patient) if name is not None]
        if absent := [name for name in wanted if name not in table.column_names]:
            raise ValueError(
                f"{source}: no column {', '.join(absent)}; its columns are {', '.join(table.column_names)}."
            )
        table = table.select_columns(list(dict.fromkeys(wanted)))
        if isinstance(table.features[self.volume], datasets.Nifti):
            table = table.cast_column(self.volume, datasets.Nifti(decode=False))
        return table

    def _text_columns(self) -> tuple[str | None, ...]:
        return self.report, self.question, self.answer, self.choices

    def _rows(
        self, table: datasets.Dataset, source: str | Path, load_stats: LoadStats
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row that has a volume, with the volume's name."""
        folder = default_cache() / "volumes" / table._fingerprint
        rows = tqdm(table, desc=f"reading {source}", unit=" rows", disable=None, delay=5)
        for number, row in enumerate(rows):
            name = volume_name(row[self.volume], folder, number)
            if name is None:
                load_stats.drop("row without a volume", f"row {number}")
                continue
            yield name, row

    def _records(
        self, table: datasets.Dataset, source: str | Path, reader: RecordReader, tasks: Collection[str]
    ) -> Iterator[dict[str, Any]]:
        for number, (name, row) in enumerate(self._rows(table, source, reader.load_stats)):
            patient = self._patient(row)
            if "report" in tasks and (
                record := reader.report(name, REPORT_QUESTION, given(_text(row[self.report])), patient)
            ):
                yield record
            if self.question is None or (turn := self._question(row, reader.load_stats, number)) is None:
                continue
            if record := reader.record(name, f"{turn['task']}_{number}", patient=patient, **turn):
                yield record

    def _question(self, row: dict[str, Any], load_stats: LoadStats, number: int) -> dict[str, Any] | None:
        """A row's question as the content of a record; None, counted, where it is unusable."""
        question, answer = given(_text(row[self.question])), given(_text(row[self.answer]))
        if not question or not answer:
            load_stats.drop("no question or no answer", f"row {number}")
            return None
        choices: Any = row[self.choices] if self.choices else None
        if self.choices is None:
            question, choices = split_options(question)
        elif isinstance(choices, str):
            choices = split_options(choices)[1]
        choices = [squeeze(_text(choice)) for choice in choices or ()]
        if not choices:
            return {"task": "short_answer", "question": question, "answer": answer}
        settled = settle_answer(answer, choices)
        if settled is None:
            load_stats.drop(NO_OPTION, f"row {number}")
            return None
        return {"task": "multiple_choice", "question": question, "choices": choices, "answer": settled}

    def _patient(self, row: dict[str, Any]) -> str | None:
        value = None if self.patient is None else row[self.patient]
        return _text(value).strip() or None


def parse_splits(items: Sequence[str]) -> dict[str, str]:
    """Read `--dataset_split`: "test" for whatever split is asked for, or "train=…" and "valid=…"."""
    splits = {}
    for item in items:
        name, equals, value = item.partition("=")
        name, value = (name, value) if equals else ("", item)
        if name not in ("", "train", "valid") or not value or name in splits:
            raise ValueError(f"dataset_split has {item!r}; expected a split, or train=SPLIT and valid=SPLIT once each.")
        splits[name] = value
    return splits


def _text(value: Any) -> str:
    return "" if value is None else str(value)


# ---- opening tables ----------------------------------------------------------------------------------------------------


def open_table(source: str | Path, split: str) -> datasets.Dataset | datasets.DatasetDict:
    """Open a data set; one without named splits is a Dataset.

    Raises:
        FileNotFoundError: there is none.
        ValueError: `datasets` can't read it.
    """
    named = str(source).replace("{split}", split)
    path = Path(file_path(named)).expanduser()
    if path.is_file():
        return _open_file(path)
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        return datasets.load_from_disk(str(path))
    match = HUB_NAME.fullmatch(named)
    if not path.is_dir() and match is None:
        raise FileNotFoundError(f"{path}: no such file or folder, and no name of a data set on the Hub (owner/name).")
    try:
        if path.is_dir():
            return datasets.load_dataset(str(path))
        return datasets.load_dataset(match["name"], revision=match["revision"])
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        kind = FileNotFoundError if isinstance(error, (OSError, HfHubHTTPError)) else ValueError
        raise kind(
            f"{named}: `datasets.load_dataset` can't read it ({type(error).__name__}: {str(error).splitlines()[0]}). Check the "
            f"name, the network and, for a gated data set, your login (hf auth login)."
        ) from error


def _open_file(path: Path) -> datasets.Dataset:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        with open_csv(path) as rows:
            return datasets.Dataset.from_list(list(rows), features=_strings(rows.fieldnames))
    if kind == ".parquet":
        return datasets.Dataset.from_parquet(str(path))
    if kind in (".json", ".jsonl"):
        return datasets.Dataset.from_list(_json_rows(path))
    raise ValueError(f"{path}: expected a .csv, .tsv, .json, .jsonl or .parquet file, or a folder.")


def _strings(names: Sequence[str] | None) -> datasets.Features:
    return datasets.Features({name: datasets.Value("string") for name in names or ()})


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """A JSON array of objects, or an object a line."""
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}). Expected an array of objects, or one object a line."
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected an array of objects, or one object a line; found other values.")
    return rows


def _part(loaded: datasets.DatasetDict, spec: str, source: str | Path) -> datasets.Dataset:
    """A split, or a part of one, by the notation of `load_dataset`."""
    try:
        lengths = {name: len(table) for name, table in loaded.items()}
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(
            f"{source}: no split {spec!r}; it has {', '.join(loaded)}. Expected one of them, or a part such as train[90%:]."
        ) from error
    tables = [
        loaded[part.splitname].select(range(part.from_ or 0, lengths[part.splitname] if part.to is None else part.to))
        for part in parts
    ]
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


# ---- volumes -----------------------------------------------------------------------------------------------------------


class Volumes:
    """Where a table's volumes lie."""

    def __init__(self, source: str | Path, image_root: str | Path | None):
        path = Path(file_path(str(source))).expanduser().absolute()
        match = HUB_NAME.fullmatch(str(source))
        self.root = path if path.is_dir() else path.parent
        self.address = None
        if image_root is not None:
            self.root = Path(image_root).expanduser().absolute()
        elif match is not None and not path.exists():
            at = f"@{match['revision']}" if match["revision"] else ""
            self.address = f"hf://datasets/{match['name']}{at}"

    def locate(self, name: str) -> str:
        """Return the path or address of a volume by its name in the table."""
        name = file_path(name)
        if is_address(name) or os.path.isabs(name):
            return name
        return f"{self.address}/{name}" if self.address else os.path.normpath(self.root / name)


def volume_name(value: Any, folder: Path, number: int) -> str | None:
    """Return the path or address of a row's volume; None where it has none.

    Args:
        value: a string, or what a `Nifti` column holds undecoded: {"path": …, "bytes": …}.
        folder: gets the file that a row holds itself.
        number: the row's.
    """
    if value is None or isinstance(value, str):
        return value or None
    if not isinstance(value, dict) or not {"path", "bytes"} & value.keys():
        raise ValueError(
            f"row {number}: a volume of type {type(value).__name__}; expected a path, an address or a Nifti column."
        )
    path, data = value.get("path"), value.get("bytes")
    if data is None and path and "::" not in path:
        return path
    if data is None and path:  # within an archive
        with xopen(path, "rb") as stream:
            data = stream.read()
    if not data:
        return None
    target = folder / f"{number:07d}{'.nii.gz' if data.startswith(_GZIP) else '.nii'}"
    if not (target.is_file() and target.stat().st_size == len(data)):
        atomic_write(target, data)
    return str(target)
