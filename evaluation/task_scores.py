"""Score the rows of one task: text, findings or multiple choice, intervals, baselines and subgroups."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from samf.data.schema import Task
from samf.evaluation.baseline_scores import collapse_of, score_baselines
from samf.evaluation.metric_samples import MetricSampler, Samples, option_lists, select_group, texts_of
from samf.evaluation.metrics.bootstrap import patient_counts
from samf.evaluation.metrics.clinical_metrics import CRG_REMEDY, MACRO_REMEDY, MICRO_REMEDY, describe_findings
from samf.evaluation.metrics.multiple_choice import score_multiple_choice
from samf.evaluation.metrics.sampled_metric import patient_keys
from samf.evaluation.metrics.subgroups import read_subgroups, subgroup_table
from samf.evaluation.metrics.text_metrics import describe_text
from samf.evaluation.schema import ChoiceScores, FindingScores, PredictionRow, SubgroupRow, TaskScores

__all__ = ["ScoredTask", "score_task"]

# Metrics in the table of subgroups, by task.
_SUBGROUP_METRICS: dict[Task, tuple[str, ...]] = {
    "report": ("text.bleu_4", "text.rouge_l", "findings.macro.f1", "findings.micro.f1", "findings.crg"),
    "multiple_choice": ("multiple_choice.accuracy", "multiple_choice.f1"),
}


class _OwnScores(TypedDict, total=False):
    findings: FindingScores
    radeval: dict[str, float | None]
    multiple_choice: ChoiceScores


@dataclass(frozen=True)
class ScoredTask:
    """The scores of a task, and what to know about them.

    Attributes:
        scores: the entry of results.json.
        not_available: metric → why it has no value, and the remedy.
        notes: metric → caveat.
    """

    scores: TaskScores
    not_available: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def score_task(task: Task, rows: Sequence[PredictionRow], sampler: MetricSampler) -> ScoredTask:
    """Score the rows of one task.

    Args:
        task: the task of all rows.
        rows: rows with a reference, at least one.
        sampler: the metrics to compute.
    """
    predictions, references = texts_of(rows)
    patients = patient_keys(rows)
    samples = sampler.task_samples(task, rows)
    text = describe_text(predictions, references, select_group(samples, "text"))
    scores: TaskScores = {
        "count": len(rows),
        "empty": text["empty_predictions"],
        "truncated": sum(bool(row.get("truncated")) for row in rows),
        "patients": len(set(patients)),
        "text": text["scores"],
        **_own_scores(task, rows, samples, sampler),  # type: ignore[typeddict-item]  # optional keys
        "intervals": sampler.intervals(samples, patients),
        "n": patient_counts(samples, patients),
    }
    if sampler.options.baselines:
        scores["baselines"] = score_baselines(task, rows, patients, sampler)
        if task == "report":
            scores["collapse"] = collapse_of(rows)
    if sampler.options.metadata is not None and task in _SUBGROUP_METRICS:
        scores["subgroups"] = _subgroups(task, rows, samples, sampler)
    undefined = _undefined_findings(scores["findings"]) if "findings" in scores else {}
    return ScoredTask(scores, {**text["not_available"], **undefined, **sampler.failed}, text["notes"])


def _own_scores(task: Task, rows: Sequence[PredictionRow], samples: Samples, sampler: MetricSampler) -> _OwnScores:
    """Return the scores that other tasks don't have."""
    own: _OwnScores = {}
    if task == "report":
        own["findings"] = describe_findings(select_group(samples, "findings"), sampler.options.findings)
        if sampler.options.radeval:
            own["radeval"] = {name: metric.value() for name, metric in select_group(samples, "radeval").items()}
    if task == "multiple_choice":
        own["multiple_choice"] = score_multiple_choice(*texts_of(rows), option_lists(rows))
    return own


def _subgroups(
    task: Task, rows: Sequence[PredictionRow], samples: Samples, sampler: MetricSampler
) -> list[SubgroupRow]:
    chosen = {name: samples[name] for name in _SUBGROUP_METRICS[task]}
    groups = read_subgroups(sampler.options.metadata or "", rows)
    return subgroup_table(chosen, patient_keys(rows), groups, intervals=sampler.options.resamples > 0)


def _undefined_findings(findings: FindingScores) -> dict[str, str]:
    """Return why each metric over all findings that has no value has none."""
    undefined = {
        "crg": (findings["crg"] is None, CRG_REMEDY),
        "macro": (not findings["macro_findings"], MACRO_REMEDY),
        "micro": (findings["micro"]["f1"] is None, MICRO_REMEDY),
    }
    return {name: reason for name, (is_undefined, reason) in undefined.items() if is_undefined}
