"""Paired significance tests of two systems that answered the same questions."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.stats import t as student_t

from samf.evaluation.metrics.bootstrap import (
    AT_BOUND,
    LEVEL,
    RESAMPLES,
    changes,
    chunk_sizes,
    exact_interval,
    jackknife,
    patient_counts,
)
from samf.evaluation.metrics.sampled_metric import PatientSums, SampledMetric, finite_or_none
from samf.evaluation.schema import Difference, Interval

# Tolerance within which two differences count as equal.
_TIE = 1e-12


def paired_randomisation(
    first: Mapping[str, SampledMetric],
    second: Mapping[str, SampledMetric],
    patients: Sequence[Hashable],
    *,
    resamples: int = 10 * RESAMPLES,
    seed: int = 0,
) -> dict[str, Difference]:
    """Test whether two systems differ on the same samples: approximate randomisation over patients, two-sided.

    Each permutation swaps every patient's answers between the systems with probability 1/2. The p-value is
    (1 + permutations that differ at least as much) / (1 + permutations).

    Args:
        first: name → metric of the first system.
        second: the same of the second system; its samples are the same questions in the same order.
        patients: patient of each sample, (N,).
        resamples: number of permutations.
        seed: of the permutations.

    Returns:
        Name → test, for each name that both systems have.

    Raises:
        ValueError: a metric has another number of samples than `patients` has entries.
    """
    names = [name for name in first if name in second]
    groups = PatientSums(patients, [metrics[name] for metrics in (first, second) for name in names])
    a = {name: groups.of(first[name]) for name in names}
    b = {name: groups.of(second[name]) for name in names}
    observed = {name: _difference(first[name], a[name].sum(0), b[name].sum(0)) for name in names}
    exceeding = dict.fromkeys(names, 0)
    rng = np.random.default_rng(seed)
    for size in chunk_sizes(resamples):
        swapped = rng.integers(0, 2, size=(size, groups.count)).astype(np.float64)  # (r, P)
        for name in names:
            moved = swapped @ (b[name] - a[name])
            difference = _difference(first[name], a[name].sum(0) + moved, b[name].sum(0) - moved)
            # Not "greater": a permutation whose difference is undefined counts against a difference too.
            exceeding[name] += int(np.sum(~(np.abs(difference) < np.abs(observed[name]) - _TIE)))
    counts = [patient_counts({name: system[name] for name in names}, patients) for system in (first, second)]
    return {
        name: {
            "first": first[name].value(),
            "second": second[name].value(),
            "difference": finite_or_none(observed[name]),
            "interval": _difference_interval(first[name], a[name], b[name]),
            "n": max(system[name] for system in counts),
            "p_value": (1 + exceeding[name]) / (1 + resamples) if np.isfinite(observed[name]) else None,
        }
        for name in names
    }


def _difference(metric: SampledMetric, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return metric.combine(second) - metric.combine(first)


def _difference_interval(metric: SampledMetric, a: np.ndarray, b: np.ndarray) -> Interval:
    """Return the interval of second - first from both systems' sums by patient (P, K), leaving out the same patients.

    Exact, as in `patient_intervals`, where one system has the highest and the other the lowest possible value. None where
    no patient changes the difference.
    """
    value = float(_difference(metric, a.sum(0), b.sum(0)))
    without = _difference(metric, a.sum(0) - a, b.sum(0) - b)
    if not np.isfinite(value):
        return None
    reach = metric.bounds[1] - metric.bounds[0] if metric.bounds else np.inf
    if abs(abs(value) - reach) < AT_BOUND:
        informative = int(np.isfinite(_difference(metric, a, b)).sum())
        interval = exact_interval(True, max(informative, 1), LEVEL, (0.0, reach))
        return interval if interval is None or value > 0 else [-interval[1], -interval[0]]
    spread = jackknife(without, int(changes(without, value).sum()))
    if spread is None:
        return None
    width = float(student_t.ppf((1 + LEVEL) / 2, spread[1])) * spread[0]
    return [value - width, value + width]
