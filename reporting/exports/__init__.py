"""Reports of a scan as files: one writer per format."""

import importlib
import importlib.util
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from samf.model.report_samf import Report

if TYPE_CHECKING:
    from samf.reporting.exports.source_series import SourceSeries

# Writes all reports of one scan, its report or its answers, to a file, whole or not at all. The last argument is the DICOM
# series that they are about; formats that don't need it ignore it.
Writer: TypeAlias = "Callable[[Sequence[Report], Path, SourceSeries | None], None]"


class ExportError(ValueError):
    """Reports that can't be written in a format; the message says why and what to do, in one line."""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        module: of this package, with a function `write`. It is imported when it is used: some need libraries that others
            don't.
        ending: of the file's name.
        series: whether the DICOM series is needed that the reports are about. "optional": where they are about one.
        evidence: whether the reports need evidence.
        library: that must be installed, by its name in Python; "" for none.
    """

    module: str
    ending: str
    series: Literal["none", "optional", "required"] = "none"
    evidence: bool = False
    library: str = ""


FORMATS = {
    "txt": Format("text", "txt"),
    "json": Format("record", "json"),
    "pdf": Format("pdf", "pdf"),
    "sr": Format("dicom_sr", "sr.dcm", series="required", library="highdicom"),
    "dicom-pdf": Format("dicom_pdf", "pdf.dcm", series="required", library="highdicom"),
    "seg": Format("dicom_seg", "seg.dcm", series="required", evidence=True, library="highdicom"),
    "fhir": Format("fhir", "fhir.json", series="optional", library="fhir.resources"),
}
RECORD = "json"  # what `read_reports` reads
_LIBRARY_ERRORS = (AttributeError, IndexError, KeyError, TypeError, ValueError)
WITHOUT_SERIES = ", ".join(name for name, kind in FORMATS.items() if kind.series != "required")


def writer(name: str) -> Writer:
    """Return the function that writes a format.

    Raises:
        KeyError: no format of this name.
        ExportError: its library isn't installed.
    """
    check_libraries([name])
    module = importlib.import_module(f"{__name__}.{FORMATS[name].module}")

    def write(reports: Sequence[Report], file: Path, series: "SourceSeries | None" = None) -> None:
        if FORMATS[name].series == "none":
            module.write(reports, file)
            return
        try:
            module.write(reports, file, series)
        except ExportError:
            raise
        except _LIBRARY_ERRORS as error:  # headers that no check has foreseen; their message may quote a patient's name
            raise ExportError(
                f"{reports[0].provenance.source}: the format {name} can't be made of its headers ({type(error).__name__}). "
                f"Export the series again, or write {WITHOUT_SERIES}."
            ) from None

    return write


def check_libraries(formats: Collection[str]) -> None:
    """Raise ExportError if a format's library is not installed."""
    for name in formats:
        library = FORMATS[name].library
        if library and importlib.util.find_spec(library.partition(".")[0]) is None:
            raise ExportError(f"The format {name} is written with {library}: pip install 'samf[hospital]'.")


def not_dicom(source: str, name: str) -> str:
    """Return why a scan that isn't DICOM has no file of a format, and what to do."""
    return (
        f"{source}: not read from DICOM (or by an older version), so there is no study for the format {name}. Report on the "
        f"scan's DICOM series, or write {WITHOUT_SERIES}."
    )


def report_file(folder: Path, scan: str, name: str) -> Path:
    """Return the file of a scan in one format.

    Args:
        folder: of all files.
        scan: name of the scan's files, without an ending.
        name: the format.
    """
    return folder / f"{scan}.{FORMATS[name].ending}"


def export(
    reports: Sequence[Report], folder: Path, scan: str, formats: Sequence[str], source: Any = None
) -> list[Path]:
    """Write the reports of one scan in several formats and return the files.

    Formats of DICOM and FHIR take patient and study from the DICOM series that the reports were made from. It is found by
    their provenance, and recognised by its digest there.

    Args:
        reports: one report, or the answers about one scan.
        folder: of the files; made when missing.
        scan: name of the files, without an ending.
        formats: keys of `FORMATS`.
        source: the scan, as `read_ct` takes it, where it isn't what the provenance names, such as a list of files.

    Raises:
        ExportError: a format that these reports don't have; nothing has been written then.
        OSError: a file can't be written.
    """
    files = [report_file(folder, scan, name) for name in formats]
    writers = [writer(name) for name in formats]
    kinds = [FORMATS[name] for name in formats]
    series = None
    for name, kind in zip(formats, kinds, strict=True):
        if kind.evidence:
            from samf.reporting.exports.heat import check_evidence

            check_evidence(reports, name)
        if kind.series != "none" and series is None:
            from samf.reporting.exports.source_series import series_of

            series = series_of(reports, name, source)
        if kind.series == "required" and series is not None:
            from samf.reporting.exports.source_series import check_references

            check_references(series, reports[0].provenance.source)
    folder.mkdir(parents=True, exist_ok=True)
    for write, file in zip(writers, files, strict=True):
        write(reports, file, series)
    return files
