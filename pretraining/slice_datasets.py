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
import time
import uuid
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from samf.cache.fill import FillOptions, StoppedError, fill_slices
from samf.cache.manifest import Manifest, Shard, Volume, inspect_volumes
from samf.cache.slice_cache import SliceCache, entry_file, read_entry
from samf.data.ct_rate.names import VolumeName
from samf.data.patient_splits import refuse_common_patients, refuse_shared_folders
from samf.data.patients import PatientRule, find_patients, patient_of, warn_of_unknown
from samf.data.volume_discovery import FoundVolumes, SourceOptions, VolumeKey, find_splits, join_found
from samf.model.image_processing_samf import EXTRACT_VERSION, PLANES, SamfImageProcessor
from samf.utils.distributed import Processes, processes_here
from samf.utils.files import atomic_path
from samf.utils.parallel import usable_cores

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
# MedMNIST's paper: "transformed into gray-scale with an abdominal window"; it gives no numbers, and 400 HU about 40 is the
# usual one. The grey picture stands in all three channels.
MEDMNIST_WINDOWS = ((-160, 240),) * 3
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
    try:
        with (
            atomic_path(target) as temporary,
            zipfile.ZipFile(file) as archive,
            archive.open(member) as source,
            open(temporary, "wb") as copy,
        ):
            shutil.copyfileobj(source, copy, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: not a MedMNIST file with {member} in it ({error}). Download it again.") from error
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
    with Processes().main_process_first():
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


_PATIENCE = 120  # seconds until a machine sees what another one has written
SLICES = "_slices"  # the slice cache within an output folder; Trainer pushes nothing that begins with an underscore


@dataclass(frozen=True)
class Scan:
    """One scan: its volumes (reconstructions of the same anatomy) and its patient."""

    scan_id: str
    patient: str
    volumes: tuple[VolumeKey, ...]


def find_scans(
    data: Sequence[str], *, on_missing: str = "raise", valid_share: float = 0.1, options: SourceOptions | None = None
) -> dict[str, list[Scan]]:
    """The scans of folders and files, {"train": …, "valid": …}; no patient is in both.

    Args:
        data: sources as for `search_volumes`. CT-RATE, a folder or a name on the Hub, comes with its own validation
            split, as do tables with several splits; else patients are held out.
        on_missing: for tables, as for `load_ct_rate`; without `options`, which have their own.
        valid_share: of the patients, to hold out where there is no validation split.
        options: how the sources are looked through, and whose volume is whose.

    Raises:
        FileNotFoundError: no volume under one of `data`; says what is looked for.
        ValueError: too few patients to hold one out, or a patient in both splits.
    """
    return split_scans(find_by_split(data, options or SourceOptions(on_missing=on_missing)), valid_share)


def find_by_split(data: Sequence[str], options: SourceOptions) -> dict[str, FoundVolumes]:
    """The volumes of all sources with their patients, {"train": …, "valid": …}. One process looks for all of them."""

    def look() -> dict[str, FoundVolumes]:
        parts: dict[str, list[FoundVolumes]] = {"train": [], "valid": []}
        for source in data:
            for split, found in find_splits(source, options).items():
                parts[split].append(found)
        found = {split: join_found(own) for split, own in parts.items()}
        unknown = sum(patient is None for own in found.values() for patient in own.patients.values())
        warn_of_unknown(", ".join(data), unknown, sum(len(own.keys) for own in found.values()))
        return found

    return Processes().from_first(look)


def split_scans(found: Mapping[str, FoundVolumes], valid_share: float) -> dict[str, list[Scan]]:
    """Group volumes into scans, and hold patients out where there is no validation split; see `find_scans`."""
    scans = {split: _group(own) for split, own in found.items()}
    if not scans["valid"]:
        refuse_shared_folders({path: found["train"].patients.get(path) for path, _ in found["train"].keys})
        scans["train"], scans["valid"] = hold_out(scans["train"], valid_share)
    refuse_common_patients(*({scan.patient for scan in scans[split]} for split in ("train", "valid")))
    return scans


def readable_scans(
    data: Sequence[str], cache: SliceCache, *, on_error: str, valid_share: float, options: SourceOptions
) -> dict[str, list[Scan]]:
    """The scans whose slices the cache has, after it was filled by all processes together.

    What is no CT is gone before patients are held out, so that none of those held out is a mask.

    Args:
        data, valid_share, options: as for `find_scans`.
        cache: gets the slices.
        on_error: as for `fill_slice_cache`.
    """
    found = find_by_split(data, options)
    everything = join_found([found["train"], found["valid"]])
    kept = fill_slice_cache(cache, everything.keys, on_error, searched=everything.searched)
    readable = {split: own.only(kept) for split, own in found.items()}
    if lost := [split for split, own in found.items() if own.keys and not readable[split].keys]:
        raise ValueError(
            f"{', '.join(data)}: no volume of the split {' and '.join(lost)} can be read; see the log above."
        )
    scans = split_scans(readable, valid_share)
    for split, own in scans.items():
        Processes().check_equal(f"scans ({split})", len(own))
    return scans


def hold_out(scans: Sequence[Scan], share: float) -> tuple[list[Scan], list[Scan]]:
    """The scans without and with the held-out patients: `share` of them, at least one, the same for the same patients."""
    patients = sorted({scan.patient for scan in scans})
    if len(patients) < 2:
        raise ValueError(f"{len(patients)} patient: none can be held out. Give more than one scan.")
    count = min(max(1, round(share * len(patients))), len(patients) - 1)
    held = {patients[i] for i in np.random.default_rng(0).permutation(len(patients))[:count]}
    return [scan for scan in scans if scan.patient not in held], [scan for scan in scans if scan.patient in held]


def _group(found: FoundVolumes) -> list[Scan]:
    """One Scan for all reconstructions of it, by CT-RATE's names.

    Of other names a known patient's volumes are one Scan: they may be reconstructions of one scan, or not, and contrast
    must not take two series of one patient for different people. A volume of an unknown patient is a scan of its own.
    """
    by_scan: dict[str, list[VolumeKey]] = {}
    patients: dict[str, str] = {}
    for path, rescale in found.keys:
        name, known = VolumeName.find(path), found.patients.get(path)
        scan = name.scan_id if name else (known or path)
        by_scan.setdefault(scan, []).append((path, rescale))
        patients.setdefault(scan, known or patient_of(path))
    return [Scan(scan, patients[scan], tuple(keys)) for scan, keys in by_scan.items()]


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
    record = read_entry(file)
    if record is None or "slices" not in record:
        raise FileNotFoundError(f"{file}: no record of slices (any more). Fill the slice cache again.")
    return record


def fill_slice_cache(
    cache: SliceCache,
    volumes: Sequence[VolumeKey],
    on_error: str = "stop",
    *,
    searched: Collection[str] = (),
    timeout: float | None = FillOptions.timeout,
) -> list[VolumeKey]:
    """Make what the cache lacks as `preprocess.py` does, each process its share; returns what has a record now.

    All processes must call, and get the same list. The first one looks at the volumes for all, shares are dealt by place in
    the list, and each process says what of its share there is: nobody takes what it doesn't see for missing.

    Args:
        cache: gets the records, and notes of volumes that can't be read, crash their reader or take too long. With "skip"
            what was noted before isn't tried again.
        volumes: paths with their rescales.
        on_error: a volume that can't be read: "stop", or "skip": it is logged, left out and counted.
        searched: paths that nobody named: what is no CT among them is left out and counted in any case.
        timeout: seconds that one volume may take.

    Raises:
        UnreadableVolumeError: a CTReadError, on all processes, when one of them can't read a volume.
        PreprocessError: the cache can't be written, or none of the volumes is a CT.
    """
    if on_error not in ("stop", "skip", "error"):  # "error": what "stop" was called once
        raise ValueError(f"on_error={on_error!r}; expected 'stop' or 'skip'.")
    processes = Processes()
    listed, run = processes.from_first(lambda: (inspect_volumes(volumes, cache, searched), uuid.uuid4().hex))
    stopped = cache.folder / "log" / f".{run}.stopped"  # there when a process of this run has failed
    shard = Shard(processes.rank, processes.count)
    options = FillOptions(
        shard=shard,
        workers=max(1, usable_cores() // processes_here()),
        timeout=timeout,
        on_error="skip" if on_error == "skip" else "stop",
        show_progress=processes.is_first,
        should_stop=stopped.exists if processes.count > 1 else None,
    )
    about = {"settings_hash": cache.image_processor.settings_hash(), "extract_version": EXTRACT_VERSION}
    failed = None
    try:
        fill_slices(listed, cache, Manifest(cache.folder, "slices"), options, about)
    except StoppedError:
        logger.warning("another process has stopped, and so does this one")
    except Exception as error:  # noqa: BLE001 - raised on every process, or the others would wait for this one
        failed = error
        if processes.count > 1:
            stopped.parent.mkdir(parents=True, exist_ok=True)
            stopped.touch()
    try:
        processes.raise_together(failed)
    finally:
        stopped.unlink(missing_ok=True)
    mine = {volume.key for volume in shard.of(listed) if _has_file(cache, volume)}
    made = set(chain.from_iterable(processes.gather(mine)))
    there = [volume for volume in listed if volume.key in made]
    _wait_for_files(cache, there)
    kept = [(volume.path, volume.rescale) for volume in there]
    _tell_left_out(volumes, kept, searched)
    return kept


def _tell_left_out(volumes: Sequence[VolumeKey], kept: Sequence[VolumeKey], searched: Collection[str]) -> None:
    named = [path for path, _ in set(volumes) - set(kept) if path not in searched]
    if len(kept) < len(volumes):
        logger.warning(
            "%d of %d volumes couldn't be read, or are no CT, and are left out (%d of them named)",
            len(volumes) - len(kept),
            len(volumes),
            len(named),
        )


def _wait_for_files(cache: SliceCache, made: Sequence[Volume]) -> None:
    """Wait until this machine sees the records that other machines have made; network file systems take a while.

    Raises on all processes FileNotFoundError, when one of them doesn't see a record after `_PATIENCE` seconds.
    """
    processes, unseen = Processes(), list(made)
    deadline, error = time.monotonic() + _PATIENCE, None
    while unseen := [volume for volume in unseen if not _has_file(cache, volume)]:
        if time.monotonic() > deadline:
            error = FileNotFoundError(
                f"{cache.folder}: process {processes.rank} doesn't see {len(unseen)} records that others have made (first: "
                f"{unseen[0].path}). All machines must share this folder and mount the volumes at the same paths."
            )
            break
        time.sleep(1)
    processes.raise_together(error)


def _has_file(cache: SliceCache, volume: Volume) -> bool:
    """Whether a volume has a record; one that isn't there itself, such as a link to nowhere, has none."""
    return volume.key is not None and entry_file(cache.folder, volume.key).is_file()


def is_slice_cache(folder: Path) -> bool:
    """Whether a folder holds records of slices."""
    first = next(folder.glob("??/*.safetensors"), None) if folder.is_dir() else None
    return first is not None


def cached_sets(
    folders: Sequence[Path], depth_bins: int, valid_share: float, rule: PatientRule | None = None
) -> SliceSets:
    """All slices of full caches; patients are held out.

    A record doesn't name its volume, but the caches' work logs do, and the volume its patient, as far as that is known.
    """

    def look() -> list[Scan]:
        files = [file for folder in folders for file in sorted(folder.glob("??/*.safetensors"))]
        files = [file for file in files if "slices" in (read_entry(file) or {})]
        logged = {
            line["record"]: line["volume"] for folder in folders for line in Manifest(folder, "slices").log_lines()
        }
        patients = find_patients(logged.values(), rule=rule)
        known = {file: patients.get(logged.get(file.stem)) for file in files}
        warn_of_unknown(", ".join(map(str, folders)), sum(patient is None for patient in known.values()), len(files))
        return [Scan(file.stem, known[file] or file.stem, ((str(file), None),)) for file in files]

    parts = [
        VolumeSlices([Path(path) for scan in part for path, _ in scan.volumes], depth_bins)
        for part in hold_out(Processes().from_first(look), valid_share)
    ]
    return SliceSets(parts[0], *parts)


def scan_sets(scans: Mapping[str, Sequence[Scan]], cache: SliceCache, depth_bins: int) -> SliceSets:
    """All slices of scans that the cache has."""
    parts = []
    for split in ("train", "valid"):
        volumes = [key for scan in scans[split] for key in scan.volumes]
        parts.append(VolumeSlices([cache.entry_path(path, rescale=rescale) for path, rescale in volumes], depth_bins))
    return SliceSets(parts[0], *parts)


def holds_medmnist(data: Iterable[str]) -> bool:
    """Tell whether one of `data` is MedMNIST: the name of its package, or a folder with one of its organ sets."""
    stems = ORGAN_SETS.values()
    return any(root == "medmnist" or any(any(Path(root).glob(f"{stem}*.npz")) for stem in stems) for root in data)


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
    on_missing: str = "raise",
    options: SourceOptions | None = None,
    min_coverage: float = 0.0,
) -> SliceSets:
    """Slices of whatever `data` holds.

    Args:
        data: one folder of MedMNIST files or "medmnist"; or CTs as for `find_scans`; or slice caches.
        image_processor: how CTs are cut; its size is the pictures'.
        cache_folder: keeps slices of CTs and MedMNIST's unpacked pictures.
        splits: of MedMNIST: "train", "val", "test", or "all".
        depth_bins, valid_share, on_error, on_missing, options: see `VolumeSlices`, `find_scans` and `fill_slice_cache`.
        min_coverage: of the CTs; see `SliceCache`.

    Raises:
        FileNotFoundError, ValueError, CTReadError: as those do.
    """
    if not data:
        raise ValueError("data is empty; give a folder of MedMNIST files or CTs, a slice cache, or medmnist.")
    cache_folder = Path(cache_folder)
    folders = [Path(root) for root in data]
    if list(data) == ["medmnist"]:
        with Processes().main_process_first():
            folders = [download_medmnist(cache_folder / "medmnist", image_processor.size)]
    if holds_medmnist(map(str, folders)):
        if len(folders) > 1:
            raise ValueError(f"data={list(data)}: MedMNIST's folder can't be mixed with others; give it alone.")
        return medmnist_sets(folders[0], splits, image_processor.size, cache_folder / "medmnist")
    if Processes().from_first(lambda: all(is_slice_cache(folder) for folder in folders)):
        return cached_sets(folders, depth_bins, valid_share, options.patient_rule if options else None)
    cache = SliceCache(cache_folder, image_processor, min_coverage)
    options = options or SourceOptions(on_missing=on_missing)
    scans = readable_scans(data, cache, on_error=on_error, valid_share=valid_share, options=options)
    return scan_sets(scans, cache, depth_bins)
