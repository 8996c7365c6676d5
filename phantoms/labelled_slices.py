"""Slices of phantoms with labels from their masks: which finding is in which quarter of the image."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from samf.model.ct_volume import CTVolume
from samf.model.image_processing_samf import SamfImageProcessor
from samf.phantoms.volume import Phantom, make_phantom
from samf.utils.parallel import process_pool, usable_cores

_MASK_HU = 1000
# Pixels of a finding's mask in a quarter from which the quarter is labelled with it.
_MIN_PIXELS = 4


class LabelledSlices(Dataset):
    """Slices uint8 (N, C, H, W) with multi-hot labels float32 (N, 4·F): finding f in quarter q is label 4·f + q.

    Quarters are top left, top right, bottom left and bottom right; in axial images the patient's right is on the left.
    Labels by quarter instead of by slice make the embedding keep the place of a finding.

    Args:
        patients: number of phantoms to draw; each gives one stack of slices.
        seed: other seeds give other patients.
        image_processor: how slices are cut.
        finding_names: the findings that are labelled.
        workers: processes that draw; None takes one per core.
    """

    def __init__(
        self,
        patients: int,
        seed: int,
        image_processor: SamfImageProcessor,
        finding_names: Sequence[str],
        workers: int | None = None,
    ):
        draw = partial(_draw, seed=seed, image_processor=image_processor, finding_names=tuple(finding_names))
        with process_pool(workers or usable_cores()) as pool:
            drawn = list(tqdm(pool.map(draw, range(patients), chunksize=4), total=patients, desc="drawing phantoms"))
        self.slices = np.concatenate([slices for slices, _ in drawn])
        self.labels = np.concatenate([labels for _, labels in drawn])

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.slices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a slice (C, H, W) and its labels (4·F,)."""
        return torch.from_numpy(self.slices[index]), torch.from_numpy(self.labels[index])


def slice_labels(phantom: Phantom, image_processor: SamfImageProcessor, finding_names: Sequence[str]) -> np.ndarray:
    """Return the labels, float32 (S, 4·F), of the slices of a phantom.

    Args:
        phantom: the phantom.
        image_processor: how slices are cut.
        finding_names: the findings that are labelled.
    """
    labels = np.zeros((image_processor.num_slices, len(finding_names), 4), dtype=np.float32)
    mask_slicer = SamfImageProcessor(
        planes=image_processor.planes,
        slices_per_plane=image_processor.slices_per_plane,
        hu_windows=((0, _MASK_HU),),
        slab="none" if image_processor.slab == "none" else "mip",
        size=image_processor.size,
    )
    for column, name in enumerate(finding_names):
        if name not in phantom.masks:
            continue
        mask = phantom.masks[name].astype(np.int16) * _MASK_HU
        volume = CTVolume(mask, phantom.spacing, phantom.affine, name)
        shown = mask_slicer.extract(volume)["slices"][:, 0] >= 128  # (S, H, W)
        half = shown.shape[1] // 2
        rows = (shown[:, :half], shown[:, half:])
        quarters = [part for row in rows for part in (row[..., :half], row[..., half:])]
        labels[:, column] = np.stack([part.sum(axis=(1, 2)) >= _MIN_PIXELS for part in quarters], axis=1)
    return labels.reshape(len(labels), -1)


def _draw(
    patient: int, seed: int, image_processor: SamfImageProcessor, finding_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    # The first number makes these patients different from those that `samf.phantoms.dataset` writes to disk.
    phantom = make_phantom(np.random.default_rng([0x51CE, seed, patient]))
    volume = CTVolume(phantom.hu, phantom.spacing, phantom.affine, f"phantom {patient}")
    return image_processor.extract(volume)["slices"], slice_labels(phantom, image_processor, finding_names)
