"""METEOR, equal to nltk's with WordNet."""

import sys
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

from nltk.corpus import wordnet
from nltk.stem.porter import PorterStemmer
from nltk.tokenize import wordpunct_tokenize

from samf.evaluation.metrics.ngrams import check_pairs

WORDNET_REMEDY = (
    "METEOR needs WordNet, which nltk does not find. Run `python -m nltk.downloader wordnet` once, or put wordnet.zip "
    "at $NLTK_DATA/corpora/wordnet.zip (a copy, not a link)."
)
_ALPHA, _BETA, _GAMMA = 0.9, 3.0, 0.5
_stemmer = PorterStemmer()


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return _stemmer.stem(word)


@lru_cache(maxsize=1 << 16)
def _synonyms(word: str) -> frozenset[str]:
    """Return the word and WordNet's single-word lemmas that share a sense with it."""
    names = (lemma.name() for synset in wordnet.synsets(word) for lemma in synset.lemmas())
    return frozenset(name for name in names if "_" not in name) | {word}


def wordnet_available() -> bool:
    """Return whether nltk finds WordNet on this machine; never downloads."""
    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError, zipfile.BadZipFile):  # absent, or cut off while it was copied
        return False
    return True


def meteor(predictions: Sequence[str], references: Sequence[str]) -> list[float] | None:
    """Return METEOR of each pair; None without WordNet (`WORDNET_REMEDY` says what to do)."""
    check_pairs(predictions, references)
    if not wordnet_available():
        return None
    pairs = zip(references, predictions, strict=True)
    return [_meteor_of_pair(_meteor_words(reference), _meteor_words(text)) for reference, text in pairs]


@lru_cache(maxsize=1 << 13)  # references repeat with every baseline
def _meteor_words(text: str) -> tuple[str, ...]:
    return tuple(sys.intern(word.lower()) for word in wordpunct_tokenize(text))


def _meteor_of_pair(reference: Sequence[str], prediction: Sequence[str]) -> float:
    """Match by word, then by stem, then by synonym of the stem; fewer chunks of adjacent matches score higher."""
    words, expected = list(enumerate(prediction)), list(enumerate(reference))
    matches: list[tuple[int, int]] = []
    words, expected = _match(words, expected, matches)
    words, expected = ([(place, _stem(word)) for place, word in left] for left in (words, expected))
    words, expected = _match(words, expected, matches)
    _match_synonyms(words, expected, matches)
    if not matches:
        return 0.0
    matches.sort()
    precision, recall = len(matches) / len(prediction), len(matches) / len(reference)
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    steps = zip(matches, matches[1:], strict=False)
    chunks = 1 + sum((b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in steps)
    return (1 - _GAMMA * (chunks / len(matches)) ** _BETA) * mean


_Words = list[tuple[int, str]]


def _places(expected: _Words) -> defaultdict[str, list[int]]:
    places = defaultdict(list)
    for place, word in expected:
        places[word].append(place)
    return places


def _match(words: _Words, expected: _Words, matches: list[tuple[int, int]]) -> tuple[_Words, _Words]:
    """Add matches of equal words to `matches`, from the last word backwards; return the unmatched words of both."""
    places = _places(expected)
    left, taken = [], set()
    for place, word in reversed(words):
        if candidates := places.get(word):
            match = candidates.pop()
            taken.add(match)
            matches.append((place, match))
        else:
            left.append((place, word))
    return left[::-1], [pair for pair in expected if pair[0] not in taken]


def _match_synonyms(words: _Words, expected: _Words, matches: list[tuple[int, int]]) -> None:
    """Add matches of a word with the last place in `expected` that holds any of its synonyms."""
    places = _places(expected)
    for place, word in reversed(words):
        candidates = [found for name in places.keys() & _synonyms(word) if (found := places[name])]
        if candidates:
            match = max(candidates, key=lambda found: found[-1])
            matches.append((place, match.pop()))
