"""Render results and comparisons as Markdown: what `score_predictions` and `compare_predictions` return."""

from collections.abc import Mapping, Sequence
from typing import cast

from samf.data.schema import JsonObject
from samf.evaluation.markdown import TEXT_NAMES, format_value, markdown_table, metric_name
from samf.evaluation.results_notes import missing_notes, results_notes, unknown_patient_notes
from samf.evaluation.schema import (
    AnswerStatistics,
    BaselineScores,
    ChoiceBaseline,
    Comparison,
    Difference,
    PerFinding,
    PositionBias,
    PrecisionRecallF1,
    Results,
    SupportedScores,
    TaskScores,
)

__all__ = [
    "BASELINE_NAMES",
    "TEXT_NAMES",
    "comparison_table",
    "format_value",
    "markdown_table",
    "position_bias_table",
    "results_table",
    "value_at",
]

# How the values of samples are combined over a corpus, and what the reference implementation computes (one pair at a time).
_POOLED, _MEAN = "counts pooled", "mean of samples"
_AS_REFERENCE = ("mean_bleu_1", "mean_bleu_2", "mean_bleu_3", "mean_bleu_4", "rouge_1", "rouge_2", "rouge_l")
_ALMOST_AS_REFERENCE = {"meteor": "words split differently", "bertscore_f1": "with roberta-large"}
BASELINE_NAMES = {
    "constant_report": "constant: the most frequent report",
    "constant_answer": "constant: the most frequent answer",
    "nearest_label_prior": "nearest label prior: the most typical report",
    "shuffled": "shuffled: another patient's answer",
    "chance": "chance: labels guessed by their frequency",
}
_BASELINE_COLUMNS = ("text.bleu_1", "text.bleu_4", "text.meteor", "text.rouge_l", "text.cider", "text.bertscore_f1")
_FINDING_COLUMNS = ("macro.f1", "micro.f1", "crg", "sides.f1", "sizes.f1")
_SIGNIFICANCE = 0.05


def results_table(results: Results) -> str:
    """Return the results as Markdown: text metrics, multiple choice, findings, baselines, subgroups, generation, notes."""
    tasks = results["tasks"]
    blocks = [_task_table(tasks), _text_table(tasks)]
    if "multiple_choice" in tasks:
        blocks.append(_choice_table(tasks["multiple_choice"]))
    if bias := results.get("position_bias"):
        blocks.append(position_bias_table(bias).strip())
    if "report" in tasks:
        blocks.append(_finding_table(tasks["report"]))
    blocks += [_baseline_table(task, scores) for task, scores in tasks.items() if task != "multiple_choice"]
    blocks += [_subgroup_table(task, scores) for task, scores in tasks.items()]
    generation = results.get("generation")
    if answers := results.get("answers") or (generation["tasks"] if generation else None):
        blocks.append(_generation_table(answers))
    return "\n\n".join(block for block in [*blocks, "\n".join(results_notes(results))] if block) + "\n"


def _generation_table(answers: Mapping[str, AnswerStatistics]) -> str:
    """Return the tokens and times of the answers by task: see `answer_statistics`."""
    header = ["generation", "tokens", "tokens (mean)", "tokens (most)", "s per volume", "of it reading", "tokens/s"]
    names = (
        "tokens",
        "tokens_mean",
        "tokens_longest",
        "seconds_per_volume",
        "read_seconds_per_volume",
        "tokens_per_second",
    )
    rows = [
        [task, *(_short(cast(float | None, statistics.get(name))) for name in names)]
        for task, statistics in answers.items()
    ]
    return markdown_table(header, rows)


def value_at(scores: Mapping[str, object] | TaskScores | BaselineScores | ChoiceBaseline, path: str) -> float | None:
    """Return the metric at a path like "findings.macro.f1" in the scores of a task; None where there is none."""
    found: object = scores
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return cast(float | None, found)


def _short(value: float | None) -> str:
    if value is None:
        return "n/a"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


# --- Tables of results ------------------------------------------------------------------------------------------


def _task_table(tasks: Mapping[str, TaskScores]) -> str:
    rows = [[task, s["count"], s["empty"], s["truncated"], s["patients"]] for task, s in tasks.items()]
    return markdown_table(["task", "answers", "empty", "truncated", "patients (n)"], rows)


def _counted(title: str, scores: TaskScores) -> str:
    """Return a heading with the number of patients that all values below it depend on."""
    return f"{title} (n {scores['patients']})"


def _text_table(tasks: Mapping[str, TaskScores]) -> str:
    def cell(scores: TaskScores, name: str) -> str:
        return format_value(scores["text"][name], scores["intervals"].get(f"text.{name}"))

    def reference(name: str) -> str:
        return "yes" if name in _AS_REFERENCE else _ALMOST_AS_REFERENCE.get(name, "")

    names = [name for name in TEXT_NAMES if any(scores["text"].get(name) is not None for scores in tasks.values())]
    rows = [
        [
            TEXT_NAMES[name],
            *(cell(scores, name) for scores in tasks.values()),
            _POOLED if name.startswith("bleu") else _MEAN,
            reference(name),
        ]
        for name in names
    ]
    heads = [_counted(task, scores) for task, scores in tasks.items()]
    return markdown_table(["text", *heads, "over the corpus", "as the reference implementation"], rows)


def _choice_table(scores: TaskScores) -> str:
    choice, intervals = scores["multiple_choice"], scores["intervals"]
    names = ("accuracy", "precision", "recall", "f1")
    cells = [
        format_value(value_at(scores, path), intervals.get(path)) for path in (f"multiple_choice.{n}" for n in names)
    ]
    header = [_counted("multiple choice", scores), "accuracy", "precision", "recall", "F1", "unparsed"]
    rows = [[f"{choice['count']} questions", *cells, str(choice["unparsed"])]]
    constant = cast(ChoiceBaseline | None, scores.get("baselines", {}).get("most_frequent_letter"))
    if constant:
        bounds = constant.get("intervals", {})
        cells = [format_value(value_at(constant, name), bounds.get(name)) for name in names]
        rows.append([f"always ({constant['letter']})", *cells, ""])
    rows.append(["chance", format_value(choice["chance"]), "", "", "", ""])
    return markdown_table(header, rows)


def _finding_table(report: TaskScores) -> str:
    findings, intervals, counts = report["findings"], report["intervals"], report["n"]

    def cell(value: float | None, path: str) -> str:
        return format_value(value, intervals.get(path), counts.get(path))

    def row(name: str, scores: PrecisionRecallF1 | SupportedScores | PerFinding, key: str) -> list[object]:
        values = (("precision", scores["precision"]), ("recall", scores["recall"]), ("f1", scores["f1"]))
        cells = [cell(value, f"findings.{key}.{metric}") for metric, value in values]
        return [name, *cells, scores.get("support", ""), scores.get("predicted", "")]

    rows = [row(name, scores, f"per_finding.{name}") for name, scores in findings["per_finding"].items()]
    rows.append(row(f"**macro** ({findings['macro_findings']} findings)", findings["macro"], "macro"))
    rows.append(row("**micro**", findings["micro"], "micro"))
    rows.append(row("laterality of findings", findings["sides"], "sides"))
    rows.append(row("sizes in mm", findings["sizes"], "sizes"))
    table = markdown_table(["finding in reports", "precision", "recall", "F1", "in references", "in predictions"], rows)
    notes = [f"CRG {cell(findings['crg'], 'findings.crg')}; all-negative answers have 0.333."]
    if findings["effusion_side"]["count"]:
        side = findings["effusion_side"]
        share = cell(side["accuracy"], "findings.effusion_side.accuracy")
        notes.append(f"Side of effusion correct in {share} of {side['count']} reports with one.")
    for name, value in report.get("radeval", {}).items():
        notes.append(f"{name} {cell(value, f'radeval.{name}')}.")
    return f"{table}\n\n{' '.join(notes)}"


def _baseline_table(task: str, scores: TaskScores) -> str:
    baselines = scores.get("baselines")
    if not baselines:
        return ""
    columns = [name for name in _BASELINE_COLUMNS if value_at(scores, name) is not None]
    columns += [f"findings.{name}" for name in _FINDING_COLUMNS] if "findings" in scores else []
    systems = {"**this system**": scores, **{BASELINE_NAMES[name]: s for name, s in baselines.items()}}
    rows = [
        [name, *(format_value(value_at(system, c), (system.get("intervals") or {}).get(c)) for c in columns)]
        for name, system in systems.items()
    ]
    header = [_column_name(column) for column in columns]
    return markdown_table([_counted(f"{task}, and baselines that read no image", scores), *header], rows)


def _column_name(path: str) -> str:
    group, _, name = path.partition(".")
    if group == "text":
        return TEXT_NAMES[name]
    if group == "multiple_choice":
        return {"f1": "F1"}.get(name, name)
    names = {"crg": "CRG", "macro.f1": "macro-F1", "micro.f1": "micro-F1", "sides.f1": "laterality F1"}
    return names.get(name, f"{name.partition('.')[0]} F1")


def _subgroup_table(task: str, scores: TaskScores) -> str:
    table: list[JsonObject] = scores.get("subgroups") or []
    if not table:
        return ""
    names = [name for name in table[0] if name not in ("by", "group", "count", "patients")]
    rows = [
        [f"{row['by']}: {row['group']}", row["count"], row["patients"], *(format_value(**row[name]) for name in names)]
        for row in table
    ]
    return markdown_table([task, "answers", "patients", *map(_column_name, names)], rows)


# --- Position bias ----------------------------------------------------------------------------------------------


def position_bias_table(bias: PositionBias) -> str:
    """Return what `position_bias` found, and what `not_rotated` left out, as Markdown list items."""
    lines = []
    if not bias["questions"]:
        lines.append("- Positions of the options: no question was answered in all rotations.")
    else:
        intervals = bias.get("intervals", {})
        patients = f" (n {bias['patients']})" if "patients" in bias else ""
        named = ", ".join(f"{letter} {share:.2f}" for letter, share in bias["named_by_letter"].items())
        right = ", ".join(f"{letter} {share:.2f}" for letter, share in bias["accuracy_by_letter"].items())
        lines += [
            f"- Positions of the options: {bias['questions']} questions in every rotation{patients}, accuracy "
            f"{format_value(bias['accuracy'], intervals.get('accuracy'))}, from {bias['accuracy_lowest']:.3f} to "
            f"{bias['accuracy_highest']:.3f} by rotation; the same option in all rotations for "
            f"{format_value(bias['consistency'], intervals.get('consistency'))} of the questions.",
            f"- Letters named: {named or 'none'}. Accuracy by the right option's letter: {right}. "
            f"{bias['unparsed']} answers named no option.",
        ]
    left_out = [f"{count} ({reason})" for reason, count in bias.get("left_out", {}).items()]
    left_out += [f"{bias['incomplete']} (not answered in all rotations)"] if bias["incomplete"] else []
    if left_out:
        lines.append(f"- Questions not included: {', '.join(left_out)}.")
    return "\n".join(lines) + "\n"


# --- Comparison of two systems ----------------------------------------------------------------------------------


def comparison_table(comparison: Comparison, names: Sequence[object] = ("first", "second")) -> str:
    """Return what `compare_predictions` returns as Markdown: both values, difference with interval, and p-value."""
    blocks, tests = [], 0
    for task, metrics in comparison["tasks"].items():
        rows = [
            [
                metric_name(name),
                format_value(m["first"]),
                format_value(m["second"]),
                _signed(m),
                m["n"],
                f"{m['p_value']:.4f}",
            ]
            for name, m in metrics.items()
            if m["p_value"] is not None and "per_finding" not in name
        ]
        blocks.append(markdown_table([task, *names, "difference", "n", "p (uncorrected)"], rows))
        tests += len(rows)
    unmatched = f"{comparison['only_first']} only in the first, {comparison['only_second']} only in the second"
    by_chance = f"{tests * _SIGNIFICANCE:.1f} are expected below {_SIGNIFICANCE} by chance"
    note = (
        f"{comparison['matched']} records are in both ({unmatched}). p: paired randomisation over patients, two-sided, "
        f"uncorrected: of {tests} p-values {by_chance}. n: patients."
    )
    notes = unknown_patient_notes(comparison.get("unknown_patients", 0), comparison["matched"])
    notes += missing_notes(comparison.get("not_available", {}))
    return "\n\n".join([*blocks, note, *(["\n".join(notes)] if notes else [])]) + "\n"


def _signed(metric: Difference) -> str:
    interval = metric["interval"]
    bounds = "" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})"
    return f"{metric['difference']:+.3f}{bounds}"
