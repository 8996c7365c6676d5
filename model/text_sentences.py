"""Sentences of reports, whatever their typography and layout.

Line ends are layout, not grammar: wrapped text is joined, and words hyphenated at the margin are made whole, while list
items, headings and one-line statements stay separate. All work is linear in the length of the text.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

# --- Typography ---------------------------------------------------------------------------------------------------

# Characters that NFKC leaves unchanged: typographic quotes, dashes and the minus sign.
_PLAIN = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2212": "-", "\u00d7": "x", "\u0131": "i"}
_PLAIN |= {chr(code): "-" for code in range(0x2010, 0x2016)}
_BULLET = "\u2022"
_PLAIN |= dict.fromkeys("\u2023\u2043\u2219\u25aa\u25ab\u25cf\u25e6\u25a0\u25a1\u2713\u27a2\u00b7\uf0b7", _BULLET)
_LINE_ENDS = dict.fromkeys("\x0b\x0c\x85\u2028\u2029", "\n")
# A character outside ASCII, a carriage return, or a word broken at the end of a line.
_ODD = re.compile(r"[^\x00-\x7f]|[\r\x0b\x0c]\n?|(?<=[^\W\d_])-[ \t]{0,8}\r?\n[ \t]{0,40}(?=[^\W\d_])")
_ODD_BREAK = re.compile(r"[\r\x0b\x0c]|-[ \t]{1,8}\n")
_BROKEN = re.compile(r"[^\W\d_]-\Z")
_WORD_BEFORE, _WORD_AFTER = re.compile(r"[^\W\d_]{1,40}\Z"), re.compile(r"[^\W\d_]{1,40}")
# Words that keep their hyphen at the end ("ground-\nglass") or at the beginning of a line.
_HYPHENATED = re.compile(
    r"(?:right|left|upper|lower|middle|mid|ground|glass|sided|like|based|shaped|related|occupying|pleural|effusion"
    r"|thicken\w*|thickness|density|densities|mass|nodul(?:e|es|ar)|infiltrat\w+|consolidation|atelectasis|scar|band"
    r"|bud|tree|bilateral|hilar|axillary|well|non|wall|walled|soft|tissue|defined|contrast|enhanced|lung|lobe|node"
    r"|nodes|calcified|lateral|medial|posterior|anterior|dual|long|short|high|low|follow|up|air|space|free)\Z"
)


def _plain_character(character: str) -> str:
    """Return the plain equivalent of a character outside ASCII, in lower case; "" for zero width (soft hyphens)."""
    if character in _PLAIN:
        return _PLAIN[character]
    if character in _LINE_ENDS:
        return "\n"
    if unicodedata.category(character) == "Cf":
        return ""
    composed = unicodedata.normalize("NFKC", character).lower()
    return "".join(_PLAIN.get(part, part) for part in composed)


def _edits(report: str) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, replacement) of everything that plain text writes differently, in order."""
    if report.isascii() and "-\n" not in report and not _ODD_BREAK.search(report):
        return
    for match in _ODD.finditer(report):
        found = match[0]
        if found[0] == "-":
            yield *match.span(), _at_line_end(report, match.start(), match.end())
        elif found[0] in "\r\x0b\x0c":
            yield *match.span(), "\n"
        else:
            yield *match.span(), _plain_character(found)


def _at_line_end(report: str, start: int, end: int) -> str:
    """Return the replacement of a hyphen at the end of a line: a hyphen between two words, nothing within one."""
    before = _WORD_BEFORE.search(report, max(0, start - 40), start)
    after = _WORD_AFTER.match(report, end)
    halves = [half[0].lower() for half in (before, after) if half]
    return "-" if any(_HYPHENATED.match(half) for half in halves) else ""


def plain_text(report: str) -> str:
    """Return a report in lower case and plain characters: ligatures, quotes, dashes, soft hyphens, broken words, CR LF."""
    return "".join(piece for piece, _, _ in _pieces(report))


def aligned_text(report: str) -> tuple[str, list[int]]:
    """Return `plain_text` and, for each of its characters, its place in the report; the last entry is the report's end."""
    text: list[str] = []
    origins: list[int] = []
    for piece, start, is_copy in _pieces(report):
        text.append(piece)
        origins += range(start, start + len(piece)) if is_copy else [start] * len(piece)
    return "".join(text), [*origins, len(report)]


def _pieces(report: str) -> Iterator[tuple[str, int, bool]]:
    """Yield (plain text, its start in the report, whether it is copied character by character)."""
    end = 0
    for start, stop, replacement in _edits(report):
        yield report[end:start].lower(), end, True
        yield replacement, start, False
        end = stop
    yield report[end:].lower(), end, True


# --- Layout -------------------------------------------------------------------------------------------------------

_ITEM = re.compile(rf"(?:[-*+>{_BULLET}]+(?=[\s\w])|\(?\d{{1,2}}[.)](?=\s)|\(?[a-h]\)(?=\s))")
_ITEM_AND_BLANKS = re.compile(rf"(?:[-*+>{_BULLET}]+\s*(?=\w|[(?.])|\(?\d{{1,2}}[.)]\s+|\(?[a-h]\)\s+)")
_HEADING_LINE = re.compile(r"[^\W\d_][\w /&,()'-]{1,50}:")
_STATEMENT_END = (".", "!", ";", ":", '"')
_UNFINISHED = re.compile(
    r"(?:,|-|\b(?:the|a|an|of|in|on|at|and|or|nor|with|without|no|not|to|for|from|by|is|are|was|were|which|that"
    r"|than|as"
    r"|both|bilateral|right|left|upper|lower|middle|measuring|approximately|mild|moderate|small|minimal))\Z",
    re.IGNORECASE,
)
# Text isn't wrapped at narrower columns than this.
_NARROWEST_COLUMN = 30
# A paragraph is wrapped text if this share of the lines that don't end a sentence reaches the margin.
_WRAPPED_SHARE = 0.6


def logical_lines(report: str) -> list[str]:
    """Return the logical lines of a report: wrapped lines are joined; "" separates paragraphs.

    A line is joined to the one above if that one was filled to the margin (the next word would not have fitted), ends
    within a phrase, or is followed by a lower-case letter in a text with capitals. List items and headings begin a line.
    """
    raw = [line.strip() for line in _replaced_typography(report).split("\n")]
    margin = max(map(len, raw), default=0)
    has_capitals = any(line[:1].isupper() for line in raw) and not report.isupper()
    lines: list[list[str]] = []  # pieces of each line
    for paragraph in _paragraphs(raw):
        is_wrapped = _is_wrapped(paragraph, margin)
        for number, line in enumerate(paragraph):
            above = paragraph[number - 1] if number else ""
            if number and _BROKEN.search(above) and line[0].isalpha():
                hyphen = _at_line_end(f"{above}\n{line}", len(above) - 1, len(above) + 1)
                lines[-1][-1] = lines[-1][-1][:-1]
                lines[-1] += [hyphen, line]
            elif number and _continues(above, line, margin, is_wrapped, has_capitals):
                lines[-1] += [" ", line]
            else:
                lines.append([line])
        lines.append([])
    joined = ["".join(pieces) for pieces in lines[:-1]]
    return [_ITEM_AND_BLANKS.sub("", line, count=1) if _ITEM.match(line) else line for line in joined]


def _replaced_typography(report: str) -> str:
    """Return plain text that keeps the capitals and line ends which mark the beginning of a statement."""
    pieces, end = [], 0
    for start, stop, replacement in _edits(report):
        is_line_end = report[start] == "-"
        pieces += [report[end:start], "-\n" if is_line_end else replacement]
        end = stop
    return "".join([*pieces, report[end:]])


def _paragraphs(lines: list[str]) -> list[list[str]]:
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line:
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return [paragraph for paragraph in paragraphs if paragraph]


def _reaches_margin(line: str, following: str, margin: int) -> bool:
    return len(line) + 1 + len(following.split(maxsplit=1)[0]) > margin


def _is_wrapped(paragraph: list[str], margin: int) -> bool:
    """Return whether lines of a paragraph end because they were full, not because a statement ended."""
    if margin < _NARROWEST_COLUMN:
        return False
    pairs = zip(paragraph, paragraph[1:], strict=False)
    inner = [pair for pair in pairs if not pair[0].endswith(_STATEMENT_END) and not _begins_line(pair[1])]
    full = sum(_reaches_margin(line, following, margin) for line, following in inner)
    ends_in_stop = sum(line.endswith(_STATEMENT_END) for line in paragraph)
    return bool(inner) and full >= _WRAPPED_SHARE * len(inner) and (len(inner) >= 3 or ends_in_stop > 0)


def _begins_line(line: str) -> bool:
    return bool(_ITEM.match(line) or _HEADING_LINE.match(line))


def _continues(above: str, line: str, margin: int, is_wrapped: bool, has_capitals: bool) -> bool:
    """Return whether a line continues the sentence of the line above."""
    if _HEADING_LINE.match(line) or (_ITEM.match(line) and not (line[0] == "(" or _UNFINISHED.search(above))):
        return False
    if is_wrapped and _reaches_margin(above, line, margin):
        return True
    if above.endswith(_STATEMENT_END):
        return False
    return bool(_UNFINISHED.search(above)) or (has_capitals and line[0].islower())


# --- Sentences ----------------------------------------------------------------------------------------------------

_LONGEST_SENTENCE = 200  # words
_LONGEST_WORD = 60
_ABBREVIATIONS = (
    r"(?<!\b[rl]t\.)(?<!\bdr\.)(?<!\bvs\.)(?<!\bca\.)(?<!\be\.g\.)(?<!\bi\.e\.)"
    r"(?<!\bincl\.)(?<!approx\.)(?<!\bfig\.)(?<!\bpl\.)"
)
_SENTENCE_END = re.compile(
    rf"[;\n\"{_BULLET}!.](?:(?<!\.)|(?:(?<!\d\.)(?=\s|$|[A-Za-z\"])|(?<=\d\.)(?=\s|$)){_ABBREVIATIONS}|\.+)"
)
# "Effusion: none  Consolidation: left base": a statement in a form ends at the next field.
_FIELD_END = re.compile(
    r"(?<=:)( {0,3}(?:none|no|nil|absent|normal|yes|present|\(-\)|\(\+\)))[ ,]{1,3}(?=[a-z][a-z ]{2,30}:)"
)
_HEADING = re.compile(r"\s*([a-z][a-z /&,'-]{1,60}?)\s*:")
_HISTORY = re.compile(
    r"(?:(?:brief |relevant |past |medical |surgical |family |social |clinical )*"
    r"(?:history|details?|informations?|indications?|data|notes?|questions?|summary|background|diagnosis"
    r"|features|profile)"
    r"|clinical|reason for (?:the )?\w+|referral|requests?|(?:presenting |chief )?complaints?|exam|examination|study"
    r"|comparisons?(?: \w+)?|prior (?:study|studies|exam)|techniques?|protocols?|procedures?|h/o|c/o)\Z"
)
_FINDINGS = re.compile(
    r"\b(?:findings?|reports?|impressions?|imp|conclusions?|observations?|opinions?|results?|description|summary"
    r"|lungs?|pleura\w*|heart|mediastinum)\Z"
)
_ORGAN = re.compile(
    r"\b(?:heart|cardi\w+|pericardi\w+|pleura\w*|lungs?|parenchyma|mediastin\w+|nodes?|thyroid|abdom\w+|bones?|liver"
    r"|adrenals?|kidneys?|airways?|trachea\w*|aorta|vascular|vessels?|coronar\w+|chest wall|soft tissues?|o?esophagus"
    r"|hila|hilum|breasts?|spleen)\b"
)


@dataclass(frozen=True)
class Sentence:
    """A sentence in lower case, and the organ heading that it belongs to ("heart and pericardium"), or ""."""

    text: str
    organ: str = ""


def split_sentences(report: str) -> list[str]:
    """Split a report into sentences in lower case; dates and decimals ("26.02.2015", "4.5 mm", ".5 cm") stay whole.

    Sentences longer than _LONGEST_SENTENCE words, as a model in a loop writes them, are cut there.
    """
    return [sentence for line in logical_lines(report) for sentence in _line_sentences(line.lower())]


def read_findings(report: str) -> list[Sentence]:
    """Return the sentences of a report that state findings: without history, indication, comparison and technique."""
    lines = [_line_sentences(line.lower()) for line in logical_lines(report)]
    sections = [_section(sentence) for line in lines for sentence in line]
    last_heading = max((number for number, section in enumerate(sections) if section), default=-1)
    sentences: list[Sentence] = []
    number, is_history, organ, is_open = 0, False, "", False
    for line in lines:
        if not line and not is_open:  # a paragraph ends
            is_history, organ = False, ""
        for place, text in enumerate(line):
            section = sections[number]
            if section:
                is_history = section == "history"
                organ = _heading(text) if section == "organ" else ""
            if not is_history:
                sentences.append(Sentence(text, "" if section else organ))
            is_open = bool(section) and text.endswith(":")  # a heading with nothing after it yet
            # A history section ends at the next heading, or after its first sentence where there is no other heading.
            is_history = is_history and (is_open or number < last_heading)
            if place == len(line) - 1 and not is_open:
                organ = ""
            number += 1
    return sentences


def _heading(sentence: str) -> str:
    match = _HEADING.match(sentence)
    return match[1] if match else ""


def _section(sentence: str) -> str:
    """Return the section that a sentence's heading opens: "history", "findings", "organ", "other"; "" without a heading."""
    return _headed_section(sentence) if ":" in sentence else ""


@lru_cache(maxsize=1 << 14)
def _headed_section(sentence: str) -> str:
    heading = _heading(sentence)
    if not heading:
        return ""
    if _HISTORY.match(heading):
        return "history"
    if _FINDINGS.search(heading):
        return "organ" if _ORGAN.search(heading) else "findings"
    return "organ" if _ORGAN.search(heading) else "other"


def _line_sentences(line: str) -> list[str]:
    sentences = []
    for piece in _SENTENCE_END.split(_FIELD_END.sub(r"\1;", line)):
        words = [word[:_LONGEST_WORD] for word in piece.split()]
        starts = range(0, len(words), _LONGEST_SENTENCE)
        sentences += [" ".join(words[start : start + _LONGEST_SENTENCE]) for start in starts]
    return sentences
