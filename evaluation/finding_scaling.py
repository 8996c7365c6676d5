"""Fit the scaling of findings' logits on held-out patients, and measure it on patients that it was not fitted on."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch.nn import functional as F

from samf.evaluation.metrics.calibration import BINS, auroc, calibration_scores
from samf.evaluation.schema import CalibrationScores, FindingCalibration
from samf.model.calibration_samf import scaled_logits
from samf.model.constants_samf import IGNORE_INDEX

# "temperature": one for all findings; "platt": a temperature and a bias for each.
Scaling: TypeAlias = Literal["temperature", "platt"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
_STEPS = 500


@dataclass(frozen=True)
class HeldOut:
    """Logits and labels of held-out scans.

    Attributes:
        names: of the findings.
        logits: (N, L).
        targets: (N, L), 1, 0 or IGNORE_INDEX where it is unknown.
        patients: of each scan, (N,).
    """

    names: tuple[str, ...]
    logits: np.ndarray
    targets: np.ndarray
    patients: tuple[str, ...]

    def take(self, rows: np.ndarray) -> "HeldOut":
        """Return the scans at `rows`."""
        patients = tuple(self.patients[row] for row in rows)
        return HeldOut(self.names, self.logits[rows], self.targets[rows], patients)


@dataclass(frozen=True)
class Calibration:
    """Temperature and bias of each finding."""

    temperature: tuple[float, ...]
    bias: tuple[float, ...] | None = None

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return the scaled probabilities of logits (N, L)."""
        return scaled_logits(torch.from_numpy(logits), self.temperature, self.bias).sigmoid().numpy()


def fit_scaling(held_out: HeldOut, scaling: Scaling) -> Calibration:
    """Fit a scaling by maximum a posteriori, with L-BFGS.

    The likelihood is that of all known labels. Standard normal priors on log-temperatures and biases keep them finite where
    a few scans are perfectly separated; a hundred scans outweigh them.

    Args:
        held_out: the scans to fit on.
        scaling: what is fitted.

    Raises:
        ValueError: no label is known, or a logit isn't finite.
    """
    logits, targets = torch.from_numpy(held_out.logits).double(), torch.from_numpy(held_out.targets)
    known = targets != IGNORE_INDEX
    if not known.any() or not torch.isfinite(logits).all():
        raise ValueError(
            f"{len(logits)} scans with {int(known.sum())} known labels and {int((~torch.isfinite(logits)).sum())} logits "
            "that aren't finite; a calibration needs labels, and finite logits."
        )
    count = logits.shape[1]
    log_temperature = torch.zeros(1 if scaling == "temperature" else count, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=scaling == "platt")
    fitted = [parameter for parameter in (log_temperature, bias) if parameter.requires_grad]
    optimizer = torch.optim.LBFGS(fitted, max_iter=_STEPS, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scaled = scaled_logits(logits, log_temperature.exp(), bias)
        value = F.binary_cross_entropy_with_logits(scaled[known], targets[known].double(), reduction="sum")
        value = (value + 0.5 * sum((parameter**2).sum() for parameter in fitted)) / known.sum()
        value.backward()
        return value

    optimizer.step(loss)
    temperature = log_temperature.detach().exp().expand(count)
    return Calibration(tuple(temperature.tolist()), tuple(bias.tolist()) if scaling == "platt" else None)


def cross_fitted(held_out: HeldOut, scaling: Scaling, folds: int, seed: int) -> np.ndarray:
    """Return the probabilities of each scan, (N, L), scaled by a fit on the patients of the other folds.

    Args:
        held_out: all held-out scans.
        scaling: what is fitted.
        folds: number of parts that the patients are divided into.
        seed: of the division.

    Raises:
        ValueError: fewer patients than folds.
    """
    probabilities = np.full(held_out.logits.shape, np.nan)
    for fitted, measured in _folds(held_out.patients, folds, seed):
        calibration = fit_scaling(held_out.take(fitted), scaling)
        probabilities[measured] = calibration.probabilities(held_out.logits[measured])
    return probabilities


def _folds(patients: Sequence[Hashable], folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows to fit and the rows to measure of each fold; a patient's rows stay together."""
    distinct = sorted(set(patients), key=str)
    if not 2 <= folds <= len(distinct):
        raise ValueError(f"{folds} folds of {len(distinct)} patients; expected at least 2, and a patient for each.")
    order = np.random.default_rng(seed).permutation(len(distinct))
    fold_of = {distinct[index]: place % folds for place, index in enumerate(order)}
    fold = np.array([fold_of[patient] for patient in patients])
    for number in range(folds):
        yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)


def pooled_scores(held_out: HeldOut, probabilities: np.ndarray, bins: int = BINS, seed: int = 0) -> CalibrationScores:
    """Return the calibration of all findings together: of all known pairs of a scan and a finding.

    Args:
        held_out: the scans.
        probabilities: (N, L).
        bins: of the calibration error.
        seed: of its interval.
    """
    known = held_out.targets != IGNORE_INDEX
    patients = [patient for patient, row in zip(held_out.patients, known, strict=True) for _ in range(int(row.sum()))]
    return calibration_scores(probabilities[known], held_out.targets[known], patients, bins, seed)


def finding_scores(
    held_out: HeldOut,
    calibration: Calibration,
    before: np.ndarray,
    after: np.ndarray,
    bins: int = BINS,
    seed: int = 0,
) -> Mapping[str, FindingCalibration]:
    """Return the calibration of each finding that has known labels.

    Args:
        held_out: the scans.
        calibration: fitted on all of them.
        before: probabilities without scaling, (N, L).
        after: cross-fitted probabilities, (N, L).
        bins: of the calibration error.
        seed: of its interval.
    """
    scores: dict[str, FindingCalibration] = {}
    for place, name in enumerate(held_out.names):
        rows = np.flatnonzero(held_out.targets[:, place] != IGNORE_INDEX)
        if not len(rows):
            continue
        outcomes, patients = held_out.targets[rows, place], [held_out.patients[row] for row in rows]
        scores[name] = {
            "temperature": calibration.temperature[place],
            "bias": calibration.bias[place] if calibration.bias else 0.0,
            "auroc": auroc(held_out.logits[rows, place], outcomes),
            "before": calibration_scores(before[rows, place], outcomes, patients, bins, seed),
            "after": calibration_scores(after[rows, place], outcomes, patients, bins, seed),
        }
    return scores
