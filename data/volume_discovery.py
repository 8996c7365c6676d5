"""The volumes that data sources hold: each path once, with its rescale, its patient, and whether it was named or found."""

import fnmatch
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import datasets

from samf.cache.screening import mask_by_header
from samf.data.ct_rate.loader import CtRateFolder, VolumeName, load_ct_rate, load_records
from samf.data.ct_rate.sources import is_hub_name
from samf.data.patients import PATIENT_COLUMN, PatientRule, find_patients
from samf.data.table_columns import TableColumns
from samf.model.ct_dicom_files import walk_once
from samf.model.ct_download import file_path, is_address
from samf.model.ct_signatures import looks_like_dicom
from samf.utils.text_files import read_lines

logger = logging.getLogger(__name__)

VolumeKey = tuple[str, tuple[float, ...] | None]  # a path, and its rescale (None = as the file says)

SPLITS = ("train", "valid")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy", ".npz", ".zip")
MASK = "8-bit masks or pictures"  # why a file is passed over
_HEAD = 352  # bytes that tell what a file is
_LOOKED_INTO = 5  # files of a folder that are no volumes: is it one of DICOM slices?


@dataclass(frozen=True)
class SourceOptions:
    """How data is looked through.

    Attributes:
        splits: of CT-RATE, of CSVs with "{split}" and of data sets with named columns.
        on_missing: volumes that a table names but that aren't there: "error", "skip" (counted in the log).
        patterns: of the volumes found in folders those that fit one; a pattern with "/" is for the path below the folder,
            one without for the name, "*" stands for anything. () = all.
        columns: of a table or data set in another layout than CT-RATE's; None = there is none.
        patient_rule: see `samf.data.patients`.
        patient_column: of the paper's CSVs.
    """

    splits: tuple[str, ...] = SPLITS
    on_missing: str = "error"
    patterns: tuple[str, ...] = ()
    columns: TableColumns | None = None
    patient_rule: PatientRule | None = None
    patient_column: str | None = None


@dataclass(frozen=True)
class FoundVolumes:
    """Volumes of one or several sources.

    Attributes:
        keys: each volume once, in a fixed order.
        searched: paths that nobody named: what turns out to be no CT there is passed over, and no failure.
        patients: by path, None where unknown; {} if they weren't asked for.
        passed_over: how many files were passed over for which reason.
    """

    keys: list[VolumeKey]
    searched: frozenset[str] = frozenset()
    patients: dict[str, str | None] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)

    def only(self, kept: Iterable[VolumeKey]) -> "FoundVolumes":
        """Return those of the volumes that are in `kept`."""
        kept = set(kept)
        return FoundVolumes([key for key in self.keys if key in kept], self.searched, self.patients, self.passed_over)


def join_found(parts: Sequence[FoundVolumes]) -> FoundVolumes:
    """Return the volumes of all parts, each once.

    Raises:
        ValueError: one volume with two different rescales.
    """
    rescales: dict[str, tuple[float, ...] | None] = {}
    for path, rescale in chain.from_iterable(part.keys for part in parts):
        if rescales.setdefault(path, rescale) != rescale:
            raise ValueError(f"{path}: two sources have it, with rescale {rescales[path]} and {rescale}.")
    named = {path for part in parts for path, _ in part.keys if path not in part.searched}
    patients: dict[str, str | None] = {}
    for part in parts:
        patients |= {path: patient for path, patient in part.patients.items() if patient or path not in patients}
    return FoundVolumes(
        list(rescales.items()),
        frozenset(path for path in rescales if path not in named),
        patients,
        sum((part.passed_over for part in parts), Counter()),
    )


def find_volumes(data: Sequence[str], *, splits: Sequence[str] = SPLITS, on_missing: str = "error") -> list[VolumeKey]:
    """Return the volumes of `search_volumes`, by default options."""
    return search_volumes(data, SourceOptions(tuple(splits), on_missing)).keys


def search_volumes(data: Sequence[str], options: SourceOptions = SourceOptions()) -> FoundVolumes:
    """Find all volumes of all sources, in a fixed order. Patients are not looked up.

    Args:
        data: CT-RATE's folder (v1 or v2) or name on the Hub, for the volumes that have reports; the paper's CSVs, as for
            `load_records`; a table or data set whose columns `options` names; folders with volumes or DICOM folders
            somewhere below them; a .txt file with one path or address a line, relative ones from its folder; single
            volumes, or addresses of such.
        options: how they are looked through.

    Raises:
        FileNotFoundError: a source has no volume, or one is missing; says what is looked for.
        ValueError: one volume with two different rescales.
    """
    found = join_found([_volumes_of(source, options) for source in data])
    for reason, count in found.passed_over.most_common():
        logger.warning("%d files passed over: %s", count, reason)
    return found


def find_splits(source: str, options: SourceOptions, with_patients: bool = True) -> dict[str, FoundVolumes]:
    """Find a source's volumes by split, with their patients; a source without splits is all "train"."""
    by_split = _volumes_by_split(source, options) or {"train": search_volumes([source], options)}
    if not with_patients:
        return by_split
    root = str(Path(source).expanduser().absolute())
    return {
        split: FoundVolumes(
            found.keys,
            found.searched,
            find_patients([path for path, _ in found.keys], found.patients, options.patient_rule, root),
            found.passed_over,
        )
        for split, found in by_split.items()
    }


def distinct_volumes(*records: datasets.Dataset) -> list[VolumeKey]:
    """Each volume of the records once, in the order of the paths."""
    return sorted(dict(chain.from_iterable(map(_volumes_in, records))).items())


def _volumes_in(records: datasets.Dataset) -> list[VolumeKey]:
    """Each volume of the records once, in their order."""
    columns = records["rescale"][:] if "rescale" in records.column_names else [None] * len(records)
    pairs = zip(records["volume"][:], columns, strict=True)
    return list({path: tuple(rescale) if rescale else None for path, rescale in pairs if path}.items())


def _named_volumes(records: datasets.Dataset) -> FoundVolumes:
    """What records name, with the patients that they name."""
    patients = dict(zip(records["volume"][:], records[PATIENT_COLUMN][:], strict=True))
    patients.pop(None, None)
    return FoundVolumes(_volumes_in(records), patients=patients)


def _volumes_by_split(source: str, options: SourceOptions) -> dict[str, FoundVolumes]:
    """The volumes of a source that has splits, in its tables' order; {} for any other source."""
    path, splits, on_missing = Path(source).expanduser().absolute(), options.splits, options.on_missing
    if options.columns is not None:
        return {split: _named_volumes(rows) for split, rows in options.columns.load_splits(source, splits, on_missing)}
    if is_hub_name(source) and not path.exists():
        return {split: _named_volumes(load_ct_rate(source, split, tasks=["report"])) for split in splits}
    if path.suffix.lower() == ".csv" and not path.is_dir():
        named = splits if "{split}" in source else splits[:1]
        of_table = {"on_missing": on_missing, "patient_column": options.patient_column}
        return {split: _named_volumes(load_records(source, split, **of_table)) for split in named}
    folders = _ct_rate_folders(path, splits) if path.is_dir() else []
    return {
        folder.split: _named_volumes(load_ct_rate(path, folder.split, tasks=["report"], on_missing=on_missing))
        for folder in folders
        if folder.reports or folder.vqa
    }


def volumes_below(
    root: Path, patterns: Sequence[str] = (), passed_over: Counter[str] | None = None
) -> Iterator[VolumeKey]:
    """Find volume files and DICOM folders in and below `root`, in the order of their paths, each folder once.

    Args:
        root: a folder.
        patterns: see `SourceOptions`.
        passed_over: counts what is left out.
    """
    passed_over = Counter() if passed_over is None else passed_over
    for folder, files in walk_once(root, on_error=_log_unlisted):
        names = [name for name in files if name.lower().endswith(VOLUME_SUFFIXES) and name[0] != "."]
        volumes = [os.path.join(folder, name) for name in names]
        others = [name for name in files if name not in set(names)]
        if any(_is_dicom(Path(folder, name)) for name in others[:_LOOKED_INTO]):
            volumes = sorted([*volumes, folder])
        for path in map(os.path.normpath, volumes):
            if patterns and not _fits(os.path.relpath(path, root), patterns):
                passed_over["not of the pattern"] += 1
            elif mask_by_header(path):
                passed_over[MASK] += 1
            else:
                yield path, None


def _fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path below the data's folder fits a pattern: as a whole, or by its last part where that has no "/"."""
    return any(fnmatch.fnmatchcase(name if "/" in pattern else os.path.basename(name), pattern) for pattern in patterns)


def _volumes_of(source: str, options: SourceOptions) -> FoundVolumes:
    source = file_path(source)
    if by_split := _volumes_by_split(source, options):
        joined = join_found(list(by_split.values()))
        return FoundVolumes(sorted(joined.keys), patients=joined.patients)
    path = Path(source).expanduser().absolute()
    if is_address(source):
        return FoundVolumes([(source, None)])
    if path.is_dir():
        return _folder_volumes(path, options)
    if path.suffix.lower() == ".txt" and path.is_file():
        return FoundVolumes(_listed_volumes(path))
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder. Check the path; a relative one starts at {Path.cwd()}."
        )
    return FoundVolumes([(str(path), None)])


def _folder_volumes(root: Path, options: SourceOptions) -> FoundVolumes:
    passed_over: Counter[str] = Counter()
    found = list(volumes_below(root, options.patterns, passed_over))
    folders = _ct_rate_folders(root, options.splits)
    if any(folder.layout == "v1" for folder in folders) and any(VolumeName.find(path) for path, _ in found):
        raise FileNotFoundError(
            f"{root}: CT-RATE's v1 volumes hold raw values, and radiology_text_reports/ and metadata/ with their rescale "
            f"aren't there. Add them, or use v2 (train_fixed, valid_fixed)."
        )
    if not found:
        others = "".join(f", and passed over {count} files: {reason}" for reason, count in passed_over.most_common())
        raise FileNotFoundError(
            f"0 volumes under {root}{others}: expected CT-RATE's layout, files ending in {', '.join(VOLUME_SUFFIXES)}, or "
            f"folders of DICOM files."
        )
    searched = frozenset(path for path, _ in found if path != str(root))
    return FoundVolumes(found, searched, passed_over=passed_over)


def _ct_rate_folders(root: Path, splits: Sequence[str]) -> list[CtRateFolder]:
    """Those of CT-RATE's splits that a folder has."""
    found = []
    for split in splits:
        try:
            found.append(CtRateFolder(root, split))
        except FileNotFoundError:
            continue
    return found


def _listed_volumes(file: Path) -> list[VolumeKey]:
    lines = [line.strip() for line in read_lines(file)]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise FileNotFoundError(f"{file}: no volumes; expected one path or address a line.")
    names = map(file_path, names)
    return [(name if is_address(name) else os.path.join(file.parent, os.path.expanduser(name)), None) for name in names]


def _log_unlisted(error: OSError) -> None:
    logger.warning("%s: cannot be listed (%s); left out", error.filename, error.strerror)


def _is_dicom(path: Path) -> bool:
    """As `dicom_files` judges a file; nothing else than a file is opened, such as a link to nowhere or a pipe."""
    if not path.is_file() or path.name.upper().startswith("DICOMDIR"):
        return False
    try:
        with open(path, "rb") as stream:
            return looks_like_dicom(stream.read(_HEAD))
    except OSError as error:
        logger.warning("%s: cannot be read (%s); left out", path, error.strerror)
        return False
