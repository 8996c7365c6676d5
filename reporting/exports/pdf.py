"""Reports as a PDF: text, findings, key slices, and what they were made from. Of the patient it has the file's name only."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from samf.model.evidence_samf import SentenceEvidence
from samf.model.model_card import public_name
from samf.model.report_samf import DISCLAIMER, REPORT_QUESTION, Report
from samf.model.slice_geometry import ORIENTATION_LABELS
from samf.reporting.evidence_sheet import draw_heat
from samf.reporting.exports.pages import Pages
from samf.reporting.exports.plain_words import warnings_of
from samf.reporting.slice_view import draw_orientation
from samf.utils.files import atomic_path

TITLE = "Chest CT: text by a language model"
_HEADING = 12.0
_SIDE = 155.0  # points of a key slice: three fill a line
_WIDEST = -1  # window of the key slices


def write(reports: Sequence[Report], file: Path) -> None:
    """Write reports as a PDF."""
    pages = lay_out(reports, _file_name(reports[0].provenance.source))
    with atomic_path(file) as temporary:
        pages.save(temporary, TITLE)


def pdf_bytes(reports: Sequence[Report]) -> bytes:
    """Return reports as a PDF that does not name the scan's file, for objects that name the patient themselves."""
    pdf = io.BytesIO()
    lay_out(reports, None).save(pdf, TITLE)
    return pdf.getvalue()


def lay_out(reports: Sequence[Report], name: str | None) -> Pages:
    """Return reports on pages.

    Args:
        reports: one report, or the answers about one scan.
        name: of the scan's file; None leaves it out, also of warnings.
    """
    pages = Pages(DISCLAIMER)
    pages.text(TITLE, size=16, bold=True)
    if name is not None:
        pages.text(f"Scan: {name}")
    pages.text(f"{DISCLAIMER} Not verified. Every sentence may be wrong.", bold=True)
    for warning in _warnings(reports, name):
        pages.text(f"Warning: {warning}", size=9)
    for report in reports:
        _add_answer(pages, report)
    _add_findings(pages, reports[0])
    for report in reports:
        _add_key_slices(pages, report)
    _add_provenance(pages, reports[0])
    return pages


def _warnings(reports: Sequence[Report], name: str | None) -> list[str]:
    if name is None:
        return warnings_of(reports)
    source = reports[0].provenance.source
    found = dict.fromkeys(warning for report in reports for warning in report.warnings)
    return [warning.replace(source, name) for warning in found]


def _file_name(source: str) -> str:
    """Return the last part of a path or an address."""
    return source.rstrip("/").replace("\\", "/").rpartition("/")[2] or "scan"


def _heading(pages: Pages, text: str, following: float = 30.0) -> None:
    """Add a heading, on the page where `following` points below it have room."""
    pages.keep(_HEADING * 2.4 + following)
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
    _heading(pages, "Probability of each finding")
    for name, probability in sorted(report.findings.items(), key=lambda item: -item[1]):
        pages.bar(name, probability)


def _add_key_slices(pages: Pages, report: Report) -> None:
    """Add for each sentence the slices through the maximum of its heat map; for evidence from a file say where they are."""
    if report.evidence is None or not report.evidence.sentences:
        return
    _heading(pages, "What each sentence rests on", following=_SIDE + 60)
    drawn = [sentence for sentence in report.evidence.sentences if sentence.slice_heat is not None]
    if not drawn:
        files = ", ".join(report.evidence.files) or "not kept"
        pages.text(f"The pictures were made with the report: {files}", size=9)
        return
    pages.text("One slice of each plane through the hottest place. It explains the model, not the patient.", size=9)
    for sentence in drawn:
        _add_slices(pages, sentence)


def _add_slices(pages: Pages, sentence: SentenceEvidence) -> None:
    shown = sentence.slice_heat
    if shown is None:
        return
    pages.space(6)
    pages.keep(_SIDE + 40)
    place = ""
    if sentence.peak is not None:
        x, y, z = sentence.peak.ras_mm
        place = f"  (hottest at R {x:.0f}, A {y:.0f}, S {z:.0f} mm)"
    pages.text(f"{sentence.text}{place}", size=9)
    pages.space(3)
    for column, axes in enumerate(pages.row(len(shown.numbers), _SIDE)):
        draw_heat(axes, shown, column, _WIDEST, marked=sentence.peak is not None)
        if shown.oriented:
            draw_orientation(axes, ORIENTATION_LABELS[shown.planes[column]])


def _add_provenance(pages: Pages, report: Report) -> None:
    made = report.provenance
    _heading(pages, "Made from and with")
    facts = {
        "scan": f"{' x '.join(map(str, made.shape))} voxels of {' x '.join(f'{mm:.3g}' for mm in made.spacing)} mm, "
        f"stored as {made.orientation}" + (f", DICOM series {made.series}" if made.series else ""),
        "model": public_name(made.model) + (f", revision {made.revision}" if made.revision else ""),
        "slice settings": made.slice_settings,
        "generation": ", ".join(f"{name} {value}" for name, value in made.generation.items()) or "the model's own",
        "versions": ", ".join(f"{name} {version}" for name, version in made.versions.items()),
    }
    for name, value in facts.items():
        pages.text(f"{name}: {value}", size=9)
