"""The paper's tables with rows of our results, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import cast

from samf.evaluation.markdown import format_value, markdown_table
from samf.evaluation.report.paper_tables import COLUMNS, PAPER_TABLES, SOURCE, PaperRow, PaperTable
from samf.evaluation.report.systems import System
from samf.evaluation.results_table import BASELINE_NAMES, value_at
from samf.evaluation.schema import BaselineScores, ChoiceBaseline, Interval, TaskScores, TextScores

# The reference implementation's BLEU is a mean over samples; ours with pooled counts has a row of its own.
_REFERENCE_BLEU = {"bleu_1": "mean_bleu_1", "bleu_4": "mean_bleu_4"}
_CHOICE_COLUMNS = ("accuracy", "precision", "recall", "f1")

# Scores of a system or a baseline, or a group of them.
Scores = TaskScores | BaselineScores | Mapping[str, TextScores | ChoiceBaseline]


def paper_table(table: PaperTable, systems: Sequence[System]) -> str:
    """Return a table of the paper with our rows below it, as Markdown."""
    rows = [_paper_row(row, table.columns) for row in table.rows]
    for system in systems:
        scores = system.results["tasks"].get(table.task)
        if scores:
            rows += _our_rows(system, scores, table)
    rows += _baseline_rows(systems[:1], table)
    header = [f"Table {table.number}: {table.title}", *(COLUMNS[column] for column in table.columns)]
    notes = [f"- {note}" for note in table.notes]
    return markdown_table(header, rows) + ("\n\n" + "\n".join(notes) if notes else "")


def _paper_row(row: PaperRow, columns: Sequence[str]) -> list[str]:
    cells = [f"{row.values[c]:.3f}{' (?)' if c in row.suspect else ''}" if c in row.values else "" for c in columns]
    return [f"{row.name} (paper{', suspect' if row.suspect else ''})", *cells]


def _our_rows(system: System, scores: TaskScores, table: PaperTable) -> list[list[str]]:
    intervals = scores["intervals"]
    rows = [
        _row(f"**{system.name}** (n {scores['patients']})", scores, table, intervals),
        _row(f"{system.name}, BLEU with pooled counts", {"text": scores["text"]}, table, intervals, pooled=True),
    ]
    judged = system.judged(table.task)
    if "judge" in table.columns and judged and judged["mean"] is not None:
        rows[0][1 + table.columns.index("judge")] = format_value(judged["mean"], judged["interval"], judged["patients"])
    return rows


def _baseline_rows(systems: Sequence[System], table: PaperTable) -> list[list[str]]:
    """Return rows of the baselines that read no image, scored on the first system's records."""
    rows = []
    for system in systems:
        task = system.results["tasks"].get(table.task)
        baselines = task.get("baselines", {}) if task else {}
        for name in ("constant_report", "nearest_label_prior", "shuffled"):
            if name in baselines:
                scores = cast(BaselineScores, baselines[name])
                rows.append(_row(BASELINE_NAMES[name], scores, table, scores.get("intervals")))
        if "most_frequent_letter" in baselines:
            letter = cast(ChoiceBaseline, baselines["most_frequent_letter"])
            intervals = {f"multiple_choice.{name}": bounds for name, bounds in letter.get("intervals", {}).items()}
            rows.append(_row(f"constant: always ({letter['letter']})", {"multiple_choice": letter}, table, intervals))
    return rows


def _row(
    name: str,
    scores: Scores,
    table: PaperTable,
    intervals: Mapping[str, Interval] | None = None,
    *,
    pooled: bool = False,
) -> list[str]:
    """Return the cells of one system or baseline; with `pooled`, only BLEU of counts pooled over the corpus."""
    cells = []
    for column in table.columns:
        if pooled and column not in _REFERENCE_BLEU:
            cells.append("")  # the row above has it
            continue
        path = _path(column, pooled)
        value = value_at(scores, path)
        cells.append("" if value is None else format_value(value, (intervals or {}).get(path)))
    return [name, *cells]


def _path(column: str, pooled: bool) -> str:
    if column in _CHOICE_COLUMNS:
        return f"multiple_choice.{column}"
    return f"text.{column if pooled else _REFERENCE_BLEU.get(column, column)}"


def paper_comparison(systems: Sequence[System]) -> str:
    """Return tables 1 to 3 with our rows and notes on how to read them, as Markdown."""
    judges = ", ".join(sorted({str(system.judge["judge"].get("model")) for system in systems if system.judge}))
    notes = [
        f"- The paper's values: {SOURCE}. It gives no intervals; ours are 95 %, over patients (n).",
        "- BLEU in our first row is the mean over samples, as in the reference implementation, with our tokenisation.",
        "- The constant report and the shuffled answers read no image: they show what a metric awards for no content.",
        f"- Llama score: the paper's judge was a 70-billion-parameter Llama with CT-CHAT's prompt; "
        f"{f'ours is {judges} with our prompt' if judges else 'no judge.json was found'}.",
    ]
    return "\n\n".join([*(paper_table(table, systems) for table in PAPER_TABLES), "\n".join(notes)])
