"""Data sets opened as `datasets.Dataset`s: from the Hub, from `save_to_disk`, from Parquet, CSV or JSON."""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
from huggingface_hub.errors import HfHubHTTPError

from samf.data.addresses import TABLE_SUFFIXES, address_suffix, is_file_address, local_table
from samf.data.ct_rate.sources import HUB_NAME
from samf.data.schema import JsonObject
from samf.model.ct_download import file_path, redacted
from samf.utils.text_files import open_csv, read_text

logger = logging.getLogger(__name__)

_SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes


def open_table(source: str | Path, split: str) -> datasets.Dataset | datasets.DatasetDict:
    """Open a data set; one without named splits is a Dataset.

    Args:
        source: as for `samf.data.table_columns.TableColumns.load`.
        split: replaces "{split}" in `source`.

    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: `datasets` can't read it.
        CTReadError: a table at an address can't be fetched.
    """
    named = str(source).replace("{split}", split)
    if is_file_address(named):
        return _open_address(named)
    path = Path(file_path(named)).expanduser()
    if path.is_file():
        return _open_file(path)
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        return datasets.load_from_disk(str(path))
    match = HUB_NAME.fullmatch(named)
    if not path.is_dir() and match is None:
        raise FileNotFoundError(f"{path}: no such file or folder, and no name of a data set on the Hub (owner/name).")
    try:
        if path.is_dir() or match is None:
            return datasets.load_dataset(str(path))
        return datasets.load_dataset(match["name"], revision=match["revision"])
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        kind = FileNotFoundError if isinstance(error, (OSError, HfHubHTTPError)) else ValueError
        raise kind(
            f"{named}: `datasets.load_dataset` can't read it ({type(error).__name__}: {str(error).splitlines()[0]}). Check the "
            f"name, the network and, for a gated data set, your login (hf auth login)."
        ) from error


def select_part(loaded: datasets.DatasetDict, spec: str, source: str | Path) -> datasets.Dataset:
    """Return a split, or a part of one, of an opened data set.

    Args:
        loaded: the data set.
        spec: a split's name, or a part in the notation of `load_dataset`, such as "train[90%:]".
        source: the data set's name, for the message.

    Raises:
        ValueError: there is no such split.
    """
    try:
        lengths = {name: len(table) for name, table in loaded.items()}
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(
            f"{source}: no split {spec!r}; it has {', '.join(loaded)}. Expected one of them, or a part such as train[90%:]."
        ) from error
    tables = [
        loaded[part.splitname].select(range(part.from_ or 0, lengths[part.splitname] if part.to is None else part.to))
        for part in parts
    ]
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


def split_by_column(
    loaded: datasets.Dataset | datasets.DatasetDict, column: str, source: str | Path
) -> datasets.Dataset | datasets.DatasetDict:
    """Return the splits that a column names; the data set as it is, if the column is empty in all rows.

    Args:
        loaded: the data set; splits that it has already are joined.
        column: holds names such as train, in any case. Rows without one are left out, with a warning.
        source: the data set's name, for messages.

    Raises:
        ValueError: there is no such column.
    """
    table = loaded if isinstance(loaded, datasets.Dataset) else datasets.concatenate_datasets(list(loaded.values()))
    if column not in table.column_names:
        raise ValueError(f"{source}: no column {column}; its columns are {', '.join(table.column_names[:50])}.")
    rows: dict[str, list[int]] = {}
    for number, value in enumerate(table[column][:]):
        rows.setdefault("" if value is None else str(value).strip().lower(), []).append(number)
    unnamed = rows.pop("", [])
    if not rows:
        return table
    if unnamed:
        logger.warning("%s: %d rows without a split in column %s; left out", source, len(unnamed), column)
    if odd := sorted(name for name in rows if not re.fullmatch(r"\w[\w.-]*", name)):
        raise ValueError(f"{source}: column {column} names the split {odd[0]!r}; expected one word, such as train.")
    # Named fingerprints: `datasets` would hash the lists of rows, number by number.
    prints = {name: hashlib.sha256(f"{table._fingerprint} {column} {name}".encode()).hexdigest()[:16] for name in rows}
    return datasets.DatasetDict(
        {name: table.select(numbers, new_fingerprint=prints[name]) for name, numbers in rows.items()}
    )


def _open_address(address: str) -> datasets.Dataset:
    if address_suffix(address) not in TABLE_SUFFIXES:
        raise ValueError(f"{redacted(address)}: expected the address of a {', '.join(TABLE_SUFFIXES)} file.")
    with local_table(address) as path:
        return _open_file(path)


def _open_file(path: Path) -> datasets.Dataset:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        with open_csv(path) as rows:
            return datasets.Dataset.from_list(list(rows), features=_strings(rows.fieldnames))
    if kind == ".parquet":
        return datasets.Dataset.from_parquet(str(path))
    if kind in (".json", ".jsonl"):
        return datasets.Dataset.from_list(_json_rows(path))
    raise ValueError(f"{path}: expected a .csv, .tsv, .json, .jsonl or .parquet file, or a folder.")


def _strings(names: Sequence[str] | None) -> datasets.Features:
    return datasets.Features({name: datasets.Value("string") for name in names or ()})


def _json_rows(path: Path) -> list[JsonObject]:
    """Read a JSON array of objects, or one object per line."""
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}). Expected an array of objects, or one object per line."
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected an array of objects, or one object per line; found other values.")
    return rows
