"""A procedural chest CT: analytic shapes with soft edges, painted on a voxel grid one over the other.

Shapes are given in patient coordinates (mm, RAS+: x to the patient's right, y to the front, z to the head; the origin is
the middle of the chest).

Three independent seeds: `patient` (anatomy), `scan` (places and shapes of findings), `recon` (grid and noise). Two
reconstructions of one scan differ only in the last.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from samf.phantoms import lesions, organs
from samf.phantoms.chest import Chest
from samf.phantoms.findings import Finding, index_findings, sample_findings


@dataclass
class Phantom:
    """A synthetic chest CT.

    Attributes:
        hu: int16 (X, Y, Z), RAS+.
        affine: float64 (4, 4), from voxel index to mm.
        findings: {name: Finding} of the findings present, in the order of FINDING_NAMES.
        masks: {name: bool (X, Y, Z)}, the voxels that show each finding; the heart, for cardiomegaly.
    """

    hu: np.ndarray
    affine: np.ndarray
    findings: dict[str, Finding]
    masks: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Return the voxel edges in mm along the array's axes."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)


def make_phantom(
    rng: np.random.Generator,
    *,
    voxel_mm: float = 5.0,
    findings: Mapping[str, Finding] | Iterable[Finding] | None = None,
) -> Phantom:
    """Make a synthetic chest CT.

    Args:
        rng: source of everything random. One state gives one patient, grid and noise, whatever the `findings` are.
        voxel_mm: mean voxel edge; x and y vary by ±10 %, z by ±20 %.
        findings: what the scan shows; None draws them (`sample_findings`), an empty list gives a normal chest.
    """
    patient, scan, recon = (int(seed) for seed in rng.integers(0, 2**63, size=3))
    drawn = sample_findings(np.random.default_rng([scan, 0]))
    if findings is not None:
        drawn = index_findings(findings.values() if isinstance(findings, Mapping) else findings)
    return render_phantom(drawn, patient=patient, scan=scan, recon=recon, voxel_mm=voxel_mm)


def render_phantom(
    findings: dict[str, Finding], *, patient: int, scan: int, recon: int, voxel_mm: float = 5.0
) -> Phantom:
    """Make the scan of given findings from three seeds.

    Args:
        findings: what the scan shows.
        patient: seed of the anatomy.
        scan: seed of the findings' places and shapes.
        recon: seed of the grid and the noise.
        voxel_mm: mean voxel edge.
    """
    chest = Chest(findings, patient, scan, recon, voxel_mm)
    _paint(chest)
    canvas = chest.canvas
    canvas.hu += chest.noise_sd * np.random.default_rng([recon, 1]).standard_normal(canvas.shape, dtype=np.float32)
    hu = np.rint(np.clip(canvas.hu, -1024, 3071)).astype(np.int16)
    return Phantom(hu, canvas.affine, findings, {name: chest.masks[name] for name in findings})


def _paint(chest: Chest) -> None:
    """Paint organs and findings from the skin inwards; later ones cover earlier ones."""
    organs.paint_body(chest)
    organs.paint_ribs(chest)
    organs.paint_abdomen(chest)
    organs.paint_lungs(chest)
    organs.paint_mediastinum(chest)
    lesions.paint_lymph_nodes(chest)
    organs.paint_heart(chest)
    organs.paint_aorta(chest)
    organs.paint_spine(chest)
    organs.paint_airways(chest)
    organs.paint_lung_vessels(chest)
    lesions.paint_consolidation(chest)
    lesions.paint_pleural_effusion(chest)
    lesions.paint_nodule(chest)
    lesions.paint_atelectasis(chest)
    if chest.emphysema_fraction is not None:  # in what the other findings have left of the lungs
        chest.masks["Emphysema"] = (chest.emphysema_fraction > 0.5) & (chest.lung_fraction > 0.8)
