"""Compute the metrics of one task by sample, from which scores, intervals and paired tests are derived."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from samf.data.schema import Task
from samf.evaluation.metrics.bertscore import BERTSCORE_NAMES
from samf.evaluation.metrics.bootstrap import patient_intervals
from samf.evaluation.metrics.clinical_metrics import confusion_counts, finding_samples, macro_metrics
from samf.evaluation.metrics.multiple_choice import parse_choice, reference_choice
from samf.evaluation.metrics.radeval_metrics import RADEVAL_METRICS, radeval_samples
from samf.evaluation.metrics.sampled_metric import SampledMetric, ratio
from samf.evaluation.metrics.text_metrics import bertscore_samples, text_samples
from samf.evaluation.schema import Intervals, PredictionRow
from samf.evaluation.scoring_options import ScoringOptions

__all__ = ["MetricSampler", "choice_samples", "option_lists", "select_group", "texts_of"]

logger = logging.getLogger(__name__)

Samples = dict[str, SampledMetric]


class MetricSampler:
    """All metrics that the options of a run ask for.

    Attributes:
        options: the options of scoring.
        labeller: the labeller of reports; its weights are loaded once.
        failed: metric → why it could not be computed. What has failed once is not computed again.
    """

    def __init__(self, options: ScoringOptions):
        self.options = options
        self.labeller = options.build_labeller()
        self.failed: dict[str, str] = {}

    def task_samples(self, task: Task, rows: Sequence[PredictionRow]) -> Samples:
        """Return every metric of a task by sample: "text.bleu_4", "findings.macro.f1", "multiple_choice.accuracy", …"""
        predictions, references = texts_of(rows)
        groups = {"text": {**text_samples(predictions, references), **self.bertscore_samples(predictions, references)}}
        if task == "report":
            groups["findings"] = self.finding_samples(predictions, references)
            groups["radeval"] = self.radeval_samples(predictions, references)
        if task == "multiple_choice":
            groups["multiple_choice"] = choice_samples(predictions, references, option_lists(rows))
        return {f"{group}.{name}": metric for group, metrics in groups.items() for name, metric in metrics.items()}

    def finding_samples(self, predictions: Sequence[str], references: Sequence[str]) -> Samples:
        """Return the finding metrics of reports by sample."""
        return finding_samples(predictions, references, self.options.findings, self.labeller)

    def bertscore_samples(self, predictions: Sequence[str], references: Sequence[str]) -> Samples:
        """Return BERTScore by sample; nothing without a model, or with one that fails."""
        model = self.options.bertscore_model
        if model is None:
            return {}
        return self._unless_it_fails(
            BERTSCORE_NAMES,
            lambda: bertscore_samples(
                predictions,
                references,
                bertscore_model=model,
                bertscore_layers=self.options.bertscore_layers,
                device=self.options.device,
            ),
        )

    def radeval_samples(self, predictions: Sequence[str], references: Sequence[str]) -> Samples:
        """Return the chosen metrics of the library RadEval by sample, without those that fail."""
        samples: Samples = {}
        for name in self.options.radeval:
            compute = partial(radeval_samples, predictions, references, [name])
            samples |= self._unless_it_fails(RADEVAL_METRICS[name], compute)
        return samples

    def intervals(self, samples: Mapping[str, SampledMetric], patients: Sequence[str]) -> Intervals:
        """Return the interval of each metric over patients; None for all of them where no intervals are asked for."""
        return patient_intervals(samples, patients) if self.options.resamples else dict.fromkeys(samples)

    def _unless_it_fails(self, names: Sequence[str], compute: Callable[[], Samples]) -> Samples:
        """Return what `compute` returns; if it fails, now or before, return nothing and note the reason for each name."""
        if any(name in self.failed for name in names):
            return {}
        try:
            return compute()
        except Exception as error:  # other projects' models fail in any way; the other scores must not be lost
            logger.warning("%s: left out, since its library or model failed.", ", ".join(names), exc_info=error)
            reason = next(iter(str(error).splitlines()), "")
            self.failed.update(dict.fromkeys(names, f"It failed with {type(error).__name__}: {reason}"))
            return {}


def texts_of(rows: Sequence[PredictionRow]) -> tuple[list[str], list[str]]:
    """Return the predictions and the references of rows."""
    return [row["prediction"] for row in rows], [row["reference"] for row in rows]


def option_lists(rows: Sequence[PredictionRow]) -> list[list[str]]:
    """Return the options of each multiple-choice row."""
    return [row["choices"] or [] for row in rows]


def select_group(samples: Mapping[str, SampledMetric], group: str) -> Samples:
    """Return the metrics of one group, without its name: "text.bleu_4" as "bleu_4"."""
    return {name.removeprefix(f"{group}."): m for name, m in samples.items() if name.startswith(f"{group}.")}


def choice_samples(
    predictions: Sequence[str], references: Sequence[str], choices: Sequence[Sequence[str]]
) -> dict[str, SampledMetric]:
    """Return accuracy, precision, recall and F1 of `score_multiple_choice` by question.

    Args:
        predictions: the answers, in words.
        references: the right options; a question whose reference names no option doesn't count.
        choices: the options of each question.
    """
    positions = [
        (reference_choice(reference, options), parse_choice(prediction, options))
        for prediction, reference, options in zip(predictions, references, choices, strict=True)
    ]
    letters = max(map(len, choices))
    truth, named = np.zeros((2, len(positions), letters), dtype=np.int64)  # (N, L) each
    for row, (right, answer) in enumerate(positions):
        if right is not None:
            truth[row, right] = 1
            if answer is not None:
                named[row, answer] = 1
    hits = np.stack([(truth & named).sum(axis=1), truth.sum(axis=1)], axis=-1).astype(np.float64)
    return {"accuracy": SampledMetric(hits, ratio), **macro_metrics(confusion_counts(truth, named))}
