"""The SAMF paper's own CSVs as Datasets of records."""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import datasets

from samf.data.addresses import join_address
from samf.data.ct_rate.names import VolumeName, volume_path
from samf.data.ct_rate.tables import read_rows
from samf.data.load_stats import LoadStats
from samf.data.missing_volumes import check_volumes
from samf.data.options import check_choice, check_on_missing
from samf.data.patients import PATIENT_COLUMN
from samf.data.prompts import REPORT_QUESTION
from samf.data.record_cache import in_memory
from samf.data.records import FEATURES, RecordBuilder, VolumeChoice
from samf.data.schema import TASKS, Record
from samf.data.texts import NO_OPTION, given, settle_answer, squeeze
from samf.model.ct_download import file_path, is_address

_CHOICES = tuple(f"Choice {letter}" for letter in "ABCD")
_QUESTION_COLUMNS = ("Question ID", "Image", "Question", *_CHOICES, "Answer Choice", "Answer")


def load_samf_csv(
    report_csv: str | Path | None,
    mcq_csv: str | Path | None,
    image_root: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    on_missing: str = "raise",
    patient_column: str | None = None,
    counts_file: str | Path | None = None,
) -> datasets.Dataset:
    """Load the SAMF paper's own CSVs as a Dataset of records.

    Args:
        report_csv: a CSV with the columns image and caption, or None.
        mcq_csv: a CSV with the columns Question ID, Image, Question, Choice A to D, Answer Choice and Answer, or None.
        image_root: the folder from which the images' paths start. Where an image isn't there, CT-RATE's v2 and v1 folders
            below it are tried. Or the folder's address: then nothing is tried.
        tasks: some of ("report", "multiple_choice"); None takes both.
        on_missing: as for `load_ct_rate`.
        patient_column: the column of patients; None takes `patient_id` where there is one.
        counts_file: as for `load_ct_rate`.

    Raises:
        FileNotFoundError: volumes are missing.
        ValueError: an unknown option, or a CSV without a column that it needs.
    """
    on_missing = check_on_missing(on_missing)
    if tasks is not None:
        check_choice("tasks", tasks, TASKS)
    load_stats = LoadStats()
    locate = partial(_locate, _root(image_root))
    builder = RecordBuilder(VolumeChoice(locate, load_stats), load_stats, tasks or ("report", "multiple_choice"))

    def records() -> Iterator[Record]:
        if report_csv is not None:
            yield from _report_records(builder, Path(report_csv), patient_column)
        if mcq_csv is not None:
            yield from _choice_records(builder, Path(mcq_csv), patient_column)

    dataset = check_volumes(in_memory(records(), FEATURES), on_missing, load_stats)
    source = " and ".join(str(path) for path in (report_csv, mcq_csv) if path is not None)
    load_stats.log(source)
    if counts_file is not None:
        load_stats.save(counts_file, source=source)
    return dataset


def _root(image_root: str | Path) -> Path | str:
    """Return an absolute path, or an address."""
    return str(image_root) if is_address(str(image_root)) else Path(image_root).expanduser().absolute()


def _locate(root: Path | str, name: str) -> str:
    """Return the path of an image below `root`, or in CT-RATE's folders there; addresses stay."""
    name = file_path(name)
    if is_address(name):
        return name
    if isinstance(root, str):
        return name if os.path.isabs(name) else join_address(root, name)
    places = [root / name]
    if VolumeName.find(name):
        places += [volume_path(root, name, "v2"), volume_path(root, name, "v1")]
    return str(next((path for path in places if path.exists()), places[0]))


def _report_records(builder: RecordBuilder, path: Path, patient_column: str | None) -> Iterator[Record]:
    for row in read_rows(path, ("image", "caption", *filter(None, [patient_column]))):
        patient = _patient(row, patient_column)
        if record := builder.report(row["image"], REPORT_QUESTION, given(row["caption"]), patient):
            yield record


def _choice_records(builder: RecordBuilder, path: Path, patient_column: str | None) -> Iterator[Record]:
    for row in read_rows(path, (*_QUESTION_COLUMNS, *filter(None, [patient_column]))):
        choices = [text for column in _CHOICES if (text := squeeze(row[column]))]
        letter, answer = row["Answer Choice"].strip().strip("()"), squeeze(row["Answer"])
        settled = settle_answer(f"({letter}) {answer}" if letter else answer, choices)
        if settled is None or len(choices) < 2:
            builder.load_stats.drop(NO_OPTION, row["Question ID"])
            continue
        question = squeeze(row["Question"])
        record = builder.record(
            row["Image"],
            row["Question ID"],
            {"task": "multiple_choice", "question": question, "choices": choices, "answer": settled},
            _patient(row, patient_column),
        )
        if record:
            yield record


def _patient(row: Mapping[str, str], column: str | None) -> str | None:
    """Return the patient of a row: by the named column, or one called patient_id."""
    return (row.get(column or PATIENT_COLUMN) or "").strip() or None
