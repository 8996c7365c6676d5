"""Patient-level confidence intervals: jackknife, exact at a metric's bounds, and bootstrap percentiles for comparison."""

import importlib
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from samf.evaluation.metrics.sampled_metric import PatientSums, SampledMetric
from samf.evaluation.schema import Interval, Intervals

RESAMPLES = 1000
LEVEL = 0.95
# Resamples or permutations computed at once: bounds memory to this number times the number of patients.
_CHUNK = 250
# An interval needs a defined value in at least this share of the resamples.
_DEFINED_SHARE = 0.5
# Written to results.json.
INTERVAL_METHOD = (
    "jackknife over patients, Student's t on the logit scale; exact (Clopper-Pearson) at a metric's bounds"
)
# Tolerance for "at a bound", and for "unchanged when a patient is left out".
AT_BOUND = 1e-12
# A metric that reads 1.000 or 0.000 gets at least the interval that it would have at the bound (shares of the range).
_NEAR_BOUND = 5e-4


def patient_intervals(
    metrics: Mapping[str, SampledMetric], patients: Sequence[Hashable], *, level: float = LEVEL
) -> Intervals:
    """Return intervals [low, high] of each metric over patients.

    A jackknife over patients gives the standard error; Student's t gives its multiple, with as many degrees of freedom as
    the patients' influences allow. The interval is symmetric on the logit scale of the metric's bounds and never leaves
    them. At a bound, where all patients are right or all are wrong, the error can't be estimated: the interval is then the
    exact one (Clopper-Pearson) for as many trials as the metric depends on patients (see `patient_counts`).

    Args:
        metrics: name → metric.
        patients: patient of each sample, (N,).
        level: confidence level.

    Returns:
        Name → [low, high]; None for a single patient, for an undefined metric, and where leaving out any patient gives the
        same value within the bounds, so that its spread is unknown.

    Raises:
        ValueError: a metric has another number of samples than `patients` has entries.
    """
    sums = PatientSums(patients, list(metrics.values()))
    if sums.count < 2:
        return dict.fromkeys(metrics)
    return {name: _patient_interval(metric, sums.of(metric), level) for name, metric in metrics.items()}


def patient_counts(metrics: Mapping[str, SampledMetric], patients: Sequence[Hashable]) -> dict[str, int]:
    """Return how many patients each metric depends on: name → n.

    A patient counts if the metric is defined for this patient only, or changes when the patient is left out. For a
    finding's F1 these are the patients who have it in a report or its reference; for a mean, all.
    """
    sums = PatientSums(patients, list(metrics.values()))
    counts = {}
    for name, metric in metrics.items():
        by_patient = sums.of(metric)
        total = by_patient.sum(axis=0)
        changed = changes(metric.combine(total - by_patient), float(metric.combine(total)))
        counts[name] = int((np.isfinite(metric.combine(by_patient)) | changed).sum())
    return counts


def changes(without: np.ndarray, value: float) -> np.ndarray:
    """Return which patients change a metric's `value`, (P,), from its values without each of them, (P,)."""
    if not np.isfinite(value):
        return np.zeros(len(without), dtype=bool)
    return ~np.isfinite(without) | (np.abs(without - value) > AT_BOUND)


def _patient_interval(metric: SampledMetric, sums: np.ndarray, level: float) -> Interval:
    """Return the interval of one metric from the patients' sums (P, K)."""
    total = sums.sum(axis=0)
    value, without = float(metric.combine(total)), metric.combine(total - sums)  # (P,)
    if not np.isfinite(value):
        return None
    informative = int((np.isfinite(metric.combine(sums)) | changes(without, value)).sum())
    low, high = metric.bounds or (-np.inf, np.inf)
    share = (value - low) / (high - low) if metric.bounds else np.nan
    near = min(abs(share), abs(1 - share)) < _NEAR_BOUND
    exact = exact_interval(share > 0.5, informative, level, (low, high)) if near else None
    spread = jackknife(without, informative)
    if spread is None or (near and not AT_BOUND < share < 1 - AT_BOUND):
        return exact
    error, freedom = spread
    width = float(student_t.ppf((1 + level) / 2, freedom)) * error
    if not 0 < share < 1:  # no bounds, or values outside them
        return [value - width, value + width]
    place, width = np.log(share / (1 - share)), width / (high - low) / (share * (1 - share))
    interval = [float(low + (high - low) * _logistic(place + sign * width)) for sign in (-1, 1)]
    return interval if exact is None else [min(interval[0], exact[0]), max(interval[1], exact[1])]


def exact_interval(at_highest: bool, count: int, level: float, bounds: tuple[float, float]) -> Interval:
    """Return Clopper-Pearson's interval where all, or none, of the trials succeed.

    Args:
        at_highest: whether all trials succeed; otherwise none does.
        count: number of trials.
        level: confidence level.
        bounds: lowest and highest possible value of the metric.

    Returns:
        [low, high] on the scale of `bounds`; None without a trial.
    """
    if not count:
        return None
    low, high = bounds
    reach = (high - low) * ((1 - level) / 2) ** (1 / count)
    return [float(low + reach), float(high)] if at_highest else [float(low), float(high - reach)]


def jackknife(without: np.ndarray, informative: int) -> tuple[float, float] | None:
    """Return the jackknife's standard error and degrees of freedom.

    The degrees of freedom are Satterthwaite's: fewer where the error comes from few patients. They are kept between half of
    and all that `informative` patients have, because the fourth moment of few values is unreliable.

    Args:
        without: a metric's values without each patient, (P,).
        informative: number of patients that the metric depends on.

    Returns:
        (error, freedom); None where the values have no spread.
    """
    without = without[np.isfinite(without)]
    deviations = without - without.mean() if len(without) else without
    square = float((deviations**2).sum())
    if informative < 2 or square <= len(without) * AT_BOUND**2:
        return None
    kurtosis = len(deviations) * float((deviations**4).sum()) / square**2
    freedom = 2 * len(deviations) / max(kurtosis - 1, AT_BOUND)
    most = informative - 1
    freedom = max(1.0, min(max(freedom, most / 2), most))
    return float(np.sqrt(square * (len(deviations) - 1) / len(deviations))), freedom


def _logistic(x: float) -> float:
    return float(0.5 * (1 + np.tanh(x / 2)))


# --- Resampling -----------------------------------------------------------------------------------------------------


def chunk_sizes(total: int) -> Iterator[int]:
    """Yield the sizes of the chunks in which `total` resamples are computed."""
    yield from (min(_CHUNK, total - start) for start in range(0, total, _CHUNK))


def bootstrap_values(
    metrics: Mapping[str, SampledMetric], patients: Sequence[Hashable], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return each metric in resamples of the patients, drawn with replacement; all metrics see the same draws.

    Args:
        metrics: name → metric.
        patients: patient of each sample, (N,).
        resamples: number of draws R, each of as many patients as there are.
        seed: of the draws.

    Returns:
        Name → (R,).

    Raises:
        ValueError: a metric has another number of samples than `patients` has entries.
    """
    groups = PatientSums(patients, list(metrics.values()))
    sums = groups.by_name(metrics)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for size in chunk_sizes(resamples):
        chances = np.full(groups.count, 1 / groups.count)
        weights = rng.multinomial(groups.count, chances, size=size).astype(np.float64)  # (r, P)
        for name, metric in metrics.items():
            drawn[name].append(metric.combine(weights @ sums[name]))
    return {name: np.concatenate(values) for name, values in drawn.items()}


def bootstrap_intervals(
    metrics: Mapping[str, SampledMetric],
    patients: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Intervals:
    """Return percentile intervals [low, high] of each metric over resampled patients.

    For comparison only: they are too narrow for up to some 200 patients (see `meta_evaluation coverage`); results use
    `patient_intervals`.

    Args:
        metrics: name → metric.
        patients: patient of each sample, (N,).
        resamples: number of draws.
        level: confidence level.
        seed: of the draws.

    Returns:
        Name → [low, high]; None for a single patient, without draws, and for a metric that is undefined in more than half of
        them.
    """
    if len(set(patients)) < 2 or not resamples:
        return dict.fromkeys(metrics)
    drawn = bootstrap_values(metrics, patients, resamples=resamples, seed=seed)
    return {name: _percentile_interval(values, level) for name, values in drawn.items()}


def _percentile_interval(values: np.ndarray, level: float) -> Interval:
    defined = values[np.isfinite(values)]
    if not len(defined) or len(defined) < _DEFINED_SHARE * len(values):
        return None
    return [float(bound) for bound in np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])]


# --- Names that were in this module -----------------------------------------------------------------------------------

_MOVED = {
    "sampled_metric": ("divide", "patient_keys", "ratio", "unknown_patients"),
    "significance": ("paired_randomisation",),
    "baselines": ("constant_reports", "exchanged_reports", "nearest_prior_reports"),
    "template_collapse": ("template_collapse",),
    "subgroups": ("AGE_BANDS", "SMALL_GROUPS", "SUBGROUP_COLUMNS", "UNKNOWN", "read_subgroups", "subgroup_table"),
}


def __getattr__(name: str) -> Any:
    """Return what has moved to another module, with a warning; kept for one release."""
    for module, names in _MOVED.items():
        if name in names:
            home = f"{__package__}.{module}"
            warnings.warn(f"{name} is now in {home}; the old place will go.", FutureWarning, stacklevel=2)
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
