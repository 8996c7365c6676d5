"""Score baselines that read no image, and look for template collapse."""

from collections import Counter
from collections.abc import Sequence
from string import ascii_lowercase

from samf.data.schema import Task
from samf.evaluation.metric_samples import MetricSampler, choice_samples, option_lists, select_group, texts_of
from samf.evaluation.metrics.baselines import constant_reports, exchanged_reports, nearest_prior_reports
from samf.evaluation.metrics.clinical_metrics import PRECISION_RECALL_F1, chance_findings
from samf.evaluation.metrics.multiple_choice import reference_choice, score_multiple_choice
from samf.evaluation.metrics.template_collapse import template_collapse
from samf.evaluation.metrics.text_metrics import TEXT_METRICS, describe_text, text_samples
from samf.evaluation.schema import (
    BaselineScores,
    ChoiceBaseline,
    CollapsePair,
    FindingValues,
    PrecisionRecallF1,
    PredictionRow,
)

__all__ = ["collapse_of", "score_baselines"]

Baselines = dict[str, BaselineScores | ChoiceBaseline]


def score_baselines(
    task: Task, rows: Sequence[PredictionRow], patients: Sequence[str], sampler: MetricSampler
) -> Baselines:
    """Return the scores of a task's baselines by name.

    Args:
        task: the task of all rows.
        rows: rows with a reference.
        patients: the patient of each row.
        sampler: the metrics to compute.
    """
    predictions, references = texts_of(rows)
    if task == "report":
        return _report_baselines(predictions, references, patients, sampler)
    if task == "multiple_choice":
        return _choice_baselines(rows, patients, sampler)
    constant = constant_reports(references, patients)
    return {"constant_answer": _score_texts(constant, references, patients, sampler)}


def collapse_of(rows: Sequence[PredictionRow]) -> CollapsePair:
    """Return the signs of template collapse in the predictions and in the references of rows."""
    predictions, references = texts_of(rows)
    return {"predictions": template_collapse(predictions), "references": template_collapse(references)}


def _report_baselines(
    predictions: Sequence[str], references: Sequence[str], patients: Sequence[str], sampler: MetricSampler
) -> Baselines:
    """Return the baselines of reports.

    BERTScore, the most expensive metric, is computed for the constant report only, where it shows how high its floor is.
    Chance is an expected value and has no interval.
    """
    constant = constant_reports(references, patients)
    scored: Baselines = {
        "constant_report": _score_reports(constant, references, patients, sampler, with_bertscore=True)
    }
    if len(set(patients)) > 1:
        labels = sampler.labeller(references)
        nearest = nearest_prior_reports(references, labels, patients)
        scored["nearest_label_prior"] = _score_reports(nearest, references, patients, sampler)
        exchanged = exchanged_reports(predictions, patients, sampler.options.seed)
        scored["shuffled"] = _score_reports(exchanged, references, patients, sampler)
    chance = chance_findings(references, sampler.options.findings, sampler.labeller)
    scored["chance"] = {"text": dict.fromkeys(TEXT_METRICS), "findings": chance}
    return scored


def _score_texts(
    texts: Sequence[str],
    references: Sequence[str],
    patients: Sequence[str],
    sampler: MetricSampler,
    *,
    with_bertscore: bool = False,
) -> BaselineScores:
    metrics = text_samples(texts, references)
    if with_bertscore:
        metrics |= sampler.bertscore_samples(texts, references)
    samples = {f"text.{name}": metric for name, metric in metrics.items()}
    text = describe_text(texts, references, select_group(samples, "text"))["scores"]
    return {"text": text, "intervals": sampler.intervals(samples, patients)}


def _score_reports(
    texts: Sequence[str],
    references: Sequence[str],
    patients: Sequence[str],
    sampler: MetricSampler,
    *,
    with_bertscore: bool = False,
) -> BaselineScores:
    scores = _score_texts(texts, references, patients, sampler, with_bertscore=with_bertscore)
    found = sampler.finding_samples(texts, references)

    def values(group: str) -> PrecisionRecallF1:
        precision, recall, f1 = (found[f"{group}.{name}"].value() for name in PRECISION_RECALL_F1)
        return {"precision": precision, "recall": recall, "f1": f1}

    findings: FindingValues = {
        "macro": values("macro"),
        "micro": values("micro"),
        "sides": values("sides"),
        "sizes": values("sizes"),
        "crg": found["crg"].value(),
    }
    shown = {f"findings.{name}": metric for name, metric in found.items() if name.partition(".")[0] in findings}
    intervals = scores["intervals"] | sampler.intervals(shown, patients)
    return {"text": scores["text"], "findings": findings, "intervals": intervals}


def _choice_baselines(rows: Sequence[PredictionRow], patients: Sequence[str], sampler: MetricSampler) -> Baselines:
    """Return the scores of always naming the letter that is most often right, and of guessing."""
    _, references = texts_of(rows)
    choices = option_lists(rows)
    positions = [reference_choice(*pair) for pair in zip(references, choices, strict=True)]
    letters = Counter(right for right in positions if right is not None)
    if not letters:
        return {}
    letter = ascii_lowercase[letters.most_common(1)[0][0]]
    constant = [f"({letter})"] * len(rows)
    scores = score_multiple_choice(constant, references, choices)
    return {
        "most_frequent_letter": {
            "letter": letter,
            "accuracy": scores["accuracy"],
            "precision": scores["precision"],
            "recall": scores["recall"],
            "f1": scores["f1"],
            "intervals": sampler.intervals(choice_samples(constant, references, choices), patients),
        },
        "chance": {"accuracy": scores["chance"]},
    }
