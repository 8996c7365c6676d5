"""Single slices without reports, for the slice encoder: from MedMNIST, CTs or a slice cache.

`slice_sets(data, …)` recognises what a folder holds:

- MedMNIST's `organamnist_224.npz`, `organcmnist_224.npz` and `organsmnist_224.npz`, with organs as labels. Several files
  make one set; "medmnist" instead of a folder lets the package of that name download them;
- CTs: CT-RATE's folder, any folder with volumes or DICOM folders somewhere below it, or single files. They go through
  the slice cache, because reading a volume for one slice takes a second;
- a slice cache that is already full, whose entries don't say from which scan or with which settings they were made.

Slices without labels of their own have their plane and depth as label.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from samf.cache.manifest import Manifest
from samf.cache.slice_cache import SliceCache, read_entry
from samf.data.options import check_on_missing
from samf.data.patients import PatientRule, find_patients, warn_of_unknown
from samf.data.volume_discovery import SourceOptions
from samf.model.ct_volume import VolumeRef
from samf.model.image_processing_samf import PLANES, SamfImageProcessor
from samf.pretraining.labelled_sets import SliceSets
from samf.pretraining.medmnist_slices import PACKAGE, download_medmnist, holds_medmnist, medmnist_sets
from samf.pretraining.scans import Scan, find_scans, hold_out, readable_scans
from samf.training.choices import OnErrorOption
from samf.utils.distributed import Processes

__all__ = ["SLICES", "Scan", "VolumeSlices", "find_scans", "slice_sets"]

SLICES = "_slices"  # the slice cache in an output folder; Trainer doesn't push names that begin with an underscore


class VolumeSlices(Dataset):
    """Every slice of a slice cache's entries: uint8 (C, H, W), with plane and depth as label.

    Args:
        files: The entries.
        depth_bins: Equal parts of each plane's field of view; label = plane · depth_bins + part.

    Raises:
        FileNotFoundError: A file is no entry of slices.
        ValueError: Entries have slices of different shapes.
    """

    def __init__(self, files: Sequence[Path], depth_bins: int):
        self.files = list(files)
        self.label_names = tuple(f"{plane} {part + 1}/{depth_bins}" for plane in PLANES for part in range(depth_bins))
        counts, labels, shape = [], [], None
        for file in self.files:
            entry = _slice_entry(file)
            shape = shape or entry["slices"].shape[1:]
            if entry["slices"].shape[1:] != shape:
                raise ValueError(
                    f"{file}: slices of shape {entry['slices'].shape[1:]}, others here have {shape}. The cache was filled "
                    f"with several settings: use one cache folder per setting, or give the CTs themselves as data."
                )
            depths = np.minimum((entry["slice_positions"] * depth_bins).astype(np.int64), depth_bins - 1)
            counts.append(len(entry["slices"]))
            labels.append(entry["slice_planes"] * depth_bins + depths)
        self.ends = np.cumsum(counts)  # (entries,)
        self.labels = np.concatenate(labels) if labels else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> torch.Tensor:
        number = int(np.searchsorted(self.ends, index, side="right"))
        slices = _slice_entry(self.files[number])["slices"]
        return torch.from_numpy(np.array(slices[index - int(self.ends[number])]))


def _slice_entry(file: Path) -> dict[str, np.ndarray]:
    entry = read_entry(file)
    if entry is None or "slices" not in entry:
        raise FileNotFoundError(f"{file}: not an entry of slices, or deleted. Fill the slice cache again.")
    return entry


def _is_slice_cache(folder: Path) -> bool:
    first = next(folder.glob("??/*.safetensors"), None) if folder.is_dir() else None
    return first is not None


def _cached_sets(
    folders: Sequence[Path], depth_bins: int, valid_share: float, rule: PatientRule | None = None
) -> SliceSets:
    """Return all slices of full caches; patients are held out.

    An entry doesn't name its volume, but the caches' work logs do, and the volume's patient may be known.

    Args:
        folders: Slice caches.
        depth_bins: See `VolumeSlices`.
        valid_share: Share of the patients to hold out.
        rule: Which patient a volume belongs to; None = by its name and place.
    """

    def find_entries() -> list[Scan]:
        files = [file for folder in folders for file in sorted(folder.glob("??/*.safetensors"))]
        files = [file for file in files if "slices" in (read_entry(file) or {})]
        logged = {
            line["record"]: line["volume"] for folder in folders for line in Manifest(folder, "slices").log_lines()
        }
        patients = find_patients(logged.values(), rule=rule)
        known = {file: patients.get(logged.get(file.stem)) for file in files}
        warn_of_unknown(", ".join(map(str, folders)), sum(patient is None for patient in known.values()), len(files))
        return [Scan(file.stem, known[file] or file.stem, (VolumeRef(str(file)),)) for file in files]

    parts = [
        VolumeSlices([Path(volume.path) for scan in part for volume in scan.volumes], depth_bins)
        for part in hold_out(Processes().from_first(find_entries), valid_share)
    ]
    return SliceSets(parts[0], *parts)


def _scan_sets(scans: Mapping[str, Sequence[Scan]], cache: SliceCache, depth_bins: int) -> SliceSets:
    """Return all slices of scans.

    Args:
        scans: {"train": …, "valid": …}.
        cache: Has the slices of all their volumes.
        depth_bins: See `VolumeSlices`.
    """
    parts = []
    for split in ("train", "valid"):
        entries = [cache.entry_path(volume) for scan in scans[split] for volume in scan.volumes]
        parts.append(VolumeSlices(entries, depth_bins))
    return SliceSets(parts[0], *parts)


def slice_sets(
    data: Sequence[str],
    image_processor: SamfImageProcessor,
    cache_folder: str | os.PathLike,
    *,
    splits: Sequence[str] = ("train",),
    depth_bins: int = 8,
    valid_share: float = 0.1,
    on_error: OnErrorOption = "raise",
    on_missing: OnErrorOption = "raise",
    options: SourceOptions | None = None,
    min_coverage: float = 0.0,
) -> SliceSets:
    """Return the slices of whatever `data` holds.

    Args:
        data: One folder of MedMNIST files or "medmnist"; or CTs as for `find_scans`; or slice caches.
        image_processor: Extracts the slices of CTs; its size is that of the images.
        cache_folder: Keeps slices of CTs and MedMNIST's unpacked images.
        splits: Of MedMNIST: "train", "val", "test", or "all".
        depth_bins: See `VolumeSlices`.
        valid_share: See `find_scans`.
        on_error: See `fill_slice_cache`.
        on_missing: See `find_scans`.
        options: See `find_scans`.
        min_coverage: Of the CTs; see `SliceCache`.

    Raises:
        FileNotFoundError: There are no volumes or files under `data`.
        ValueError: `data` can't be combined, or as for `find_scans`.
        CTReadError: A volume can't be read, and `on_error` is "raise".
    """
    if not data:
        raise ValueError("data is empty; give a folder of MedMNIST files or CTs, a slice cache, or medmnist.")
    cache_folder = Path(cache_folder)
    folders = [Path(root) for root in data]
    if list(data) == [PACKAGE]:
        with Processes().main_process_first():
            folders = [download_medmnist(cache_folder / PACKAGE, image_processor.size)]
    if holds_medmnist(map(str, folders)):
        if len(folders) > 1:
            raise ValueError(f"data={list(data)}: MedMNIST's folder can't be mixed with others; give only that folder.")
        return medmnist_sets(folders[0], splits, image_processor.size, cache_folder / PACKAGE)
    if Processes().from_first(lambda: all(_is_slice_cache(folder) for folder in folders)):
        return _cached_sets(folders, depth_bins, valid_share, options.patient_rule if options else None)
    cache = SliceCache(cache_folder, image_processor, min_coverage)
    options = options or SourceOptions(on_missing=check_on_missing(on_missing))
    scans = readable_scans(data, cache, on_error=on_error, valid_share=valid_share, options=options)
    return _scan_sets(scans, cache, depth_bins)
