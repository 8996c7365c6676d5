"""Reports as plain text."""

from collections.abc import Sequence
from pathlib import Path

from samf.model.report_samf import DISCLAIMER, Report
from samf.utils.files import atomic_write


def report_text(reports: Sequence[Report]) -> str:
    """Return reports as text, each of several under its question, with the warnings and the disclaimer below.

    Args:
        reports: one report, or the answers about one scan.
    """
    parts = [f"{report.question}\n{report.to_text()}" if len(reports) > 1 else report.to_text() for report in reports]
    notes = dict.fromkeys(warning for report in reports for warning in report.warnings)
    return "\n\n".join([*parts, *(f"Warning: {note}" for note in notes), DISCLAIMER]) + "\n"


def write(reports: Sequence[Report], file: Path) -> None:
    """Write reports as a UTF-8 text file."""
    atomic_write(file, report_text(reports))
