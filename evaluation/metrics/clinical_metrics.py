"""Clinical metrics of reports: the 18 CT-RATE labels (F1, CRG), laterality and sizes.

Labels come from the rule-based labeller or from CT-RATE's RadBERT classifier, which is downloaded when it is named.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from samf.data.ct_rate.tables import CT_RATE_LABELS
from samf.evaluation.metrics.radeval_metrics import RADEVAL_METRICS, RADEVAL_REMEDY, check_radeval, radeval_samples
from samf.evaluation.metrics.report_readings import Reading, read_report, rule_labels
from samf.evaluation.metrics.sampled_metric import SampledMetric, divide, finite_or_none, ratio
from samf.evaluation.schema import FindingScores, FindingValues, PerFinding, PrecisionRecallF1, SupportedScores

__all__ = [
    "CRG_REMEDY",
    "MACRO_REMEDY",
    "MICRO_REMEDY",
    "PRECISION_RECALL_F1",
    "RADEVAL_METRICS",
    "RADEVAL_REMEDY",
    "Labeller",
    "chance_findings",
    "check_radeval",
    "combine_crg",
    "confusion_counts",
    "crg_metric",
    "describe_findings",
    "effusion_side_counts",
    "finding_samples",
    "macro_metrics",
    "make_labeller",
    "micro_metrics",
    "precision_recall_f1",
    "radeval_samples",
    "score_findings",
    "side_counts",
    "size_counts",
]

# Reports, N → labels (N, 18) of 0 and 1.
Labeller = Callable[[Sequence[str]], np.ndarray]
PRECISION_RECALL_F1 = ("precision", "recall", "f1")
MICRO_REMEDY = "F1 is undefined where no report, predicted or true, has a finding."
MACRO_REMEDY = "A macro mean is over the findings that occur in the references: here none does."
CRG_REMEDY = (
    "CRG divides by the positive cells of the references and needs negative ones too: it is undefined where the "
    "references have no finding at all, or all findings."
)


# --- Confusion counts: (…, L, 3) holds true positives, false positives and false negatives of L labels ----------------


def confusion_counts(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return the confusion counts (N, L, 3) of truth and found, both (N, L) of 0 and 1."""
    truth, found = np.asarray(truth, bool), np.asarray(found, bool)
    return np.stack([truth & found, ~truth & found, truth & ~found], axis=-1).astype(np.float64)


def precision_recall_f1(counts: np.ndarray) -> np.ndarray:
    """Return precision, recall and F1 (…, 3) of counts (…, 3); NaN where a denominator is 0.

    As scikit-learn's zero_division=nan: a resample of patients without a finding is no evidence that it is always missed.
    """
    hits, false, missed = counts[..., 0], counts[..., 1], counts[..., 2]
    fractions = [(hits, hits + false), (hits, hits + missed), (2 * hits, 2 * hits + false + missed)]
    return np.stack([divide(*fraction) for fraction in fractions], axis=-1)


def _one_of(sums: np.ndarray, which: int) -> np.ndarray:
    return precision_recall_f1(sums)[..., which]


def _macro(sums: np.ndarray, which: int) -> np.ndarray:
    """Return the mean over the labels that occur in the references; sums (…, 3 L). An undefined precision counts as 0."""
    counts = sums.reshape(*sums.shape[:-1], -1, 3)
    occurs = (counts[..., 0] + counts[..., 2]) > 0
    total = np.where(occurs, np.nan_to_num(precision_recall_f1(counts)[..., which]), 0.0).sum(axis=-1)
    return divide(total, occurs.sum(axis=-1))


def macro_metrics(counts: np.ndarray) -> dict[str, SampledMetric]:
    """Return precision, recall and F1 averaged over the labels that occur in the references; counts (N, L, 3)."""
    flat = counts.reshape(len(counts), -1)
    return {name: SampledMetric(flat, partial(_macro, which=k)) for k, name in enumerate(PRECISION_RECALL_F1)}


def micro_metrics(counts: np.ndarray) -> dict[str, SampledMetric]:
    """Return precision, recall and F1 of all cells together; counts (N, L, 3), or (N, 3) of one label."""
    pooled = counts.reshape(len(counts), -1, 3).sum(axis=1)
    return {name: SampledMetric(pooled, partial(_one_of, which=k)) for k, name in enumerate(PRECISION_RECALL_F1)}


# --- CRG --------------------------------------------------------------------------------------------------------

# Every answer wrong: s = -r A - (X - A) = -3 U, so U / (2U + 3U). Every answer right: U / (2U - U).
_CRG_BOUNDS = (0.2, 1.0)


def combine_crg(sums: np.ndarray) -> np.ndarray:
    """Return CRG of summed (…, 4) true positives, false positives, false negatives and cells; NaN where undefined.

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
    """Return the VLM3D challenge's CRG score of truth and found, both (N, L) of 0 and 1."""
    counts = confusion_counts(truth, found).sum(axis=1)
    cells = np.full((len(counts), 1), np.shape(truth)[1], dtype=np.float64)
    return SampledMetric(np.concatenate([counts, cells], axis=1), combine_crg, _CRG_BOUNDS)


# --- Laterality and sizes -----------------------------------------------------------------------------------------


def _multiset_counts(predicted: Counter, expected: Counter) -> list[int]:
    shared = (predicted & expected).total()
    return [shared, predicted.total() - shared, expected.total() - shared]


def side_counts(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Count (finding, side) pairs that both reports affirm, only the prediction, only the reference: (N, 3)."""
    return _paired_counts(lambda reading: Counter(reading.sides), predictions, references)


def size_counts(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Count lengths in both reports, only in the prediction, only in the reference, as multisets of mm: (N, 3)."""
    return _paired_counts(lambda reading: Counter(reading.sizes), predictions, references)


def effusion_side_counts(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return whether the prediction names the same sides of a pleural effusion, and whether the reference names any: (N, 2)."""
    sides = [(_effusion_sides(ref), _effusion_sides(text)) for text, ref in zip(predictions, references, strict=True)]
    return np.array([[bool(ref) and ref == named, bool(ref)] for ref, named in sides], dtype=np.float64).reshape(-1, 2)


def _effusion_sides(report: str) -> frozenset[str]:
    return frozenset(side for label, side in read_report(report).sides if label == "Pleural effusion")


def _paired_counts(
    choose: Callable[[Reading], Counter], predictions: Sequence[str], references: Sequence[str]
) -> np.ndarray:
    pairs = zip(map(read_report, predictions), map(read_report, references), strict=True)
    counts = [_multiset_counts(choose(prediction), choose(reference)) for prediction, reference in pairs]
    return np.array(counts, dtype=np.float64).reshape(-1, 3)


# --- All findings -------------------------------------------------------------------------------------------------


def finding_samples(
    predictions: Sequence[str],
    references: Sequence[str],
    finding_names: Sequence[str] = CT_RATE_LABELS,
    labeller: Labeller = rule_labels,
) -> dict[str, SampledMetric]:
    """Return every clinical metric by sample: "macro.f1", "micro.f1", "crg", "per_finding.Emphysema.f1", "sides.f1", …

    "effusion_side.accuracy" is over the references that name a side of a pleural effusion.

    Args:
        predictions: generated reports, (N,).
        references: one reference report for each.
        finding_names: labels to score, of `CT_RATE_LABELS`.
        labeller: returns the labels (N, 18) of N reports. Laterality and sizes are always read by rule.
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
    samples: Mapping[str, SampledMetric], finding_names: Sequence[str] = CT_RATE_LABELS
) -> FindingScores:
    """Return what `score_findings` returns, from the samples of `finding_samples`."""
    per_finding = {}
    for name in finding_names:
        group = f"per_finding.{name}"
        hits, false, _ = samples[f"{group}.f1"].samples.sum(axis=0)
        per_finding[name] = PerFinding(**_supported(samples, group), predicted=int(hits + false))
    side = samples["effusion_side.accuracy"]
    return {
        "per_finding": per_finding,
        "micro": _group(samples, "micro"),
        "macro": _group(samples, "macro"),
        "macro_findings": sum(score["support"] > 0 for score in per_finding.values()),
        "crg": samples["crg"].value(),
        "sides": _supported(samples, "sides"),
        "sizes": _supported(samples, "sizes"),
        "effusion_side": {"count": int(side.samples[:, 1].sum()), "accuracy": side.value()},
    }


def _group(samples: Mapping[str, SampledMetric], group: str) -> PrecisionRecallF1:
    precision, recall, f1 = (samples[f"{group}.{name}"].value() for name in PRECISION_RECALL_F1)
    return {"precision": precision, "recall": recall, "f1": f1}


def _supported(samples: Mapping[str, SampledMetric], group: str) -> SupportedScores:
    hits, _, missed = samples[f"{group}.f1"].samples.sum(axis=0)
    return SupportedScores(**_group(samples, group), support=int(hits + missed))


def score_findings(
    predictions: Sequence[str],
    references: Sequence[str],
    finding_names: Sequence[str] = CT_RATE_LABELS,
    labeller: Labeller = rule_labels,
) -> FindingScores:
    """Score the findings that a labeller reads in reports against their references.

    A score whose denominator is 0 is None; only in the macro means an undefined precision counts as 0.

    Args:
        predictions: generated reports, (N,).
        references: one reference report for each.
        finding_names: labels to score, of `CT_RATE_LABELS`.
        labeller: returns the labels (N, 18) of N reports. Laterality and sizes are always read by rule.
    """
    return describe_findings(finding_samples(predictions, references, finding_names, labeller), finding_names)


def chance_findings(references: Sequence[str], finding_names: Sequence[str], labeller: Labeller) -> FindingValues:
    """Return the scores of guessing each label at its own frequency p, from expected counts (N p² right of N p).

    Args:
        references: reference reports, (N,).
        finding_names: labels to score, of `CT_RATE_LABELS`.
        labeller: returns the labels (N, 18) of N reports.
    """
    columns = [CT_RATE_LABELS.index(name) for name in finding_names]
    truth = labeller(references)[:, columns].astype(np.float64)
    p = truth.mean(axis=0)
    counts = len(truth) * np.stack([p * p, p * (1 - p), p * (1 - p)], axis=-1)  # (L, 3)
    samples = {f"macro.{name}": metric for name, metric in macro_metrics(counts[None]).items()}
    samples |= {f"micro.{name}": metric for name, metric in micro_metrics(counts[None]).items()}
    crg = combine_crg(np.append(counts.sum(axis=0), truth.size))
    return {"macro": _group(samples, "macro"), "micro": _group(samples, "micro"), "crg": finite_or_none(crg)}


def make_labeller(name: str = "rules", *, device: str | None = None) -> Labeller:
    """Return the labeller that a name stands for.

    Args:
        name: "rules", "radbert" (CT-RATE's, from the Hub), or a path or Hub id of RadBertClassifier.pth.
        device: of RadBERT; default: cpu.
    """
    if name == "rules":
        return rule_labels
    from samf.evaluation.metrics.radbert import RADBERT, RadBertLabeller  # imports torch

    return RadBertLabeller(RADBERT if name == "radbert" else name, device=device)
