"""A record is one question and answer about one volume; here the rows of tables become records.

A row of the `datasets.Dataset`: `volume` (absolute path or address, None for text alone), `task` (report,
multiple_choice, short_answer or long_answer), `question`, `choices` (option texts, else None), `answer`, `id` (unique),
`scan_id`, `patient_id` (None where the table and CT-RATE's names don't tell; see `samf.data.patients`) and
`finding_labels` (-100 where unknown; empty without a label file). A multiple-choice answer reads "(b) text of option b".
Records of v1 volumes also carry `rescale`, for `read_ct`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from samf.data.ct_rate.names import VolumeName, volume_stem
from samf.data.ct_rate.questions import NO_OPTION, settle_answer, vqa_turns
from samf.data.ct_rate.tables import (
    VOLUME_COLUMN,
    given,
    read_json_array,
    read_rows,
    row_volume,
    squeeze,
)
from samf.data.load_stats import LoadStats
from samf.data.patients import PATIENT_COLUMN
from samf.data.prompts import REPORT_QUESTION

#: Columns of the reports CSV that `report_sections` names.
SECTIONS = {
    "findings": "Findings_EN",
    "impression": "Impressions_EN",
    "clinical_information": "ClinicalInformation_EN",
}

FEATURES = datasets.Features(
    {
        "volume": datasets.Value("string"),
        "task": datasets.Value("string"),
        "question": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("string"),
        "id": datasets.Value("string"),
        "scan_id": datasets.Value("string"),
        "patient_id": datasets.Value("string"),
        "finding_labels": datasets.List(datasets.Value("int8")),
    }
)
RESCALED_FEATURES = datasets.Features({**FEATURES, "rescale": datasets.List(datasets.Value("float64"))})


class UniqueIds:
    """Makes repeated ids unique: x, x#2, x#3, … in order of appearance."""

    def __init__(self):
        self.counts: Counter[str] = Counter()

    def __call__(self, name: str) -> str:
        name = name.replace("#", "_")
        self.counts[name] += 1
        return name if self.counts[name] == 1 else f"{name}#{self.counts[name]}"


def report_texts(row: dict[str, str], sections: Sequence[str]) -> tuple[str, str]:
    """Question and answer of a report row; an empty answer where the text that leads it is missing."""
    texts = {name: given(row[SECTIONS[name]]) for name in sections}
    context = texts.pop("clinical_information", "")
    question = f"Clinical information: {context} {REPORT_QUESTION}" if context else REPORT_QUESTION
    leading = next(iter(texts.values()))
    if not leading or len(texts) == 1:
        return question, leading
    return question, "\n".join(f"{name.capitalize()}: {text}" for name, text in texts.items() if text)


class VolumeChoice:
    """Decides of each volume whether it is used, and where it lies. Doesn't look whether it is there.

    Args:
        locate: volume name → path or address.
        load_stats: counts what isn't used.
        excluded: {volume: why} of those that are left out.
        reconstructions: {scan_id: the number that is used}; None keeps all. Of a scan that isn't in it, the first that
            is met.
    """

    def __init__(
        self,
        locate: Callable[[str], str],
        load_stats: LoadStats,
        *,
        excluded: Mapping[VolumeName, str] | None = None,
        reconstructions: dict[str, int] | None = None,
    ):
        self.locate, self.load_stats, self.excluded = locate, load_stats, excluded or {}
        self.reconstructions = reconstructions
        self._paths: dict[str, str] = {}  # by name

    def path(self, name: str, volume: VolumeName | None) -> str | None:
        """The path of a volume whose record is to be used, else None with the reason counted."""
        if volume is not None and (reason := self._reason_to_leave_out(volume)):
            self.load_stats.drop(reason, name)
            return None
        if name not in self._paths:
            self._paths[name] = self.locate(name)
        return self._paths[name]

    def _reason_to_leave_out(self, volume: VolumeName) -> str | None:
        if volume in self.excluded:
            return self.excluded[volume]
        if self.reconstructions is None:
            return None
        used = self.reconstructions.setdefault(volume.scan_id, volume.reconstruction)
        return None if used == volume.reconstruction else "another reconstruction of the scan is used"


class RecordReader:
    """Turns tables into records, and counts them.

    Args:
        volumes: which are used.
        tasks: of TASKS; others are left out without being counted.
        labels: {volume: finding labels}; None = records carry none.
        rescale: {volume: what `read_ct` takes as its rescale}; None = the volumes hold HU.
        unknown: the labels of a volume that `labels` lacks.
    """

    def __init__(
        self,
        volumes: VolumeChoice,
        load_stats: LoadStats,
        tasks: Collection[str],
        *,
        labels: Mapping[VolumeName, list[int]] | None = None,
        rescale: Mapping[VolumeName, list[float]] | None = None,
        unknown: Sequence[int] = (),
    ):
        self.volumes, self.load_stats, self.tasks = volumes, load_stats, tasks
        self.labels, self.rescale, self.unknown = labels, rescale, unknown
        self.unique = UniqueIds()

    def record(
        self, name: str | None, record_id: str, patient: str | None = None, **content: Any
    ) -> dict[str, Any] | None:
        """A complete record, or None where its volume isn't used. `patient`: by the table; None = by CT-RATE's names."""
        record_id = self.unique(record_id)  # before anything is left out, so that ids don't depend on the choice
        if content["task"] not in self.tasks:
            return None
        volume = VolumeName.find(name) if name else None
        path = self.volumes.path(name, volume) if name else None
        if name and path is None:
            return None
        scan_id = volume.scan_id if volume else (name or record_id)
        patient = patient or (volume.patient_id if volume else None)
        record = {
            "volume": path,
            "id": record_id,
            "scan_id": scan_id,
            "patient_id": patient,
            "choices": None,
            **content,
        }
        record["finding_labels"] = [] if self.labels is None else self.labels.get(volume, self.unknown)
        if self.rescale is not None:
            record["rescale"] = self.rescale.get(volume)
            if name and record["rescale"] is None:
                self.load_stats.drop("v1 volume without slope and intercept in the metadata", name)
                return None
        self.load_stats.kept[content["task"]] += 1
        return record

    def reports(self, path: Path, sections: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Records of a CT-RATE reports CSV."""
        for row in read_rows(path, (VOLUME_COLUMN, *(SECTIONS[name] for name in sections))):
            name = str(row_volume(row, path))
            if record := self.report(name, *report_texts(row, sections)):
                yield record

    def report(self, name: str, question: str, answer: str, patient: str | None = None) -> dict[str, Any] | None:
        """A report's record; None, counted, where there is no text."""
        if not answer:
            self.load_stats.drop("report without text", name)
            return None
        record_id = f"report_{volume_stem(name)}"
        return self.record(name, record_id, patient, task="report", question=question, answer=answer)

    def vqa(self, path: Path, skip_reports: bool) -> Iterator[dict[str, Any]]:
        """Records of a CT-RATE VQA JSON, one for each exchange."""
        for entry in read_json_array(path):
            name, entry_id = entry.get("image") or None, str(entry.get("id", "vqa"))
            if name is not None and not isinstance(name, str):
                self.load_stats.drop("image that is no file name", entry_id)
                continue
            for turn in vqa_turns(entry, self.load_stats):
                if skip_reports and turn["task"] == "report":
                    continue
                if record := self.record(name, entry_id, **turn):
                    yield record

    def captions(self, path: Path, patient_column: str | None = None) -> Iterator[dict[str, Any]]:
        """Records of the paper's report CSV, which may have a column of patients."""
        for row in read_rows(path, ("image", "caption", *filter(None, [patient_column]))):
            patient = _patient(row, patient_column)
            if record := self.report(row["image"], REPORT_QUESTION, given(row["caption"]), patient):
                yield record

    def choices(self, path: Path, patient_column: str | None = None) -> Iterator[dict[str, Any]]:
        """Records of the paper's multiple-choice CSV, which may have a column of patients."""
        columns = [f"Choice {letter}" for letter in "ABCD"]
        needed = ("Question ID", "Image", "Question", *columns, "Answer Choice", "Answer")
        for row in read_rows(path, (*needed, *filter(None, [patient_column]))):
            choices = [text for column in columns if (text := squeeze(row[column]))]
            letter = row["Answer Choice"].strip().strip("()")
            answer = settle_answer(
                f"({letter}) {squeeze(row['Answer'])}" if letter else squeeze(row["Answer"]), choices
            )
            if answer is None or len(choices) < 2:
                self.load_stats.drop(NO_OPTION, row["Question ID"])
                continue
            content = {"question": squeeze(row["Question"]), "choices": choices, "answer": answer}
            patient = _patient(row, patient_column)
            if record := self.record(row["Image"], row["Question ID"], patient, task="multiple_choice", **content):
                yield record


def _patient(row: Mapping[str, str], column: str | None) -> str | None:
    """A row's patient, by the column that is named, or one called patient_id."""
    return (row.get(column or PATIENT_COLUMN) or "").strip() or None
