"""Describe what a predictions file covers: its counts, and which records were excluded and why."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from samf.data.schema import FAILURES_FILE
from samf.evaluation.metrics.sampled_metric import patient_keys
from samf.evaluation.prediction_rows import PredictionsError, PredictionSource, parse_object, read_json_lines
from samf.evaluation.schema import Cohort, Counts, Exclusion, Failure, PredictionRow
from samf.utils.text_files import TextEncodingError, read_text

__all__ = ["RECORD_COUNTS", "LeftOut", "count_rows", "describe_cohort", "read_exclusions", "read_left_out"]

logger = logging.getLogger(__name__)

# File next to the predictions with the data loader's counts: records that were not asked about at all, by reason.
RECORD_COUNTS = "records.json"
_EMPTY_REFERENCE = "the reference is empty"
_LISTED_IDS = 20


class LeftOut(TypedDict):
    """Records that were not asked about for one reason: an entry of `left_out` in records.json."""

    reason: str
    count: NotRequired[int]
    first: NotRequired[str]  # the first of them


def count_rows(rows: Sequence[PredictionRow]) -> Counts:
    """Count predictions, scans, patients, and repeated or missing ids."""
    ids = Counter(row["id"] for row in rows if row.get("id") is not None)
    duplicates = sum(count - 1 for count in ids.values())
    if duplicates:
        logger.warning("%d predictions repeat the id of an earlier one; all of them are scored.", duplicates)
    return {
        "predictions": len(rows),
        "scans": _count_scans(rows),
        "patients": len(set(patient_keys(rows))),
        "duplicate_ids": duplicates,
        "missing_ids": sum(row.get("id") is None for row in rows),
    }


def _count_scans(rows: Sequence[PredictionRow]) -> int:
    return len({row["scan_id"] for row in rows if row.get("scan_id") is not None})


def read_exclusions(path: str | os.PathLike[str] | None, predictions: PredictionSource) -> list[Failure]:
    """Return the lines of a failures.jsonl.

    Args:
        path: the file; None = the one next to `predictions`, if there is one.
        predictions: a predictions file, or rows, next to which there is no file.

    Raises:
        PredictionsError: the named file doesn't exist, or a file can't be read.
    """
    if path is None:
        if not isinstance(predictions, str | os.PathLike):
            return []
        path = Path(predictions).with_name(FAILURES_FILE)
        if not path.is_file():
            return []
    path = Path(path)
    if not path.is_file():
        raise PredictionsError(f"{path}: no such file; expected the failures.jsonl that eval.py writes.")
    return [row for _, row in read_json_lines(path)]  # type: ignore[misc]  # of any system: missing keys are allowed for


def read_left_out(predictions: PredictionSource) -> list[LeftOut]:
    """Return what the records.json next to a predictions file lists as left out.

    Raises:
        PredictionsError: the file can't be read, or has no such list.
    """
    path = Path(predictions).with_name(RECORD_COUNTS) if isinstance(predictions, str | os.PathLike) else None
    if path is None or not path.is_file():
        return []
    try:
        left_out = parse_object(read_text(path), str(path)).get("left_out")
    except TextEncodingError as error:
        raise PredictionsError(str(error)) from error
    if not isinstance(left_out, list) or not all(map(_is_left_out, left_out)):
        raise PredictionsError(f"{path}: no list `left_out` of reasons and counts; remove it, or run eval.py again.")
    return left_out


def _is_left_out(entry: Any) -> bool:
    return isinstance(entry, dict) and "reason" in entry and isinstance(entry.get("count", 0), int)


def describe_cohort(
    rows: Sequence[PredictionRow],
    scored: Sequence[PredictionRow],
    failures: Sequence[Failure],
    left_out: Sequence[LeftOut] = (),
) -> Cohort:
    """Return what was scored, and what was excluded by reason.

    Args:
        rows: all rows of the predictions file.
        scored: those with a reference.
        failures: records without a prediction; those that have one by now don't count.
        left_out: records that were not asked about.
    """
    answered = {row["id"] for row in rows if row.get("id") is not None}
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not str(row["reference"]).strip():
            reasons.setdefault(_EMPTY_REFERENCE, []).append(str(row.get("id")))
    for failure in failures:
        if failure.get("id") not in answered:
            reason = str(failure.get("error", "no reason given")).split(":")[0]
            reasons.setdefault(f"no prediction: {reason}", []).append(str(failure.get("id")))
    excluded: dict[str, Exclusion] = {
        reason: {"count": len(ids), "ids": ids[:_LISTED_IDS]} for reason, ids in reasons.items()
    }
    for entry in left_out:
        first = [str(entry["first"])] if entry.get("first") else []
        excluded[f"not asked: {entry['reason']}"] = {"count": entry.get("count", 0), "ids": first}
    return {
        "predictions": len(scored),
        "volumes": len({row["volume"] for row in scored if row.get("volume")}) or None,
        "scans": _count_scans(scored),
        "patients": len(set(patient_keys(scored))),
        "excluded": excluded,
    }
