"""What the headers of several formats share: required fields, units of length and voxels in a file of their own."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .ct_common import EXPORT_AGAIN, CTReadError

logger = logging.getLogger(__name__)

MAX_HEADER_LINES = 2000
MAX_VALUE = 400  # characters of a header line that count
PLAUSIBLE_MM = (0.05, 50.0)  # range of CT voxel sizes
_UNITS = {  # in mm; a missing unit means mm. "âµm" is "µm" in UTF-8, decoded as Latin-1
    **dict.fromkeys(("", "?", "???", "none", "mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1000.0),
    **dict.fromkeys(("um", "µm", "âµm", "micron", "microns", "micrometer", "micrometers", "micrometre"), 0.001),
}


def check_fields(path: Path, fields: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise CTReadError when a header lacks a required field.

    Args:
        path: the header, for messages.
        fields: its values by name.
        names: the required ones.
    """
    missing = [name for name in names if name not in fields]
    if missing:
        raise CTReadError(f"{path}: its header lacks {', '.join(missing)}. {EXPORT_AGAIN}")


def detached_file(path: Path, name: str) -> Path:
    """Return the data file that a header names.

    Args:
        path: the header.
        name: the file's name in it, relative to its folder.

    Raises:
        CTReadError: several files, a file outside of the header's folder, or a missing one.
    """
    parts = Path(name.replace("\\", "/")).parts
    if re.search(r"%[0-9]*d", name) or name.split()[:1] == ["LIST"]:
        raise CTReadError(
            f"{path}: its voxels are in several files ({name!r}); expected one. Save the scan in one file."
        )
    if not name or Path(name).is_absolute() or ".." in parts or ":" in name:
        raise CTReadError(
            f"{path}: its data file {name!r} is outside the header's folder; expected one next to the header. "
            f"Move it there."
        )
    data_path = path.parent.joinpath(*parts)
    if not data_path.is_file():
        raise CTReadError(f"{path}: its data file {name!r} is missing next to it. Download both files.")
    return data_path


def header_units(path: Path, text: str, count: int) -> np.ndarray:
    """Return the millimetres in each axis' unit.

    Args:
        path: the header, for messages.
        text: units such as `"cm" "cm" "cm"`; empty for mm.
        count: number of axes.

    Returns:
        (count,); ones for unknown units, with a warning.
    """
    names = re.findall(r'"([^"]*)"', text) or text.split()
    unknown = sorted({name for name in names if name.lower() not in _UNITS})
    if unknown or len(names) not in (0, count):
        logger.warning("%s: its units %s are not known; reads its numbers as mm.", path, text[:40])
        return np.ones(count)
    return np.array([_UNITS[name.lower()] for name in names] or [1.0] * count)


def trusted_units(source: str, sizes: np.ndarray, units: np.ndarray, eager: bool) -> np.ndarray:
    """Return the header's units, or ones where they make implausible voxels.

    Args:
        source: name in messages.
        sizes: voxel sizes (3,) in these units.
        units: mm in the unit of each axis, (3,).
        eager: keep the units even where the bare numbers could be millimetres.

    Returns:
        mm in the unit of each axis, (3,).
    """
    if (units == 1).all():
        return units
    plain, scaled = is_plausible(sizes), is_plausible(sizes * units)
    if scaled and (eager or not plain):
        logger.info("%s: converts its sizes from units of %s mm", source, " x ".join(f"{u:g}" for u in units))
        return units
    logger.warning(
        "%s: in its header's units voxels would measure %s mm; reads its numbers as mm. Correct the header's units.",
        source,
        " x ".join(f"{mm:g}" for mm in sizes * units),
    )
    return np.ones_like(units)


def is_plausible(sizes: np.ndarray) -> bool:
    """Return whether CT voxels can have these sizes in mm."""
    sizes = np.abs(sizes)
    return bool(np.all((sizes > PLAUSIBLE_MM[0]) & (sizes < PLAUSIBLE_MM[1])))
