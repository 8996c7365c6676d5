"""Signs that a system writes one text whatever the image."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from samf.evaluation.schema import Collapse, Loop, WordRun

T = TypeVar("T")


def template_collapse(texts: Sequence[str]) -> Collapse:
    """Measure how alike texts are, and whether one repeats itself.

    Words are split at white space, in lower case.

    Returns:
        `distinct_ratio` (different texts / texts, white space ignored), `most_frequent` (share of the most frequent text),
        `template` (longest run of words that at least half of the texts contain) and `loop` (longest run that one text
        contains twice).
    """
    words = [text.lower().split() for text in texts]
    counts = Counter(map(tuple, words))
    return {
        "distinct_ratio": len(counts) / len(texts) if texts else None,
        "most_frequent": max(counts.values()) / len(texts) if texts else None,
        "template": _longest_shared(words, max(2, -(-len(words) // 2))),
        "loop": _longest_loop(words),
    }


class _Runs:
    """Numbers for all runs of n words in a list of texts, by doubling: a run of 2k words is a pair of runs of k."""

    def __init__(self, texts: Sequence[Sequence[str]]):
        vocabulary: dict[str, int] = {}
        codes = [vocabulary.setdefault(word, len(vocabulary)) for text in texts for word in text]
        lengths = [len(text) for text in texts]
        self.starts = np.repeat(np.arange(len(texts)), lengths)  # the text of each word
        self.left = np.concatenate([np.arange(n, 0, -1) for n in lengths] or [np.zeros(0, int)])  # words to its end
        self.levels = [np.asarray(codes, dtype=np.int64)]  # of runs of 1, 2, 4, … words

    def of_length(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where runs of n words start, and a number for each that equal runs share."""
        power = n.bit_length() - 1
        while len(self.levels) <= power:
            self.levels.append(self._pair(self.levels[-1], 1 << (len(self.levels) - 1)))
        places = np.flatnonzero(self.left >= n)
        names = self.levels[power]
        return places, _number_pairs(names[places], names[places + n - (1 << power)])

    def _pair(self, names: np.ndarray, step: int) -> np.ndarray:
        paired = np.full(len(names), -1, dtype=np.int64)
        places = np.flatnonzero(self.left >= 2 * step)
        paired[places] = _number_pairs(names[places], names[places + step])
        return paired


def _number_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return small numbers for pairs, the same for equal pairs."""
    if not len(first):
        return np.zeros(0, dtype=np.int64)
    return np.unique(first * (second.max() + 1) + second, return_inverse=True)[1].ravel()


def _longest(limit: int, find: Callable[[int], T | None]) -> tuple[int, T | None]:
    """Return the largest n ≤ limit for which `find(n)` is not None, and its result; what is found for n is found for less."""
    low, high, found = 0, limit, None
    while low < high:
        middle = (low + high + 1) // 2
        result = find(middle)
        if result is None:
            high = middle - 1
        else:
            low, found = middle, result
    return low, found


def _longest_shared(texts: Sequence[Sequence[str]], at_least: int) -> WordRun:
    """Return the longest run of words that `at_least` texts contain."""
    runs = _Runs(texts)

    def shared(n: int) -> int | None:
        places, names = runs.of_length(n)
        if not len(places):
            return None
        counts = np.bincount(np.unique(names * len(texts) + runs.starts[places]) // len(texts))  # once per text
        return int(places[np.argmax(names == counts.argmax())]) if counts.max() >= at_least else None

    words, place = _longest(max(map(len, texts), default=0), shared)
    flat = [word for text in texts for word in text]
    return {"words": words, "text": " ".join(flat[place : place + words]) if place is not None else ""}


def _longest_loop(texts: Sequence[Sequence[str]]) -> Loop:
    """Return the longest run of words that one text contains more than once."""
    best: Loop = {"words": 0, "text": "", "index": None}
    for index, text in enumerate(texts):
        runs = _Runs([text])
        if _repeated(runs, best["words"] + 1) is not None:
            words, start = _longest(len(text) - 1, partial(_repeated, runs))
            place = start or 0
            best = {"words": words, "text": " ".join(text[place : place + words]), "index": index}
    return best


def _repeated(runs: _Runs, n: int) -> int | None:
    """Return where a run of n words starts that occurs more than once."""
    places, names = runs.of_length(n)
    counts = np.bincount(names) if len(names) else np.zeros(1)
    return int(places[np.argmax(names == counts.argmax())]) if counts.max() > 1 else None
