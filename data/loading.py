"""Records from any data source: `load_records`, which all scripts call."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import datasets

from samf.data.addresses import address_suffix, folder_of, is_file_address, local_table, names_file
from samf.data.ct_rate.loader import load_ct_rate
from samf.data.ct_rate.sources import is_hub_name
from samf.data.patients import PatientRule, settle_patients
from samf.data.samf_csv import load_samf_csv
from samf.model.ct_object_store import is_store_address
from samf.utils.text_files import open_csv


class RecordLoader(Protocol):
    """A loader of a layout of its own, such as `samf.data.table_columns.TableColumns`."""

    def load(self, source: str | Path, split: str, **options: Any) -> datasets.Dataset:
        """Return the records of a split.

        Args:
            source: the data set.
            split: "train" or "valid".
            options: those of `load_records`.
        """
        ...


def load_records(
    source: str | Path,
    split: str,
    *,
    columns: RecordLoader | None = None,
    patient_rule: PatientRule | None = None,
    patient_column: str | None = None,
    needs_text: bool = True,
    **options: Any,
) -> datasets.Dataset:
    """Load the records of a split from any known kind of source.

    Args:
        source: CT-RATE's folder, its address in an object store or its name on the Hub, such as ibrahimhamamci/CT-RATE
            (`load_ct_rate`); or one of the paper's CSVs, or both with a comma between them (`load_samf_csv`), by their
            paths or addresses; "{split}" in them is replaced by the split, and `image_root` is the images' folder, by
            default that of the CSV.
        split: "train" or "valid".
        columns: loads a data set in another layout (`samf.data.table_columns.TableColumns`).
        patient_rule: reads patients from the volumes' paths; see `samf.data.patients`.
        patient_column: a CSV's column of patients.
        needs_text: False also takes rows of tables that have labels and no texts; their records have an empty report.
        options: of the loader. CSVs ignore `finding_names`, `vqa_files` and `cache_dir`.

    Raises:
        FileNotFoundError: an unknown source, or missing files.
        ValueError: an option that the source doesn't have, or a table without a column that it needs.
    """
    if columns is not None:
        records = columns.load(source, split, needs_text=needs_text, **options)
    else:
        records = _load_known_layout(source, split, patient_column=patient_column, **options)
    return settle_patients(records, str(source), patient_rule, data_root(options.get("image_root") or source))


def data_root(source: str | Path) -> str:
    """Return the folder of a data source, or its address: where paths of volumes start."""
    if is_file_address(str(source)):
        return folder_of(str(source)) if names_file(str(source)) else str(source).rstrip("/")
    root = Path(source).expanduser().absolute()
    return str(root if root.is_dir() else root.parent)


def _load_known_layout(source: str | Path, split: str, **options: Any) -> datasets.Dataset:
    """Load CT-RATE's layout or the paper's CSVs."""
    named = str(source).replace("{split}", split)
    path = Path(named).expanduser()
    names = [named] if path.exists() else [part.strip() for part in named.split(",")]
    if all(_is_csv(name) for name in names):
        return _load_csv_files(names, **options)
    if path.is_dir() or is_hub_name(named) or is_store_address(named):
        if options.pop("patient_column", None) is not None:
            raise ValueError(
                "patient_column is for tables; in CT-RATE's layout the file names give the patients, or --patient_rule."
            )
        if options.pop("image_root", None) is not None:
            raise ValueError(
                "image_root is for tables; in CT-RATE's layout the volumes' paths follow from their names."
            )
        return load_ct_rate(named, split, **options)
    raise FileNotFoundError(
        f"{path}: no such folder or CSV. Give CT-RATE's folder, one or two of the paper's CSV files, the name of a data "
        f"set on the Hub (ibrahimhamamci/CT-RATE), or a table in another layout with --volume_column."
    )


def _is_csv(name: str) -> bool:
    if is_file_address(name):
        return address_suffix(name) == ".csv"
    return Path(name).suffix == ".csv" and Path(name).expanduser().is_file()


def _load_csv_files(names: Sequence[str], image_root: str | Path | None = None, **options: Any) -> datasets.Dataset:
    """Load one or both of the paper's CSVs, which are recognised by their columns."""
    by_kind: dict[bool, Path] = {}
    with ExitStack() as files:
        for name in names:
            file = files.enter_context(local_table(name))
            with open_csv(file) as rows:
                is_report = "caption" in (rows.fieldnames or [])
            if is_report in by_kind:
                kind = "reports" if is_report else "multiple choice"
                raise ValueError(f"{by_kind[is_report]} and {file} both hold {kind}; give one of each.")
            by_kind[is_report] = file
        unused = ("finding_names", "vqa_files", "cache_dir")
        kept = {name: value for name, value in options.items() if name not in unused}
        root = image_root or data_root(names[0])
        return load_samf_csv(by_kind.get(True), by_kind.get(False), root, **kept)
