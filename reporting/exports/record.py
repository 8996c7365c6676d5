"""Reports as JSON: all that is known of them, and readable again."""

import json
from collections.abc import Sequence
from pathlib import Path

from samf.model.report_samf import Report
from samf.utils.files import atomic_write, write_json


def write(reports: Sequence[Report], file: Path) -> None:
    """Write one report as an object, several answers about one scan as a list."""
    if len(reports) == 1:
        atomic_write(file, reports[0].to_json())
    else:
        write_json(file, [report.to_dict() for report in reports])


def read_reports(file: Path) -> list[Report]:
    """Return the reports of a file that `write` made.

    Raises:
        ValueError: something else is in it; the message names the file.
        OSError: it can't be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return [Report.from_dict(values) for values in (content if isinstance(content, list) else [content])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a report ({error}).") from error
