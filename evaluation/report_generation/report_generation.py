"""Text and clinical metrics of generated chest-CT reports, as a module of the library `evaluate`.

    import evaluate
    metric = evaluate.load("path/to/evaluation/report_generation")
    metric.compute(predictions=["No nodule was detected."], references=["There is no nodule in the lungs."])

The file is self-contained, since `evaluate` copies it. With the package samf installed it is fast and also scores findings;
without it the reference libraries (sacrebleu, rouge-score, nltk, pycocoevalcap) compute the same text metrics.
"""

import re
from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
from nltk.corpus import wordnet
from nltk.tokenize import wordpunct_tokenize
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

try:
    from samf.evaluation.metrics.clinical_metrics import CRG_REMEDY, MACRO_REMEDY, MICRO_REMEDY, score_findings
    from samf.evaluation.metrics.text_metrics import text_metrics
except ImportError:
    CRG_REMEDY = MACRO_REMEDY = MICRO_REMEDY = score_findings = text_metrics = None

_DESCRIPTION = """\
Metrics of generated chest-CT reports: BLEU-1 to 4 (over the corpus, and as mean of the samples), METEOR, ROUGE-1, 2 and L,
CIDEr, BERTScore where a model is named, and with the package samf the F1 of CT-RATE's 18 findings and CRG.
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): generated reports.
    references (list of str): one reference report for each.
    bertscore_model (str, optional): Hub id or folder of the model for BERTScore, e.g. "roberta-large".
    bertscore_layers (int, optional): its layer, where bert-score doesn't know it.
    device (str, optional): for BERTScore, e.g. "cuda".
Returns:
    bleu_1 to bleu_4: n-gram counts pooled over the corpus; mean_bleu_1 to mean_bleu_4: mean of the samples.
    meteor, rouge_1, rouge_2, rouge_l (F-measures), cider (0 to 10), bertscore_p, bertscore_r, bertscore_f1: means.
    finding_macro_f1, finding_micro_f1, crg: of the findings that a rule-based labeller reads (needs samf).
    count, empty_predictions: numbers of pairs, and of empty predictions, which score 0.
    not_available: name -> why a metric is None, and the remedy. notes: name -> how to read it, e.g. why CIDEr is 0.
Examples:
    >>> metric = evaluate.load("evaluation/report_generation")
    >>> text = "Pleural effusion was not observed."
    >>> metric.compute(predictions=[text], references=[text])["rouge_l"]
    1.0
"""
_CITATION = """\
@inproceedings{samf2025,
    title = {From Slices to Volumes: Multi-Scale Fusion of 2D and 3D Features for CT Scan Report Generation},
    booktitle = {Medical Image Computing and Computer Assisted Intervention (MICCAI)},
    year = {2025}
}
"""

ORDERS = (1, 2, 3, 4)
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
BERTSCORE = ("bertscore_p", "bertscore_r", "bertscore_f1")
CLINICAL = ("finding_macro_f1", "finding_micro_f1", "crg")
REMEDIES = {
    "meteor": "METEOR needs WordNet: run `python -m nltk.downloader wordnet` once.",
    "cider": "CIDEr needs at least two references, and pip install pycocoevalcap.",
    **dict.fromkeys(BERTSCORE, "BERTScore is computed when a model is named: bertscore_model='roberta-large'."),
    **dict.fromkeys(CLINICAL, "Findings are read by the package samf; install it from its repository."),
}
BERTSCORE_TOKENS = 512


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ReportGeneration(evaluate.Metric):
    """Metrics of generated reports against one reference each."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        bertscore_model: str | None = None,
        bertscore_layers: int | None = None,
        device: str | None = None,
    ) -> dict[str, Any]:
        predictions, references = list(predictions), list(references)
        bertscore = {"bertscore_model": bertscore_model, "bertscore_layers": bertscore_layers, "device": device}
        if text_metrics is not None:
            text = text_metrics(predictions, references, **bertscore)
            scores, not_available, notes = text["scores"], text["not_available"], text["notes"]
        else:
            scores = reference_scores(predictions, references, **bertscore)
            not_available = {name: REMEDIES[name] for name, value in scores.items() if value is None}
            alike = scores["cider"] == 0 and len(set(references)) == 1
            notes = {"cider": "0 because all references are the same text: its n-grams weigh nothing."} if alike else {}
        clinical = clinical_scores(predictions, references)
        undefined = {"finding_macro_f1": MACRO_REMEDY, "finding_micro_f1": MICRO_REMEDY, "crg": CRG_REMEDY}
        reasons = REMEDIES if score_findings is None else undefined
        not_available |= {name: reasons[name] for name in CLINICAL if clinical[name] is None}
        return {
            **scores,
            **clinical,
            "count": len(predictions),
            "empty_predictions": sum(not prediction.strip() for prediction in predictions),
            "not_available": not_available,
            "notes": notes,
        }


def clinical_scores(predictions: list[str], references: list[str]) -> dict[str, float | None]:
    """Return F1 of the findings and CRG; None without samf, and where a metric is undefined."""
    if score_findings is None:
        return dict.fromkeys(CLINICAL)
    found = score_findings(predictions, references)
    return {"finding_macro_f1": found["macro"]["f1"], "finding_micro_f1": found["micro"]["f1"], "crg": found["crg"]}


def reference_scores(
    predictions: list[str],
    references: list[str],
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
    device: str | None = None,
) -> dict[str, float | None]:
    """Compute the text metrics by the reference libraries.

    Args:
        predictions: generated reports.
        references: one reference report for each.
        bertscore_model: Hub id or folder; None leaves BERTScore out.
        bertscore_layers: its layer, where bert-score doesn't know it.
        device: of BERTScore's model.

    Returns:
        Name → mean; None for what is not available here.
    """
    pairs = list(zip(predictions, references, strict=True))
    scores: dict[str, float | None] = {}
    for order in ORDERS:
        bleu = BLEU(max_ngram_order=order, tokenize="13a", smooth_method="none")
        scores[f"bleu_{order}"] = bleu.corpus_score(predictions, [references]).score / 100
        scores[f"mean_bleu_{order}"] = mean(bleu.corpus_score([p], [[r]]).score / 100 for p, r in pairs)
    scorer = RougeScorer(list(ROUGE.values()), use_stemmer=False)
    rouge = [scorer.score(reference, prediction) for prediction, reference in pairs]
    scores |= {name: mean(score[key].fmeasure for score in rouge) for name, key in ROUGE.items()}
    scores |= {"meteor": meteor(pairs), "cider": cider(pairs), **dict.fromkeys(BERTSCORE)}
    if bertscore_model is not None:
        scores |= bertscores(pairs, bertscore_model, bertscore_layers, device)
    return scores


def mean(values: Iterable[float]) -> float:
    """Return the mean of at least one value."""
    values = list(values)
    return float(sum(values) / len(values))


def meteor(pairs: list[tuple[str, str]]) -> float | None:
    """Return the mean METEOR of (prediction, reference) pairs by nltk; None without WordNet."""
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return mean(single_meteor_score(wordpunct_tokenize(r), wordpunct_tokenize(p)) for p, r in pairs)


def cider(pairs: list[tuple[str, str]]) -> float | None:
    """Return CIDEr of (prediction, reference) pairs by pycocoevalcap; None without it or for fewer than two pairs."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        return None
    if len(pairs) < 2:
        return None
    tokenizer = BLEU(tokenize="13a").tokenizer
    words = [[" ".join(re.findall(r"\S*\w\S*", tokenizer(t.rstrip()).lower())) for t in pair] for pair in pairs]
    expected = {index: [reference] for index, (_, reference) in enumerate(words)}
    return float(Cider().compute_score(expected, {index: [text] for index, (text, _) in enumerate(words)})[0])


def bertscores(
    pairs: list[tuple[str, str]], model: str, layers: int | None = None, device: str | None = None
) -> dict[str, float]:
    """Return the means of BERTScore; pairs with an empty text, on which the library fails, score 0.

    Args:
        pairs: (prediction, reference).
        model: Hub id or folder.
        layers: its layer, where bert-score doesn't know it.
        device: of the model.
    """
    from bert_score import BERTScorer

    filled = [pair for pair in pairs if all(text.strip() for text in pair)]
    if not filled:
        return dict.fromkeys(BERTSCORE, 0.0)
    scorer = BERTScorer(model_type=model, num_layers=layers, device=device)
    scorer._tokenizer.model_max_length = BERTSCORE_TOKENS  # some have none, which overflows in the tokenizer
    columns = scorer.score(*map(list, zip(*filled, strict=True)))
    return {name: float(values.sum()) / len(pairs) for name, values in zip(BERTSCORE, columns, strict=True)}
