"""What all DICOM objects made from reports share: UIDs, the algorithm that wrote them, and how they are saved."""

import logging
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from samf.model.model_card import public_name
from samf.model.report_samf import Report
from samf.reporting.exports.source_series import UTF8, SourceSeries
from samf.utils.files import atomic_path
from samf.utils.packaged import package_version

MANUFACTURER = "SAMF"
SERIES_NUMBERS = {"sr": 901, "dicom-pdf": 902, "seg": 903}
_LONG_STRING = 64  # characters of VR LO
# uuid5 of this name space: equal parts give equal UIDs, on every machine.
_NAME_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "samf:dicom")


@dataclass(frozen=True)
class Algorithm:
    """The algorithm that wrote reports, by names that are no private paths.

    Attributes:
        name: of the model.
        revision: its commit on the Hub; "" where unknown.
        version: of this package.
        quantization: of the weights; "" = as saved.
    """

    name: str
    revision: str
    version: str
    quantization: str

    @classmethod
    def of(cls, report: Report) -> "Algorithm":
        """Return the algorithm of a report."""
        made = report.provenance
        return cls(
            public_name(made.model) or "unnamed model",
            made.revision or "",
            package_version(),
            str(made.versions.get("quantization", "")),
        )

    @property
    def label(self) -> str:
        """Return the whole name in one line: package, model, revision, weights."""
        revision = f", revision {self.revision}" if self.revision else ""
        weights = f", weights {self.quantization}" if self.quantization else ""
        return f"SAMF {self.version}, model {self.name}{revision}{weights}"

    @property
    def parts(self) -> tuple[str, ...]:
        """Return all that tells one algorithm from another."""
        return self.name, self.revision, self.version, self.quantization


def derived_uid(*parts: str) -> str:
    """Return the UID of some texts: equal texts give equal UIDs, and others others. It tells nothing of them."""
    return f"2.25.{uuid.uuid5(_NAME_SPACE, chr(0).join(parts)).int}"


def general_values(reports: Sequence[Report], series: SourceSeries, kind: str, content: str) -> dict[str, Any]:
    """Return what identifies a new object, as arguments of highdicom's classes.

    UIDs are derived: the series' from the source series and the algorithm, the instance's also from its content. The same
    algorithm that finds the same in the same series again makes the same object, which a PACS doesn't keep twice.

    Args:
        reports: about one scan.
        series: that they were made from.
        kind: key of `SERIES_NUMBERS`.
        content: all that the object says, except for when it was made.
    """
    algorithm = Algorithm.of(reports[0])
    header = series.header
    origin = (kind, str(header.StudyInstanceUID), *(str(one.SOPInstanceUID) for one in series.headers))
    return {
        "series_instance_uid": derived_uid("series", *origin, *algorithm.parts),
        "series_number": SERIES_NUMBERS[kind],
        "sop_instance_uid": derived_uid("instance", *origin, *algorithm.parts, content),
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
    }


def complete(dataset: Dataset, reports: Sequence[Report], series: SourceSeries, description: str) -> None:
    """Fill in what highdicom leaves to its caller: equipment, description, and the patient's name as it is.

    Args:
        dataset: the new object.
        reports: about one scan.
        series: that they were made from.
        description: of the new series.
    """
    algorithm = Algorithm.of(reports[0])
    dataset.SpecificCharacterSet = UTF8
    dataset.PatientName = series.header.PatientName
    dataset.SeriesDescription = description
    dataset.Manufacturer = MANUFACTURER
    dataset.ManufacturerModelName = algorithm.name[-_LONG_STRING:]
    versions = [part for part in (algorithm.version, algorithm.revision, algorithm.quantization) if part]
    dataset.SoftwareVersions = [part[:_LONG_STRING] for part in versions]


def unnamed(headers: Sequence[Dataset]) -> list[Dataset]:
    """Return shallow copies without the patient's name, which highdicom prints in warnings; `complete` puts it back."""
    copies = []
    for header in headers:
        copy = Dataset({element.tag: element for element in header})  # Dataset(header) would share all changes
        copy.add_new("PatientName", "PN", "")
        copies.append(copy)
    return copies


def save(dataset: Dataset, file: Path) -> None:
    """Write a DICOM object, whole or not at all."""
    with quiet_libraries(), atomic_path(file) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep pydicom's and highdicom's words about values, which may quote the patient's, out of output and logs."""
    loggers = [logging.getLogger(name) for name in ("highdicom", "pydicom")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
