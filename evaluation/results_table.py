"""Results as Markdown: what `scoring.score_predictions` and `scoring.compare_predictions` return, for people."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TEXT_NAMES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "mean_bleu_1": "mean BLEU-1",
    "mean_bleu_2": "mean BLEU-2",
    "mean_bleu_3": "mean BLEU-3",
    "mean_bleu_4": "mean BLEU-4",
    "meteor": "METEOR",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr (0 to 10)",
    "bertscore_p": "BERTScore P",
    "bertscore_r": "BERTScore R",
    "bertscore_f1": "BERTScore F1",
    "crg": "CRG",
    "macro": "macro means of findings",
    "micro": "micro-F1 of findings",
    "judge_score": "judge's score",
}
# How a figure of samples becomes one of the corpus, and what the published SAMF code computes (one pair at a time).
_POOLED, _MEAN = "counts pooled", "mean of samples"
_AS_PUBLISHED = ("mean_bleu_1", "mean_bleu_2", "mean_bleu_3", "mean_bleu_4", "rouge_1", "rouge_2", "rouge_l")
_ALMOST_AS_PUBLISHED = {"meteor": "words split differently", "bertscore_f1": "with roberta-large"}
BASELINE_NAMES = {
    "constant_report": "constant: the most frequent report",
    "constant_answer": "constant: the most frequent answer",
    "nearest_label_prior": "nearest label prior: the most typical report",
    "shuffled": "shuffled: another patient's answer",
    "chance": "chance: labels guessed by their frequency",
}
_BASELINE_COLUMNS = ("text.bleu_1", "text.bleu_4", "text.meteor", "text.rouge_l", "text.cider", "text.bertscore_f1")
_FINDING_COLUMNS = ("macro.f1", "micro.f1", "crg", "sides.f1", "sizes.f1")
LONGEST_QUOTE = 12
CHANCE_LEVEL = 0.05


def results_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: text metrics by task, multiple choice, findings, baselines, cohort, what is missing."""
    tasks = results["tasks"]
    blocks = [_task_table(tasks), _text_table(tasks)]
    if "multiple_choice" in tasks:
        blocks.append(_choice_table(tasks["multiple_choice"]))
    if results.get("position_bias"):
        blocks.append(position_bias_table(results["position_bias"]).strip())
    if "report" in tasks:
        blocks.append(_finding_table(tasks["report"]))
    blocks += [_baseline_table(task, scores) for task, scores in tasks.items() if task != "multiple_choice"]
    blocks += [_subgroup_table(task, scores) for task, scores in tasks.items()]
    if answers := results.get("answers") or (results.get("generation") or {}).get("tasks"):
        blocks.append(generation_table(answers))
    notes = [*_cohort_notes(results), *_collapse_notes(tasks), *_generation_notes(results.get("generation"))]
    notes += _missing_notes(results["not_available"])
    notes += [f"- {_note_name(name)}: {what}" for name, what in results["notes"].items()]
    notes += _provenance_notes(results)
    return "\n\n".join(block for block in [*blocks, "\n".join(notes)] if block) + "\n"


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column left-aligned, the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def figure(value: float | None, interval: Sequence[float] | None = None, n: int | None = None) -> str:
    """ "0.412 (0.398 to 0.427; n 57)", "0.412 (n 57)" without an interval; "n/a" for None."""
    if value is None:
        return "n/a"
    bracket = [] if interval is None else [f"{interval[0]:.3f} to {interval[1]:.3f}"]
    bracket += [] if n is None else [f"n {n}"]
    return f"{value:.3f} ({'; '.join(bracket)})" if bracket else f"{value:.3f}"


def generation_table(answers: Mapping[str, Any]) -> str:
    """What answering took, by task: see `answer_folder.answer_statistics`."""
    header = ["generation", "tokens", "tokens (mean)", "tokens (most)", "s a volume", "of it reading", "tokens/s"]
    names = ("tokens", "tokens_mean", "tokens_longest", "seconds_per_volume", "read_seconds_per_volume")
    return markdown_table(
        header,
        [[task, *(_short(taken.get(n)) for n in (*names, "tokens_per_second"))] for task, taken in answers.items()],
    )


def _short(value: float | None) -> str:
    if value is None:
        return "n/a"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _task_table(tasks: Mapping[str, Any]) -> str:
    rows = [[task, s["count"], s["empty"], s["truncated"], s["patients"]] for task, s in tasks.items()]
    return markdown_table(["task", "answers", "empty", "truncated", "patients (n)"], rows)


def _counted(what: str, scores: Mapping[str, Any]) -> str:
    """A heading with the number of patients that all figures below it depend on."""
    return f"{what} (n {scores['patients']})"


def _text_table(tasks: Mapping[str, Any]) -> str:
    def cell(scores: Mapping[str, Any], name: str) -> str:
        return figure(scores["text"][name], scores["intervals"].get(f"text.{name}"))

    def published(name: str) -> str:
        return "yes" if name in _AS_PUBLISHED else _ALMOST_AS_PUBLISHED.get(name, "")

    names = [name for name in TEXT_NAMES if any(scores["text"].get(name) is not None for scores in tasks.values())]
    rows = [
        [
            TEXT_NAMES[name],
            *(cell(scores, name) for scores in tasks.values()),
            _POOLED if name.startswith("bleu") else _MEAN,
            published(name),
        ]
        for name in names
    ]
    heads = [_counted(task, scores) for task, scores in tasks.items()]
    return markdown_table(["text", *heads, "over the corpus", "as the published code"], rows)


def _choice_table(scores: Mapping[str, Any]) -> str:
    choice, intervals = scores["multiple_choice"], scores["intervals"]
    names = ("accuracy", "precision", "recall", "f1")
    cells = [figure(choice[name], intervals.get(f"multiple_choice.{name}")) for name in names]
    header = [_counted("multiple choice", scores), "accuracy", "precision", "recall", "F1", "unparsed"]
    rows = [[f"{choice['count']} questions", *cells, choice["unparsed"]]]
    baselines = scores.get("baselines") or {}
    if constant := baselines.get("most_frequent_letter"):
        drawn = constant.get("intervals", {})
        rows.append([f"always ({constant['letter']})", *(figure(constant[n], drawn.get(n)) for n in names), ""])
    rows.append(["chance", figure(choice["chance"]), "", "", "", ""])
    return markdown_table(header, rows)


def _finding_table(report: Mapping[str, Any]) -> str:
    findings, intervals, counts = report["findings"], report["intervals"], report["n"]

    def cell(value: float | None, path: str) -> str:
        return figure(value, intervals.get(path), counts.get(path))

    def row(name: str, scores: Mapping[str, Any], key: str) -> list[Any]:
        figures = [cell(scores[f], f"findings.{key}.{f}") for f in ("precision", "recall", "f1")]
        return [name, *figures, scores.get("support", ""), scores.get("predicted", "")]

    rows = [row(name, scores, f"per_finding.{name}") for name, scores in findings["per_finding"].items()]
    rows.append(row(f"**macro** ({findings['macro_findings']} findings)", findings["macro"], "macro"))
    rows.append(row("**micro**", findings["micro"], "micro"))
    rows.append(row("sides of findings", findings["sides"], "sides"))
    rows.append(row("sizes in mm", findings["sizes"], "sizes"))
    table = markdown_table(["finding in reports", "precision", "recall", "F1", "in references", "in predictions"], rows)
    notes = [f"CRG {cell(findings['crg'], 'findings.crg')}; all-negative answers have 0.333."]
    if findings["effusion_side"]["count"]:
        side = findings["effusion_side"]
        share = cell(side["accuracy"], "findings.effusion_side.accuracy")
        notes.append(f"Side of effusion right in {share} of {side['count']} reports with one.")
    for name, value in report.get("radeval", {}).items():
        notes.append(f"{name} {cell(value, f'radeval.{name}')}.")
    return f"{table}\n\n{' '.join(notes)}"


def _look_up(scores: Mapping[str, Any], path: str) -> float | None:
    found: Any = scores
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _baseline_table(task: str, scores: Mapping[str, Any]) -> str:
    if not scores.get("baselines"):
        return ""
    columns = [name for name in _BASELINE_COLUMNS if _look_up(scores, name) is not None]
    columns += [f"findings.{name}" for name in _FINDING_COLUMNS] if "findings" in scores else []
    systems = {"**this system**": scores, **{BASELINE_NAMES[name]: s for name, s in scores["baselines"].items()}}
    rows = [
        [name, *(figure(_look_up(system, c), (system.get("intervals") or {}).get(c)) for c in columns)]
        for name, system in systems.items()
    ]
    header = [_column_name(column) for column in columns]
    return markdown_table([_counted(f"{task} beside baselines that read no image", scores), *header], rows)


def _column_name(path: str) -> str:
    group, _, name = path.partition(".")
    if group == "text":
        return TEXT_NAMES[name]
    if group == "multiple_choice":
        return {"f1": "F1"}.get(name, name)
    return {"crg": "CRG", "macro.f1": "macro-F1", "micro.f1": "micro-F1"}.get(name, f"{name.partition('.')[0]} F1")


def _subgroup_table(task: str, scores: Mapping[str, Any]) -> str:
    table = scores.get("subgroups")
    if not table:
        return ""
    names = [name for name in table[0] if name not in ("by", "group", "count", "patients")]
    rows = [
        [f"{row['by']}: {row['group']}", row["count"], row["patients"], *(figure(**row[name]) for name in names)]
        for row in table
    ]
    return markdown_table([task, "answers", "patients", *map(_column_name, names)], rows)


def _cohort_notes(results: Mapping[str, Any]) -> list[str]:
    cohort, counts = results["cohort"], results["counts"]
    volumes = f"{cohort['volumes']} volumes, " if cohort["volumes"] else ""
    unknown = results["statistics"]["unknown_patients"]
    patients = f"{cohort['patients']} patients" if unknown < cohort["predictions"] else "patients not known"
    notes = [f"- Cohort: {cohort['predictions']} answers, {volumes}{cohort['scans']} scans, {patients}."]
    notes += _unknown_patients(unknown, cohort["predictions"])
    for reason, excluded in cohort["excluded"].items():
        examples = f", e.g. {', '.join(excluded['ids'][:3])}" if excluded["ids"] else ""
        notes.append(f"- Left out: {excluded['count']} ({reason}){examples}.")
    if counts["duplicate_ids"]:
        notes.append(f"- {counts['duplicate_ids']} answers repeat an id; all of them are scored.")
    if counts["missing_ids"]:
        notes.append(f"- {counts['missing_ids']} answers have no id.")
    made = results["statistics"]
    if made["intervals"]:
        notes.append(
            f"- In brackets: {made['level']:.0%} intervals ({made['method']}), and n, the patients that a figure depends on."
        )
    return notes


def _unknown_patients(unknown: int, answers: int) -> list[str]:
    if not unknown:
        return []
    return [
        f"- Patients are not known for {unknown} of {answers} answers (no patient_id, and no name of CT-RATE's): there each "
        "scan, or answer without one, counts as a patient, and where a patient has several the intervals and tests claim too "
        "much. Give each row a patient_id."
    ]


def _provenance_notes(results: Mapping[str, Any]) -> list[str]:
    """What the answers and the scores come from."""
    settings, code = results["settings"], results["code"]
    chosen = {name: value for name, value in settings.items() if name != "finding_names" and value not in (None, [])}
    said = ", ".join(f"{name} {value}" for name, value in chosen.items())
    version = f"samf {code['samf']}, " if "samf" in code else ""
    notes = [
        f"- Scores: {version}source {code['source']}; {said}; {len(settings['finding_names'])} findings; "
        f"results.json of schema {results['schema']}."
    ]
    if model := results.get("model"):
        notes.insert(0, f"- Model: {model.get('model', 'not named')}, weights {model.get('weights', 'not known')}.")
    return notes


def _missing_notes(not_available: Mapping[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, why in not_available.items():
        names.setdefault(why, []).append(TEXT_NAMES.get(name, name))
    return [f"- {', '.join(group)}: not available. {why}" for why, group in names.items()]


def _note_name(name: str) -> str:
    task, _, metric = name.partition(": ")
    return f"{TEXT_NAMES.get(metric, metric)}, {task}" if metric else name


def _collapse_notes(tasks: Mapping[str, Any]) -> list[str]:
    collapse = tasks.get("report", {}).get("collapse")
    if not collapse:
        return []
    ours, theirs = collapse["predictions"], collapse["references"]
    notes = [
        f"- Different reports: {figure(ours['distinct_ratio'])} of all (references {figure(theirs['distinct_ratio'])}); "
        f"the commonest is {figure(ours['most_frequent'])} of all ({figure(theirs['most_frequent'])})."
    ]
    for name, meaning in (("template", "in half of the reports"), ("loop", "twice in one report")):
        run = ours[name]
        notes.append(
            f"- Longest run of words {meaning}: {run['words']} (references {theirs[name]['words']}){_quote(run['text'])}."
        )
    return notes


def _quote(text: str) -> str:
    words = text.split()
    if not words:
        return ""
    return f': "{" ".join(words[:LONGEST_QUOTE])}{" …" if len(words) > LONGEST_QUOTE else ""}"'


def _generation_notes(summary: Mapping[str, Any] | None) -> list[str]:
    if not summary:
        return []
    processes = f" with {summary['processes']} processes" if summary.get("processes", 1) > 1 else ""
    before = f"; {summary['resumed']} more were there from before" if summary["resumed"] else ""
    notes = [f"- {summary['written']} answers made in {summary['seconds']:.0f} s{processes}{before}."]
    if summary["failures"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary.get("failure_kinds", {}).items())
        notes.append(
            f"- {summary['failures']} records failed and are in no figure ({kinds}); failures.jsonl lists them."
        )
    return notes


def position_bias_table(bias: Mapping[str, Any]) -> str:
    """What `multiple_choice.position_bias` found, as Markdown lines, with `left_out` of `not_rotated` where it is there."""
    lines = []
    if not bias["questions"]:
        lines.append("- Places of the options: no question was answered in all rotations.")
    else:
        intervals = bias.get("intervals", {})
        patients = f" (n {bias['patients']})" if "patients" in bias else ""
        named = ", ".join(f"{letter} {share:.2f}" for letter, share in bias["named_by_letter"].items())
        right = ", ".join(f"{letter} {share:.2f}" for letter, share in bias["accuracy_by_letter"].items())
        lines += [
            f"- Places of the options: {bias['questions']} questions in every rotation{patients}, accuracy "
            f"{figure(bias['accuracy'], intervals.get('accuracy'))}, from {bias['accuracy_lowest']:.3f} to "
            f"{bias['accuracy_highest']:.3f} by rotation; the same option in all rotations for "
            f"{figure(bias['consistency'], intervals.get('consistency'))} of the questions.",
            f"- Letters named: {named or 'none'}. Accuracy by the right option's letter: {right}. "
            f"{bias['unparsed']} answers named no option.",
        ]
    left_out = [f"{count} ({reason})" for reason, count in bias.get("left_out", {}).items()]
    left_out += [f"{bias['incomplete']} (not answered in all rotations)"] if bias["incomplete"] else []
    if left_out:
        lines.append(f"- Questions not in these figures: {', '.join(left_out)}.")
    return "\n".join(lines) + "\n"


def comparison_table(comparison: Mapping[str, Any], names: Sequence[Any] = ("first", "second")) -> str:
    """What `compare_predictions` returns, as Markdown: both figures, difference with interval, and p-value."""
    blocks, tests = [], 0
    for task, metrics in comparison["tasks"].items():
        rows = [
            [_metric_name(name), figure(m["first"]), figure(m["second"]), _signed(m), m["n"], f"{m['p_value']:.4f}"]
            for name, m in metrics.items()
            if m["p_value"] is not None and "per_finding" not in name
        ]
        blocks.append(markdown_table([task, *names, "difference", "n", "p (uncorrected)"], rows))
        tests += len(rows)
    unmatched = f"{comparison['only_first']} only in the first, {comparison['only_second']} only in the second"
    note = (
        f"{comparison['matched']} records are in both ({unmatched}). p: paired randomisation over patients, two-sided, "
        f"uncorrected: of {tests} p-values {tests * CHANCE_LEVEL:.1f} are expected below {CHANCE_LEVEL} by chance. n: patients."
    )
    notes = _unknown_patients(comparison.get("unknown_patients", 0), comparison["matched"])
    notes += _missing_notes(comparison.get("not_available", {}))
    return "\n\n".join([*blocks, note, *(["\n".join(notes)] if notes else [])]) + "\n"


def _metric_name(path: str) -> str:
    name = path.partition(".")[2]
    return TEXT_NAMES.get(name, name.replace(".", " "))


def _signed(metric: Mapping[str, Any]) -> str:
    interval = metric["interval"]
    bounds = "" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})"
    return f"{metric['difference']:+.3f}{bounds}"
