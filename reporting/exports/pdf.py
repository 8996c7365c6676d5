"""Reports as a PDF: text, findings, sentences, and what they were made from. It has no patient data but the file's name."""

import math
from collections.abc import Sequence
from pathlib import Path

from samf.model.model_card import public_name
from samf.model.report_samf import DISCLAIMER, REPORT_QUESTION, Report
from samf.reporting.exports.pages import Pages
from samf.utils.files import atomic_path

_TITLE = "Chest CT: text by a language model"
_HEADING = 12.0


def write(reports: Sequence[Report], file: Path) -> None:
    """Write reports as a PDF."""
    pages = Pages(DISCLAIMER)
    pages.text(_TITLE, size=16, bold=True)
    source = reports[0].provenance.source
    pages.text(f"Scan: {_file_name(source)}")
    pages.text(f"{DISCLAIMER} Every sentence may be wrong.", bold=True)
    for warning in dict.fromkeys(warning for report in reports for warning in report.warnings):
        pages.text(f"Warning: {warning.replace(source, _file_name(source))}", size=9)
    for report in reports:
        _add_answer(pages, report)
    _add_findings(pages, reports[0])
    _add_provenance(pages, reports[0])
    with atomic_path(file) as temporary:
        pages.save(temporary, _TITLE)


def _file_name(source: str) -> str:
    """Return the last part of a path or an address."""
    return source.rstrip("/").replace("\\", "/").rpartition("/")[2] or "scan"


def _heading(pages: Pages, text: str) -> None:
    pages.space(_HEADING)
    pages.text(text, size=_HEADING, bold=True)


def _add_answer(pages: Pages, report: Report) -> None:
    """Add one report or answer: its sentences, each with its tokens' mean probability where that is known."""
    _heading(pages, "Report" if report.question == REPORT_QUESTION else report.question)
    for sentence in report.sentences:
        known = sentence.log_probability is not None and sentence.tokens
        mean = f"  [{math.exp((sentence.log_probability or 0.0) / sentence.tokens):.2f}]" if known else ""
        pages.text(f"{sentence.text}{mean}")
    for check in report.checks():
        pages.text(check, bold=True)
    if not report.sentences:
        pages.text("(no text)")
    if report.truncated:
        pages.text("(The text ended at the limit of new tokens.)", size=9)
    if any(sentence.log_probability is not None for sentence in report.sentences):
        pages.text(
            "In brackets: geometric mean of the probabilities of a sentence's tokens, which is no accuracy.", size=8
        )


def _add_findings(pages: Pages, report: Report) -> None:
    if not report.findings:
        return
    _heading(pages, "Findings head: probability of each finding")
    for name, probability in sorted(report.findings.items(), key=lambda item: -item[1]):
        pages.bar(name, probability)


def _add_provenance(pages: Pages, report: Report) -> None:
    made = report.provenance
    _heading(pages, "Made from and with")
    facts = {
        "scan": f"{' x '.join(map(str, made.shape))} voxels of {' x '.join(f'{mm:.3g}' for mm in made.spacing)} mm, "
        f"stored as {made.orientation}",
        "model": public_name(made.model) + (f", revision {made.revision}" if made.revision else ""),
        "slice settings": made.slice_settings,
        "generation": ", ".join(f"{name} {value}" for name, value in made.generation.items()) or "the model's own",
        "versions": ", ".join(f"{name} {version}" for name, version in made.versions.items()),
    }
    for name, value in facts.items():
        pages.text(f"{name}: {value}", size=9)
