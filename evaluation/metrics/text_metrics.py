"""Text metrics of generated reports: equal to the reference libraries, and fast enough for thousands of pairs.

| metric | equal to | text before it | over a corpus |
|---|---|---|---|
| BLEU-1 … BLEU-4 | sacrebleu, no smoothing | tokenised "13a" (as `evaluate`'s bleu), case kept | n-gram counts pooled |
| mean BLEU-1 … mean BLEU-4 | `evaluate`'s bleu, one pair at a time | the same | mean of the samples |
| METEOR | nltk, with WordNet | words and runs of punctuation, lower case | mean of the samples |
| ROUGE-1, ROUGE-2, ROUGE-L (F) | rouge-score, without stemming | its own: lower case, a to z and digits | mean of the samples |
| CIDEr (0 to 10) | pycocoevalcap's Cider | 13a in lower case, punctuation dropped | mean; idf of the corpus' references |
| BERTScore P, R, F1 | bert-score, no baseline rescaling | the named model's tokenizer, 512 tokens | mean of the samples |

All but CIDEr are in [0, 1]. The reference implementation scores one pair at a time with `evaluate`: its BLEU is the mean
BLEU here. Its METEOR splits words with nltk's punkt model, which has to be downloaded; ours needs only WordNet.

An empty prediction scores 0 in every per-sample metric and stays in the mean; its missing words count against BLEU. A pair
with an empty reference scores 0. Nothing is downloaded except the BERTScore model that the caller names.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypedDict, Unpack

from samf.evaluation.metrics.bertscore import BERTSCORE_NAMES, BERTSCORE_REMEDY, bertscore, check_bertscore
from samf.evaluation.metrics.bleu import bleu_samples, combine_bleu, corpus_bleu
from samf.evaluation.metrics.cider import CIDER_IDENTICAL, CIDER_REMEDY, all_alike, cider
from samf.evaluation.metrics.meteor import WORDNET_REMEDY, meteor
from samf.evaluation.metrics.ngrams import ORDERS, check_pairs
from samf.evaluation.metrics.rouge import rouge
from samf.evaluation.metrics.sampled_metric import SampledMetric
from samf.evaluation.schema import TextSummary

__all__ = [
    "BERTSCORE_NAMES",
    "ORDERS",
    "TEXT_METRICS",
    "WORDNET_REMEDY",
    "BertScoreOptions",
    "bertscore",
    "bertscore_samples",
    "bleu_samples",
    "check_bertscore",
    "check_pairs",
    "cider",
    "combine_bleu",
    "corpus_bleu",
    "describe_text",
    "meteor",
    "rouge",
    "text_metrics",
    "text_samples",
]

_BOUNDS = {"cider": (0.0, 10.0), **dict.fromkeys(BERTSCORE_NAMES, (-1.0, 1.0))}  # all others: 0 and 1
_REMEDIES = {"meteor": WORDNET_REMEDY, "cider": CIDER_REMEDY, **dict.fromkeys(BERTSCORE_NAMES, BERTSCORE_REMEDY)}
TEXT_METRICS = (
    *(f"bleu_{n}" for n in ORDERS),
    *(f"mean_bleu_{n}" for n in ORDERS),
    *("meteor", "rouge_1", "rouge_2", "rouge_l", "cider"),
    *BERTSCORE_NAMES,
)


class BertScoreOptions(TypedDict, total=False):
    """Options of `text_samples` that concern BERTScore."""

    bertscore_model: str | None
    bertscore_layers: int | None
    device: str | None


def text_samples(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
    device: str | None = None,
) -> dict[str, SampledMetric]:
    """Return every text metric that can be computed here by sample, for intervals and tests.

    METEOR is left out without WordNet, CIDEr for a single pair, and BERTScore without `bertscore_model`.

    Args:
        predictions: generated texts, (N,).
        references: one reference text for each.
        bertscore_model: Hub id or folder of BERTScore's model.
        bertscore_layers: its layer, where bert-score doesn't know it.
        device: of BERTScore's model.

    Returns:
        Name, of `TEXT_METRICS`, → metric.

    Raises:
        ImportError: BERTScore is asked for and bert-score isn't installed.
        ValueError: no or unequal pairs.
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
    return samples | bertscore_samples(
        predictions,
        references,
        bertscore_model=bertscore_model,
        bertscore_layers=bertscore_layers,
        device=device,
    )


def bertscore_samples(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    bertscore_model: str,
    bertscore_layers: int | None = None,
    device: str | None = None,
) -> dict[str, SampledMetric]:
    """Return BERTScore's three metrics by sample.

    Args:
        predictions: generated texts, (N,).
        references: one reference text for each.
        bertscore_model: Hub id or folder.
        bertscore_layers: layer whose embeddings are compared, where bert-score doesn't know it.
        device: of the model.

    Raises:
        ImportError: bert-score isn't installed.
        ValueError: no or unequal pairs, or an unknown model without `bertscore_layers`.
    """
    values = bertscore(predictions, references, bertscore_model, num_layers=bertscore_layers, device=device)
    return {name: _mean(name, v) for name, v in values.items()}


def _mean(name: str, values: Sequence[float]) -> SampledMetric:
    return SampledMetric.mean(list(values), _BOUNDS.get(name, (0.0, 1.0)))


def text_metrics(
    predictions: Sequence[str], references: Sequence[str], **options: Unpack[BertScoreOptions]
) -> TextSummary:
    """Compute all text metrics of a corpus.

    Args:
        predictions: generated texts, (N,).
        references: one reference text for each.
        options: see `text_samples`.

    Raises:
        ValueError: no or unequal pairs.
    """
    return describe_text(predictions, references, text_samples(predictions, references, **options))


def describe_text(
    predictions: Sequence[str], references: Sequence[str], samples: Mapping[str, SampledMetric]
) -> TextSummary:
    """Return what `text_metrics` returns, from computed samples.

    Args:
        predictions: generated texts, (N,).
        references: one reference text for each.
        samples: what `text_samples` returned for them.
    """
    scores = {name: samples[name].value() if name in samples else None for name in TEXT_METRICS}
    return {
        "count": len(predictions),
        "empty_predictions": sum(not prediction.strip() for prediction in predictions),
        "empty_references": sum(not reference.strip() for reference in references),
        "scores": scores,
        "not_available": {name: _REMEDIES[name] for name in TEXT_METRICS if name not in samples},
        "notes": {"cider": CIDER_IDENTICAL} if scores["cider"] == 0 and all_alike(references) else {},
    }
