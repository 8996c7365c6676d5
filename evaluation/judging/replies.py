"""Read the score from a judge's reply."""

import re
import unicodedata

__all__ = ["parse_score"]

_NUMBER = r"(?P<number>[-+−]?\d+(?:\.\d+|,\d{1,2})?)(?![\d.,]*\d|\s*(?:%|percent))"
_OUT_OF = r"(?:\s*(?:/|out of)\s*(?P<of>\d+(?:[.,]\d+)?))?"
_VALUE = rf"\[*{_NUMBER}{_OUT_OF}\]*(?!\s*(?:[-–—]|to)\s*\d)"
_LABELLED = re.compile(rf"\b(?:score|rating|grade)s?\)?\s*(?:is\s*)?[:=]\s*{_VALUE}")
_SAID = re.compile(
    rf"\b(?:(?:score|rating|grade)\s+(?:is|of|would be)|(?:give|rate|score|grade|assign)(?:\s+(?:it|this|the \w+))?)"
    rf"\s+(?:as\s+)?(?:an?\s+)?(?:score of\s+)?{_VALUE}"
)
_BARE = re.compile(rf"^[^\w+−-]*{_VALUE}(?:\s*points?)?[.!)]*\s*$", re.MULTILINE)
_FRACTION = re.compile(rf"(?<![\d.,/]){_NUMBER}\s*(?:/|out of)\s*(?P<of>\d+(?:[.,]\d+)?)")


def parse_score(reply: str, highest: float = 10.0) -> float | None:
    """Return the score from 0 to `highest` in a judge's reply; None where it gives none, several, or one out of range.

    Accepted are "8", "8/10", "Score: 7.5", "**Score:** 8 out of 10", {"score": 8}, "[[8]]", "7,5", and a score in a sentence
    ("I would give it an 8"); a labelled score takes precedence. Not accepted are "9/5", "80 %", "7 to 8" and other numbers
    ("3 nodules are missing"). Text between <think> and </think> doesn't count, whether it is closed or not.
    """
    text = unicodedata.normalize("NFKC", reply).rpartition("</think>")[2].partition("<think>")[0]
    text = re.sub(r"[*_`\"'“”]", "", text).casefold().strip()
    for pattern in (_LABELLED, _BARE, _SAID, _FRACTION):
        found = [_value(match, highest) for match in pattern.finditer(text)]
        if found:
            # None counts as a value: one number out of range invalidates the reply.
            return found[0] if len(set(found)) == 1 else None
    return None


def _value(match: re.Match[str], highest: float) -> float | None:
    value = float(match["number"].replace(",", ".").replace("−", "-"))
    of = highest if match["of"] is None else float(match["of"].replace(",", "."))
    return value if of == highest and 0 <= value <= highest else None
