"""Planes, field of view and patient coordinates of the slices of a CT volume."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np

from .ct_volume import CTVolume

Plane = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = get_args(Plane)  # a plane's index is its number in `slice_planes`

FieldOfView = Literal["full", "body"]
FIELDS: tuple[FieldOfView, ...] = get_args(FieldOfView)

# Part of an (X, Y, Z) array; the limits are integers.
Box: TypeAlias = tuple[slice, slice, slice]

# Axes of a RAS+ array that become (the plane's normal, image rows, image columns). Rows and columns are then reversed:
# superior or anterior is at the top; the patient's right (axial, coronal) or anterior (sagittal) is at the left.
PLANE_AXES: dict[Plane, tuple[int, int, int]] = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}
# Patient direction at the left, right, top and bottom edge of an image: Right, Left, Anterior, Posterior, Superior, Inferior.
ORIENTATION_LABELS: dict[Plane, str] = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}

_BODY_HU = -300
_BODY_GRID_MM = 4.0


def whole_volume(volume: CTVolume) -> Box:
    """Return the box of all voxels of a volume."""
    x, y, z = volume.hu.shape
    return slice(0, x), slice(0, y), slice(0, z)


def body_box(volume: CTVolume) -> Box:
    """Return the bounding box of the body, or of the whole volume if it contains no body.

    The volume is sampled on a grid of about 4 mm and thresholded at -300 HU. A morphological opening of three grid points
    removes thin structures such as the shell of a table. The largest connected component is the body, together with any
    other that is at least a quarter of its size, such as a second leg.

    Args:
        volume: the CT volume.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy import ndimage  # here, because field="full" doesn't need it
    except ImportError as error:
        raise ImportError("field='body' finds the body with scipy: pip install scipy") from error
    # 1e-3: two files of one scan whose spacings differ in the last digits get the same grid.
    steps = [max(1, int(_BODY_GRID_MM / mm + 1e-3)) for mm in volume.spacing]
    tissue = volume.hu[tuple(slice(None, None, step) for step in steps)] > _BODY_HU
    core = ndimage.binary_erosion(tissue, border_value=1)  # a body that the field of view cuts continues outside
    components, _ = ndimage.label(ndimage.binary_dilation(core))
    sizes = np.bincount(components.ravel())[1:]
    if not len(sizes):
        return whole_volume(volume)
    body = np.isin(components, 1 + np.flatnonzero(sizes * 4 >= sizes.max()))
    x, y, z = (_extent(body, axis, step, volume.hu.shape[axis]) for axis, step in enumerate(steps))
    return x, y, z


def _extent(body: np.ndarray, axis: int, step: int, size: int) -> slice:
    """Return the range of voxels along `axis`; the border of the body is less than one step beyond its last grid point."""
    occupied = np.flatnonzero(body.any(axis=tuple(other for other in range(3) if other != axis)))
    return slice(max(int(occupied[0] - 1) * step, 0), min(int(occupied[-1] + 1) * step, size))


def centre_indices(depth: int, count: int) -> np.ndarray:
    """Return the voxel indices (count,) at the centres of `count` equal parts of an axis of `depth` voxels."""
    return np.array([(2 * i + 1) * depth // (2 * count) for i in range(count)])


def slice_coordinates(
    volume: CTVolume, box: Box, plane: Plane, indices: np.ndarray, positions: Sequence[float] | np.ndarray
) -> dict[str, np.ndarray]:
    """Return where slices of one plane are in the volume and in the patient.

    Args:
        volume: the CT volume.
        box: the field of view; a slice's coordinate is taken at the centre of the box's other two axes.
        plane: the plane of all slices.
        indices: (n,) voxel indices along the plane's normal in the RAS+ array.
        positions: (n,) relative positions along the normal in [0, 1].

    Returns:
        `slice_planes`, `slice_positions`, `slice_indices` and `slice_mm`, each (n,), as in `SamfImageProcessor.extract`.
    """
    normal = PLANE_AXES[plane][0]
    centres = np.tile([(side.start + side.stop - 1) / 2 for side in box], (len(indices), 1))
    centres[:, normal] = indices
    return {
        "slice_planes": np.full(len(indices), PLANES.index(plane), dtype=np.int64),
        "slice_positions": np.asarray(positions).astype(np.float32),
        "slice_indices": indices.astype(np.int64),
        "slice_mm": (centres @ volume.affine[normal, :3] + volume.affine[normal, 3]).astype(np.float32),
    }
