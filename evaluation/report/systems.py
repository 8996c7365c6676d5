"""Evaluated systems: predictions, scores and a judge's scores, loaded from the files of an evaluation."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from samf.data.schema import JsonObject
from samf.evaluation.answering.answer_folder import answer_statistics
from samf.evaluation.judge import judged_rows
from samf.evaluation.prediction_rows import read_predictions
from samf.evaluation.schema import JudgeResults, JudgeTaskScores, PredictionRow, Results
from samf.evaluation.scoring import score_predictions
from samf.evaluation.scoring_options import ScoringOptions
from samf.utils.text_files import read_text

logger = logging.getLogger(__name__)

# Entries of results.json that can't be computed from the predictions.
_TAKEN_OVER: tuple[Literal["model", "generation", "position_bias"], ...] = ("model", "generation", "position_bias")


@dataclass(frozen=True)
class System:
    """An evaluated system.

    Attributes:
        name: name in tables and plots.
        rows: its predictions.
        results: their scores.
        judge: the judge's scores of these predictions, if there are any.
    """

    name: str
    rows: Sequence[PredictionRow]
    results: Results
    judge: JudgeResults | None = None

    def judged(self, task: str) -> JudgeTaskScores | None:
        """Return the judge's scores of a task; None where there are none."""
        return self.judge["tasks"].get(task) if self.judge else None


def load_system(
    name: str,
    path: str | os.PathLike[str],
    judge: str | os.PathLike[str] | None = None,
    options: ScoringOptions | None = None,
    **changes: Any,
) -> System:
    """Read and score a predictions file.

    `model`, `generation` and `position_bias` are taken over from the results.json in the same folder if it belongs to the
    same predictions; `answers` holds token counts and times by task. What belongs to other predictions is left out, with a
    note.

    Args:
        name: name of the system.
        path: predictions.jsonl.
        judge: a judge.json; default: the one in the same folder, if any. Scores of rows that aren't in the file are ignored.
        options: the options of scoring; None = the defaults.
        changes: fields of `options` by name.

    Raises:
        FileNotFoundError: there is no predictions file, or no `judge` of the given name.
        ValueError: a file can't be read, or the given `judge` belongs to other predictions.
    """
    path = Path(path)
    rows = read_predictions(path)
    notes: dict[str, str] = {}
    judged = _load_judged(path, judge, rows, notes)  # first, since scoring takes minutes
    results = score_predictions(path, options, **changes)
    results["notes"] |= notes
    before = _previous_results(path, rows, results)
    for key in _TAKEN_OVER:
        if key in before:
            results[key] = before[key]
    results["answers"] = before.get("generation", {}).get("tasks") or answer_statistics(rows)
    return System(name, rows, results, judged)


def _previous_results(path: Path, rows: Sequence[PredictionRow], results: Results) -> JsonObject:
    """Return the results.json in a predictions file's folder; {} with a note if it belongs to other predictions.

    Older versions don't identify their predictions: then their number must agree, and a note says so.
    """
    file, notes = path.with_name("results.json"), results["notes"]
    before = _read_json(file) or {}
    if not any(name in before for name in _TAKEN_OVER):
        return {}
    digest, generation = before.get("predictions_digest"), before.get("generation") or {}
    if digest == results["predictions_digest"]:
        return before
    if digest is None and generation.get("written", 0) + generation.get("resumed", 0) == len(rows):
        notes["results.json"] = f"doesn't identify its answers; their number, {len(rows)}, agrees."
        return before
    notes["results.json"] = "is of other answers than these; its statistics of generation are not shown."
    logger.warning("%s belongs to other predictions than %s; it is not used.", file, path)
    return {}


def _load_judged(
    path: Path, judge: str | os.PathLike[str] | None, rows: Sequence[PredictionRow], notes: dict[str, str]
) -> JudgeResults | None:
    """Return the judge's scores of `rows`; None, with a note, where a judge.json of the default name is of other rows."""
    file = Path(judge) if judge else path.with_name("judge.json")
    scores = _read_json(file)
    if scores is None:
        if judge:
            raise FileNotFoundError(f"{file}: no such file; expected the judge.json that samf.evaluation.judge writes.")
        return None
    try:
        judged = judged_rows(cast(JudgeResults, scores), rows)
    except ValueError as error:
        raise ValueError(f"{file}: {error} Run the judge again, or move the file away.") from error
    if judged is None:
        message = f"{file}: its scores are of other answers than {path}."
        if judge:
            raise ValueError(f"{message} Name the judge.json of this file.")
        logger.warning("%s They are not used.", message)
        notes["judge.json"] = "its scores are of other answers than these; they are not shown."
    return judged


def _read_json(path: Path) -> JsonObject | None:
    """Return the object in a JSON file; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); write it again, or move it away.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: a JSON {type(content).__name__}; expected an object. Write it again, or move it away."
        )
    return content
