"""Formats of reports on the command line: what can be refused before a report is computed, and writing what can be written."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samf.cli.errors import UsageError, one_line

if TYPE_CHECKING:
    from samf.model.report_samf import Report


def check_formats(formats: Sequence[str], evidence: bool) -> None:
    """Raise UsageError for formats whose libraries are missing, or that need evidence where none is asked for.

    Args:
        formats: of the files.
        evidence: whether it is asked for.
    """
    from samf.reporting.exports import FORMATS, ExportError, check_libraries

    try:
        check_libraries(formats)
    except ExportError as error:
        raise UsageError(str(error)) from error
    for name in formats:
        if FORMATS[name].evidence and not evidence:
            raise UsageError(f"--format {name} is the heat map of the evidence: add --evidence.")


def check_scans(scans: Sequence[str], formats: Sequence[str]) -> None:
    """Raise UsageError if no scan can have its report in these formats."""
    refused = refused_scans(scans, formats)
    if scans and len(refused) == len(scans):
        raise UsageError(next(iter(refused.values())))


def refused_scans(scans: Sequence[str], formats: Sequence[str]) -> dict[str, str]:
    """Return the scans that are known not to be DICOM where a format needs it, each with the reason."""
    name = _needs_series(formats)
    if name is None:
        return {}
    from samf.reporting.exports import not_dicom

    return {scan: not_dicom(scan, name) for scan in scans if _is_other(scan)}


def needs_series(scan: str, formats: Sequence[str]) -> None:
    """Raise ExportError if a format needs a DICOM series; the scan, which has been read, is none."""
    name = _needs_series(formats)
    if name is not None:
        from samf.reporting.exports import ExportError, not_dicom

        raise ExportError(not_dicom(scan, name))


def _needs_series(formats: Sequence[str]) -> str | None:
    """Return the first format that needs a DICOM series."""
    from samf.reporting.exports import FORMATS

    return next((name for name in formats if FORMATS[name].series == "required"), None)


def _is_other(scan: str) -> bool:
    """Return whether a scan is a file of a format other than DICOM; zips and addresses are known when they are read."""
    from samf.model.ct_common import CTReadError
    from samf.model.ct_signatures import file_format, is_zip

    path = Path(scan)
    try:
        return path.is_file() and not is_zip(path) and file_format(path) not in ("DICOM", "DICOMDIR")
    except (CTReadError, OSError):
        return False  # which the reader says better


def write_formats(reports: "Sequence[Report]", out: Path, name: str, formats: Sequence[str]) -> str | None:
    """Write reports in all formats that they can be written in; return why others are missing, None if none is.

    Args:
        reports: about one scan.
        out: folder of the files.
        name: of the files, without an ending.
        formats: of the files, in their order.
    """
    from samf.reporting.exports import FORMATS, ExportError, export

    first = [kind for kind in formats if FORMATS[kind].series != "none"]
    problems: dict[str, None] = {}
    try:
        export(reports, out, name, first)  # the series is found once for all
    except ExportError:
        for kind in first:
            try:
                export(reports, out, name, [kind])
            except ExportError as error:
                problems[one_line(error)] = None
    export(reports, out, name, [kind for kind in formats if kind not in first])
    return " ".join(problems) or None
