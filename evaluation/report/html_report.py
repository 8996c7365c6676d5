"""The HTML report of an evaluation: content blocks, and the page that shows them."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

from jinja2 import DictLoader, Environment, StrictUndefined, Template

from samf.evaluation.report.html_template import TEMPLATE
from samf.evaluation.report.side_by_side import Case, Marked, mark_report


class Piece(NamedTuple):
    """A run of text in one weight."""

    text: str
    bold: bool = False


# Plain text, or text with bold pieces.
Text = str | Sequence[Piece]


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 6."""

    kind: ClassVar[str] = "heading"
    level: int
    text: Text


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; a note is printed in grey."""

    kind: ClassVar[str] = "paragraph"
    text: Text
    is_note: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list."""

    kind: ClassVar[str] = "bullets"
    items: Sequence[Text]


@dataclass(frozen=True)
class Table:
    """A table with a header."""

    kind: ClassVar[str] = "table"
    header: Sequence[Text]
    rows: Sequence[Sequence[Text]]


@dataclass(frozen=True)
class Image:
    """A PNG that the page embeds."""

    kind: ClassVar[str] = "image"
    png: bytes
    alt: str

    @property
    def base64(self) -> str:
        """Return the PNG in base64."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Legend:
    """What the colours of marked statements mean."""

    kind: ClassVar[str] = "legend"


@dataclass(frozen=True)
class Reports:
    """Reports with coloured statements below their reference: (name, report)."""

    kind: ClassVar[str] = "reports"
    reference: str
    reports: Sequence[tuple[str, Marked]]


Block = Heading | Paragraph | Bullets | Table | Image | Legend | Reports


@dataclass(frozen=True)
class Section:
    """A section of the page; without blocks it is left out."""

    heading: str
    blocks: Sequence[Block]


@cache
def _template() -> Template:
    loader = DictLoader({"report.html": TEMPLATE})
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html")


def render_page(title: str, sections: Sequence[Section]) -> str:
    """Return the whole page."""
    return _template().render(title=title, sections=sections) + "\n"


def render_blocks(blocks: Sequence[Block]) -> str:
    """Return the HTML of some blocks."""
    macros = _template().make_module({"title": "", "sections": []})
    return str(macros.blocks(blocks))  # type: ignore[attr-defined]  # a macro of the template


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown_blocks(text: str) -> list[Block]:
    """Parse the tables, lists, headings and paragraphs of the Markdown that this package writes."""
    parts = re.split(r"\n\s*\n", text.strip())
    return [block for part in parts if part.strip() for block in _parse(part.splitlines())]


def _parse(lines: Sequence[str]) -> list[Block]:
    if lines[0].startswith("|"):
        header, _, *rows = [_cells(line) for line in lines]
        return [Table(header, rows)]
    if lines[0].startswith("- "):
        return [Bullets([_inline(line[2:]) for line in lines])]
    heading = re.match(r"(#+) (.*)", lines[0])
    if heading:
        return [Heading(len(heading[1]), _inline(heading[2])), *(_parse(lines[1:]) if lines[1:] else [])]
    return [Paragraph(_inline(" ".join(lines)))]


def _cells(line: str) -> list[Text]:
    return [_inline(cell.strip().replace("\\|", "|")) for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def _inline(text: str) -> Text:
    """Split a line at its **bold** pieces."""
    pieces = re.split(r"\*\*(.+?)\*\*", text)
    return [Piece(piece, number % 2 == 1) for number, piece in enumerate(pieces) if piece]


# --- Cases ------------------------------------------------------------------------------------------------------------


def case_blocks(cases: Sequence[Case], names: Sequence[str]) -> list[Block]:
    """Return two systems' reports below the reference, for each case."""
    blocks: list[Block] = []
    for case in cases:
        texts = zip(names, (case.first, case.second), strict=True)
        reports = [(name, mark_report(text, case.reference)) for name, text in texts]
        blocks += [Heading(3, f"{case.id}: {case.why}"), Reports(case.reference, reports)]
    return blocks
