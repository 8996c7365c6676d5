"""One phantom in a file of its own, with the findings that are wanted."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samf.phantoms.findings import FINDING_NAMES, Finding, sample_findings
from samf.phantoms.nifti import write_nifti
from samf.phantoms.text import write_impression
from samf.phantoms.volume import make_phantom


def write_phantom(path: Path, seed: int, names: Sequence[str] | None = None, voxel_mm: float = 5.0) -> str:
    """Write one phantom as a NIfTI file and return what it shows, in words.

    Args:
        path: the .nii.gz file.
        seed: of everything random.
        names: of the findings, in any case; none = a normal chest, None = drawn.
        voxel_mm: mean voxel edge.

    Raises:
        ValueError: no phantom shows such a finding, or the file has another ending.
    """
    if not path.name.endswith(".nii.gz"):
        raise ValueError(f"{path}: phantoms are written as NIfTI; name a file that ends in .nii.gz.")
    findings = None if names is None else _placed(names, seed)
    phantom = make_phantom(np.random.default_rng(seed), voxel_mm=voxel_mm, findings=findings)
    write_nifti(phantom, path, "LPS")
    return write_impression(phantom.findings)


def _placed(names: Sequence[str], seed: int) -> list[Finding]:
    """Return findings of these names, with sides, lobes and sizes that follow from the seed."""
    by_name = {name.lower(): name for name in FINDING_NAMES}
    unknown = [name for name in names if name.lower() not in by_name]
    if unknown:
        raise ValueError(f"{unknown[0]!r}: no phantom shows such a finding. There are {', '.join(FINDING_NAMES)}.")
    drawn = sample_findings(np.random.default_rng([seed, 1]), prevalence=1.0)  # all of them
    return [drawn[by_name[name.lower()]] for name in names]
