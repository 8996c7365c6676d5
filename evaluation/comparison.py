"""Test whether two systems differ on the records that both have answered."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from samf.data.schema import TASKS, Task
from samf.evaluation.metric_samples import MetricSampler
from samf.evaluation.metrics.sampled_metric import patient_keys, unknown_patients
from samf.evaluation.metrics.significance import paired_randomisation
from samf.evaluation.prediction_rows import PredictionsError, PredictionSource, load_rows
from samf.evaluation.schema import Comparison, Difference, PredictionRow
from samf.evaluation.scoring_options import ScoringOptions, choose_options

__all__ = ["PERMUTATIONS", "compare_predictions"]

PERMUTATIONS = 10_000

_Key: TypeAlias = tuple[Task, str | int | None]


def compare_predictions(
    first: PredictionSource,
    second: PredictionSource,
    options: ScoringOptions | None = None,
    *,
    permutations: int = PERMUTATIONS,
    **changes: Any,
) -> Comparison:
    """Compare two systems by paired randomisation over patients.

    Records are matched by task and id; of a repeated id the first row counts. The p-values are of single metrics and
    uncorrected: with many of them, some are small by chance.

    Args:
        first: a predictions file, or its rows.
        second: those of the other system; differences are second - first.
        options: the options of scoring; baselines and subgroups are not computed.
        permutations: of the test.
        changes: fields of `options` by name, e.g. `labeller="radbert"`.

    Raises:
        PredictionsError: no record is in both, a record has another reference in the second, or rows can't be read.
        ValueError, FileNotFoundError, ImportError: see `ScoringOptions.check`.
    """
    options = choose_options(options, changes)
    options.check()
    sampler = MetricSampler(options)
    rows = [_by_id(load_rows(source)[0]) for source in (first, second)]
    common = [key for key in rows[0] if key in rows[1] and str(rows[0][key]["reference"]).strip()]
    if not common:
        raise PredictionsError("No record is in both prediction files; they are matched by task and id.")
    _check_references(common, *rows)
    tasks: dict[str, dict[str, Difference]] = {}
    for task in TASKS:
        keys = [key for key in common if key[0] == task]
        if keys:
            pair = [[system[key] for key in keys] for system in rows]
            samples = [sampler.task_samples(task, chosen) for chosen in pair]
            patients = patient_keys(pair[0])
            tasks[task] = paired_randomisation(
                samples[0], samples[1], patients, resamples=permutations, seed=options.seed
            )
    return {
        "matched": len(common),
        "only_first": len(rows[0].keys() - rows[1].keys()),
        "only_second": len(rows[1].keys() - rows[0].keys()),
        "permutations": permutations,
        "unknown_patients": unknown_patients([rows[0][key] for key in common]),
        "tasks": tasks,
        "not_available": dict(sampler.failed),
    }


def _by_id(rows: Iterable[PredictionRow]) -> dict[_Key, PredictionRow]:
    found: dict[_Key, PredictionRow] = {}
    for row in rows:
        if row.get("id") is not None:
            found.setdefault((row["task"], row["id"]), row)
    return found


def _check_references(
    keys: Sequence[_Key], first: Mapping[_Key, PredictionRow], second: Mapping[_Key, PredictionRow]
) -> None:
    for key in keys:
        if str(first[key]["reference"]).strip() != str(second[key]["reference"]).strip():
            raise PredictionsError(
                f"{key[0]} {key[1]!r} has another reference in the second file; the two are not of the same data."
            )
