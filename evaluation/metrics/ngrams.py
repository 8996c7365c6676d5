"""N-grams of tokenised texts, as BLEU, ROUGE and CIDEr count them."""

from collections import Counter
from collections.abc import Sequence

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

ORDERS = (1, 2, 3, 4)
tokenize_13a = Tokenizer13a().__call__


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raise ValueError unless there are as many predictions as references, and at least one."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one for each.")
    if not predictions:
        raise ValueError("There are no predictions to score; give at least one prediction and its reference.")


def count_ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """Count each run of `order` tokens."""
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def shared_count(first: Counter, second: Counter) -> int:
    """Return the size of the intersection of two multisets."""
    small, large = (first, second) if len(first) <= len(second) else (second, first)
    return sum(min(count, large[key]) for key, count in small.items() if key in large)
