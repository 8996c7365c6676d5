"""The files of a data set's folder: its tables, by name patterns, and its volumes, by their stems."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import datasets

from samf.data.file_kinds import VOLUME_SUFFIXES
from samf.utils.text_files import open_csv

Row: TypeAlias = Mapping[str, object]

_DEPTH = 3  # folders below the data's in which tables are looked for: releases nest them differently
_FIELD_LIMIT = 1 << 24  # characters of a report in a CSV; the csv module's own limit is 131,072


def find_table(root: Path, *patterns: str) -> Path | None:
    """Return the last table, by name, that fits the first pattern which any fits; None without one.

    Args:
        root: the data set's folder. Tables nearer to it are preferred.
        patterns: such as "splits_*.tsv".
    """
    for pattern in patterns:
        for depth in range(_DEPTH):
            if found := sorted(root.glob("*/" * depth + pattern)):
                return found[-1]
    return None


def require_table(root: Path, *patterns: str) -> Path:
    """Return a table as `find_table` does. Raises FileNotFoundError without one."""
    found = find_table(root, *patterns)
    if found is None:
        raise FileNotFoundError(f"{root}: no {' or '.join(patterns)} here or up to two folders below.")
    return found


def read_table(path: Path, required: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return the rows of a .csv, .tsv or .xlsx table, as texts.

    Args:
        path: the table.
        required: columns that must be there.

    Raises:
        ValueError: a column is absent, or the file is no such table.
        ImportError: an .xlsx file, and openpyxl isn't installed.
    """
    rows = _read_workbook(path) if path.suffix.lower() == ".xlsx" else _read_text(path)
    columns = list(rows[0]) if rows else []
    if absent := [name for name in required if name not in columns]:
        raise ValueError(f"{path}: no column {', '.join(absent)}; its columns are {', '.join(columns[:30])}.")
    return rows


def _read_text(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(_FIELD_LIMIT)
    with open_csv(path) as rows:
        return list(rows)


def _read_workbook(path: Path) -> list[dict[str, str]]:
    """Return the rows of a workbook's first sheet."""
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise ImportError(f"{path}: reading .xlsx needs openpyxl: pip install openpyxl, or save it as CSV.") from error
    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable .xlsx ({type(error).__name__}). Download it again.") from error
    lines: Iterator[tuple[object, ...]] = book.worksheets[0].iter_rows(values_only=True)
    names = [_text(value) for value in next(lines, ())]
    rows = [dict(zip(names, map(_text, line), strict=False)) for line in lines if any(v is not None for v in line)]
    book.close()
    return rows


def by_key(rows: Sequence[dict[str, str]], key: str) -> dict[str, dict[str, str]]:
    """Return the first row of each value of a column; rows without a value are left out."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if value := (row.get(key) or "").strip():
            found.setdefault(value, row)
    return found


class VolumeIndex:
    """The volumes of a folder by the stems of their names, from one listing per folder.

    Args:
        root: the data set's folder.
        folders: below it, the first of which that exists is listed; "" is the folder itself.
    """

    def __init__(self, root: Path, *folders: str):
        self.folder = next((name for name in folders if (root / name).is_dir()), folders[0])
        names = os.listdir(root / self.folder) if (root / self.folder).is_dir() else []
        self._names = {_stem(name): name for name in names if name.lower().endswith(VOLUME_SUFFIXES)}

    def path(self, stem: str, suffix: str = ".nii.gz") -> str:
        """Return the path of a volume below the data set's folder, which has `suffix` where there is no such volume."""
        return os.path.join(self.folder, self._names.get(_stem(stem), f"{_stem(stem)}{suffix}"))


def make_table(rows: Sequence[Row], labels: Sequence[str] = ()) -> datasets.Dataset:
    """Return rows as a table of texts and labels.

    Args:
        rows: with equal keys.
        labels: names of those that are labels: 1, 0, or None where unknown.

    Raises:
        FileNotFoundError: there are no rows.
    """
    if not rows:
        raise FileNotFoundError("No rows in its tables.")
    names = list(rows[0])
    kinds = {name: datasets.Value("int8" if name in set(labels) else "string") for name in names}
    columns = {name: [row.get(name) for row in rows] for name in names}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def _stem(name: str) -> str:
    lowered = name.lower()
    return next((name[: -len(suffix)] for suffix in (".nii.gz", ".nii", ".npz") if lowered.endswith(suffix)), name)


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()
