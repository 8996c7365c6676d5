"""Words about a report that go to other systems: without names of files and folders, which may be those of patients."""

import re
from collections.abc import Sequence

from samf.model.report_samf import DISCLAIMER, REPORT_QUESTION, Report

CAUTION = f"{DISCLAIMER} Written by a language model, not verified. Every sentence may be wrong."
_EXAMPLE = re.compile(r"(,? ?\(?)e\.g\. [^)]*")


def warnings_of(reports: Sequence[Report]) -> list[str]:
    """Return the reports' warnings, each once, with "the scan" in place of the names of its files."""
    found = dict.fromkeys(warning for report in reports for warning in report.warnings)
    return [without_names(warning, reports[0].provenance.source) for warning in found]


def without_names(text: str, source: str) -> str:
    """Return a text with "the scan" in place of a scan's path and of every other path.

    Args:
        text: a warning.
        source: the scan's path or address, or "PATH and 3 more".
    """
    names = {source, re.sub(r" and \d+ more$", "", source)}
    for name in sorted(filter(None, names), key=len, reverse=True):
        text = re.sub(rf"{re.escape(name)}(/[^\s:]*)?", "the scan", text)
    text = re.sub(r"(?<![\w.])(?:[A-Za-z]:)?[/\\][^\s:,;]*[/\\][^\s:,;]+", "the scan", text)
    return " ".join(_EXAMPLE.sub("", text).split())


def is_report(report: Report) -> bool:
    """Return whether it is a report rather than the answer to a question."""
    return report.question == REPORT_QUESTION
