"""Checks that no patient is in both training and validation data."""

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping

import datasets

from samf.data.dicom_patients import digest
from samf.data.patients import patients_of
from samf.model.ct_download import is_address

_LISTED = 10


def check_patient_overlap(train: datasets.Dataset, valid: datasets.Dataset) -> None:
    """Raise ValueError if a patient, or a volume of an unknown patient, is in both sets of records.

    CT-RATE numbers the patients of each split separately: train_1 and valid_1 are different people.
    """
    refuse_common_patients(patients_of(train), patients_of(valid))


def refuse_common_patients(train: Collection[str], valid: Collection[str]) -> None:
    """Raise ValueError if two sets of patients have members in common."""
    common = sorted(map(pseudonym, {*train} & {*valid}))
    if common:
        more = f" and {len(common) - _LISTED} more" if len(common) > _LISTED else ""
        raise ValueError(
            f"{len(common)} patients are in both training and validation data: {', '.join(common[:_LISTED])}{more}. "
            f"Scores on them would not be held out; take them out of one."
        )


def refuse_shared_folders(patients: Mapping[str, str | None]) -> None:
    """Raise ValueError if several folders each hold several volumes of unknown patients.

    Each folder may be one patient's, or not; only the user knows, so no patient can be held out.

    Args:
        patients: {path of a volume: its patient, or None}.
    """
    folders = Counter(os.path.dirname(path) for path, patient in patients.items() if patient is None)
    shared = [folder for folder, count in folders.items() if count > 1]
    if len(shared) > 1:
        raise ValueError(
            f"{len(shared)} folders have several volumes each, of unknown patients (first: {shared[0]}, "
            f"{folders[shared[0]]} volumes), so no patient can be held out. Name the patients by --patient_rule: parent, if "
            f"each of these folders is one patient's; folder, if the first folder below the data's is; file, if each volume "
            f"is another patient's; or a regular expression with one group."
        )


def pseudonym(patient: str) -> str:
    """Return what messages call a patient.

    A pseudonym of CT-RATE, a digest and the path of a volume whose patient is unknown stay; anything else becomes a digest.
    """
    is_plain = re.fullmatch(r"[a-z]+_\d+|dicom-[0-9a-f]{12}", patient) or os.path.isabs(patient) or is_address(patient)
    return patient if is_plain else f"#{digest(patient)}"
