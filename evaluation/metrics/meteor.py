"""METEOR, equal to nltk's with WordNet."""

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from nltk.stem.porter import PorterStemmer

from samf.evaluation.metrics.sampled_metric import divide
from samf.evaluation.metrics.text_tables import Tokens, ragged, text_tables
from samf.evaluation.metrics.wordnet_synonyms import synonyms, wordnet_available

WORDNET_REMEDY = (
    "METEOR needs WordNet, which nltk does not find. Run `python -m nltk.downloader wordnet` once, or put wordnet.zip "
    "at $NLTK_DATA/corpora/wordnet.zip (a copy, not a link)."
)
_ALPHA, _BETA, _GAMMA = 0.9, 3.0, 0.5
_stemmer = PorterStemmer()


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return _stemmer.stem(word)


def meteor(predictions: Sequence[str], references: Sequence[str]) -> list[float] | None:
    """Return METEOR of each pair; None without WordNet (`WORDNET_REMEDY` says what to do).

    Words are matched by form, then by stem, then by synonym of the stem; fewer chunks of adjacent matches score higher.
    """
    tables, predicted, expected = text_tables(predictions, references)
    if not wordnet_available():
        return None
    tokens = tables.tokens("meteor")
    words, targets = _words_of(tokens, predicted), _words_of(tokens, expected)
    by_form, words, targets = _match(words, targets)
    words, targets, stems = _stemmed(words, targets, tokens.vocabulary)
    by_stem, words, targets = _match(words, targets)
    matches = [by_form, by_stem, _match_synonyms(words, targets, stems)]
    pairs, places, target_places = (np.concatenate(column) for column in zip(*matches, strict=True))
    return _scores(pairs, places, target_places, tokens.lengths[predicted], tokens.lengths[expected]).tolist()


class _Words(NamedTuple):
    """Words of the texts of all pairs, (W,) each: the number of the pair, the place in the text, the number of the word."""

    pairs: np.ndarray
    places: np.ndarray
    numbers: np.ndarray

    def take(self, index: np.ndarray) -> "_Words":
        """Return the words at `index`, a mask or numbers."""
        return _Words(*(column[index] for column in self))


# Pairs of words that match, (M,) each: the number of the pair, the place in the prediction and in the reference.
_Matches = tuple[np.ndarray, np.ndarray, np.ndarray]


def _words_of(tokens: Tokens, rows: np.ndarray) -> _Words:
    lengths = tokens.lengths[rows]
    index = ragged(tokens.offsets[rows], lengths)
    return _Words(
        np.repeat(np.arange(len(rows)), lengths), ragged(np.zeros_like(lengths), lengths), tokens.numbers[index]
    )


def _match(words: _Words, targets: _Words) -> tuple[_Matches, _Words, _Words]:
    """Match equal words; return the matches and the unmatched words of both.

    nltk goes through the prediction from its end and takes the last equal word that is left: of a word that the
    prediction has m and the reference n times, the last min(m, n) match in their order.
    """
    size = 1 + max((int(part.numbers.max(initial=0)) for part in (words, targets)), default=0)
    words, keys, starts, counts = _grouped(words, size)
    targets, target_keys, target_starts, target_counts = _grouped(targets, size)
    both, here, there = np.intersect1d(keys, target_keys, assume_unique=True, return_indices=True)
    shared = np.minimum(counts[here], target_counts[there])
    matched = ragged(starts[here] + counts[here] - shared, shared)
    target_matched = ragged(target_starts[there] + target_counts[there] - shared, shared)
    found = words.pairs[matched], words.places[matched], targets.places[target_matched]
    return found, _without(words, matched), _without(targets, target_matched)


def _grouped(words: _Words, size: int) -> tuple[_Words, np.ndarray, np.ndarray, np.ndarray]:
    """Return the words in the order of pair, number and place; and key, start and length of each run of equal ones."""
    length = 1 + int(words.places.max(initial=0))
    keys = words.pairs.astype(np.int64) * size + words.numbers
    keys, places = np.divmod(np.sort(keys * length + words.places), length)
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    pairs, numbers = np.divmod(keys, size)
    return _Words(pairs, places, numbers), keys[starts], starts, np.diff(starts, append=len(keys))


def _without(words: _Words, index: np.ndarray) -> _Words:
    kept = np.ones(len(words.pairs), dtype=bool)
    kept[index] = False
    return words.take(kept)


def _stemmed(words: _Words, targets: _Words, vocabulary: Sequence[str]) -> tuple[_Words, _Words, list[str]]:
    """Return the words with the numbers of their stems, and the stems."""
    known: dict[str, int] = {}
    used = np.unique(np.concatenate([words.numbers, targets.numbers]))
    stems = np.zeros(len(vocabulary), dtype=np.int64)
    stems[used] = [known.setdefault(_stem(vocabulary[number]), len(known)) for number in used.tolist()]
    stemmed = (part._replace(numbers=stems[part.numbers]) for part in (words, targets))
    return *stemmed, list(known)


def _match_synonyms(words: _Words, targets: _Words, stems: Sequence[str]) -> _Matches:
    """Match each word, from the last one backwards, with the last word left in the reference that is a synonym of it."""
    words = words.take(np.lexsort((words.places, words.pairs)))
    numbers = {stem: number for number, stem in enumerate(stems)}
    of_words: dict[int, list[int]] = {}
    for number in np.unique(words.numbers).tolist():
        of_words[number] = [numbers[name] for name in synonyms(stems[number]) if name in numbers]
    counts = np.array([len(of_words.get(number, ())) for number in range(len(stems))], dtype=np.int64)
    flat = np.array([name for number in range(len(stems)) for name in of_words.get(number, ())], dtype=np.int64)
    repeats = counts[words.numbers]
    names = flat[ragged((np.cumsum(counts) - counts)[words.numbers], repeats)]
    keys = np.repeat(words.pairs, repeats) * len(stems) + names
    target_keys = targets.pairs * len(stems) + targets.numbers
    hits = np.isin(keys, target_keys)
    found = _match_greedily(
        np.repeat(np.arange(len(repeats)), repeats)[hits].tolist(),
        keys[hits].tolist(),
        _last_places(target_keys, targets.places, keys[hits]),
    )
    index, places = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return words.pairs[index], words.places[index], places


def _last_places(keys: np.ndarray, places: np.ndarray, wanted: np.ndarray) -> dict[int, list[int]]:
    """Return key → its places, ascending, of the wanted keys."""
    chosen = np.isin(keys, wanted)
    order = np.lexsort((places[chosen], keys[chosen]))
    found: defaultdict[int, list[int]] = defaultdict(list)
    for key, place in zip(keys[chosen][order].tolist(), places[chosen][order].tolist(), strict=True):
        found[key].append(place)
    return found


def _match_greedily(words: Sequence[int], keys: Sequence[int], places: dict[int, list[int]]) -> list[tuple[int, int]]:
    """Return (word, place) of the words that find a place.

    Args:
        words: a word for each of its synonyms in the reference, in the order of pairs; within a pair by place.
        keys: the synonym, unique to its pair.
        places: where the reference has it, ascending; those that are taken are removed.
    """
    candidates: defaultdict[int, list[list[int]]] = defaultdict(list)
    for word, key in zip(words, keys, strict=True):
        candidates[word].append(places[key])
    found = []
    for word in sorted(candidates, reverse=True):
        left = [named for named in candidates[word] if named]
        if left:
            found.append((word, max(left, key=lambda named: named[-1]).pop()))
    return found


def _scores(
    pairs: np.ndarray, places: np.ndarray, target_places: np.ndarray, words: np.ndarray, targets: np.ndarray
) -> np.ndarray:
    """Return METEOR of each pair, (N,).

    Args:
        pairs: the pair of each match, (M,).
        places: its place in the prediction.
        target_places: its place in the reference.
        words: length of each prediction, (N,).
        targets: length of each reference.
    """
    order = np.lexsort((places, pairs))
    steps = [np.diff(column[order]) for column in (pairs, places, target_places)]
    follows = (steps[0] == 0) & (steps[1] == 1) & (steps[2] == 1)
    matched = np.bincount(pairs, minlength=len(words))
    chunks = matched - np.bincount(pairs[order][1:][follows], minlength=len(words))
    precision, recall = matched / np.maximum(words, 1), matched / np.maximum(targets, 1)
    mean = divide(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall, otherwise=0.0)
    return (1 - _GAMMA * divide(chunks, matched, otherwise=0.0) ** _BETA) * mean
