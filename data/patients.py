"""Who a volume's patient is: decided here, for splits, for other patients' volumes and for contrast.

In this order: a rule given on the command line (`PatientRule`); the table's patient column; CT-RATE's names; DICOM's
PatientID, as a digest. Otherwise the patient isn't known, each volume counts as a patient of its own, and that is said:
then one patient's series may stand in training and in validation. Messages show CT-RATE's pseudonyms alone, others by a
digest.
"""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import datasets
import pyarrow.compute as pc

from samf.data.ct_rate.names import VolumeName
from samf.model.ct_dicom_files import walk_once
from samf.model.ct_dicom_storage import PARSE_ERRORS, pydicom
from samf.model.ct_download import is_address
from samf.model.ct_signatures import looks_like_dicom

logger = logging.getLogger(__name__)

PATIENT_COLUMN = "patient_id"  # of records; a table's own column of this name counts without being named
RULES = (
    "'folder' (the first one below the data's folder), 'folder:2' (the second, …), 'parent' (the folder that holds the "
    "volume), 'file' (each volume is a patient), or a regular expression with one group, such as '(LIDC-IDRI-[0-9]+)'"
)
_LOOKERS = 16  # threads that open a file of each DICOM series: on a network file system they wait
_LOOKED_AT = 20  # files of a folder in which a DICOM file is looked for
_LISTED = 10


@dataclass(frozen=True)
class PatientRule:
    """A rule that reads the patient from a volume's place. Made by `parse`.

    Attributes:
        text: as it was given.
        folder: which folder below the data's own names the patient, from 1; 0 for "parent" and "file".
        pattern: a regular expression whose one group, searched in the path, is the patient; None = by `folder`.
    """

    text: str
    folder: int = 0
    pattern: re.Pattern | None = None

    @classmethod
    def parse(cls, text: str | None) -> "PatientRule | None":
        """Read a rule as it is given on the command line. Raises ValueError for what is none."""
        if text is None:
            return None
        if text in ("parent", "file"):
            return cls(text)
        if match := re.fullmatch(r"folder(?::([1-9]\d*))?", text):
            return cls(text, int(match[1] or 1))
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise ValueError(f"patient_rule {text!r}: not a regular expression ({error}). Expected {RULES}.") from error
        if pattern.groups != 1:
            raise ValueError(f"patient_rule {text!r} has {pattern.groups} groups. Expected {RULES}.")
        return cls(text, pattern=pattern)

    def __call__(self, path: str, root: str | None = None) -> str:
        """Return the patient of the volume at `path`.

        Args:
            path: absolute, or an address.
            root: the data's folder, from which folders are counted; needed for 'folder'.

        Raises:
            ValueError: the rule doesn't fit this path.
        """
        if self.pattern is not None:
            match = self.pattern.search(path)
            if match and match[1]:
                return match[1]
            raise ValueError(f"{path}: patient_rule {self.text!r} finds no patient in this path. Expected {RULES}.")
        parts = PurePath(path).parts[:-1]
        if self.folder == 0:
            return path if self.text == "file" else os.path.dirname(path)
        base = PurePath(root).parts if root else ()
        if base and parts[: len(base)] == base and len(parts) >= len(base) + self.folder:
            return "/".join(parts[len(base) : len(base) + self.folder])
        raise ValueError(
            f"{path}: patient_rule {self.text!r} needs {self.folder} folders between {root or 'the data'} and the volume. "
            f"Expected {RULES}."
        )


def patient_by_name(path: str) -> str | None:
    """Return a volume's patient by CT-RATE's names, None for any other name."""
    volume = VolumeName.find(path)
    return volume.patient_id if volume else None


def patient_of(path: str) -> str:
    """Return a volume's patient by CT-RATE's names, else the path itself."""
    return patient_by_name(path) or path


def patient_of_record(record: Mapping[str, Any]) -> str:
    """Return a record's patient: its `patient_id`, else by CT-RATE's names, else its scan, which counts as one."""
    return record.get(PATIENT_COLUMN) or patient_by_name(record["volume"] or "") or record["scan_id"]


def dicom_patient(path: str) -> str | None:
    """Return a digest of the PatientID of a DICOM file or folder; None where there is none, or it is no DICOM."""
    if pydicom is None or is_address(path):
        return None
    file = _dicom_file(Path(path))
    if file is None:
        return None
    try:
        header = pydicom.dcmread(
            file, stop_before_pixels=True, force=True, specific_tags=["PatientID", "IssuerOfPatientID"]
        )
        number, issuer = (str(header.get(tag, "") or "").strip() for tag in ("PatientID", "IssuerOfPatientID"))
    except PARSE_ERRORS as error:  # the reader of the volume will say so
        logger.debug("%s: no PatientID (%s)", file, type(error).__name__)
        return None
    return f"dicom-{digest(f'{issuer} {number}')}" if number else None


def _dicom_file(path: Path) -> Path | None:
    """The first DICOM file of a folder, or the file itself if it is one."""
    try:
        if path.is_file():
            return path if _is_dicom(path) else None
        for parent, names in walk_once(path):
            candidates = [Path(parent, name) for name in names[:_LOOKED_AT] if not name.upper().startswith("DICOMDIR")]
            if found := next((file for file in candidates if file.is_file() and _is_dicom(file)), None):
                return found
    except OSError as error:
        logger.debug("%s: cannot be looked at (%s)", path, error.strerror)
    return None


def _is_dicom(file: Path) -> bool:
    with open(file, "rb") as stream:
        return looks_like_dicom(stream.read(352))


def dicom_patients(paths: Iterable[str]) -> dict[str, str | None]:
    """Return `dicom_patient` of folders and of files without a suffix of other formats."""
    asked = [path for path in dict.fromkeys(paths) if not is_address(path) and _may_be_dicom(path)]
    with ThreadPoolExecutor(_LOOKERS) as threads:
        return dict(zip(asked, threads.map(dicom_patient, asked), strict=True))


def _may_be_dicom(path: str) -> bool:
    return not path.lower().endswith((".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy", ".npz", ".zip"))


def digest(text: str) -> str:
    """Return twelve hexadecimal digits that stand for an identifier in files and messages."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def shown(patient: str) -> str:
    """Return what messages call a patient: CT-RATE's pseudonym, a path, which stands for one that isn't known, or a digest."""
    is_plain = re.fullmatch(r"[a-z]+_\d+|dicom-[0-9a-f]{12}", patient) or os.path.isabs(patient) or is_address(patient)
    return patient if is_plain else f"#{digest(patient)}"


# ---- volumes and records ---------------------------------------------------------------------------------------------


def find_patients(
    paths: Iterable[str],
    given: Mapping[str, str | None] | None = None,
    rule: PatientRule | None = None,
    root: str | None = None,
) -> dict[str, str | None]:
    """Return each volume's patient, None where it isn't known.

    Args:
        paths: of volumes.
        given: patients by path that a table names.
        rule: counts before everything else.
        root: for `rule`.
    """
    given, paths = given or {}, list(dict.fromkeys(paths))
    if rule is not None:
        return {path: rule(path, root) for path in paths}
    found = {path: given.get(path) or patient_by_name(path) for path in paths}
    return found | dicom_patients(path for path, patient in found.items() if patient is None)


def warn_of_unknown(source: str, unknown: int, volumes: int) -> None:
    """Say for how many volumes the patient isn't known, and what to do."""
    if unknown and volumes > 1:
        logger.warning(
            "%s: the patients of %d of %d volumes are not known; each volume counts as a patient of its own, so that series "
            "of one patient may come into training and validation. Name them: --patient_column of a table, or "
            "--patient_rule folder, parent, file, or a regular expression with one group.",
            source,
            unknown,
            volumes,
        )


def refuse_shared_folders(patients: Mapping[str, str | None]) -> None:
    """Raise ValueError where volumes of unknown patients lie together in several folders: each may be one patient's.

    For what holds patients out: whether a folder of several files is a patient's, nobody but the user knows.
    """
    folders = Counter(os.path.dirname(path) for path, patient in patients.items() if patient is None)
    shared = [folder for folder, count in folders.items() if count > 1]
    if len(shared) > 1:
        raise ValueError(
            f"{len(shared)} folders have several volumes each (first: {shared[0]}, {folders[shared[0]]} volumes), and whose "
            f"they are is not known: patients can't be held out. Say it by --patient_rule: parent, if such a folder is one "
            f"patient's; folder, if the first one below the data's is; file, if each volume is another patient's; or a "
            f"regular expression with one group."
        )


def settle_patients(
    records: datasets.Dataset, source: str, rule: PatientRule | None = None, root: str | None = None
) -> datasets.Dataset:
    """Return the records with `patient_id` as far as it can be known; the log says for how many volumes it can't.

    Records from a table name the patient already where the table or CT-RATE's names do. Those without a volume keep theirs.
    """
    paths, column = records.data.column("volume"), records.data.column(PATIENT_COLUMN)
    open_rows = pc.and_(pc.is_valid(paths), pc.is_null(column))
    if rule is None and not pc.any(open_rows).as_py():
        return records
    paths = records["volume"][:]
    given = {path: patient for path, patient in zip(paths, records[PATIENT_COLUMN][:], strict=True) if path}
    patients = find_patients(given, given, rule, root)
    warn_of_unknown(source, sum(patient is None for patient in patients.values()), len(patients))
    if patients == given:
        return records
    settled = [
        patients[path] if path else patient for path, patient in zip(paths, records[PATIENT_COLUMN][:], strict=True)
    ]
    feature = records.features[PATIENT_COLUMN]
    return records.remove_columns(PATIENT_COLUMN).add_column(PATIENT_COLUMN, settled, feature=feature)


def patients_of(records: datasets.Dataset) -> set[str]:
    """Return the patients of the records that have a volume; an unknown one is the volume's path."""
    paths = records["volume"][:]
    known = records[PATIENT_COLUMN][:] if PATIENT_COLUMN in records.column_names else [None] * len(paths)
    return {patient or patient_of(path) for path, patient in zip(paths, known, strict=True) if path is not None}


def check_patient_overlap(train: datasets.Dataset, valid: datasets.Dataset) -> None:
    """Raise ValueError where a patient, or a volume file, is in both.

    CT-RATE numbers the patients of each split anew: train_1 and valid_1 are different people.
    """
    refuse_common_patients(patients_of(train), patients_of(valid))


def refuse_common_patients(train: Collection[str], valid: Collection[str]) -> None:
    """Raise ValueError where two sets of patients have some in common."""
    common = sorted(map(shown, {*train} & {*valid}))
    if common:
        more = f" and {len(common) - _LISTED} more" if len(common) > _LISTED else ""
        raise ValueError(
            f"{len(common)} patients are in both training and validation data: {', '.join(common[:_LISTED])}{more}. "
            f"Scores on them would not be held out; take them out of one."
        )
