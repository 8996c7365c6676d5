"""The patient of a volume, a record and a prediction: one rule for all callers."""

import pytest

from samf.data.patients import named_patient, patient_by_name, patient_of_record
from samf.evaluation.metrics.sampled_metric import patient_keys, unknown_patients

RECORD = {"volume": None, "scan_id": "case 12", "id": "q1", "patient_id": None}


@pytest.mark.parametrize(
    ("row", "patient"),
    [
        ({"patient_id": "p1", "scan_id": "valid_53_a"}, "p1"),
        ({"patient_id": 0}, "0"),
        ({"patient_id": "", "scan_id": "valid_53_a"}, "valid_53"),
        ({"scan_id": "case 12", "id": "train_7_b_1#2"}, "train_7"),
        ({"scan_id": "case 12", "volume": "/ct/valid_9_a_1.nii.gz"}, None),  # with shuffled volumes another patient's
        ({"scan_id": "test_9_a"}, None),
    ],
)
def test_the_patient_that_a_row_names(row, patient):
    assert named_patient(row) == patient
    assert unknown_patients([row]) == (patient is None)
    assert patient_keys([row]) == [patient or row["scan_id"]]


@pytest.mark.parametrize(
    ("record", "patient"),
    [
        (RECORD, "case 12"),
        ({**RECORD, "volume": "/ct/valid_9_a_1.nii.gz"}, "valid_9"),
        ({**RECORD, "volume": "/ct/valid_9_a_1.nii.gz", "patient_id": "p1"}, "p1"),
        ({**RECORD, "scan_id": "valid_53_a"}, "valid_53"),
    ],
)
def test_the_patient_of_a_record(record, patient):
    assert patient_of_record(record) == patient


def test_a_volumes_name_must_be_ct_rates_in_full():
    """Other data sets have files like train_1_0001.nii.gz; an id may begin with a scan's name."""
    assert patient_by_name("/ct/train_1_a_2.nii.gz") == "train_1"
    assert patient_by_name("/ct/train_1_0001.nii.gz") is None
