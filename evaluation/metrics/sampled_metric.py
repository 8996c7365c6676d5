"""Metrics that are functions of sums over samples, and their sums by patient.

A mean, corpus BLEU (n-gram counts) and F1 (confusion counts) are all such functions. Resampling, leaving a patient out and
permuting two systems are then arithmetic on the patients' sums; no text is read again.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from samf.data.patients import named_patient
from samf.evaluation.schema import PredictionRow


@dataclass(frozen=True)
class SampledMetric:
    """A metric that depends on its samples only through sums of their sufficient statistics.

    Attributes:
        samples: sufficient statistics of each sample, (N, K).
        combine: sums (…, K) → values (…), NaN where the metric is undefined.
        bounds: lowest and highest possible value; None for an unbounded metric.
    """

    samples: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]
    bounds: tuple[float, float] | None = (0.0, 1.0)

    @classmethod
    def mean(
        cls, values: Sequence[float] | np.ndarray, bounds: tuple[float, float] | None = (0.0, 1.0)
    ) -> "SampledMetric":
        """Return the mean of one value per sample, (N,), as a metric."""
        values = np.asarray(values, dtype=np.float64)
        return cls(np.stack([values, np.ones_like(values)], axis=-1), ratio, bounds)

    def value(self) -> float | None:
        """Return the metric over all samples; None where it is undefined."""
        return finite_or_none(self.combine(self.samples.sum(axis=0)))

    def of_samples(self) -> np.ndarray:
        """Return the metric of each sample by itself, (N,)."""
        return self.combine(self.samples)

    def take(self, index: np.ndarray) -> "SampledMetric":
        """Return the same metric over the samples at `index`."""
        return SampledMetric(self.samples[index], self.combine, self.bounds)


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return the first column over the second, NaN where the second is 0."""
    return divide(sums[..., 0], sums[..., 1])


def divide(numerator: np.ndarray, denominator: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """Return numerator / denominator.

    Args:
        numerator: array that broadcasts with `denominator`.
        denominator: may hold zeros.
        otherwise: value where `denominator` is 0.
    """
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, otherwise), where=denominator != 0)


def finite_or_none(value: np.ndarray | float) -> float | None:
    """Return a float; None for NaN and infinity, which JSON lacks."""
    return float(value) if np.isfinite(value) else None


# --- Patients: the units of intervals and tests, since reports of one patient resemble each other ---------------------


def patient_keys(rows: Sequence[PredictionRow]) -> list[str]:
    """Return the patient of each row of a predictions file.

    A row's `patient_id` names the patient; without it, CT-RATE's names do, in `scan_id` or `id` ("valid_53_a" is patient
    valid_53). Any other `scan_id` counts as a patient of its own, and so does each row without one: see `unknown_patients`.
    """
    scans = [row.get("scan_id") for row in rows]
    unnamed = [f"row {position}" if scan is None else str(scan) for position, scan in enumerate(scans)]
    return [named_patient(row) or key for row, key in zip(rows, unnamed, strict=True)]


def unknown_patients(rows: Sequence[PredictionRow]) -> int:
    """Return how many rows name no patient, so that their scan, or the row itself, counts as one."""
    return sum(named_patient(row) is None for row in rows)


class PatientSums:
    """Groups samples by patient.

    Args:
        patients: patient of each sample, (N,).
        metrics: metrics whose number of samples is checked against `patients`.

    Attributes:
        count: number of patients P.

    Raises:
        ValueError: a metric has another number of samples than `patients` has entries.
    """

    def __init__(self, patients: Sequence[Hashable], metrics: Sequence[SampledMetric]):
        for metric in metrics:
            if len(metric.samples) != len(patients):
                raise ValueError(
                    f"{len(metric.samples)} samples and {len(patients)} patients; give each sample's patient."
                )
        names, codes = np.unique(np.asarray(patients), return_inverse=True)
        self.count, self._codes = len(names), codes.ravel()

    def of(self, metric: SampledMetric) -> np.ndarray:
        """Return the sums of a metric's samples by patient, (P, K)."""
        return np.stack([np.bincount(self._codes, column, self.count) for column in metric.samples.T], axis=-1)

    def by_name(self, metrics: Mapping[str, SampledMetric]) -> dict[str, np.ndarray]:
        """Return the sums of several metrics by patient: name → (P, K)."""
        return {name: self.of(metric) for name, metric in metrics.items()}
