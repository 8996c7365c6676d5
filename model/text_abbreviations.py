"""Abbreviations of reports, written out: "e/o" → "evidence of", "isn't" → "is not", "rul" → "right upper lobe"."""

import re
from bisect import bisect_right
from functools import lru_cache

_LOBES = {
    f"{side[0]}{part[0]}{kind}": f"{side} {part} {'lobes' if kind == 'ls' else 'lobe'}"
    for side in ("right", "left")
    for part in ("upper", "middle", "lower")
    for kind in ("l", "ls")
}
_ABBREVIATIONS: dict[str, str] = _LOBES | {
    "e/o": "evidence of",
    "s/o": "suggestive of",
    "c/w": "consistent with",
    "h/o": "history of",
    "k/c/o": "known case of",
    "r/o": "rule out",
    "s/p": "status post",
    "w/o": "without",
    "w/": "with",
    "f/u": "follow-up",
    "d/t": "due to",
    "b/l": "bilateral",
    "bil": "bilateral",
    "rt": "right",
    "rt.": "right",
    "lt": "left",
    "lt.": "left",
    "nad": "normal",
    "wnl": "within normal limits",
    "nil": "none",
    "(-)": "absent",
    "(+)": "present",
    "-ve": "negative",
    "+ve": "positive",
    "+": "present",
    "ggo": "ground glass opacity",
    "ggos": "ground glass opacities",
    "can't": "cannot",
    "cannot": "cannot",
    "won't": "will not",
    "shan't": "shall not",
    "there's": "there is",
    "it's": "it is",
    "that's": "that is",
    "imp": "impression",
    "pl.": "pleural",
    "l/n": "lymph node",
    "ln": "lymph node",
    "lns": "lymph nodes",
}
_TOKEN = re.compile(r"([\"'\[]*)(.*?)([\"',:;\])]*)\Z", re.DOTALL)


@lru_cache(maxsize=1 << 14)
def _write_out(word: str) -> str:
    bare = word.rstrip(",;:")
    if bare in _ABBREVIATIONS:
        return _ABBREVIATIONS[bare] + word[len(bare) :]
    parts = _TOKEN.match(word)
    before, core, after = parts.groups() if parts else ("", word, "")
    if core in _ABBREVIATIONS:
        return before + _ABBREVIATIONS[core] + after
    if core.endswith("n't") and len(core) > 4:
        return f"{before}{core[:-3]} not{after}"
    if "/" in core:
        return before + _write_out_parts(core) + after
    return word


def _write_out_parts(core: str) -> str:
    """Write out "rll/lll" and "collapse/consolidation" as two words; keep other slashes ("12/03/2021", "and/or")."""
    parts = core.split("/")
    if core == "and/or" or not all(part.isalpha() and len(part) > 2 for part in parts):
        return core
    return " and ".join(_ABBREVIATIONS.get(part, part) for part in parts)


class WrittenOut:
    """A sentence with its abbreviations written out, aligned with its own words.

    Args:
        sentence: the sentence, in lower case.
        prefix: heading of the section that the sentence belongs to; written before it.

    Attributes:
        text: the sentence written out.
        first: index in `text` where the sentence begins, after the prefix.
    """

    def __init__(self, sentence: str, prefix: str = ""):
        self._words = sentence.split()
        pieces = [f"{prefix}:"] if prefix else []
        self.first = len(prefix) + 2 if prefix else 0
        self._starts, place = [], self.first
        for word in self._words:
            self._starts.append(place)
            pieces.append(_write_out(word))
            place += len(pieces[-1]) + 1
        self.text = " ".join(pieces)

    def original(self, start: int, end: int) -> str:
        """Return the sentence's own words that [start, end) of `text` was made of."""
        if not self._words or end <= self.first:
            return ""
        first = max(0, bisect_right(self._starts, start) - 1)
        last = bisect_right(self._starts, end - 1)
        return " ".join(self._words[first:last]).strip(" ,")
