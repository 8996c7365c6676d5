"""Scores from predictions.jsonl alone."""

import json
import runpy
import sys
import types

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.evaluation import metric_samples
from samf.evaluation.metric_samples import choice_samples
from samf.evaluation.metrics.multiple_choice import score_multiple_choice
from samf.evaluation.metrics.text_metrics import text_metrics
from samf.evaluation.results_table import comparison_table
from samf.evaluation.scoring import (
    SCHEMA,
    PredictionsError,
    ScoringOptions,
    compare_predictions,
    read_predictions,
    results_table,
    score_findings,
    score_predictions,
    write_results,
)
from samf.model.text_labeller import label_reports

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
    missed = {"precision": None, "recall": 0, "f1": 0, "support": 1, "predicted": 0}
    assert scores["per_finding"]["Cardiomegaly"] == missed
    assert scores["per_finding"]["Lung nodule"]["f1"] is None  # in no reference and no prediction
    assert scores["effusion_side"] == {"count": 1, "accuracy": 0}


def test_findings_equal_scikit_learn():
    references, predictions = zip(*REPORTS, strict=True)
    scores = score_findings(predictions, references)
    truth, found = label_reports(references), label_reports(predictions)
    expected = precision_recall_fscore_support(truth, found, average="micro", zero_division=0)
    assert list(scores["micro"].values()) == pytest.approx(expected[:3])
    per_label = precision_recall_fscore_support(truth, found, average=None, zero_division=np.nan)
    for name, *figures in zip(CT_RATE_LABELS, *per_label, strict=True):
        found_figures = [np.nan if f is None else f for f in scores["per_finding"][name].values()]
        assert found_figures[:4] == pytest.approx(figures, nan_ok=True)


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
    assert results["counts"] == {"predictions": 8, "scans": 8, "patients": 8, "duplicate_ids": 0, "missing_ids": 0}
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
    table = results_table(score_predictions(rows))
    for text in (
        "| report | 3 | 0 | 0 | 3 |",
        "| text | report (n 3) | multiple_choice (n 4) | short_answer (n 1) |",
        "| mean BLEU-4 |",
        "| counts pooled |",
        "| mean of samples | yes |",
        "| 4 questions | 0.500 (",
        "| always (a) | 0.500 (",
        "| chance | 0.250 |",
        # Two of three reports name it, one of them the reference: what a single patient shows of its recall is little.
        "| Cardiomegaly | n/a | 0.000 (0.000 to 0.975; n 1) | 0.000 (0.000 to 0.975; n 1) | 1 | 0 |",
        "| Lung nodule | n/a | n/a | n/a | 0 | 0 |",
        "**macro** (4",
        "constant: the most frequent report",
        "another patient's answer",
        "Cohort: 8 answers, 8 scans, 8 patients.",
        "95% intervals (jackknife over patients",
        "BERTScore P, BERTScore R, BERTScore F1: not available",
    ):
        assert text in table
    for block in table.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_every_figure_has_its_interval(rows):
    tasks = score_predictions(rows, resamples=200)["tasks"]
    for task, scores in tasks.items():
        assert set(scores["intervals"]) >= {f"text.{name}" for name, v in scores["text"].items() if v is not None}
        for name, bounds in scores["intervals"].items():
            assert bounds is None or bounds[0] <= bounds[1], (task, name)
    for name in ("macro.f1", "micro.recall", "crg", "per_finding.Emphysema.f1", "sides.f1", "sizes.precision"):
        assert f"findings.{name}" in tasks["report"]["intervals"]
    low, high = tasks["multiple_choice"]["intervals"]["multiple_choice.accuracy"]
    assert low <= tasks["multiple_choice"]["multiple_choice"]["accuracy"] <= high
    assert tasks["short_answer"]["intervals"]["text.rouge_l"] is None  # one patient
    for name in ("constant_report", "nearest_label_prior", "shuffled"):
        baseline = tasks["report"]["baselines"][name]
        low, high = baseline["intervals"]["text.bleu_1"]
        assert low <= baseline["text"]["bleu_1"] <= high
        assert set(baseline["intervals"]) >= {"text.meteor", "findings.macro.f1", "findings.crg"} - {
            f"text.{metric}" for metric, value in baseline["text"].items() if value is None
        }
    constant = tasks["multiple_choice"]["baselines"]["most_frequent_letter"]
    assert constant["intervals"]["accuracy"][0] <= constant["accuracy"] <= constant["intervals"]["accuracy"][1]


def test_what_answering_took_stands_in_the_table(rows):
    """`generation` of results.json: tokens and time by task, what failed and why."""
    took = {"tokens": 60, "tokens_mean": 20.0, "tokens_longest": 31, "seconds_per_volume": 2.5}
    took |= {"read_seconds_per_volume": 0.5, "tokens_per_second": None}
    generation = {"written": 5, "resumed": 3, "seconds": 12.3, "processes": 2, "failures": 4, "tasks": {"report": took}}
    generation["failure_kinds"] = {"CTReadError": 3, "FileNotFoundError": 1}
    table = results_table({**score_predictions(rows, resamples=0), "generation": generation})
    assert "| report | 60 | 20 | 31 | 2.5 | 0.5 | n/a |" in table
    assert "- 5 answers generated in 12 s with 2 processes; 3 more are from earlier runs." in table
    assert "4 records failed and are not scored (3 CTReadError, 1 FileNotFoundError)" in table


def test_choice_figures_by_question_are_those_of_all(rows):
    """Also where some question has no reference: it counts nowhere."""
    asked = [r for r in rows if r["task"] == "multiple_choice"] + [row(15, "multiple_choice", "?", "(a)", CHOICES)]
    texts = ([r[name] for r in asked] for name in ("prediction", "reference", "choices"))
    predictions, references, choices = texts
    samples = choice_samples(predictions, references, choices)
    expected = score_multiple_choice(predictions, references, choices)
    assert expected["without_reference"] == 1
    for name, metric in samples.items():
        assert metric.value() == pytest.approx(expected[name])


def test_baselines(rows):
    tasks = score_predictions(rows)["tasks"]
    assert set(tasks["report"]["baselines"]) == {"constant_report", "nearest_label_prior", "shuffled", "chance"}
    assert tasks["report"]["collapse"]["predictions"]["distinct_ratio"] == 1
    letters = tasks["multiple_choice"]["baselines"]
    assert letters["most_frequent_letter"]["letter"] == "a" and letters["most_frequent_letter"]["accuracy"] == 0.5
    assert letters["chance"]["accuracy"] == 0.25
    answers = [row(n, "short_answer", "left lung" if n else "right lung", "right lung") for n in range(5)]
    results = score_predictions(answers, resamples=50)
    constant = results["tasks"]["short_answer"]["baselines"]["constant_answer"]
    assert constant["text"]["mean_bleu_1"] == pytest.approx((4 + 0.5) / 5) and constant["intervals"]["text.rouge_1"]
    assert "| constant: the most frequent answer | 0.900 (" in results_table(results)
    without = score_predictions(rows, baselines=False)["tasks"]["report"]
    assert "baselines" not in without and "collapse" not in without


def test_a_constant_report_scores_as_its_own_baseline():
    """A system that answers with the commonest report has the constant's figures, and shuffling costs it nothing."""
    normal = "Heart size is normal. No nodule was detected in both lungs."
    references = [normal] * 6 + [text for text, _ in REPORTS]
    rows = [row(k, "report", reference, normal) for k, reference in enumerate(references)]
    report = score_predictions(rows)["tasks"]["report"]
    for name in ("constant_report", "shuffled"):
        assert report["baselines"][name]["text"] == pytest.approx(report["text"])
        assert report["baselines"][name]["findings"]["crg"] == report["findings"]["crg"]
    assert report["findings"]["crg"] == pytest.approx(1 / 3)
    assert report["collapse"]["predictions"]["distinct_ratio"] == pytest.approx(1 / 9)


def test_crg_without_findings_is_not_available():
    results = score_predictions([row(0, "report", "Normal.", "Normal.")])
    assert results["tasks"]["report"]["findings"]["crg"] is None
    assert "undefined" in results["not_available"]["crg"]


# --- cohort and odd lines -----------------------------------------------------------------------------------------


def test_cohort_states_exclusions_and_why(rows, tmp_path):
    """A failure beside the predictions is an exclusion, one that was answered in the end is not; an empty reference is."""
    path = write(tmp_path / "predictions.jsonl", [*rows, row(30, "report", " ", "Normal.", volume="v.nii.gz")])
    failures = [{"id": "r99", "error": "CTReadError: v.nii.gz: 4-D NIfTI"}, {"id": "r0", "error": "OSError: gone"}]
    (tmp_path / "failures.jsonl").write_text("".join(json.dumps(f) + "\n" for f in failures), encoding="utf-8")
    results = score_predictions(path)
    assert results["cohort"] == {
        "predictions": 8,
        "volumes": None,
        "scans": 8,
        "patients": 8,
        "excluded": {
            "the reference is empty": {"count": 1, "ids": ["r30"]},
            "no prediction: CTReadError": {"count": 1, "ids": ["r99"]},
        },
    }
    assert results["counts"]["predictions"] == 9
    assert "Left out: 1 (no prediction: CTReadError), e.g. r99." in results_table(results)
    with pytest.raises(PredictionsError, match="nowhere.jsonl: no such file"):
        score_predictions(path, exclusions=tmp_path / "nowhere.jsonl")


def test_cohort_states_what_was_not_asked(rows, tmp_path):
    path = write(tmp_path / "predictions.jsonl", rows)
    left_out = [{"reason": "listed in no_chest_valid.txt", "count": 65, "first": "valid_9_a_1.nii.gz"}]
    left_out.append({"reason": "beyond the first 3 of the task", "count": 7})
    counts = {"records": {"report": 3}, "left_out": left_out}
    (tmp_path / "records.json").write_text(json.dumps(counts), encoding="utf-8")
    results = score_predictions(path, resamples=0)
    assert results["cohort"]["excluded"]["not asked: listed in no_chest_valid.txt"]["count"] == 65
    table = results_table(results)
    assert "- Left out: 65 (not asked: listed in no_chest_valid.txt), e.g. valid_9_a_1.nii.gz." in table
    assert "- Left out: 7 (not asked: beyond the first 3 of the task)." in table
    (tmp_path / "records.json").write_text("{}", encoding="utf-8")
    with pytest.raises(PredictionsError, match="remove it, or run eval.py again"):
        score_predictions(path, resamples=0)


def test_only_empty_references_are_an_error():
    with pytest.raises(PredictionsError, match="all 1 references are empty"):
        score_predictions([row(0, "report", "", "Normal.")])


def test_rows_without_ids_are_scored_and_counted():
    rows = [{"task": "report", "reference": text, "prediction": text} for text, _ in REPORTS]
    results = score_predictions(rows)
    assert results["counts"]["missing_ids"] == 3 and results["counts"]["patients"] == 3
    assert results["tasks"]["report"]["text"]["rouge_l"] == 1
    assert "3 answers have no id" in results_table(results)


def test_reconstructions_of_one_patient_are_drawn_together():
    """Twenty copies of the same answers for the same patients make no interval narrower."""
    pairs = [
        *REPORTS,
        ("Consolidation is seen.", "Normal."),
        ("Hiatal hernia.", "Hiatal hernia."),
        ("Normal.", "Nodule."),
    ]
    once = [row(k, "report", reference, text) for k, (reference, text) in enumerate(pairs)]
    many = [{**r, "id": f"{r['id']}_{copy}"} for r in once for copy in range(20)]
    intervals = [score_predictions(rows)["tasks"]["report"]["intervals"] for rows in (once, many)]
    for name in ("text.mean_bleu_1", "text.rouge_l", "findings.micro.f1", "findings.crg"):
        assert intervals[0][name] == pytest.approx(intervals[1][name])


ODD = {
    "empty": "",
    "newline": "\n",
    "10,000 words": " ".join(["nodule"] * 10_000),
    "not Latin": "肺に結節なし",
    "marks": "{} \\ \" 'x' |",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_predictions_have_stated_scores(name):
    """Alone, and beside a perfect one: empty, blank and non-Latin texts score 0 and stay in the mean."""
    reference = "No nodule was detected."
    rows = [row(0, "report", reference, ODD[name]), row(1, "report", "Emphysema is seen.", "Emphysema is seen.")]
    alone = score_predictions(rows[:1])["tasks"]["report"]
    assert all(value is None or 0 <= value <= 1 for value in alone["text"].values())
    both = score_predictions(rows)
    report = both["tasks"]["report"]
    assert report["empty"] == (name in ("empty", "newline"))
    if name != "10,000 words":
        assert report["text"]["rouge_l"] == 0.5 and report["text"]["mean_bleu_1"] == pytest.approx(0.5)
        assert report["findings"]["micro"]["f1"] == 1
    else:
        assert report["text"]["rouge_1"] == pytest.approx((2 / 10_004 + 1) / 2)
        assert report["findings"]["per_finding"]["Lung nodule"]["predicted"] == 1
        assert report["collapse"]["predictions"]["loop"]["words"] == 9_999
    json.dumps(both)
    results_table(both)


# --- two systems --------------------------------------------------------------------------------------------------


@pytest.fixture
def two_systems():
    """Forty patients; the second system reads the findings, the first always writes the same."""
    findings = ["Emphysema is observed.", "Consolidation is seen.", "Heart size is normal.", "Hiatal hernia is seen."]
    references = [f"{findings[k % 4]} Trachea is open." for k in range(40)]
    first = [
        row(k, "report", reference, "Heart size is normal. Trachea is open.") for k, reference in enumerate(references)
    ]
    return first, [{**r, "prediction": r["reference"]} for r in first]


def test_comparison_of_two_systems(two_systems):
    first, second = two_systems
    result = compare_predictions([*first[1:], row(90, "report", "a", "b")], second[::-1], permutations=500)
    assert (result["matched"], result["only_first"], result["only_second"]) == (39, 1, 1)
    report = result["tasks"]["report"]
    assert report["text.rouge_l"]["second"] == 1 and report["text.rouge_l"]["difference"] > 0
    assert report["findings.macro.f1"]["p_value"] == pytest.approx(1 / 501)
    assert report["findings.macro.f1"]["interval"][0] > 0
    alone = score_predictions(first[1:])["tasks"]["report"]
    assert report["text.bleu_4"]["first"] == alone["text"]["bleu_4"]
    table = comparison_table(result, ("constant", "reader"))
    assert (
        "| report | constant | reader | difference | n | p (uncorrected) |" in table
        and "39 records are in both" in table
    )


def test_comparison_errors(two_systems):
    first, second = two_systems
    with pytest.raises(PredictionsError, match="No record is in both"):
        compare_predictions(first[:5], second[5:])
    with pytest.raises(PredictionsError, match="'r3' has another reference"):
        compare_predictions(first, [{**r, "reference": "x"} if r["id"] == "r3" else r for r in second])


def test_subgroups_of_a_file(two_systems, tmp_path):
    metadata = tmp_path / "metadata.csv"
    lines = [f"valid_{k}_a_1.nii.gz,{'MF'[k % 2]},0{20 + k}Y" for k in range(40)]
    metadata.write_text("\n".join(["VolumeName,PatientSex,PatientAge", *lines]), encoding="utf-8")
    results = score_predictions(two_systems[0], metadata=metadata, resamples=100)
    table = results["tasks"]["report"]["subgroups"]
    assert {(r["by"], r["group"]): r["count"] for r in table if r["by"] == "sex"} == {
        ("sex", "M"): 20,
        ("sex", "F"): 20,
    }
    women = score_predictions(two_systems[0][1::2])["tasks"]["report"]
    found = next(r for r in table if r["group"] == "F")
    assert found["text.rouge_l"]["value"] == pytest.approx(women["text"]["rouge_l"])
    assert "| sex: F | 20 | 20 |" in results_table(results)


def test_write_results_leaves_no_partial_file(rows, tmp_path):
    results = score_predictions(rows)
    write_results(results, tmp_path / "new" / "results.json")
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == results
    assert (tmp_path / "new" / "results.md").read_text() == results_table(results)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["results.json", "results.md"]


def test_duplicate_ids_are_counted(rows, caplog):
    results = score_predictions([*rows, rows[0]])
    assert results["counts"]["duplicate_ids"] == 1 and "repeat the id" in caplog.text


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
    assert results["counts"] == {"predictions": 1, "scans": 0, "patients": 1, "duplicate_ids": 0, "missing_ids": 1}


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


def test_command_line_against_another_file(two_systems, tmp_path, capsys):
    from samf.evaluation.scoring import main

    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in zip("ab", two_systems, strict=True)]
    main([str(paths[1]), "--against", str(paths[0]), "--output", str(tmp_path / "difference.json")])
    saved = json.loads((tmp_path / "difference.json").read_text(encoding="utf-8"))
    assert saved["tasks"]["report"]["text.rouge_l"]["second"] == 1
    assert f"| report | {paths[0]} | {paths[1]} |" in capsys.readouterr().out
    main([str(paths[1]), "--against", str(paths[0]), "--permutations", "20", "--output", str(tmp_path / "few.json")])
    assert json.loads((tmp_path / "few.json").read_text(encoding="utf-8"))["permutations"] == 20
    with pytest.raises(SystemExit):
        main([str(paths[1]), "--against", str(paths[0]), "--metadata", "x.csv"])
    assert "no meaning with --against" in capsys.readouterr().err


def test_radeval_of_two_systems_is_compared_too(two_systems, monkeypatch):
    module = types.ModuleType("radeval")
    module.RadEval = lambda **options: lambda refs, hyps: {"green": [float(r == h) for r, h in zip(refs, hyps)]}  # noqa: B905
    monkeypatch.setitem(sys.modules, "radeval", module)
    tested = compare_predictions(*two_systems, radeval=("green",), permutations=50)["tasks"]["report"]
    assert tested["radeval.green"]["second"] == 1 and tested["radeval.green"]["first"] < 1


def test_command_line_of_a_bad_file(tmp_path, capsys):
    from samf.evaluation.scoring import main

    with pytest.raises(SystemExit, match="no such file"):
        main([str(tmp_path / "nowhere.jsonl")])


# --- types of fields ----------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"prediction": NAN}, "prediction is NaN; expected a text.*fillna"),
        ({"reference": NAN}, "reference is NaN"),
        ({"prediction": ["Emphysema."]}, "prediction is a list of 1; expected a text.*choose one"),
        ({"reference": ["Normal.", "Clear."]}, "reference is a list of 2"),
        ({"prediction": 3}, "prediction is the number 3"),
        ({"prediction": True}, "prediction is true"),
        ({"prediction": {"text": "x"}}, "prediction is an object"),
        ({"question": 7.5}, r"question is the number 7\.5"),
        ({"task": 1}, "task is the number 1"),
        ({"task": "multiple_choice", "choices": "abcd"}, "choices is a text; expected a list of texts"),
        ({"task": "multiple_choice", "choices": ["a", 2]}, "choices is a list of 2; expected a list of texts"),
        ({"choices": "abcd"}, "choices is a text"),
        ({"tokens": "12"}, "tokens is a text; expected a whole number"),
        ({"tokens": -1}, "tokens is the number -1"),
        ({"truncated": "false"}, "truncated is a text; expected true or false"),
        ({"id": NAN}, "id is NaN; expected a text or a whole number"),
        ({"scan_id": ["valid_1_a"]}, "scan_id is a list"),
        ({"patient_id": 3.0}, "patient_id is the number 3"),
        ({"volume": 5}, "volume is the number 5"),
        ({"prediction": "\ud83d"}, "prediction holds half of a surrogate pair"),
    ],
)
def test_fields_of_the_wrong_type_are_named_with_file_and_line(changed, message, tmp_path):
    rows = [row(0, "report", "Normal.", "Normal."), {**row(1, "report", "Normal.", "Clear."), **changed}]
    path = write(tmp_path / "predictions.jsonl", rows)
    with pytest.raises(PredictionsError, match=rf"predictions\.jsonl, line 2: {message}"):
        score_predictions(path, resamples=0)
    with pytest.raises(PredictionsError, match=rf"row 1: {message}"):
        compare_predictions(rows, rows)
    with pytest.raises(PredictionsError, match="row 0: a str"):
        score_predictions(["a row"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_predictions_in_other_encodings(encoding, tmp_path):
    """What a byte order mark names is read; a code page is an error with the remedy."""
    path = tmp_path / "predictions.jsonl"
    line = json.dumps(row(1, "report", "Müller: no nodule – normal.", "No nodule."), ensure_ascii=False)
    path.write_text(line, encoding=encoding)
    if encoding == "cp1252":
        with pytest.raises(PredictionsError, match=r"predictions\.jsonl: not UTF-8.*iconv"):
            score_predictions(path, resamples=0)
    else:
        assert read_predictions(path)[0]["reference"] == "Müller: no nodule – normal."


# --- what a table must not hide -------------------------------------------------------------------------------------


def test_no_figure_of_few_cases_is_certain(two_systems):
    """Perfect answers: every interval has a width, and n stands beside each finding's figures."""
    for rows in (two_systems[1], two_systems[1][:1]):
        table = results_table(score_predictions(rows))
        assert "1.000 (1.000 to 1.000" not in table
    assert "| Emphysema | 1.000 (n 1) | 1.000 (n 1) | 1.000 (n 1) | 1 | 1 |" in table, "one case has no interval"
    table = results_table(score_predictions(two_systems[1]))
    assert f"| Emphysema | {' | '.join([f'1.000 ({0.025**0.1:.3f} to 1.000; n 10)'] * 3)} | 10 | 10 |" in table
    compared = comparison_table(compare_predictions(*two_systems, permutations=50))
    assert "p (uncorrected)" in compared and "are expected below 0.05 by chance" in compared


def test_patients_that_are_not_known_are_said(rows):
    assert "Patients are not known" not in results_table(score_predictions(rows, resamples=0))
    anonymous = [{**r, "id": f"q{k}", "scan_id": f"case {k}"} for k, r in enumerate(rows)]
    results = score_predictions(anonymous, resamples=0)
    table = results_table(results)
    assert results["statistics"]["unknown_patients"] == 8 and "8 scans, patients not known." in table
    assert "- Patients are not known for 8 of 8 answers" in table
    named = score_predictions([{**r, "patient_id": k // 4} for k, r in enumerate(anonymous)], resamples=0)
    assert named["cohort"]["patients"] == 2 and "Patients are not known" not in results_table(named)


def test_results_state_what_they_depend_on(rows):
    results = score_predictions(rows, resamples=0, finding_names=["Emphysema"])
    assert results["schema"] == SCHEMA and results["code"]["source"] and results["code"]["numpy"] == np.__version__
    assert results["settings"]["finding_names"] == ["Emphysema"] and results["settings"]["labeller"] == "rules"
    assert results["predictions_digest"] == score_predictions(rows[::-1], resamples=0)["predictions_digest"]
    other = [{**rows[0], "prediction": "Other."}, *rows[1:]]
    assert results["predictions_digest"] != score_predictions(other, resamples=0)["predictions_digest"]
    table = results_table({**results, "model": {"model": "runs/ao2d", "weights": "sha256 12"}})
    assert "- Model: runs/ao2d, weights sha256 12." in table and f"source {results['code']['source']}" in table


def test_cider_of_identical_references_says_why_it_is_0():
    same = [row(k, "report", "Normal chest.", "Normal chest.") for k in range(3)]
    results = score_predictions(same, resamples=0)
    assert results["tasks"]["report"]["text"]["cider"] == 0
    assert "CIDEr (0 to 10), report: 0 because all references are the same words" in results_table(results)
    assert score_predictions([*same, row(9, "report", "Nodule.", "Mass.")], resamples=0)["notes"] == {}


def test_a_metric_that_fails_is_a_note_and_costs_no_other(two_systems, monkeypatch):
    """RadEval 2.2.1's radgraph imports a package of another name than it installs; a BERTScore model may not load."""
    calls = []

    class RadEval:
        def __init__(self, metrics, per_sample, show_progress):
            calls.append(metrics)
            if metrics == ["radgraph"]:
                raise ModuleNotFoundError("No module named 'RadEval'")

        def __call__(self, refs, hyps):
            return {"ratescore": [0.5] * len(hyps)}

    def broken(*texts, **options):
        raise RuntimeError("no such model\nand a long story")

    module = types.ModuleType("radeval")
    module.RadEval = RadEval
    monkeypatch.setitem(sys.modules, "radeval", module)
    monkeypatch.setattr(metric_samples, "bertscore_samples", broken)
    options = {"radeval": ["radgraph", "ratescore"], "bertscore_model": "some/model", "bertscore_layers": 3}
    results = score_predictions(two_systems[0], resamples=0, **options)
    assert results["tasks"]["report"]["radeval"] == {"ratescore": 0.5} and calls == [["radgraph"], ["ratescore"]]
    assert results["tasks"]["report"]["findings"]["macro"]["f1"] is not None
    assert results["not_available"]["bertscore_f1"] == "It failed with RuntimeError: no such model"
    assert "ModuleNotFoundError" in results["not_available"]["radgraph_simple"]
    compared = compare_predictions(*two_systems, permutations=10, **options)
    assert "radeval.ratescore" in compared["tasks"]["report"]
    assert "radgraph_simple" in comparison_table(compared)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"finding_names": ["Gout"]}, "Unknown findings"),
        ({"radeval": ["bleu"]}, "radeval names"),
        ({"resamples": -1}, "resamples is -1"),
        ({"bertscore_model": "some/model"}, "no layer on record"),
        ({"bertscore_model": "some/model", "bertscore_layers": 0}, "bertscore_layers is 0"),
        ({"metadata": "nowhere.csv"}, "nowhere.csv: no such file"),
        ({"labeller": "nowhere.pth"}, "nowhere.pth: no such file"),
    ],
)
def test_options_are_checked_without_predictions(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ScoringOptions(**options).check()
        ScoringOptions(**options).check_models()
