"""Whether a CT volume shows a chest: its extent, and the lungs in it."""

import logging
from typing import Literal

import numpy as np

from .ct_common import NotCTError
from .ct_intensity import MIN_JUDGED
from .ct_volume import CTVolume

logger = logging.getLogger(__name__)

Region = Literal["chest", "little lung", "no chest", "not judged"]

_CHEST_MM = 60.0  # a newborn's chest is larger along each axis
_MIN_SLICES = 10  # along each axis; the sparsest chest protocols have more than twice as many
_GRID_MM = 4.0
_AIR, _TISSUE = -500, -300  # HU: below, lung or gas; above, tissue
_OUTSIDE_HU = -950  # median of a region of air, or of foam in it; lungs are denser
# Lung per tissue, by volume. Whole chests have .26 to .76, phantoms .09 to .27, an upper abdomen with lung bases .05.
_NO_LUNG, _LITTLE_LUNG = 0.02, 0.06


def judge_region(volume: CTVolume) -> tuple[Region, str]:
    """Judge whether a volume shows a chest.

    Lungs are regions of low density, on a grid of about 4 mm and without their outermost 4 mm, that the body encloses, or
    that reach the border of the field of view sideways but are denser than air, as where the field of view cuts them.

    Args:
        volume: the CT volume.

    Returns:
        - "no chest": less than 60 mm or ten slices along an axis, or nearly no lung: a head, a limb, a pelvis;
        - "little lung": an abdomen with the bases of the lungs, or lungs that are nearly full of something;
        - "chest", or "not judged": fewer than 10,000 voxels, or scipy is missing.

        And what was found, in words.
    """
    if min(volume.coverage_mm) < _CHEST_MM or min(volume.shape) < _MIN_SLICES:
        voxels = " x ".join(map(str, volume.shape))
        covered = " x ".join(f"{mm:.0f}" for mm in volume.coverage_mm)
        found = f"{voxels} voxels cover {covered} mm (left to right, back to front, foot to head)"
        return "no chest", f"{found}, which is too little for a chest"
    share = lung_share(volume)
    if share is None:
        return "not judged", "too few voxels, or no scipy"
    found = f"{100 * share:.1f} litres of lung per 100 litres of tissue"
    if share < _NO_LUNG:
        return "no chest", f"{found}: a head, an abdomen or a limb"
    if share < _LITTLE_LUNG:
        return "little lung", f"{found}: an abdomen with the lungs' bases, or severe disease"
    return "chest", found


def lung_share(volume: CTVolume) -> float | None:
    """Return the volume of lung per volume of tissue, as `judge_region` describes it; None if it can't be judged."""
    try:
        from scipy import ndimage
    except ImportError:
        return None
    if volume.hu.size < MIN_JUDGED:
        return None
    steps = [max(1, int(_GRID_MM / mm + 1e-3)) for mm in volume.spacing]
    hu = volume.hu[tuple(slice(step // 2, None, step) for step in steps)]
    regions, count = ndimage.label(ndimage.binary_opening(hu < _AIR))
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    sides = [regions[0], regions[-1], regions[:, 0], regions[:, -1]]
    at_sides = np.setdiff1d(np.concatenate([side.ravel() for side in sides]), [0])
    medians = ndimage.median(hu, regions, at_sides) if len(at_sides) else np.empty(0)
    sizes[at_sides[np.asarray(medians) <= _OUTSIDE_HU]] = 0
    return float(sizes[1:].sum() / max(1, np.count_nonzero(hu > _TISSUE)))


def check_region(volume: CTVolume, source: str, refuse: bool) -> None:
    """Refuse a volume that shows no chest, or log a warning; log one too where there is little lung.

    Args:
        volume: the CT volume.
        source: name in messages.
        refuse: raise in place of the warning.

    Raises:
        NotCTError: no chest.
    """
    verdict, found = judge_region(volume)
    if verdict == "no chest" and refuse:
        raise NotCTError(f"{source}: {found}; expected a chest CT. Name another scan or series of the study.")
    if verdict in ("no chest", "little lung") and volume.hu.size >= MIN_JUDGED:
        logger.warning("%s: %s; expected a chest CT, and the report may mean nothing.", source, found)
