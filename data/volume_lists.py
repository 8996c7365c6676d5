"""The volumes that a data source holds: each path once, with the rescale that it needs."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import datasets

from samf.data.ct_rate import CtRateFolder, VolumeName, load_ct_rate, load_records
from samf.data.ct_rate_sources import is_hub_name
from samf.data.text_files import read_lines
from samf.dicom_volume import looks_like_dicom, walk_once
from samf.volume_sources import is_address

logger = logging.getLogger(__name__)

VolumeKey = tuple[str, tuple[float, ...] | None]  # a path, and its rescale (None = as the file says)

SPLITS = ("train", "valid")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy", ".npz", ".zip")
_HEAD = 352  # bytes that tell what a file is
_LOOKED_INTO = 5  # files of a folder without volumes: is it one of DICOM slices?


def find_volumes(data: Sequence[str], *, splits: Sequence[str] = SPLITS, on_missing: str = "error") -> list[VolumeKey]:
    """All volumes of all sources, in a fixed order.

    Args:
        data: CT-RATE's folder (v1 or v2) or name on the Hub, for the volumes that have reports; the paper's CSVs, as for
            `load_records`; folders with volumes or DICOM folders somewhere below them; a .txt file with one path or
            address a line, relative ones from its folder; single volumes, or addresses of such.
        splits: of CT-RATE and the CSVs.
        on_missing: volumes that CT-RATE or a CSV names but that aren't there: "error", "skip" (counted in the log).

    Raises:
        FileNotFoundError: a source has no volume, or one is missing; says what is looked for.
        ValueError: one volume with two different rescales.
    """
    rescales: dict[str, tuple[float, ...] | None] = {}
    for source in data:
        for path, rescale in _volumes_of(source, splits, on_missing):
            if rescales.setdefault(path, rescale) != rescale:
                raise ValueError(f"{path}: two sources have it, with rescale {rescales[path]} and {rescale}.")
    return list(rescales.items())


def distinct_volumes(*records: datasets.Dataset) -> list[VolumeKey]:
    """Each volume of the records once, in the order of the paths."""
    return sorted(dict(chain.from_iterable(map(_volumes_in, records))).items())


def _volumes_in(records: datasets.Dataset) -> list[VolumeKey]:
    """Each volume of the records once, in their order."""
    columns = records["rescale"][:] if "rescale" in records.column_names else [None] * len(records)
    pairs = zip(records["volume"][:], columns, strict=True)
    return list({path: tuple(rescale) if rescale else None for path, rescale in pairs if path}.items())


def volumes_by_split(
    source: str, splits: Sequence[str] = SPLITS, on_missing: str = "error"
) -> dict[str, list[VolumeKey]]:
    """The volumes of a source that has splits and reports, in the reports' order; {} for any other source.

    Args:
        source: CT-RATE's folder or its name on the Hub, or the paper's CSVs; one without "{split}" is the first split.
        splits, on_missing: as for `find_volumes`.
    """
    path = Path(source).expanduser().absolute()
    if is_hub_name(source) and not path.exists():
        return {split: _volumes_in(load_ct_rate(source, split, tasks=["report"])) for split in splits}
    if path.suffix.lower() == ".csv" and not path.is_dir():
        named = splits if "{split}" in source else splits[:1]
        return {split: _volumes_in(load_records(source, split, on_missing=on_missing)) for split in named}
    folders = _ct_rate_folders(path, splits) if path.is_dir() else []
    return {
        folder.split: _volumes_in(load_ct_rate(path, folder.split, tasks=["report"], on_missing=on_missing))
        for folder in folders
        if folder.reports or folder.vqa
    }


def volumes_below(root: Path) -> Iterator[VolumeKey]:
    """Volume files and DICOM folders in and below `root`, in the order of their paths, each folder once."""
    for folder, files in walk_once(root, on_error=_log_unlisted):
        volumes = [name for name in files if name.lower().endswith(VOLUME_SUFFIXES) and name[0] != "."]
        if not volumes and any(_is_dicom(Path(folder, name)) for name in files[:_LOOKED_INTO]):
            volumes = ["."]
        for name in volumes:
            yield os.path.normpath(os.path.join(folder, name)), None


def _volumes_of(source: str, splits: Sequence[str], on_missing: str) -> Iterable[VolumeKey]:
    if by_split := volumes_by_split(source, splits, on_missing):
        return sorted(dict(chain.from_iterable(by_split.values())).items())
    path = Path(source).expanduser().absolute()
    if is_address(source):
        return [(source, None)]
    if path.is_dir():
        return _folder_volumes(path, splits)
    if path.suffix.lower() == ".txt" and path.is_file():
        return _listed_volumes(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder. Check the path; a relative one starts at {Path.cwd()}."
        )
    return [(str(path), None)]


def _folder_volumes(root: Path, splits: Sequence[str]) -> Iterable[VolumeKey]:
    found = list(volumes_below(root))
    folders = _ct_rate_folders(root, splits)
    if any(folder.layout == "v1" for folder in folders) and any(VolumeName.find(path) for path, _ in found):
        raise FileNotFoundError(
            f"{root}: CT-RATE's v1 volumes hold raw values, and radiology_text_reports/ and metadata/ with their rescale "
            f"aren't there. Add them, or use v2 (train_fixed, valid_fixed)."
        )
    if not found:
        raise FileNotFoundError(
            f"0 volumes under {root}: expected CT-RATE's layout, files ending in {', '.join(VOLUME_SUFFIXES)}, or folders "
            f"of DICOM files."
        )
    return found


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
