"""N-grams of tokenised texts, as BLEU, ROUGE and CIDEr count them."""

from collections.abc import Sequence

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from scipy.sparse import csr_array

ORDERS = (1, 2, 3, 4)
tokenize_13a = Tokenizer13a().__call__


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raise ValueError unless there are as many predictions as references, and at least one."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one for each.")
    if not predictions:
        raise ValueError("There are no predictions to score; give at least one prediction and its reference.")


def shared_counts(ngrams: csr_array, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the number of n-grams that pairs of texts share, (N,).

    Args:
        ngrams: counts of n-grams by text, (D, G).
        first: row of each pair's first text, (N,).
        second: row of its second text.
    """
    return np.asarray(ngrams[first].minimum(ngrams[second]).sum(axis=1)).ravel()
