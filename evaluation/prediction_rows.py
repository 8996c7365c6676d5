"""Read predictions files and check the type of each field before anything is computed from it."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from samf.data.schema import TASKS, JsonObject, Record
from samf.evaluation.schema import PredictionRow
from samf.utils.text_files import TextEncodingError, read_lines

__all__ = [
    "FIELDS",
    "PredictionSource",
    "PredictionsError",
    "check_row",
    "first_of_each_task",
    "load_rows",
    "parse_object",
    "predictions_digest",
    "read_json_lines",
    "read_predictions",
]

FIELDS = ("id", "scan_id", "task", "question", "choices", "reference", "prediction")

Row = TypeVar("Row", PredictionRow, Record)
# A predictions file, or its rows.
PredictionSource: TypeAlias = str | os.PathLike[str] | Iterable[PredictionRow]


class PredictionsError(ValueError):
    """A predictions file that can't be scored; the message names the file, the line and the remedy."""


def load_rows(predictions: PredictionSource) -> tuple[list[PredictionRow], str]:
    """Return the checked rows of a predictions file or of a list of rows, and what to call their source in messages.

    Raises:
        PredictionsError: see `read_predictions`.
    """
    if isinstance(predictions, str | os.PathLike):
        return read_predictions(predictions), str(predictions)
    rows = list(predictions)
    for position, row in enumerate(rows):
        check_row(row, f"row {position}")
    if not rows:
        raise PredictionsError("There are no predictions to score.")
    return rows, "the rows"


def read_predictions(path: str | os.PathLike[str]) -> list[PredictionRow]:
    """Return the checked rows of a predictions file.

    Raises:
        PredictionsError: no file, an encoding other than UTF-8 without a byte order mark that names it, no rows, invalid
            JSON, or a field that is missing or of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise PredictionsError(f"{path}: no such file; expected the predictions.jsonl that eval.py writes.")
    rows = read_json_lines(path)
    for number, row in rows:
        check_row(row, f"{path}, line {number}")
    if not rows:
        raise PredictionsError(f"{path}: holds no predictions; expected one JSON object per line.")
    return [cast(PredictionRow, row) for _, row in rows]


def read_json_lines(path: Path) -> list[tuple[int, JsonObject]]:
    """Return the objects of a JSONL file, each with its line number; blank lines are skipped."""
    try:
        lines = read_lines(path)
    except TextEncodingError as error:
        raise PredictionsError(str(error)) from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [(number, parse_object(line, f"{path}, line {number}")) for number, line in numbered]


def parse_object(text: str, source: str) -> JsonObject:
    """Return the JSON object that `text` holds.

    Raises:
        PredictionsError: not JSON, or not an object; the message begins with `source`.
    """
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise PredictionsError(
            f"{source}: not JSON ({error}); expected one object per line. Remove or repair it."
        ) from error
    if not isinstance(row, dict):
        raise PredictionsError(f"{source}: a JSON {type(row).__name__}; expected an object with {', '.join(FIELDS)}.")
    return row


def predictions_digest(rows: Iterable[PredictionRow]) -> str:
    """Return a hash of what was predicted for which record, in any order, by which other files refer to these rows."""
    lines = sorted(json.dumps([row["task"], str(row.get("id")), row["prediction"]]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def first_of_each_task(rows: Iterable[Row], limit: int) -> list[Row]:
    """Return the first `limit` rows of each task, in their order."""
    taken: Counter[str] = Counter()
    chosen = []
    for row in rows:
        taken[row["task"]] += 1
        if taken[row["task"]] <= limit:
            chosen.append(row)
    return chosen


# --- Field types ------------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_int(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


_TEXT, _NAME = "a text", "a text or a whole number"
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task": (_is_text, _TEXT),
    "reference": (_is_text, _TEXT),
    "prediction": (_is_text, _TEXT),
    "question": (_is_text, _TEXT),
    "choices": (_is_text_list, "a list of texts, one for each option"),
    "id": (_is_text_or_int, _NAME),
    "scan_id": (_is_text_or_int, _NAME),
    "patient_id": (_is_text_or_int, _NAME),
    "volume": (_is_text, _TEXT),
    "tokens": (_is_count, "a whole number"),
    "truncated": (_is_bool, "true or false"),
}
_FREE_TEXT = ("reference", "prediction", "question")


def check_row(row: Mapping[str, Any] | PredictionRow, source: str) -> None:
    """Raise PredictionsError unless a row has every field that its task is scored by, each of the right type.

    Args:
        row: what a line of a predictions file holds.
        source: file and line, for the message.
    """
    if not isinstance(row, Mapping):
        raise PredictionsError(f"{source}: a {type(row).__name__}; expected a mapping with {', '.join(FIELDS)}.")
    missing = [name for name in ("task", "reference", "prediction") if row.get(name) is None]
    if row.get("task") == "multiple_choice" and (row.get("choices") is None or row["choices"] in ([], "")):
        missing.append("choices")
    if missing:
        raise PredictionsError(f"{source}: lacks {', '.join(missing)}; expected the fields {', '.join(FIELDS)}.")
    for name, (fits, expected) in _TYPES.items():
        value = row.get(name)
        if value is not None and not fits(value):
            raise PredictionsError(
                f"{source}: {name} is {_describe(value)}; expected {expected}.{_remedy(name, value)}"
            )
    if row["task"] not in TASKS:
        raise PredictionsError(f"{source}: task {row['task']!r} is unknown; expected one of {', '.join(TASKS)}.")
    for name in _FREE_TEXT:
        _check_characters(str(row.get(name) or ""), f"{source}: {name}")


def _check_characters(text: str, source: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PredictionsError(
            f"{source} holds half of a surrogate pair (character {error.start + 1}), which UTF-8 can't encode; export the "
            "text again from its source."
        ) from error


def _describe(value: Any) -> str:
    """Describe a value by its type only: texts may contain patient data, which must not appear in a log."""
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"the number {value:g}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return f"the number {value}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    names: dict[type, str] = {str: "a text", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _remedy(name: str, value: Any) -> str:
    if name not in _FREE_TEXT:
        return ""
    if isinstance(value, float) and math.isnan(value):
        return " An empty table cell is read as NaN: write \"\" for an empty text, e.g. with pandas' fillna('')."
    if isinstance(value, list | tuple):
        return " Each row has one reference and one prediction: write a row for each, or choose one."
    return ""
