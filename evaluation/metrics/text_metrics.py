"""Text metrics of generated reports: the figures of the reference libraries, computed fast enough for thousands of pairs.

| metric | equal to | text before it | over a corpus |
|---|---|---|---|
| BLEU-1 … BLEU-4 | sacrebleu, no smoothing | tokenised "13a" (as `evaluate`'s bleu), case kept | n-gram counts pooled |
| mean BLEU-1 … mean BLEU-4 | `evaluate`'s bleu, one pair at a time | the same | mean of the samples |
| METEOR | nltk, with WordNet | words and runs of punctuation, lower case | mean of the samples |
| ROUGE-1, ROUGE-2, ROUGE-L (F) | rouge-score, without stemming | its own: lower case, a to z and digits | mean of the samples |
| CIDEr (0 to 10) | pycocoevalcap's Cider | 13a in lower case, punctuation dropped | mean; idf of the corpus' references |
| BERTScore P, R, F1 | bert-score, no baseline rescaling | the named model's tokenizer, 512 tokens | mean of the samples |

All but CIDEr lie in [0, 1]. The published SAMF code scores one pair at a time with `evaluate`: its BLEU is the mean BLEU
here. Its METEOR splits words with nltk's punkt model, whose data has to be downloaded; ours needs WordNet alone.

An empty prediction scores 0 in every metric of samples and stays in the mean; its missing words count against BLEU. A pair
with an empty reference scores 0. Nothing is downloaded but the BERTScore model that a caller names.
"""

import logging
import math
import re
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from nltk.corpus import wordnet
from nltk.stem.porter import PorterStemmer
from nltk.tokenize import wordpunct_tokenize
from rouge_score.tokenize import tokenize as rouge_tokenize
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from samf.evaluation.metrics.sampled_metric import SampledMetric, divide

try:
    from bert_score import BERTScorer
    from bert_score.utils import model2layers
except ImportError:
    BERTScorer, model2layers = None, {}

logger = logging.getLogger(__name__)

WORDNET_REMEDY = (
    "METEOR needs WordNet, which nltk does not find. Run `python -m nltk.downloader wordnet` once, or put wordnet.zip "
    "at $NLTK_DATA/corpora/wordnet.zip (a copy, not a link)."
)
BERTSCORE_REMEDY = "BERTScore is computed when a model is named (bertscore_model, e.g. roberta-large)."
CIDER_REMEDY = "CIDEr weighs n-grams by how rare they are among the references, and needs at least two of them."
CIDER_IDENTICAL = (
    "0 because all references are the same words: an n-gram that every reference has weighs log(N / N) = 0, so that even a "
    "perfect prediction scores 0."
)
BERTSCORE_TOKENS = 512
ORDERS = (1, 2, 3, 4)
BERTSCORE_NAMES = ("bertscore_p", "bertscore_r", "bertscore_f1")

_BOUNDS = {"cider": (0.0, 10.0), **dict.fromkeys(BERTSCORE_NAMES, (-1.0, 1.0))}  # of the others: 0 and 1
_NEEDS = {"meteor": WORDNET_REMEDY, "cider": CIDER_REMEDY, **dict.fromkeys(BERTSCORE_NAMES, BERTSCORE_REMEDY)}
TEXT_METRICS = (
    *(f"bleu_{n}" for n in ORDERS),
    *(f"mean_bleu_{n}" for n in ORDERS),
    *("meteor", "rouge_1", "rouge_2", "rouge_l", "cider"),
    *BERTSCORE_NAMES,
)


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raise ValueError unless there are as many predictions as references, and at least one."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one for each.")
    if not predictions:
        raise ValueError("There are no predictions to score; give at least one prediction and its reference.")


def count_ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """How often each run of `order` tokens occurs."""
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def _shared(first: Counter, second: Counter) -> int:
    """Size of the intersection of two multisets."""
    small, large = (first, second) if len(first) <= len(second) else (second, first)
    return sum(min(count, large[key]) for key, count in small.items() if key in large)


# --- BLEU -------------------------------------------------------------------------------------------------------

_tokenize_13a = Tokenizer13a().__call__


def _bleu_counts(prediction: str, reference: str) -> list[int]:
    """Words of prediction and reference; shared n-grams of order 1 … 4; the prediction's n-grams of order 1 … 4."""
    words, expected = (_tokenize_13a(text.rstrip()).split() for text in (prediction, reference))
    shared = [_shared(count_ngrams(words, n), count_ngrams(expected, n)) for n in ORDERS]
    return [len(words), len(expected), *shared, *(max(0, len(words) - n + 1) for n in ORDERS)]


def bleu_samples(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Each pair's counts (N, 10), of which BLEU of any order over any of the pairs is made."""
    pairs = zip(predictions, references, strict=True)
    return np.array([_bleu_counts(*pair) for pair in pairs], dtype=np.float64).reshape(-1, 10)


def combine_bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """BLEU with n-grams up to `order`, without smoothing, from summed counts (…, 10)."""
    words, expected = sums[..., 0], sums[..., 1]
    precisions = divide(sums[..., 2 : 2 + order], sums[..., 6 : 6 + order], otherwise=0.0)
    with np.errstate(divide="ignore"):
        mean = np.exp(np.log(precisions).mean(axis=-1))
        brevity = np.where(words < expected, np.exp(1 - divide(expected, words, otherwise=np.inf)), 1.0)
    return brevity * mean


def corpus_bleu(predictions: Sequence[str], references: Sequence[str], order: int) -> float:
    """BLEU over the whole corpus with n-grams up to `order`, in [0, 1]."""
    check_pairs(predictions, references)
    return float(combine_bleu(bleu_samples(predictions, references).sum(axis=0), order))


# --- ROUGE ------------------------------------------------------------------------------------------------------


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length. The table's rows are bits of one integer, so that a row costs a few machine operations.

    A bit of `row` is 0 where the subsequence grows at that place of `first`; adding carries the growth along.
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
        shared = _shared(count_ngrams(words, n), count_ngrams(expected, n))
        scores.append(_f_measure(shared, len(words) - n + 1, len(expected) - n + 1))
    return [*scores, _f_measure(longest_common_subsequence(expected, words), len(words), len(expected))]


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F-measures of each pair: rouge_1, rouge_2 (n-grams), rouge_l (longest common subsequence)."""
    check_pairs(predictions, references)
    scores = [_rouge_of_pair(*pair) for pair in zip(predictions, references, strict=True)]
    return {name: [row[k] for row in scores] for k, name in enumerate(("rouge_1", "rouge_2", "rouge_l"))}


# --- METEOR -----------------------------------------------------------------------------------------------------

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5
_stemmer = PorterStemmer()


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return _stemmer.stem(word)


@lru_cache(maxsize=1 << 16)
def _synonyms(word: str) -> frozenset[str]:
    """The word and WordNet's lemmas of one word that share a sense with it."""
    names = (lemma.name() for synset in wordnet.synsets(word) for lemma in synset.lemmas())
    return frozenset(name for name in names if "_" not in name) | {word}


def wordnet_available() -> bool:
    """Whether nltk finds WordNet on this machine; never downloads."""
    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError, zipfile.BadZipFile):  # absent, or cut off while it was copied
        return False
    return True


def meteor(predictions: Sequence[str], references: Sequence[str]) -> list[float] | None:
    """METEOR of each pair, or None where WordNet is absent (`WORDNET_REMEDY` says what to do)."""
    check_pairs(predictions, references)
    if not wordnet_available():
        return None
    pairs = zip(references, predictions, strict=True)
    return [_meteor_of_pair(_meteor_words(reference), _meteor_words(text)) for reference, text in pairs]


@lru_cache(maxsize=1 << 13)  # references come again with every baseline
def _meteor_words(text: str) -> tuple[str, ...]:
    return tuple(sys.intern(word.lower()) for word in wordpunct_tokenize(text))


def _meteor_of_pair(reference: Sequence[str], prediction: Sequence[str]) -> float:
    """Matches by word, then by stem, then by synonym of the stem; fewer chunks of adjacent matches score higher."""
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
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    steps = zip(matches, matches[1:], strict=False)
    chunks = 1 + sum((b[0] - a[0], b[1] - a[1]) != (1, 1) for a, b in steps)
    return (1 - GAMMA * (chunks / len(matches)) ** BETA) * mean


_Words = list[tuple[int, str]]


def _places(expected: _Words) -> defaultdict[str, list[int]]:
    places = defaultdict(list)
    for place, word in expected:
        places[word].append(place)
    return places


def _match(words: _Words, expected: _Words, matches: list[tuple[int, int]]) -> tuple[_Words, _Words]:
    """Add matches of equal words, from the last word backwards, to `matches`; returns what is left of both."""
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
    """As `_match`, of a word with the last place in `expected` that holds any of its synonyms."""
    places = _places(expected)
    for place, word in reversed(words):
        candidates = [found for name in places.keys() & _synonyms(word) if (found := places[name])]
        if candidates:
            match = max(candidates, key=lambda found: found[-1])
            matches.append((place, match.pop()))


# --- CIDEr ------------------------------------------------------------------------------------------------------

SIGMA = 6.0
_HAS_WORD = re.compile(r"\w")


def cider_tokens(text: str) -> list[str]:
    """Words for CIDEr: lower case, punctuation marks dropped, as COCO's tokenizer does, which needs Java."""
    return [token for token in _tokenize_13a(text.rstrip()).lower().split() if _HAS_WORD.search(token)]


class _CiderReferences:
    """The references' n-grams by number, with their weights and each reference's vectors: 8 bytes for each n-gram."""

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
        """Number of words; for each order the n-grams' numbers, ascending, and how often each occurs."""
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
        """CIDEr of a prediction's words against the reference at `index`."""
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
        # The library's lengths are numbers of bigrams.
        difference = max(0, len(words) - 1) - max(0, length - 1)
        return 10 * similarity / len(ORDERS) * math.exp(-(difference**2) / (2 * SIGMA**2))


@lru_cache(maxsize=1)  # a system and its baselines are scored against the same references
def _cider_references(references: tuple[str, ...]) -> _CiderReferences:
    return _CiderReferences(references)


def cider(predictions: Sequence[str], references: Sequence[str]) -> list[float] | None:
    """CIDEr of each pair, 0 to 10; None for fewer than two pairs (`CIDER_REMEDY`).

    N-grams weigh by their inverse frequency among `references`, and a Gaussian of 6 words punishes a difference of
    length: 20 words more or fewer divide the score by 260.
    """
    check_pairs(predictions, references)
    if len(references) < 2:
        return None
    targets = _cider_references(tuple(references))
    return [targets.score(cider_tokens(text), index) for index, text in enumerate(predictions)]


# --- BERTScore --------------------------------------------------------------------------------------------------


def check_bertscore(model: str, num_layers: int | None = None) -> None:
    """Raise ImportError without bert-score, ValueError for an unknown model without `num_layers`, or for a layer below 1."""
    if BERTScorer is None:
        raise ImportError("BERTScore needs the library bert-score: pip install bert-score.")
    if num_layers is None and model not in model2layers:
        raise ValueError(f"bert-score has no layer on record for {model!r}; name one (bertscore_layers, e.g. 9 of 12).")
    if num_layers is not None and num_layers < 1:
        raise ValueError(f"bertscore_layers is {num_layers}; layers are counted from 1.")


def bertscore(
    predictions: Sequence[str],
    references: Sequence[str],
    model: str,
    *,
    num_layers: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
) -> dict[str, list[float]]:
    """BERTScore precision, recall and F1 of each pair by `model` (a Hub id or a folder).

    `num_layers` is the layer whose embeddings are compared; bert-score knows it for the models it was tuned on.
    Returns bertscore_p, bertscore_r, bertscore_f1 → one value a pair.
    Raises ImportError without bert-score and ValueError for an unknown model without `num_layers`.
    """
    check_pairs(predictions, references)
    check_bertscore(model, num_layers)
    # bert-score fails on an empty string, so such pairs never reach it.
    filled = [i for i, pair in enumerate(zip(predictions, references, strict=True)) if all(s.strip() for s in pair)]
    scores = {name: [0.0] * len(predictions) for name in BERTSCORE_NAMES}
    if filled:
        scorer = BERTScorer(model_type=model, num_layers=num_layers, batch_size=batch_size, device=device)
        # A tokenizer without a length of its own says 1e30, which overflows in the Rust tokenizer.
        scorer._tokenizer.model_max_length = BERTSCORE_TOKENS
        figures = scorer.score([predictions[i] for i in filled], [references[i] for i in filled])
        for name, values in zip(BERTSCORE_NAMES, figures, strict=True):
            for position, value in zip(filled, values.tolist(), strict=True):
                scores[name][position] = value
    return scores


# --- all of them ------------------------------------------------------------------------------------------------


def text_samples(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
    device: str | None = None,
) -> dict[str, SampledMetric]:
    """Every text metric that can be computed here, name → its figures by sample, for intervals and tests.

    Left out are METEOR without WordNet, CIDEr of a single pair, and BERTScore without `bertscore_model`.
    Raises ValueError for no or unequal pairs.
    """
    check_pairs(predictions, references)
    counts = bleu_samples(predictions, references)
    samples = {f"bleu_{n}": SampledMetric(counts, partial(combine_bleu, order=n)) for n in ORDERS}
    samples |= {f"mean_bleu_{n}": SampledMetric.mean(combine_bleu(counts, n)) for n in ORDERS}
    values: dict[str, Sequence[float] | None] = {"meteor": meteor(predictions, references)}
    values |= rouge(predictions, references)
    values["cider"] = cider(predictions, references)
    samples |= {name: _mean(name, v) for name, v in values.items() if v is not None}
    if bertscore_model is None:
        return samples
    options = {"bertscore_model": bertscore_model, "bertscore_layers": bertscore_layers, "device": device}
    return samples | bertscore_samples(predictions, references, **options)


def bertscore_samples(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    bertscore_model: str,
    bertscore_layers: int | None = None,
    device: str | None = None,
) -> dict[str, SampledMetric]:
    """BERTScore's figures by sample. Raises what `bertscore` raises."""
    values = bertscore(predictions, references, bertscore_model, num_layers=bertscore_layers, device=device)
    return {name: _mean(name, v) for name, v in values.items()}


def _mean(name: str, values: Sequence[float]) -> SampledMetric:
    return SampledMetric.mean(list(values), _BOUNDS.get(name, (0.0, 1.0)))


def text_metrics(predictions: Sequence[str], references: Sequence[str], **options: Any) -> dict[str, Any]:
    """All text metrics of a corpus; `options` as for `text_samples`.

    Returns `count`, `empty_predictions`, `empty_references`, `scores` (name → figure, None where not available),
    `not_available` (name → why, and what to do) and `notes` (name → what to heed). Raises ValueError for no or unequal pairs.
    """
    return describe_text(predictions, references, text_samples(predictions, references, **options))


def describe_text(
    predictions: Sequence[str], references: Sequence[str], samples: dict[str, SampledMetric]
) -> dict[str, Any]:
    """What `text_metrics` returns, of figures that `text_samples` has computed."""
    scores = {name: samples[name].value() if name in samples else None for name in TEXT_METRICS}
    return {
        "count": len(predictions),
        "empty_predictions": sum(not prediction.strip() for prediction in predictions),
        "empty_references": sum(not reference.strip() for reference in references),
        "scores": scores,
        "not_available": {name: _NEEDS[name] for name in TEXT_METRICS if name not in samples},
        "notes": {"cider": CIDER_IDENTICAL} if scores["cider"] == 0 and _all_alike(references) else {},
    }


def _all_alike(references: Sequence[str]) -> bool:
    """Whether all references are the same words to CIDEr."""
    first = cider_tokens(references[0])
    return all(reference == references[0] or cider_tokens(reference) == first for reference in references)
