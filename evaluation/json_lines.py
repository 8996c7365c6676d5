"""Write JSONL files line by line, and read them after a process was killed while writing."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samf.data.schema import JsonObject

__all__ = ["json_line", "read_complete_lines"]

logger = logging.getLogger(__name__)


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON, with its line feed."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_complete_lines(path: Path) -> list[JsonObject]:
    """Return the objects of a JSONL file; an empty list where there is no file.

    A last line that a kill truncated, or that a full disk left as garbage, is left out with a warning: its content is
    computed again.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            logger.warning("%s, line %d: incomplete; it is left out and computed again.", path, number)
    return rows
