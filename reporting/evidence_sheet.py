"""A PNG with the evidence of a report: for each sentence one slice of each plane, with its heat."""

import io
import os
import textwrap
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from samf.model.evidence_samf import SentenceEvidence, SliceHeat
from samf.model.report_samf import DISCLAIMER, Report
from samf.model.slice_geometry import ORIENTATION_LABELS
from samf.reporting.slice_view import draw_orientation
from samf.utils.files import atomic_write

_HEAT = colormaps["inferno"]
_OPACITY = 0.65  # of the hottest pixel; cold ones are transparent
_INCHES = 2.4  # side of an image
_TEXT_INCHES = 0.62  # above each row
_HEAD_INCHES, _FOOT_INCHES = 0.7, 0.9
_WIDTH = 96  # characters of a title


def save_evidence_sheet(
    report: Report, path: str | os.PathLike, *, window: int = -1, title: str | None = None, orientation: bool = True
) -> Path:
    """Write the evidence of a report's sentences as one PNG.

    Args:
        report: with evidence that has its arrays, as `explain` returns it.
        path: the PNG file; it is replaced only when the new image is complete.
        window: index of the HU window (channel) to show; -1 is the last, the widest by default.
        title: text above all. Keep patient data out of it.
        orientation: letter the edges with the patient's directions; not for the preset "published", whose images are not in
            the patient's orientation.

    Returns:
        The path of the PNG.

    Raises:
        ValueError: a report without evidence, or whose arrays were not kept (read from a JSON file).
    """
    sentences = [] if report.evidence is None else list(report.evidence.sentences)
    if not sentences or any(sentence.slice_heat is None for sentence in sentences):
        raise ValueError(
            "The report has no evidence with images; call the pipeline with evidence=True, or its explain(report, scan)."
        )
    columns = max(len(sentence.slice_heat.numbers) for sentence in sentences if sentence.slice_heat is not None)
    width = max(columns, 3) * _INCHES
    height = _HEAD_INCHES + len(sentences) * (_INCHES + _TEXT_INCHES) + _FOOT_INCHES
    figure = Figure(figsize=(width, height), facecolor="black")
    FigureCanvasAgg(figure)
    figure.text(
        0.5,
        1 - 0.15 / height,
        title or "What each sentence rests on",
        color="white",
        ha="center",
        va="top",
        fontsize=12,
    )
    for row, sentence in enumerate(sentences):
        top = height - _HEAD_INCHES - row * (_INCHES + _TEXT_INCHES)
        figure.text(0.02, (top - 0.05) / height, _title(sentence), color="white", va="top", fontsize=8)
        _draw_row(figure, sentence, top - _TEXT_INCHES - _INCHES, window, orientation)
    _draw_foot(figure, report)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, facecolor=figure.get_facecolor())
    atomic_write(path, png.getvalue())
    return Path(path)


def _title(sentence: SentenceEvidence) -> str:
    """Return the sentence in at most two lines, and what the model gives for it."""
    lines = textwrap.wrap(sentence.text, _WIDTH, max_lines=2, placeholder=" …")
    facts = f"log-probability {sentence.log_probability:.2f}"
    if sentence.without_volume is not None:
        facts += f"; without the scan {sentence.without_volume:.2f}"
    if sentence.peak is not None:
        x, y, z = sentence.peak.ras_mm
        facts += f"; hottest at R {x:.0f}, A {y:.0f}, S {z:.0f} mm"
    return "\n".join([*lines, facts])


def _draw_row(figure: Figure, sentence: SentenceEvidence, bottom: float, window: int, orientation: bool) -> None:
    """Draw a sentence's slices side by side; `bottom` is in inches."""
    if sentence.slice_heat is None:
        return
    width, height = figure.get_size_inches()
    for column in range(len(sentence.slice_heat.numbers)):
        place = (column * _INCHES / width + 0.004, bottom / height, _INCHES / width - 0.008, (_INCHES - 0.04) / height)
        axes = figure.add_axes(place)
        draw_heat(axes, sentence.slice_heat, column, window, marked=sentence.peak is not None)
        if orientation:
            draw_orientation(axes, ORIENTATION_LABELS[sentence.slice_heat.planes[column]])


def draw_heat(axes: Axes, shown: SliceHeat, column: int, window: int, marked: bool) -> None:
    """Draw a slice with its heat, its plane and its place.

    Args:
        axes: where to draw.
        shown: slices of a sentence.
        column: index of the slice among them.
        window: index of the HU window (channel).
        marked: mark the maximum of the sentence's heat map.
    """
    heat = shown.heat[column]
    axes.imshow(shown.images[column, window], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.imshow(heat, cmap=_HEAT, vmin=0, vmax=1, alpha=np.clip(heat, 0, 1) * _OPACITY, interpolation="bilinear")
    if marked:
        row, across = shown.marks[column]
        axes.plot(across, row, marker="+", color="#7fff7f", markersize=9, markeredgewidth=1.2)
    size = heat.shape[0]
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.text(
        0.03,
        0.03,
        f"{shown.planes[column]} {shown.mm[column]:.0f} mm",
        color="white",
        fontsize=7,
        transform=axes.transAxes,
    )
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_foot(figure: Figure, report: Report) -> None:
    """Draw the colour bar, and below it how the evidence was found and the disclaimer."""
    _, height = figure.get_size_inches()
    bar = figure.add_axes((0.3, 0.72 / height, 0.4, 0.09 / height))
    scale = figure.colorbar(ScalarMappable(cmap=_HEAT), cax=bar, orientation="horizontal", ticks=[0, 0.5, 1])
    scale.ax.tick_params(colors="white", labelsize=6, length=2, pad=1)
    scale.set_label("heat, as a share of the sentence's largest", color="white", fontsize=7, labelpad=1)
    found = report.evidence.place_method if report.evidence is not None else ""
    lines = [
        *textwrap.wrap(f"Heat: {found}.", 130, max_lines=2),
        f"It explains the model, not the patient. {DISCLAIMER}",
    ]
    figure.text(0.5, 0.04 / height, "\n".join(lines), color="#bbbbbb", ha="center", va="bottom", fontsize=6.5)
