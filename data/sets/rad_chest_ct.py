"""RAD-ChestCT: chest CTs of Duke with labels of 84 abnormalities at 52 locations, and without reports.

Layout: https://zenodo.org/records/6406114 (3,630 of 35,747 volumes), glassboxmedicine.com's description of it, and the
authors' code, github.com/rachellea/explainable-ct-ai (`NoteAcc_DEID`, `MRN_DEID` and `Set_Assigned` of their tables) and
github.com/rachellea/sarle-labeler (locations). Columns of the label tables are "abnormality*location".

`{NoteAcc_DEID}.npz` are read by `samf.model.ct_arrays`. A label is 1 where any location has it. The public release lists
its volumes in Summary_3630.csv; where that is present, other rows of the label tables are left out.
"""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from samf.data.sets.files import VolumeIndex, by_key, find_table, make_table, read_table
from samf.data.sets.named import NamedSet
from samf.data.table_columns import TableColumns

_ID, _PATIENT = "NoteAcc_DEID", "MRN_DEID"
_SPLITS = ("train", "valid", "test")
_LABELS = "img{}_Abnormality_and_Location_Labels.csv"
_PATIENT_TABLES = ("CT_Scan_Metadata_Complete*.csv", "Extrema*.csv", "Summary_*.csv")
_LUNG = {
    *("lung", "left_lung", "right_lung", "left_upper", "left_mid", "left_lower"),
    *("right_upper", "right_mid", "right_lower"),
}
# CT-RATE's findings that are an abnormality in the lungs; the same abnormality elsewhere is another finding.
_IN_LUNGS = {"Lung nodule": "nodule", "Lung opacity": "opacity"}
_SAME = {
    "Cardiomegaly": "cardiomegaly",
    "Pericardial effusion": "pericardial_effusion",
    "Lymphadenopathy": "lymphadenopathy",
    "Emphysema": "emphysema",
    "Atelectasis": "atelectasis",
    "Pleural effusion": "pleural_effusion",
    "Peribronchial thickening": "bronchial_wall_thickening",
    "Consolidation": "consolidation",
    "Bronchiectasis": "bronchiectasis",
    "Interlobular septal thickening": "septal_thickening",
}


def join(root: Path) -> datasets.Dataset:
    """Return the volumes of all splits with their labels, one column per abnormality.

    Raises:
        FileNotFoundError: there is no label table.
        ValueError: a label table of another kind.
    """
    tables = {split: find_table(root, _LABELS.format(split)) for split in _SPLITS}
    if not any(tables.values()):
        raise FileNotFoundError(f"{root}: no {_LABELS.format('train')} or its like for valid and test.")
    rows = [row for split, path in tables.items() if path for row in _read_split(path, split)]
    if listed := find_table(root, "Summary_*.csv"):
        released = set(by_key(read_table(listed, [_ID]), _ID))
        rows = [row for row in rows if row[_ID] in released]
    index, patients = VolumeIndex(root, "images", "npz", ""), _patients(root)
    for row in rows:
        name = str(row[_ID])
        row |= {"volume": index.path(name, ".npz"), "patient": patients.get(name)}
    texts = {_ID, "split", "volume", "patient"}
    return make_table(rows, [name for name in (rows[0] if rows else ()) if name not in texts])


def _read_split(path: Path, split: str) -> list[dict[str, object]]:
    """Return the id, the split and the labels of each row of a label table.

    The table has thousands of columns and tens of thousands of rows, so that it is read line by line, as arrays.
    """
    with path.open(encoding="utf-8-sig") as stream:
        columns = stream.readline().rstrip("\r\n").split(",")
        if columns[0] != _ID:
            raise ValueError(f"{path}: no first column {_ID}; its columns are {', '.join(columns[:10])}.")
        findings = _findings_of(columns[1:])
        names = list(dict.fromkeys(finding for own in findings for finding in own))
        places = [np.array([names.index(finding) for finding in own], dtype=np.intp) for own in findings]
        rows: list[dict[str, object]] = []
        for number, line in enumerate(filter(str.strip, stream), start=1):
            name, _, rest = line.rstrip("\r\n").partition(",")
            found = np.zeros(len(names), dtype=np.int8)
            for hit in np.flatnonzero(_is_one(rest, len(findings), f"{path}: row {number} below the header")):
                found[places[hit]] = 1
            rows.append({_ID: name, "split": split, **dict(zip(names, found.tolist(), strict=True))})
    return rows


def _findings_of(columns: Sequence[str]) -> list[list[str]]:
    """Return for each label column the findings that it is a label of: its abnormality, perhaps CT-RATE's as well."""
    found = []
    for column in columns:
        abnormality, _, location = column.partition("*")
        own = [name for name, same in _IN_LUNGS.items() if same == abnormality and location in _LUNG]
        found.append([abnormality, *own])
    return found


def _is_one(text: str, count: int, where: str) -> np.ndarray:
    """Return whether each of `count` numbers with commas is 1, (count,). Raises ValueError for anything but 0 and 1."""
    codes = np.frombuffer(text.encode(), dtype=np.uint8)
    if len(codes) == 2 * count - 1 and (codes[1::2] == ord(",")).all():
        values = codes[::2].astype(np.float32) - ord("0")
    else:  # "1.0", or nothing
        try:
            values = np.array([float(value or 0) for value in text.split(",")], dtype=np.float32)
        except ValueError as error:
            raise ValueError(f"{where}: not labels 0 and 1 ({error}).") from error
    if len(values) != count or not np.isin(values, (0, 1)).all():
        raise ValueError(f"{where}: {len(values)} values; expected {count}, each 0 or 1.")
    return values == 1


def _patients(root: Path) -> dict[str, str]:
    """Return {volume: patient} by the first table that has both; {} without one."""
    for pattern in _PATIENT_TABLES:
        if (path := find_table(root, pattern)) is not None:
            rows = read_table(path)
            if rows and {_ID, _PATIENT} <= rows[0].keys():
                return {row[_ID]: row[_PATIENT] for row in rows if row[_PATIENT]}
    return {}


SET = NamedSet(
    name="rad_chest_ct",
    join=join,
    columns=TableColumns(volume="volume", patient="patient", split="split", scan=_ID),
    home="zenodo.org/records/6406114",
    layout=f"{_LABELS.format('train')}, the same for valid and test, and *.npz in the folder or in images/",
    aliases=_SAME,
)
