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
import pyarrow as pa
import pyarrow.csv

from samf.data.sets.files import VolumeIndex, by_key, find_table, read_table
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
    parts = [_read_split(path, split) for split in _SPLITS if (path := find_table(root, _LABELS.format(split)))]
    if not parts:
        raise FileNotFoundError(f"{root}: no {_LABELS.format('train')} or its like for valid and test.")
    table = pa.concat_tables(parts, promote_options="default")
    names = table.column(_ID).to_pylist()
    if listed := find_table(root, "Summary_*.csv"):
        released = set(by_key(read_table(listed, [_ID]), _ID))
        table = table.filter(pa.array([name in released for name in names]))
        names = table.column(_ID).to_pylist()
    index, patients = VolumeIndex(root, "images", "npz", ""), _patients(root)
    table = table.append_column("volume", pa.array([index.path(name, ".npz") for name in names], pa.string()))
    table = table.append_column("patient", pa.array([patients.get(name) for name in names], pa.string()))
    return datasets.Dataset(table)


def _read_split(path: Path, split: str) -> pa.Table:
    """Return the ids, the split and the labels of a label table.

    The table has thousands of columns, so that it is parsed by pyarrow into bytes, and joined as arrays.
    """
    with open(path, encoding="utf-8-sig") as stream:
        columns = stream.readline().rstrip("\r\n").split(",")
    kinds = {name: pa.string() if name == _ID else pa.int8() for name in columns}
    try:
        rows = pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=kinds))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a table of labels 0 and 1 ({str(error).splitlines()[0]}).") from error
    if _ID not in rows.column_names:
        raise ValueError(f"{path}: no column {_ID}; its columns are {', '.join(columns[:10])}.")
    found: dict[str, list[str]] = {}
    for column in rows.column_names:
        abnormality, star, _ = column.partition("*")
        if star or column != _ID:
            found.setdefault(abnormality, []).append(column)
    parts = {_ID: rows.column(_ID), "split": pa.array([split] * len(rows))}
    parts |= {name: _any(rows, own) for name, own in sorted(found.items())}
    for finding, abnormality in _IN_LUNGS.items():
        own = [name for name in found.get(abnormality, ()) if name.partition("*")[2] in _LUNG]
        if own:
            parts[finding] = _any(rows, own)
    return pa.table(parts)


def _any(rows: pa.Table, columns: Sequence[str]) -> pa.Array:
    """Return whether any of the label columns is 1, as int8 (N,)."""
    found = np.zeros(len(rows), dtype=np.int8)
    for column in columns:
        np.maximum(found, rows.column(column).fill_null(0).to_numpy(), out=found)
    return pa.array(found, pa.int8())


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
