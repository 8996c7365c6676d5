"""Scores from predictions.jsonl alone."""

import json
import runpy
import sys

import pytest
from sklearn.metrics import precision_recall_fscore_support

from samf.data.ct_rate import CT_RATE_LABELS
from samf.evaluation.finding_labeller import label_reports
from samf.evaluation.scoring import (
    PredictionsError,
    read_predictions,
    results_table,
    score_findings,
    score_predictions,
    write_results,
)
from samf.evaluation.text_metrics import text_metrics

CHOICES = ["emphysema", "consolidation", "cardiomegaly", "lung nodule"]
REPORTS = [
    (
        "Emphysema is observed. Right pleural effusion is observed.",
        "Emphysema was detected. There is left pleural effusion.",
    ),
    ("No emphysema was detected. There is consolidation.", "There is consolidation. Emphysema was not observed."),
    ("Cardiomegaly is observed.", "There is no cardiomegaly."),
]


def row(number: int, task: str, reference: str, prediction: str, choices=None, **extra) -> dict:
    fields = {"id": f"r{number}", "scan_id": f"valid_{number}_a", "task": task, "question": "?", "choices": choices}
    return {**fields, "reference": reference, "prediction": prediction, **extra}


@pytest.fixture
def rows():
    reports = [row(i, "report", reference, text) for i, (reference, text) in enumerate(REPORTS)]
    answers = ["(b) consolidation", "The answer is c", "emphysema", "no idea"]
    truths = ["(b) consolidation", "(a) emphysema", "(a) emphysema", "(d) lung nodule"]
    asked = [
        row(i, "multiple_choice", truth, answer, CHOICES, tokens=5, truncated=i == 13)
        for i, (truth, answer) in enumerate(zip(truths, answers, strict=True), start=10)
    ]
    return reports + asked + [row(20, "short_answer", "Yes.", "")]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_findings_by_hand():
    """Emphysema 1 of 1, effusion 1 of 1, consolidation 1 of 1, cardiomegaly missed: micro P 3/3, R 3/4; macro over 4."""
    references, predictions = zip(*REPORTS, strict=True)
    scores = score_findings(predictions, references)
    assert scores["micro"] == pytest.approx({"precision": 1, "recall": 3 / 4, "f1": 6 / 7})
    assert scores["macro"] == pytest.approx({"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4})
    assert scores["macro_findings"] == 4
    assert scores["per_finding"]["Cardiomegaly"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1, "predicted": 0}
    assert scores["effusion_side"] == {"count": 1, "accuracy": 0}


def test_findings_equal_scikit_learn():
    references, predictions = zip(*REPORTS, strict=True)
    scores = score_findings(predictions, references)
    truth, found = label_reports(references), label_reports(predictions)
    expected = precision_recall_fscore_support(truth, found, average="micro", zero_division=0)
    assert list(scores["micro"].values()) == pytest.approx(expected[:3])
    per_label = precision_recall_fscore_support(truth, found, average=None, zero_division=0)
    for name, *figures in zip(CT_RATE_LABELS, *per_label, strict=True):
        assert list(scores["per_finding"][name].values())[:4] == pytest.approx(figures)


def test_chosen_findings_only():
    references, predictions = zip(*REPORTS, strict=True)
    scores = score_findings(predictions, references, ["Emphysema", "Lung nodule"])
    assert list(scores["per_finding"]) == ["Emphysema", "Lung nodule"]
    assert scores["macro_findings"] == 1 and scores["micro"]["f1"] == 1


def test_no_finding_in_any_reference():
    scores = score_findings(["Emphysema is observed."], ["Normal."])
    assert scores["macro"]["f1"] is None and scores["micro"]["f1"] == 0 and scores["effusion_side"]["accuracy"] is None


def test_score_predictions(rows, tmp_path):
    results = score_predictions(write(tmp_path / "predictions.jsonl", rows))
    assert results["counts"] == {"predictions": 8, "scans": 8, "duplicate_ids": 0}
    assert list(results["tasks"]) == ["report", "multiple_choice", "short_answer"]
    choice = results["tasks"]["multiple_choice"]
    assert choice["multiple_choice"]["accuracy"] == 0.5 and choice["multiple_choice"]["unparsed"] == 1
    assert choice["multiple_choice"]["chance"] == 0.25 and choice["truncated"] == 1
    assert results["tasks"]["short_answer"]["empty"] == 1
    references, predictions = zip(*REPORTS, strict=True)
    assert results["tasks"]["report"]["text"] == text_metrics(predictions, references)["scores"]
    assert score_predictions(rows) == results
    json.dumps(results)


def test_table_names_every_score_and_remedy(rows):
    results = score_predictions(rows)
    table = results_table(results)
    for text in (
        "| report | 3 | 0 | 0 |",
        "BLEU-4",
        "4 questions | 0.500",
        "0.250 | 1 |",
        "Cardiomegaly | 0.000",
        "**macro** (4",
    ):
        assert text in table
    assert "BERTScore F1: not available" in table
    widths = {
        block.count("|") // len(block.splitlines()) for block in table.split("\n\n") if block.startswith("| task")
    }
    assert widths == {10}


def test_write_results_leaves_no_partial_file(rows, tmp_path):
    results = score_predictions(rows)
    write_results(results, tmp_path / "new" / "results.json")
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == results
    assert (tmp_path / "new" / "results.md").read_text() == results_table(results)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["results.json", "results.md"]


def test_duplicate_ids_are_counted(rows, caplog):
    results = score_predictions([*rows, rows[0]])
    assert results["counts"]["duplicate_ids"] == 1 and "repeat the id" in caplog.text


@pytest.mark.parametrize("prediction", ["", "\n", " ".join(["nodule"] * 10_000), "肺に結節なし", "{} \\ \" 'x'"])
def test_odd_predictions_have_scores(prediction):
    results = score_predictions([row(0, "report", "No nodule was detected.", prediction)])
    assert all(value is None or 0 <= value <= 1 for value in results["tasks"]["report"]["text"].values())


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no predictions"),
        ("\n\n", "holds no predictions"),
        ('{"task": "report", "reference": "a", "prediction": "b"}\nnot json\n', "line 2: not JSON"),
        ("[1]\n", "line 1: a JSON list"),
        ('{"task": "report", "reference": "a"}\n', "line 1: lacks prediction"),
        ('{"task": "report", "reference": null, "prediction": "b"}\n', "line 1: lacks reference"),
        ('{"task": "multiple_choice", "reference": "a", "prediction": "b"}\n', "line 1: lacks choices"),
        ('{"task": "poem", "reference": "a", "prediction": "b"}\n', "task 'poem' is unknown"),
    ],
)
def test_a_bad_file_is_named_with_its_line(content, message, tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(content)
    with pytest.raises(PredictionsError, match=message) as error:
        read_predictions(path)
    assert str(path) in str(error.value)


def test_missing_file_no_rows_and_unknown_findings(tmp_path, rows):
    with pytest.raises(PredictionsError, match=r"nowhere\.jsonl: no such file"):
        score_predictions(tmp_path / "nowhere.jsonl")
    with pytest.raises(PredictionsError, match="no predictions to score"):
        score_predictions([])
    with pytest.raises(ValueError, match="Unknown findings \\['Emphysems'\\]"):
        score_predictions(rows, finding_names=["Emphysems"])


def test_rows_of_another_system_need_only_three_fields():
    results = score_predictions([{"task": "report", "reference": "Emphysema.", "prediction": "Emphysema."}])
    assert results["tasks"]["report"]["findings"]["macro"]["f1"] == 1
    assert results["counts"] == {"predictions": 1, "scans": 0, "duplicate_ids": 0}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_command_line(rows, tmp_path, monkeypatch, capsys):
    """What `python -m samf.evaluation.scoring` runs, without another start of the interpreter."""
    path, output = write(tmp_path / "predictions.jsonl", rows), tmp_path / "results.json"
    argv = ["scoring", str(path), "--output", str(output), "--finding_names", "Emphysema", "Lung nodule"]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_module("samf.evaluation.scoring", run_name="__main__")
    results = json.loads(output.read_text())
    assert list(results["tasks"]["report"]["findings"]["per_finding"]) == ["Emphysema", "Lung nodule"]
    assert capsys.readouterr().out == (tmp_path / "results.md").read_text()


def test_command_line_of_a_bad_file(tmp_path, capsys):
    from samf.evaluation.scoring import main

    with pytest.raises(SystemExit, match="no such file"):
        main([str(tmp_path / "nowhere.jsonl")])
