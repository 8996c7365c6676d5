"""3-D heat maps from heat on slice images: back-projection onto a coarse grid of the scan, and NIfTI files."""

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files_samf import atomic_path
from .slice_views_samf import ScanGeometry

GRID_MM = 6.0  # about a quarter of a patch of ViT-B/16 on a chest
_LEVELS = 255  # heat is stored in so many steps: files shrink to a tenth
_DESCRIPTION = b"SAMF evidence. For research only, not for diagnosis."


@dataclass(frozen=True)
class HeatGrid:
    """A coarse grid along the axes of a scan's volume that covers the same box.

    Attributes:
        shape: cells along X, Y, Z.
        affine: (4, 4), cell index → RAS+ millimetres.
        step: (3,) voxels per cell.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    step: tuple[float, float, float]

    @classmethod
    def over(cls, geometry: ScanGeometry, cell_mm: float = GRID_MM) -> "HeatGrid":
        """Return the grid with cells of about `cell_mm`, and never more cells than voxels."""
        sizes = np.linalg.norm(geometry.affine[:3, :3], axis=0)
        x, y, z = (
            min(max(round(count * size / cell_mm), 1), count) for count, size in zip(geometry.shape, sizes, strict=True)
        )
        step = tuple(count / cells for count, cells in zip(geometry.shape, (x, y, z), strict=True))
        to_voxel = np.diag([*step, 1.0])
        to_voxel[:3, 3] = (np.array(step) - 1) / 2
        return cls((x, y, z), geometry.affine @ to_voxel, (step[0], step[1], step[2]))

    def voxels(self) -> np.ndarray:
        """Return the voxel indices (X, Y, Z, 3), as fractions, of the cells' centres."""
        axes = [(np.arange(cells) + 0.5) * step - 0.5 for cells, step in zip(self.shape, self.step, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)

    def voxel(self, cell: np.ndarray) -> np.ndarray:
        """Return the voxel index (3,), as a fraction, of a cell index."""
        return (np.asarray(cell) + 0.5) * np.array(self.step) - 0.5


def back_project(geometry: ScanGeometry, heat: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Return for each plane the heat that its slices have at points of the volume, (P, …).

    Linear between neighbouring slices and pixels; zero outside the images.

    Args:
        geometry: of the scan.
        heat: (S, h, w), on all slices of the stack; h and w may be coarser than the images (patches).
        voxels: (…, 3) voxel indices.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError("Back-projection interpolates with scipy: pip install scipy") from error
    maps = []
    for view in geometry.views:
        numbers, rows, columns = view.coordinates(voxels)
        own = heat[view.slices]  # (n, h, w)
        scales = np.array(own.shape[1:]) / geometry.size
        places = [numbers, (rows + 0.5) * scales[0] - 0.5, (columns + 0.5) * scales[1] - 0.5]
        maps.append(ndimage.map_coordinates(own, places, order=1, mode="grid-constant"))
    return np.stack(maps)


def resample_heat(heat: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target: np.ndarray) -> np.ndarray:
    """Resample a map linearly onto another grid; cells outside the map take the value of its border.

    Args:
        heat: (X, Y, Z) in [0, 1].
        affine: (4, 4), index in `heat` → millimetres.
        shape: of the result.
        target: (4, 4), index in the result → the same millimetres.

    Returns:
        uint8 of `shape`, 255 = 1.
    """
    from scipy import ndimage

    mapping = np.linalg.inv(affine) @ target
    result = np.empty(shape, dtype=np.uint8)
    rows = np.indices(shape[1:]).reshape(2, -1)
    for index in range(shape[0]):  # a whole scan's coordinates would take 24 bytes a voxel
        points = mapping[:3, 0:1] * index + mapping[:3, 1:3] @ rows + mapping[:3, 3:]
        plane = ndimage.map_coordinates(heat, points, order=1, mode="nearest")
        result[index] = np.rint(plane.reshape(shape[1:]) * _LEVELS).clip(0, _LEVELS)
    return result


def save_heat(path: str | os.PathLike[str], maps: np.ndarray, affine: np.ndarray) -> Path:
    """Write heat maps as a .nii.gz file, whole or not at all, with nothing of the patient in its header.

    Args:
        path: the file.
        maps: (X, Y, Z) or (X, Y, Z, K), in [0, 1], or uint8 with 255 = 1.
        affine: (4, 4), index → RAS+ millimetres; sform and qform get code 1, scanner coordinates.

    Returns:
        The path.

    Raises:
        ImportError: nibabel is not installed.
    """
    try:
        import nibabel
    except ImportError as error:
        raise ImportError("NIfTI files are written with nibabel: pip install nibabel") from error
    if maps.dtype == np.uint8:
        image = nibabel.Nifti1Image(maps, affine)
        image.header.set_slope_inter(1 / _LEVELS, 0)
    else:
        image = nibabel.Nifti1Image((np.rint(maps * _LEVELS) / _LEVELS).astype(np.float32), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = _DESCRIPTION
    image.header["cal_min"], image.header["cal_max"] = 0, 1
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))
    return Path(path)


def meet(maps: np.ndarray) -> np.ndarray:
    """Return one map (X, Y, Z) in [0, 1] from those of the planes (P, X, Y, Z): hot where all planes are.

    The geometric mean of the planes' maps, each divided by its maximum. Negative heat, which speaks against, counts as none.
    """
    positive = maps.clip(min=0)
    largest = positive.reshape(len(maps), -1).max(axis=1)[:, None, None, None]
    shares = positive / largest.clip(min=1e-12)
    together = shares.prod(axis=0) ** (1 / len(maps))
    return (together / max(float(together.max()), 1e-12)).astype(np.float32)
