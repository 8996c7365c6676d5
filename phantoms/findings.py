"""The findings of phantoms: their names, which are labels of CT-RATE, and how they are drawn."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

#: The seven findings that are visible in a few coarse slices.
DEMO_FINDINGS = (
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Emphysema",
    "Lung nodule",
    "Pleural effusion",
    "Consolidation",
)

#: All findings: the demo's seven, then three that coarse slices may not show.
FINDING_NAMES = DEMO_FINDINGS + ("Lymphadenopathy", "Atelectasis", "Peribronchial thickening")

LOBES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe")
SIDES = ("right", "left", "bilateral")

#: Probability of each finding, independent of the others.
PREVALENCE = 1 / 3


@dataclass(frozen=True)
class Finding:
    """One finding of one scan.

    Attributes:
        name: one of FINDING_NAMES.
        side: one of SIDES, for a pleural effusion.
        lobe: one of LOBES, for a lung nodule, a consolidation or an atelectasis (lower lobes only).
        size_mm: diameter of a lung nodule in whole millimetres.
    """

    name: str
    side: str | None = None
    lobe: str | None = None
    size_mm: int | None = None

    def __post_init__(self) -> None:
        needs = {"Pleural effusion": "side", "Lung nodule": "lobe", "Consolidation": "lobe", "Atelectasis": "lobe"}
        if self.name not in FINDING_NAMES:
            raise ValueError(f"{self.name!r} is not a phantom finding; they are {', '.join(FINDING_NAMES)}.")
        if (needed := needs.get(self.name)) and getattr(self, needed) is None:
            raise ValueError(f"Finding {self.name!r} needs a {needed}.")
        if self.side not in (None, *SIDES) or self.lobe not in (None, *LOBES):
            raise ValueError(f"{self}: side must be one of {SIDES}, lobe one of {LOBES}.")
        if self.name == "Lung nodule" and not self.size_mm:
            raise ValueError("Finding 'Lung nodule' needs a size_mm, its diameter.")


def sample_findings(
    rng: np.random.Generator, prevalence: float = PREVALENCE, nodule_mm: tuple[int, int] = (16, 30)
) -> dict[str, Finding]:
    """Draw the findings of a scan: independent, equally frequent, with uniform sides and lobes.

    A nodule and a consolidation of one scan are in different lobes, since one would hide the other; each lobe by itself is
    uniform. The number of draws from `rng` doesn't depend on the result.

    Args:
        rng: source of the draws.
        prevalence: probability of each finding.
        nodule_mm: smallest and largest diameter of a lung nodule.

    Returns:
        {name: Finding}, in the order of FINDING_NAMES.
    """
    present = rng.random(len(FINDING_NAMES)) < prevalence
    side = SIDES[rng.integers(len(SIDES))]
    consolidation_lobe, nodule_lobe = (LOBES[k] for k in rng.permutation(len(LOBES))[:2])
    atelectasis_lobe = ("right lower lobe", "left lower lobe")[rng.integers(2)]
    size_mm = int(rng.integers(nodule_mm[0], nodule_mm[1] + 1))
    drawn = {
        "Pleural effusion": Finding("Pleural effusion", side=side),
        "Lung nodule": Finding("Lung nodule", lobe=nodule_lobe, size_mm=size_mm),
        "Consolidation": Finding("Consolidation", lobe=consolidation_lobe),
        "Atelectasis": Finding("Atelectasis", lobe=atelectasis_lobe),
    }
    return {
        name: drawn[name] if name in drawn else Finding(name)
        for name, is_present in zip(FINDING_NAMES, present, strict=True)
        if is_present
    }


def index_findings(findings: Iterable[Finding]) -> dict[str, Finding]:
    """Return {name: finding} in the order of FINDING_NAMES."""
    by_name = {finding.name: finding for finding in findings}
    return {name: by_name[name] for name in FINDING_NAMES if name in by_name}
