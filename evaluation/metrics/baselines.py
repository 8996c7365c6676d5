"""Reports that need no image: baselines for report generation."""

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np


def constant_reports(references: Sequence[str], patients: Sequence[Hashable]) -> list[str]:
    """Return for each sample the report that most *other* patients have, compared by whole text.

    Ties, as where no two patients share a report, go to the report whose length is nearest to the mean. With a single
    patient it is the patient's own.
    """
    owners: dict[str, set[Hashable]] = defaultdict(set)
    for text, patient in zip(references, patients, strict=True):
        owners[text].add(patient)
    unusual = dict(zip(references, _length_deviation(references), strict=True))
    # One more than any patient owns, so that every patient finds one here that belongs to another.
    most = max(Counter(owner for text in owners.values() for owner in text).values(), default=1)
    ranked = sorted(owners, key=lambda text: (-len(owners[text]), unusual[text]))[: most + 1]
    return [max(ranked, key=lambda text: len(owners[text]) - (patient in owners[text])) for patient in patients]


def _length_deviation(texts: Sequence[str]) -> np.ndarray:
    """Return how far each text's number of words is from their mean, (N,)."""
    lengths = np.array([len(text.split()) for text in texts], dtype=np.float64)
    return np.abs(lengths - lengths.mean()) if len(lengths) else lengths


def nearest_prior_reports(references: Sequence[str], labels: np.ndarray, patients: Sequence[Hashable]) -> list[str]:
    """Return for each sample the report of another patient whose labels are nearest to the labels' frequencies.

    It is the most typical report by its findings. Distance is Euclidean; ties go to the report whose length is nearest to
    the mean. With a single patient it is the patient's own.

    Args:
        references: reference reports, (N,).
        labels: their labels, (N, L) of 0 and 1.
        patients: patient of each sample, (N,).
    """
    labels = np.asarray(labels, dtype=np.float64)
    distance = np.linalg.norm(labels - labels.mean(axis=0), axis=1).round(9)
    order = np.lexsort((_length_deviation(references), distance))
    best = int(order[0])
    other = next((int(k) for k in order if patients[k] != patients[best]), best)
    return [references[best if patient != patients[best] else other] for patient in patients]


def exchanged_reports(predictions: Sequence[str], patients: Sequence[Hashable], seed: int = 0) -> list[str]:
    """Replace each sample's prediction with one for another patient: the score of the same texts on the wrong volumes.

    Patient p's k-th prediction becomes the k-th (modulo their number) of one other patient.

    Args:
        predictions: generated reports, (N,).
        patients: patient of each sample, (N,); sortable.
        seed: of the assignment.

    Raises:
        ValueError: there is a single patient.
    """
    texts: dict[Hashable, list[str]] = defaultdict(list)
    for text, patient in zip(predictions, patients, strict=True):
        texts[patient].append(text)
    if len(texts) < 2:
        raise ValueError("Predictions can be exchanged between patients where there are at least two.")
    order = sorted(texts)  # type: ignore[type-var]
    random.Random(seed).shuffle(order)
    donor = dict(zip(order, order[1:] + order[:1], strict=True))
    seen: Counter[Hashable] = Counter()
    exchanged = []
    for patient in patients:
        others = texts[donor[patient]]
        exchanged.append(others[seen[patient] % len(others)])
        seen[patient] += 1
    return exchanged
