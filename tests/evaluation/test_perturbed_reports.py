"""Which metrics notice that a report is wrong: negations flipped, sides swapped, sizes changed.

The texts differ from their references in few words, so metrics of words stay high whatever the error; of those that read
content each notices its own kind. The table in docs/results/metrics.md has the figures on real reports.
"""

import csv

import numpy as np
import pytest

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.evaluation import meta_evaluation
from samf.evaluation.meta_evaluation import (
    EXCHANGED,
    PERTURBATIONS,
    UNCHANGED,
    change_sizes,
    flip_negations,
    perturbation_scores,
    swap_sides,
)
from samf.evaluation.scoring import read_predictions
from samf.phantoms.findings import sample_findings
from samf.phantoms.text import join_report, write_statements

WORDS = ("bleu_1", "rouge_1", "rouge_l")
LABELS = ("macro.f1", "micro.f1", "crg")


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
    return perturbation_scores(request.getfixturevalue(request.param))


def test_perturbations():
    assert flip_negations("No nodule was seen. Effusion is present.") == "nodule was seen. Effusion is not present."
    assert flip_negations("Effusion was not observed.") == "Effusion was observed."
    assert swap_sides("Left lung, right lung, bilateral.") == "right lung, left lung, bilateral."
    assert change_sizes("A 4 x 5.5 cm mass, 3 mm; dated 2015.") == "A 12 x 16.5 cm mass, 9 mm; dated 2015."


def test_which_metrics_notice(table):
    perfect = table[UNCHANGED]
    assert all(perfect[name] == pytest.approx(1) for name in (*WORDS, *LABELS, "sides.f1", "sizes.f1"))
    for name in PERTURBATIONS:
        # What a metric of words loses to an error that turns the report's meaning: less than a tenth.
        assert all(0.9 < table[name][metric] < 1 for metric in WORDS), name
    flipped, swapped, resized = (table[name] for name in PERTURBATIONS)
    assert all(flipped[name] < 0.8 for name in LABELS)
    assert all(swapped[name] == resized[name] == pytest.approx(1) for name in LABELS)
    assert swapped["sides.f1"] < 0.9 and resized["sides.f1"] == pytest.approx(1)
    assert resized["sizes.f1"] < 0.2 and flipped["sizes.f1"] == swapped["sizes.f1"] == pytest.approx(1)


def test_a_flipped_report_scores_higher_in_words_than_another_patients(table):
    """Why metrics of words can't rank reports by safety: all findings wrong beats an honest report in other words."""
    assert all(table["negations flipped"][name] > table[EXCHANGED][name] for name in WORDS)


def write_reports(path, reports, labels=None) -> str:
    with path.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["report_text", *(CT_RATE_LABELS if labels is not None else ())])
        writer.writerows([report, *(labels[k] if labels is not None else ())] for k, report in enumerate(reports))
    return str(path)


def test_commands_print_the_tables(tmp_path, phantom_reports, capsys):
    reports = write_reports(tmp_path / "reports.csv", phantom_reports)
    meta_evaluation.main(["perturbations", reports])
    printed = capsys.readouterr().out
    assert "| sizes tripled |" in printed and "| unchanged | 1.000 |" in printed
    output = tmp_path / "mixed.jsonl"
    meta_evaluation.main(["predictions", reports, "--count", "30", "--output", str(output)])
    assert "30 predictions of" in capsys.readouterr().out
    rows = read_predictions(output)
    assert len({row["id"] for row in rows}) == 30 and 10 <= len({row["scan_id"] for row in rows}) <= 30
    assert all(row["reference"] != row["prediction"] for row in rows)
    with pytest.raises(SystemExit, match="lacks the columns Medical material"):
        meta_evaluation.main(["labeller", reports])
    with pytest.raises(SystemExit, match="no such file"):
        meta_evaluation.main(["perturbations", str(tmp_path / "nowhere.csv")])


def test_the_labellers_table_by_hand(tmp_path, capsys):
    """Emphysema: of four reports it is in two; the labeller finds one of them, and one that isn't labelled."""
    texts = ["Emphysema is seen.", "Emphysema is seen.", "No nodule.", "No nodule."]
    labels = np.zeros((4, 18), dtype=int)
    labels[[0, 2], CT_RATE_LABELS.index("Emphysema")] = 1
    meta_evaluation.main(["labeller", write_reports(tmp_path / "labelled.csv", texts, labels), "--from", "2"])
    assert "| Emphysema | 2 | 0.500 | 0.500 | 0.500 | 1 | 0.000 |" in capsys.readouterr().out
