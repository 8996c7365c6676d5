"""Plots of an evaluation: intervals, findings, text lengths and the judge's calibration."""

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from samf.evaluation.markdown import TEXT_NAMES
from samf.evaluation.metrics.calibration import ReliabilityBin
from samf.evaluation.metrics.multiple_choice import parse_choice, reference_choice
from samf.evaluation.report.side_by_side import report_scores
from samf.evaluation.results_table import value_at
from samf.evaluation.schema import JudgeResults, PredictionRow, Results, TaskScores

_COLOURS = ("#1f6f8b", "#d1603d")
# Metrics of the interval plot; CIDEr is scaled from 0 … 10.
_REPORT_METRICS = (
    *("mean_bleu_1", "bleu_1", "mean_bleu_4", "bleu_4", "meteor", "rouge_1", "rouge_2", "rouge_l", "cider"),
    *("bertscore_p", "bertscore_r", "bertscore_f1"),
)
_OTHER_METRICS = ("bleu_1", "bleu_4", "meteor", "rouge_l")
_FINDINGS = {
    "macro.f1": "findings, macro-F1",
    "micro.f1": "findings, micro-F1",
    "crg": "CRG",
    "sides.f1": "laterality, F1",
}
_CHOICES = ("accuracy", "precision", "recall", "f1")
_SCALE = {"cider": 10.0}


def to_png(figure: Figure) -> bytes:
    """Return a matplotlib figure as a PNG."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    return buffer.getvalue()


def _place_legend(axes: Axes) -> None:
    """Put the legend to the right of the axes, where it covers nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, fontsize=8)


class _Score(NamedTuple):
    """A value and its interval, scaled to 0 … 1, and the patients that it depends on."""

    value: float
    interval: Sequence[float] | None
    patients: int | None


def interval_plot(systems: Mapping[str, Results], task: str) -> Figure | None:
    """Plot each metric of a task with its interval, one colour per system; None where no system has the task."""
    columns = {name: _scores(results["tasks"].get(task), task) for name, results in systems.items()}
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    if not names:
        return None
    figure = Figure(figsize=(7.5, 0.6 + 0.34 * len(names)))
    axes = figure.add_subplot()
    offsets = np.linspace(-0.14, 0.14, len(columns)) if len(columns) > 1 else [0.0]
    for (system, scores), offset, colour in zip(columns.items(), offsets, _COLOURS, strict=False):
        axes.plot([], [], "o", color=colour, markersize=5, label=system)
        for place, name in enumerate(names):
            if name not in scores:
                continue
            value, interval, _ = scores[name]
            if interval:
                axes.plot(interval, [place + offset] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([value], [place + offset], "o", color=colour, markersize=5)
    shown = [scores for scores in columns.values() if scores]
    counts = {name: " and ".join(str(scores[name].patients) for scores in shown if name in scores) for name in names}
    axes.set_yticks(range(len(names)), [f"{name} (n {counts[name]})" for name in names])
    _finish(axes, f"{task.replace('_', ' ')}: metrics with 95 % intervals over patients", len(columns) > 1)
    return figure


def _finish(axes: Axes, title: str, has_legend: bool) -> None:
    """Style a plot with one row per metric or finding."""
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.3)
    if has_legend:
        _place_legend(axes)
    axes.set_title(title, fontsize=10)


def _scores(scores: TaskScores | None, task: str) -> dict[str, _Score]:
    """Return label → score of the metrics that have a value."""
    if not scores:
        return {}
    paths: dict[str, tuple[str, float]] = {}  # label → path of the metric, and the end of its scale
    for name in _REPORT_METRICS if task == "report" else _OTHER_METRICS:
        scale = _SCALE.get(name, 1.0)
        label = f"CIDEr / {scale:g}" if name == "cider" else TEXT_NAMES[name]
        paths[label] = f"text.{name}", scale
    paths |= {label: (f"findings.{path}", 1.0) for path, label in _FINDINGS.items() if "findings" in scores}
    for name in _CHOICES if "multiple_choice" in scores else ():
        paths["F1" if name == "f1" else name] = f"multiple_choice.{name}", 1.0
    chosen = {}
    for label, (path, scale) in paths.items():
        value = value_at(scores, path)
        if value is not None:
            interval = scores["intervals"].get(path)
            scaled = interval and [bound / scale for bound in interval]
            chosen[label] = _Score(value / scale, scaled, scores["n"].get(path))
    return chosen


def finding_bars(systems: Mapping[str, Results]) -> Figure | None:
    """Plot F1 of each finding with its interval, and the number of references that have it."""
    reports = {name: results["tasks"]["report"] for name, results in systems.items() if "report" in results["tasks"]}
    if not reports:
        return None
    findings = next(iter(reports.values()))["findings"]["per_finding"]
    figure = Figure(figsize=(7.5, 0.7 + 0.36 * len(findings)))
    axes = figure.add_subplot()
    height = 0.8 / len(reports)
    for number, ((system, scores), colour) in enumerate(zip(reports.items(), _COLOURS, strict=False)):
        for place, name in enumerate(findings):
            found = scores["findings"]["per_finding"].get(name)
            y = place + (number - (len(reports) - 1) / 2) * height
            width = found["f1"] or 0.0 if found else 0.0
            axes.barh(y, width, height, color=colour, label=system if place == 0 else None)
            interval = scores["intervals"].get(f"findings.per_finding.{name}.f1")
            if interval:
                axes.plot(interval, [y, y], color="black", linewidth=1)
    axes.set_yticks(range(len(findings)), [f"{name} ({f['support']})" for name, f in findings.items()], fontsize=8)
    _finish(axes, "F1 of each finding (in parentheses: references that have it)", len(reports) > 1)
    return figure


def length_histogram(systems: Mapping[str, Sequence[PredictionRow]], task: str = "report") -> Figure | None:
    """Plot the words per text of the references and of each system's predictions."""
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
    bins = np.linspace(0, limit, 31).tolist()
    for (name, counts), colour in zip(lengths.items(), ("#999999", *_COLOURS), strict=False):
        axes.hist(np.clip(counts, 0, limit), bins=bins, histtype="step", linewidth=1.6, color=colour, label=name)
    beyond = f" (longest: {longest}; the last bar includes all beyond {limit})" if longest > limit else ""
    axes.set_xlabel(f"words{beyond}")
    axes.set_ylabel("texts")
    _place_legend(axes)
    axes.set_title(f"{task.replace('_', ' ')}: lengths", fontsize=10)
    return figure


def judge_calibration(rows: Sequence[PredictionRow], judge: JudgeResults) -> Figure | None:
    """Plot the judge's scores against rules: agreement of findings for reports, parsed answers for multiple choice.

    Args:
        rows: predictions.
        judge: what `judge_predictions` returned for rows with the same ids.

    Returns:
        The figure; None without a scored row.
    """
    scores = {(score["task"], score["id"]): score["score"] for score in judge["scores"] if score["score"] is not None}
    judged = [row for row in rows if (row["task"], row.get("id")) in scores]
    reports = [row for row in judged if row["task"] == "report"]
    choices = [row for row in judged if row["task"] == "multiple_choice"]
    panels = []
    if reports:
        panels.append(("report", [scores["report", r["id"]] / 10 for r in reports], report_scores(reports).tolist()))
    references = [(row, reference_choice(str(row["reference"]), row["choices"] or ())) for row in choices]
    references = [(row, right) for row, right in references if right is not None]
    if references:
        hits = [float(parse_choice(str(row["prediction"]), row["choices"] or ()) == right) for row, right in references]
        panels.append(("multiple choice", [scores["multiple_choice", row["id"]] for row, _ in references], hits))
    if not panels:
        return None
    figure = Figure(figsize=(3.9 * len(panels), 3.4))
    for number, (name, judged_as, truth) in enumerate(panels, start=1):
        _calibration_panel(figure.add_subplot(1, len(panels), number), name, np.array(judged_as), np.array(truth))
    figure.tight_layout()
    return figure


def _calibration_panel(axes: Axes, name: str, judged: np.ndarray, truth: np.ndarray) -> None:
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
    axes.set_ylabel("agreement of findings (F1)" if name == "report" else "right by parsing", fontsize=9)
    correlation = np.corrcoef(judged, truth)[0, 1] if judged.std() > 0 and truth.std() > 0 else None
    note = "" if correlation is None else f", r = {correlation:.2f}"
    axes.set_title(f"{name} ({len(judged)}{note})", fontsize=10)


def reliability_diagram(curves: Mapping[str, Sequence[ReliabilityBin]], title: str) -> Figure:
    """Plot frequency against probability, one curve per name, with the 95 % range of chance (Wilson) at each point.

    Args:
        curves: name → points.
        title: of the figure.
    """
    figure = Figure(figsize=(5.0, 5.0))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", label="perfect calibration")
    for (name, points), colour in zip(curves.items(), _COLOURS, strict=False):
        x, y, n = (
            np.array([getattr(point, part) for point in points]) for part in ("probability", "frequency", "count")
        )
        centre, reach = (y + 1.92 / n) / (1 + 3.84 / n), 1.96 * np.sqrt(y * (1 - y) / n + 0.96 / n**2) / (1 + 3.84 / n)
        axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.2, label=name)
        axes.vlines(x, centre - reach, centre + reach, color=colour, alpha=0.4, linewidth=2)
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("frequency of the finding")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(title, fontsize=9)
    axes.legend(loc="upper left", fontsize=8)
    return figure
