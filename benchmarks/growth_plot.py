"""Draw the figures of `python -m samf.benchmarks growth --json growth.json`: time and memory over size, one panel per line.

python -m samf.benchmarks.growth_plot growth.json docs/results/growth.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any


def read_growth(file: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return line → unit ("s" or "MB") → pairs of size and value, by size.

    Raises:
        ValueError: the file has no lines of growth.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("command") != "growth":
        raise ValueError(
            f"{file} has figures of {content.get('command')!r}; expected those of python -m samf.benchmarks growth."
        )
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for stage in content["stages"]:
        for figure in stage["figures"]:
            size = figure["name"].partition(" ")[0]
            if size.isdigit():
                units = lines.setdefault(stage["line"], {"s": [], "MB": []})
                units[figure["unit"]].append((int(size), figure["median"]))
    return lines


def draw_growth(lines: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """Save one panel per line, with logarithmic axes and a dotted linear reference.

    Args:
        lines: as `read_growth` returns them.
        path: image to write; its suffix is its format.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("growth_plot draws with matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(lines), figsize=(3 * len(lines), 2.6), squeeze=False)
    for axis, (name, units) in zip(axes[0], lines.items(), strict=True):
        _draw_panel(axis, units)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_panel(axis: Any, units: dict[str, list[tuple[int, float]]]) -> None:
    for unit, label, color in (("s", "seconds", "tab:blue"), ("MB", "100 MB", "tab:orange")):
        scale = 100 if unit == "MB" else 1
        sizes, values = zip(*((size, value / scale) for size, value in units[unit] if value > 0), strict=True)
        axis.loglog(sizes, values, "o-", label=label, color=color, markersize=3)
        axis.loglog(sizes, [values[-1] * size / sizes[-1] for size in sizes], ":", color=color, linewidth=0.8)


def main(argv: list[str] | None = None) -> None:
    """Draw the file that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m samf.benchmarks.growth_plot", description="Draw figures of growth."
    )
    parser.add_argument("figures", type=Path, help="the JSON of python -m samf.benchmarks growth")
    parser.add_argument("image", type=Path, help="image to write, for example growth.svg")
    args = parser.parse_args(argv)
    draw_growth(read_growth(args.figures), args.image)


if __name__ == "__main__":
    main()
