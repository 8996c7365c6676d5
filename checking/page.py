"""The plots of a check, and the page that shows them."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from samf.checking.results import CheckResult, label_counts, result_text
from samf.evaluation.report.html_report import Bullets, Image, Paragraph, Section, render_page
from samf.evaluation.report.plots import to_png

_COLOURS = ("#1f6f8b", "#d1603d", "#6b8e23", "#8b5fbf")
_FINDINGS = 40  # bars of a plot
_BINS = 40


def draw_plots(result: CheckResult) -> dict[str, bytes]:
    """Return {file name: PNG} of what there is to draw."""
    lengths = {name: [len(text.split()) for text in split.reports.values()] for name, split in result.splits.items()}
    figures = {
        "report_words.png": _histogram(lengths, "words per report", "reports"),
        "report_tokens.png": _histogram(result.tokens, "tokens per report", "reports"),
        "labels.png": _label_plot(result),
        "volumes_per_patient.png": _patient_plot(result),
        "slice_spacing.png": _spacing_plot(result),
    }
    return {name: to_png(figure) for name, figure in figures.items() if figure is not None}


def render(result: CheckResult, plots: Mapping[str, bytes]) -> str:
    """Return the page: the problems, the plots and the facts as text."""
    problems = result.problems()
    images = [Image(png, name.removesuffix(".png").replace("_", " ")) for name, png in plots.items()]
    lines = [line for line in result_text(result).splitlines() if line and not line.startswith("PROBLEM")]
    sections = [
        Section("Problems", [Bullets(problems) if problems else Paragraph("None found.")]),
        Section("Plots", images),
        Section("Facts", [Bullets(lines)]),
    ]
    return render_page(f"Check of {result.source}", sections)


def _axes(title: str, x: str, y: str, height: float = 3.2) -> tuple[Figure, object]:
    figure = Figure(figsize=(7.5, height))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _histogram(values: Mapping[str, Sequence[float]], x: str, y: str) -> Figure | None:
    """Return a histogram with one line per split, each scaled to its own number; None without values."""
    values = {name: own for name, own in values.items() if len(own)}
    if not values:
        return None
    high = max(float(np.quantile(own, 0.995)) for own in values.values())
    low = min(float(min(own)) for own in values.values())
    bins = np.linspace(low, max(high, low + 1), _BINS + 1)
    figure, axes = _axes(x, x, f"share of {y}")
    for (name, own), colour in zip(values.items(), _COLOURS * len(values), strict=False):
        heights, _ = np.histogram(np.clip(own, bins[0], bins[-1]), bins)
        axes.stairs(heights / len(own), bins, color=colour, label=f"{name} (n {len(own)})")  # type: ignore[attr-defined]
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)  # type: ignore[attr-defined]
    return figure


def _label_plot(result: CheckResult) -> Figure | None:
    """Return bars of how frequent findings are, for the most frequent ones."""
    total: Counter[str] = Counter()
    shares: dict[str, dict[str, float]] = {}
    for name, split in result.splits.items():
        for finding, labels in split.labels.items():
            counts = label_counts(labels)
            known = counts["present"] + counts["absent"]
            if known:
                shares.setdefault(finding, {})[name] = counts["present"] / known
                total[finding] += counts["present"]
    if not shares:
        return None
    findings = [finding for finding, _ in total.most_common(_FINDINGS)][::-1]
    figure, axes = _axes("findings", "share of the volumes with a label", "", 0.8 + 0.2 * len(findings))
    width = 0.8 / len(result.splits)
    for number, (name, colour) in enumerate(zip(result.splits, _COLOURS * len(result.splits), strict=False)):
        places = np.arange(len(findings)) + (number - (len(result.splits) - 1) / 2) * width
        heights = [shares[finding].get(name, 0.0) for finding in findings]
        axes.barh(places, heights, width, color=colour, label=name)  # type: ignore[attr-defined]
    axes.set_yticks(range(len(findings)), findings, fontsize=7)  # type: ignore[attr-defined]
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)  # type: ignore[attr-defined]
    return figure


def _patient_plot(result: CheckResult) -> Figure | None:
    counts: Counter[int] = Counter()
    for split in result.splits.values():
        counts.update(Counter(patient for patient in split.volumes.values() if patient is not None).values())
    if not counts:
        return None
    figure, axes = _axes("volumes per patient, all splits", "volumes", "patients")
    axes.bar(list(counts), list(counts.values()), color=_COLOURS[0])  # type: ignore[attr-defined]
    return figure


def _spacing_plot(result: CheckResult) -> Figure | None:
    facts = result.files.facts if result.files is not None else {}
    edges = {
        name: [max(facts[path].spacing) for path in split.volumes if path in facts and facts[path].spacing]
        for name, split in result.splits.items()
    }
    return _histogram(edges, "largest voxel edge in mm", "volumes")
