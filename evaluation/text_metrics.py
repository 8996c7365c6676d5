"""Text metrics of generated reports, each computed by its reference library. All values lie in [0, 1].

| metric | library | text before it | over a corpus |
|---|---|---|---|
| BLEU-1, BLEU-4 | sacrebleu, no smoothing | tokenised "13a" (as `evaluate`'s bleu), case kept | n-gram counts pooled |
| METEOR | nltk, with WordNet | words and runs of punctuation, lower case | mean of the samples |
| ROUGE-L (F) | rouge-score, without stemming | its own: lower case, letters and digits | mean of the samples |
| BERTScore F1 | bert-score, no baseline rescaling | the named model's tokenizer, 512 tokens | mean of the samples |

An empty prediction scores 0 in every metric of samples and stays in the mean; its missing words count against BLEU.
Nothing is downloaded but the BERTScore model that a caller names.
"""

import logging
from collections.abc import Sequence
from typing import Any

from nltk.corpus import wordnet
from nltk.tokenize import wordpunct_tokenize
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

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
BERTSCORE_REMEDY = "BERTScore F1 is computed when a model is named (bertscore_model, e.g. roberta-large)."
BERTSCORE_TOKENS = 512


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raise ValueError unless there are as many predictions as references, and at least one."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one for each.")
    if not predictions:
        raise ValueError("There are no predictions to score; give at least one prediction and its reference.")


def corpus_bleu(predictions: Sequence[str], references: Sequence[str], order: int) -> float:
    """BLEU over the whole corpus with n-grams up to `order`, in [0, 1]."""
    check_pairs(predictions, references)
    bleu = BLEU(max_ngram_order=order, tokenize="13a", smooth_method="none")
    return bleu.corpus_score(list(predictions), [list(references)]).score / 100


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F-measure of each pair."""
    check_pairs(predictions, references)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(references, predictions, strict=True)
    return [float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference, prediction in pairs]


def wordnet_available() -> bool:
    """Whether nltk finds WordNet on this machine; never downloads."""
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return False
    return True


def meteor(predictions: Sequence[str], references: Sequence[str]) -> list[float] | None:
    """METEOR of each pair, or None where WordNet is absent (`WORDNET_REMEDY` says what to do)."""
    check_pairs(predictions, references)
    if not wordnet_available():
        return None
    pairs = zip(references, predictions, strict=True)
    return [_meteor_of_pair(wordpunct_tokenize(reference), wordpunct_tokenize(text)) for reference, text in pairs]


def _meteor_of_pair(reference: list[str], prediction: list[str]) -> float:
    return float(single_meteor_score(reference, prediction)) if reference and prediction else 0.0


def bertscore_f1(
    predictions: Sequence[str],
    references: Sequence[str],
    model: str,
    *,
    num_layers: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
) -> list[float]:
    """BERTScore F1 of each pair by `model` (a Hub id or a folder).

    `num_layers` is the layer whose embeddings are compared; bert-score knows it for the models it was tuned on.
    Raises ImportError without bert-score and ValueError for an unknown model without `num_layers`.
    """
    check_pairs(predictions, references)
    if BERTScorer is None:
        raise ImportError("BERTScore needs the library bert-score: pip install bert-score.")
    if num_layers is None and model not in model2layers:
        raise ValueError(f"bert-score has no layer on record for {model!r}; name one (bertscore_layers, e.g. 9 of 12).")
    # bert-score fails on an empty string, so such pairs never reach it.
    filled = [i for i, pair in enumerate(zip(predictions, references, strict=True)) if all(s.strip() for s in pair)]
    scores = [0.0] * len(predictions)
    if filled:
        scorer = BERTScorer(model_type=model, num_layers=num_layers, batch_size=batch_size, device=device)
        # A tokenizer without a length of its own says 1e30, which overflows in the Rust tokenizer.
        scorer._tokenizer.model_max_length = BERTSCORE_TOKENS
        _, _, f1 = scorer.score([predictions[i] for i in filled], [references[i] for i in filled])
        for position, value in zip(filled, f1.tolist(), strict=True):
            scores[position] = value
    return scores


def text_metrics(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """All text metrics of a corpus.

    Returns `count`, `empty_predictions`, `scores` (bleu_1, bleu_4, meteor, rouge_l, bertscore_f1: floats, or None where
    not available) and `not_available` (metric → why, and what to do). Raises ValueError for no or unequal pairs.
    """
    check_pairs(predictions, references)
    samples = {"meteor": meteor(predictions, references), "rouge_l": rouge_l(predictions, references)}
    samples["bertscore_f1"] = None
    if bertscore_model is not None:
        samples["bertscore_f1"] = bertscore_f1(
            predictions, references, bertscore_model, num_layers=bertscore_layers, device=device
        )
    scores = {f"bleu_{order}": corpus_bleu(predictions, references, order) for order in (1, 4)}
    scores |= {name: None if values is None else sum(values) / len(values) for name, values in samples.items()}
    remedies = {"meteor": WORDNET_REMEDY, "bertscore_f1": BERTSCORE_REMEDY}
    return {
        "count": len(predictions),
        "empty_predictions": sum(not prediction.strip() for prediction in predictions),
        "scores": scores,
        "not_available": {name: remedies[name] for name, value in scores.items() if value is None},
    }
