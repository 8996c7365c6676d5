"""ROUGE-1, ROUGE-2 and ROUGE-L (F-measures), equal to rouge-score without stemming."""

from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

from samf.evaluation.metrics.ngrams import shared_counts
from samf.evaluation.metrics.text_tables import text_tables


def _f_measures(shared: np.ndarray, predicted: np.ndarray, expected: np.ndarray) -> list[float]:
    precision, recall = shared / np.maximum(predicted, 1), shared / np.maximum(expected, 1)
    both = precision + recall
    return np.divide(2 * precision * recall, both, out=np.zeros(len(both)), where=shared > 0).tolist()


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Return the F-measures of each pair: rouge_1, rouge_2 (n-grams), rouge_l (longest common subsequence)."""
    tables, predicted, expected = text_tables(predictions, references)
    tokens = tables.tokens("rouge")
    words, expected_words = tokens.lengths[predicted], tokens.lengths[expected]
    scores = {}
    for n in (1, 2):
        shared = shared_counts(tokens.ngrams[n - 1], predicted, expected)
        scores[f"rouge_{n}"] = _f_measures(shared, words - n + 1, expected_words - n + 1)
    pairs = zip(predicted.tolist(), expected.tolist(), strict=True)
    longest = np.array([LCSseq.similarity(tokens.of(first), tokens.of(second)) for first, second in pairs])
    return scores | {"rouge_l": _f_measures(longest, words, expected_words)}
