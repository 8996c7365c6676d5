"""The volumes that a data source holds: each path once, with the rescale that it needs."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets

from samf.data.ct_rate import CtRateFolder, VolumeName, load_ct_rate, load_records
from samf.data.ct_rate_sources import is_hub_name
from samf.volume_sources import is_address

VolumeKey = tuple[str, tuple[float, ...] | None]  # a path, and its rescale (None = as the file says)

SPLITS = ("train", "valid")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy", ".npz", ".zip")
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
    rescales: dict[str, tuple[float, ...] | None] = {}
    for part in records:
        columns = part["rescale"][:] if "rescale" in part.column_names else [None] * len(part)
        pairs = zip(part["volume"][:], columns, strict=True)
        rescales.update({path: tuple(rescale) if rescale else None for path, rescale in pairs if path})
    return sorted(rescales.items())


def volumes_below(root: Path) -> Iterator[VolumeKey]:
    """Volume files and DICOM folders in and below `root`, in the order of their paths."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        volumes = sorted(name for name in files if name.lower().endswith(VOLUME_SUFFIXES) and name[0] != ".")
        if not volumes and any(_is_dicom(Path(folder, name)) for name in sorted(files)[:_LOOKED_INTO]):
            volumes = ["."]
        for name in volumes:
            yield os.path.normpath(os.path.join(folder, name)), None


def _volumes_of(source: str, splits: Sequence[str], on_missing: str) -> Iterable[VolumeKey]:
    path = Path(source).expanduser().absolute()
    if is_hub_name(source) and not path.exists():
        return distinct_volumes(*(load_ct_rate(source, split, tasks=["report"]) for split in splits))
    if is_address(source):
        return [(source, None)]
    if path.is_dir():
        return _folder_volumes(path, splits, on_missing)
    if path.suffix.lower() == ".txt" and path.is_file():
        return _listed_volumes(path)
    if path.suffix.lower() == ".csv":
        named = splits if "{split}" in source else splits[:1]
        return distinct_volumes(*(load_records(source, split, on_missing=on_missing) for split in named))
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder. Check the path; a relative one starts at {Path.cwd()}."
        )
    return [(str(path), None)]


def _folder_volumes(root: Path, splits: Sequence[str], on_missing: str) -> Iterable[VolumeKey]:
    folders = [folder for folder in (_ct_rate_folder(root, split) for split in splits) if folder is not None]
    if any(folder.reports or folder.vqa for folder in folders):
        named = [folder.split for folder in folders if folder.reports or folder.vqa]
        return distinct_volumes(
            *(load_ct_rate(root, split, tasks=["report"], on_missing=on_missing) for split in named)
        )
    found = list(volumes_below(root))
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


def _ct_rate_folder(root: Path, split: str) -> CtRateFolder | None:
    try:
        return CtRateFolder(root, split)
    except FileNotFoundError:
        return None


def _listed_volumes(file: Path) -> list[VolumeKey]:
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise FileNotFoundError(f"{file}: no volumes; expected one path or address a line.")
    return [(name if is_address(name) else os.path.join(file.parent, os.path.expanduser(name)), None) for name in names]


def _is_dicom(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"
