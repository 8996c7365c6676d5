"""Figures of a card, each drawn only from what the run recorded."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from samf.evaluation.report.plots import finding_bars, interval_plot, to_png
from samf.sharing.facts import RunFacts

FOLDER = "figures"
_SERIES = {
    "loss": ("training", "-", "#1f6f8b"),
    "eval_own_loss": ("validation, own volumes", "o-", "#d1603d"),
    "eval_shuffled_loss": ("validation, other patients' volumes", "o--", "#999999"),
    "eval_loss": ("validation", "o-", "#d1603d"),
}


def loss_curve(log: Sequence[Mapping[str, float]]) -> Figure | None:
    """Plot the losses of a log over its steps; None with fewer than two points of each."""
    points = {key: [(row["step"], row[key]) for row in log if key in row and "step" in row] for key in _SERIES}
    if not any(len(series) > 1 for series in points.values()):
        return None
    figure = Figure(figsize=(6.5, 3.6))
    axes = figure.add_subplot()
    for key, series in points.items():
        if series:
            name, style, colour = _SERIES[key]
            axes.plot(*zip(*series, strict=True), style, color=colour, markersize=4, linewidth=1.3, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def write_figures(facts: RunFacts, target: Path) -> dict[str, str]:
    """Write the figures that a run has the data for into `target`/figures.

    Returns:
        Path in the repository → what the figure shows.
    """
    found: dict[str, tuple[bytes, str]] = {}
    curve = loss_curve(facts.log)
    if curve is not None:
        found["loss.png"] = (to_png(curve), "Losses during training")
    if facts.diagram is not None:
        found["reliability.png"] = (
            _pixels_only(facts.diagram),
            "Reliability of the findings' probabilities on held-out patients, before and after calibration",
        )
    shown = {each.name: each.results for each in facts.evaluations if not each.is_control}
    for name, results in shown.items():
        plots = {task: interval_plot({name: results}, task) for task in ("report", "multiple_choice")}
        plots["findings"] = finding_bars({name: results})
        prefix = name.replace("/", "_")
        for task, plot in plots.items():
            if plot is not None:
                found[f"{prefix}_{task}.png"] = (to_png(plot), f"{name}: {task.replace('_', ' ')}")
    for name, (png, _) in found.items():
        (target / FOLDER).mkdir(exist_ok=True)
        (target / FOLDER / name).write_bytes(png)
    return {f"{FOLDER}/{name}": text for name, (_, text) in found.items()}


def _pixels_only(path: Path) -> bytes:
    """Return a PNG without its metadata, which may name the machine that wrote it."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as image:
        Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, format="PNG")
    return buffer.getvalue()
