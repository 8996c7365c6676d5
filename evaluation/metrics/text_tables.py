"""Texts as arrays of token numbers, tokenised once for all metrics and all systems that are scored against them.

Every tokeniser here looks at most one character beyond a blank, so that a report is split at blanks and each distinct
piece is tokenised once: 1.6 million pieces of 6,000 reports are some 12,000 distinct ones.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from nltk.tokenize import wordpunct_tokenize
from rouge_score.tokenize import tokenize as rouge_tokenize
from scipy.sparse import csr_array

from samf.evaluation.metrics.ngrams import ORDERS, check_pairs, tokenize_13a

Tokenisation = Literal["13a", "cider", "rouge", "meteor"]
_HAS_WORD = re.compile(r"\w")
# A text that holds one of these is a single piece: the 13a tokeniser removes the first two, blanks included, and the
# others are blanks to `str.split` but not to METEOR's tokeniser.
_WHOLE = ("-\n", "<skipped>", "\x1c", "\x1d", "\x1e", "\x1f")


def cider_tokens(text: str) -> list[str]:
    """Split a text into words: lower case, punctuation dropped, like COCO's tokenizer, which needs Java."""
    return [token for token in tokenize_13a(text.rstrip()).lower().split() if _HAS_WORD.search(token)]


_TOKENISERS: dict[Tokenisation, Callable[[str], Iterable[str]]] = {
    "13a": lambda text: tokenize_13a(text.rstrip()).split(),
    "cider": cider_tokens,
    "rouge": lambda text: rouge_tokenize(text, None),
    "meteor": lambda text: [word.lower() for word in wordpunct_tokenize(text)],
}
_ROUGE_ORDERS = (1, 2)


def ragged(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the indices of several ranges, one after the other; the k-th is `lengths[k]` long and begins at `starts[k]`."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


@dataclass(frozen=True)
class Tokens:
    """Tokens of D texts.

    Attributes:
        numbers: the tokens of all texts, one text after the other, (T,); equal tokens have equal numbers.
        offsets: where each text begins in `numbers`, and its end, (D + 1,).
        vocabulary: token of each number.
        orders: the orders of n-grams that are counted.
    """

    numbers: np.ndarray
    offsets: np.ndarray
    vocabulary: list[str]
    orders: Sequence[int] = ORDERS

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text, (D,)."""
        return np.diff(self.offsets)

    def of(self, row: int) -> list[int]:
        """Return the numbers of one text."""
        return self.numbers[self.offsets[row] : self.offsets[row + 1]].tolist()

    @cached_property
    def ngrams(self) -> list[csr_array]:
        """How often each text contains each n-gram, (D, G) for each of `orders`."""
        rows = np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)
        places = np.arange(len(rows), dtype=np.int32)
        left = (self.offsets[1:][rows] - places).astype(np.int32)  # tokens to the end of the text
        names, count = self.numbers, len(self.vocabulary)
        matrices = []
        for order in self.orders:
            if order > 1:
                goes_on = left[places] >= order
                places = places[goes_on]
                codes = names[goes_on].astype(np.int64) * len(self.vocabulary) + self.numbers[places + order - 1]
                distinct, inverse = np.unique(codes, return_inverse=True)
                names, count = inverse.astype(np.int32), len(distinct)
            matrices.append(_count(rows[places], names, (len(self.lengths), count)))
        return matrices


def _count(rows: np.ndarray, names: np.ndarray, shape: tuple[int, int]) -> csr_array:
    """Return how often each name occurs in each row, with ascending names in a row."""
    codes = np.sort(rows * np.int64(max(shape[1], 1)) + names)
    first = np.flatnonzero(np.diff(codes, prepend=-1))
    counts = np.diff(first, append=len(codes))
    row, name = np.divmod(codes[first], max(shape[1], 1))
    ends = np.searchsorted(row, np.arange(shape[0] + 1))
    return csr_array((counts.astype(np.int32), name.astype(np.int32), ends.astype(np.int32)), shape=shape)


class TextTables:
    """Tokens and n-gram counts of distinct texts.

    Args:
        texts: the texts; repeated ones are kept once.
    """

    def __init__(self, texts: Iterable[str]):
        self._rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        self._pieces: dict[str, int] = {}
        pieces = [self._split(text) for text in self._rows]
        self._ends = np.cumsum([0, *map(len, pieces)])
        self._text_pieces = np.concatenate([np.zeros(0, np.int32), *pieces])
        self._tokens: dict[Tokenisation, Tokens] = {}

    def _split(self, text: str) -> np.ndarray:
        """Return the numbers of a text's pieces; new pieces get the next numbers."""
        pieces = [text] if any(mark in text for mark in _WHOLE) else text.split()
        known = self._pieces
        return np.array([known.setdefault(piece, len(known)) for piece in pieces], dtype=np.int32)

    def holds(self, texts: Iterable[str]) -> bool:
        """Return whether all of `texts` are in these tables."""
        return all(text in self._rows for text in texts)

    def rows(self, texts: Iterable[str]) -> np.ndarray:
        """Return the row of each text."""
        return np.array([self._rows[text] for text in texts], dtype=np.int64)

    def tokens(self, name: Tokenisation) -> Tokens:
        """Return the tokens of every text by one tokenisation."""
        if name not in self._tokens:
            orders = _ROUGE_ORDERS if name == "rouge" else ORDERS
            self._tokens[name] = self._tokenise(_TOKENISERS[name], orders)
        return self._tokens[name]

    def _tokenise(self, tokenise: Callable[[str], Iterable[str]], orders: Sequence[int]) -> Tokens:
        known: dict[str, int] = {}
        split = [[known.setdefault(token, len(known)) for token in tokenise(piece)] for piece in self._pieces]
        lengths = np.array([len(tokens) for tokens in split], dtype=np.int64)
        flat = np.array([number for tokens in split for number in tokens], dtype=np.int32)
        starts = np.cumsum(lengths) - lengths
        counts = lengths[self._text_pieces]
        numbers = flat[ragged(starts[self._text_pieces], counts)]
        return Tokens(numbers, np.concatenate([[0], np.cumsum(counts)])[self._ends], list(known), orders)


_latest: list[TextTables] = []  # one at most: a system and its baselines have the same texts


def text_tables(predictions: Sequence[str], references: Sequence[str]) -> tuple[TextTables, np.ndarray, np.ndarray]:
    """Return tables that hold these pairs, and the rows of predictions and references, (N,) each.

    The latest tables are used again if they hold all the texts, as those of a system hold its baselines'.

    Raises:
        ValueError: no pairs, or unequal numbers.
    """
    check_pairs(predictions, references)
    if not (_latest and _latest[0].holds(predictions) and _latest[0].holds(references)):
        _latest[:] = [TextTables([*predictions, *references])]
    tables = _latest[0]
    return tables, tables.rows(predictions), tables.rows(references)


def forget_tables() -> None:
    """Free the latest tables."""
    _latest.clear()
