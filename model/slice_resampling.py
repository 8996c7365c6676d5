"""Resampling of CT slices: slabs along the normal, square pixels in the plane, HU windows to grey values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

from .ct_threads import run_parallel
from .ct_volume import AIR_HU

Slab = Literal["none", "mean", "mip"]
SLABS: tuple[Slab, ...] = get_args(Slab)

# Values below air are padding (-3024 or similar) and values above this are metal: clipped, they don't affect neighbours.
_MAX_HU = 3071


def reduce_slabs(images: np.ndarray, indices: np.ndarray, slab: Slab, out: np.ndarray) -> None:
    """Reduce the images of one plane to the requested slices, clipped to the HU range from air to metal.

    Args:
        images: int16 (N, rows, columns), all images along the plane's normal; a view of the volume.
        indices: (n,) image index of each slice.
        slab: "none" takes that image; "mean" and "mip" reduce the images that are nearer to it than to other slices.
        out: float32 (n, rows, columns), written.
    """
    depth, count = len(images), len(indices)
    # Slab i covers the images whose centres are within it, edges[i] to edges[i + 1].
    edges = np.array([-((count - 2 * i * depth) // (2 * count)) for i in range(count + 1)])
    strides = np.abs(images.strides)
    apart = strides[0] > min(strides)  # neighbouring voxels of neighbouring images are not neighbours in memory
    if slab == "none" and apart:
        run_parallel(lambda i: np.clip(images[indices[i]], AIR_HU, _MAX_HU, out=out[i]), range(count))
    elif slab == "none":  # one sweep over memory for all images, which share its cache lines
        along = 1 if strides[1] > strides[2] else 2
        images, out = images.swapaxes(1, along), out.swapaxes(1, along)
        run_parallel(lambda i: np.clip(images[indices, i], AIR_HU, _MAX_HU, out=out[:, i]), range(images.shape[1]))
    elif depth < count or apart:
        run_parallel(
            lambda i: _reduce_slab(images[edges[i] : edges[i + 1]], images[indices[i]], slab, out[i]), range(count)
        )
    else:  # neighbouring images are neighbours in memory: sums along that axis are many times faster
        along = 1 if strides[1] > strides[2] else 2
        images, out = images.swapaxes(1, along), out.swapaxes(1, along)
        run_parallel(lambda i: _reduce_line(images[:, i].T, edges, slab, out[:, i].T), range(images.shape[1]))


def _reduce_slab(block: np.ndarray, nearest: np.ndarray, slab: Slab, out: np.ndarray) -> None:
    """Write the mean or maximum over the first axis of a block (n, rows, columns); `nearest` if n is 0."""
    if not len(block):  # fewer voxels than slices
        block = nearest[None]
    if slab == "mip":
        np.clip(block.max(axis=0), AIR_HU, _MAX_HU, out=out)
        return
    clipped = np.empty_like(block[0])
    out[...] = 0
    for image in block:
        out += np.clip(image, AIR_HU, _MAX_HU, out=clipped)  # integers: exact in float32, in any order
    out /= np.float32(len(block))


def _reduce_line(lines: np.ndarray, edges: np.ndarray, slab: Slab, out: np.ndarray) -> None:
    """Reduce one line of all images, (width, N), in slabs from edge to edge: `out` (width, n)."""
    clipped = np.clip(lines, AIR_HU, _MAX_HU)
    if slab == "mip":
        out[...] = np.maximum.reduceat(clipped, edges[:-1], axis=1)
    else:
        out[...] = np.add.reduceat(clipped, edges[:-1], axis=1, dtype=np.int32)
        out /= np.diff(edges).astype(np.float32)


@dataclass(frozen=True)
class SquareResampler:
    """Resampling of images with anisotropic pixels to squares with isotropic pixels.

    The longer side of the field of view, in mm, fills the square; the shorter side is centred (to within half a pixel) and
    padded with air. The aspect ratio is rounded to 1e-4, a fiftieth of a pixel in 224, so that two files of one scan whose
    spacings differ in the last digits give the same pixels.

    Attributes:
        counts: rows and columns of the input.
        scales: scale factor of each axis.
        margins: pixels of air before and after each axis.
        size: side of the square in pixels.
    """

    counts: tuple[int, int]
    scales: tuple[float, float]
    margins: tuple[int, int]
    size: int

    @classmethod
    def for_spacing(cls, counts: tuple[int, int], spacing: tuple[float, float], size: int) -> "SquareResampler":
        """Return the resampler for images of one shape and pixel spacing.

        Args:
            counts: rows and columns.
            spacing: distance of rows and of columns in mm.
            size: side of the square in pixels.
        """
        extents = (counts[0] * spacing[0], counts[1] * spacing[1])
        row_axis, column_axis = (
            _scale_axis(count, extent / max(extents), size) for count, extent in zip(counts, extents, strict=True)
        )
        return cls(counts, (row_axis[0], column_axis[0]), (row_axis[1], column_axis[1]), size)

    def pixel_map(self, axis: int) -> tuple[float, float]:
        """Return (scale, shift) of rows (0) or columns (1): input index i is at pixel scale · i + shift of the square."""
        scale = self.scales[axis]
        return scale, (self.margins[axis] + 0.5) * scale - 0.5 + _shift(self._centre(axis), self.size)

    def _centre(self, axis: int) -> float:
        """Return the middle of the input in resized pixels from the canvas's edge."""
        return (self.counts[axis] / 2 + self.margins[axis]) * self.scales[axis]

    def canvas(self, images: int) -> np.ndarray:
        """Return uninitialised images with margins of air, float32 (n, rows + margins, columns + margins)."""
        (rows, columns), (above, left) = self.counts, self.margins
        canvas = np.empty((images, rows + 2 * above, columns + 2 * left), dtype=np.float32)
        canvas[:, :above] = canvas[:, above + rows :] = AIR_HU
        canvas[:, :, :left] = canvas[:, :, left + columns :] = AIR_HU
        return canvas

    def interior(self, canvas: np.ndarray) -> np.ndarray:
        """Return the images of a canvas without the margins: a view (n, rows, columns)."""
        (rows, columns), (above, left) = self.counts, self.margins
        return canvas[:, above : above + rows, left : left + columns]

    def resize(self, canvas: np.ndarray) -> np.ndarray:
        """Resample a canvas to square images, float32 (n, size, size)."""
        resized = F.interpolate(  # all at once: starting torch's threads takes longer than one image does
            torch.from_numpy(canvas)[None],
            scale_factor=[scale * (1 + 1e-9) for scale in self.scales],  # or the longer side may be a pixel short
            mode="bilinear",
            antialias=True,
            recompute_scale_factor=False,
        )[0].numpy()
        (to_rows, from_rows), (to_columns, from_columns) = (
            _centred_overlap(self._centre(axis), have, self.size) for axis, have in enumerate(resized.shape[1:])
        )
        squares = np.full((len(canvas), self.size, self.size), AIR_HU, dtype=np.float32)
        squares[:, to_rows, to_columns] = resized[:, from_rows, from_columns]
        return squares


def _scale_axis(count: int, share: float, size: int) -> tuple[float, int]:
    """Return the scale factor and the margin of an axis that covers this share of the longer side."""
    share = max(round(share, 4), 1e-4)
    scale = size * share / count
    # Border pixels of the shorter side are averaged with the air next to them. The integer number of pixels that results
    # moves the border by less than a pixel; it doesn't stretch the image.
    return scale, 0 if share == 1 else math.ceil(1 / scale)


def _shift(centre: float, size: int) -> int:
    """Return by how many whole pixels to move an image so that its point `centre` is in the middle of `size` pixels."""
    return math.floor(size / 2 - centre + 0.5)


def _centred_overlap(centre: float, have: int, size: int) -> tuple[slice, slice]:
    """Return where `have` pixels go in `size`, and which of them, so that their point `centre` is in the middle."""
    shift = _shift(centre, size)
    start, stop = max(shift, 0), min(shift + have, size)
    return slice(start, stop), slice(start - shift, stop - shift)


def apply_windows(
    hu: np.ndarray, windows: Sequence[tuple[float, float]], out: np.ndarray | Sequence[np.ndarray]
) -> None:
    """Map HU to grey values, one channel per window.

    Args:
        hu: float32 (H, W).
        windows: (low, high) in HU for each of C channels: low and below becomes 0, high and above 255, rounded between.
        out: uint8 (C, H, W), or C arrays (H, W), written.
    """
    for (low, high), grey in zip(windows, out, strict=True):
        values = hu - np.float32(low)
        values /= np.float32(high - low)
        values *= np.float32(255)
        np.rint(values, out=values)
        grey[...] = values.clip(0, 255, out=values)
