"""What the page shows of a scan: a small copy for the viewer, and images for browsers without WebGL 2."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from samf.model.ct_volume import CTVolume
from samf.model.evidence_samf import Evidence, SliceHeat
from samf.utils.files import atomic_path, atomic_write

MAX_SIDE = 256  # voxels; larger volumes take minutes in software rendering
_AIR, _BONE = -1024, 3071  # HU that the copy keeps
_LUNG = (-1350, 150)
_PER_PLANE = 6  # slices of each plane in the montage
_SIDE = 192  # pixels of each
_OPACITY = 0.65
_FINER = 2  # cells of the overlay per cell of the evidence, along each axis


def display_volume(volume: CTVolume, most: int = MAX_SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume with at most `most` voxels a side, and its affine.

    Args:
        volume: the CT volume.
        most: voxels along each axis.

    Returns:
        int16 (X, Y, Z), and float64 (4, 4), voxel index → RAS+ mm.
    """
    shape = tuple(min(count, most) for count in volume.shape)
    step = np.array(volume.shape) / np.array(shape)
    values = volume.hu
    if shape != volume.shape:
        planes = np.stack([_shrunk(values[..., k], shape[:2]) for k in range(values.shape[2])], axis=-1)  # (X, Y, Z)
        rows = planes.reshape(shape[0] * shape[1], -1)
        values = _shrunk(rows, (len(rows), shape[2])).reshape(shape)
    to_stored = np.diag([*step, 1.0])
    to_stored[:3, 3] = (step - 1) / 2
    return np.clip(values, _AIR, _BONE).astype(np.int16), volume.affine @ to_stored


def _shrunk(plane: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a plane with fewer pixels, interpolated after smoothing, int16."""
    pixels = torch.from_numpy(np.ascontiguousarray(plane, dtype=np.float32))[None, None]
    smaller = torch.nn.functional.interpolate(pixels, shape, mode="bilinear", antialias=True)
    return smaller[0, 0].round().to(torch.int16).numpy()


def save_display(volume: CTVolume, path: Path) -> None:
    """Write the copy for the viewer as .nii.gz; its header has the geometry and nothing else."""
    values, affine = display_volume(volume)
    _write_nifti(values, affine, path)


def _write_nifti(values: np.ndarray, affine: np.ndarray, path: Path, slope: float = 1.0) -> None:
    """Write a .nii.gz file for the browser, quickly; its header has the geometry and nothing else.

    Args:
        values: as they are stored.
        affine: (4, 4), index → RAS+ mm.
        path: the file.
        slope: of a stored unit.
    """
    import nibabel
    from isal import igzip

    image = nibabel.Nifti1Image(values, affine)
    image.header.set_slope_inter(slope, 0)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as temporary:
        temporary.write_bytes(igzip.compress(image.to_bytes(), 1, mtime=0))


def save_overlay(evidence: Evidence, path: Path) -> None:
    """Write the heat maps for the viewer, a frame per sentence.

    The viewer shows an overlay's cells as blocks, so their grid is refined here.
    """
    maps, affine = evidence.maps(), np.array(evidence.grid_affine)
    if maps is None:
        return
    frames = torch.from_numpy(np.moveaxis(maps, -1, 0))[:, None]  # (K, 1, X, Y, Z)
    fine = torch.nn.functional.interpolate(frames, scale_factor=_FINER, mode="trilinear", align_corners=False)
    stored = (255 * fine[:, 0]).round().to(torch.uint8).numpy()
    finer = np.diag([1 / _FINER] * 3 + [1.0])
    finer[:3, 3] = (1 / _FINER - 1) / 2
    _write_nifti(np.moveaxis(stored, 0, -1), affine @ finer, path, 1 / 255)


def save_montage(volume: CTVolume, path: Path) -> None:
    """Write a PNG with slices of the three planes in radiological convention, lung window."""
    rows = []
    for plane in range(3):
        normal = 2 - plane  # axial, coronal, sagittal
        count = volume.shape[normal]
        places = [round((number + 0.5) * count / _PER_PLANE - 0.5) for number in range(_PER_PLANE)]
        rows.append([_slice_image(volume, normal, place) for place in places])
    _write_png(rows, path)


def _slice_image(volume: CTVolume, normal: int, index: int) -> Image.Image:
    """Return one slice as an image: the patient's right at the left, or the front; the head or the front at the top."""
    across, down = ((1, 2), (0, 2), (0, 1))[normal]
    pixels = np.take(volume.hu, index, axis=normal)[::-1, ::-1].T.astype(np.float32)
    low, high = _LUNG
    grey = (255 * (pixels - low) / (high - low)).clip(0, 255).astype(np.uint8)
    sizes = np.array([volume.coverage_mm[across], volume.coverage_mm[down]])
    width, height = (_SIDE * sizes / sizes.max()).round().clip(1).astype(int).tolist()
    tile = Image.new("L", (_SIDE, _SIDE))
    tile.paste(Image.fromarray(grey).resize((width, height)), ((_SIDE - width) // 2, (_SIDE - height) // 2))
    return tile


def save_heat_image(shown: SliceHeat, path: Path) -> None:
    """Write a PNG with one slice of each plane through the place of a sentence's heat, and the heat on it."""
    from matplotlib import colormaps

    tiles = []
    for images, heat in zip(shown.images, shown.heat, strict=True):
        grey = np.repeat(images[-1][..., None] / 255.0, 3, axis=2)  # the widest window
        share = np.clip(heat, 0, 1)[..., None] * _OPACITY
        mixed = grey * (1 - share) + colormaps["inferno"](heat)[..., :3] * share
        tiles.append(Image.fromarray((255 * mixed).round().astype(np.uint8)).resize((2 * _SIDE, 2 * _SIDE)))
    _write_png([tiles], path)


def _write_png(rows: Sequence[Sequence[Image.Image]], path: Path) -> None:
    import io

    side = rows[0][0].width
    sheet = Image.new(rows[0][0].mode, (side * len(rows[0]), side * len(rows)))
    for row, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (column * side, row * side))
    png = io.BytesIO()
    sheet.save(png, format="png", compress_level=1)
    atomic_write(path, png.getvalue())
