"""`samf info`: what a file holds as a CT volume."""

from dataclasses import dataclass

from samf.cli.errors import UsageError


@dataclass(frozen=True)
class ScanFacts:
    """What a file holds as a CT volume.

    Attributes:
        source: path or address.
        shape: voxels along X, Y, Z (right, front, top).
        spacing_mm: voxel size along the same axes.
        coverage_mm: extent of the volume along the same axes.
        stored_orientation: directions of the axes as stored.
        tilt_degrees: largest angle between an axis of the volume and the patient's.
        hu: minimum, median and maximum, in HU.
        region: whether it shows a chest, and by what.
        warnings: what was repaired or found unusual.
    """

    source: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    coverage_mm: tuple[float, ...]
    stored_orientation: str
    tilt_degrees: float
    hu: tuple[float, float, float]
    region: str
    warnings: tuple[str, ...]


def scan_facts(path: str) -> ScanFacts:
    """Read a scan and return what it is.

    Raises:
        UsageError: it can't be read as a CT volume.
    """
    import numpy as np

    from samf.model.ct_common import collected_warnings
    from samf.model.ct_region import judge_region
    from samf.model.ct_volume import CTReadError, read_ct

    try:
        with collected_warnings("samf.model") as warnings:
            volume = read_ct(path)
    except (CTReadError, OSError) as error:
        raise UsageError(str(error)) from error
    directions = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    tilt = float(np.degrees(np.arccos(np.clip(np.diag(directions), -1, 1))).max())
    values = volume.hu[::4, ::4, ::4]
    hu = (float(volume.hu.min()), float(np.median(values)), float(volume.hu.max()))
    return ScanFacts(
        source=path,
        shape=tuple(volume.shape),
        spacing_mm=tuple(round(float(value), 4) for value in volume.spacing),
        coverage_mm=tuple(round(float(value), 4) for value in volume.coverage_mm),
        stored_orientation=volume.stored_orientation,
        tilt_degrees=round(tilt, 2),
        hu=hu,
        region=": ".join(judge_region(volume)),
        warnings=tuple(warnings),
    )


def facts_text(facts: ScanFacts) -> str:
    """Return the facts as aligned lines."""
    shown = {
        "scan": facts.source,
        "voxels (right, front, top)": " x ".join(map(str, facts.shape)),
        "voxel size": " x ".join(f"{value:g}" for value in facts.spacing_mm) + " mm",
        "coverage": " x ".join(f"{value:.0f}" for value in facts.coverage_mm) + " mm",
        "stored axes": facts.stored_orientation,
        "tilt": f"{facts.tilt_degrees:g} degrees",
        "HU (minimum, median, maximum)": ", ".join(f"{value:g}" for value in facts.hu),
        "region": facts.region,
        **{f"warning {number}": text for number, text in enumerate(facts.warnings, start=1)},
    }
    width = max(map(len, shown))
    return "".join(f"{name:<{width}}  {value}\n" for name, value in shown.items())
