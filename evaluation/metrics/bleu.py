"""BLEU-1 to BLEU-4, equal to sacrebleu without smoothing."""

from collections.abc import Sequence

import numpy as np

from samf.evaluation.metrics.ngrams import ORDERS, shared_counts
from samf.evaluation.metrics.sampled_metric import divide
from samf.evaluation.metrics.text_tables import text_tables


def bleu_samples(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return each pair's counts, (N, 10): their sums over any of the pairs give BLEU of any order (`combine_bleu`).

    They are the words of prediction and reference, the shared n-grams of order 1 … 4 and the prediction's n-grams of
    order 1 … 4.
    """
    tables, predicted, expected = text_tables(predictions, references)
    tokens = tables.tokens("13a")
    words = tokens.lengths[predicted]
    shared = [shared_counts(ngrams, predicted, expected) for ngrams in tokens.ngrams]
    columns = [words, tokens.lengths[expected], *shared, *(np.maximum(words - n + 1, 0) for n in ORDERS)]
    return np.stack(columns, axis=-1).astype(np.float64)


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
    return float(combine_bleu(bleu_samples(predictions, references).sum(axis=0), order))
