"""Score a predictions.jsonl of any system, or test two of them against each other.

    python -m samf.evaluation.scoring runs/samf/predictions.jsonl --output runs/samf/results.json
    python -m samf.evaluation.scoring runs/ao2d/predictions.jsonl --against runs/samf/predictions.jsonl

Each line is one JSON object with `id`, `scan_id`, `task`, `question`, `choices`, `reference` and `prediction`; only `task`,
`reference` and `prediction` (and `choices` for multiple choice) are required. `patient_id`, and `volume`, `tokens` and
`truncated`, which eval.py adds, are used where they are present.

Special cases: an empty prediction scores 0 and stays in every mean. A repeated id is scored again and counted. A line
without id and scan_id is scored, and counts as a patient of its own in the intervals. A line with an empty reference can't
be scored: it is left out, and counted among the cohort's exclusions.
"""

import argparse
import hashlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samf.data.schema import TASKS
from samf.evaluation.cohort import RECORD_COUNTS, count_rows, describe_cohort, read_exclusions, read_left_out
from samf.evaluation.comparison import PERMUTATIONS, compare_predictions
from samf.evaluation.metric_samples import MetricSampler
from samf.evaluation.metrics.bootstrap import INTERVAL_METHOD, LEVEL, RESAMPLES
from samf.evaluation.metrics.clinical_metrics import score_findings
from samf.evaluation.metrics.report_readings import reading_in_background
from samf.evaluation.metrics.sampled_metric import unknown_patients
from samf.evaluation.metrics.text_tables import forget_tables
from samf.evaluation.prediction_rows import (
    FIELDS,
    PredictionsError,
    PredictionSource,
    load_rows,
    predictions_digest,
    read_predictions,
)
from samf.evaluation.results_table import comparison_table, markdown_table, results_table
from samf.evaluation.schema import Comparison, PredictionRow, Results, Statistics, TaskScores
from samf.evaluation.scoring_options import ScoringOptions, choose_options, scoring_parser
from samf.evaluation.task_scores import score_task
from samf.utils.files import atomic_write, write_json

__all__ = [
    "FIELDS",
    "PERMUTATIONS",
    "RECORD_COUNTS",
    "RESAMPLES",
    "TASKS",
    "PredictionsError",
    "ScoringOptions",
    "compare_predictions",
    "markdown_table",
    "predictions_digest",
    "read_predictions",
    "results_table",
    "score_findings",
    "score_predictions",
    "write_results",
]

SCHEMA = 2  # of results.json; increased when a key is removed or changes its meaning

# The libraries that scores are computed with.
_LIBRARIES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "nltk",
    "sacrebleu",
    "rouge-score",
    "rapidfuzz",
    "bert-score",
    "transformers",
    "torch",
)


def score_predictions(
    predictions: PredictionSource,
    options: ScoringOptions | None = None,
    *,
    exclusions: str | os.PathLike[str] | None = None,
    **changes: Any,
) -> Results:
    """Return the scores of every task, with 95 % intervals over patients.

    Args:
        predictions: a predictions file, or its rows.
        options: the options of scoring; None = the defaults.
        exclusions: a failures.jsonl with the records of the cohort that have no prediction; None = the one next to the
            predictions file, if there is one.
        changes: fields of `options` by name, e.g. `labeller="radbert"`.

    Raises:
        PredictionsError: rows that can't be scored.
        ValueError, FileNotFoundError, ImportError: see `ScoringOptions.check`.
    """
    options = choose_options(options, changes)
    options.check()
    rows, source = load_rows(predictions)
    failures, left_out = read_exclusions(exclusions, predictions), read_left_out(predictions)
    scorable = [row for row in rows if str(row["reference"]).strip()]
    if not scorable:
        raise PredictionsError(f"{source}: all {len(rows)} references are empty; there is nothing to compare with.")
    results: Results = {
        "schema": SCHEMA,
        "code": _code_versions(),
        "settings": options.as_settings(),
        "predictions_digest": predictions_digest(rows),
        "counts": count_rows(rows),
        "cohort": describe_cohort(rows, scorable, failures, left_out),
        "tasks": {},
        "statistics": _statistics(scorable, options),
        "not_available": {},
        "notes": {},
    }
    reports = [row[side] for row in scorable if row["task"] == "report" for side in ("prediction", "reference")]
    with reading_in_background(reports):
        _score_tasks(scorable, MetricSampler(options), results)
    forget_tables()
    return results


def _score_tasks(rows: Sequence[PredictionRow], sampler: MetricSampler, results: Results) -> None:
    """Add the scores of each task, what is not available and the notes to `results`."""
    tasks: dict[str, TaskScores] = results["tasks"]
    for task in TASKS:
        chosen = [row for row in rows if row["task"] == task]
        if chosen:
            scored = score_task(task, chosen, sampler)
            tasks[task] = scored.scores
            results["not_available"] |= scored.not_available
            results["notes"] |= {f"{task}: {name}": note for name, note in scored.notes.items()}


def _statistics(rows: Sequence[PredictionRow], options: ScoringOptions) -> Statistics:
    return {
        "unit": "patient",
        "method": INTERVAL_METHOD,
        "level": LEVEL,
        "labeller": options.labeller,
        "intervals": options.resamples > 0,
        "unknown_patients": unknown_patients(rows),
    }


def _code_versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that scores are computed with.

    `source` is a hash of this package's evaluation code, the labeller's included: a checkout has one version number for many
    states of it.
    """
    digest, here = hashlib.sha256(), Path(__file__).parent
    for path in [*sorted(here.rglob("*.py")), *sorted(here.parent.joinpath("model").glob("text_*.py"))]:
        digest.update(path.read_bytes())
    found = {name: _version(name) for name in ("samf", *_LIBRARIES)}
    return {"source": digest.hexdigest()[:12], **{name: version for name, version in found.items() if version}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a checkout that isn't installed
        return None


def write_results(results: Results, path: str | os.PathLike[str]) -> None:
    """Write results as JSON to `path`, and as a Markdown table next to it (same name, .md)."""
    _write(results, results_table(results), path)


def _write(content: Results | Comparison, table: str, path: str | os.PathLike[str]) -> None:
    write_json(path, content)
    atomic_write(Path(path).with_suffix(".md"), table)


# --- Command line -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Score a predictions.jsonl.", parents=[scoring_parser()])
    parser.add_argument("predictions", help="the file to score")
    parser.add_argument("--output", help="results as JSON, with a Markdown table next to it")
    parser.add_argument("--exclusions", help="failures.jsonl of the run; default: the one next to the predictions")
    parser.add_argument("--against", metavar="FILE", help="another system's predictions: test the differences instead")
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS, help="of the test of two systems")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Score a file, or compare two, and print the table."""
    parser = _parser()
    args = parser.parse_args(argv)
    options = ScoringOptions.from_namespace(args)
    if args.against and (args.metadata or args.exclusions):
        parser.error("--metadata and --exclusions have no meaning with --against")
    content: Results | Comparison
    try:
        if args.against:
            content = compare_predictions(args.against, args.predictions, options, permutations=args.permutations)
            table = comparison_table(content, (args.against, args.predictions))
        else:
            content = score_predictions(args.predictions, options, exclusions=args.exclusions)
            table = results_table(content)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"scoring: {error}")
    if args.output:
        _write(content, table, args.output)
    sys.stdout.write(table)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    main()
