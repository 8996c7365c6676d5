"""From predictions.jsonl alone to scores and a table, so that any system's output can be scored in the same way.

    python -m samf.evaluation.scoring runs/samf/predictions.jsonl --output runs/samf/results.json
    python -m samf.evaluation.scoring runs/ao2d/predictions.jsonl --against runs/samf/predictions.jsonl

Each line is one JSON object with `id`, `scan_id`, `task`, `question`, `choices`, `reference` and `prediction`; of these
only `task`, `reference` and `prediction` (and `choices` for multiple choice) must be there. `patient_id`, and `volume`,
`tokens` and `truncated`, which eval.py adds, are used where they are present.

What odd lines become: an empty prediction scores 0 and stays in every mean; a repeated id is scored again and counted; a
line without id or scan_id is scored, and stands for a patient of its own in the intervals; a line whose reference is
empty can't be scored and is left out, counted among the cohort's exclusions.
"""

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.data.schema import FAILURES_FILE, TASKS
from samf.evaluation.metrics.baselines import constant_reports, exchanged_reports, nearest_prior_reports
from samf.evaluation.metrics.bootstrap import INTERVAL_METHOD, LEVEL, RESAMPLES, patient_counts, patient_intervals
from samf.evaluation.metrics.clinical_metrics import (
    CRG_REMEDY,
    MACRO_REMEDY,
    MICRO_REMEDY,
    PRECISION_RECALL_F1,
    RADEVAL_METRICS,
    Labeller,
    chance_findings,
    check_radeval,
    confusion_counts,
    describe_findings,
    finding_samples,
    macro_metrics,
    make_labeller,
    radeval_samples,
    score_findings,
)
from samf.evaluation.metrics.multiple_choice import parse_choice, reference_choice, score_multiple_choice
from samf.evaluation.metrics.sampled_metric import SampledMetric, patient_keys, ratio, unknown_patients
from samf.evaluation.metrics.significance import paired_randomisation
from samf.evaluation.metrics.subgroups import read_subgroups, subgroup_table
from samf.evaluation.metrics.template_collapse import template_collapse
from samf.evaluation.metrics.text_metrics import (
    BERTSCORE_NAMES,
    TEXT_METRICS,
    bertscore_samples,
    check_bertscore,
    describe_text,
    text_samples,
)
from samf.evaluation.prediction_rows import (
    FIELDS,
    PredictionsError,
    check_row,
    parse_object,
    read_json_lines,
    read_predictions,
)
from samf.evaluation.results_table import comparison_table, markdown_table, results_table
from samf.utils.files import atomic_write, write_json
from samf.utils.text_files import TextEncodingError, read_text

logger = logging.getLogger(__name__)

__all__ = [
    "FIELDS",
    "TASKS",
    "PredictionsError",
    "check_options",
    "compare_predictions",
    "markdown_table",
    "predictions_digest",
    "read_predictions",
    "results_table",
    "score_findings",
    "score_predictions",
    "write_results",
]

SCHEMA = 2  # of results.json; goes up when a key changes its meaning or goes away
# What eval.py lists beside its predictions.
# What the data's loader counts: records that were not asked for at all, by reason.
RECORD_COUNTS = "records.json"
EMPTY_REFERENCE = "the reference is empty"
LISTED_IDS = 20
PERMUTATIONS = 10_000
# What the table of subgroups holds of each task.
SUBGROUP_METRICS = {
    "report": ("text.bleu_4", "text.rouge_l", "findings.macro.f1", "findings.micro.f1", "findings.crg"),
    "multiple_choice": ("multiple_choice.accuracy", "multiple_choice.f1"),
}


@dataclass(frozen=True)
class _Settings:
    """What `score_predictions` was asked for."""

    finding_names: tuple[str, ...]
    labeller: Labeller
    labeller_name: str = "rules"
    bertscore: Mapping[str, Any] = field(default_factory=dict)
    radeval: Sequence[str] = ()
    intervals: bool = True
    seed: int = 0
    baselines: bool = True
    metadata: str | os.PathLike | None = None

    # Metric → why it could not be computed: filled while scoring, so that what failed once is not tried again.
    failed: dict[str, str] = field(default_factory=dict)

    def bertscore_samples(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, SampledMetric]:
        """BERTScore, where a model is named and can be used."""
        if self.bertscore.get("bertscore_model") is None:
            return {}
        return self._unless_it_fails(
            BERTSCORE_NAMES, lambda: bertscore_samples(predictions, references, **self.bertscore)
        )

    def radeval_samples(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, SampledMetric]:
        """Those of the library RadEval that are named and can be used, each by itself."""
        samples: dict[str, SampledMetric] = {}
        for name in self.radeval:
            compute = partial(radeval_samples, predictions, references, [name])
            samples |= self._unless_it_fails(RADEVAL_METRICS[name], compute)
        return samples

    def _unless_it_fails(
        self, names: Sequence[str], compute: Callable[[], dict[str, SampledMetric]]
    ) -> dict[str, SampledMetric]:
        """What `compute` gives; nothing, and a note for each name, where it fails now or has failed before."""
        if any(name in self.failed for name in names):
            return {}
        try:
            return compute()
        except Exception as error:  # other people's models fail in any way: no other score is lost
            logger.warning("%s: left out, since its library or model failed.", ", ".join(names), exc_info=error)
            reason = next(iter(str(error).splitlines()), "")
            self.failed.update(dict.fromkeys(names, f"It failed with {type(error).__name__}: {reason}"))
            return {}

    def as_results(self) -> dict[str, Any]:
        """What the scores depend on beside the predictions."""
        names = ("bertscore_model", "bertscore_layers")
        return {
            "finding_names": list(self.finding_names),
            "labeller": self.labeller_name,
            **{name: self.bertscore.get(name) for name in names},
            "radeval": list(self.radeval),
            "seed": self.seed,
            "baselines": self.baselines,
            "metadata": None if self.metadata is None else Path(self.metadata).name,
        }


def score_predictions(
    path_or_rows: str | os.PathLike | Iterable[Mapping[str, Any]],
    *,
    finding_names: Sequence[str] | None = None,
    labeller: str = "rules",
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
    radeval: Sequence[str] = (),
    device: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    baselines: bool = True,
    metadata: str | os.PathLike | None = None,
    exclusions: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Scores of every task in a predictions file, or in its rows, with 95 % intervals over patients.

    Args:
        finding_names: the labels of CT-RATE's 18 that count in the per-finding scores; None = all.
        labeller: "rules", "radbert", or a path or Hub id of RadBertClassifier.pth.
        bertscore_model, bertscore_layers, device: see `text_metrics.bertscore`.
        radeval: metrics of the library RadEval for reports: radgraph, ratescore, green.
        resamples: 0: no intervals. Intervals are computed, not drawn: any other number gives the same ones.
        seed: of the shuffled baseline.
        baselines: also score what no image was read for, and look for template collapse.
        metadata: CT-RATE's metadata CSV, for a table of subgroups.
        exclusions: a failures.jsonl whose records belong to the cohort and have no prediction; default: the one beside
            the predictions file, if any.

    Returns, all of it fit for JSON:
        counts: predictions, scans, patients, duplicate_ids, missing_ids.
        cohort: predictions (scored), volumes (None where no row names one), scans, patients, excluded (reason → count and
            the first ids): empty references, failures, and what the records.json beside the file says was left out.
        schema, code, settings: version of this layout; versions of this package and of what it computes with; what the
            scores depend on beside the predictions. predictions_digest: see `predictions_digest`.
        tasks: task → count, empty, truncated, patients, `text`, `intervals` ("text.bleu_4" → [low, high]), `n` (the same
            names → patients that the figure depends on), and for reports `findings`, `radeval`, `collapse`; for multiple
            choice `multiple_choice`; `baselines`; with metadata `subgroups`.
        statistics: unit, method, level, labeller, intervals (whether there are any), unknown_patients (answers that name no
            patient).
        not_available: metric → why, and what to do; one whose library or model fails is among them. notes: name → what to
            heed.

    Raises PredictionsError for rows that can't be scored, ValueError or FileNotFoundError for options that can't be used.
    """
    bertscore = {"bertscore_model": bertscore_model, "bertscore_layers": bertscore_layers}
    checked = {"radeval": radeval, "resamples": resamples, "metadata": metadata}
    names = check_options(finding_names=finding_names, **bertscore, **checked)
    rows, place = _load_rows(path_or_rows)
    failures, left_out = _read_exclusions(exclusions, path_or_rows), _read_left_out(path_or_rows)
    scorable = [row for row in rows if str(row["reference"]).strip()]
    if not scorable:
        raise PredictionsError(f"{place}: all {len(rows)} references are empty; there is nothing to compare with.")
    settings = _Settings(
        names,
        make_labeller(labeller, device=device),
        labeller,
        {**bertscore, "device": device},
        tuple(radeval),
        resamples > 0,
        seed,
        baselines,
        metadata,
    )
    return {
        "schema": SCHEMA,
        "code": code_versions(),
        "settings": settings.as_results(),
        "predictions_digest": predictions_digest(rows),
        "counts": _count(rows),
        "cohort": _cohort(rows, scorable, failures, left_out),
        **_score_tasks(scorable, settings),
    }


def _score_tasks(rows: Sequence[Mapping[str, Any]], settings: _Settings) -> dict[str, Any]:
    """tasks, statistics, not_available and notes of `score_predictions`, of rows with a reference."""
    tasks, not_available, notes = {}, {}, {}
    for task in TASKS:
        chosen = [row for row in rows if row["task"] == task]
        if chosen:
            tasks[task], lacking, heed = _score_task(task, chosen, settings)
            not_available |= lacking
            notes |= {f"{task}: {name}": what for name, what in heed.items()}
    statistics = {
        "unit": "patient",
        "method": INTERVAL_METHOD,
        "level": LEVEL,
        "labeller": settings.labeller_name,
        "intervals": settings.intervals,
        "unknown_patients": unknown_patients(rows),
    }
    return {"tasks": tasks, "statistics": statistics, "not_available": not_available, "notes": notes}


# What the scores are computed with.
_LIBRARIES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "nltk",
    "sacrebleu",
    "rouge-score",
    "bert-score",
    "transformers",
    "torch",
)


def code_versions() -> dict[str, Any]:
    """Versions of this package and of the libraries that scores are computed with.

    `source` is a hash of this package's evaluation code: a checkout has one version number for many states of it.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    found = {name: _version(name) for name in ("samf", *_LIBRARIES)}
    return {"source": digest.hexdigest()[:12], **{name: version for name, version in found.items() if version}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a checkout that isn't installed has none
        return None


def predictions_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """A hash of what was predicted for which record, in any order: files beside the predictions say whose they are by it."""
    lines = sorted(json.dumps([row["task"], str(row.get("id")), row["prediction"]]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_options(
    *,
    finding_names: Sequence[str] | None = None,
    labeller: str | None = None,
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
    radeval: Sequence[str] = (),
    resamples: int = RESAMPLES,
    metadata: str | os.PathLike | None = None,
    device: str | None = None,
) -> tuple[str, ...]:
    """Check what `score_predictions` would be given, without predictions; returns the findings that count.

    With `labeller` it is built, and so its weights are read. Raises ValueError, FileNotFoundError, ImportError or OSError
    for what can't be used.
    """
    names = _check_findings(finding_names)
    if resamples < 0:
        raise ValueError(f"resamples is {resamples}; expected 0 (no intervals) or more.")
    check_radeval(radeval)
    if bertscore_model is not None:
        check_bertscore(bertscore_model, bertscore_layers)
    if metadata is not None:
        read_subgroups(metadata, [])
    if labeller is not None:
        make_labeller(labeller, device=device)
    return names


def _load_rows(path_or_rows: str | os.PathLike | Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    if isinstance(path_or_rows, str | os.PathLike):
        return read_predictions(path_or_rows), str(path_or_rows)
    rows = list(path_or_rows)
    for position, row in enumerate(rows):
        check_row(row, f"row {position}")
    if not rows:
        raise PredictionsError("There are no predictions to score.")
    return rows, "the rows"


def _check_findings(finding_names: Sequence[str] | None) -> tuple[str, ...]:
    names = CT_RATE_LABELS if finding_names is None else tuple(finding_names)
    unknown = sorted(set(names) - set(CT_RATE_LABELS))
    if unknown or not names:
        raise ValueError(f"Unknown findings {unknown}; the labeller knows {', '.join(CT_RATE_LABELS)}.")
    return names


# --- cohort -----------------------------------------------------------------------------------------------------


def _count(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    ids = Counter(row["id"] for row in rows if row.get("id") is not None)
    duplicates = sum(count - 1 for count in ids.values())
    if duplicates:
        logger.warning("%d predictions repeat the id of an earlier one; all of them are scored.", duplicates)
    return {
        "predictions": len(rows),
        "scans": len({row["scan_id"] for row in rows if row.get("scan_id") is not None}),
        "patients": len(set(patient_keys(rows))),
        "duplicate_ids": duplicates,
        "missing_ids": sum(row.get("id") is None for row in rows),
    }


def _read_exclusions(
    path: str | os.PathLike | None, predictions: str | os.PathLike | Iterable[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Lines of a failures.jsonl: the one that is named, else the one beside the predictions, else none."""
    if path is None:
        if not isinstance(predictions, str | os.PathLike):
            return []
        path = Path(predictions).with_name(FAILURES_FILE)
        if not path.is_file():
            return []
    path = Path(path)
    if not path.is_file():
        raise PredictionsError(f"{path}: no such file; expected the failures.jsonl that eval.py writes.")
    return [row for _, row in read_json_lines(path)]


def _read_left_out(predictions: str | os.PathLike | Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the records.json beside a predictions file lists as left out: reason, count and the first of each."""
    path = Path(predictions).with_name(RECORD_COUNTS) if isinstance(predictions, str | os.PathLike) else None
    if path is None or not path.is_file():
        return []
    try:
        left_out = parse_object(read_text(path), str(path)).get("left_out")
    except TextEncodingError as error:
        raise PredictionsError(str(error)) from error
    if not isinstance(left_out, list) or not all(map(_is_left_out, left_out)):
        raise PredictionsError(f"{path}: no list `left_out` of reasons and counts; remove it, or run eval.py again.")
    return left_out


def _is_left_out(entry: Any) -> bool:
    return isinstance(entry, dict) and "reason" in entry and isinstance(entry.get("count", 0), int)


def _cohort(
    rows: Sequence[Mapping[str, Any]],
    scored: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
    left_out: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    answered = {row["id"] for row in rows if row.get("id") is not None}
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not str(row["reference"]).strip():
            reasons.setdefault(EMPTY_REFERENCE, []).append(str(row.get("id")))
    for failure in failures:
        if failure.get("id") not in answered:
            reason = str(failure.get("error", "no reason given")).split(":")[0]
            reasons.setdefault(f"no prediction: {reason}", []).append(str(failure.get("id")))
    volumes = {row["volume"] for row in scored if row.get("volume")}
    excluded = {reason: {"count": len(ids), "ids": ids[:LISTED_IDS]} for reason, ids in reasons.items()}
    for entry in left_out:
        first = [str(entry["first"])] if entry.get("first") else []
        excluded[f"not asked: {entry['reason']}"] = {"count": entry.get("count", 0), "ids": first}
    return {
        "predictions": len(scored),
        "volumes": len(volumes) or None,
        "scans": len({row["scan_id"] for row in scored if row.get("scan_id") is not None}),
        "patients": len(set(patient_keys(scored))),
        "excluded": excluded,
    }


# --- one task ---------------------------------------------------------------------------------------------------


def _texts(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    return [row["prediction"] for row in rows], [row["reference"] for row in rows]


def _task_samples(task: str, rows: Sequence[Mapping[str, Any]], settings: _Settings) -> dict[str, SampledMetric]:
    """Every figure of a task by sample: "text.bleu_4", "findings.macro.f1", "multiple_choice.accuracy", …"""
    predictions, references = _texts(rows)
    groups = {"text": {**text_samples(predictions, references), **settings.bertscore_samples(predictions, references)}}
    if task == "report":
        groups["findings"] = finding_samples(predictions, references, settings.finding_names, settings.labeller)
        groups["radeval"] = settings.radeval_samples(predictions, references)
    if task == "multiple_choice":
        groups["multiple_choice"] = choice_samples(predictions, references, [row["choices"] for row in rows])
    return {f"{group}.{name}": metric for group, metrics in groups.items() for name, metric in metrics.items()}


def _select(samples: Mapping[str, SampledMetric], group: str) -> dict[str, SampledMetric]:
    return {name.removeprefix(f"{group}."): m for name, m in samples.items() if name.startswith(f"{group}.")}


def _score_task(
    task: str, rows: Sequence[Mapping[str, Any]], settings: _Settings
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """The task's scores; metric → why it is not available; metric → what to heed."""
    predictions, references = _texts(rows)
    patients = patient_keys(rows)
    samples = _task_samples(task, rows, settings)
    text = describe_text(predictions, references, _select(samples, "text"))
    not_available = text["not_available"]
    scores: dict[str, Any] = {
        "count": len(rows),
        "empty": text["empty_predictions"],
        "truncated": sum(bool(row.get("truncated")) for row in rows),
        "patients": len(set(patients)),
        "text": text["scores"],
    }
    if task == "report":
        scores["findings"] = describe_findings(_select(samples, "findings"), settings.finding_names)
        not_available = {**not_available, **_undefined_findings(scores["findings"])}
        if settings.radeval:
            scores["radeval"] = {name: metric.value() for name, metric in _select(samples, "radeval").items()}
    if task == "multiple_choice":
        scores["multiple_choice"] = score_multiple_choice(predictions, references, [row["choices"] for row in rows])
    scores["intervals"] = _intervals(samples, patients, settings)
    scores["n"] = patient_counts(samples, patients)
    if settings.baselines:
        scores |= _score_baselines(task, rows, patients, settings)
    if settings.metadata is not None and task in SUBGROUP_METRICS:
        chosen = {name: samples[name] for name in SUBGROUP_METRICS[task]}
        groups = read_subgroups(settings.metadata, rows)
        scores["subgroups"] = subgroup_table(chosen, patients, groups, intervals=settings.intervals)
    return scores, {**not_available, **settings.failed}, text["notes"]


def _undefined_findings(findings: Mapping[str, Any]) -> dict[str, str]:
    """Name → why it has no value, of the figures over all findings."""
    undefined = {
        "crg": (findings["crg"] is None, CRG_REMEDY),
        "macro": (not findings["macro_findings"], MACRO_REMEDY),
        "micro": (findings["micro"]["f1"] is None, MICRO_REMEDY),
    }
    return {name: why for name, (is_so, why) in undefined.items() if is_so}


def choice_samples(
    predictions: Sequence[str], references: Sequence[str], choices: Sequence[Sequence[str]]
) -> dict[str, SampledMetric]:
    """accuracy, precision, recall and f1 of `score_multiple_choice` by question; one without a reference counts nowhere."""
    places = [
        (reference_choice(reference, options), parse_choice(prediction, options))
        for prediction, reference, options in zip(predictions, references, choices, strict=True)
    ]
    letters = max(map(len, choices))
    truth, named = np.zeros((2, len(places), letters), dtype=np.int64)
    for row, (right, answer) in enumerate(places):
        if right is not None:
            truth[row, right] = 1
            if answer is not None:
                named[row, answer] = 1
    hits = np.stack([(truth & named).sum(axis=1), truth.sum(axis=1)], axis=-1).astype(np.float64)
    return {"accuracy": SampledMetric(hits, ratio), **macro_metrics(confusion_counts(truth, named))}


# --- baselines --------------------------------------------------------------------------------------------------


def _score_baselines(
    task: str, rows: Sequence[Mapping[str, Any]], patients: Sequence[str], settings: _Settings
) -> dict[str, Any]:
    if task == "report":
        predictions, references = _texts(rows)
        collapse = {"predictions": template_collapse(predictions), "references": template_collapse(references)}
        return {"baselines": _report_baselines(predictions, references, patients, settings), "collapse": collapse}
    if task == "multiple_choice":
        return {"baselines": _choice_baselines(rows, patients, settings)}
    _, references = _texts(rows)
    constant = constant_reports(references, patients)
    return {"baselines": {"constant_answer": _score_texts(constant, references, patients, settings)}}


def _report_baselines(
    predictions: Sequence[str], references: Sequence[str], patients: Sequence[str], settings: _Settings
) -> dict[str, Any]:
    """name → `text`, `findings` (macro, micro, crg, sides, sizes) and `intervals` of reports that no image was read for.

    BERTScore, which costs most, is computed for the constant report alone, where it shows how high its floor is. Chance
    is an expectation and has no interval.
    """
    constant = constant_reports(references, patients)
    scored = {"constant_report": _score_reports(constant, references, patients, settings, with_bertscore=True)}
    if len(set(patients)) > 1:
        labels = settings.labeller(references)
        nearest = nearest_prior_reports(references, labels, patients)
        scored["nearest_label_prior"] = _score_reports(nearest, references, patients, settings)
        exchanged = exchanged_reports(predictions, patients, settings.seed)
        scored["shuffled"] = _score_reports(exchanged, references, patients, settings)
    chance = chance_findings(references, settings.finding_names, settings.labeller)
    scored["chance"] = {"text": dict.fromkeys(TEXT_METRICS), "findings": chance}
    return scored


def _score_texts(
    texts: Sequence[str],
    references: Sequence[str],
    patients: Sequence[str],
    settings: _Settings,
    *,
    with_bertscore: bool = False,
) -> dict[str, Any]:
    figures = text_samples(texts, references)
    if with_bertscore:
        figures |= settings.bertscore_samples(texts, references)
    samples = {f"text.{name}": metric for name, metric in figures.items()}
    text = describe_text(texts, references, _select(samples, "text"))["scores"]
    return {"text": text, "intervals": _intervals(samples, patients, settings)}


def _score_reports(
    texts: Sequence[str],
    references: Sequence[str],
    patients: Sequence[str],
    settings: _Settings,
    *,
    with_bertscore: bool = False,
) -> dict[str, Any]:
    scores = _score_texts(texts, references, patients, settings, with_bertscore=with_bertscore)
    found = finding_samples(texts, references, settings.finding_names, settings.labeller)
    groups = ("macro", "micro", "sides", "sizes")
    findings: dict[str, Any] = {
        group: {name: found[f"{group}.{name}"].value() for name in PRECISION_RECALL_F1} for group in groups
    }
    findings["crg"] = found["crg"].value()
    shown = {f"findings.{name}": metric for name, metric in found.items() if name.partition(".")[0] in findings}
    intervals = scores["intervals"] | _intervals(shown, patients, settings)
    return {"text": scores["text"], "findings": findings, "intervals": intervals}


def _intervals(
    samples: Mapping[str, SampledMetric], patients: Sequence[str], settings: _Settings
) -> dict[str, list[float] | None]:
    return patient_intervals(samples, patients) if settings.intervals else dict.fromkeys(samples)


def _choice_baselines(
    rows: Sequence[Mapping[str, Any]], patients: Sequence[str], settings: _Settings
) -> dict[str, Any]:
    """Accuracy and macro figures of always naming the letter that is most often right; and of guessing."""
    _, references = _texts(rows)
    choices = [row["choices"] for row in rows]
    letters = Counter(
        right
        for reference, options in zip(references, choices, strict=True)
        if (right := reference_choice(reference, options)) is not None
    )
    if not letters:
        return {}
    letter = "abcdefghijklmnopqrstuvwxyz"[letters.most_common(1)[0][0]]
    constant = [f"({letter})"] * len(rows)
    scores = score_multiple_choice(constant, references, choices)
    figures = {name: scores[name] for name in ("accuracy", *PRECISION_RECALL_F1)}
    intervals = _intervals(choice_samples(constant, references, choices), patients, settings)
    return {
        "most_frequent_letter": {"letter": letter, **figures, "intervals": intervals},
        "chance": {"accuracy": scores["chance"]},
    }


# --- two systems ------------------------------------------------------------------------------------------------


def compare_predictions(
    first: str | os.PathLike | Iterable[Mapping[str, Any]],
    second: str | os.PathLike | Iterable[Mapping[str, Any]],
    *,
    finding_names: Sequence[str] | None = None,
    labeller: str = "rules",
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
    radeval: Sequence[str] = (),
    device: str | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> dict[str, Any]:
    """Whether two systems differ on the records that both have answered: paired randomisation over patients.

    Records are matched by task and id; of a repeated id the first counts. Returns `matched`, `only_first`, `only_second` and
    `unknown_patients` (counts), `tasks`: task → name → first, second, difference (second - first), interval, n, p_value, and
    `not_available`. The p-values are of single figures, uncorrected; with many of them some are small by chance.
    Raises PredictionsError when no record is in both, or one has another reference in the second.
    """
    checked = {"bertscore_model": bertscore_model, "bertscore_layers": bertscore_layers, "radeval": radeval}
    settings = _Settings(
        check_options(finding_names=finding_names, **checked),
        make_labeller(labeller, device=device),
        labeller,
        {"bertscore_model": bertscore_model, "bertscore_layers": bertscore_layers, "device": device},
        tuple(radeval),
    )
    sides = [_by_id(_load_rows(rows)[0]) for rows in (first, second)]
    common = [key for key in sides[0] if key in sides[1] and str(sides[0][key]["reference"]).strip()]
    if not common:
        raise PredictionsError("No record is in both prediction files; they are matched by task and id.")
    _check_references(common, *sides)
    tasks = {}
    for task in TASKS:
        keys = [key for key in common if key[0] == task]
        if keys:
            a, b = ([side[key] for key in keys] for side in sides)
            samples = [_task_samples(task, rows, settings) for rows in (a, b)]
            tasks[task] = paired_randomisation(*samples, patient_keys(a), resamples=permutations, seed=seed)
    return {
        "matched": len(common),
        "only_first": len(sides[0].keys() - sides[1].keys()),
        "only_second": len(sides[1].keys() - sides[0].keys()),
        "permutations": permutations,
        "unknown_patients": unknown_patients([sides[0][key] for key in common]),
        "tasks": tasks,
        "not_available": dict(settings.failed),
    }


def _by_id(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, Any], Mapping[str, Any]]:
    found: dict[tuple[str, Any], Mapping[str, Any]] = {}
    for row in rows:
        if row.get("id") is not None:
            found.setdefault((row["task"], row["id"]), row)
    return found


def _check_references(
    keys: Sequence[tuple[str, Any]], first: Mapping[Any, Mapping[str, Any]], second: Mapping[Any, Mapping[str, Any]]
) -> None:
    for key in keys:
        if str(first[key]["reference"]).strip() != str(second[key]["reference"]).strip():
            raise PredictionsError(
                f"{key[0]} {key[1]!r} has another reference in the second file; the two are not of the same data."
            )


# --- files and command line -------------------------------------------------------------------------------------


def write_results(results: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write results as JSON to `path` and as a Markdown table beside it (same name, .md)."""
    _write(results, results_table(results), path)


def _write(results: Mapping[str, Any], table: str, path: str | os.PathLike) -> None:
    write_json(path, results)
    atomic_write(Path(path).with_suffix(".md"), table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Score a predictions.jsonl.")
    parser.add_argument("predictions", help="the file to score")
    parser.add_argument("--output", help="results as JSON, with a Markdown table beside it")
    parser.add_argument("--finding_names", nargs="+", metavar="NAME", help="findings that count; default: CT-RATE's 18")
    parser.add_argument("--labeller", default="rules", help="rules, radbert, or a path of RadBertClassifier.pth")
    parser.add_argument("--bertscore_model", help="Hub id or folder of the model for BERTScore")
    parser.add_argument("--bertscore_layers", type=int, help="layer of it that is compared, where bert-score has none")
    parser.add_argument("--device", help="for BERTScore and RadBERT, e.g. cuda")
    parser.add_argument(
        "--radeval", nargs="+", default=(), choices=RADEVAL_METRICS, help="metrics of the library RadEval"
    )
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="0: no intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled baseline and of the test of two systems")
    parser.add_argument("--no_baselines", dest="baselines", action="store_false", help="leave the baselines out")
    parser.add_argument(
        "--metadata", help="CT-RATE's metadata CSV: a table of subgroups by sex, age, scanner and kernel"
    )
    parser.add_argument("--exclusions", help="failures.jsonl of the run; default: the one beside the predictions")
    parser.add_argument("--against", metavar="FILE", help="another system's predictions: test the differences instead")
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS, help="of the test of two systems")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = vars(parser.parse_args(argv))
    predictions, output, against = (options.pop(name) for name in ("predictions", "output", "against"))
    permutations = options.pop("permutations")
    if against and (options["metadata"] or options["exclusions"]):
        parser.error("--metadata and --exclusions have no meaning with --against")
    try:
        if against:
            shared = ("finding_names", "labeller", "bertscore_model", "bertscore_layers", "radeval", "device", "seed")
            chosen = {name: options[name] for name in shared}
            results = compare_predictions(against, predictions, permutations=permutations, **chosen)
            table = comparison_table(results, (against, predictions))
        else:
            results = score_predictions(predictions, **options)
            table = results_table(results)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"scoring: {error}")
    if output:
        _write(results, table, output)
    sys.stdout.write(table)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    main()
