"""Which metrics notice that a report is wrong: negations flipped, sides swapped, sizes changed.

The texts differ from their references in few words, so metrics of words stay high whatever the error; of those that read
content each notices its own kind. The table in docs/evaluation.md has the figures on real reports.
"""

import csv

import numpy as np
import pytest
from perturbed_reports import PERTURBATIONS, change_sizes, flip_negations, swap_sides

from samf.data.phantom_findings import sample_findings
from samf.data.phantom_text import join_report, write_statements
from samf.evaluation.clinical_metrics import finding_samples
from samf.evaluation.text_metrics import text_samples

WORDS = ("bleu_1", "rouge_1", "rouge_l")
LABELS = ("macro.f1", "micro.f1", "crg")


def figures(predictions, references) -> dict[str, float]:
    samples = {**text_samples(predictions, references), **finding_samples(predictions, references)}
    return {name: metric.value() for name, metric in samples.items() if "per_finding" not in name}


@pytest.fixture(scope="module")
def phantom_reports() -> list[str]:
    rng = np.random.default_rng(7)
    return [join_report(write_statements(rng, sample_findings(rng))) for _ in range(60)]


@pytest.fixture(scope="module")
def real_reports(test_data) -> list[str]:
    with (test_data / "reports" / "CT-CLIP_text_classifier_val.csv").open(encoding="utf-8", newline="") as lines:
        return [row["report_text"] for row in csv.DictReader(lines)][:60]


@pytest.fixture(params=["phantom_reports", "real_reports"])
def table(request) -> dict[str, dict[str, float]]:
    """Perturbation → metric → figure."""
    reports = request.getfixturevalue(request.param)
    changed = {name: [change(report) for report in reports] for name, change in PERTURBATIONS.items()}
    return {name: figures(texts, reports) for name, texts in {"none": reports, **changed}.items()}


def test_perturbations():
    assert flip_negations("No nodule was seen. Effusion is present.") == "nodule was seen. Effusion is not present."
    assert flip_negations("Effusion was not observed.") == "Effusion was observed."
    assert swap_sides("Left lung, right lung, bilateral.") == "right lung, left lung, bilateral."
    assert change_sizes("A 4 x 5.5 cm mass, 3 mm; dated 2015.") == "A 12 x 16.5 cm mass, 9 mm; dated 2015."


def test_which_metrics_notice(table):
    perfect = table["none"]
    assert all(perfect[name] == pytest.approx(1) for name in (*WORDS, *LABELS, "sides.f1", "sizes.f1"))
    for name, row in table.items():
        if name != "none":
            # What a metric of words loses to an error that turns the report's meaning: less than a tenth.
            assert all(0.9 < row[metric] < 1 for metric in WORDS), name
    flipped, swapped, resized = (table[name] for name in PERTURBATIONS)
    assert all(flipped[name] < 0.8 for name in LABELS)
    assert all(swapped[name] == resized[name] == pytest.approx(1) for name in LABELS)
    assert swapped["sides.f1"] < 0.9 and resized["sides.f1"] == pytest.approx(1)
    assert resized["sizes.f1"] < 0.2 and flipped["sizes.f1"] == swapped["sizes.f1"] == pytest.approx(1)


def test_a_flipped_report_scores_higher_in_words_than_another_patients(table, request, phantom_reports):
    """Why metrics of words can't rank reports by safety: all findings wrong beats an honest report in other words."""
    exchanged = figures(phantom_reports[1:] + phantom_reports[:1], phantom_reports)
    assert all(table["negations flipped"][name] > exchanged[name] for name in WORDS)
