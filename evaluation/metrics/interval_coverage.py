"""Coverage of 95 % intervals in simulated cohorts with known true values.

A cohort has reports with the 18 findings at CT-RATE's frequencies, read by a system that finds some and invents others;
texts whose n-grams overlap as those of reports do; and questions that are answered correctly with a given probability.
Patients have one to three reports and differ in severity and in how well the system does on them, so that reports of one
patient are correlated in every metric.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm

from samf.evaluation.markdown import format_value, markdown_table
from samf.evaluation.metrics.bootstrap import bootstrap_intervals, patient_intervals
from samf.evaluation.metrics.clinical_metrics import confusion_counts, crg_metric, macro_metrics, micro_metrics
from samf.evaluation.metrics.sampled_metric import SampledMetric
from samf.evaluation.metrics.text_metrics import ORDERS, combine_bleu

SIZES = (20, 50, 200, 1000)  # patients of a cohort
COHORTS = 2000
# Positives of CT-RATE's 18 labels among its 200 labelled reports, in the order of CT_RATE_LABELS.
LABEL_FREQUENCIES = np.array([34, 66, 25, 14, 44, 28, 65, 56, 57, 83, 67, 71, 33, 23, 24, 35, 23, 15]) / 200
# The system: sensitivity by label, false alarms as a share of the label's frequency, and differences between patients.
_SENSITIVITIES = np.linspace(0.35, 0.75, len(LABEL_FREQUENCIES))
_FALSE_ALARMS = 0.4 * LABEL_FREQUENCIES
_SKILL_SPREAD, _ALARM_SPREAD = 0.7, 0.5  # standard deviations between patients, of logits
_SEVERITY, _OWN_REPORT = 0.25, 0.15  # shares of a finding's variance: of the patient's severity, of the single report
# Texts: words of a reference (median, spread of logarithms), of a prediction relative to it, shared n-grams by order.
_WORDS, _WORDS_SPREAD, _LENGTH, _LENGTH_SPREAD = 200, 0.45, 0.88, 0.25
_SHARED, _SHARED_MORE = np.array([0.30, 0.12, 0.06, 0.03]), np.array([0.35, 0.35, 0.30, 0.27])
_LIKENESS_SPREAD = 0.6
ACCURACIES = (0.6, 0.92)  # of multiple choice: a typical one, and the paper's
_CHANCE_SIZE = 4.0  # of the beta distribution of a patient's probability: smaller = patients differ more
_POPULATION, _POPULATIONS = 10_000, 20  # patients from which the true values are computed, and how often

Cohort = dict[str, SampledMetric]
METRICS = ("macro-F1", "micro-F1", "CRG", "BLEU-4", *(f"accuracy {accuracy:g}" for accuracy in ACCURACIES))


def simulated_cohort(rng: np.random.Generator, patients: int) -> tuple[Cohort, np.ndarray]:
    """Return a simulated cohort.

    Args:
        rng: source of randomness.
        patients: number of patients.

    Returns:
        Name, of `METRICS`, → metric; and the patient of each sample, (N,).
    """
    owners = np.repeat(np.arange(patients), rng.integers(1, 4, patients))  # (N,)
    truth, found = _simulated_findings(rng, patients, owners)
    counts = confusion_counts(truth, found)
    metrics = {
        "macro-F1": macro_metrics(counts)["f1"],
        "micro-F1": micro_metrics(counts)["f1"],
        "CRG": crg_metric(truth, found),
        "BLEU-4": _simulated_bleu(rng, patients, owners),
    }
    for accuracy in ACCURACIES:
        chances = rng.beta(accuracy * _CHANCE_SIZE, (1 - accuracy) * _CHANCE_SIZE, patients)[owners]
        metrics[f"accuracy {accuracy:g}"] = SampledMetric.mean(rng.random(len(owners)) < chances)
    return metrics, owners


def _simulated_findings(rng: np.random.Generator, patients: int, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return true and found findings, (N, 18) each; a patient's reports share severity and most findings."""
    labels = len(LABEL_FREQUENCIES)
    severity, own = rng.normal(size=(patients, 1)), rng.normal(size=(patients, labels))
    lasting = 1 - _SEVERITY - _OWN_REPORT
    latent = (np.sqrt(_SEVERITY) * severity + np.sqrt(lasting) * own)[owners]
    latent += np.sqrt(_OWN_REPORT) * rng.normal(size=latent.shape)
    truth = latent < norm.ppf(LABEL_FREQUENCIES)
    skill = _SKILL_SPREAD * rng.normal(size=patients)[owners, None]
    alarm = _ALARM_SPREAD * rng.normal(size=patients)[owners, None]
    chance = np.where(truth, expit(logit(_SENSITIVITIES) + skill), expit(logit(_FALSE_ALARMS) + alarm))
    return truth, rng.random(truth.shape) < chance


def _simulated_bleu(rng: np.random.Generator, patients: int, owners: np.ndarray) -> SampledMetric:
    """Return pooled BLEU-4 of texts of simulated lengths with binomial numbers of shared n-grams."""
    typical = rng.lognormal(np.log(_WORDS), _WORDS_SPREAD, patients)[owners]
    expected = np.maximum(20, typical * rng.lognormal(0, 0.05, len(owners))).astype(int)
    words = np.maximum(15, expected * rng.lognormal(np.log(_LENGTH), _LENGTH_SPREAD, len(owners))).astype(int)
    likeness = expit(_LIKENESS_SPREAD * rng.normal(size=patients)[owners] + 0.1 * rng.normal(size=len(owners)))
    totals = np.stack([words - order + 1 for order in ORDERS], axis=1)
    shared = rng.binomial(totals, _SHARED + _SHARED_MORE * likeness[:, None])
    counts = np.concatenate([words[:, None], expected[:, None], shared, totals], axis=1).astype(np.float64)
    return SampledMetric(counts, partial(combine_bleu, order=4))


def true_values(seed: int = 99) -> dict[str, float]:
    """Return the values of the metrics in the population that cohorts are drawn from: name → value."""
    rng = np.random.default_rng(seed)
    sums = dict.fromkeys(METRICS, np.zeros(1))
    for _ in range(_POPULATIONS):
        cohort, _ = simulated_cohort(rng, _POPULATION)
        sums = {name: sums[name] + metric.samples.sum(axis=0) for name, metric in cohort.items()}
    return {name: float(metric.combine(sums[name])) for name, metric in cohort.items()}


Method = Literal["jackknife", "bootstrap percentiles"]
Intervals = Callable[[Mapping[str, SampledMetric], Sequence[Hashable]], Mapping[str, Sequence[float] | None]]


def coverage_by_metric(
    truths: Mapping[str, float],
    patients: int,
    cohorts: int,
    *,
    intervals: Intervals = patient_intervals,
    seed: int = 1,
) -> dict[str, tuple[float, float]]:
    """Return how often intervals contain the true value, and their mean width: name → (share, width).

    Args:
        truths: what `true_values` returns.
        patients: patients per cohort.
        cohorts: number of cohorts.
        intervals: the method; a cohort without an interval counts as a miss.
        seed: of the cohorts.
    """
    rng = np.random.default_rng([seed, patients])
    held: dict[str, list[bool]] = {name: [] for name in truths}
    widths: dict[str, list[float]] = {name: [] for name in truths}
    for _ in range(cohorts):
        cohort, owners = simulated_cohort(rng, patients)
        for name, bounds in intervals(cohort, owners.tolist()).items():
            held[name].append(bounds is not None and bounds[0] <= truths[name] <= bounds[1])
            widths[name].append(np.nan if bounds is None else bounds[1] - bounds[0])
    return {name: (float(np.mean(held[name])), float(np.nanmean(widths[name]))) for name in truths}


METHODS: dict[Method, Intervals] = {"jackknife": patient_intervals, "bootstrap percentiles": bootstrap_intervals}


def coverage_table(sizes: Sequence[int] = SIZES, cohorts: int = COHORTS, method: Method = "jackknife") -> str:
    """Return the coverage of 95 % intervals, and in parentheses their mean width, as Markdown with one row per metric.

    Args:
        sizes: patients per cohort; one column each.
        cohorts: number of cohorts per column.
        method: how intervals are computed.
    """
    truths = true_values()
    found = {size: coverage_by_metric(truths, size, cohorts, intervals=METHODS[method]) for size in sizes}
    rows = [
        [name, format_value(truth), *(f"{found[size][name][0]:.3f} ({found[size][name][1]:.3f})" for size in sizes)]
        for name, truth in truths.items()
    ]
    header = [f"{method}, {cohorts} cohorts", "true value", *(f"{size} patients" for size in sizes)]
    return markdown_table(header, rows)
