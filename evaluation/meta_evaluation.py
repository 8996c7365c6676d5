"""How reliable the metrics themselves are: the numbers of docs/results/metrics.md, on any labelled reports.

    python -m samf.evaluation.meta_evaluation labeller reports.csv --from 100     # the labeller against given labels
    python -m samf.evaluation.meta_evaluation sentences tests/evaluation/labeller_sentences.txt  # and labelled sentences
    python -m samf.evaluation.meta_evaluation perturbations reports.csv           # which metrics detect which error
    python -m samf.evaluation.meta_evaluation coverage                            # how often intervals contain the truth
    python -m samf.evaluation.meta_evaluation predictions reports.csv --count 3039 --output predictions.jsonl

`reports.csv` has a column `report_text`, and for `labeller` a column of 0 and 1 for each of CT-RATE's 18 labels, as
CT-RATE's table of 200 labelled reports. The last command writes predictions of the usual length, mixed from the sentences of
the reports, to measure the time that scoring takes.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from sklearn.metrics import f1_score, precision_score, recall_score

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.evaluation.json_lines import json_line
from samf.evaluation.markdown import TEXT_NAMES, format_value, markdown_table
from samf.evaluation.metrics.bootstrap import patient_intervals
from samf.evaluation.metrics.clinical_metrics import confusion_counts, finding_samples, make_labeller, micro_metrics
from samf.evaluation.metrics.interval_coverage import COHORTS, METHODS, SIZES, coverage_table
from samf.evaluation.metrics.labelled_sentences import read_labelled_sentences, sentence_table
from samf.evaluation.metrics.report_sizes import find_lengths
from samf.evaluation.metrics.sampled_metric import SampledMetric
from samf.evaluation.metrics.text_metrics import text_samples
from samf.evaluation.schema import PredictionRow
from samf.utils.files import atomic_write
from samf.utils.text_files import open_csv

_TEXT = "report_text"

# --- Perturbed reports ------------------------------------------------------------------------------------------

_SENTENCE = re.compile(r"(?<=\.)\s+")
_NEGATION = re.compile(r"\b(?:not |no (?=\w))", re.IGNORECASE)
_VERB = re.compile(r"\b(is|are|was|were)\b(?! not)")
_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def flip_negations(report: str) -> str:
    """Negate each sentence of a report, or remove its negation: "was not observed" ↔ "was observed"."""
    return " ".join(_flip(sentence) for sentence in _SENTENCE.split(report))


def _flip(sentence: str) -> str:
    if _NEGATION.search(sentence):
        return _NEGATION.sub("", sentence)
    return _VERB.sub(r"\1 not", sentence, count=1)


def swap_sides(report: str) -> str:
    """Exchange left and right in a report."""
    return _SIDE.sub(lambda m: "right" if m[0].lower() == "left" else "left", report)


def change_sizes(report: str) -> str:
    """Triple every length in mm or cm in a report."""
    pieces, end = [], 0
    for length in find_lengths(report):
        number = report[length.start : length.end].replace(",", ".")
        pieces += [report[end : length.start], f"{3 * float(number):g}"]
        end = length.end
    return "".join([*pieces, report[end:]])


PERTURBATIONS: dict[str, Callable[[str], str]] = {
    "negations flipped": flip_negations,
    "sides swapped": swap_sides,
    "sizes tripled": change_sizes,
}
UNCHANGED, EXCHANGED = "unchanged", "another patient's"


def _perturbed(reports: Sequence[str]) -> dict[str, list[str]]:
    """Return predictions for these references by kind of error.

    They are the references themselves, the references with one kind of error each, and the report of the next patient.
    """
    changed = {name: [change(report) for report in reports] for name, change in PERTURBATIONS.items()}
    return {UNCHANGED: list(reports), **changed, EXCHANGED: [*reports[1:], *reports[:1]]}


def perturbation_scores(reports: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Return the value of each metric ("bleu_1", "macro.f1", "crg", "sides.f1", …) by kind of error."""
    scores = {}
    for kind, texts in _perturbed(reports).items():
        samples = {**text_samples(texts, reports), **finding_samples(texts, reports)}
        scores[kind] = {name: metric.value() for name, metric in samples.items() if "per_finding" not in name}
    return scores


_COLUMNS = ("bleu_1", "mean_bleu_1", "bleu_4", "meteor", "rouge_l", "cider")
_FINDING_COLUMNS = {
    "macro.f1": "macro-F1",
    "micro.f1": "micro-F1",
    "crg": "CRG",
    "sides.f1": "sides",
    "sizes.f1": "sizes",
}


def _perturbation_table(reports: Sequence[str]) -> str:
    """Return `perturbation_scores` as Markdown."""
    rows = [
        [kind, *(format_value(scores.get(name)) for name in (*_COLUMNS, *_FINDING_COLUMNS))]
        for kind, scores in perturbation_scores(reports).items()
    ]
    return markdown_table(["predictions", *(TEXT_NAMES[c] for c in _COLUMNS), *_FINDING_COLUMNS.values()], rows)


# --- The labeller -----------------------------------------------------------------------------------------------


def _labeller_table(truth: np.ndarray, found: np.ndarray, first_untouched: int = 0) -> str:
    """Return precision, recall and F1 of each label as Markdown.

    Args:
        truth: the given labels, (N, 18) of 0 and 1.
        found: the labeller's, (N, 18).
        first_untouched: the first report that the rules were not developed on; the last two columns are of those.
    """
    scores = [score(truth, found, average=None, zero_division=0) for score in (precision_score, recall_score, f1_score)]
    rest = f1_score(truth[first_untouched:], found[first_untouched:], average=None, zero_division=0)
    positives, positives_rest = truth.sum(axis=0), truth[first_untouched:].sum(axis=0)
    rows = [
        [name, positives[k], *(format_value(score[k]) for score in scores), positives_rest[k], format_value(rest[k])]
        for k, name in enumerate(CT_RATE_LABELS)
    ]
    for name, least in (("**macro**", 1), ("**macro, labels with at least 10 positives**", 10)):
        enough, enough_rest = positives >= least, positives_rest >= least
        means = [_mean(score[enough]) for score in scores]
        rows.append([name, "", *map(format_value, means), "", format_value(_mean(rest[enough_rest]))])
    header = ["label", f"positives of {len(truth)}", "precision", "recall", "F1"]
    return markdown_table([*header, f"positives of the last {len(truth[first_untouched:])}", "F1 there"], rows)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


# --- Intervals --------------------------------------------------------------------------------------------------

_PATIENTS, _UNIT_COHORTS = 200, 1200
_OWNERS = np.repeat(np.arange(_PATIENTS), np.arange(_PATIENTS) % 4 + 1)  # (N,), 1 to 4 samples per patient
Simulation: TypeAlias = Callable[[np.random.Generator], tuple[SampledMetric, float]]


def simulated_mean(rng: np.random.Generator) -> tuple[SampledMetric, float]:
    """Return a mean over a simulated cohort, and the true mean: values around 0.4 that vary mostly between patients."""
    values = rng.normal(0.4, 0.3, size=_PATIENTS)[_OWNERS] + rng.normal(0, 0.1, size=len(_OWNERS))
    return SampledMetric.mean(values, bounds=None), 0.4


def simulated_f1(rng: np.random.Generator) -> tuple[SampledMetric, float]:
    """Return the F1 over a simulated cohort, and the true F1.

    Labels have frequency 0.3, and are found with specificity 0.9 and a sensitivity of 0.7 that varies between patients.
    """
    truth = rng.random((len(_OWNERS), 6)) < 0.3
    sensitivity = rng.beta(3.5, 1.5, size=_PATIENTS)[_OWNERS, None]
    found = rng.random(truth.shape) < np.where(truth, sensitivity, 0.1)
    metric = micro_metrics(confusion_counts(truth, found))["f1"]
    return metric, 2 * 0.3 * 0.7 / (2 * 0.3 * 0.7 + 0.7 * 0.1 + 0.3 * 0.3)


_SIMULATIONS: dict[str, Simulation] = {"a mean": simulated_mean, "an F1": simulated_f1}


def coverage(simulate: Simulation, *, by_patient: bool = True, cohorts: int = _UNIT_COHORTS, seed: int = 1) -> float:
    """Return the share of simulated cohorts whose 95 % interval contains the true value.

    Args:
        simulate: draws a cohort.
        by_patient: patients are the units of the interval; False: samples are.
        cohorts: the number of cohorts.
        seed: of the cohorts.
    """
    rng = np.random.default_rng(seed)
    simulated = [simulate(rng) for _ in range(cohorts)]
    metrics = {str(number): metric for number, (metric, _) in enumerate(simulated)}
    units = _OWNERS if by_patient else np.arange(len(_OWNERS))
    intervals = patient_intervals(metrics, units.tolist())
    covered = [
        interval is not None and interval[0] <= truth <= interval[1]
        for interval, (_, truth) in zip(intervals.values(), simulated, strict=True)
    ]
    return float(np.mean(covered))


# --- Predictions of the usual length ----------------------------------------------------------------------------


def _mixed_predictions(reports: Sequence[str], count: int, seed: int = 0) -> list[PredictionRow]:
    """Return rows of a predictions file whose references and predictions share about half of their sentences.

    Args:
        reports: give the sentences, and the distribution of lengths.
        count: the number of rows; their names are in CT-RATE's style, with one to three volumes per patient.
        seed: of the sentences and lengths.
    """
    rng = np.random.default_rng(seed)
    sentences = [sentence for report in reports for sentence in _SENTENCE.split(report)]
    lengths = [len(_SENTENCE.split(report)) for report in reports]
    rows: list[PredictionRow] = []
    patient = 0
    while len(rows) < count:
        patient += 1
        for number in range(1, rng.integers(1, 4) + 1):
            drawn = rng.choice(len(sentences), size=2 * rng.choice(lengths), replace=False)
            half = len(drawn) // 2
            reference, prediction = drawn[:half], [*drawn[: half // 2], *drawn[half : 2 * half - half // 2]]
            name = f"valid_{patient}_a_{number}"
            rows.append(
                {
                    "id": name,
                    "scan_id": f"valid_{patient}_a",
                    "task": "report",
                    "volume": f"{name}.nii.gz",
                    "reference": " ".join(sentences[k] for k in reference),
                    "prediction": " ".join(sentences[k] for k in prediction),
                }
            )
    return rows[:count]


# --- Command line -----------------------------------------------------------------------------------------------


def _read_reports(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a CSV with a column `report_text` and the given others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or there are no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a CSV with a column {_TEXT}.")
    with open_csv(path) as reader:
        lacking = [name for name in (_TEXT, *columns) if name not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(f"{path}: lacks the columns {', '.join(lacking)}; it has {reader.fieldnames}.")
        rows = list(reader)
    if not rows:
        raise ValueError(f"{path}: contains no reports; expected one per row.")
    return rows


def _labeller(args: argparse.Namespace) -> str:
    rows = _read_reports(args.reports, CT_RATE_LABELS)
    truth = np.array([[int(float(row[label])) for label in CT_RATE_LABELS] for row in rows])
    found = make_labeller(args.labeller)([row[_TEXT] for row in rows])
    return _labeller_table(truth, found, args.first_untouched)


def _sentences(args: argparse.Namespace) -> str:
    return sentence_table(read_labelled_sentences(args.sentences))


def _perturbations(args: argparse.Namespace) -> str:
    return _perturbation_table([row[_TEXT] for row in _read_reports(args.reports)])


def _predictions(args: argparse.Namespace) -> str:
    rows = _mixed_predictions([row[_TEXT] for row in _read_reports(args.reports)], args.count, args.seed)
    atomic_write(args.output, "".join(json_line(row) for row in rows))
    words = np.mean([len(row["prediction"].split()) for row in rows])
    patients = len({row["scan_id"] for row in rows})
    return f"{len(rows)} predictions of {words:.0f} words on average, {patients} patients: {args.output}"


def _coverage(args: argparse.Namespace) -> str:
    if min(*args.patients, args.cohorts) < 2:
        raise ValueError("coverage needs at least two patients and two cohorts.")
    tables = [coverage_table(args.patients, args.cohorts, args.method)]
    if args.method == "jackknife":
        rows = [
            [name, *(format_value(coverage(simulate, by_patient=by)) for by in (True, False))]
            for name, simulate in _SIMULATIONS.items()
        ]
        tables.append(
            markdown_table([f"{_UNIT_COHORTS} cohorts of {_PATIENTS} patients", "by patient", "by sample"], rows)
        )
    return "\n\n".join(tables)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], str], what: str, *, reads: bool = True
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what)
        command.set_defaults(run=run)
        if reads:
            command.add_argument("reports", type=Path, help=f"CSV with a column {_TEXT}")
        return command

    labeller = add("labeller", _labeller, "each label's precision, recall and F1 against given labels")
    labeller.add_argument("--labeller", default="rules", help="rules, radbert, or a path of RadBertClassifier.pth")
    labeller.add_argument("--from", dest="first_untouched", type=int, default=0, help="number of the first test report")
    sentences = add(
        "sentences", _sentences, "the labeller's precision and recall on sentences with labels", reads=False
    )
    sentences.add_argument("sentences", type=Path, help="lines of: manner | part | findings | lengths in mm | sentence")
    add("perturbations", _perturbations, "which metrics detect flipped negations, swapped sides and changed sizes")
    simulated = add("coverage", _coverage, "how often 95 %% intervals contain the true value", reads=False)
    simulated.add_argument("--patients", type=int, nargs="+", default=SIZES, help="sizes of the simulated cohorts")
    simulated.add_argument("--cohorts", type=int, default=COHORTS, help="simulated cohorts of each size")
    simulated.add_argument("--method", choices=METHODS, default="jackknife", help="jackknife is what results have")
    predictions = add("predictions", _predictions, "a predictions.jsonl of the usual length, to time scoring with")
    predictions.add_argument("--count", type=int, default=3039, help="predictions; CT-RATE's validation part has 3,039")
    predictions.add_argument("--seed", type=int, default=0)
    predictions.add_argument("--output", type=Path, required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and print its table."""
    args = _parser().parse_args(argv)
    try:
        sys.stdout.write(f"{args.run(args)}\n")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"meta_evaluation: {error}")


if __name__ == "__main__":
    main()
