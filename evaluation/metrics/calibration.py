"""Calibration of probabilities: expected calibration error, Brier score, log loss, and what chance adds to the first.

All functions take one probability and one outcome (0 or 1) per sample, (N,).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from samf.evaluation.metrics.bootstrap import bootstrap_intervals, patient_intervals
from samf.evaluation.metrics.sampled_metric import SampledMetric, divide
from samf.evaluation.schema import CalibrationScores

BINS = 15
# Draws of outcomes of perfectly calibrated predictions.
SIMULATIONS = 1000
_SMALLEST = 1e-12  # probabilities in the log loss are kept this far from 0 and 1


def equal_mass_bins(probabilities: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each sample, (N,): bins hold equal numbers of samples, and equal probabilities share one."""
    ordered = np.sort(probabilities)
    return np.searchsorted(ordered, probabilities, side="left") * bins // max(len(ordered), 1)


@dataclass(frozen=True)
class ReliabilityBin:
    """One point of a reliability diagram.

    Attributes:
        probability: mean probability of the bin's samples.
        frequency: share of them with outcome 1.
        count: number of samples.
    """

    probability: float
    frequency: float
    count: int


def reliability(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = BINS) -> list[ReliabilityBin]:
    """Return the points of a reliability diagram, by increasing probability.

    Args:
        probabilities: (N,).
        outcomes: (N,), 0 or 1.
        bins: number of equal-mass bins.
    """
    places = equal_mass_bins(probabilities, bins)
    return [
        ReliabilityBin(
            float(probabilities[places == place].mean()),
            float(outcomes[places == place].mean()),
            int((places == place).sum()),
        )
        for place in np.unique(places)
    ]


def calibration_error(probabilities: np.ndarray, outcomes: np.ndarray, bins: int = BINS) -> SampledMetric:
    """Return the expected calibration error: the mean over equal-mass bins of |mean probability - frequency|.

    Args:
        probabilities: (N,).
        outcomes: (N,), 0 or 1.
        bins: number of bins.
    """
    places = equal_mass_bins(probabilities, bins)
    samples = np.zeros((len(places), bins + 1))
    samples[np.arange(len(places)), places] = probabilities - outcomes
    samples[:, -1] = 1
    return SampledMetric(samples, lambda sums: divide(np.abs(sums[..., :-1]).sum(axis=-1), sums[..., -1]))


def perfect_calibration_errors(
    probabilities: np.ndarray, bins: int = BINS, draws: int = SIMULATIONS, seed: int = 0
) -> np.ndarray:
    """Return the calibration errors of simulated outcomes that have exactly these probabilities, (draws,).

    In few samples frequencies differ from probabilities by chance, so that even perfectly calibrated predictions have an
    error above 0: an observed error is to be compared with these.

    Args:
        probabilities: (N,).
        bins: number of bins.
        draws: number of simulations.
        seed: of the outcomes.
    """
    rng, places = np.random.default_rng(seed), equal_mass_bins(probabilities, bins)
    expected = np.bincount(places, weights=probabilities, minlength=bins)
    errors = np.empty(draws)
    for draw in range(draws):
        outcomes = rng.random(len(probabilities)) < probabilities
        errors[draw] = np.abs(expected - np.bincount(places, weights=outcomes, minlength=bins)).sum()
    return errors / max(len(probabilities), 1)


def calibration_scores(
    probabilities: np.ndarray, outcomes: np.ndarray, patients: Sequence[Hashable], bins: int = BINS, seed: int = 0
) -> CalibrationScores:
    """Return calibration error, Brier score and log loss with their intervals over patients.

    Args:
        probabilities: (N,).
        outcomes: (N,), 0 or 1.
        patients: patient of each sample, (N,).
        bins: of the calibration error.
        seed: of resampled patients and simulated outcomes.
    """
    error = calibration_error(probabilities, outcomes, bins)
    kept = np.clip(probabilities, _SMALLEST, 1 - _SMALLEST)
    losses = -np.where(outcomes == 1, np.log(kept), np.log1p(-kept))
    means = {
        "brier": SampledMetric.mean((probabilities - outcomes) ** 2),
        "nll": SampledMetric.mean(losses, bounds=None),
    }
    chance = perfect_calibration_errors(probabilities, bins, seed=seed)
    intervals = {
        **bootstrap_intervals({"ece": error}, patients, seed=seed),
        **patient_intervals(means, patients),
    }
    return {
        "n": len(probabilities),
        "positives": int(outcomes.sum()),
        "bins": bins,
        "ece": error.value(),
        "brier": means["brier"].value(),
        "nll": means["nll"].value(),
        "intervals": intervals,
        "ece_if_perfect": float(chance.mean()),
        "ece_if_perfect_range": [float(bound) for bound in np.quantile(chance, [0.025, 0.975])],
    }


def auroc(scores: np.ndarray, outcomes: np.ndarray) -> float | None:
    """Return the area under the ROC curve, ties counted as half; None without positives or without negatives.

    Args:
        scores: (N,), higher for positives.
        outcomes: (N,), 0 or 1.
    """
    positive = int(outcomes.sum())
    negative = len(outcomes) - positive
    if not positive or not negative:
        return None
    above = rankdata(scores)[outcomes == 1].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))
