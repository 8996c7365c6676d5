"""BERTScore, by the library bert-score without baseline rescaling."""

from collections.abc import Sequence
from importlib.util import find_spec

from samf.evaluation.metrics.ngrams import check_pairs

BERTSCORE_REMEDY = "BERTScore is computed when a model is named (bertscore_model, e.g. roberta-large)."
BERTSCORE_TOKENS = 512
BERTSCORE_NAMES = ("bertscore_p", "bertscore_r", "bertscore_f1")


def check_bertscore(model: str, num_layers: int | None = None) -> None:
    """Check that BERTScore can be computed.

    Raises:
        ImportError: bert-score isn't installed.
        ValueError: `model` is unknown to bert-score and `num_layers` isn't given, or `num_layers` is below 1.
    """
    if find_spec("bert_score") is None:
        raise ImportError("BERTScore needs the library bert-score: pip install bert-score.")
    from bert_score.utils import model2layers  # imports torch

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
    """Return BERTScore precision, recall and F1 of each pair.

    Args:
        predictions: generated texts, (N,).
        references: one reference text for each.
        model: Hub id or folder.
        num_layers: layer whose embeddings are compared, counted from 1; known to bert-score for the models it was tuned on.
        batch_size: texts per forward pass.
        device: default: bert-score's choice.

    Returns:
        bertscore_p, bertscore_r, bertscore_f1 → one value per pair; 0 where a text is empty.

    Raises:
        ImportError: bert-score isn't installed.
        ValueError: no or unequal pairs, or an unknown `model` without `num_layers`.
    """
    check_pairs(predictions, references)
    check_bertscore(model, num_layers)
    from bert_score import BERTScorer

    # bert-score fails on empty strings.
    filled = [i for i, pair in enumerate(zip(predictions, references, strict=True)) if all(s.strip() for s in pair)]
    scores = {name: [0.0] * len(predictions) for name in BERTSCORE_NAMES}
    if filled:
        scorer = BERTScorer(model_type=model, num_layers=num_layers, batch_size=batch_size, device=device)
        # A tokenizer without a maximum length reports 1e30, which overflows in the Rust tokenizer.
        scorer._tokenizer.model_max_length = BERTSCORE_TOKENS
        columns = scorer.score([predictions[i] for i in filled], [references[i] for i in filled])
        for name, values in zip(BERTSCORE_NAMES, columns, strict=True):
            for position, value in zip(filled, values.tolist(), strict=True):
                scores[name][position] = value
    return scores
