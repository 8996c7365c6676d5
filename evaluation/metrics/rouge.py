"""ROUGE-1, ROUGE-2 and ROUGE-L (F-measures), equal to rouge-score without stemming."""

from collections import defaultdict
from collections.abc import Sequence

from rouge_score.tokenize import tokenize as rouge_tokenize

from samf.evaluation.metrics.ngrams import check_pairs, count_ngrams, shared_count


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    A row of the dynamic programme's table is the bits of one integer, so that it costs a few machine operations: a bit is 0
    where the subsequence grows at that place of `first`; the addition carries the growth along.
    """
    places: defaultdict[str, int] = defaultdict(int)
    for place, word in enumerate(first):
        places[word] |= 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def _f_measure(shared: int, predicted: int, expected: int) -> float:
    precision, recall = shared / max(predicted, 1), shared / max(expected, 1)
    return 2 * precision * recall / (precision + recall) if shared else 0.0


def _rouge_of_pair(prediction: str, reference: str) -> list[float]:
    words, expected = rouge_tokenize(prediction, None), rouge_tokenize(reference, None)
    scores = []
    for n in (1, 2):
        shared = shared_count(count_ngrams(words, n), count_ngrams(expected, n))
        scores.append(_f_measure(shared, len(words) - n + 1, len(expected) - n + 1))
    return [*scores, _f_measure(longest_common_subsequence(expected, words), len(words), len(expected))]


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Return the F-measures of each pair: rouge_1, rouge_2 (n-grams), rouge_l (longest common subsequence)."""
    check_pairs(predictions, references)
    scores = [_rouge_of_pair(*pair) for pair in zip(predictions, references, strict=True)]
    return {name: [row[k] for row in scores] for k, name in enumerate(("rouge_1", "rouge_2", "rouge_l"))}
