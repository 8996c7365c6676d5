"""Slices as the paper's published code makes them: the preset "published", for the checkpoints trained on them only."""

import functools
import logging
from collections.abc import Sequence

import numpy as np

from .ct_volume import CTVolume
from .slice_geometry import PLANE_AXES, slice_coordinates, whole_volume
from .slice_resampling import apply_windows

try:
    from PIL import Image
except ImportError:
    Image = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

PUBLISHED_CHANNELS = 3
_REACH = 72  # slices between the middle one and the first or last that the published code takes


def extract_published(
    volume: CTVolume, count: int, size: int, hu_windows: Sequence[tuple[float, float]] | None
) -> dict[str, np.ndarray]:
    """Return the slice stack of the preset "published"; see `SamfImageProcessor`.

    Args:
        volume: the CT volume.
        count: number of slices.
        size: width and height of the images in pixels.
        hu_windows: (low, high) in HU for each channel; None casts HU to uint8 as the published code does.

    Returns:
        The arrays of `SamfImageProcessor.extract`. The coordinates are the patient's, so that each slice can be located.
    """
    _warn_of_published()
    stored = volume.stored_hu()  # (rows, columns, N), a view
    depth, middle = stored.shape[2], stored.shape[2] // 2
    first, last = max(0, middle - _REACH), min(depth - 1, middle + _REACH)
    indices = np.linspace(first, last, count, dtype=np.int64)
    channels = PUBLISHED_CHANNELS if hu_windows is None else len(hu_windows)
    slices = np.empty((count, channels, size, size), dtype=np.uint8)
    for i, index in enumerate(indices):
        hu = stored[:, :, index]
        if hu_windows is None:
            slices[i] = _bicubic_crop(hu.astype(np.uint8), size)  # wraps; all channels are equal
            continue
        windowed = np.empty((channels, *hu.shape), dtype=np.uint8)
        apply_windows(hu.astype(np.float32), hu_windows, out=windowed)
        for channel, image in enumerate(windowed):
            slices[i, channel] = _bicubic_crop(image, size)
    normal, sign = volume.stored_axes[2]
    plane = next(plane for plane, axes in PLANE_AXES.items() if axes[0] == normal)
    indices = indices if sign > 0 else depth - 1 - indices
    coordinates = slice_coordinates(volume, whole_volume(volume), plane, indices, (indices + 0.5) / depth)
    return {"slices": slices, **coordinates}


def _bicubic_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Scale the shorter side of a uint8 image to `size` and crop the middle of the longer: (size, size)."""
    if Image is None:
        raise ImportError("preset='published' resizes images with Pillow: pip install Pillow")
    rows, columns = (int(size * side / min(image.shape)) for side in image.shape)
    scaled = Image.fromarray(np.ascontiguousarray(image)).resize((columns, rows), Image.Resampling.BICUBIC)
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    return np.asarray(scaled)[top : top + size, left : left + size]


@functools.cache  # once per process
def _warn_of_published() -> None:
    logger.warning(
        "preset 'published': HU are cast to uint8, which wraps: -1000 HU becomes 24, -1 becomes 255 and 0 becomes 0, so "
        "neighbouring tissues can look as different as air and bone."
    )
    logger.warning(
        "preset 'published': a single plane, limited to the slices within %d of the middle one; the rest of the volume is "
        "not used.",
        _REACH,
    )
    logger.warning(
        "preset 'published': slices are taken along the file's third axis in stored orientation and spacing, so the same "
        "scan stored differently gives other images, mirrored or in another plane."
    )
