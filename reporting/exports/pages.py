"""Text and bars on A4 pages, drawn by matplotlib: a flow from top to bottom that goes on on the next page."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

logger = logging.getLogger(__name__)

_WIDTH, _HEIGHT, _MARGIN = 595.0, 842.0, 56.0  # points
_LEADING = 1.4  # line height per font size
_FOOT = 8.0  # font size of the footer
_BAR_START, _BAR_LENGTH = 0.42, 0.48  # shares of the text's width
_GREY, _DARK, _BLUE = "#dddddd", "#333333", "#4477aa"
# matplotlib's own font has Latin, Greek and Cyrillic letters; other scripts come from one of these, where installed.
_NO_GLYPH = r"Glyph \d+ .* missing from font"
_FALLBACKS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "Hiragino Sans",
)


@cache
def _families() -> tuple[str, ...]:
    installed = set(font_manager.fontManager.get_font_names())
    return ("DejaVu Sans", *(name for name in _FALLBACKS if name in installed))


@cache
def _font(size: float, bold: bool) -> FontProperties:
    return FontProperties(family=list(_families()), size=size, weight="bold" if bold else "normal")


@cache
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, 72)  # 72 dots per inch: a dot is a point


@cache
def _width(text: str, size: float, bold: bool) -> float:
    """Return the width of a word or a character in points."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _NO_GLYPH)
        return float(_renderer().get_text_width_height_descent(text, _font(size, bold), ismath=False)[0])


def wrapped(text: str, width: float, size: float, bold: bool = False) -> Iterator[str]:
    """Yield the lines of a text; words that are wider than a line are broken.

    Args:
        text: the text; its line breaks are kept.
        width: of a line, in points.
        size: of the font, in points.
        bold: whether the font is bold.
    """
    blank = _width("n n", size, bold) - 2 * _width("n", size, bold)
    for paragraph in text.splitlines() or [""]:
        line, used = "", 0.0
        for word in paragraph.split():
            for piece in _pieces(word, width, size, bold):
                length = _width(piece, size, bold)
                if line and used + blank + length > width:
                    yield line
                    line, used = "", 0.0
                line, used = (f"{line} {piece}", used + blank + length) if line else (piece, length)
        yield line


def _pieces(word: str, width: float, size: float, bold: bool) -> list[str]:
    """Return a word as it is or, if it is wider than a line, in pieces that are not."""
    if _width(word, size, bold) <= width:
        return [word]
    pieces, used = [""], 0.0
    for letter in word:
        length = _width(letter, size, bold)
        if pieces[-1] and used + length > width:
            pieces.append("")
            used = 0.0
        pieces[-1] += letter
        used += length
    return pieces


@contextmanager
def _missing_glyphs_logged() -> Iterator[None]:
    """Log once that letters are missing, where matplotlib warns of each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    missing = {str(warning.message) for warning in caught if re.match(_NO_GLYPH, str(warning.message))}
    for warning in caught:
        if str(warning.message) not in missing:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if missing:
        logger.warning(
            "%d letters are boxes in the PDF: no installed font has them. Install Noto Sans CJK.", len(missing)
        )


class Pages:
    """A document that is filled from top to bottom.

    Args:
        footer: text at the bottom of every page, before the page's number.
    """

    def __init__(self, footer: str):
        self.footer = footer
        self.figures: list[Figure] = []
        self._left = 0.0  # points that are free on the page, above the footer

    def space(self, points: float) -> None:
        """Leave some points free."""
        self._left -= points

    def text(self, text: str, *, size: float = 10.0, bold: bool = False, indent: float = 0.0) -> None:
        """Add a text, wrapped and over as many pages as it takes.

        Args:
            text: the text; its line breaks are kept.
            size: of the font, in points.
            bold: whether the font is bold.
            indent: distance from the left margin, in points.
        """
        for line in wrapped(text, _WIDTH - 2 * _MARGIN - indent, size, bold):
            y = self._next_line(size)
            self._write(line, _MARGIN + indent, y, _font(size, bold))

    def bar(self, name: str, share: float, size: float = 9.0) -> None:
        """Add a line with a name, a bar and a number.

        Args:
            name: at the left.
            share: from 0 to 1.
            size: of the font, in points.
        """
        y, width = self._next_line(size), _WIDTH - 2 * _MARGIN
        line, *more = wrapped(name, _BAR_START * width - 6, size)
        self._write(line, _MARGIN, y, _font(size, False))
        start, length = _MARGIN + _BAR_START * width, _BAR_LENGTH * width
        for part, colour in ((1.0, _GREY), (min(max(share, 0.0), 1.0), _BLUE)):
            box = Rectangle(
                (start / _WIDTH, (y - 1) / _HEIGHT),
                part * length / _WIDTH,
                0.8 * size / _HEIGHT,
                transform=self.figures[-1].transFigure,
                facecolor=colour,
                linewidth=0,
            )
            self.figures[-1].add_artist(box)
        self._write(f"{share:.2f}", start + length + 6, y, _font(size, False))
        for rest in more:
            self.text(rest, size=size)

    def row(self, count: int, side: float) -> list[Axes]:
        """Return the axes of squares side by side; `side` in points."""
        self._reserve(side)
        self._left -= side
        bottom, gap = _MARGIN + self._left, 6.0
        places = [
            ((_MARGIN + number * (side + gap)) / _WIDTH, bottom / _HEIGHT, side / _WIDTH, side / _HEIGHT)
            for number in range(count)
        ]
        return [self.figures[-1].add_axes(place) for place in places]

    def keep(self, points: float) -> None:
        """Begin a new page unless so many points are free: what comes next stays together."""
        self._reserve(points)

    def save(self, path: Path | BinaryIO, title: str) -> None:
        """Write the pages as a PDF with embedded fonts, searchable, without a date.

        Args:
            path: the file, or one that is open for writing.
            title: in the file's metadata.
        """
        about = {"Title": title, "Creator": "SAMF", "CreationDate": None}
        with _missing_glyphs_logged(), rc_context({"pdf.fonttype": 42}), PdfPages(path, metadata=about) as pages:
            for number, figure in enumerate(self.figures, start=1):
                place = f"{self.footer}  Page {number} of {len(self.figures)}"
                self._write(place, _MARGIN, _MARGIN / 2, _font(_FOOT, True), figure)
                pages.savefig(figure)

    def _next_line(self, size: float) -> float:
        """Return the height of the next line's baseline in points, on a new page where the last one is full."""
        height = size * _LEADING
        self._reserve(height)
        self._left -= height
        return _MARGIN + self._left + size * (_LEADING - 1)

    def _reserve(self, points: float) -> None:
        """Begin a new page unless so many points are free."""
        if not self.figures or self._left < points:
            self.figures.append(Figure(figsize=(_WIDTH / 72, _HEIGHT / 72)))
            FigureCanvasAgg(self.figures[-1])
            self._left = _HEIGHT - 2 * _MARGIN

    def _write(self, text: str, x: float, y: float, font: FontProperties, figure: Figure | None = None) -> None:
        # Without parse_math two "$" would make a formula.
        page = figure or self.figures[-1]
        page.text(x / _WIDTH, y / _HEIGHT, text, fontproperties=font, color=_DARK, va="baseline", parse_math=False)
