"""Exchange volumes between patients: what a model still answers correctly then, it didn't see in the image."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import datasets

from samf.data.patients import patient_of_record
from samf.data.schema import Record

__all__ = ["shuffle_volumes"]

# The fields that describe a volume and move with it.
_VOLUME_FIELDS = ("volume", "rescale")


def shuffle_volumes(records: Sequence[Record] | datasets.Dataset, seed: int = 0) -> Sequence[Record] | datasets.Dataset:
    """Return the same questions, each with a volume of another patient.

    The assignment is a derangement of the patients, deterministic by `seed`: patient p's k-th volume becomes the k-th
    (modulo their number) of one other patient. Records without a volume stay as they are. Returns a Dataset for a Dataset,
    else a list of new dicts.

    Raises:
        ValueError: fewer than two patients have volumes.
    """
    volumes: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if record["volume"] is not None:
            volumes[patient_of_record(record)].setdefault(record["volume"], record)
    if len(volumes) < 2:
        raise ValueError(f"Shuffling volumes needs at least two patients; the records' volumes are of {len(volumes)}.")
    patients = sorted(volumes)
    random.Random(seed).shuffle(patients)
    replacement: dict[str | None, Record] = {}
    for patient, giver in zip(patients, patients[1:] + patients[:1], strict=True):
        others = list(volumes[giver].values())
        replacement |= {volume: others[k % len(others)] for k, volume in enumerate(volumes[patient])}
    donors: list[Mapping[str, Any]] = [replacement.get(record["volume"], record) for record in records]
    moved = [
        {name: donor[name] for name in _VOLUME_FIELDS if name in record}
        for record, donor in zip(records, donors, strict=True)
    ]
    if isinstance(records, datasets.Dataset):
        for name in moved[0]:
            column = [fields[name] for fields in moved]
            feature = records.features[name]
            records = records.remove_columns(name).add_column(name, column, feature=feature)
        return records
    return [cast(Record, {**record, **fields}) for record, fields in zip(records, moved, strict=True)]
