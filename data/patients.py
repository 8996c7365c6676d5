"""The patient of a volume, a record or a prediction: the one rule for splits, shuffled volumes, contrast and intervals.

In this order: a rule given on the command line (`PatientRule`), the table's patient column, CT-RATE's names, and a digest
of DICOM's PatientID. Otherwise the patient is unknown: each volume counts as a patient of its own, and a warning says so,
because series of one patient may then be in both training and validation. Messages show CT-RATE's pseudonyms, and digests
of all other identifiers.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Final

from samf.data.ct_rate.names import VolumeName, patient_of_id
from samf.data.dicom_patients import dicom_patients
from samf.data.schema import Record

if TYPE_CHECKING:  # imported where it is needed: scores need the patient of a row, and no tables
    import datasets

logger = logging.getLogger(__name__)

PATIENT_COLUMN: Final = "patient_id"  # of records; a table's own column of this name is used without being named
_RULES = (
    "'folder' (the first one below the data's folder), 'folder:2' (the second, …), 'parent' (the folder that holds the "
    "volume), 'file' (each volume is a patient), or a regular expression with one group, such as '(LIDC-IDRI-[0-9]+)'"
)


@dataclass(frozen=True)
class PatientRule:
    """A rule that reads the patient from a volume's path; made by `parse`.

    Attributes:
        text: the rule as it was given.
        folder: which folder below the data's own names the patient, from 1; 0 for "parent" and "file".
        pattern: a regular expression whose one group, searched in the path, is the patient; None for rules by folder.
    """

    text: str
    folder: int = 0
    pattern: re.Pattern[str] | None = None

    @classmethod
    def parse(cls, text: str | None) -> "PatientRule | None":
        """Read a rule as given on the command line; None stays None. Raises ValueError for anything but a rule."""
        if text is None:
            return None
        if text in ("parent", "file"):
            return cls(text)
        if match := re.fullmatch(r"folder(?::([1-9]\d*))?", text):
            return cls(text, int(match[1] or 1))
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise ValueError(
                f"patient_rule {text!r}: not a regular expression ({error}). Expected {_RULES}."
            ) from error
        if pattern.groups != 1:
            raise ValueError(f"patient_rule {text!r} has {pattern.groups} groups. Expected {_RULES}.")
        return cls(text, pattern=pattern)

    def __call__(self, path: str, root: str | None = None) -> str:
        """Return the patient of the volume at `path`.

        Args:
            path: absolute, or an address.
            root: the data's folder, from which folders are counted; needed for "folder".

        Raises:
            ValueError: the rule finds no patient in this path.
        """
        if self.pattern is not None:
            match = self.pattern.search(path)
            if match and match[1]:
                return match[1]
            raise ValueError(f"{path}: patient_rule {self.text!r} finds no patient in this path. Expected {_RULES}.")
        if self.folder == 0:
            return path if self.text == "file" else os.path.dirname(path)
        parts = PurePath(path).parts[:-1]
        base = PurePath(root).parts if root else ()
        if base and parts[: len(base)] == base and len(parts) >= len(base) + self.folder:
            return "/".join(parts[len(base) : len(base) + self.folder])
        raise ValueError(
            f"{path}: patient_rule {self.text!r} needs {self.folder} folders between {root or 'the data'} and the volume. "
            f"Expected {_RULES}."
        )


# --- One volume or row ------------------------------------------------------------------------------------------------


def patient_by_name(path: str) -> str | None:
    """Return the patient of a volume whose file name is CT-RATE's, None for any other name."""
    volume = VolumeName.find(path)
    return volume.patient_id if volume else None


def patient_of(path: str) -> str:
    """Return the patient of a volume by CT-RATE's names, else the path itself."""
    return patient_by_name(path) or path


def named_patient(row: Mapping[str, object]) -> str | None:
    """Return the patient that a row of a predictions file names, None where it names none.

    Its `patient_id`, else the patient that its `scan_id` or `id` begins with in CT-RATE's names ("valid_53_a" is of
    valid_53). A prediction's `volume` doesn't count: with shuffled volumes it is another patient's.
    """
    if row.get(PATIENT_COLUMN) not in (None, ""):
        return str(row[PATIENT_COLUMN])
    names = (str(row[name]) for name in ("scan_id", "id") if row.get(name) is not None)
    return next((patient for name in names if (patient := patient_of_id(name))), None)


def patient_of_record(record: Record) -> str:
    """Return the patient of a record: by its `patient_id` or CT-RATE's names, else its scan, which counts as one."""
    named = record.get(PATIENT_COLUMN) or patient_by_name(record["volume"] or "")
    return named or named_patient(record) or record["scan_id"]


# --- Many volumes -----------------------------------------------------------------------------------------------------


def find_patients(
    paths: Iterable[str],
    given: Mapping[str, str | None] | None = None,
    rule: PatientRule | None = None,
    root: str | None = None,
) -> dict[str, str | None]:
    """Return the patient of each volume, None where it is unknown.

    Args:
        paths: paths or addresses of volumes.
        given: the patients that a table names, by path.
        rule: takes precedence over everything else.
        root: the folder from which `rule` counts.
    """
    given, paths = given or {}, list(dict.fromkeys(paths))
    if rule is not None:
        return {path: rule(path, root) for path in paths}
    found = {path: given.get(path) or patient_by_name(path) for path in paths}
    return found | dicom_patients(path for path, patient in found.items() if patient is None)


def warn_of_unknown(source: str, unknown: int, volumes: int) -> None:
    """Warn that the patients of some volumes are unknown, and say how to name them.

    Args:
        source: where the volumes are from, for the message.
        unknown: how many have no known patient; 0 gives no warning.
        volumes: how many there are; a single one gives no warning.
    """
    if unknown and volumes > 1:
        logger.warning(
            "%s: the patients of %d of %d volumes are not known; each volume counts as a patient of its own, so that series "
            "of one patient may come into training and validation. Name them: --patient_column of a table, or "
            "--patient_rule folder, parent, file, or a regular expression with one group.",
            source,
            unknown,
            volumes,
        )


def settle_patients(
    records: "datasets.Dataset", source: str, rule: PatientRule | None = None, root: str | None = None
) -> "datasets.Dataset":
    """Return the records with `patient_id` filled in where the patient can be known; a warning counts the others.

    Args:
        records: with the `patient_id` of the table or CT-RATE's names. Records without a volume keep it.
        source: where the records are from, for the warning.
        rule: takes precedence over the records' own.
        root: the folder from which `rule` counts.
    """
    import pyarrow.compute as pc

    volumes, known = records.data.column("volume"), records.data.column(PATIENT_COLUMN)
    is_open = pc.and_(pc.is_valid(volumes), pc.is_null(known))
    if rule is None and not pc.any(is_open).as_py():
        return records
    pairs = list(zip(records["volume"][:], records[PATIENT_COLUMN][:], strict=True))
    given = {path: patient for path, patient in pairs if path}
    patients = find_patients(given, given, rule, root)
    warn_of_unknown(source, sum(patient is None for patient in patients.values()), len(patients))
    if patients == given:
        return records
    settled = [patients[path] if path else patient for path, patient in pairs]
    feature = records.features[PATIENT_COLUMN]
    return records.remove_columns(PATIENT_COLUMN).add_column(PATIENT_COLUMN, settled, feature=feature)


def patients_of(records: "datasets.Dataset") -> set[str]:
    """Return the patients of the records that have a volume; an unknown patient is the volume's path."""
    paths = records["volume"][:]
    known = records[PATIENT_COLUMN][:] if PATIENT_COLUMN in records.column_names else [None] * len(paths)
    return {patient or patient_of(path) for path, patient in zip(paths, known, strict=True) if path is not None}
