"""One HTML file of an evaluation: tables, plots, cases with their slices. Nothing in it is loaded from elsewhere."""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from samf.evaluation.metrics.multiple_choice import parse_choice, reference_choice
from samf.evaluation.report.side_by_side import (
    AGREES,
    CONTRADICTS,
    UNSUPPORTED,
    Case,
    Marked,
    mark_report,
    report_scores,
)
from samf.evaluation.results_table import TEXT_NAMES

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { border: 1px solid #ccc; padding: .25rem .5rem; }
th { background: #f2f2f2; text-align: left; } td { text-align: right; vertical-align: top; }
td:first-child, .texts td { text-align: left; } img { max-width: 100%; } .note { color: #666; }
.agrees { background: #d6f0d8; } .contradicts { background: #f9c9c4; color: #8b0000; } .unsupported { background: #ffe8b3; }
section { margin: 2rem 0; } pre { white-space: pre-wrap; }
"""
_LEGEND = (
    f'<p class="note"><span class="{AGREES}">agrees with the reference</span> '
    f'<span class="{CONTRADICTS}">contradicts it, or its side</span> '
    f'<span class="{UNSUPPORTED}">is not in it</span>. Statements about the 18 findings alone, read by the rule-based '
    "labeller, which errs too.</p>"
)
_COLOURS = ("#1f6f8b", "#d1603d")
# What the forest plot shows; CIDEr goes to 10.
_FOREST = {
    "report": ("mean_bleu_1", "bleu_1", "mean_bleu_4", "bleu_4", "meteor", "rouge_1", "rouge_2", "rouge_l", "cider")
    + ("bertscore_p", "bertscore_r", "bertscore_f1"),
}
_FINDINGS = {"macro.f1": "findings, macro-F1", "micro.f1": "findings, micro-F1", "crg": "CRG", "sides.f1": "sides, F1"}
_CHOICES = ("accuracy", "precision", "recall", "f1")
_SCALE = {"cider": 10.0}


# --- text ---------------------------------------------------------------------------------------------------------


def markdown_to_html(text: str) -> str:
    """Tables, lists, headings and paragraphs of the Markdown that this package writes; all else is escaped."""
    return "\n".join(_block(block.splitlines()) for block in re.split(r"\n\s*\n", text.strip()) if block.strip())


def _block(lines: Sequence[str]) -> str:
    if lines[0].startswith("|"):
        header, _, *rows = [_cells(line) for line in lines]
        head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><tr>{head}</tr>{body}</table>"
    if lines[0].startswith("- "):
        return "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>"
    heading = re.match(r"(#+) (.*)", lines[0])
    if heading:
        level = len(heading[1])
        rest = _block(lines[1:]) if lines[1:] else ""
        return f"<h{level}>{_inline(heading[2])}</h{level}>{rest}"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)


def marked_html(marked: Marked) -> str:
    """A marked report with its statements coloured."""
    spans = [
        html.escape(span.text)
        if span.verdict is None
        else f'<span class="{span.verdict}">{html.escape(span.text)}</span>'
        for span in marked.spans
    ]
    missed = f'<p class="note">Not mentioned: {html.escape(", ".join(marked.missed))}.</p>' if marked.missed else ""
    return f"{''.join(spans) or '<i>empty</i>'}{missed}"


def cases_html(cases: Sequence[Case], names: Sequence[str]) -> str:
    """Two systems' reports beside the reference."""
    tables = []
    for case in cases:
        rows = [f"<tr><td>reference</td><td>{html.escape(case.reference)}</td></tr>"]
        for name, text in zip(names, (case.first, case.second), strict=True):
            marked = marked_html(mark_report(text, case.reference))
            rows.append(f"<tr><td>{html.escape(name)}</td><td>{marked}</td></tr>")
        title = f"{html.escape(case.id)}: {html.escape(case.why)}"
        tables.append(f'<h3>{title}</h3><table class="texts">{"".join(rows)}</table>')
    return "\n".join(tables)


# --- plots --------------------------------------------------------------------------------------------------------


def picture(figure: Figure, alt: str) -> str:
    """A figure as an <img> that holds its own PNG."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    return _image(buffer.getvalue(), alt)


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _legend_beside(axes: Any) -> None:
    """A legend to the right of the axes, where it covers nothing that is drawn."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, fontsize=8)


def interval_plot(systems: Mapping[str, Mapping[str, Any]], task: str) -> Figure | None:
    """Each figure of a task with its interval, one colour a system; None where no system has any."""
    columns = {name: _figures(results["tasks"].get(task), task) for name, results in systems.items()}
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    if not names:
        return None
    figure = Figure(figsize=(7.5, 0.6 + 0.34 * len(names)))
    axes = figure.add_subplot()
    offsets = np.linspace(-0.14, 0.14, len(columns)) if len(columns) > 1 else [0.0]
    for (system, figures), offset, colour in zip(columns.items(), offsets, _COLOURS, strict=False):
        axes.plot([], [], "o", color=colour, markersize=5, label=system)
        for place, name in enumerate(names):
            if name not in figures:
                continue
            value, interval, _ = figures[name]
            if interval:
                axes.plot(interval, [place + offset] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([value], [place + offset], "o", color=colour, markersize=5)
    shown = [figures for figures in columns.values() if figures]
    counts = {name: " and ".join(str(figures[name][2]) for figures in shown if name in figures) for name in names}
    axes.set_yticks(range(len(names)), [f"{name} (n {counts[name]})" for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.3)
    if len(columns) > 1:
        _legend_beside(axes)
    axes.set_title(f"{task.replace('_', ' ')}: figures with 95 % intervals over patients", fontsize=10)
    return figure


def _figures(
    scores: Mapping[str, Any] | None, task: str
) -> dict[str, tuple[float, Sequence[float] | None, int | None]]:
    """Label → value and interval, on a scale from 0 to 1, and the patients that it depends on."""
    if not scores:
        return {}
    found: dict[str, tuple[float | None, str, float]] = {}  # label → value, its path, and the scale's end
    for name in _FOREST.get(task, ("bleu_1", "bleu_4", "meteor", "rouge_l")):
        scale = _SCALE.get(name, 1.0)
        label = f"{name.upper() if name != 'cider' else 'CIDEr'} / {scale:g}" if scale != 1 else TEXT_NAMES[name]
        found[label] = scores["text"].get(name), f"text.{name}", scale
    for path, label in _FINDINGS.items() if "findings" in scores else ():
        group, _, name = path.partition(".")
        value = scores["findings"][group] if not name else scores["findings"][group][name]
        found[label] = value, f"findings.{path}", 1.0
    for name in _CHOICES if "multiple_choice" in scores else ():
        label = "F1" if name == "f1" else name
        found[label] = scores["multiple_choice"][name], f"multiple_choice.{name}", 1.0
    figures = {}
    for label, (value, path, scale) in found.items():
        if value is not None:
            interval = scores["intervals"].get(path)
            scaled = interval and [bound / scale for bound in interval]
            figures[label] = value / scale, scaled, scores["n"].get(path)
    return figures


def finding_bars(systems: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """F1 of each finding with its interval, and in how many references it occurs."""
    reports = {name: results["tasks"]["report"] for name, results in systems.items() if "report" in results["tasks"]}
    if not reports:
        return None
    findings = next(iter(reports.values()))["findings"]["per_finding"]
    figure = Figure(figsize=(7.5, 0.7 + 0.36 * len(findings)))
    axes = figure.add_subplot()
    height = 0.8 / len(reports)
    for number, ((system, scores), colour) in enumerate(zip(reports.items(), _COLOURS, strict=False)):
        for place, name in enumerate(findings):
            found = scores["findings"]["per_finding"].get(name, {})
            y = place + (number - (len(reports) - 1) / 2) * height
            axes.barh(y, found.get("f1") or 0.0, height, color=colour, label=system if place == 0 else None)
            interval = scores["intervals"].get(f"findings.per_finding.{name}.f1")
            if interval:
                axes.plot(interval, [y, y], color="black", linewidth=1)
    axes.set_yticks(range(len(findings)), [f"{name} ({f['support']})" for name, f in findings.items()], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.3)
    if len(reports) > 1:
        _legend_beside(axes)
    axes.set_title("F1 of each finding (in brackets: references that have it)", fontsize=10)
    return figure


def length_histogram(systems: Mapping[str, Sequence[Mapping[str, Any]]], task: str = "report") -> Figure | None:
    """Words a text: the references, and each system's predictions."""
    chosen = {name: [row for row in rows if row["task"] == task] for name, rows in systems.items()}
    chosen = {name: rows for name, rows in chosen.items() if rows}
    if not chosen:
        return None
    lengths = {"references": [len(str(row["reference"]).split()) for row in next(iter(chosen.values()))]}
    lengths |= {name: [len(str(row["prediction"]).split()) for row in rows] for name, rows in chosen.items()}
    longest = max(max(counts) for counts in lengths.values())
    # A text in a loop would squeeze all others into one bar.
    limit = max(1, min(longest, 3 * int(np.percentile(np.concatenate(list(lengths.values())), 95))))
    figure = Figure(figsize=(7.5, 2.8))
    axes = figure.add_subplot()
    bins = np.linspace(0, limit, 31)
    for (name, counts), colour in zip(lengths.items(), ("#999999", *_COLOURS), strict=False):
        axes.hist(np.clip(counts, 0, limit), bins=bins, histtype="step", linewidth=1.6, color=colour, label=name)
    beyond = f" (the longest has {longest}; what is beyond {limit} stands in the last bar)" if longest > limit else ""
    axes.set_xlabel(f"words{beyond}")
    axes.set_ylabel("texts")
    _legend_beside(axes)
    axes.set_title(f"{task.replace('_', ' ')}: lengths", fontsize=10)
    return figure


def judge_calibration(rows: Sequence[Mapping[str, Any]], judge: Mapping[str, Any]) -> Figure | None:
    """Judge against rule: mean agreement of findings by the judge's score; share of right answers, for multiple choice.

    `judge` is what `judge_predictions` returned for rows with the same ids. None without a scored row.
    """
    scores = {(score["task"], score["id"]): score["score"] for score in judge["scores"] if score["score"] is not None}
    judged = [row for row in rows if (row["task"], row.get("id")) in scores]
    reports = [row for row in judged if row["task"] == "report"]
    choices = [row for row in judged if row["task"] == "multiple_choice"]
    panels = []
    if reports:
        panels.append(("report", [scores["report", r["id"]] / 10 for r in reports], report_scores(reports).tolist()))
    rights = [(row, reference_choice(str(row["reference"]), row["choices"])) for row in choices]
    rights = [(row, right) for row, right in rights if right is not None]
    if rights:
        hits = [float(parse_choice(str(row["prediction"]), row["choices"]) == right) for row, right in rights]
        panels.append(("multiple choice", [scores["multiple_choice", row["id"]] for row, _ in rights], hits))
    if not panels:
        return None
    figure = Figure(figsize=(3.9 * len(panels), 3.4))
    for number, (name, judged_as, truth) in enumerate(panels, start=1):
        _calibration_panel(figure.add_subplot(1, len(panels), number), name, np.array(judged_as), np.array(truth))
    figure.tight_layout()
    return figure


def _calibration_panel(axes: Any, name: str, judged: np.ndarray, truth: np.ndarray) -> None:
    edges = np.linspace(0, 1, 6)
    bins = np.clip(np.digitize(judged, edges) - 1, 0, len(edges) - 2)
    for place in np.unique(bins):
        members = bins == place
        x, y = judged[members].mean(), truth[members].mean()
        axes.plot([x], [y], "o", color=_COLOURS[0])
        axes.annotate(f"{members.sum()}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    axes.set_xlim(-0.05, 1.08)
    axes.set_ylim(-0.05, 1.08)
    axes.set_xlabel("judge's score, as a share of the highest", fontsize=9)
    axes.set_ylabel("findings' agreement (F1)" if name == "report" else "right by parsing", fontsize=9)
    correlation = np.corrcoef(judged, truth)[0, 1] if judged.std() > 0 and truth.std() > 0 else None
    note = "" if correlation is None else f", r = {correlation:.2f}"
    axes.set_title(f"{name} ({len(judged)}{note})", fontsize=10)


# --- cases --------------------------------------------------------------------------------------------------------


def extreme_reports(
    rows: Sequence[Mapping[str, Any]], count: int = 3
) -> dict[str, list[tuple[Mapping[str, Any], float]]]:
    """The `count` worst and best reports by the agreement of their findings, with it; ties by BLEU-4, then by place."""
    reports = [row for row in rows if row["task"] == "report" and str(row["reference"]).strip()]
    if not reports:
        return {"worst": [], "best": []}
    scores = report_scores(reports)
    order = np.argsort(scores, kind="stable").tolist()
    worst, best = order[:count], [place for place in order[::-1][:count] if place not in order[:count]]
    return {
        name: [(reports[place], float(scores[place])) for place in places]
        for name, places in (("worst", worst), ("best", best))
    }


def case_html(row: Mapping[str, Any], score: float, slices: Path | None, why_no_slices: str = "") -> str:
    """One report beside its reference, with the picture of its volume's slices."""
    shown = _image(slices.read_bytes(), f"slices of {row.get('scan_id')}") if slices else ""
    note = f'<p class="note">{html.escape(why_no_slices)}</p>' if why_no_slices and not slices else ""
    marked = marked_html(mark_report(str(row["prediction"]), str(row["reference"])))
    return (
        f"<h4>{html.escape(str(row.get('id')))}: agreement {score:.2f}</h4>{shown}{note}"
        f'<table class="texts"><tr><td>reference</td><td>{html.escape(str(row["reference"]))}</td></tr>'
        f"<tr><td>prediction</td><td>{marked}</td></tr></table>"
    )


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole file from headings and their HTML; empty sections are left out."""
    body = "\n".join(f"<section><h2>{html.escape(name)}</h2>{text}</section>" for name, text in sections if text)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p><b>For research only, not for diagnosis.</b></p>{body}</body></html>\n"
    )


def legend() -> str:
    """What the colours of marked statements mean."""
    return _LEGEND
