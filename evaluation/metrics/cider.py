"""CIDEr, equal to pycocoevalcap's."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from samf.evaluation.metrics.ngrams import ORDERS
from samf.evaluation.metrics.text_tables import cider_tokens, text_tables

__all__ = ["CIDER_IDENTICAL", "CIDER_REMEDY", "all_alike", "cider", "cider_tokens"]

CIDER_REMEDY = "CIDEr weighs n-grams by how rare they are among the references, and needs at least two of them."
CIDER_IDENTICAL = (
    "0 because all references are the same words: an n-gram that every reference has weighs log(N / N) = 0, so that even a "
    "perfect prediction scores 0."
)
_SIGMA = 6.0


def cider(predictions: Sequence[str], references: Sequence[str]) -> list[float] | None:
    """Return CIDEr of each pair, 0 to 10; None for fewer than two pairs (`CIDER_REMEDY`).

    N-grams are weighted by their inverse document frequency among `references`. A Gaussian with a standard deviation of 6
    words penalises differences in length: 20 words more or fewer divide the score by 260.
    """
    tables, predicted, expected = text_tables(predictions, references)
    if len(references) < 2:
        return None
    tokens = tables.tokens("cider")
    similarity = sum(_similarities(ngrams, predicted, expected) for ngrams in tokens.ngrams)
    # The reference library measures lengths in bigrams.
    bigrams = np.maximum(tokens.lengths - 1, 0)
    difference = bigrams[predicted] - bigrams[expected]
    return (10 * similarity / len(ORDERS) * np.exp(-(difference**2) / (2 * _SIGMA**2))).tolist()


def _similarities(ngrams: csr_array, predicted: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the cosine of weighted counts of each pair, the prediction's clipped to the reference's, (N,).

    Args:
        ngrams: counts of n-grams by text, (D, G).
        predicted: row of each prediction, (N,).
        expected: row of each reference.
    """
    targets = ngrams[expected]
    documents = np.bincount(targets.indices, minlength=ngrams.shape[1])
    weights = math.log(len(expected)) - np.log(np.maximum(documents, 1))
    weighted, targets = _weigh(ngrams[predicted], weights), _weigh(targets, weights)
    norms = _norms(weighted) * _norms(targets)
    products = weighted.minimum(targets).multiply(targets).sum(axis=1)
    return np.divide(products, norms, out=np.zeros(len(norms)), where=norms > 0)


def _weigh(counts: csr_array, weights: np.ndarray) -> csr_array:
    return csr_array((counts.data * weights[counts.indices], counts.indices, counts.indptr), shape=counts.shape)


def _norms(vectors: csr_array) -> np.ndarray:
    return np.sqrt(np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel())


def all_alike(references: Sequence[str]) -> bool:
    """Return whether all references consist of the same words, as CIDEr splits them."""
    first = cider_tokens(references[0])
    return all(reference == references[0] or cider_tokens(reference) == first for reference in references)
