"""Single slices without reports, for the slice encoder and the aggregator: from MedMNIST, CTs or a slice cache.

`slice_sets(data, …)` tells by itself what a folder holds:

- MedMNIST's `organamnist_224.npz`, `organcmnist_224.npz` and `organsmnist_224.npz` (axial, coronal, sagittal), with
  their organs as labels. Several files make one set; "medmnist" instead of a folder has the package of that name load them;
- CTs: CT-RATE's folder, any folder with volumes or DICOM folders somewhere below it, or single files. They go through
  the slice cache, because reading a volume for one slice takes a second;
- a slice cache that is already full: its records don't say from which scan or by which settings they were made.

Where the slices have no labels of their own, their plane and depth is one.
"""

import logging
import os
import shutil
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

from samf.ct_volume import CTReadError
from samf.data.ct_rate import VolumeName, patient_of, refuse_common_patients
from samf.data.processes import Processes
from samf.data.slice_cache import SliceCache, read_record
from samf.data.volume_lists import VolumeKey, find_volumes, volumes_by_split
from samf.data.workers import process_pool
from samf.image_processing_samf import PLANES, SamfImageProcessor

try:
    import medmnist
except ImportError:
    medmnist = None

logger = logging.getLogger(__name__)


# MedMNIST's CT sets in the order of PLANES, its splits and its sizes; the file of 28 pixels bears no size in its name.
ORGAN_SETS = {"axial": "organamnist", "coronal": "organcmnist", "sagittal": "organsmnist"}
ORGANS = (
    *("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right"),
    *("liver", "lung-left", "lung-right", "pancreas", "spleen"),
)
MEDMNIST_SPLITS = ("train", "val", "test")
MEDMNIST_SIZES = (28, 64, 128, 224)


@dataclass(frozen=True)
class SliceSets:
    """Slices to learn from, and two labelled sets of which `queries` is held out: for nearest neighbours.

    Each set gives uint8 (3, H, W) and has `labels` int64 (N,), which index `label_names`.
    """

    train: Dataset
    bank: "LabelledSet"
    queries: "LabelledSet"


class LabelledSet(Dataset):
    """Slices of a data set that has `labels` and `label_names`: those at `indices`."""

    def __init__(self, slices: Dataset, indices: np.ndarray):
        self.slices, self.indices = slices, indices
        self.labels, self.label_names = slices.labels[indices], slices.label_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.slices[int(self.indices[index])]


def some_slices(slices: Dataset, most: int, seed: int = 0) -> LabelledSet:
    """At most `most` slices of a labelled set, drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(len(slices))
    return LabelledSet(slices, np.sort(order[:most]))


# ---- MedMNIST ------------------------------------------------------------------------------------------------------


class MedMnistSlices(Dataset):
    """One split of one MedMNIST CT set: uint8 (3, size, size), the grey picture three times, and organs as labels.

    Args:
        file: MedMNIST's .npz.
        split: "train", "val" or "test".
        folder: gets the split's pictures unpacked, so that they can be read from disk a picture at a time.
    """

    label_names = ORGANS

    def __init__(self, file: Path, split: str, folder: Path):
        self.images = np.load(unpack_member(file, f"{split}_images.npy", folder), mmap_mode="r")  # (N, size, size)
        self.labels = np.load(file)[f"{split}_labels"].reshape(-1).astype(np.int64)
        if self.images.ndim != 3 or len(self.images) != len(self.labels):
            raise ValueError(
                f"{file}: {split}_images has shape {self.images.shape} beside {len(self.labels)} labels; expected grey "
                f"pictures (N, size, size) and as many labels, as in MedMNIST's organ sets."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.images[index])).expand(3, -1, -1)


def unpack_member(file: Path, member: str, folder: Path) -> Path:
    """The path of one array of an .npz, unpacked to `folder` as .npy if it isn't there yet."""
    stat = file.stat()
    target = folder / f"{file.stem}-{stat.st_size}-{stat.st_mtime_ns}-{member}"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with zipfile.ZipFile(file) as archive, archive.open(member) as source, open(temporary, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        os.replace(temporary, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: not a MedMNIST file with {member} in it ({error}). Download it again.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def medmnist_files(folder: Path, size: int) -> list[Path]:
    """The organ sets of `size` pixels in a folder, axial first. Raises FileNotFoundError where there is none."""
    if size not in MEDMNIST_SIZES:
        raise ValueError(f"image_size={size}; MedMNIST's slices have {', '.join(map(str, MEDMNIST_SIZES))} pixels.")
    ending = "" if size == MEDMNIST_SIZES[0] else f"_{size}"
    files = [folder / f"{stem}{ending}.npz" for stem in ORGAN_SETS.values()]
    found = [file for file in files if file.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder}: none of {', '.join(file.name for file in files)}. Download them from MedMNIST "
            f"(https://medmnist.com), or choose the image_size whose files are there."
        )
    if len(found) < len(files):
        logger.warning("%s: only %s of the three planes", folder, ", ".join(file.name for file in found))
    return found


def download_medmnist(folder: Path, size: int) -> Path:
    """Has the `medmnist` package put its organ sets of `size` pixels into `folder`; returns it."""
    if medmnist is None:
        raise ImportError("data: medmnist needs the package of that name: pip install medmnist")
    folder.mkdir(parents=True, exist_ok=True)
    for stem in ORGAN_SETS.values():
        dataset = getattr(medmnist, medmnist.INFO[stem]["python_class"])
        dataset(split="train", size=size, root=str(folder), download=True)
    return folder


def medmnist_sets(folder: Path, splits: Sequence[str], size: int, unpacked: Path) -> SliceSets:
    """Train on `splits` ("all" = every one); neighbours of the validation split among the training split."""
    splits = MEDMNIST_SPLITS if list(splits) == ["all"] else splits
    if not splits or not set(splits) <= set(MEDMNIST_SPLITS):
        raise ValueError(f"splits={list(splits)}; expected some of {', '.join(MEDMNIST_SPLITS)}, or all.")
    files = medmnist_files(folder, size)
    with PartialState().main_process_first():
        by_split = {
            split: _Joined([MedMnistSlices(file, split, unpacked) for file in files])
            for split in MEDMNIST_SPLITS
            if split in {*splits, "train", "val"}
        }
    return SliceSets(ConcatDataset([by_split[split] for split in splits]), by_split["train"], by_split["val"])


class _Joined(ConcatDataset):
    """Labelled sets with the same label names, one after the other."""

    def __init__(self, parts: Sequence[Dataset]):
        super().__init__(parts)
        self.labels = np.concatenate([part.labels for part in parts])
        self.label_names = parts[0].label_names


# ---- scans ---------------------------------------------------------------------------------------------------------


SLICES = "_slices"  # the slice cache within an output folder; Trainer pushes nothing that begins with an underscore


@dataclass(frozen=True)
class Scan:
    """One scan: its volumes (reconstructions of the same anatomy) and its patient."""

    scan_id: str
    patient: str
    volumes: tuple[VolumeKey, ...]


def find_scans(data: Sequence[str], *, on_missing: str = "error", valid_share: float = 0.1) -> dict[str, list[Scan]]:
    """The scans of folders and files, {"train": …, "valid": …}; no patient is in both.

    Args:
        data: sources as for `find_volumes`. CT-RATE, a folder or a name on the Hub, comes with its own validation
            split, as do the paper's CSVs with "{split}" in their names; else patients are held out.
        on_missing: for CT-RATE, as for `load_ct_rate`.
        valid_share: of the patients, to hold out where there is no validation split.

    Raises:
        FileNotFoundError: no volume under one of `data`; says what is looked for.
        ValueError: too few patients to hold one out, or a patient in both splits.
    """
    found: dict[str, list[Scan]] = {"train": [], "valid": []}
    for source in data:
        by_split = volumes_by_split(source, on_missing=on_missing) or {"train": find_volumes([source])}
        for split, volumes in by_split.items():
            found[split] += _group(volumes)
    if not found["valid"]:
        found["train"], found["valid"] = hold_out(found["train"], valid_share)
    refuse_common_patients(*({scan.patient for scan in found[split]} for split in ("train", "valid")))
    return found


def hold_out(scans: Sequence[Scan], share: float) -> tuple[list[Scan], list[Scan]]:
    """The scans without and with the held-out patients: `share` of them, at least one, the same for the same patients."""
    patients = sorted({scan.patient for scan in scans})
    if len(patients) < 2:
        raise ValueError(f"{len(patients)} patient: none can be held out. Give more than one scan.")
    count = min(max(1, round(share * len(patients))), len(patients) - 1)
    held = {patients[i] for i in np.random.default_rng(0).permutation(len(patients))[:count]}
    return [scan for scan in scans if scan.patient not in held], [scan for scan in scans if scan.patient in held]


def _group(volumes: Sequence[VolumeKey]) -> list[Scan]:
    """One Scan for all reconstructions of it, by CT-RATE's names; a volume of another name is a scan of its own."""
    by_scan: dict[str, list[VolumeKey]] = {}
    for path, rescale in dict(volumes).items():
        name = VolumeName.find(path)
        by_scan.setdefault(name.scan_id if name else path, []).append((path, rescale))
    return [Scan(scan_id, patient_of(keys[0][0]), tuple(keys)) for scan_id, keys in by_scan.items()]


# ---- slices of scans -----------------------------------------------------------------------------------------------


class VolumeSlices(Dataset):
    """Every slice of the records of a slice cache: uint8 (C, H, W); labels are plane and depth.

    Args:
        files: the records.
        depth_bins: equal parts of each plane's field that are told apart; label = plane · depth_bins + part.
    """

    def __init__(self, files: Sequence[Path], depth_bins: int):
        self.files = list(files)
        self.label_names = tuple(f"{plane} {part + 1}/{depth_bins}" for plane in PLANES for part in range(depth_bins))
        counts, labels, shape = [], [], None
        for file in self.files:
            record = _slice_record(file)
            shape = shape or record["slices"].shape[1:]
            if record["slices"].shape[1:] != shape:
                raise ValueError(
                    f"{file}: slices of shape {record['slices'].shape[1:]}, others here have {shape}. The cache was filled "
                    f"with several settings: give one of its own to each, or the CTs themselves as data."
                )
            depths = np.minimum((record["slice_positions"] * depth_bins).astype(np.int64), depth_bins - 1)
            counts.append(len(record["slices"]))
            labels.append(record["slice_planes"] * depth_bins + depths)
        self.ends = np.cumsum(counts)  # (records,)
        self.labels = np.concatenate(labels) if labels else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> torch.Tensor:
        number = int(np.searchsorted(self.ends, index, side="right"))
        slices = _slice_record(self.files[number])["slices"]
        return torch.from_numpy(np.array(slices[index - int(self.ends[number])]))


def _slice_record(file: Path) -> dict[str, np.ndarray]:
    record = read_record(file)
    if record is None or "slices" not in record:
        raise FileNotFoundError(f"{file}: no record of slices (any more). Fill the slice cache again.")
    return record


def fill_slice_cache(cache: SliceCache, volumes: Sequence[VolumeKey], on_error: str = "stop") -> list[VolumeKey]:
    """Make what the cache lacks, each process its share; returns the volumes that have a record now.

    Raises:
        CTReadError: a volume can't be read; with on_error="skip" it is logged, left out and counted instead.
    """
    if on_error not in ("stop", "skip", "error"):  # "error": what "stop" was called once
        raise ValueError(f"on_error={on_error!r}; expected 'stop' or 'skip'.")
    state = PartialState()
    missing = [key for key in volumes if not _has_file(cache, key)]
    share = missing[state.process_index :: state.num_processes]
    if share:
        workers = max(1, (os.cpu_count() or 1) // state.num_processes)
        with process_pool(min(workers, len(share))) as pool:
            failures = pool.map(partial(_make_record, cache), share, chunksize=1)
            for failure in tqdm(failures, total=len(share), desc="reading CTs", disable=not state.is_main_process):
                if failure and on_error != "skip":
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise CTReadError(failure)
                if failure:
                    logger.warning("skipped: %s", failure)
    Processes().wait()
    kept = [key for key in volumes if _has_file(cache, key)]
    if len(kept) < len(volumes):
        logger.warning("%d of %d volumes couldn't be read and are left out", len(volumes) - len(kept), len(volumes))
    return kept


def _has_file(cache: SliceCache, key: VolumeKey) -> bool:
    """Whether a volume has a record; one that isn't there itself, such as a link to nowhere, has none."""
    try:
        return cache.record_path(key[0], rescale=key[1]).is_file()
    except CTReadError:
        return False


def _make_record(cache: SliceCache, key: VolumeKey) -> str | None:
    """What went wrong, None if nothing did."""
    try:
        cache.get(key[0], rescale=key[1])
    except CTReadError as error:
        return str(error)
    return None


def is_slice_cache(folder: Path) -> bool:
    """Whether a folder holds records of slices."""
    first = next(folder.glob("??/*.safetensors"), None) if folder.is_dir() else None
    return first is not None


def cached_sets(folders: Sequence[Path], depth_bins: int, valid_share: float) -> SliceSets:
    """All slices of full caches; whole volumes are held out, whose patients the records don't name."""
    files = [file for folder in folders for file in sorted(folder.glob("??/*.safetensors"))]
    files = [file for file in files if "slices" in (read_record(file) or {})]
    scans = [Scan(file.stem, file.stem, ((str(file), None),)) for file in files]
    parts = [
        VolumeSlices([Path(path) for scan in part for path, _ in scan.volumes], depth_bins)
        for part in hold_out(scans, valid_share)
    ]
    return SliceSets(parts[0], *parts)


def scan_sets(scans: dict[str, list[Scan]], cache: SliceCache, depth_bins: int, on_error: str) -> SliceSets:
    """All slices of scans, by way of the cache."""
    parts = []
    for split in ("train", "valid"):
        volumes = [key for scan in scans[split] for key in scan.volumes]
        kept = fill_slice_cache(cache, volumes, on_error)
        parts.append(VolumeSlices([cache.record_path(path, rescale=rescale) for path, rescale in kept], depth_bins))
    return SliceSets(parts[0], *parts)


# ---- what scripts call ---------------------------------------------------------------------------------------------


def slice_sets(
    data: Sequence[str],
    image_processor: SamfImageProcessor,
    cache_folder: str | os.PathLike,
    *,
    splits: Sequence[str] = ("train",),
    depth_bins: int = 8,
    valid_share: float = 0.1,
    on_error: str = "stop",
    on_missing: str = "error",
) -> SliceSets:
    """Slices of whatever `data` holds.

    Args:
        data: one folder of MedMNIST files or "medmnist"; or CTs as for `find_scans`; or slice caches.
        image_processor: how CTs are cut; its size is the pictures'.
        cache_folder: keeps slices of CTs and MedMNIST's unpacked pictures.
        splits: of MedMNIST: "train", "val", "test", or "all".
        depth_bins, valid_share, on_error, on_missing: see `VolumeSlices`, `find_scans` and `fill_slice_cache`.

    Raises:
        FileNotFoundError, ValueError, CTReadError: as those do.
    """
    if not data:
        raise ValueError("data is empty; give a folder of MedMNIST files or CTs, a slice cache, or medmnist.")
    cache_folder = Path(cache_folder)
    folders = [Path(root) for root in data]
    if list(data) == ["medmnist"]:
        with PartialState().main_process_first():
            folders = [download_medmnist(cache_folder / "medmnist", image_processor.size)]
    is_organs = [any(any(folder.glob(f"{stem}*.npz")) for stem in ORGAN_SETS.values()) for folder in folders]
    if any(is_organs):
        if len(folders) > 1:
            raise ValueError(f"data={list(data)}: MedMNIST's folder can't be mixed with others; give it alone.")
        return medmnist_sets(folders[0], splits, image_processor.size, cache_folder / "medmnist")
    if all(is_slice_cache(folder) for folder in folders):
        return cached_sets(folders, depth_bins, valid_share)
    scans = find_scans(data, on_missing=on_missing, valid_share=valid_share)
    return scan_sets(scans, SliceCache(cache_folder, image_processor), depth_bins, on_error)
