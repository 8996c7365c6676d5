"""Contact sheet of a volume's slices as the model sees them, written as PNG.

    python -m samf.reporting.slice_view scan.nii.gz
    python -m samf.reporting.slice_view folder_of_dicom --output liver.png --slices 8 --window mediastinum --field body

Each plane takes one or more rows. The title of a slice is its position in patient coordinates (mm); the letters at its
edges are the patient direction (R right, L left, A anterior, P posterior, S superior, I inferior). The image contains no
patient data other than the slices: no name, no path, no header values.
"""

import argparse
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from samf.model.ct_volume import CTReadError, CTVolume, read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.model.slice_geometry import FIELDS, ORIENTATION_LABELS, PLANES
from samf.model.slice_resampling import SLABS
from samf.model.slice_settings import Window
from samf.utils.files import atomic_write

logger = logging.getLogger(__name__)

WINDOWS: dict[str, Window] = {"lung": (-1350, 150), "mediastinum": (-160, 240), "wide": (-1000, 1000)}
_MAX_COLUMNS = 12
_INCHES = 1.6  # width of a slice
_OUTLINE = withStroke(linewidth=1.5, foreground="black")  # keeps letters legible on bright tissue


def save_slice_image(
    extracted: Mapping[str, np.ndarray] | CTVolume,
    path: str | os.PathLike,
    *,
    window: int = 0,
    weights: Sequence[float] | None = None,
    title: str | None = None,
    image_processor: SamfImageProcessor | None = None,
) -> Path:
    """Write one PNG with all slices of a volume.

    Args:
        extracted: the output of `SamfImageProcessor.extract`, or a volume.
        path: the PNG file; it is replaced only when the new image is complete.
        window: index of the HU window (channel) to show.
        weights: one number per slice, such as its attention, which is printed below it and sets the brightness of its
            frame.
        title: text above the slices. Keep patient data out of it.
        image_processor: extracts the slices of a volume and gives the window its name. Default: default settings.

    Returns:
        The path of the PNG.

    Raises:
        ValueError: no such window, or a number of weights that differs from the number of slices.
    """
    if isinstance(extracted, CTVolume):
        image_processor = image_processor or SamfImageProcessor()
        extracted = image_processor.extract(extracted)
    count, channels = extracted["slices"].shape[:2]
    if not 0 <= window < channels:
        raise ValueError(f"window={window}; these slices have the windows 0 to {channels - 1}")
    if weights is not None and len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} slices; expected one for each")
    heading = ", ".join(part for part in (title, _window_name(window, image_processor)) if part)
    figure = _draw(extracted, window, weights, heading, has_orientation(image_processor))
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, facecolor=figure.get_facecolor())
    atomic_write(path, png.getvalue())
    return Path(path)


def has_orientation(image_processor: SamfImageProcessor | None) -> bool:
    """Return whether images are in patient orientation; the preset "published" keeps that of the stored array."""
    return image_processor is None or image_processor.preset != "published"


def _window_name(window: int, image_processor: SamfImageProcessor | None) -> str:
    if image_processor is None or image_processor.hu_windows is None:
        return f"window {window}"
    low, high = image_processor.hu_windows[window]
    name = next((f"{name} " for name, limits in WINDOWS.items() if limits == (low, high)), "")
    return f"{name}window {low:g} to {high:g} HU"


def _draw(
    extracted: Mapping[str, np.ndarray], window: int, weights: Sequence[float] | None, heading: str, letters: bool
) -> Figure:
    """Draw the slices in rows, each plane from a new row; `letters` are the orientation labels."""
    planes: list[int] = np.asarray(extracted["slice_planes"]).tolist()
    groups = [[s for s, plane in enumerate(planes) if plane == number] for number in dict.fromkeys(planes)]
    columns = min(_MAX_COLUMNS, max(len(group) for group in groups))
    rows = sum(-(-len(group) // columns) for group in groups)
    figure = _black_figure(rows, columns, heading)
    top = 1 - 0.35 / figure.get_figheight()
    grid = figure.add_gridspec(
        rows, columns, left=0.005, right=0.995, bottom=0.03 / rows, top=top, wspace=0.04, hspace=0.2
    )
    largest = max(weights) if weights is not None and max(weights) > 0 else 1.0
    row = 0
    for group in groups:
        for place, s in enumerate(group):
            axes = figure.add_subplot(grid[row + place // columns, place % columns])
            _draw_slice(axes, extracted, s, window)
            if letters:
                draw_orientation(axes, ORIENTATION_LABELS[PLANES[planes[s]]])
            if weights is not None:
                _draw_weight(axes, float(weights[s]), largest)
        row += -(-len(group) // columns)
    return figure


def _black_figure(rows: int, columns: int, heading: str) -> Figure:
    figure = Figure(figsize=(columns * _INCHES, rows * _INCHES * 1.16 + 0.4), facecolor="black")
    FigureCanvasAgg(figure)
    figure.text(0.5, 1 - 0.1 / figure.get_figheight(), heading, color="white", ha="center", va="top", fontsize=11)
    return figure


def _draw_slice(axes: Axes, extracted: Mapping[str, np.ndarray], s: int, window: int) -> None:
    plane = PLANES[int(extracted["slice_planes"][s])]
    axes.imshow(extracted["slices"][s, window], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(f"{plane} {extracted['slice_mm'][s]:.0f} mm", color="white", fontsize=8, pad=2)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_orientation(axes: Axes, labels: str) -> None:
    """Write the patient directions, such as "RLAP", at the left, right, top and bottom edge of an image."""
    sides = [(0.03, 0.5, "left", "center"), (0.97, 0.5, "right", "center")]
    sides += [(0.5, 0.97, "center", "top"), (0.5, 0.03, "center", "bottom")]
    for letter, (x, y, ha, va) in zip(labels, sides, strict=True):
        text = axes.text(x, y, letter, transform=axes.transAxes, color="#ffd24d", fontsize=7, ha=ha, va=va)
        text.set_path_effects([_OUTLINE])


def _draw_weight(axes: Axes, weight: float, largest: float) -> None:
    axes.set_xlabel(f"{weight:.3f}", color="white", fontsize=7, labelpad=1)
    share = min(max(weight / largest, 0.0), 1.0)
    for spine in axes.spines.values():
        spine.set_edgecolor((1.0, 0.35, 0.1, share))
        spine.set_linewidth(2.5)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m samf.reporting.slice_view", description=description)
    parser.add_argument("path", help="a volume file, a folder of DICOM slices, a zip of either, or an address")
    parser.add_argument("--output", default="slices.png", help="the PNG to write (default: slices.png)")
    parser.add_argument("--processor", help="folder or Hub id of a model: extract slices as that model does")
    parser.add_argument("--slices", type=int, help="slices per plane (default: 12, or the processor's)")
    parser.add_argument("--slab", choices=SLABS, help="how to reduce the voxels between slices")
    parser.add_argument("--field", choices=FIELDS, help="field of view: the whole volume, or the body only")
    parser.add_argument("--window", choices=tuple(WINDOWS), default="lung", help="HU window (default: lung)")
    parser.add_argument(
        "--rescale", type=float, nargs=2, metavar=("SLOPE", "INTERCEPT"), help="of a file with raw stored values"
    )
    parser.add_argument("--series_uid", help="series of a DICOM study (default: the largest axial CT)")
    parser.add_argument("--allow_non_ct", action="store_true", help="accept volumes that are not CT")
    return parser.parse_args(arguments)


def _build_image_processor(args: argparse.Namespace) -> SamfImageProcessor:
    """Return the named model's image processor, or one with default settings, for the window to be shown."""
    settings: dict[str, Any] = {"hu_windows": (WINDOWS[args.window],), "image_mean": 0.5, "image_std": 0.5}
    settings |= {name: value for name in ("field", "slab") if (value := getattr(args, name)) is not None}
    if args.processor is None:
        return SamfImageProcessor(slices_per_plane=args.slices or 12, **settings)
    if args.slices is not None:
        settings["slices_per_plane"] = args.slices
    return SamfImageProcessor.from_pretrained(args.processor, **settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the PNG; return the exit status."""
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    image_processor = _build_image_processor(args)
    try:
        volume = read_ct(args.path, rescale=args.rescale, series_uid=args.series_uid, allow_non_ct=args.allow_non_ct)
    except CTReadError as error:
        logger.error("%s", error)
        return 1
    shape, spacing = (" x ".join(f"{v:.4g}" for v in values) for values in (volume.shape, volume.spacing))
    title = f"{shape} voxels of {spacing} mm"
    path = save_slice_image(volume, args.output, title=title, image_processor=image_processor)
    logger.info("wrote %s (%d slices)", path, image_processor.num_slices)
    return 0


if __name__ == "__main__":
    sys.exit(main())
