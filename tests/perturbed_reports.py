"""Reports made wrong in one way, to see which metrics notice."""

import re
from collections.abc import Callable

_SENTENCE = re.compile(r"(?<=\.)\s+")
_NEGATION = re.compile(r"\b(?:not |no (?=\w))", re.IGNORECASE)
_VERB = re.compile(r"\b(is|are|was|were)\b(?! not)")
_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_LENGTH = re.compile(r"\d+(?:\.\d+)?(?=(?:\s*x\s*\d+(?:\.\d+)?)*\s*(?:mm|cm))")


def flip_negations(report: str) -> str:
    """Each sentence says the opposite: "was not observed" ↔ "was observed"."""
    return " ".join(_flip(sentence) for sentence in _SENTENCE.split(report))


def _flip(sentence: str) -> str:
    if _NEGATION.search(sentence):
        return _NEGATION.sub("", sentence)
    return _VERB.sub(r"\1 not", sentence, count=1)


def swap_sides(report: str) -> str:
    """Left becomes right, and right left."""
    return _SIDE.sub(lambda m: "right" if m[0].lower() == "left" else "left", report)


def change_sizes(report: str) -> str:
    """Every length in mm or cm becomes three times as long."""
    return _LENGTH.sub(lambda m: f"{3 * float(m[0]):g}", report)


PERTURBATIONS: dict[str, Callable[[str], str]] = {
    "negations flipped": flip_negations,
    "sides swapped": swap_sides,
    "sizes changed": change_sizes,
}
