"""One CT volume from a file, a folder or an address: Hounsfield units, spacing and canonical orientation.

`read_ct` takes NIfTI-1/2 (`.nii`, `.nii.gz`), NRRD, MetaImage (`.mha`, `.mhd`), `.npy` and `.npz`; DICOM as a folder,
a list of files, one slice or a multi-frame file; a zip of any of these; and http(s)://, hf://, s3:// or gs:// addresses.
Formats are recognised by their first bytes, never by their suffix. Whatever the file's own axes, the result is RAS+: the first
index grows from the patient's left to the right, the second from back to front, the third from foot to head.

Geometry: see `ct_geometry`. Intensity: slope and intercept count once; NaN, infinite and padding voxels (below -1500 HU)
become air and are counted; then percentiles and air of a sample are checked (`judge_intensity`).

Bump `ENTRY_VERSION` in cache/slice_cache.py whenever decoded HU values change.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .ct_common import AIR_HU, CTReadError, NotCTError, StoredVolume, VolumeRef, check_dtype, squeezed_shape
from .ct_formats import ReadOptions, read_stored
from .ct_geometry import (
    DIRECTIONS,
    MAX_OBLIQUE_DEGREES,
    MAX_SHEAR_DEGREES,
    GivenGeometry,
    angles,
    canonical,
    orientation,
    resample,
    usable_affine,
)
from .ct_headers import is_plausible
from .ct_inputs import is_source
from .ct_intensity import (
    MIN_JUDGED,
    check_intensity,
    judge_intensity,
    padding_to_air,
    scaling,
    to_hu,
    warn_of_not_finite,
)
from .ct_memory import stored_image
from .ct_source import open_source

logger = logging.getLogger(__name__)

__all__ = ["AIR_HU", "CTReadError", "CTVolume", "NotCTError", "VolumeRef", "judge_intensity", "read_ct", "to_ct_volume"]

_CHEST_MM = 60.0  # a newborn's chest is larger along each axis


@dataclass(frozen=True)
class CTVolume:
    """One CT volume in canonical orientation.

    Attributes:
        hu: int16 array (X, Y, Z) of Hounsfield units in RAS+ order. May be a read-only view of the file (memory map).
        spacing: voxel size in mm along X, Y, Z.
        affine: float64 (4, 4), voxel index → RAS+ millimetres. The axes of oblique scans are not the patient's.
        source: where it came from.
        stored_orientation: where the axes of the file's own array point, such as "LPS"; "RAS" if they are those of `hu`.
            Of a resampled volume: where they pointed most nearly.
        stored_shape: shape of the file's own array; None = that of `hu`, in the order of `stored_axes`.
        stored_affine: float64 (4, 4), index in the file's own array → RAS+ millimetres; None = unknown.
        series: which DICOM series was read, as a digest; None for other formats. See `samf.model.ct_dicom_series`.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    source: str
    stored_orientation: str = "RAS"
    stored_shape: tuple[int, ...] | None = None
    stored_affine: np.ndarray | None = None
    series: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the number of voxels along X, Y, Z."""
        x, y, z = self.hu.shape
        return x, y, z

    @property
    def stored_axes(self) -> tuple[tuple[int, int], ...]:
        """Return for each axis of the file's own array which axis of `hu` it is, and its direction, 1 or -1."""
        return tuple(
            (axis, 1 if letter == direction[1] else -1)
            for letter in self.stored_orientation
            for axis, direction in enumerate(DIRECTIONS)
            if letter in direction
        )

    @property
    def coverage_mm(self) -> tuple[float, float, float]:
        """Return the extent of the voxels in mm along X, Y, Z."""
        x, y, z = (count * size for count, size in zip(self.shape, self.spacing, strict=True))
        return x, y, z

    def stored_hu(self) -> np.ndarray:
        """Return `hu` in the axis order of the file's own array, as a view."""
        axes, signs = zip(*self.stored_axes, strict=True)
        return self.hu.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]


def read_ct(
    path: Any,
    *,
    rescale: Sequence[float] | None = None,
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    series_uid: str | None = None,
    allow_non_ct: bool = False,
    min_coverage: float = 0.0,
) -> CTVolume:
    """Read one CT volume.

    Args:
        path: a file (NIfTI, NRRD, MetaImage, NumPy, DICOM, or a zip of one of them), a folder with DICOM slices in it or
            in its sub-folders, a list of the DICOM files of one volume, a file://, http(s):// or hf:// address of a file,
            or an s3:// or gs:// address of a file or folder. Instead of a path: a `VolumeRef`, a file that is open for
            reading bytes, or io.BytesIO, a pydicom dataset, or a row of an undecoded column of `datasets`,
            {"bytes": …, "path": …}. An open file is read from its beginning, and stays open at the position where it was.
        rescale: (slope, intercept) for a file that holds raw stored values under a blank header, as in CT-RATE's first
            release. Values that are HU already are noticed and refused. Five numbers are slope, intercept and spacing:
            what a record of such a volume carries.
        spacing: voxel size in mm along the stored axes, for a file whose header has no geometry, as in the same
            release. Without `axes`, these are then taken as DICOM's: to the patient's left, back and head (those of a
            NumPy file as RAS+).
        axes: where the stored axes point, for a file whose header does not say: three of the letters R or L, A or P,
            S or I. Slices from head to foot, rows from front to back, columns from right to left are "IPL". Without
            `spacing`, the header's sizes count, or 1 mm.
        series_uid: which series of a DICOM study to read, or which stack of an enhanced file, by the label that the log
            gives it, or a series by its SeriesInstanceUID. Default: the largest axial CT series.
        allow_non_ct: take other modalities, and values that are not Hounsfield units.
        min_coverage: mm that the volume must cover along each axis; less is refused. By default, a warning is logged for
            less than a chest: a single slice, a localizer, one reformatted plane.

    Returns:
        CTVolume in RAS+ order, HU in int16 (saturated). NaN, infinite and padding voxels are air (-1024).

    Raises:
        CTReadError: the path holds no single CT volume; says what was found, what was expected and what to do.
        NotCTError: a CTReadError: an intact volume that is no CT, or covers less than `min_coverage`.
        TypeError: no path at all.
    """
    if isinstance(path, VolumeRef):
        path = VolumeRef.of(path, rescale)
        path, rescale = path.path, path.rescale
    options = ReadOptions(series_uid, allow_non_ct, rescaled=rescale is not None)
    with open_source(path) as local:
        scale, sizes = _parse_rescale(local.source, rescale)
        stored = read_stored(local, options)
        volume = _build(stored, rescale=scale, spacing=sizes or spacing, axes=axes, judge=not allow_non_ct)
        _check_coverage(volume, local.source, min_coverage)
    return volume


def to_ct_volume(image: Any, *, spacing: Sequence[float] | None = None, axes: str | None = None) -> CTVolume:
    """Return a CTVolume of an image in memory, or of a path.

    Args:
        image: a CTVolume (returned as it is); anything that `read_ct` takes; an image of nibabel, SimpleITK, MONAI (a
            MetaTensor), TorchIO or highdicom, with its own geometry; or an array or tensor (X, Y, Z) of HU, taken as RAS+
            with voxels of 1 mm. Values in memory that are not Hounsfield units cause a warning, not an error.
        spacing: as for `read_ct`, for images without a geometry of their own.
        axes: as for `read_ct`, for the same images.

    Returns:
        CTVolume in RAS+ order, HU in int16.

    Raises:
        CTReadError: not one 3-D volume.
        TypeError: none of these, or an affine in unknown coordinates; says what to do.
    """
    if isinstance(image, CTVolume):
        GivenGeometry.of(image.source, spacing, axes).check(image.source, image.affine)
        return image
    if is_source(image):
        return read_ct(image, spacing=spacing, axes=axes)
    return _build(stored_image(image), spacing=spacing, axes=axes)


def _parse_rescale(
    source: str, rescale: Sequence[float] | None
) -> tuple[tuple[float, float] | None, tuple[float, ...] | None]:
    """Return slope and intercept, and the voxel sizes that may follow them."""
    if rescale is None:
        return None, None
    if len(rescale) not in (2, 5):
        raise CTReadError(f"{source}: rescale={rescale}; expected (slope, intercept), or those and three sizes.")
    return (rescale[0], rescale[1]), tuple(rescale[2:]) or None


def _build(
    stored: StoredVolume,
    *,
    rescale: tuple[float, float] | None = None,
    spacing: Sequence[float] | None = None,
    axes: str | None = None,
    judge: bool | None = None,
) -> CTVolume:
    """Return the CTVolume of stored values and their header.

    `judge`: refuse values that are not HU (True), accept them (False), or warn of them (None).
    """
    source = stored.source
    check_dtype(stored.array.dtype, source)
    array = stored.array.reshape(squeezed_shape(stored.array.shape, source), order="A")
    affine = usable_affine(stored, array.shape, GivenGeometry.of(source, spacing, axes))
    oblique, shear = angles(affine)
    if shear > MAX_SHEAR_DEGREES:
        stored.notes.append(f"tilted gantry or sheared axes: {shear:.1f}° off a right angle")
    hu = to_hu(array, *scaling(stored, rescale), source)
    warn_of_not_finite(source, stored.not_finite)
    if judge is not False:
        check_intensity(stored, array, hu, rescale, refuse=bool(judge))
    hu = padding_to_air(hu, source, own=stored.own or hu is not array)
    stored_orientation, stored_affine = orientation(affine), affine
    if oblique > MAX_OBLIQUE_DEGREES or shear > MAX_SHEAR_DEGREES:
        hu, affine = resample(hu, affine, source, oblique, shear)
    hu, affine = canonical(hu, affine)
    sizes = _voxel_size(affine, source)
    return CTVolume(hu, sizes, affine, source, stored_orientation, array.shape, stored_affine, stored.series)


def _voxel_size(affine: np.ndarray, source: str) -> tuple[float, float, float]:
    x, y, z = (float(norm) for norm in np.linalg.norm(affine[:3, :3], axis=0))
    if not is_plausible(np.array([x, y, z])):
        logger.warning("%s: implausible voxel size %g x %g x %g mm; check the unit in its header.", source, x, y, z)
    return x, y, z


def _check_coverage(volume: CTVolume, source: str, least: float) -> None:
    voxels = " x ".join(map(str, volume.shape))
    covered = " x ".join(f"{mm:.0f}" for mm in volume.coverage_mm)
    found = f"{source}: {voxels} voxels cover {covered} mm (left to right, back to front, foot to head)"
    if min(volume.coverage_mm) < least:
        raise NotCTError(
            f"{found}; expected at least {least:g} mm along each axis. Name another series of the study, or lower min_coverage."
        )
    if min(volume.coverage_mm) < _CHEST_MM:
        logger.log(
            logging.WARNING if volume.hu.size >= MIN_JUDGED else logging.INFO,
            "%s: too little for a chest. Is it one slice, a localizer or a reformatted plane? min_coverage= "
            "(--min_coverage MM) refuses such volumes.",
            found,
        )
