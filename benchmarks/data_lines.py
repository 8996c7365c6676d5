"""Benchmarks of reading data at CT-RATE's size: a synthetic copy of its tables, read without and with the Arrow cache.

The copy has as many volumes as CT-RATE's training split and a VQA file of a gigabyte. Its rows are real ones under new
names where `$SAMF_TEST_DATA/reports` has them, otherwise texts of phantoms; there are no volumes.
"""

import csv
import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle, islice
from pathlib import Path

import datasets
import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from samf.benchmarks.measuring import Measurement, peak_memory
from samf.benchmarks.workloads import Settings
from samf.data.ct_rate.loader import load_ct_rate
from samf.data.ct_rate.names import VolumeName
from samf.data.ct_rate.tables import CT_RATE_LABELS, read_rows
from samf.data.lengths import count_tokens
from samf.data.mixture import TaskMixture
from samf.data.prompts import REPORT_QUESTION
from samf.phantoms.dataset import PhantomSettings, plan_patient
from samf.phantoms.text import join_report
from samf.phantoms.tokenizer import train_small_tokenizer
from samf.training.sampling import RecordOrder

VOLUMES = 47_149  # of CT-RATE's training split
_VQA_BYTES = 1_000_000_000
MOST_MEMORY = 2.0  # GB, imports included
REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
_REAL_REPORTS, _REAL_METADATA = "CT-CLIP_text_classifier_val.csv", "CT-RATE_validation_metadata.csv"
_PHANTOM_PATIENTS = 200
IMAGE_TOKENS = 256
ROWS, _STEP_ROWS = 4, 16  # of a micro-batch and of a step whose padding is counted
_PATIENTS_APART = 100_000  # distance of the patient numbers of a row's copies
_TURNS = {
    "long_answer": ("What is seen in this chest CT?", "Describe the lungs and the mediastinum."),
    "short_answer": ("Is there an effusion?", "Which side is affected?", "How large is the lesion?"),
    "multiple_choice": ("Which statement fits this chest CT?", "What is the most likely finding?"),
}


@dataclass(frozen=True)
class Templates:
    """Rows that are copied: reports with their 18 labels, and metadata rows with the names of their volumes."""

    reports: Sequence[tuple[str, Sequence[str]]]
    metadata: Sequence[dict[str, str]]


def find_templates(folder: Path | None = None) -> Templates:
    """Return real rows of `folder` (default: $SAMF_TEST_DATA/reports), or those of phantoms where it lacks them."""
    folder = folder or Path(os.environ.get("SAMF_TEST_DATA", "")) / "reports"
    if (folder / _REAL_REPORTS).is_file() and (folder / _REAL_METADATA).is_file():
        rows = read_rows(folder / _REAL_REPORTS, ("report_text", *CT_RATE_LABELS))
        reports = [(row["report_text"], [row[name] for name in CT_RATE_LABELS]) for row in rows]
        return Templates(reports, list(read_rows(folder / _REAL_METADATA)))
    scans = [scan for p in range(_PHANTOM_PATIENTS) for scan in plan_patient(PhantomSettings(), "valid", p + 1)]
    no_labels = ["0"] * len(CT_RATE_LABELS)
    reports = [(join_report(scan.statements), no_labels) for scan in scans]
    names = [f"valid_{p + 1}_a_{k}.nii.gz" for p in range(_PHANTOM_PATIENTS) for k in (1, 2)]
    row = {"RescaleSlope": "1", "RescaleIntercept": "-1024", "XYSpacing": "[0.7, 0.7]", "ZSpacing": "1.5"}
    return Templates(reports, [{"VolumeName": name, **row} for name in names])


def write_ct_rate_copy(root: Path, volumes: int, vqa_bytes: int, templates: Templates) -> None:
    """Write the tables of a training split: reports, labels, metadata and questions, but no volumes.

    Args:
        root: CT-RATE's folder; created.
        volumes: rows of the tables.
        vqa_bytes: approximate size of the VQA file.
        templates: rows that are repeated under new names; reconstructions of a scan share its report.
    """
    rows = list(islice(renamed(templates.metadata), volumes))
    by_scan: dict[str, int] = {}
    texts = [by_scan.setdefault(VolumeName.parse(row["VolumeName"]).scan_id, len(by_scan)) for row in rows]
    chosen = [templates.reports[k % len(templates.reports)] for k in texts]
    names = [row["VolumeName"] for row in rows]
    (root / "train_fixed").mkdir(parents=True, exist_ok=True)
    _write_csv(root / "metadata/train_metadata.csv", list(rows[0]), (row.values() for row in rows))
    reports = ((name, "", "", text, "") for name, (text, _) in zip(names, chosen, strict=True))
    _write_csv(root / "radiology_text_reports/train_reports.csv", REPORT_COLUMNS, reports)
    labels = ([name, *values] for name, (_, values) in zip(names, chosen, strict=True))
    _write_csv(root / "multi_abnormality_labels/train_predicted_labels.csv", ["VolumeName", *CT_RATE_LABELS], labels)
    _write_vqa(root / "vqa/train_vqa.json", zip(cycle(names), cycle(text for text, _ in chosen)), vqa_bytes)


def renamed(rows: Sequence[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Yield the rows repeatedly, each time of new patients of the training split."""
    for number in count():
        for row in rows:
            name = VolumeName.parse(row["VolumeName"])
            name = VolumeName("train", name.patient + number * _PATIENTS_APART, name.scan, name.reconstruction)
            yield {**row, "VolumeName": str(name)}


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def _write_vqa(path: Path, volumes: Iterable[tuple[str, str]], size: int) -> None:
    """Write questions in CT-RATE's format, one to three per record, until the file has `size` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, written = random.Random(0), 1
    with path.open("w", encoding="utf-8") as file, tqdm(total=size, unit="B", unit_scale=True, desc="VQA") as progress:
        file.write("[")
        for number, (name, report) in enumerate(volumes):
            task = rng.choice(list(_TURNS))
            turns = [
                turn for k in range(rng.choice((1, 1, 1, 3))) for turn in _exchange(rng, task, report, first=not k)
            ]
            record = json.dumps({"id": f"{task}_{number}", "image": name, "conversations": turns})
            file.write(f"{', ' if number else ''}{record}")
            written += len(record) + 2
            progress.update(len(record) + 2)
            if written >= size:
                break
        file.write("]")


def _exchange(rng: random.Random, task: str, report: str, first: bool) -> list[dict[str, str]]:
    sentences = report.split(". ")
    answer = rng.choice(sentences) if task != "short_answer" else rng.choice(sentences)[:20]
    question = rng.choice(_TURNS[task])
    if task == "multiple_choice":
        options = [answer, *rng.choices(sentences, k=3)]
        rng.shuffle(options)
        letter = "abcd"[options.index(answer)]
        question += "".join(f" ({mark}) {option}" for mark, option in zip("abcd", options, strict=True))
        answer = f"({letter}) {answer}"
    image = "<image>\n" if first else ""
    return [
        {"from": "human", "value": f"{image}{question}<{task}>", "type": task},
        {"from": "gpt", "value": answer},
    ]


# --- Stages -----------------------------------------------------------------------------------------------------------


def write_copy(settings: Settings) -> list[Measurement]:
    """Write the copy to the stage's folder."""
    volumes, size = (VOLUMES, _VQA_BYTES) if settings.size == "full" else (200, 200_000)
    started = time.monotonic()
    write_ct_rate_copy(settings.folder / "CT-RATE", volumes, size, find_templates())
    return [
        Measurement(
            "write the copy", "s", [time.monotonic() - started], note=f"{volumes} volumes, {size / 1e9:g} GB VQA"
        )
    ]


def read_copy(settings: Settings) -> list[Measurement]:
    """Read the copy into records, first from its tables, then from the Arrow file, and choose the rows of an epoch.

    Raises:
        RuntimeError: a report is missing.
    """
    started = time.monotonic()
    records = load_ct_rate(
        settings.folder / "CT-RATE",
        "train",
        finding_names=CT_RATE_LABELS,
        on_missing="keep",
        cache_dir=settings.folder / "cache",
    )
    read = time.monotonic()
    mixture = TaskMixture(records, {"report": 1, "multiple_choice": 1})
    rows = mixture.epoch_rows(0)
    mixed = time.monotonic()
    if len(mixture.rows["report"]) != (VOLUMES if settings.size == "full" else 200):
        raise RuntimeError(f"{len(mixture.rows['report'])} reports were read; expected one for each volume.")
    note = f"{len(records)} records of {len(mixture.rows['report'])} reports and a VQA file"
    limit = MOST_MEMORY if settings.size == "full" else None
    return [
        Measurement("tables to records", "s", [read - started], note=note),
        Measurement("rows of an epoch", "s", [mixed - read], note=f"{len(rows)} records, reports and choices 1:1"),
        replace(peak_memory(settings.device)[0], name="memory while reading", at_most=limit),
    ]


# --- Padding ----------------------------------------------------------------------------------------------------------


def count_padding(settings: Settings) -> list[Measurement]:
    """Measure the share of padding in micro-batches, with as many reports as questions, for each order of training."""
    rng, reports = random.Random(0), [report for report, _ in find_templates().reports]
    questions = [_exchange(rng, "multiple_choice", report, first=False) for report in reports]
    rows = [(REPORT_QUESTION, report) for report in reports] + [
        (ask["value"], told["value"]) for ask, told in questions
    ]
    columns = {"question": [row[0] for row in rows], "answer": [row[1] for row in rows], "choices": [None] * len(rows)}
    records = datasets.Dataset.from_dict({"id": list(map(str, range(len(rows)))), **columns})
    folder = Path(os.environ.get("SAMF_TEST_DATA", "")) / "tokenizers" / "phi3"
    real = folder.is_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder) if real else train_small_tokenizer(reports)
    lengths = count_tokens(records, tokenizer) + IMAGE_TOKENS
    orders = {
        "random": RecordOrder(len(rows), 0),
        "sort_steps": RecordOrder(len(rows), 0, lengths, _STEP_ROWS, within_steps=True),
        "group_by_length": RecordOrder(len(rows), 0, lengths, _STEP_ROWS),
    }
    kind = "real" if real else "phantoms'"
    note = f"{len(rows)} {kind} records of {lengths.mean():.0f} tokens, {ROWS} per micro-batch, {_STEP_ROWS} per step"
    return [
        Measurement(f"padding, {name}", "%", [100 * padding_share(lengths[list(order)], ROWS)], note=note)
        for name, order in orders.items()
    ]


def padding_share(lengths: np.ndarray, rows: int) -> float:
    """Return the share of padding if every `rows` consecutive records, of `lengths` (N,) tokens, form a batch."""
    batches = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    return 1 - lengths.sum() / sum(batch.max() * len(batch) for batch in batches)
