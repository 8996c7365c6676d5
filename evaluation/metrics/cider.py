"""CIDEr, equal to pycocoevalcap's."""

import math
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from samf.evaluation.metrics.ngrams import ORDERS, check_pairs, count_ngrams, tokenize_13a

CIDER_REMEDY = "CIDEr weighs n-grams by how rare they are among the references, and needs at least two of them."
CIDER_IDENTICAL = (
    "0 because all references are the same words: an n-gram that every reference has weighs log(N / N) = 0, so that even a "
    "perfect prediction scores 0."
)
_SIGMA = 6.0
_HAS_WORD = re.compile(r"\w")


def cider_tokens(text: str) -> list[str]:
    """Split a text into words: lower case, punctuation dropped, like COCO's tokenizer, which needs Java."""
    return [token for token in tokenize_13a(text.rstrip()).lower().split() if _HAS_WORD.search(token)]


class _CiderReferences:
    """The references' n-grams, numbered, with their weights and each reference's vectors: 8 bytes per n-gram."""

    def __init__(self, references: Sequence[str]):
        self.numbers: dict[tuple[str, ...], int] = {}
        counted = [self._count(cider_tokens(reference)) for reference in references]
        documents = np.zeros(len(self.numbers))
        for _, vectors in counted:
            for numbers, _ in vectors:
                documents[numbers] += 1
        self.unseen = math.log(len(references))
        self.weights = self.unseen - np.log(np.maximum(documents, 1))
        self.targets = [(length, [self._weigh(*vector) for vector in vectors]) for length, vectors in counted]

    def _count(self, words: Sequence[str]) -> tuple[int, list[tuple[np.ndarray, np.ndarray]]]:
        """Return the number of words and, for each order, the n-grams' numbers (ascending) and their counts."""
        vectors = []
        for order in ORDERS:
            counts = count_ngrams(words, order)
            for ngram in counts:
                self.numbers.setdefault(ngram, len(self.numbers))
            numbers = np.fromiter(map(self.numbers.__getitem__, counts), np.int32, len(counts))
            ascending = np.argsort(numbers)
            occurrences = np.fromiter(counts.values(), np.float32, len(counts))
            vectors.append((numbers[ascending], occurrences[ascending]))
        return len(words), vectors

    def _weigh(self, numbers: np.ndarray, occurrences: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        return numbers, occurrences, float(np.linalg.norm(occurrences * self.weights[numbers]))

    def score(self, words: Sequence[str], index: int) -> float:
        """Return CIDEr of a prediction's words against the reference at `index`."""
        length, targets = self.targets[index]
        similarity = 0.0
        for order, (numbers, occurrences, target_norm) in zip(ORDERS, targets, strict=True):
            counts = count_ngrams(words, order)
            found = np.fromiter((self.numbers.get(ngram, -1) for ngram in counts), np.int64, len(counts))
            weights = np.where(found >= 0, self.weights[found], self.unseen) if len(self.weights) else np.zeros(0)
            vector = np.fromiter(counts.values(), np.float64, len(counts)) * weights
            norm = float(np.linalg.norm(vector)) * target_norm
            if norm:
                places = np.minimum(np.searchsorted(numbers, found), len(numbers) - 1)
                both = numbers[places] == found
                target = occurrences[places[both]] * weights[both]
                similarity += float(np.minimum(vector[both], target) @ target) / norm
        # The reference library measures lengths in bigrams.
        difference = max(0, len(words) - 1) - max(0, length - 1)
        return 10 * similarity / len(ORDERS) * math.exp(-(difference**2) / (2 * _SIGMA**2))


@lru_cache(maxsize=1)  # a system and its baselines are scored against the same references
def _cider_references(references: tuple[str, ...]) -> _CiderReferences:
    return _CiderReferences(references)


def cider(predictions: Sequence[str], references: Sequence[str]) -> list[float] | None:
    """Return CIDEr of each pair, 0 to 10; None for fewer than two pairs (`CIDER_REMEDY`).

    N-grams are weighted by their inverse document frequency among `references`. A Gaussian with a standard deviation of 6
    words penalises differences in length: 20 words more or fewer divide the score by 260.
    """
    check_pairs(predictions, references)
    if len(references) < 2:
        return None
    targets = _cider_references(tuple(references))
    return [targets.score(cider_tokens(text), index) for index, text in enumerate(predictions)]


def all_alike(references: Sequence[str]) -> bool:
    """Return whether all references consist of the same words, as CIDEr splits them."""
    first = cider_tokens(references[0])
    return all(reference == references[0] or cider_tokens(reference) == first for reference in references)
