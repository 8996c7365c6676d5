"""What a figure is worth: patient-level intervals and paired tests, baselines, template collapse, subgroups.

Every figure here is a function of sums over samples (`SampledMetric`): a mean, corpus BLEU of its n-gram counts, an F1 of
its confusion counts. Leaving a patient out, or a randomisation, is then arithmetic on the patients' sums, with no text
read again. Patients, not reports, are the units: reports of one patient resemble each other.
"""

import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from samf.data.patients import named_patient
from samf.utils.text_files import open_csv

RESAMPLES = 1000
LEVEL = 0.95
# Resamples or permutations that are worked on at once: bounds the memory to this times the number of patients.
_CHUNK = 250
# An interval is given where at least this share of the resamples has a defined value.
_DEFINED_SHARE = 0.5
# How the intervals of all figures are made; stands in results.json.
INTERVAL_METHOD = (
    "jackknife over patients, Student's t on the logit scale; exact (Clopper-Pearson) at a figure's bounds"
)
# A figure this near to its bound is at it; leaving patients out that move a figure less doesn't move it.
_AT_BOUND = 1e-12
# A figure that reads 1.000 or 0.000 has at least the interval that it would have at the bound (shares of the range).
_NEAR_BOUND = 5e-4
# Differences that are equal but for rounding count as equal in the randomisation test.
_TIE = 1e-12


@dataclass(frozen=True)
class SampledMetric:
    """A figure that depends on its samples by their sums alone.

    Attributes:
        samples: sufficient statistics of each sample, (N, K).
        combine: sums (…, K) → figures (…), NaN where the figure is undefined.
        bounds: the lowest and the highest value that the figure can have; None where it has no bounds.
    """

    samples: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]
    bounds: tuple[float, float] | None = (0.0, 1.0)

    @classmethod
    def mean(
        cls, values: Sequence[float] | np.ndarray, bounds: tuple[float, float] | None = (0.0, 1.0)
    ) -> "SampledMetric":
        """The mean of one value a sample."""
        values = np.asarray(values, dtype=np.float64)
        return cls(np.stack([values, np.ones_like(values)], axis=-1), ratio, bounds)

    def value(self) -> float | None:
        """The figure over all samples; None where it is undefined."""
        return _plain(self.combine(self.samples.sum(axis=0)))

    def of_samples(self) -> np.ndarray:
        """The figure of each sample alone, (N,)."""
        return self.combine(self.samples)

    def take(self, index: np.ndarray) -> "SampledMetric":
        """The same figure over some of the samples."""
        return SampledMetric(self.samples[index], self.combine, self.bounds)


def ratio(sums: np.ndarray) -> np.ndarray:
    """First column over second, NaN where the second is 0."""
    return divide(sums[..., 0], sums[..., 1])


def divide(numerator: np.ndarray, denominator: np.ndarray, otherwise: float = np.nan) -> np.ndarray:
    """numerator / denominator, `otherwise` where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, otherwise), where=denominator != 0)


def _plain(value: np.ndarray | float) -> float | None:
    return float(value) if np.isfinite(value) else None


# --- patients ---------------------------------------------------------------------------------------------------


def patient_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The patient of each row of a predictions file.

    A row's `patient_id` says it, else CT-RATE's names do, in `scan_id` or `id` ("valid_53_a" is patient valid_53). Any
    other `scan_id` stands for a patient of its own, and so does each row without one: see `unknown_patients`.
    """
    scans = [row.get("scan_id") for row in rows]
    alone = [f"row {position}" if scan is None else str(scan) for position, scan in enumerate(scans)]
    return [named_patient(row) or key for row, key in zip(rows, alone, strict=True)]


def unknown_patients(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many rows name no patient, so that their scan, or the row itself, stands for one."""
    return sum(named_patient(row) is None for row in rows)


def _group(patients: Sequence[Any]) -> tuple[np.ndarray, int]:
    names, codes = np.unique(np.asarray(patients), return_inverse=True)
    return codes.ravel(), len(names)


def _group_sums(samples: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    """Sums (P, K) of samples (N, K) by patient."""
    return np.stack([np.bincount(codes, column, count) for column in samples.T], axis=-1)


def _check_patients(metrics: Sequence[SampledMetric], patients: Sequence[Any]) -> None:
    for metric in metrics:
        if len(metric.samples) != len(patients):
            raise ValueError(f"{len(metric.samples)} samples and {len(patients)} patients; give each sample's patient.")


# --- intervals --------------------------------------------------------------------------------------------------


def patient_intervals(
    metrics: Mapping[str, SampledMetric], patients: Sequence[Any], *, level: float = LEVEL
) -> dict[str, list[float] | None]:
    """Intervals [low, high] of each figure over patients; None where there is none.

    A jackknife over patients gives a figure's standard error, Student's t its multiple, with as many degrees of freedom
    as the patients' influences allow; the interval is symmetric on the logit scale of the figure's bounds, and so never
    leaves them. At a bound, where all patients are right or all wrong, the error can't be estimated: there the interval is
    the exact one of as many trials as patients that the figure depends on (see `patient_counts`).

    Args:
        metrics: name → figure by sample.
        patients: each sample's patient, (N,).
        level: of the intervals.

    Returns name → [low, high]; None for a single patient, for an undefined figure, and where every patient gives the same
    figure within the bounds, so that nothing is known about its spread.
    Raises ValueError for unequal lengths.
    """
    _check_patients(list(metrics.values()), patients)
    codes, count = _group(patients)
    if count < 2:
        return dict.fromkeys(metrics)
    return {
        name: _patient_interval(metric, _group_sums(metric.samples, codes, count), level)
        for name, metric in metrics.items()
    }


def patient_counts(metrics: Mapping[str, SampledMetric], patients: Sequence[Any]) -> dict[str, int]:
    """How many patients each figure depends on: name → n.

    A patient counts where the figure is defined for this patient alone, or moves when the patient is left out: for the F1
    of a finding those who have it in a report or its reference, for a mean all.
    """
    _check_patients(list(metrics.values()), patients)
    codes, count = _group(patients)
    counts = {}
    for name, metric in metrics.items():
        sums = _group_sums(metric.samples, codes, count)
        total = sums.sum(axis=0)
        moved = _moves(metric.combine(total - sums), float(metric.combine(total)))
        counts[name] = int((np.isfinite(metric.combine(sums)) | moved).sum())
    return counts


def _moves(without: np.ndarray, figure: float) -> np.ndarray:
    """Which patients move the figure: (P,) of its values without each of them."""
    if not np.isfinite(figure):
        return np.zeros(len(without), dtype=bool)
    return ~np.isfinite(without) | (np.abs(without - figure) > _AT_BOUND)


def _patient_interval(metric: SampledMetric, sums: np.ndarray, level: float) -> list[float] | None:
    """The interval of one figure from the patients' sums (P, K)."""
    total = sums.sum(axis=0)
    figure, without = float(metric.combine(total)), metric.combine(total - sums)  # (P,)
    if not np.isfinite(figure):
        return None
    informative = int((np.isfinite(metric.combine(sums)) | _moves(without, figure)).sum())
    low, high = metric.bounds or (-np.inf, np.inf)
    share = (figure - low) / (high - low) if metric.bounds else np.nan
    near = min(abs(share), abs(1 - share)) < _NEAR_BOUND
    exact = _exact_interval(share > 0.5, informative, level, (low, high)) if near else None
    spread = _jackknife(without, informative)
    if spread is None or (near and not _AT_BOUND < share < 1 - _AT_BOUND):
        return exact
    error, freedom = spread
    width = float(student_t.ppf((1 + level) / 2, freedom)) * error
    if not 0 < share < 1:  # no bounds, or values that don't keep to them
        return [figure - width, figure + width]
    place, width = np.log(share / (1 - share)), width / (high - low) / (share * (1 - share))
    interval = [float(low + (high - low) * _logistic(place + side * width)) for side in (-1, 1)]
    return interval if exact is None else [min(interval[0], exact[0]), max(interval[1], exact[1])]


def _exact_interval(at_highest: bool, count: int, level: float, bounds: tuple[float, float]) -> list[float] | None:
    """Clopper-Pearson's interval where all, or none, of `count` trials succeed, on the scale of `bounds`."""
    if not count:
        return None
    low, high = bounds
    reach = (high - low) * ((1 - level) / 2) ** (1 / count)
    return [float(low + reach), float(high)] if at_highest else [float(low), float(high - reach)]


def _jackknife(without: np.ndarray, informative: int) -> tuple[float, float] | None:
    """Standard error and degrees of freedom from a figure's values without each patient, (P,); None without a spread.

    The degrees of freedom are Satterthwaite's: fewer where the error stems from few patients. They are kept between half
    of and all that `informative` patients have, since the fourth moment of few values is a poor guide by itself.
    """
    without = without[np.isfinite(without)]
    moves = without - without.mean() if len(without) else without
    square = float((moves**2).sum())
    if informative < 2 or square <= len(without) * _AT_BOUND**2:
        return None
    kurtosis = len(moves) * float((moves**4).sum()) / square**2
    freedom = 2 * len(moves) / max(kurtosis - 1, _AT_BOUND)
    most = informative - 1
    freedom = max(1.0, min(max(freedom, most / 2), most))
    return float(np.sqrt(square * (len(moves) - 1) / len(moves))), freedom


def _logistic(x: float) -> float:
    return float(0.5 * (1 + np.tanh(x / 2)))


def bootstrap_values(
    metrics: Mapping[str, SampledMetric], patients: Sequence[Any], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Each figure in `resamples` draws of as many patients, with replacement, as there are: name → (R,).

    `patients` holds each sample's patient, (N,). All figures see the same draws. Raises ValueError for unequal lengths.
    """
    _check_patients(list(metrics.values()), patients)
    codes, count = _group(patients)
    sums = {name: _group_sums(metric.samples, codes, count) for name, metric in metrics.items()}
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
    for size in _chunks(resamples):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)  # (r, P)
        for name, metric in metrics.items():
            drawn[name].append(metric.combine(weights @ sums[name]))
    return {name: np.concatenate(values) for name, values in drawn.items()}


def bootstrap_intervals(
    metrics: Mapping[str, SampledMetric],
    patients: Sequence[Any],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, list[float] | None]:
    """Percentile intervals [low, high] of each figure over draws of patients; None where there is none.

    For comparison only: they are too narrow for up to some 200 patients (see `meta_evaluation coverage`); results have
    those of `patient_intervals`. None: a single patient, no draws, or a figure that is undefined in more than half of them.
    """
    if len(set(patients)) < 2 or not resamples:
        return dict.fromkeys(metrics)
    drawn = bootstrap_values(metrics, patients, resamples=resamples, seed=seed)
    return {name: _interval(values, level) for name, values in drawn.items()}


def _interval(values: np.ndarray, level: float) -> list[float] | None:
    defined = values[np.isfinite(values)]
    if not len(defined) or len(defined) < _DEFINED_SHARE * len(values):
        return None
    return [float(bound) for bound in np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])]


# --- tests of two systems ---------------------------------------------------------------------------------------


def _chunks(total: int) -> Iterator[int]:
    yield from (min(_CHUNK, total - start) for start in range(0, total, _CHUNK))


def paired_randomisation(
    first: Mapping[str, SampledMetric],
    second: Mapping[str, SampledMetric],
    patients: Sequence[Any],
    *,
    resamples: int = 10 * RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Whether two systems differ on the same samples: approximate randomisation over patients, two-sided.

    In each of `resamples` permutations every patient's answers change sides with probability 1/2. The p-value is
    (1 + permutations that differ at least as much) / (1 + permutations). `first` and `second` hold the same names, and
    their samples are the same questions in the same order, whose patients `patients` gives.

    Returns name → first, second, difference (second - first), p_value, interval (jackknife over patients, of the
    difference) and n (patients that the difference can depend on: those of either figure).
    """
    names = [name for name in first if name in second]
    _check_patients([metrics[name] for metrics in (first, second) for name in names], patients)
    codes, count = _group(patients)
    a = {name: _group_sums(first[name].samples, codes, count) for name in names}
    b = {name: _group_sums(second[name].samples, codes, count) for name in names}
    observed = {name: _difference(first[name], a[name].sum(0), b[name].sum(0)) for name in names}
    exceeding = dict.fromkeys(names, 0)
    rng = np.random.default_rng(seed)
    for size in _chunks(resamples):
        swapped = rng.integers(0, 2, size=(size, count)).astype(np.float64)  # (r, P)
        for name in names:
            moved = swapped @ (b[name] - a[name])
            difference = _difference(first[name], a[name].sum(0) + moved, b[name].sum(0) - moved)
            # Not "greater": a permutation whose difference is undefined counts against a difference too.
            exceeding[name] += int(np.sum(~(np.abs(difference) < np.abs(observed[name]) - _TIE)))
    counts = [patient_counts({name: system[name] for name in names}, patients) for system in (first, second)]
    return {
        name: {
            "first": first[name].value(),
            "second": second[name].value(),
            "difference": _plain(observed[name]),
            "interval": _difference_interval(first[name], a[name], b[name]),
            "n": max(side[name] for side in counts),
            "p_value": (1 + exceeding[name]) / (1 + resamples) if np.isfinite(observed[name]) else None,
        }
        for name in names
    }


def _difference(metric: SampledMetric, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return metric.combine(second) - metric.combine(first)


def _difference_interval(metric: SampledMetric, a: np.ndarray, b: np.ndarray) -> list[float] | None:
    """Interval of second - first from both systems' sums by patient (P, K): both are without the same patients.

    Exact, as `patient_intervals` has it, where one system has all that a figure can have and the other nothing of it. None
    where no patient moves the difference otherwise.
    """
    figure = float(_difference(metric, a.sum(0), b.sum(0)))
    without = _difference(metric, a.sum(0) - a, b.sum(0) - b)
    if not np.isfinite(figure):
        return None
    reach = metric.bounds[1] - metric.bounds[0] if metric.bounds else np.inf
    if abs(abs(figure) - reach) < _AT_BOUND:
        informative = int(np.isfinite(_difference(metric, a, b)).sum())
        low, high = _exact_interval(True, max(informative, 1), LEVEL, (0.0, reach))
        return [low, high] if figure > 0 else [-high, -low]
    spread = _jackknife(without, int(_moves(without, figure).sum()))
    if spread is None:
        return None
    width = float(student_t.ppf((1 + LEVEL) / 2, spread[1])) * spread[0]
    return [figure - width, figure + width]


# --- baselines: what reports score that no image was read for -----------------------------------------------------


def constant_reports(references: Sequence[str], patients: Sequence[Any]) -> list[str]:
    """For each sample the report that most *other* patients have, by whole text.

    Of equally frequent ones, as where no two patients share a report, the one whose length is nearest to the mean. With
    a single patient, the patient's own.
    """
    owners: dict[str, set[Any]] = defaultdict(set)
    for text, patient in zip(references, patients, strict=True):
        owners[text].add(patient)
    unusual = dict(zip(references, _unusual_length(references), strict=True))
    # One more than any patient owns: then every patient finds one here that is not its own.
    most = max(Counter(owner for text in owners.values() for owner in text).values(), default=1)
    ranked = sorted(owners, key=lambda text: (-len(owners[text]), unusual[text]))[: most + 1]
    return [max(ranked, key=lambda text: len(owners[text]) - (patient in owners[text])) for patient in patients]


def _unusual_length(texts: Sequence[str]) -> np.ndarray:
    """How far each text's number of words is from their mean."""
    lengths = np.array([len(text.split()) for text in texts], dtype=np.float64)
    return np.abs(lengths - lengths.mean()) if len(lengths) else lengths


def nearest_prior_reports(references: Sequence[str], labels: np.ndarray, patients: Sequence[Any]) -> list[str]:
    """For each sample the report of another patient whose labels (N, L) lie nearest to the labels' frequencies.

    By Euclidean distance; of equals the one whose length is nearest to the mean. It is the most typical report by its
    findings. With a single patient, the patient's own.
    """
    labels = np.asarray(labels, dtype=np.float64)
    distance = np.linalg.norm(labels - labels.mean(axis=0), axis=1).round(9)
    order = np.lexsort((_unusual_length(references), distance))
    best = int(order[0])
    other = next((int(k) for k in order if patients[k] != patients[best]), best)
    return [references[best if patient != patients[best] else other] for patient in patients]


def exchanged_reports(predictions: Sequence[str], patients: Sequence[Any], seed: int = 0) -> list[str]:
    """Each sample's prediction replaced by one for another patient: what the same texts score on the wrong volumes.

    Patient p's k-th prediction becomes the k-th (modulo their number) of one other patient. Raises ValueError for a
    single patient.
    """
    texts: dict[Any, list[str]] = defaultdict(list)
    for text, patient in zip(predictions, patients, strict=True):
        texts[patient].append(text)
    if len(texts) < 2:
        raise ValueError("Predictions can be exchanged between patients where there are at least two.")
    order = sorted(texts)
    random.Random(seed).shuffle(order)
    donor = dict(zip(order, order[1:] + order[:1], strict=True))
    seen: Counter[Any] = Counter()
    exchanged = []
    for patient in patients:
        others = texts[donor[patient]]
        exchanged.append(others[seen[patient] % len(others)])
        seen[patient] += 1
    return exchanged


# --- template collapse --------------------------------------------------------------------------------------------


def template_collapse(texts: Sequence[str]) -> dict[str, Any]:
    """Signs that a system writes one text whatever it sees.

    Returns `distinct_ratio` (different texts / texts, white space aside), `most_frequent` (the share of the commonest
    text), `template` (the longest run of words that at least half of the texts contain) and `loop` (the longest run that
    one text contains twice), each run with its length in `words` and its `text`; loops with the text's `index`.
    Words are split at white space, in lower case.
    """
    words = [text.lower().split() for text in texts]
    counts = Counter(map(tuple, words))
    return {
        "distinct_ratio": len(counts) / len(texts) if texts else None,
        "most_frequent": max(counts.values()) / len(texts) if texts else None,
        "template": _longest_shared(words, max(2, -(-len(words) // 2))),
        "loop": _longest_loop(words),
    }


class _Runs:
    """Names for all runs of n words in a list of texts, by doubling: a run of 2k is a pair of runs of k."""

    def __init__(self, texts: Sequence[Sequence[str]]):
        vocabulary: dict[str, int] = {}
        codes = [vocabulary.setdefault(word, len(vocabulary)) for text in texts for word in text]
        lengths = [len(text) for text in texts]
        self.starts = np.repeat(np.arange(len(texts)), lengths)  # the text of each word
        self.left = np.concatenate([np.arange(n, 0, -1) for n in lengths] or [np.zeros(0, int)])  # words to its end
        self.levels = [np.asarray(codes, dtype=np.int64)]  # of runs of 1, 2, 4, … words

    def of_length(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Where runs of n words start, and a number for each that equal runs share."""
        power = n.bit_length() - 1
        while len(self.levels) <= power:
            self.levels.append(self._pair(self.levels[-1], 1 << (len(self.levels) - 1)))
        places = np.flatnonzero(self.left >= n)
        names = self.levels[power]
        return places, _number(names[places], names[places + n - (1 << power)])

    def _pair(self, names: np.ndarray, step: int) -> np.ndarray:
        paired = np.full(len(names), -1, dtype=np.int64)
        places = np.flatnonzero(self.left >= 2 * step)
        paired[places] = _number(names[places], names[places + step])
        return paired


def _number(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Small numbers for pairs, the same for equal pairs."""
    if not len(first):
        return np.zeros(0, dtype=np.int64)
    return np.unique(first * (second.max() + 1) + second, return_inverse=True)[1].ravel()


def _longest(limit: int, holds: Callable[[int], Any]) -> tuple[int, Any]:
    """The largest n ≤ limit for which `holds(n)` is not None, and its result; what holds for n holds for less."""
    low, high, found = 0, limit, None
    while low < high:
        middle = (low + high + 1) // 2
        result = holds(middle)
        if result is None:
            high = middle - 1
        else:
            low, found = middle, result
    return low, found


def _longest_shared(texts: Sequence[Sequence[str]], at_least: int) -> dict[str, Any]:
    runs = _Runs(texts)

    def shared(n: int) -> int | None:
        places, names = runs.of_length(n)
        if not len(places):
            return None
        counts = np.bincount(np.unique(names * len(texts) + runs.starts[places]) // len(texts))  # once a text
        return int(places[np.argmax(names == counts.argmax())]) if counts.max() >= at_least else None

    words, place = _longest(max(map(len, texts), default=0), shared)
    flat = [word for text in texts for word in text]
    return {"words": words, "text": " ".join(flat[place : place + words]) if words else ""}


def _longest_loop(texts: Sequence[Sequence[str]]) -> dict[str, Any]:
    best = {"words": 0, "text": "", "index": None}
    for index, text in enumerate(texts):
        runs = _Runs([text])
        if _repeated(runs, best["words"] + 1) is not None:
            words, place = _longest(len(text) - 1, partial(_repeated, runs))
            best = {"words": words, "text": " ".join(text[place : place + words]), "index": index}
    return best


def _repeated(runs: _Runs, n: int) -> int | None:
    """Where a run of n words starts that occurs more than once."""
    places, names = runs.of_length(n)
    counts = np.bincount(names) if len(names) else np.zeros(1)
    return int(places[np.argmax(names == counts.argmax())]) if counts.max() > 1 else None


# --- subgroups ----------------------------------------------------------------------------------------------------

SUBGROUP_COLUMNS = ("sex", "age", "scanner", "kernel")
AGE_BANDS = ((0, 40, "under 40"), (40, 60, "40 to 59"), (60, 75, "60 to 74"), (75, 200, "75 and over"))
UNKNOWN = "unknown"
SMALL_GROUPS = "small groups together"
_VOLUME = re.compile(r"((?:train|valid)_\d+_[a-z]+)(?:_(\d+))?(?![\da-z])")


def read_subgroups(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The subgroup of each row by CT-RATE's metadata CSV: "sex", "age", "scanner" and "kernel" → one value a row.

    A row's volume is read from its `volume` or `id`; where they name a scan only, its first reconstruction in the table
    counts. What the table lacks is "unknown". Raises FileNotFoundError, or ValueError for a table without VolumeName.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected CT-RATE's metadata, e.g. validation_metadata.csv.")
    with open_csv(path) as reader:
        if "VolumeName" not in (reader.fieldnames or ()):
            raise ValueError(f"{path}: no column VolumeName; its columns are {reader.fieldnames}.")
        volumes: dict[str, dict[str, str]] = {}
        for line in reader:
            name = _VOLUME.search(line["VolumeName"])
            if name:
                values = _subgroup_values(line)
                volumes.setdefault(name[1], values)
                volumes[name[0]] = values
    nothing = dict.fromkeys(SUBGROUP_COLUMNS, UNKNOWN)
    found = [volumes.get(_row_volume(row, volumes), nothing) for row in rows]
    return {column: [values[column] for values in found] for column in SUBGROUP_COLUMNS}


def _row_volume(row: Mapping[str, Any], volumes: Mapping[str, Any]) -> str | None:
    names = [_VOLUME.search(str(row.get(field) or "")) for field in ("volume", "id", "scan_id")]
    candidates = [name[0] for name in names if name] + [name[1] for name in names if name]
    return next((name for name in candidates if name in volumes), None)


def _subgroup_values(line: Mapping[str, str]) -> dict[str, str]:
    scanner = " ".join(filter(None, (line.get("Manufacturer", ""), line.get("ManufacturerModelName", ""))))
    return {
        "sex": (line.get("PatientSex") or "").strip() or UNKNOWN,
        "age": _age_band(line.get("PatientAge") or ""),
        "scanner": scanner.strip() or UNKNOWN,
        # Some are lists: "['Br40f', '3']".
        "kernel": " ".join(re.findall(r"[^\s,'\"\[\]]+", line.get("ConvolutionKernel") or "")) or UNKNOWN,
    }


def _age_band(age: str) -> str:
    """The band of DICOM's age ("036Y"; months, weeks and days are under 1)."""
    match = re.fullmatch(r"\s*(\d+)(?:\.\d+)?\s*([YMWD]?)\s*", age.upper())
    if match is None:
        return UNKNOWN
    years = int(match[1]) if match[2] in ("Y", "") else 0
    return next((name for low, high, name in AGE_BANDS if low <= years < high), UNKNOWN)


def subgroup_table(
    metrics: Mapping[str, SampledMetric],
    patients: Sequence[Any],
    groups: Mapping[str, Sequence[str]],
    *,
    smallest: int = 10,
    intervals: bool = True,
) -> list[dict[str, Any]]:
    """The figures and their intervals in every subgroup of at least `smallest` samples, largest first.

    `groups` as `read_subgroups` gives them; without `intervals` all of them are None. Rows hold `by`, `group`, `count`,
    `patients`, and name → {value, interval}. Smaller groups are put together as SMALL_GROUPS; a column that has no other is
    left out.
    """
    table = []
    for column, values in groups.items():
        sizes = Counter(values)
        names = np.array([value if sizes[value] >= smallest else SMALL_GROUPS for value in values], dtype=object)
        if set(names) == {SMALL_GROUPS}:
            continue
        for name, count in Counter(names.tolist()).most_common():
            index = np.flatnonzero(names == name)
            chosen = [patients[k] for k in index]
            some = {key: metric.take(index) for key, metric in metrics.items()}
            drawn = patient_intervals(some, chosen) if intervals else dict.fromkeys(some)
            figures = {key: {"value": some[key].value(), "interval": drawn[key]} for key in some}
            table.append({"by": column, "group": name, "count": count, "patients": len(set(chosen)), **figures})
    return table
