"""What reports say, not how: the 18 CT-RATE labels (F1, CRG), sides and sizes, and the metrics of the library RadEval.

Labels come from the rule-based labeller, or from CT-RATE's own RadBERT classifier, which is downloaded where it is named.
"""

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.evaluation.metrics.bootstrap import SampledMetric, divide, ratio
from samf.evaluation.metrics.finding_labeller import effusion_sides, finding_sides, label_reports
from samf.evaluation.metrics.report_sizes import read_sizes

logger = logging.getLogger(__name__)

Labeller = Callable[[Sequence[str]], np.ndarray]
PRECISION_RECALL_F1 = ("precision", "recall", "f1")
MICRO_REMEDY = "F1 is undefined where no report, predicted or true, holds a finding."
MACRO_REMEDY = "A macro mean is over the findings that occur in the references: here none does."
CRG_REMEDY = (
    "CRG divides by the positive cells of the references and needs negative ones too: it is undefined where the "
    "references hold no finding at all, or every finding everywhere."
)

# --- confusion counts: (…, L, 3) holds true positives, false positives and false negatives of L labels ----------------


def confusion_counts(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of each cell of truth and found, both (N, L) of 0 and 1: (N, L, 3)."""
    truth, found = np.asarray(truth, bool), np.asarray(found, bool)
    return np.stack([truth & found, ~truth & found, truth & ~found], axis=-1).astype(np.float64)


def precision_recall_f1(counts: np.ndarray) -> np.ndarray:
    """(…, 3) counts → (…, 3) figures; NaN where a denominator is 0, as scikit-learn's zero_division=nan.

    So a draw of patients without a finding says nothing about it, rather than that it is always missed.
    """
    hits, false, missed = counts[..., 0], counts[..., 1], counts[..., 2]
    figures = [(hits, hits + false), (hits, hits + missed), (2 * hits, 2 * hits + false + missed)]
    return np.stack([divide(*figure) for figure in figures], axis=-1)


def _one_figure(sums: np.ndarray, which: int) -> np.ndarray:
    return precision_recall_f1(sums)[..., which]


def _macro(sums: np.ndarray, which: int) -> np.ndarray:
    """Mean over the labels that occur in the references; sums (…, 3 L). One that is never found has a precision of 0."""
    counts = sums.reshape(*sums.shape[:-1], -1, 3)
    occurs = (counts[..., 0] + counts[..., 2]) > 0
    total = np.where(occurs, np.nan_to_num(precision_recall_f1(counts)[..., which]), 0.0).sum(axis=-1)
    return divide(total, occurs.sum(axis=-1))


def macro_metrics(counts: np.ndarray) -> dict[str, SampledMetric]:
    """Precision, recall and F1 averaged over the labels that occur in the references; counts (N, L, 3)."""
    flat = counts.reshape(len(counts), -1)
    return {name: SampledMetric(flat, partial(_macro, which=k)) for k, name in enumerate(PRECISION_RECALL_F1)}


def micro_metrics(counts: np.ndarray) -> dict[str, SampledMetric]:
    """Precision, recall and F1 of all cells together; counts (N, L, 3), or (N, 3) of one label."""
    pooled = counts.reshape(len(counts), -1, 3).sum(axis=1)
    return {name: SampledMetric(pooled, partial(_one_figure, which=k)) for k, name in enumerate(PRECISION_RECALL_F1)}


# --- CRG --------------------------------------------------------------------------------------------------------

CRG_BOUNDS = (
    0.2,
    1.0,
)  # every answer wrong: s = -r A - (X - A) = -3 U, so U / (2U + 3U); every answer right: U / (2U - U)


def combine_crg(sums: np.ndarray) -> np.ndarray:
    """CRG of summed (…, 4) true positives, false positives, false negatives and cells; NaN where it is undefined.

    X = cells, A = positives of the references, r = (X - A) / 2A, U = (X - A) / 2,
    s = r TP - r FN - FP, CRG = U / (2U - s): 1 for a perfect system, 1/3 for all-negative and all-positive answers.
    """
    hits, false, missed, cells = (sums[..., k] for k in range(4))
    positives = hits + missed
    best = (cells - positives) / 2
    weight = divide(best, positives)
    score = weight * (hits - missed) - false
    return divide(best, np.where(best > 0, 2 * best - score, 0.0))


def crg_metric(truth: np.ndarray, found: np.ndarray) -> SampledMetric:
    """The VLM3D challenge's CRG score of truth and found, both (N, L) of 0 and 1."""
    counts = confusion_counts(truth, found).sum(axis=1)
    cells = np.full((len(counts), 1), np.shape(truth)[1], dtype=np.float64)
    return SampledMetric(np.concatenate([counts, cells], axis=1), combine_crg, CRG_BOUNDS)


# --- sides and sizes ----------------------------------------------------------------------------------------------


def _multiset_counts(predicted: Counter, expected: Counter) -> list[int]:
    shared = (predicted & expected).total()
    return [shared, predicted.total() - shared, expected.total() - shared]


def side_counts(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(N, 3): (finding, side) pairs that both reports affirm, only the prediction, only the reference."""
    return _paired_counts(lambda text: Counter(finding_sides(text)), predictions, references)


def size_counts(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(N, 3): lengths in both reports, only in the prediction, only in the reference, as multisets of mm."""
    return _paired_counts(read_sizes, predictions, references)


def effusion_side_counts(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(N, 2): whether the prediction names the same sides of a pleural effusion; whether the reference names any."""
    sides = [(effusion_sides(ref), effusion_sides(text)) for text, ref in zip(predictions, references, strict=True)]
    return np.array([[bool(ref) and ref == named, bool(ref)] for ref, named in sides], dtype=np.float64).reshape(-1, 2)


def _paired_counts(read: Callable[[str], Counter], predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    pairs = zip(predictions, references, strict=True)
    counts = [_multiset_counts(read(prediction), read(reference)) for prediction, reference in pairs]
    return np.array(counts, dtype=np.float64).reshape(-1, 3)


# --- all findings -------------------------------------------------------------------------------------------------


def finding_samples(
    predictions: Sequence[str],
    references: Sequence[str],
    finding_names: Sequence[str] = CT_RATE_LABELS,
    labeller: Labeller = label_reports,
) -> dict[str, SampledMetric]:
    """Every clinical figure by sample: "macro.f1", "micro.f1", "crg", "per_finding.Emphysema.f1", "sides.f1", …

    "effusion_side.accuracy" is over the references that name a side of a pleural effusion.

    `labeller` gives the labels (N, 18) of N reports. Sides and sizes are always read by rule.
    """
    columns = [CT_RATE_LABELS.index(name) for name in finding_names]
    truth, found = labeller(references)[:, columns], labeller(predictions)[:, columns]
    counts = confusion_counts(truth, found)
    groups = {"macro": macro_metrics(counts), "micro": micro_metrics(counts)}
    groups |= {f"per_finding.{name}": micro_metrics(counts[:, k]) for k, name in enumerate(finding_names)}
    groups["sides"] = micro_metrics(side_counts(predictions, references))
    groups["sizes"] = micro_metrics(size_counts(predictions, references))
    samples = {f"{group}.{name}": metric for group, metrics in groups.items() for name, metric in metrics.items()}
    sides = SampledMetric(effusion_side_counts(predictions, references), ratio)
    return samples | {"crg": crg_metric(truth, found), "effusion_side.accuracy": sides}


def describe_findings(
    samples: dict[str, SampledMetric], finding_names: Sequence[str] = CT_RATE_LABELS
) -> dict[str, Any]:
    """The figures of `finding_samples` as `score_findings` returns them."""
    per_finding = {}
    for name in finding_names:
        hits, false, missed = samples[f"per_finding.{name}.f1"].samples.sum(axis=0)
        figures = _group(samples, f"per_finding.{name}")
        per_finding[name] = {**figures, "support": int(hits + missed), "predicted": int(hits + false)}
    scores: dict[str, Any] = {"per_finding": per_finding}
    scores |= {group: _group(samples, group) for group in ("micro", "macro")}
    scores["macro_findings"] = sum(figures["support"] > 0 for figures in per_finding.values())
    scores["crg"] = samples["crg"].value()
    for group in ("sides", "sizes"):
        hits, _, missed = samples[f"{group}.f1"].samples.sum(axis=0)
        scores[group] = {**_group(samples, group), "support": int(hits + missed)}
    side = samples["effusion_side.accuracy"]
    scores["effusion_side"] = {"count": int(side.samples[:, 1].sum()), "accuracy": side.value()}
    return scores


def _group(samples: dict[str, SampledMetric], group: str) -> dict[str, float | None]:
    return {name: samples[f"{group}.{name}"].value() for name in PRECISION_RECALL_F1}


def score_findings(
    predictions: Sequence[str],
    references: Sequence[str],
    finding_names: Sequence[str] = CT_RATE_LABELS,
    labeller: Labeller = label_reports,
) -> dict[str, Any]:
    """Precision, recall and F1 of the findings that a labeller reads in reports against their references.

    Returns `per_finding` (name → precision, recall, f1, support, predicted), `micro` over all cells, `macro` over the
    findings that occur in some reference (`macro_findings` of them), `crg` (None where it is undefined), `sides` (pairs of
    finding and side) and `sizes` (lengths in mm), each with precision, recall, f1 and support, and `effusion_side`: among
    the references that name an effusion's side, how many predictions name the same. A figure whose denominator is 0 is
    None; only in the macro means an undefined precision counts as 0.
    """
    return describe_findings(finding_samples(predictions, references, finding_names, labeller), finding_names)


def chance_findings(references: Sequence[str], finding_names: Sequence[str], labeller: Labeller) -> dict[str, Any]:
    """What guessing scores: each label at random with its own frequency p, so N p² right of N p. Expected counts."""
    columns = [CT_RATE_LABELS.index(name) for name in finding_names]
    truth = labeller(references)[:, columns].astype(np.float64)
    p = truth.mean(axis=0)
    counts = len(truth) * np.stack([p * p, p * (1 - p), p * (1 - p)], axis=-1)  # (L, 3)
    macro = {name: metric.value() for name, metric in macro_metrics(counts[None]).items()}
    micro = {name: metric.value() for name, metric in micro_metrics(counts[None]).items()}
    crg = float(combine_crg(np.append(counts.sum(axis=0), truth.size)))
    return {"macro": macro, "micro": micro, "crg": crg if np.isfinite(crg) else None}


# --- CT-RATE's RadBERT --------------------------------------------------------------------------------------------

RADBERT = "ibrahimhamamci/CT-RATE"
RADBERT_FILE = "models/RadBertClassifier.pth"
RADBERT_BACKBONE = "zzxslp/RadBERT-RoBERTa-4m"
# A buffer of old transformers versions; it holds 0, 1, 2, … and no weights.
STALE_KEYS = ("model.embeddings.position_ids",)
RADBERT_TOKENS = 512
RADBERT_THRESHOLD = 0.5


class RadBertClassifier(nn.Module):
    """RadBERT with one logit for each of CT-RATE's 18 labels on its pooled output."""

    def __init__(self, config: Any, num_labels: int = len(CT_RATE_LABELS)):
        super().__init__()
        self.model = AutoModel.from_config(config)
        self.classifier = nn.Linear(config.hidden_size, num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """input_ids, attention_mask (B, T) → logits (B, 18)."""
        return self.classifier(self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


class RadBertLabeller:
    """CT-RATE's report classifier: reports → labels (N, 18) of 0 and 1, in the order of `CT_RATE_LABELS`.

    Args:
        checkpoint: RadBertClassifier.pth, or the Hub id of a data set that holds it (CT-RATE's own asks for a login).
        backbone: Hub id or folder with the configuration and tokenizer of RadBERT; its weights are in the checkpoint.
        device: default: cpu.

    Raises ValueError for a checkpoint whose weights are not this classifier's; only `STALE_KEYS` may be too many.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike = RADBERT,
        *,
        backbone: str = RADBERT_BACKBONE,
        device: str | None = None,
        batch_size: int = 16,
    ):
        path = find_radbert(checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(backbone, do_lower_case=True)
        self.model = load_radbert(path, AutoConfig.from_pretrained(backbone)).to(device or "cpu").eval()
        self.batch_size = batch_size
        self._known: dict[str, np.ndarray] = {}

    @torch.inference_mode()
    def probabilities(self, reports: Sequence[str]) -> np.ndarray:
        """Probability of each label, (N, 18)."""
        chunks = [np.zeros((0, self.model.classifier.out_features), dtype=np.float32)]
        device = self.model.classifier.weight.device
        for start in tqdm(range(0, len(reports), self.batch_size), desc="RadBERT", unit="batch"):
            texts = list(reports[start : start + self.batch_size])
            inputs = self.tokenizer(
                texts, padding=True, truncation=True, max_length=RADBERT_TOKENS, return_tensors="pt"
            )
            logits = self.model(inputs["input_ids"].to(device), inputs["attention_mask"].to(device))
            chunks.append(logits.sigmoid().float().cpu().numpy())
        return np.concatenate(chunks)

    def __call__(self, reports: Sequence[str]) -> np.ndarray:
        """Labels (N, 18) of 0 and 1. A report without a word has none. Reports that came before are remembered."""
        new = [report for report in dict.fromkeys(reports) if report.strip() and report not in self._known]
        found = (self.probabilities(new) > RADBERT_THRESHOLD).astype(np.int64)
        self._known.update(zip(new, found, strict=True))
        none = np.zeros(self.model.classifier.out_features, dtype=np.int64)
        rows = [self._known.get(report, none) for report in reports]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(none))


def find_radbert(checkpoint: str | os.PathLike) -> Path:
    """The checkpoint's file on this machine, downloaded from the Hub where an id is given."""
    path = Path(checkpoint)
    if path.is_file():
        return path
    if path.suffix in (".pth", ".pt", ".bin") or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)):
        raise FileNotFoundError(
            f"{path}: no such file; expected RadBertClassifier.pth, or the Hub id of its data set ({RADBERT})."
        )
    return Path(hf_hub_download(str(checkpoint), RADBERT_FILE, repo_type="dataset"))


def load_radbert(path: Path, config: Any) -> RadBertClassifier:
    """The classifier with a checkpoint's weights: all of them, and no others but the stale ones."""
    model = RadBertClassifier(config)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    for key in STALE_KEYS:
        weights.pop(key, None)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: not the weights of CT-RATE's RadBertClassifier with this backbone: {error}"
        ) from error
    return model


def make_labeller(name: str = "rules", *, device: str | None = None) -> Labeller:
    """ "rules", "radbert" (CT-RATE's, from the Hub), or a path or Hub id of RadBertClassifier.pth."""
    if name == "rules":
        return label_reports
    return RadBertLabeller(RADBERT if name == "radbert" else name, device=device)


# --- RadEval ------------------------------------------------------------------------------------------------------

# What each metric of the library returns for each sample.
RADEVAL_METRICS = {
    "radgraph": ("radgraph_simple", "radgraph_partial", "radgraph_complete"),
    "ratescore": ("ratescore",),
    "green": ("green",),
}
RADEVAL_REMEDY = (
    "RadGraph-F1, RaTEScore and GREEN are computed by RadEval: pip install radeval, then name them (radeval). It is no extra "
    "of this package: of radeval 2.2.1 none of the three runs beside numpy 2 (see docs/reference/evaluation.md)."
)


def check_radeval(metrics: Sequence[str]) -> None:
    """Raise ValueError for a name that is none of `RADEVAL_METRICS`."""
    unknown = sorted(set(metrics) - set(RADEVAL_METRICS))
    if unknown:
        raise ValueError(f"radeval names {unknown}; expected some of {', '.join(RADEVAL_METRICS)}.")


def radeval_samples(
    predictions: Sequence[str], references: Sequence[str], metrics: Sequence[str]
) -> dict[str, SampledMetric]:
    """RadGraph-F1, RaTEScore and GREEN of each pair by the library RadEval, which downloads their models.

    `metrics`: some of `RADEVAL_METRICS`. A pair with an empty text scores 0 and never reaches the library.
    All three were made for chest X-ray reports. Raises ImportError without the library, ValueError for another name.
    """
    check_radeval(metrics)
    try:
        from radeval import RadEval
    except ImportError as error:
        raise ImportError(RADEVAL_REMEDY) from error
    filled = [k for k, pair in enumerate(zip(predictions, references, strict=True)) if all(s.strip() for s in pair)]
    values = {key: np.zeros(len(predictions)) for name in metrics for key in RADEVAL_METRICS[name]}
    if filled and metrics:
        with warnings.catch_warnings():  # the library switches all warnings off for good
            scorer = RadEval(metrics=list(metrics), per_sample=True, show_progress=False)
            scores = scorer(refs=[references[k] for k in filled], hyps=[predictions[k] for k in filled])
        for key, column in values.items():
            column[filled] = scores[key]
    return {key: SampledMetric.mean(column) for key, column in values.items()}
