"""Signs that a system writes one text whatever the image."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from samf.evaluation.schema import Collapse, Loop, WordRun

_Qualifies: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]


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


class _Words:
    """The words of several texts, one text after the other, as numbers.

    Runs are numbered by doubling: a run of 2k words is a pair of runs of k. Only places where a shorter run qualified are
    looked at for a longer one.
    """

    def __init__(self, texts: Sequence[Sequence[str]]):
        vocabulary: dict[str, int] = {}
        codes = [vocabulary.setdefault(word, len(vocabulary)) for text in texts for word in text]
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        self.texts = np.repeat(np.arange(len(texts)), lengths)  # the text of each word
        self.left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(codes))  # words to its end
        self.codes = np.asarray(codes, dtype=np.int64)

    def longest(self, qualifies: _Qualifies) -> tuple[int, np.ndarray, np.ndarray]:
        """Return the length of the longest runs that qualify, their places and their numbers, in the order of the words.

        Args:
            qualifies: places (P,) and the numbers of their runs (P,), equal for equal runs → which of them qualify, (P,).
                What qualifies for a run must also qualify for its parts.
        """
        level = _keep(np.arange(len(self.codes)), self.codes, qualifies)
        length = 1
        while len((longer := _keep(*self._joined(level, length, length), qualifies))[0]):
            level, length = longer, 2 * length
        if not len(level[0]):
            return 0, *level
        low, high, best = length, 2 * length, level
        while high - low > 1:
            middle = (low + high) // 2
            found = _keep(*self._joined(level, length, middle - length), qualifies)
            low, high, best = (middle, high, found) if len(found[0]) else (low, middle, best)
        return low, *best

    def text(self, texts: Sequence[Sequence[str]], place: int, length: int) -> str:
        """Return a run's words; `texts` are those that this was made of."""
        start = place - int(np.searchsorted(self.texts, self.texts[place]))
        return " ".join(texts[self.texts[place]][start : start + length])

    def _joined(self, level: tuple[np.ndarray, np.ndarray], length: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
        """Return places and numbers of runs of `length + shift` words, from those of `length`."""
        places, names = level
        numbers = np.full(len(self.codes), -1, dtype=np.int64)
        numbers[places] = names
        places = places[self.left[places] >= length + shift]
        second = numbers[places + shift]
        places, second = places[second >= 0], second[second >= 0]
        if not len(places):
            return places, second
        pairs = numbers[places] * (second.max() + 1) + second
        return places, np.unique(pairs, return_inverse=True)[1].ravel()


def _keep(places: np.ndarray, names: np.ndarray, qualifies: _Qualifies) -> tuple[np.ndarray, np.ndarray]:
    kept = qualifies(places, names) if len(places) else np.zeros(0, dtype=bool)
    return places[kept], names[kept]


def _first_of_most_frequent(places: np.ndarray, names: np.ndarray, counts: np.ndarray) -> int:
    """Return where the run with the highest count is first; of several, the one whose number is lowest."""
    name = names[counts == counts.max()].min()
    return int(places[np.argmax(names == name)])


def _longest_shared(texts: Sequence[Sequence[str]], at_least: int) -> WordRun:
    """Return the longest run of words that `at_least` texts contain."""
    words = _Words(texts)

    def owners(places: np.ndarray, names: np.ndarray) -> np.ndarray:
        pairs = np.sort(names * len(texts) + words.texts[places])
        distinct = pairs[np.diff(pairs, prepend=-1) != 0]  # once per text
        return np.bincount(distinct // len(texts))[names]

    length, places, names = words.longest(lambda places, names: owners(places, names) >= at_least)
    if not length:
        return {"words": 0, "text": ""}
    place = _first_of_most_frequent(places, names, owners(places, names))
    return {"words": length, "text": words.text(texts, place, length)}


def _longest_loop(texts: Sequence[Sequence[str]]) -> Loop:
    """Return the longest run of words that one text contains more than once."""
    words = _Words(texts)
    length, places, _ = words.longest(lambda places, names: _occurrences(names * len(texts) + words.texts[places]) > 1)
    if not length:
        return {"words": 0, "text": "", "index": None}
    index = int(words.texts[places].min())
    alone = _Words([texts[index]])
    _, places, names = alone.longest(lambda _, names: _occurrences(names) > 1)
    place = _first_of_most_frequent(places, names, _occurrences(names))
    return {"words": length, "text": alone.text([texts[index]], place, length), "index": index}


def _occurrences(values: np.ndarray) -> np.ndarray:
    """Return how often each value occurs, (N,)."""
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[numbers.ravel()]
