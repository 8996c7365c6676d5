"""AbdomenAtlas 3.0: abdominal CTs of 17 public data sets with reports that were made from segmentations.

Layout: huggingface.co/datasets/AbdomenAtlas/AbdomenAtlas3.0Mini (`AbdomenAtlas3.0MiniWithMeta.csv`,
`image_only/BDMAP_00000001/ct.nii.gz`, `TrainTestIDS/IID_train.csv` and `IID_test.csv`), github.com/MrGiovanni/RadGPT, and
github.com/MrGiovanni/AbdomenAtlas (`BDMAP_00000001/ct.nii.gz`). Reports: "structured report" (made from the masks),
"narrative report" (rewritten by a language model) and, where a radiologist's notes exist, "fusion structured report" and
"fusion narrative report"; `--report_column` chooses one. Patients are unknown, and one patient may be in several of the 17
data sets under different ids.
"""

import os
from pathlib import Path

import datasets

from samf.data.sets.files import by_key, find_table, make_table, read_table, require_table
from samf.data.sets.named import NamedSet
from samf.data.table_columns import TableColumns

_ID = "BDMAP ID"
_LESIONS = {
    "liver lesion": "number of liver lesion instances",
    "kidney lesion": "number of kidney lesion instances",
    "pancreatic lesion": "number of pancreatic lesion instances",
}
_FOLDERS = ("image_only", "", "AbdomenAtlas1.1Mini", "AbdomenAtlas3.0Mini")


def join(root: Path) -> datasets.Dataset:
    """Return the volumes with their reports, the split by the lists of ids, and whether organs have lesions.

    Raises:
        FileNotFoundError: there is no table of reports.
        ValueError: a table without a column that it needs.
    """
    reports = by_key(read_table(require_table(root, "AbdomenAtlas3*.csv", "*AbdomenAtlas*.csv"), [_ID]), _ID)
    lists = {split: find_table(root, f"IID_{split}.csv") for split in ("train", "test")}
    splits = {name: split for split, path in lists.items() if path for name in by_key(read_table(path, [_ID]), _ID)}
    folder = next((name for name in _FOLDERS if any((root / name).glob("BDMAP_*"))), _FOLDERS[0])
    rows = []
    for name, row in reports.items():
        labels = {finding: _has(row[column]) for finding, column in _LESIONS.items() if column in row}
        own = {"volume": os.path.join(folder, name, "ct.nii.gz"), "split": splits.get(name, "" if splits else "train")}
        rows.append({**row, **own, **labels})
    return make_table(rows, list(_LESIONS))


def _has(count: str) -> int | None:
    """Return whether a number of lesions is above 0; None where it is missing."""
    try:
        return int(float(count) > 0)
    except ValueError:
        return None


SET = NamedSet(
    name="abdomen_atlas",
    join=join,
    columns=TableColumns(volume="volume", report="narrative report", split="split", scan=_ID),
    home="huggingface.co/datasets/AbdomenAtlas",
    layout="AbdomenAtlas3.0MiniWithMeta.csv and image_only/BDMAP_*/ct.nii.gz",
)
