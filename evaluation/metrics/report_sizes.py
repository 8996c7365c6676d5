"""Lengths that a report states, in mm: "a 4 x 5.5 cm mass", ".5 cm", "5 to 10 mm", "3,5 mm".

A chain of numbers shares the unit after it. Years, dates and the numbers of slices and segments aren't lengths. Every
expression is bounded, so that the work is linear in the length of the text.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# At most four digits before the point and three after it; not the end of a longer number, of a date or of a word (T12).
_NUMBER = r"(?<![\w.,/])(?:\d{1,4}(?:[.,]\d{1,3})?|[.,]\d{1,3})(?![\d/]|[.,]\d)"
# After the x of "3x4" or a dash a number may follow without a space.
_NEXT_NUMBER = r"(?:\d{1,4}(?:[.,]\d{1,3})?|[.,]\d{1,3})(?![\d/]|[.,]\d)"
_UNIT = r"(?P<unit>mms?|cms?|millimet(?:er|re|ric)s?|centimet(?:er|re|ric)s?)(?![a-z\d^]|\s{0,2}hg\b)"
_JOINER = (
    r"(?:\s{0,3}(?:x|\*|by|-|~|-?\s?to|and|or|up\sto)\s{0,3}|,\s(?=\d{1,3}(?:\.\d)?(?:,\s\d|,?\s(?:and|or"
    r"|to)\s\d))|,\s(?:and|or)\s)"
)
_LENGTHS = re.compile(rf"(?P<numbers>{_NUMBER}(?:{_JOINER}{_NEXT_NUMBER}){{0,3}})\s{{0,3}}-?\s?{_UNIT}", re.IGNORECASE)
_VALUE = re.compile(r"\d{0,4}[.,]\d{1,3}|\d{1,4}")
# "image 112 and 6 mm", "segment 4 - 5 mm": the number after such a word is an index.
_IS_INDEX = re.compile(
    r"(?:images?|im|slices?|series|se|segments?|levels?|stations?|grade|stage|type|since|in|year|dated|section"
    r"|rib|no\.?|#)\s{0,2}\Z",
    re.IGNORECASE,
)
_LOOK_BACK = 12
_PRODUCT = re.compile(r"\s{0,3}(?:x|\*|by)", re.IGNORECASE)
_YEARS = range(1900, 2100)
# Typographic signs that NFKC leaves unchanged, replaced one to one.
_PLAIN = str.maketrans({"\u00d7": "x", "\u2212": "-", **{chr(code): "-" for code in range(0x2010, 0x2016)}})


@dataclass(frozen=True)
class Length:
    """A length in a text: its number is at [start, end); `mm` is rounded to a tenth."""

    start: int
    end: int
    mm: float


def find_lengths(text: str) -> Iterator[Length]:
    """Yield every length in a text of plain characters (× and dashes are accepted), in order."""
    plain = text if text.isascii() else text.translate(_PLAIN)
    for match in _LENGTHS.finditer(plain):
        factor = 10 if match["unit"][0] in "cC" else 1
        values = [*_VALUE.finditer(plain, match.start("numbers"), match.end("numbers"))]
        for number, value in enumerate(values):
            if _is_length(plain, value, is_last=number == len(values) - 1):
                yield Length(value.start(), value.end(), round(factor * _to_float(value[0]), 1))


def read_sizes(report: str) -> Counter[float]:
    """Read every length that a report states, in mm to a tenth: "a 4 x 5.5 cm mass" → 40 and 55."""
    plain = report if report.isascii() else unicodedata.normalize("NFKC", report)
    return Counter(length.mm for length in find_lengths(plain))


def _is_length(text: str, value: re.Match[str], *, is_last: bool) -> bool:
    if value[0].isdigit() and int(value[0]) in _YEARS:
        return False
    if is_last:  # the number directly before the unit
        return True
    before = text[max(0, value.start() - _LOOK_BACK) : value.start()]
    after = text[value.end() : value.end() + _LOOK_BACK]
    return bool(_PRODUCT.match(after)) or not _IS_INDEX.search(before)


def _to_float(number: str) -> float:
    return float(number.replace(",", "."))
