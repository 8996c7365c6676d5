"""Slices of phantoms with labels from their masks: which finding is in which quarter and in which patch of the image."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from samf.model.ct_volume import CTVolume
from samf.model.image_processing_samf import SamfImageProcessor
from samf.phantoms.findings import sample_findings
from samf.phantoms.volume import Phantom, make_phantom
from samf.utils.parallel import process_pool, usable_cores

_MASK_HU = 1000
# Pixels of a finding's mask in a quarter from which the quarter is labelled with it.
_MIN_PIXELS = 4
# Probability of each finding: more than in the phantoms of the demo, so that small ones are seen more often.
_PREVALENCE = 0.5
# Share of a patch's pixels from which the patch is labelled: three of 8 x 8.
_MIN_SHARE = 0.04


@dataclass(frozen=True)
class LabelledSlice:
    """A slice and what it shows.

    Attributes:
        pixels: uint8 (C, H, W).
        labels: float32 (4·F,), finding f in quarter q is label 4·f + q.
        patch_labels: bool (P, F), in the order of a ViT's patches: row by row from the top left.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    patch_labels: torch.Tensor


class LabelledSlices(Dataset):
    """Slices uint8 (N, C, H, W) with labels of their quarters and of their patches.

    Quarters are top left, top right, bottom left and bottom right; in axial images the patient's right is on the left.
    Labels by quarter instead of by slice make the embedding keep the place of a finding.

    Args:
        patients: number of phantoms to draw; each gives one stack of slices.
        seed: other seeds give other patients.
        image_processor: how slices are cut.
        finding_names: the findings that are labelled.
        patch_size: side of a patch in pixels.
        workers: processes that draw; None takes one per core.

    Attributes:
        slices: uint8 (N, C, H, W).
        labels: float32 (N, 4·F).
        patch_labels: bool (N, P, F).
    """

    def __init__(
        self,
        patients: int,
        seed: int,
        image_processor: SamfImageProcessor,
        finding_names: Sequence[str],
        patch_size: int,
        workers: int | None = None,
    ):
        draw = partial(
            _draw,
            seed=seed,
            image_processor=image_processor,
            finding_names=tuple(finding_names),
            patch_size=patch_size,
        )
        with process_pool(workers or usable_cores()) as pool:
            drawn = list(tqdm(pool.map(draw, range(patients), chunksize=4), total=patients, desc="drawing phantoms"))
        self.slices, self.labels, self.patch_labels = (np.concatenate(part) for part in zip(*drawn, strict=True))

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.slices)

    def __getitem__(self, index: int) -> LabelledSlice:
        """Return a slice and its labels."""
        arrays = (self.slices[index], self.labels[index], self.patch_labels[index])
        return LabelledSlice(*map(torch.from_numpy, arrays))


def finding_masks(phantom: Phantom, image_processor: SamfImageProcessor, finding_names: Sequence[str]) -> np.ndarray:
    """Return where the slices of a phantom show each finding, bool (S, F, H, W).

    Args:
        phantom: the phantom.
        image_processor: how slices are cut.
        finding_names: the findings.
    """
    size = image_processor.size
    masks = np.zeros((image_processor.num_slices, len(finding_names), size, size), dtype=bool)
    mask_slicer = SamfImageProcessor(
        planes=image_processor.planes,
        slices_per_plane=image_processor.slices_per_plane,
        hu_windows=((0, _MASK_HU),),
        slab="none" if image_processor.slab == "none" else "mip",
        size=size,
    )
    for column, name in enumerate(finding_names):
        if name in phantom.masks:
            mask = phantom.masks[name].astype(np.int16) * _MASK_HU
            volume = CTVolume(mask, phantom.spacing, phantom.affine, name)
            masks[:, column] = mask_slicer.extract(volume)["slices"][:, 0] >= 128
    return masks


def quarter_labels(masks: np.ndarray) -> np.ndarray:
    """Return the labels of the quarters, float32 (S, 4·F), of masks (S, F, H, W)."""
    half = masks.shape[-1] // 2
    rows = (masks[..., :half, :], masks[..., half:, :])
    quarters = [part.sum(axis=(2, 3)) for row in rows for part in (row[..., :half], row[..., half:])]
    return (np.stack(quarters, axis=2) >= _MIN_PIXELS).reshape(len(masks), -1).astype(np.float32)


def patch_labels(masks: np.ndarray, patch_size: int) -> np.ndarray:
    """Return the labels of the patches, bool (S, P, F), of masks (S, F, H, W).

    Args:
        masks: where the slices show each finding.
        patch_size: side of a patch in pixels; pixels beyond the last whole patch belong to none, as in a ViT.
    """
    slices, findings, side = masks.shape[0], masks.shape[1], masks.shape[-1] // patch_size
    whole = masks[..., : side * patch_size, : side * patch_size]
    shares = whole.reshape(slices, findings, side, patch_size, side, patch_size).mean(axis=(3, 5))
    return (shares >= _MIN_SHARE).reshape(slices, findings, -1).transpose(0, 2, 1)


def _draw(
    patient: int, seed: int, image_processor: SamfImageProcessor, finding_names: Sequence[str], patch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # The first number makes these patients different from those that `samf.phantoms.dataset` writes to disk.
    keys = [0x51CE, seed, patient]
    findings = sample_findings(np.random.default_rng([*keys, 1]), prevalence=_PREVALENCE)
    phantom = make_phantom(np.random.default_rng(keys), findings=findings)
    volume = CTVolume(phantom.hu, phantom.spacing, phantom.affine, f"phantom {patient}")
    masks = finding_masks(phantom, image_processor, finding_names)
    return image_processor.extract(volume)["slices"], quarter_labels(masks), patch_labels(masks, patch_size)
