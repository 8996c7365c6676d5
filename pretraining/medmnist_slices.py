"""Slices of MedMNIST's OrganA/C/S (axial, coronal, sagittal) with organs as labels; https://medmnist.com."""

import logging
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from samf.pretraining.labelled_sets import JoinedSets, SliceSets
from samf.utils.distributed import Processes
from samf.utils.files import atomic_path

try:
    import medmnist
except ImportError:
    medmnist = None

logger = logging.getLogger(__name__)

PACKAGE = "medmnist"  # as `data`: let the package of this name download the files
# Stems of the files, in the order of PLANES. The file of 28 pixels has no size in its name.
_ORGAN_SETS = {"axial": "organamnist", "coronal": "organcmnist", "sagittal": "organsmnist"}
_ORGANS = (
    *("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right"),
    *("liver", "lung-left", "lung-right", "pancreas", "spleen"),
)
# MedMNIST's paper says "transformed into gray-scale with an abdominal window" without numbers; 400 HU around 40 is the
# usual one. All three channels have the same grey image.
MEDMNIST_WINDOWS = ((-160, 240),) * 3
_SPLITS = ("train", "val", "test")
_SIZES = (28, 64, 128, 224)


class MedMnistSlices(Dataset):
    """One split of one MedMNIST CT set: uint8 (3, size, size), the grey image three times, and organs as labels.

    Args:
        file: MedMNIST's .npz.
        split: "train", "val" or "test".
        folder: Gets the split's images unpacked, so that single images can be read from disk.

    Raises:
        ValueError: The file has no grey images, or not as many labels.
    """

    label_names: tuple[str, ...] = _ORGANS

    def __init__(self, file: Path, split: str, folder: Path):
        self.images = np.load(_unpack_member(file, f"{split}_images.npy", folder), mmap_mode="r")  # (N, size, size)
        self.labels = np.load(file)[f"{split}_labels"].reshape(-1).astype(np.int64)
        if self.images.ndim != 3 or len(self.images) != len(self.labels):
            raise ValueError(
                f"{file}: {split}_images has shape {self.images.shape}, and there are {len(self.labels)} labels; expected "
                f"grey images (N, size, size) and as many labels, as in MedMNIST's organ sets."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.images[index])).expand(3, -1, -1)


def _unpack_member(file: Path, member: str, folder: Path) -> Path:
    """Return the path of one array of an .npz, unpacked to `folder` as .npy if it isn't there yet."""
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


def holds_medmnist(data: Iterable[str]) -> bool:
    """Return whether one of `data` is MedMNIST: the name of its package, or a folder with one of its organ sets."""
    stems = _ORGAN_SETS.values()
    return any(root == PACKAGE or any(any(Path(root).glob(f"{stem}*.npz")) for stem in stems) for root in data)


def _medmnist_files(folder: Path, size: int) -> list[Path]:
    """Return the organ sets of `size` pixels in a folder, axial first.

    Raises:
        ValueError: MedMNIST has no images of this size.
        FileNotFoundError: The folder has none of the files.
    """
    if size not in _SIZES:
        raise ValueError(f"image_size={size}; MedMNIST's slices have {', '.join(map(str, _SIZES))} pixels.")
    ending = "" if size == _SIZES[0] else f"_{size}"
    files = [folder / f"{stem}{ending}.npz" for stem in _ORGAN_SETS.values()]
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
    """Download the organ sets of `size` pixels into `folder` with the `medmnist` package, and return the folder."""
    if medmnist is None:
        raise ImportError("data: medmnist needs the package of that name: pip install medmnist")
    folder.mkdir(parents=True, exist_ok=True)
    for stem in _ORGAN_SETS.values():
        dataset = getattr(medmnist, medmnist.INFO[stem]["python_class"])
        dataset(split="train", size=size, root=str(folder), download=True)
    return folder


def medmnist_sets(folder: Path, splits: Sequence[str], size: int, unpacked: Path) -> SliceSets:
    """Return the slices of some splits to learn from, and training and validation split as bank and queries.

    Args:
        folder: Has MedMNIST's files.
        splits: Some of "train", "val", "test", or only "all".
        size: Pixels per side.
        unpacked: Folder that gets unpacked images.

    Raises:
        ValueError: Unknown splits or size, or a file that isn't MedMNIST's.
        FileNotFoundError: The folder has none of the files.
    """
    splits = _SPLITS if list(splits) == ["all"] else splits
    if not splits or not set(splits) <= set(_SPLITS):
        raise ValueError(f"splits={list(splits)}; expected some of {', '.join(_SPLITS)}, or all.")
    files = _medmnist_files(folder, size)
    with Processes().main_process_first():
        by_split = {
            split: JoinedSets([MedMnistSlices(file, split, unpacked) for file in files])
            for split in _SPLITS
            if split in {*splits, "train", "val"}
        }
    return SliceSets(ConcatDataset([by_split[split] for split in splits]), by_split["train"], by_split["val"])
