"""CT-RATE, and the SAMF paper's own CSVs, as records: one question and answer about one volume.

A record is a row of a `datasets.Dataset`: `volume` (absolute path, or None for text alone), `task` (report,
multiple_choice, short_answer or long_answer), `question`, `choices` (option texts, else None), `answer`, `id` (unique),
`scan_id` and `finding_labels` (-100 where unknown; empty without a label file). A multiple-choice answer reads
"(b) text of option b". Records from v1 folders also carry `rescale`: see `load_ct_rate`.

CT-RATE: https://huggingface.co/datasets/ibrahimhamamci/CT-RATE
"""

import csv
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from samf.data.prompts import LETTERS, REPORT_QUESTION

logger = logging.getLogger(__name__)

TASKS = ("report", "multiple_choice", "short_answer", "long_answer")

#: The 18 label columns of CT-RATE's multi_abnormality_labels, in its order.
CT_RATE_LABELS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)

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
        "finding_labels": datasets.List(datasets.Value("int8")),
    }
)
RESCALE_FEATURE = datasets.List(datasets.Value("float64"))

UNKNOWN_LABEL = -100
ROWS_A_CHUNK = 20_000
LISTED_FILES = 10
LONGEST_JSON_RECORD = 1 << 26  # characters
VOLUME_COLUMN = ("VolumeName", "AccessionNo")

TAG = re.compile(r"<(long_answer|short_answer|multiple_choice|report_generation)>")
OPTION = re.compile(r"\(([a-z])\)\s*")
VOLUME_NAME = re.compile(
    r"(?P<split>[a-z]+)_(?P<patient>\d+)_(?P<scan>[a-z]+)_(?P<reconstruction>\d+)(?:\.nii(?:\.gz)?)?"
)


# ---- names and paths -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class VolumeName:
    """CT-RATE's name of a volume: `valid_53_a_1.nii.gz` is reconstruction 1 of scan a of patient 53."""

    split: str
    patient: int
    scan: str
    reconstruction: int

    @classmethod
    @lru_cache(maxsize=1 << 16)
    def parse(cls, name: str) -> "VolumeName":
        """Read a name with or without folders and suffix. Raises ValueError for anything else."""
        match = VOLUME_NAME.fullmatch(name.strip().replace("\\", "/").rsplit("/", 1)[-1])
        if match is None:
            raise ValueError(f"{name!r} is not a CT-RATE volume name; expected one like valid_53_a_1.nii.gz.")
        return cls(match["split"], int(match["patient"]), match["scan"], int(match["reconstruction"]))

    @classmethod
    def find(cls, name: str) -> "VolumeName | None":
        """As `parse`, None for any other name."""
        try:
            return cls.parse(name)
        except ValueError:
            return None

    @property
    def patient_id(self) -> str:
        return f"{self.split}_{self.patient}"

    @property
    def scan_id(self) -> str:
        return f"{self.split}_{self.patient}_{self.scan}"

    def __str__(self) -> str:
        return f"{self.scan_id}_{self.reconstruction}.nii.gz"


def volume_path(root: str | Path, name: str, layout: str = "v2") -> Path:
    """Where a volume lies: v2 `root/valid_fixed/valid_53/valid_53_a/valid_53_a_1.nii.gz`, v1 the same below `valid`.

    Args:
        root: the data set's folder.
        name: the volume's name, flat or with folders, which are ignored.
        layout: "v1" or "v2".
    """
    volume = VolumeName.parse(name)
    folder = {"v1": volume.split, "v2": f"{volume.split}_fixed"}[layout]
    return Path(root) / folder / volume.patient_id / volume.scan_id / str(volume)


class CtRateFolder:
    """Where the files of one split lie.

    Args:
        root: CT-RATE's folder, with or without its `dataset` level.
        split: "train", "valid" or "validation".
        layout: "v1", "v2", or None to take what is there, v2 first.

    Raises:
        FileNotFoundError: there is neither a volume folder of the split nor one of the tables.
        ValueError: an unknown split or layout.
    """

    def __init__(self, root: str | Path, split: str, layout: str | None = None):
        split = {"validation": "valid"}.get(split, split)
        if split not in ("train", "valid") or layout not in (None, "v1", "v2"):
            raise ValueError(
                f"split={split!r}, layout={layout!r}; expected 'train' or 'valid', and 'v1', 'v2' or None."
            )
        self.split = split
        self.root = self._find_root(Path(root).expanduser().absolute(), split)
        present = [name for name, folder in self._volume_folders(self.root, split).items() if folder.is_dir()]
        self.layout = layout or ("v1" if present == ["v1"] else "v2")
        if layout is None and len(present) == 2:
            logger.info(
                "%s holds v1 and v2 volumes of %s; reading v2 (layout='v1' reads the others).", self.root, split
            )

    @staticmethod
    def _volume_folders(root: Path, split: str) -> dict[str, Path]:
        return {"v1": root / split, "v2": root / f"{split}_fixed"}

    @classmethod
    def _find_root(cls, root: Path, split: str) -> Path:
        for candidate in (root, root / "dataset"):
            folders = (*cls._volume_folders(candidate, split).values(), candidate / "radiology_text_reports")
            if any(folder.is_dir() for folder in folders):
                return candidate
        raise FileNotFoundError(
            f"0 volumes under {root}: expected CT-RATE's layout, {root}[/dataset]/{split}_fixed/{split}_1/{split}_1_a/"
            f"{split}_1_a_1.nii.gz (v2) or the same below {split}/ (v1), beside radiology_text_reports/ and vqa/."
        )

    def table(self, folder: str, ending: str) -> Path | None:
        """`folder`/{split}_{ending}, the split spelled as that file does (valid or validation); None where absent."""
        stems = ("train",) if self.split == "train" else ("valid", "validation")
        paths = [self.root / folder / f"{stem}_{ending}" for stem in stems]
        return next((path for path in paths if path.is_file()), None)

    @property
    def reports(self) -> Path | None:
        return self.table("radiology_text_reports", "reports.csv")

    @property
    def metadata(self) -> Path | None:
        return self.table("metadata", "metadata.csv")

    @property
    def labels(self) -> Path | None:
        return self.table("multi_abnormality_labels", "predicted_labels.csv")

    @property
    def vqa(self) -> Path | None:
        return self.table("vqa", "vqa.json")

    @property
    def no_chest(self) -> Path | None:
        path = self.root / "metadata" / f"no_chest_{self.split}.txt"
        return path if path.is_file() else None

    def locate(self, name: str) -> Path:
        """A volume's path (`volume_path`); a name that isn't CT-RATE's is taken as a path below the root."""
        return volume_path(self.root, name, self.layout) if VolumeName.find(name) else self.root / name

    def find_vqa(self, name: str | Path) -> Path:
        """A VQA file given by path, or by its name below the data set."""
        places = [Path(name), self.root / name, self.root / "vqa" / name]
        for path in places:
            if path.is_file():
                return path
        raise FileNotFoundError(f"VQA file {name} not found; looked for {', '.join(map(str, places))}.")


# ---- counting ------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """How many records were read, and how many were left out for which reason."""

    kept: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, what: str) -> None:
        self.dropped[reason] += 1
        self.examples.setdefault(reason, what)

    def log(self, source: str) -> None:
        logger.info("%s: %d records (%s)", source, sum(self.kept.values()), dict(self.kept))
        for reason, count in self.dropped.most_common():
            logger.warning("%s: %d left out: %s (first: %s)", source, count, reason, self.examples[reason])


class Volumes:
    """Decides of each volume whether it is used, and where it lies; remembers the answer and what is missing.

    Args:
        locate: volume name → path.
        excluded: {volume: why} of those that are left out.
        firsts: {scan_id: its first reconstruction's number}; None keeps all reconstructions.
        on_missing: "error", "skip" or "keep" (don't look).
    """

    def __init__(
        self,
        locate: Callable[[str], Path],
        tally: Tally,
        *,
        excluded: Mapping[VolumeName, str] | None = None,
        firsts: dict[str, int] | None = None,
        on_missing: str = "error",
    ):
        if on_missing not in ("error", "skip", "keep"):
            raise ValueError(f"on_missing={on_missing!r}; expected 'error', 'skip' or 'keep'.")
        self.locate, self.tally, self.excluded, self.firsts = locate, tally, excluded or {}, firsts
        self.on_missing = on_missing
        self._paths: dict[str, str] = {}  # by name
        self._found: dict[str, bool] = {}  # by path

    def path(self, name: str) -> str | None:
        """The path of a volume whose record is to be used, else None with the reason counted."""
        volume = VolumeName.find(name)
        if reason := self._reason_to_leave_out(volume):
            self.tally.drop(reason, name)
            return None
        if name not in self._paths:
            self._paths[name] = str(self.locate(name))
        path = self._paths[name]  # one volume may have several names, flat and with folders
        if path not in self._found:
            self._found[path] = self.on_missing == "keep" or Path(path).is_file()
        if not self._found[path]:
            self.tally.drop("volume file missing", name)
        return path if self._found[path] else None

    def _reason_to_leave_out(self, volume: VolumeName | None) -> str | None:
        if volume is None:
            return None
        if volume in self.excluded:
            return self.excluded[volume]
        if self.firsts is None:
            return None
        first = self.firsts.setdefault(volume.scan_id, volume.reconstruction)
        return None if first == volume.reconstruction else "another reconstruction of the scan is used"

    def check(self) -> None:
        """Raise FileNotFoundError that lists missing files, unless they are to be skipped."""
        missing = [path for path, found in self._found.items() if not found]
        if missing and self.on_missing == "error":
            listed = "\n  ".join(missing[:LISTED_FILES])
            more = f"\n  and {len(missing) - LISTED_FILES} more" if len(missing) > LISTED_FILES else ""
            raise FileNotFoundError(
                f"{len(missing)} of {len(self._found)} volumes that the records name are missing:\n  {listed}{more}\n"
                f"Complete the download, or pass on_missing='skip' to go without them."
            )


# ---- reading files -------------------------------------------------------------------------------------------------


def read_rows(path: Path, required: Iterable[str | tuple[str, ...]] = ()) -> Iterator[dict[str, str]]:
    """Rows of a CSV. Each of `required` is a column, or alternatives of which one must be there.

    Raises:
        ValueError: a required column is absent; names those found.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        for names in required:
            alternatives = (names,) if isinstance(names, str) else names
            if not set(alternatives) & set(columns):
                raise ValueError(f"{path}: no column {' or '.join(alternatives)}; its columns are {columns}.")
        yield from reader


def row_volume(row: dict[str, str], path: Path) -> VolumeName:
    """A row's volume; the column has had two names. Raises ValueError that names the file."""
    try:
        return VolumeName.parse(row.get("VolumeName") or row.get("AccessionNo") or "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json_array(path: Path, chunk: int = 1 << 20) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file that holds one array, without reading it whole (CT-RATE's has a gigabyte).

    Raises:
        ValueError: not an array of objects, or broken; names the file and the record.
    """
    decoder, count = json.JSONDecoder(), 0
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(chunk).lstrip()
        if not text.startswith("["):
            raise ValueError(f"{path}: starts with {text[:20]!r}; expected a JSON array of VQA records.")
        position, at_end = 1, False
        while True:
            while position < len(text) and text[position] in " \t\r\n,":
                position += 1
            if text.startswith("]", position):
                return
            try:
                record, position = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                if at_end or len(text) - position > LONGEST_JSON_RECORD:
                    raise ValueError(f"{path}: record {count} is broken or cut off ({error}).") from error
                more = file.read(chunk)
                text, position, at_end = text[position:] + more, 0, not more
                continue
            if not isinstance(record, dict):
                raise ValueError(f"{path}: record {count} is {type(record).__name__}; expected an object.")
            yield record
            count += 1


def squeeze(text: str | None) -> str:
    """Text with single spaces and without CT-RATE's tags."""
    return " ".join(TAG.sub(" ", text or "").split())


def given(text: str | None) -> str:
    """A table's text, "" for what CT-RATE writes where there is none: "Not given.", nan, nothing."""
    text = squeeze(text)
    return "" if text.lower().rstrip(".") in ("", "not given", "nan") else text


def read_labels(path: Path | None, finding_names: Sequence[str]) -> dict[VolumeName, list[int]] | None:
    """{volume: labels in the order of `finding_names`}; None where nothing is asked or there is no file.

    Raises:
        ValueError: a name is not a column of the file.
    """
    if not finding_names:
        return None
    if path is None:
        logger.warning("No label file: records carry no labels of %s.", ", ".join(finding_names))
        return None
    labels = {}
    for row in read_rows(path, (VOLUME_COLUMN, *finding_names)):
        values = [given(row[name]) for name in finding_names]
        labels[row_volume(row, path)] = [int(float(value)) if value else UNKNOWN_LABEL for value in values]
    return labels


def read_rescale(path: Path | None) -> dict[VolumeName, list[float]]:
    """{volume: [slope, intercept]} from a metadata CSV; volumes without finite numbers are left out."""
    if path is None:
        raise FileNotFoundError(
            "Volumes of v1 hold raw stored values, and metadata/*_metadata.csv with their slope and intercept is missing. "
            "Download it, or use the v2 volumes (train_fixed, valid_fixed), which hold HU."
        )
    rescale = {}
    for row in read_rows(path, (VOLUME_COLUMN, "RescaleSlope", "RescaleIntercept")):
        pair = [float(given(row[name]) or "nan") for name in ("RescaleSlope", "RescaleIntercept")]
        if all(math.isfinite(value) for value in pair):
            rescale[row_volume(row, path)] = pair
    return rescale


def read_no_chest(path: Path | None) -> dict[VolumeName, str]:
    """{volume: reason} of the scans that CT-RATE lists as not of the chest."""
    if path is None:
        return {}
    lines = [line.strip().strip(",") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    volumes = {line: VolumeName.find(line) for line in lines if line}
    if unread := [line for line, volume in volumes.items() if volume is None]:
        logger.warning("%s: %d lines are no volume names (first: %r).", path, len(unread), unread[0])
    return {volume: f"listed in {path.name}" for volume in volumes.values() if volume is not None}


def first_reconstructions(folder: CtRateFolder, excluded: Collection[VolumeName]) -> dict[str, int]:
    """{scan_id: lowest reconstruction number}, from the first table that lists the volumes."""
    table = folder.reports or folder.metadata or folder.labels
    firsts: dict[str, int] = {}
    for row in read_rows(table, [VOLUME_COLUMN]) if table else ():
        volume = row_volume(row, table)
        if volume not in excluded:
            firsts[volume.scan_id] = min(firsts.get(volume.scan_id, volume.reconstruction), volume.reconstruction)
    return firsts


# ---- records -------------------------------------------------------------------------------------------------------


class UniqueIds:
    """Makes repeated ids unique: x, x#2, x#3, … in order of appearance."""

    def __init__(self):
        self.counts: Counter[str] = Counter()

    def __call__(self, name: str) -> str:
        name = name.replace("#", "_")
        self.counts[name] += 1
        return name if self.counts[name] == 1 else f"{name}#{self.counts[name]}"


def split_options(text: str) -> tuple[str, list[str]]:
    """ "Which one? (a) this (b) that" → ("Which one?", ["this", "that"]). No options, no split."""
    marks = list(OPTION.finditer(text))
    # The last "(a)" that is followed by "(b)", "(c)", … in order; other bracketed letters belong to the text.
    for start in reversed([k for k, mark in enumerate(marks) if mark[1] == "a"]):
        run = [marks[start]]
        for mark in marks[start + 1 :]:
            if len(run) < len(LETTERS) and mark[1] == LETTERS[len(run)]:
                run.append(mark)
        if len(run) > 1:
            ends = [mark.start() for mark in run[1:]] + [len(text)]
            return text[: run[0].start()].strip(), [
                text[m.end() : end].strip() for m, end in zip(run, ends, strict=True)
            ]
    return text, []


def settle_answer(answer: str, choices: Sequence[str]) -> str | None:
    """The answer as "(b) text of option b"; None where it names no option, or a letter and another option's text."""
    mark = re.match(r"\(?([a-zA-Z])\)\s*(.*)|\(?([a-zA-Z])\)?\.?$", answer.strip(), re.DOTALL)
    letter = (mark[1] or mark[3]).lower() if mark else None
    text = normal(mark[2] or "") if mark else normal(answer)
    by_text = [k for k, choice in enumerate(choices) if normal(choice) == text] if text else []
    by_letter = LETTERS.find(letter) if letter else -1
    if 0 <= by_letter < len(choices):
        if by_text and by_letter not in by_text:
            return None
        return f"({letter}) {choices[by_letter]}"
    return f"({LETTERS[by_text[0]]}) {choices[by_text[0]]}" if len(by_text) == 1 else None


def volume_stem(name: str) -> str:
    """A volume's file name without folders and suffix."""
    return re.sub(r"\.nii(\.gz)?$", "", name.rsplit("/", 1)[-1])


def normal(text: str) -> str:
    """Text for comparison: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(". ")


def turn_task(turn: dict[str, Any], record_id: str) -> str | None:
    """The task of a human turn: its tag, else its `type`, else what the record's id begins with."""
    tags = TAG.findall(turn.get("value") or "")
    kind = tags[-1] if tags else str(turn.get("type") or "").strip("<>")
    kinds = {"report_generation": "report", **{task: task for task in TASKS}}
    if kind not in kinds:
        kind = re.sub(r"_?\d+$", "", record_id)
    return kinds.get(kind)


def vqa_turns(record: dict[str, Any], tally: Tally) -> Iterator[dict[str, Any]]:
    """The exchanges of one VQA record as task, question, choices and answer; unusable ones are counted and dropped."""
    record_id, conversation = str(record.get("id", "vqa")), record.get("conversations") or []
    for k, turn in enumerate(conversation):
        if turn.get("from") != "human":
            continue
        reply = conversation[k + 1] if k + 1 < len(conversation) else {}
        task = turn_task(turn, record_id)
        question = squeeze((turn.get("value") or "").replace("<image>", " "))
        answer = squeeze(reply.get("value")) if reply.get("from") in ("gpt", "assistant") else ""
        if task is None or not answer or not (question or task == "report"):
            tally.drop("no task tag" if task is None else "no question or no answer", record_id)
            continue
        choices = None
        if task == "multiple_choice":
            question, choices = split_options(question)
            answer = settle_answer(answer, choices)
            if answer is None or not choices:
                tally.drop("multiple choice without options, or an answer that is none of them", record_id)
                continue
        yield {"task": task, "question": question, "choices": choices, "answer": answer}


def report_texts(row: dict[str, str], sections: Sequence[str]) -> tuple[str, str]:
    """Question and answer of a report row; an empty answer where the text that leads it is missing."""
    texts = {name: given(row[SECTIONS[name]]) for name in sections}
    context = texts.pop("clinical_information", "")
    question = f"Clinical information: {context} {REPORT_QUESTION}" if context else REPORT_QUESTION
    leading = next(iter(texts.values()))
    if not leading or len(texts) == 1:
        return question, leading
    return question, "\n".join(f"{name.capitalize()}: {text}" for name, text in texts.items() if text)


class RecordReader:
    """Turns the tables of one split into records; see `load_ct_rate` for the arguments."""

    def __init__(self, volumes: Volumes, tally: Tally, tasks: Collection[str], finding_names: Sequence[str] = ()):
        self.volumes, self.tally, self.tasks = volumes, tally, tasks
        self.labels: dict[VolumeName, list[int]] | None = None
        self.rescale: dict[VolumeName, list[float]] | None = None
        self.unknown = [UNKNOWN_LABEL] * len(finding_names)
        self.unique = UniqueIds()

    def record(self, name: str | None, record_id: str, **content: Any) -> dict[str, Any] | None:
        """A complete record, or None where its volume isn't used."""
        record_id = self.unique(record_id)  # before anything is left out, so that ids don't depend on the choice
        if content["task"] not in self.tasks:
            return None
        path = self.volumes.path(name) if name else None
        if name and path is None:
            return None
        volume = VolumeName.find(name) if name else None
        scan_id = volume.scan_id if volume else (name or record_id)
        record = {"volume": path, "id": record_id, "scan_id": scan_id, "choices": None, **content}
        record["finding_labels"] = [] if self.labels is None else self.labels.get(volume, self.unknown)
        if self.rescale is not None:
            record["rescale"] = self.rescale.get(volume)
            if name and record["rescale"] is None:
                self.tally.drop("v1 volume without slope and intercept in the metadata", name)
                return None
        self.tally.kept[content["task"]] += 1
        return record

    def reports(self, path: Path, sections: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Records of a CT-RATE reports CSV."""
        for row in read_rows(path, (VOLUME_COLUMN, *(SECTIONS[name] for name in sections))):
            name = str(row_volume(row, path))
            if record := self.report(name, *report_texts(row, sections)):
                yield record

    def report(self, name: str, question: str, answer: str) -> dict[str, Any] | None:
        """A report's record; None, counted, where there is no text."""
        if not answer:
            self.tally.drop("report without text", name)
            return None
        record_id = f"report_{volume_stem(name)}"
        return self.record(name, record_id, task="report", question=question, answer=answer)

    def vqa(self, path: Path, skip_reports: bool) -> Iterator[dict[str, Any]]:
        """Records of a CT-RATE VQA JSON, one for each exchange."""
        for entry in read_json_array(path):
            for turn in vqa_turns(entry, self.tally):
                if skip_reports and turn["task"] == "report":
                    continue
                if record := self.record(entry.get("image") or None, str(entry.get("id", "vqa")), **turn):
                    yield record

    def captions(self, path: Path) -> Iterator[dict[str, Any]]:
        """Records of the paper's report CSV."""
        for row in read_rows(path, ("image", "caption")):
            if record := self.report(row["image"], REPORT_QUESTION, given(row["caption"])):
                yield record

    def choices(self, path: Path) -> Iterator[dict[str, Any]]:
        """Records of the paper's multiple-choice CSV."""
        columns = [f"Choice {letter}" for letter in "ABCD"]
        for row in read_rows(path, ("Question ID", "Image", "Question", *columns, "Answer Choice", "Answer")):
            choices = [text for column in columns if (text := squeeze(row[column]))]
            letter = row["Answer Choice"].strip().strip("()")
            answer = settle_answer(
                f"({letter}) {squeeze(row['Answer'])}" if letter else squeeze(row["Answer"]), choices
            )
            if answer is None or len(choices) < 2:
                self.tally.drop(
                    "multiple choice without options, or an answer that is none of them", row["Question ID"]
                )
                continue
            content = {"question": squeeze(row["Question"]), "choices": choices, "answer": answer}
            if record := self.record(row["Image"], row["Question ID"], task="multiple_choice", **content):
                yield record


def build_dataset(records: Iterable[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    """Records → Dataset, by chunks, so that never more than one chunk exists as Python objects."""
    rows = iter(records)
    chunks = []
    while (chunk := list(islice(rows, ROWS_A_CHUNK))) or not chunks:
        columns = {name: [row[name] for row in chunk] for name in features}
        chunks.append(datasets.Dataset(pa.Table.from_pydict(columns, schema=features.arrow_schema)))
    return datasets.concatenate_datasets(chunks)


# ---- what others call ----------------------------------------------------------------------------------------------


def check_choice(name: str, values: Collection[str], allowed: Collection[str]) -> None:
    if not values or (unknown := set(values) - set(allowed)):
        raise ValueError(f"{name}={sorted(unknown) if values else values}; expected some of {', '.join(allowed)}.")


def load_ct_rate(
    root: str | Path,
    split: str,
    *,
    tasks: Sequence[str] | None = None,
    report_sections: Sequence[str] = ("findings",),
    reconstructions: str = "all",
    vqa_files: Sequence[str | Path] | None = None,
    finding_names: Sequence[str] = (),
    on_missing: str = "error",
    layout: str | None = None,
) -> datasets.Dataset:
    """CT-RATE (v1 or v2 folders) as a Dataset of records.

    Reports come from the reports CSV; the VQA file's `report_generation` records are used only where there is no CSV,
    since they repeat it. A conversation of several turns becomes a record a turn. What is left out is counted by
    reason in the log: volumes that no_chest_*.txt lists, reports without text, unusable questions.

    Args:
        root: CT-RATE's folder, or the one that holds its `dataset` folder.
        split: "train" or "valid" (or "validation").
        tasks: of TASKS; None takes those whose files are there.
        report_sections: of SECTIONS. Several are joined under their names; a report lacking the first is left out.
            "clinical_information" becomes part of the question.
        reconstructions: "all", or "first": the lowest numbered of each scan.
        vqa_files: VQA JSON files by path, or by name below the data set; None takes vqa/{split}_vqa.json.
        finding_names: columns of the label CSV that become `finding_labels`, in this order.
        on_missing: volumes named but absent: "error" lists them, "skip" leaves their records out and counts them,
            "keep" doesn't look.
        layout: "v1" or "v2" where a folder holds both; None takes v2 then.

    Volumes of v1 hold raw stored values under blank headers. Their records carry `rescale`, [slope, intercept] of the
    metadata CSV, for `read_ct(path, rescale=...)`; their geometry is not known to the reader, so prefer v2.

    Raises:
        FileNotFoundError: the layout, a file that a task needs, or volumes are missing.
        ValueError: an unknown option, a table without a column that it needs, a broken VQA file.
    """
    check_choice("report_sections", report_sections, SECTIONS)
    check_choice("report_sections", set(report_sections) - {"clinical_information"}, SECTIONS)
    if reconstructions not in ("all", "first"):
        raise ValueError(f"reconstructions={reconstructions!r}; expected 'all' or 'first'.")
    folder = CtRateFolder(root, split, layout)
    files = [folder.find_vqa(name) for name in vqa_files] if vqa_files is not None else [p for p in [folder.vqa] if p]
    tasks = choose_tasks(tasks, folder, files)
    tally = Tally()
    excluded = read_no_chest(folder.no_chest)
    firsts = first_reconstructions(folder, excluded) if reconstructions == "first" else None
    volumes = Volumes(folder.locate, tally, excluded=excluded, firsts=firsts, on_missing=on_missing)
    reader = RecordReader(volumes, tally, tasks, finding_names)
    reader.labels = read_labels(folder.labels, finding_names)
    features = FEATURES
    if folder.layout == "v1":
        reader.rescale = read_rescale(folder.metadata)
        features = datasets.Features({**FEATURES, "rescale": RESCALE_FEATURE})
        logger.warning("%s: v1 volumes; HU by the metadata's slope and intercept, geometry unknown.", folder.root)
    dataset = build_dataset(read_split(reader, folder, files, tasks, report_sections), features)
    volumes.check()
    tally.log(f"{folder.root} {folder.split} ({folder.layout})")
    return dataset


def choose_tasks(tasks: Sequence[str] | None, folder: CtRateFolder, vqa_files: Sequence[Path]) -> tuple[str, ...]:
    """The tasks to read; an error where one that was asked for has no file."""
    if tasks is not None:
        check_choice("tasks", tasks, TASKS)
    wanted = TASKS if tasks is None else tuple(tasks)
    possible = [task for task in wanted if vqa_files or (task == "report" and folder.reports)]
    if not possible or (tasks is not None and len(possible) < len(wanted)):
        absent = ", ".join(task for task in wanted if task not in possible)
        raise FileNotFoundError(
            f"{folder.root}: nothing to read {absent} from; expected radiology_text_reports/*_reports.csv for reports "
            f"and vqa/{folder.split}_vqa.json (or vqa_files=...) for questions."
        )
    return tuple(possible)


def read_split(
    reader: RecordReader,
    folder: CtRateFolder,
    vqa_files: Sequence[Path],
    tasks: Collection[str],
    sections: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """All records of a split: reports, then the VQA files in the order given."""
    from_csv = "report" in tasks and folder.reports is not None
    if from_csv:
        yield from reader.reports(folder.reports, sections)
    if not from_csv or set(tasks) != {"report"}:
        for path in vqa_files:
            yield from reader.vqa(path, skip_reports=from_csv)


def load_samf_csv(
    report_csv: str | Path | None,
    mcq_csv: str | Path | None,
    image_root: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    on_missing: str = "error",
) -> datasets.Dataset:
    """The SAMF paper's own CSVs as a Dataset of records.

    Args:
        report_csv: columns image, caption; or None.
        mcq_csv: columns Question ID, Image, Question, Choice A to D, Answer Choice, Answer; or None.
        image_root: the folder that the images' paths start from. Where an image isn't there, CT-RATE's v2 and v1
            folders below it are tried.
        tasks: of ("report", "multiple_choice"); None takes both.
        on_missing: as for `load_ct_rate`.
    """
    root, tally = Path(image_root).expanduser().absolute(), Tally()
    if tasks is not None:
        check_choice("tasks", tasks, TASKS)

    def locate(name: str) -> Path:
        places = [root / name]
        if VolumeName.find(name):
            places += [volume_path(root, name, "v2"), volume_path(root, name, "v1")]
        return next((path for path in places if path.is_file()), places[0])

    volumes = Volumes(locate, tally, on_missing=on_missing)
    reader = RecordReader(volumes, tally, tasks or ("report", "multiple_choice"))

    def records() -> Iterator[dict[str, Any]]:
        if report_csv is not None:
            yield from reader.captions(Path(report_csv))
        if mcq_csv is not None:
            yield from reader.choices(Path(mcq_csv))

    dataset = build_dataset(records(), FEATURES)
    volumes.check()
    tally.log(" and ".join(str(path) for path in (report_csv, mcq_csv) if path is not None))
    return dataset


def load_records(source: str | Path, split: str, **options: Any) -> datasets.Dataset:
    """Records from any source that is understood: the one function that scripts call.

    Args:
        source: CT-RATE's folder (`load_ct_rate`), or one of the paper's CSVs (`load_samf_csv`), in whose path
            "{split}" stands for the split; then `image_root` is the images' folder, by default the CSV's.
        split: "train" or "valid".
        options: the loader's own; a CSV has no use for `finding_names` and `vqa_files`.
    """
    path = Path(str(source).replace("{split}", split)).expanduser()
    if path.is_dir():
        return load_ct_rate(path, split, **options)
    if path.suffix == ".csv" and path.is_file():
        image_root = options.pop("image_root", path.parent)
        kept = {name: value for name, value in options.items() if name not in ("finding_names", "vqa_files")}
        with path.open(encoding="utf-8-sig", newline="") as file:
            is_report = "caption" in next(csv.reader(file), [])
        return load_samf_csv(path if is_report else None, None if is_report else path, image_root, **kept)
    raise FileNotFoundError(f"{path}: no such folder or CSV. Give CT-RATE's folder, or one of the paper's CSV files.")


def check_patient_overlap(train: datasets.Dataset, valid: datasets.Dataset) -> None:
    """Raise where a patient, or a volume file, is in both.

    CT-RATE numbers the patients of each split anew: train_1 and valid_1 are different people.

    Raises:
        ValueError: names the patients.
    """
    common = sorted(patients_of(train) & patients_of(valid))
    if common:
        more = f" and {len(common) - LISTED_FILES} more" if len(common) > LISTED_FILES else ""
        raise ValueError(
            f"{len(common)} patients are in both training and validation data: {', '.join(common[:LISTED_FILES])}{more}. "
            f"Scores on them would not be held out; take them out of one."
        )


def patients_of(dataset: datasets.Dataset) -> set[str]:
    """The patients of the records that have a volume."""
    return {patient_of(path) for path in dataset.unique("volume") if path is not None}


def patient_of(path: str) -> str:
    """A volume's patient by CT-RATE's names, else the path itself."""
    volume = VolumeName.find(path)
    return volume.patient_id if volume else path
