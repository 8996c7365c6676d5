"""Affines of stored volumes, and the way from them to canonical (RAS+) order.

The sform counts before the qform, the qform before bare voxel sizes. Axes within 10° of the patient's, and at right angles
within 0.5°, stay as they are, each named after the nearest patient axis. Otherwise (oblique reformats, a tilted gantry,
affines sheared by up to 40°) the volume is resampled linearly onto the patient's axes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .ct_common import AIR_HU, MAX_VOXELS, CTReadError, StoredVolume

logger = logging.getLogger(__name__)

DIRECTIONS = ("LR", "PA", "IS")  # of the axes R, A and S: where they start and where they point
_AXIS_OF = {letter: axis for axis, pair in enumerate(DIRECTIONS) for letter in pair}
_OPPOSITE = {pair[side]: pair[1 - side] for pair in DIRECTIONS for side in (0, 1)}
_NAMES = {"L": "left", "R": "right", "P": "back", "A": "front", "I": "foot", "S": "head"}
MAX_OBLIQUE_DEGREES = 10.0
MAX_SHEAR_DEGREES = 0.5
_MAX_REPAIRED_SHEAR_DEGREES = 40.0  # gantries tilt up to 30°
_MAX_RESAMPLED, _MAX_GROWTH = 50_000_000, 20  # voxels, and times as many as before: the size of a resampled volume
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


@dataclass(frozen=True)
class GivenGeometry:
    """The geometry that the caller gives for a file without one.

    Attributes:
        sizes: voxel sizes (3,) in mm along the stored axes.
        axes: three letters, where the stored axes point, such as "LPS".
    """

    sizes: np.ndarray | None = None
    axes: str | None = None

    @classmethod
    def of(cls, source: str, spacing: Sequence[float] | None, axes: str | None) -> "GivenGeometry":
        """Check what the caller gives.

        Args:
            source: name in messages.
            spacing: three voxel sizes in mm.
            axes: three letters in either case.

        Raises:
            CTReadError: not three positive sizes, or not one letter for each patient axis.
        """
        sizes = None if spacing is None else np.array([float(mm) for mm in spacing])
        if sizes is not None and (sizes.shape != (3,) or not np.isfinite(sizes).all() or sizes.min() <= 0):
            raise CTReadError(f"{source}: spacing={spacing}; expected three positive numbers of mm.")
        if axes is None:
            return cls(sizes)
        letters = axes.upper() if isinstance(axes, str) else ""
        if len(letters) != 3 or sorted(_AXIS_OF.get(letter, -1) for letter in letters) != [0, 1, 2]:
            raise CTReadError(
                f"{source}: axes={axes!r}; expected one letter for each stored axis, where it points: R or L, A or P, "
                f'S or I, such as "LPS".'
            )
        return cls(sizes, letters)

    def __bool__(self) -> bool:
        return self.sizes is not None or self.axes is not None

    def check(self, source: str, affine: np.ndarray) -> None:
        """Raise CTReadError when a header's affine (4, 4) contradicts the caller; `source`: name in messages."""
        norms = np.linalg.norm(affine[:3, :3], axis=0)
        if self.sizes is not None and np.abs(norms / self.sizes - 1).max() > 0.02:
            raise CTReadError(
                f"{source}: its header declares voxels of {norms.round(4).tolist()} mm, spacing {self.sizes.tolist()}. "
                f"Leave spacing out, or look it up again."
            )
        if self.axes is not None and self.axes != (stored := orientation(affine)):
            raise CTReadError(
                f"{source}: its header declares axes {stored}, the caller axes {self.axes}. Leave axes out."
            )


def usable_affine(stored: StoredVolume, shape: Sequence[int], given: GivenGeometry) -> np.ndarray:
    """Return the first affine that maps voxels to a real volume, else one made of voxel sizes and axes.

    Args:
        stored: the volume with its header's affines.
        shape: (X, Y, Z).
        given: the caller's sizes and axes.

    Returns:
        (4, 4), voxel → RAS+ mm.

    Raises:
        CTReadError: header and caller contradict each other.
    """
    usable = [affine for affine in stored.affines if _is_regular(affine)]
    if not usable or (given and _is_blank(usable[0])):
        return _assumed_affine(stored, shape, given)
    if given:
        given.check(stored.source, usable[0])
    elif _is_blank(usable[0]) and min(shape[:2]) >= 400:
        logger.warning(
            "%s: voxels of exactly 1 mm along unrotated axes: a blank header? If so, pass spacing= and axes= (and "
            "rescale=) from the scan's metadata.",
            stored.source,
        )
    if stored.affines[0] is not usable[0]:
        logger.warning("%s: its first affine is NaN or singular; uses the next (qform, spacing).", stored.source)
    return usable[0]


def _assumed_affine(stored: StoredVolume, shape: Sequence[int], given: GivenGeometry) -> np.ndarray:
    """Return an affine of the caller's sizes and axes, else the header's sizes, else defaults, which are logged.

    The default for NIfTI without a form is nibabel's: axes point left, front, head, and the centre is the origin. A blank
    header with the caller's sizes is taken as DICOM's: left, back, head.
    """
    known = stored.assumed_axes if given.sizes is None or stored.assumed_axes != "LAS" else "LPS"
    zooms = np.asarray(stored.zooms, dtype=np.float64)
    valid = np.isfinite(zooms) & (np.abs(zooms) > 1e-6) & (np.abs(zooms) < 1e6)
    zooms = np.where(valid, zooms, 1.0)
    sizes = np.abs(zooms) if given.sizes is None else given.sizes
    known = "".join(letter if zoom > 0 else _OPPOSITE[letter] for letter, zoom in zip(known, zooms, strict=True))
    if stored.bare:
        _warn_of_bare(stored.source, known, given)
    else:
        _log_assumed(stored, sizes, known, bool(valid.all()), given)
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for column, letter in enumerate(given.axes or known):
        row = _AXIS_OF[letter]
        affine[row, column] = sizes[column] if letter == DIRECTIONS[row][1] else -sizes[column]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape[:3]) - 1) / 2)
    return affine


def _warn_of_bare(source: str, known: str, given: GivenGeometry) -> None:
    """Warn of what is assumed for an array whose format cannot store geometry, and say how to give it."""
    assumed = []
    if given.sizes is None:
        assumed.append(("voxels of 1 mm", "spacing= in mm"))
    if given.axes is None:
        assumed.append((f"axes pointing {_in_words(known)}", 'axes= ("IPL": slices first, from head to foot)'))
    if assumed:
        logger.warning(
            "%s: an array without geometry; assumes %s. If that is wrong, so are planes, laterality and sizes: pass %s, or "
            "save `affine` (4, 4) with it in an .npz.",
            source,
            *(" and ".join(words) for words in zip(*assumed, strict=True)),
        )


def _log_assumed(stored: StoredVolume, sizes: np.ndarray, known: str, valid: bool, given: GivenGeometry) -> None:
    """Log what is assumed for a header without a usable affine; `valid`: its voxel sizes are lengths."""
    if given.sizes is not None or (given.axes is not None and valid):
        pointing = "" if given.axes is not None else f", axes pointing {_in_words(known)}"
        logger.info("%s: voxels of %s mm%s, as given by the caller", stored.source, tuple(sizes.tolist()), pointing)
        return
    # The definition of the format: of an .npz with `spacing`, or of RAD-ChestCT's.
    if valid and not stored.affines and (stored.known_axes or stored.assumed_axes == "RAS"):
        return
    found = "its affine is NaN or singular" if stored.affines else "its header has no orientation"
    logger.warning(
        "%s: %s; assumes voxels of %s mm with axes pointing %s. Check left and right, or pass axes=.",
        stored.source,
        found if valid else f"{found}, and its voxel sizes are invalid",
        " x ".join(f"{value:g}" for value in sizes),
        _in_words(given.axes or known),
    )


def _in_words(letters: str) -> str:
    return ", ".join(_NAMES[letter] for letter in letters)


def _is_regular(affine: np.ndarray) -> bool:
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or np.abs(affine).max() > 1e9:
        return False
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(norms.min() > 1e-6 and abs(np.linalg.det(affine[:3, :3] / norms)) > 1e-3)


def _is_blank(affine: np.ndarray) -> bool:
    """Return whether voxels are 1 mm along unrotated axes, as libraries write without any geometry."""
    return np.array_equal(np.abs(affine[:3, :3]), np.eye(3)) and not np.abs(affine[:3, 3]).any()


# --- Axes -------------------------------------------------------------------------------------------------------------


def angles(affine: np.ndarray) -> tuple[float, float]:
    """Return the largest angle in degrees between axes and patient axes, and by which axes miss right angles."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    axes, _ = _nearest_axes(affine)
    nearest = np.abs([cosines[row, column] for row, column in enumerate(axes)])
    oblique = np.degrees(np.arccos(np.clip(nearest, 0, 1))).max()
    products = np.abs((cosines.T @ cosines)[np.triu_indices(3, 1)])
    return float(oblique), float(np.degrees(np.arcsin(np.clip(products, 0, 1))).max())


def orientation(affine: np.ndarray) -> str:
    """Return where each axis of the stored array points, by the nearest patient axis: three letters."""
    axes, signs = _nearest_axes(affine)
    ends = {stored: DIRECTIONS[axis][sign > 0] for axis, (stored, sign) in enumerate(zip(axes, signs, strict=True))}
    return "".join(ends[stored] for stored in range(3))


def canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `array` as a RAS+ view, by the nearest axis permutation and flips, and its affine (4, 4)."""
    axes, signs = _nearest_axes(affine)
    transform = np.zeros((4, 4))
    transform[3, 3] = 1
    for axis, (stored_axis, sign) in enumerate(zip(axes, signs, strict=True)):
        transform[stored_axis, axis] = sign
        if sign < 0:
            transform[stored_axis, 3] = array.shape[stored_axis] - 1
    array = array.transpose(axes)
    array = array[tuple(slice(None, None, sign) for sign in signs)]
    return array, affine @ transform + 0.0  # + 0.0 turns -0.0 into 0.0


def _nearest_axes(affine: np.ndarray) -> tuple[list[int], list[int]]:
    """Return for R, A and S which stored axis is nearest to it, and its sign.

    Of the six ways to assign axes, the one with the largest sum of squared cosines.
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    axes = max(_ORDERS, key=lambda order: sum(cosines[row, column] ** 2 for row, column in enumerate(order)))
    return list(axes), [1 if cosines[row, column] > 0 else -1 for row, column in enumerate(axes)]


# --- Resampling -------------------------------------------------------------------------------------------------------


def resample(
    hu: np.ndarray, affine: np.ndarray, source: str, oblique: float, shear: float
) -> tuple[np.ndarray, np.ndarray]:
    """Resample a volume linearly onto the patient's axes, with air around it.

    Args:
        hu: int16 array (X, Y, Z).
        affine: its affine (4, 4).
        source: name in messages.
        oblique: largest angle in degrees between its axes and the patient's.
        shear: largest angle in degrees by which its axes miss right angles.

    Returns:
        int16 array with voxels as large as along the nearest stored axes, and its affine.

    Raises:
        CTReadError: sheared by more than 40°, scipy is missing, or the result would be far larger than the volume.
    """
    if shear > _MAX_REPAIRED_SHEAR_DEGREES:
        raise CTReadError(
            f"{source}: its axes miss right angles by {shear:.1f}°; expected at most {_MAX_REPAIRED_SHEAR_DEGREES:g}°. "
            f"The header is damaged: export or convert the scan again."
        )
    try:
        from scipy.ndimage import affine_transform  # here, because most volumes don't need it
    except ImportError as error:
        needs = f"{source}: oblique or tilted ({max(oblique, shear):.1f}°); needs scipy: pip install scipy"
        raise CTReadError(needs) from error
    target, counts = _resampled_grid(hu.shape, affine)
    limit = min(max(_MAX_RESAMPLED, _MAX_GROWTH * hu.size), MAX_VOXELS - hu.size)  # both are in memory
    if counts.prod() > limit:
        raise CTReadError(
            f"{source}: {counts.prod():.3g} voxels after resampling; expected at most {limit:.3g}. Its header is "
            f"damaged, or crop or coarsen the scan."
        )
    mapping = np.linalg.inv(affine) @ target
    resampled = affine_transform(
        hu,
        mapping[:3, :3],
        mapping[:3, 3],
        output_shape=tuple(int(n) for n in counts),
        output=np.int16,
        order=1,
        mode="grid-constant",  # "constant" makes air of border voxels that rounding puts outside
        cval=AIR_HU,
    )
    logger.warning(
        "%s: axes %.1f° off the patient's%s; resampled linearly to %s voxels of %s mm",
        source,
        oblique,
        f", {shear:.1f}° off a right angle (tilted gantry)" if shear > MAX_SHEAR_DEGREES else "",
        " x ".join(str(n) for n in resampled.shape),
        " x ".join(f"{mm:g}" for mm in np.diag(target)[:3].round(3)),
    )
    return resampled, target


def _resampled_grid(shape: Sequence[int], affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the affine (4, 4) and the shape (3,), as floats, of the box along the patient's axes around a volume."""
    axes, _ = _nearest_axes(affine)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)[axes]
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (np.array(shape) - 1)
    corners = corners @ affine[:3, :3].T + affine[:3, 3]
    start = corners.min(axis=0)
    counts = np.ceil((corners.max(axis=0) - start) / sizes - 1e-3) + 1
    target = np.diag([*sizes, 1.0])
    target[:3, 3] = start
    return target, counts
