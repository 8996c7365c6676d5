"""INSPECT: CT pulmonary angiograms of Stanford with the impressions of their reports, a split, and labels.

Layout: the 2025 release as public code reads it (`splits_YYYYMMDD.tsv`, `study_mapping_…`, `impressions_…`, `labels_…`,
joined by `impression_id`; volumes `CTPA/{image_id}.nii.gz`; patients `person_id`), and github.com/som-shahlab/INSPECT_public
(`image/radfusion3/data/dataset_2d.py`, where `image_id` may end in .nii.gz). The 2023 release has `Final_Impressions.csv`,
and volumes named by `impression_id`. Some studies are listed twice, with equal rows; the first one is used.
"""

from pathlib import Path

import datasets

from samf.data.sets.files import VolumeIndex, by_key, find_table, make_table, read_table, require_table
from samf.data.sets.named import NamedSet
from samf.data.table_columns import TableColumns

_ID = "impression_id"
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")
_FACTS = (_ID, "person_id", "image_id", "split", "impressions")


def join(root: Path) -> datasets.Dataset:
    """Return the studies with their impressions, patients, split and labels.

    Raises:
        FileNotFoundError: there are no impressions.
        ValueError: a table without a column that it needs.
    """
    impressions = require_table(root, "impressions_*.tsv", "[Ff]inal_[Ii]mpressions.csv", "impressions*.csv")
    studies = by_key(read_table(impressions, [_ID, "impressions"]), _ID)
    for name in ("study_mapping", "splits"):
        if (path := find_table(root, f"{name}_*.tsv", f"{name}*.csv")) is not None:
            for study, row in by_key(read_table(path, [_ID]), _ID).items():
                if study in studies:
                    studies[study] = {**row, **{key: value for key, value in studies[study].items() if value}}
    path = find_table(root, "labels_*.tsv", "labels*.csv")
    labels = by_key(read_table(path, [_ID]), _ID) if path else {}
    names = _label_names(labels)
    index = VolumeIndex(root, "CTPA", "full/CTPA", "")
    rows = []
    for study, row in studies.items():
        facts = {name: row.get(name) or None for name in _FACTS}
        own = {name: _label(labels.get(study, {}).get(name)) for name in names}
        rows.append({**facts, "volume": index.path(row.get("image_id") or study), **own})
    return make_table(rows, names)


def _label_names(labels: dict[str, dict[str, str]]) -> list[str]:
    """Return the columns that hold truth values; others are times to an event and identifiers."""
    known = {"", "censored", "nan", *_TRUE, *_FALSE}
    columns = [name for name in next(iter(labels.values()), {}) if name not in _FACTS]
    return [name for name in columns if {(row.get(name) or "").strip().lower() for row in labels.values()} <= known]


def _label(text: str | None) -> int | None:
    """Return 1 or 0; None for an unknown or censored one."""
    text = (text or "").strip().lower()
    return 1 if text in _TRUE else 0 if text in _FALSE else None


SET = NamedSet(
    name="inspect",
    join=join,
    columns=TableColumns(volume="volume", report="impressions", patient="person_id", split="split", scan=_ID),
    home="the Stanford AIMI Center (INSPECT)",
    layout="impressions_*.tsv, study_mapping_*.tsv, splits_*.tsv, labels_*.tsv and CTPA/IMAGE.nii.gz",
)
