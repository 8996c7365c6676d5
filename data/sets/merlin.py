"""Merlin's abdominal CTs (Stanford): reports' findings, a split, and labels of 30 findings.

Layout: documentation/download.md of github.com/StanfordMIMI/Merlin (`merlin_data/`, `reports_final.xlsx`, labels 1, 0 and -1
in `zero_shot_findings_disease_cls.csv`). The column names "study id", "Findings" and "Split" are those that public code
reads, such as transform_report_to_json.py of github.com/alibaba-damo-academy/damo-radar. The tables name no patients: the
18,317 patients of 25,494 scans are unknown here, and only the given split keeps them apart.
"""

from pathlib import Path

import datasets

from samf.data.labels import known_label
from samf.data.schema import IGNORE_INDEX
from samf.data.sets.files import VolumeIndex, by_key, find_table, make_table, read_table, require_table
from samf.data.sets.named import NamedSet
from samf.data.table_columns import TableColumns

_ID = "study id"


def join(root: Path) -> datasets.Dataset:
    """Return the studies with their findings, split and labels.

    Raises:
        FileNotFoundError: there is no reports_final.
        ValueError: a table without a column that it needs.
    """
    reports = read_table(require_table(root, "reports_final.xlsx", "reports_final.csv"), [_ID, "Findings"])
    labels_file = find_table(root, "zero_shot_findings_disease_cls.csv")
    labels = by_key(read_table(labels_file, [_ID]), _ID) if labels_file else {}
    names = [name for name in next(iter(labels.values()), {}) if name != _ID]
    index = VolumeIndex(root, "merlin_data", "merlinabdominalctdataset/merlin_data", "")
    rows = []
    for study, row in by_key(reports, _ID).items():
        own = {name: _label(labels.get(study, {}).get(name), f"{labels_file}: {study}, {name}") for name in names}
        rows.append({_ID: study, "volume": index.path(study), **row, **own})
    return make_table(rows, names)


def _label(text: str | None, where: str) -> int | None:
    """Return 1 or 0; None for a finding that the report doesn't mention (-1)."""
    label = known_label(text, where)
    return None if label == IGNORE_INDEX else label


SET = NamedSet(
    name="merlin",
    join=join,
    columns=TableColumns(volume="volume", report="Findings", split="Split", scan=_ID),
    home="the Stanford AIMI Center (Merlin Abdominal CT Dataset)",
    layout="reports_final.xlsx, zero_shot_findings_disease_cls.csv and merlin_data/STUDY.nii.gz",
    aliases={
        "Atelectasis": "atelectasis",
        "Cardiomegaly": "cardiomegaly",
        "Hiatal hernia": "hiatal_hernia",
        "Pleural effusion": "pleural_effusion",
    },
)
