"""Calibration: against outcomes of known probabilities, analytic values, and fits whose answer is known."""

import numpy as np
import pytest
from scipy.special import expit

from samf.evaluation.finding_scaling import Calibration, HeldOut, cross_fitted, fit_scaling, pooled_scores
from samf.evaluation.metrics.calibration import (
    auroc,
    calibration_error,
    calibration_scores,
    equal_mass_bins,
    perfect_calibration_errors,
    reliability,
)

NAMES = ("Emphysema", "Lung nodule", "Consolidation")


def simulated(scans: int, temperature, bias=0.0, seed: int = 0) -> HeldOut:
    """Logits of which sigmoid(logit / temperature + bias) is the true probability."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(scans, len(NAMES))) * 3
    outcomes = rng.random(logits.shape) < expit(logits / np.array(temperature) + np.array(bias))
    return HeldOut(NAMES, logits, outcomes.astype(np.int64), tuple(f"patient_{scan // 2}" for scan in range(scans)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_of_simulated_logits_is_found(temperature):
    found = fit_scaling(simulated(20_000, temperature), "temperature")
    assert found.bias is None and len(set(found.temperature)) == 1
    assert found.temperature[0] == pytest.approx(temperature, rel=0.05)


def test_temperature_and_bias_of_each_finding_are_found():
    temperatures, biases = [0.5, 1.0, 2.5], [1.0, 0.0, -1.5]
    found = fit_scaling(simulated(40_000, temperatures, biases), "platt")
    np.testing.assert_allclose(found.temperature, temperatures, rtol=0.07)
    np.testing.assert_allclose(found.bias, biases, atol=0.1)


def test_the_fit_is_a_minimum_of_the_posterior():
    """By finite differences, of a loss that is written down again."""
    held_out = simulated(60, 2.0)
    found = fit_scaling(held_out, "platt")

    def loss(log_temperature, bias):
        p = expit(held_out.logits / np.exp(log_temperature) + bias)
        nll = -np.where(held_out.targets == 1, np.log(p), np.log1p(-p)).sum()
        return nll + 0.5 * (log_temperature**2).sum() + 0.5 * (bias**2).sum()

    best = np.array([np.log(found.temperature), found.bias])
    for place in np.ndindex(best.shape):
        for change in (-1e-3, 1e-3):
            moved = best.copy()
            moved[place] += change
            assert loss(*moved) > loss(*best)


def test_separable_labels_leave_the_scaling_finite_and_unknown_ones_leave_it_out():
    logits = np.array([[-2.0, 1.0, 0.0], [2.0, -1.0, 0.0], [3.0, 4.0, 0.0]])
    held_out = HeldOut(NAMES, logits, np.array([[0, 1, -100], [1, 0, -100], [1, -100, -100]]), ("a", "b", "c"))
    found = fit_scaling(held_out, "platt")
    assert np.isfinite(found.temperature).all() and found.temperature[2] == 1.0 and found.bias[2] == 0.0
    with pytest.raises(ValueError, match="0 known labels"):
        fit_scaling(HeldOut(NAMES, logits, np.full((3, 3), -100), ("a", "b", "c")), "temperature")


def test_scaling_keeps_the_order_of_patients():
    held_out = simulated(200, 1.0)
    scaled = Calibration((0.3, 1.7, 5.0), (2.0, -1.0, 0.5)).probabilities(held_out.logits)
    for column in range(len(NAMES)):
        np.testing.assert_array_equal(np.argsort(scaled[:, column]), np.argsort(held_out.logits[:, column]))
        before, after = (auroc(scores[:, column], held_out.targets[:, column]) for scores in (held_out.logits, scaled))
        assert before == after


def test_overconfident_predictions_have_the_analytic_error():
    """Half predict .95 and half .05, and are right in four of five: the error is .15, whatever the number of bins."""
    outcomes = np.array([1] * 80 + [0] * 20 + [0] * 80 + [1] * 20)
    probabilities = np.array([0.95] * 100 + [0.05] * 100)
    for bins in (2, 7, 15):
        assert calibration_error(probabilities, outcomes, bins).value() == pytest.approx(0.15)
    points = reliability(probabilities, outcomes)
    assert [(point.frequency, point.count) for point in points] == [(0.2, 100), (0.8, 100)]


def test_calibrated_predictions_are_within_the_range_of_chance():
    rng = np.random.default_rng(3)
    probabilities = rng.beta(0.5, 0.5, 1000)
    chance = perfect_calibration_errors(probabilities, draws=500)
    observed = [calibration_error(probabilities, rng.random(1000) < probabilities).value() for _ in range(200)]
    assert np.mean(observed) == pytest.approx(chance.mean(), rel=0.05)
    assert chance.mean() > 0.01, "the bias of small samples"
    scores = calibration_scores(probabilities, rng.random(1000) < probabilities, list(range(1000)))
    assert scores["ece_if_perfect_range"][0] < scores["ece_if_perfect"] < scores["ece_if_perfect_range"][1]


def test_the_error_is_the_sum_over_bins_by_a_loop():
    held_out = simulated(301, 0.4)
    p, y = expit(held_out.logits[:, 0]), held_out.targets[:, 0]
    order = np.argsort(p)
    places = equal_mass_bins(p, 10)
    assert set(np.bincount(places)) == {30, 31} and (np.diff(places[order]) >= 0).all()
    expected = sum(abs(p[places == k].mean() - y[places == k].mean()) * (places == k).mean() for k in range(10))
    assert calibration_error(p, y, 10).value() == pytest.approx(expected)


def test_cross_fitting_measures_each_patient_by_a_fit_without_him():
    held_out = simulated(100, 3.0)
    probabilities = cross_fitted(held_out, "temperature", folds=5, seed=1)
    changed = held_out.targets.copy()
    rows = [row for row, patient in enumerate(held_out.patients) if patient == held_out.patients[0]]
    changed[rows] = 1 - changed[rows]
    again = cross_fitted(HeldOut(NAMES, held_out.logits, changed, held_out.patients), "temperature", folds=5, seed=1)
    np.testing.assert_array_equal(probabilities[rows], again[rows])
    assert (probabilities != again).any()
    with pytest.raises(ValueError, match="60 folds of 50 patients"):
        cross_fitted(held_out, "temperature", folds=60, seed=0)


def test_scaling_removes_the_error_of_overconfident_logits():
    held_out = simulated(2000, 3.0)
    before = pooled_scores(held_out, expit(held_out.logits))
    after = pooled_scores(held_out, cross_fitted(held_out, "temperature", 5, 0))
    assert before["ece"] > 0.1 and after["ece"] < 0.03 and after["nll"] < before["nll"]
    low, high = before["intervals"]["ece"]
    assert low < before["ece"] < high


def test_auroc_counts_ordered_pairs():
    scores, outcomes = np.array([0.1, 0.4, 0.4, 0.8, 0.4]), np.array([0, 0, 1, 1, 0])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[outcomes == 1] for b in scores[outcomes == 0]]
    assert auroc(scores, outcomes) == pytest.approx(np.mean(pairs))
    assert auroc(scores, np.ones(5)) is None
