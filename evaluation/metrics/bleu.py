"""BLEU-1 to BLEU-4, equal to sacrebleu without smoothing."""

from collections.abc import Sequence

import numpy as np

from samf.evaluation.metrics.ngrams import ORDERS, check_pairs, count_ngrams, shared_count, tokenize_13a
from samf.evaluation.metrics.sampled_metric import divide


def _bleu_counts(prediction: str, reference: str) -> list[int]:
    """Return words of prediction and reference, shared n-grams of order 1 … 4, the prediction's n-grams of order 1 … 4."""
    words, expected = (tokenize_13a(text.rstrip()).split() for text in (prediction, reference))
    shared = [shared_count(count_ngrams(words, n), count_ngrams(expected, n)) for n in ORDERS]
    return [len(words), len(expected), *shared, *(max(0, len(words) - n + 1) for n in ORDERS)]


def bleu_samples(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return each pair's counts, (N, 10): their sums over any of the pairs give BLEU of any order (`combine_bleu`)."""
    pairs = zip(predictions, references, strict=True)
    return np.array([_bleu_counts(*pair) for pair in pairs], dtype=np.float64).reshape(-1, 10)


def combine_bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """Return BLEU with n-grams up to `order`, without smoothing, from summed counts (…, 10)."""
    words, expected = sums[..., 0], sums[..., 1]
    precisions = divide(sums[..., 2 : 2 + order], sums[..., 6 : 6 + order], otherwise=0.0)
    with np.errstate(divide="ignore"):
        mean = np.exp(np.log(precisions).mean(axis=-1))
        brevity = np.where(words < expected, np.exp(1 - divide(expected, words, otherwise=np.inf)), 1.0)
    return brevity * mean


def corpus_bleu(predictions: Sequence[str], references: Sequence[str], order: int) -> float:
    """Return BLEU over the whole corpus, in [0, 1].

    Args:
        predictions: generated texts, (N,).
        references: one reference text for each.
        order: longest n-grams that are counted.

    Raises:
        ValueError: no pairs, or unequal numbers.
    """
    check_pairs(predictions, references)
    return float(combine_bleu(bleu_samples(predictions, references).sum(axis=0), order))
