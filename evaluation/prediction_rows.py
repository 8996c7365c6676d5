"""Rows of a predictions file: reading them, and checking each field's type before anything is computed from it."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from samf.data.schema import TASKS
from samf.utils.text_files import TextEncodingError, read_lines

FIELDS = ("id", "scan_id", "task", "question", "choices", "reference", "prediction")


class PredictionsError(ValueError):
    """A predictions file that can't be scored; the message names the file, the line and the remedy."""


def read_predictions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of a predictions file.

    Raises:
        PredictionsError: no file, another encoding than UTF-8 without a byte order mark that names it, no rows, bad JSON,
            or a field that is missing or of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise PredictionsError(f"{path}: no such file; expected the predictions.jsonl that eval.py writes.")
    rows = read_json_lines(path)
    for number, row in rows:
        check_row(row, f"{path}, line {number}")
    if not rows:
        raise PredictionsError(f"{path}: holds no predictions; expected one JSON object a line.")
    return [row for _, row in rows]


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the objects of a JSONL file, each with its line's number; blank lines are passed over."""
    try:
        lines = read_lines(path)
    except TextEncodingError as error:
        raise PredictionsError(str(error)) from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [(number, parse_object(line, f"{path}, line {number}")) for number, line in numbered]


def parse_object(text: str, place: str) -> dict[str, Any]:
    """Return a JSON object. Raises PredictionsError, which names `place`, for anything else."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise PredictionsError(
            f"{place}: not JSON ({error}); expected one object a line. Remove or repair it."
        ) from error
    if not isinstance(row, dict):
        raise PredictionsError(f"{place}: a JSON {type(row).__name__}; expected an object with {', '.join(FIELDS)}.")
    return row


# --- types --------------------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


_TEXT, _NAME = "a text", "a text or a whole number"
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task": (_is_text, _TEXT),
    "reference": (_is_text, _TEXT),
    "prediction": (_is_text, _TEXT),
    "question": (_is_text, _TEXT),
    "choices": (_is_texts, "a list of texts, one for each option"),
    "id": (_is_name, _NAME),
    "scan_id": (_is_name, _NAME),
    "patient_id": (_is_name, _NAME),
    "volume": (_is_text, _TEXT),
    "tokens": (_is_count, "a whole number"),
    "truncated": (_is_truth, "true or false"),
}
_NOT_A_TEXT = ("reference", "prediction", "question")


def check_row(row: Mapping[str, Any], place: str) -> None:
    """Raise PredictionsError, which names `place`, unless a row has what its task's scores need, each of its type."""
    if not isinstance(row, Mapping):
        raise PredictionsError(f"{place}: a {type(row).__name__}; expected a mapping with {', '.join(FIELDS)}.")
    missing = [name for name in ("task", "reference", "prediction") if row.get(name) is None]
    if row.get("task") == "multiple_choice" and (row.get("choices") is None or row["choices"] in ([], "")):
        missing.append("choices")
    if missing:
        raise PredictionsError(f"{place}: lacks {', '.join(missing)}; expected the fields {', '.join(FIELDS)}.")
    for name, (fits, expected) in _TYPES.items():
        value = row.get(name)
        if value is not None and not fits(value):
            raise PredictionsError(f"{place}: {name} is {_describe(value)}; expected {expected}.{_remedy(name, value)}")
    if row["task"] not in TASKS:
        raise PredictionsError(f"{place}: task {row['task']!r} is unknown; expected one of {', '.join(TASKS)}.")
    for name in _NOT_A_TEXT:
        _check_characters(row.get(name) or "", f"{place}: {name}")


def _check_characters(text: str, place: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PredictionsError(
            f"{place} holds half of a surrogate pair (character {error.start + 1}), which no file can keep; write the "
            "text again from its source."
        ) from error


def _describe(value: Any) -> str:
    """A value's type, and no more: texts may hold what must not stand in a log."""
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"the number {value:g}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return f"the number {value}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return {str: "a text", dict: "an object"}.get(type(value), f"a {type(value).__name__}")


def _remedy(name: str, value: Any) -> str:
    if name not in _NOT_A_TEXT:
        return ""
    if isinstance(value, float) and math.isnan(value):
        return " An empty cell of a table becomes NaN: write \"\" for an empty text, e.g. by pandas' fillna('')."
    if isinstance(value, list | tuple):
        return " Each row has one reference and one prediction: write a row for each, or choose one."
    return ""
