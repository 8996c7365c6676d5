"""Volumes of data sources: each path once, with its rescale, its patient, and whether it was named or found by search."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path

import datasets

from samf.data.addresses import address_suffix, folder_of, is_file_address, join_address, local_table, names_file
from samf.data.ct_rate.loader import load_ct_rate
from samf.data.ct_rate.names import VolumeName
from samf.data.ct_rate.sources import CtRateFolder, CtRateSource, CtRateStore, is_hub_name
from samf.data.file_kinds import VOLUME_SUFFIXES, has_volume_suffix
from samf.data.folder_search import volumes_below
from samf.data.loading import data_root, load_records
from samf.data.options import check_on_missing
from samf.data.patients import PATIENT_COLUMN, PatientRule, find_patients
from samf.data.schema import OnMissing
from samf.data.store_search import volumes_stored_below
from samf.data.table_columns import TableColumns
from samf.model.ct_download import file_path, is_address
from samf.model.ct_object_store import is_store_address
from samf.model.ct_volume import VolumeRef
from samf.utils.text_files import read_lines

__all__ = [
    "SPLITS",
    "VOLUME_SUFFIXES",
    "FoundVolumes",
    "SourceOptions",
    "ct_rate_folders",
    "distinct_volumes",
    "find_splits",
    "find_volumes",
    "join_found",
    "search_volumes",
]

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")


@dataclass(frozen=True)
class SourceOptions:
    """Options of the search for volumes.

    Attributes:
        splits: "train", "valid" or both, of CT-RATE, of CSVs with "{split}" and of data sets with named columns.
        on_missing: for volumes that a table names but that aren't there: "raise", or "skip" (counted in the log).
        patterns: of the volumes found in folders, those that match a pattern are used. A pattern with "/" is matched with
            the path below the folder, one without with the name; "*" matches anything. () uses all.
        columns: the columns of a table or data set in another layout than CT-RATE's.
        patient_rule: reads patients from the volumes' paths; see `samf.data.patients`.
        patient_column: the column of patients in the paper's CSVs.
        image_root: the folder from which the paths of the paper's CSVs start.
    """

    splits: tuple[str, ...] = SPLITS
    on_missing: OnMissing = "raise"
    patterns: tuple[str, ...] = ()
    columns: TableColumns | None = None
    patient_rule: PatientRule | None = None
    patient_column: str | None = None
    image_root: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "on_missing", check_on_missing(self.on_missing))


@dataclass(frozen=True)
class FoundVolumes:
    """Volumes of one or several sources.

    Attributes:
        volumes: each volume once, in a fixed order.
        searched: paths that were found by search and not named: those that are not CTs are passed over, and no failure.
        patients: {path: patient, or None where unknown}; empty if they were not looked up.
        passed_over: {reason: number of files passed over}.
    """

    volumes: list[VolumeRef]
    searched: frozenset[str] = frozenset()
    patients: dict[str, str | None] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)

    def only(self, kept: Iterable[VolumeRef]) -> "FoundVolumes":
        """Return the volumes that are in `kept`."""
        kept = set(kept)
        return replace(self, volumes=[volume for volume in self.volumes if volume in kept])


def join_found(parts: Sequence[FoundVolumes]) -> FoundVolumes:
    """Return the volumes of all parts, each once. Raises ValueError for a volume with two different rescales."""
    volumes: dict[str, VolumeRef] = {}
    for volume in chain.from_iterable(part.volumes for part in parts):
        known = volumes.setdefault(volume.path, volume)
        if known != volume:
            raise ValueError(f"{volume.path}: two sources have it, with rescale {known.rescale} and {volume.rescale}.")
    named = {volume.path for part in parts for volume in part.volumes if volume.path not in part.searched}
    patients: dict[str, str | None] = {}
    for part in parts:
        patients |= {path: patient for path, patient in part.patients.items() if patient or path not in patients}
    return FoundVolumes(
        list(volumes.values()),
        frozenset(path for path in volumes if path not in named),
        patients,
        sum((part.passed_over for part in parts), Counter()),
    )


def find_volumes(data: Sequence[str], *, splits: Sequence[str] = SPLITS, on_missing: str = "raise") -> list[VolumeRef]:
    """Find all volumes of all sources; `search_volumes` with few options.

    Args:
        data: as for `search_volumes`.
        splits: see `SourceOptions`.
        on_missing: see `SourceOptions`.
    """
    return search_volumes(data, SourceOptions(tuple(splits), check_on_missing(on_missing))).volumes


def search_volumes(data: Sequence[str], options: SourceOptions = SourceOptions()) -> FoundVolumes:
    """Find all volumes of all sources, in a fixed order. Patients are not looked up.

    Args:
        data: CT-RATE's folder (v1 or v2) or name on the Hub, for the volumes that have reports; the paper's CSVs, as for
            `load_records`; a table or data set whose columns `options` names; folders with volumes or DICOM folders at any
            depth, also in object stores; a .txt file with one path or address per line, relative to its folder; paths or
            addresses of volumes.
        options: the options of the search.

    Raises:
        FileNotFoundError: a source has no volume, or one is missing; says what is expected.
        DownloadError: a store can't be listed.
        ValueError: a volume with two different rescales.
    """
    found = join_found([_volumes_of(source, options) for source in data])
    for reason, count in found.passed_over.most_common():
        logger.warning("%d files passed over: %s", count, reason)
    return found


def find_splits(source: str, options: SourceOptions) -> dict[str, FoundVolumes]:
    """Find the volumes of a source by split, with their patients; a source without splits is all "train"."""
    by_split = _volumes_by_split(source, options) or {"train": search_volumes([source], options)}
    is_folder = Path(source).expanduser().is_dir()
    root = data_root(source) if is_folder or is_file_address(source) else str(Path(source).expanduser().absolute())

    def with_all_patients(found: FoundVolumes) -> FoundVolumes:
        paths = [volume.path for volume in found.volumes]
        return replace(found, patients=find_patients(paths, found.patients, options.patient_rule, root))

    return {split: with_all_patients(found) for split, found in by_split.items()}


def distinct_volumes(*records: datasets.Dataset) -> list[VolumeRef]:
    """Return each volume of the records once, ordered by path."""
    volumes = {volume.path: volume for volume in chain.from_iterable(map(_volumes_in, records))}
    return [volumes[path] for path in sorted(volumes)]


def _volumes_in(records: datasets.Dataset) -> list[VolumeRef]:
    """Return each volume of the records once, in the records' order."""
    columns = records["rescale"][:] if "rescale" in records.column_names else [None] * len(records)
    pairs = zip(records["volume"][:], columns, strict=True)
    rescales = {path: rescale for path, rescale in pairs if path}
    return [VolumeRef.of(path, rescale or None) for path, rescale in rescales.items()]


def _named_volumes(records: datasets.Dataset) -> FoundVolumes:
    """Return the volumes of the records, with the patients that the records name."""
    patients = dict(zip(records["volume"][:], records[PATIENT_COLUMN][:], strict=True))
    patients.pop(None, None)
    return FoundVolumes(_volumes_in(records), patients=patients)


def _volumes_by_split(source: str, options: SourceOptions) -> dict[str, FoundVolumes]:
    """Return the volumes of a source that has splits, in the order of its tables; {} for any other source."""
    path, splits, on_missing = Path(source).expanduser().absolute(), options.splits, options.on_missing
    if options.columns is not None:
        return {split: _named_volumes(rows) for split, rows in options.columns.load_splits(source, splits, on_missing)}
    if is_hub_name(source) and not path.exists():
        return {split: _named_volumes(load_ct_rate(source, split, tasks=["report"])) for split in splits}
    if path.suffix.lower() == ".csv" and not path.is_dir():
        named = splits if "{split}" in source else splits[:1]
        load = partial(load_records, source, on_missing=on_missing, patient_column=options.patient_column)
        load = partial(load, image_root=options.image_root) if options.image_root else load
        return {split: _named_volumes(load(split)) for split in named}
    is_stored = is_store_address(source) and not names_file(source)
    root = source if is_stored else path
    folders = ct_rate_folders(root, splits) if is_stored or path.is_dir() else []
    return {
        folder.split: _named_volumes(load_ct_rate(root, folder.split, tasks=["report"], on_missing=on_missing))
        for folder in folders
        if folder.reports or folder.vqa
    }


def _volumes_of(source: str, options: SourceOptions) -> FoundVolumes:
    source = file_path(source)
    if by_split := _volumes_by_split(source, options):
        joined = join_found(list(by_split.values()))
        return FoundVolumes(sorted(joined.volumes, key=attrgetter("path")), patients=joined.patients)
    path = Path(source).expanduser().absolute()
    if is_address(source):
        return _address_volumes(source, options)
    if path.is_dir():
        return _folder_volumes(path, options)
    if path.suffix.lower() == ".txt" and path.is_file():
        return FoundVolumes(_listed_volumes(str(path)))
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder. Check the path; a relative one starts at {Path.cwd()}."
        )
    return FoundVolumes([VolumeRef(str(path))])


def _folder_volumes(root: Path, options: SourceOptions) -> FoundVolumes:
    passed_over: Counter[str] = Counter()
    found = list(volumes_below(root, options.patterns, passed_over))
    folders = ct_rate_folders(root, options.splits)
    if any(folder.layout == "v1" for folder in folders) and any(VolumeName.find(volume.path) for volume in found):
        raise FileNotFoundError(
            f"{root}: CT-RATE's v1 volumes hold raw values, and radiology_text_reports/ and metadata/, which give their "
            f"rescale, aren't there. Add them, or use v2 (train_fixed, valid_fixed)."
        )
    if not found:
        others = "".join(f", and passed over {count} files: {reason}" for reason, count in passed_over.most_common())
        raise FileNotFoundError(
            f"0 volumes under {root}{others}: expected CT-RATE's layout, files ending in {', '.join(VOLUME_SUFFIXES)}, or "
            f"folders of DICOM files."
        )
    searched = frozenset(volume.path for volume in found if volume.path != str(root))
    return FoundVolumes(found, searched, passed_over=passed_over)


def _address_volumes(address: str, options: SourceOptions) -> FoundVolumes:
    """Return the volumes that an address names: those of a list, those below a folder in a store, or itself."""
    if address_suffix(address) == ".txt":
        return FoundVolumes(_listed_volumes(address))
    if not is_store_address(address) or has_volume_suffix(address):
        return FoundVolumes([VolumeRef(address)])
    passed_over: Counter[str] = Counter()
    found = volumes_stored_below(address, options.patterns, passed_over)
    if not found and passed_over:
        raise FileNotFoundError(f"{address}: no volume matches the pattern; {passed_over.total()} others are there.")
    if not found:  # a file without a volume's suffix
        return FoundVolumes([VolumeRef(address)])
    searched = frozenset(volume.path for volume in found if volume.path != address.rstrip("/"))
    return FoundVolumes(found, searched, passed_over=passed_over)


def ct_rate_folders(root: Path | str, splits: Sequence[str]) -> list[CtRateSource]:
    """Return the splits of CT-RATE that a folder has, or an address in an object store."""
    found: list[CtRateSource] = []
    for split in splits:
        try:
            found.append(CtRateStore(root, split) if isinstance(root, str) else CtRateFolder(root, split))
        except FileNotFoundError:
            continue
    return found


def _listed_volumes(file: str) -> list[VolumeRef]:
    """Return the volumes of a list, whose lines are relative to its folder."""
    with local_table(file) as path:
        lines = [line.strip() for line in read_lines(path)]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise FileNotFoundError(f"{file}: no volumes; expected one path or address per line.")

    def located(name: str) -> str:
        if is_address(name) or os.path.isabs(name):
            return name
        if is_address(file):
            return join_address(folder_of(file), name)
        return os.path.join(os.path.dirname(file), os.path.expanduser(name))

    return [VolumeRef(located(name)) for name in map(file_path, names)]
