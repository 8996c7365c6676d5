"""Where the slice images of a scan are in its volume: pixels to voxels to millimetres, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .ct_volume import CTVolume
from .slice_geometry import PLANE_AXES, PLANES, Box, Plane, body_box, whole_volume
from .slice_resampling import SquareResampler


class SliceSettings(Protocol):
    """The settings of a `SamfImageProcessor` that decide where its images are."""

    field: str
    slab: str
    preset: str
    size: int


@dataclass(frozen=True)
class PixelAxis:
    """Linear map from voxel indices along one axis of a volume to pixel coordinates along one axis of its slice images.

    Attributes:
        axis: of the volume, 0 to 2.
        scale: pixels per voxel, negative where the image is reversed.
        shift: pixel coordinate of voxel 0.
    """

    axis: int
    scale: float
    shift: float

    def pixel(self, voxel: np.ndarray) -> np.ndarray:
        """Return the pixel coordinates of voxel indices; both may be fractions."""
        return self.scale * voxel + self.shift

    def voxel(self, pixel: np.ndarray) -> np.ndarray:
        """Return the voxel indices of pixel coordinates."""
        return (pixel - self.shift) / self.scale


@dataclass(frozen=True)
class PlaneView:
    """The slice images of one plane.

    Attributes:
        plane: "axial", "coronal" or "sagittal".
        slices: (n,) numbers of its slices in the stack, by increasing depth.
        depths: (n,) voxel index of each slice's centre along the plane's normal; a fraction for slabs.
        rows, columns: of the images.
    """

    plane: Plane
    slices: np.ndarray
    depths: np.ndarray
    rows: PixelAxis
    columns: PixelAxis

    @property
    def normal(self) -> int:
        """Return the volume's axis across the slices."""
        return PLANE_AXES[self.plane][0]

    def coordinates(self, voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where voxels (…, 3) are in the plane's images: number within `slices`, row, column; all fractions.

        Between two slices the number grows linearly; beyond the first or last it stays.
        """
        numbers = np.interp(voxels[..., self.normal], self.depths, np.arange(len(self.depths)))
        return (
            numbers,
            self.rows.pixel(voxels[..., self.rows.axis]),
            self.columns.pixel(voxels[..., self.columns.axis]),
        )

    def voxels(self, number: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return the voxel indices (…, 3), as fractions, of pixels of one slice.

        Args:
            number: of the slice within `slices`.
            rows: pixel coordinates (…).
            columns: pixel coordinates (…).
        """
        rows, columns = np.broadcast_arrays(rows, columns)
        found = np.empty((*rows.shape, 3))
        found[..., self.normal] = self.depths[number]
        found[..., self.rows.axis] = self.rows.voxel(rows)
        found[..., self.columns.axis] = self.columns.voxel(columns)
        return found


@dataclass(frozen=True)
class ScanGeometry:
    """Geometry of a scan and of the slice images that were cut from it; holds no voxels.

    Attributes:
        shape: of the volume (X, Y, Z), RAS+.
        affine: (4, 4), voxel index → RAS+ millimetres.
        views: the planes, in the order of the stack.
        size: side of the slice images in pixels.
        stored_shape: of the file's own array.
        stored_affine: (4, 4), index in the file's own array → RAS+ millimetres.
        oriented: whether the images are in patient orientation; the preset "published" keeps that of the stored array.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    views: tuple[PlaneView, ...]
    size: int
    stored_shape: tuple[int, ...]
    stored_affine: np.ndarray
    oriented: bool = True

    @classmethod
    def of(cls, volume: CTVolume, stack: Mapping[str, np.ndarray], image_processor: SliceSettings) -> "ScanGeometry":
        """Return the geometry of a volume's slices.

        Args:
            volume: the volume.
            stack: `slice_planes` and `slice_indices` (S,) of `SamfImageProcessor.extract`.
            image_processor: that cut the slices.
        """
        box = body_box(volume) if image_processor.field == "body" else whole_volume(volume)
        planes = np.asarray(stack["slice_planes"])
        views = tuple(
            _plane_view(volume, box, PLANES[number], np.flatnonzero(planes == number), stack, image_processor)
            for number in dict.fromkeys(planes.tolist())
        )
        stored_shape, stored_affine = volume.stored_shape, volume.stored_affine
        if stored_shape is None or stored_affine is None:
            stored_shape, stored_affine = _stored_grid(volume)
        oriented = image_processor.preset != "published"
        return cls(volume.shape, volume.affine, views, image_processor.size, stored_shape, stored_affine, oriented)

    def to_mm(self, voxels: np.ndarray) -> np.ndarray:
        """Return RAS+ millimetres (…, 3) of voxel indices (…, 3)."""
        return voxels @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_stored(self, voxels: np.ndarray) -> np.ndarray:
        """Return the indices (…, 3) in the file's own array of voxel indices (…, 3) of the RAS+ volume."""
        inverse = np.linalg.inv(self.stored_affine)
        return self.to_mm(voxels) @ inverse[:3, :3].T + inverse[:3, 3]

    def view_of(self, number: int) -> tuple[PlaneView, int]:
        """Return the plane of a slice of the stack, and the slice's number within that plane."""
        for view in self.views:
            found = np.flatnonzero(view.slices == number)
            if len(found):
                return view, int(found[0])
        raise IndexError(f"slice {number}; the stack has {sum(len(view.slices) for view in self.views)} slices")


def _stored_grid(volume: CTVolume) -> tuple[tuple[int, ...], np.ndarray]:
    """Return the shape and the affine of `volume.stored_hu()`."""
    to_canonical = np.zeros((4, 4))
    to_canonical[3, 3] = 1
    for stored, (axis, sign) in enumerate(volume.stored_axes):
        to_canonical[axis, stored] = sign
        to_canonical[axis, 3] = volume.shape[axis] - 1 if sign < 0 else 0
    return volume.stored_hu().shape, volume.affine @ to_canonical


def _plane_view(
    volume: CTVolume,
    box: Box,
    plane: Plane,
    numbers: np.ndarray,
    stack: Mapping[str, np.ndarray],
    image_processor: SliceSettings,
) -> PlaneView:
    depths = np.asarray(stack["slice_indices"], dtype=np.float64)[numbers]
    normal, row_axis, column_axis = PLANE_AXES[plane]
    if image_processor.slab != "none":
        count, extent = len(numbers), box[normal].stop - box[normal].start
        depths = box[normal].start + (np.arange(count) + 0.5) * extent / count - 0.5
    if image_processor.preset == "published":
        (rows, row_sign), (columns, column_sign), _ = volume.stored_axes
        sides = (volume.shape[rows], volume.shape[columns])
        axes = [
            _cropped_axis(axis, sign, sides, side, image_processor.size)
            for axis, sign, side in ((rows, row_sign, sides[0]), (columns, column_sign, sides[1]))
        ]
    else:
        counts = (box[row_axis].stop - box[row_axis].start, box[column_axis].stop - box[column_axis].start)
        spacing = (volume.spacing[row_axis], volume.spacing[column_axis])
        resampler = SquareResampler.for_spacing(counts, spacing, image_processor.size)
        axes = [_reversed_axis(axis, box, resampler, number) for number, axis in enumerate((row_axis, column_axis))]
    order = np.argsort(depths, kind="stable")
    return PlaneView(plane, numbers[order], depths[order], axes[0], axes[1])


def _reversed_axis(axis: int, box: Box, resampler: SquareResampler, number: int) -> PixelAxis:
    """Return rows (`number` 0) or columns (1) of images whose axes run against the volume's."""
    scale, shift = resampler.pixel_map(number)
    return PixelAxis(axis, -scale, scale * (box[axis].stop - 1) + shift)


def _cropped_axis(axis: int, sign: int, sides: tuple[int, int], side: int, size: int) -> PixelAxis:
    """Return an axis of the preset "published": the shorter side fills the image, the longer one is cropped."""
    resized = int(size * side / min(sides))
    scale, start = resized / side, round((resized - size) / 2)
    shift = scale / 2 - 0.5 - start
    return PixelAxis(axis, sign * scale, shift if sign > 0 else shift + scale * (side - 1))
