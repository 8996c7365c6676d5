"""A patient's chest while it is painted: proportions, grid, distances to its main surfaces, lungs and lobes."""

import math
from dataclasses import dataclass

import numpy as np

from samf.phantoms.canvas import Canvas, small_rotation, squircle
from samf.phantoms.findings import FINDING_NAMES, Finding

# Hounsfield units.
LUNG_EMPTY, FAT, WATER, BLOOD, MUSCLE, LIVER = -985.0, -100.0, 10.0, 42.0, 52.0, 60.0
BONE_CORTEX, BONE_SPONGE, RIB = 520.0, 190.0, 420.0

# Lobe centres as fractions of the thoracic cavity's half axes (x, y), and z in mm.
_LOBE_CENTRES = {
    "right upper lobe": (0.56, 0.02, 52.0),
    "right middle lobe": (0.64, 0.36, -24.0),
    "right lower lobe": (0.55, -0.44, -34.0),
    "left upper lobe": (-0.58, 0.05, 50.0),
    "left lower lobe": (-0.60, -0.44, -36.0),
}


@dataclass(frozen=True)
class Anatomy:
    """The proportions of a patient in mm, HU or fractions: normal variation, without findings."""

    half_width: float  # of the thoracic cavity, left to right
    half_depth: float  # of the thoracic cavity, back to front
    apex: float  # z of the lungs' top
    wall: float  # muscle and ribs
    fat: float  # subcutaneous
    dome: float  # z of the right diaphragm's top
    heart_ratio: float  # heart width / thorax width where the heart is normal
    heart_angle: float  # of the heart's long axis, radians
    aorta_radius: float
    rib_pitch: float
    rib_phase: float
    disc_pitch: float
    lung_hu: float
    lung_gradient: float  # how much denser the dependent lung is, HU
    breast: float  # 0 for none
    stomach_air: float
    rotation: np.ndarray  # (3, 3)
    shift: np.ndarray  # (3,) of the patient in the scanner, mm

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Anatomy":
        """Draw the proportions of a patient."""
        uniform = rng.uniform
        return cls(
            half_width=uniform(112, 126),
            half_depth=uniform(78, 90),
            apex=uniform(112, 126),
            wall=uniform(19, 24),
            fat=uniform(5, 18),
            dome=uniform(-68, -50),
            heart_ratio=uniform(0.40, 0.47),
            heart_angle=math.radians(uniform(25, 45)),
            aorta_radius=uniform(12.0, 14.5),
            rib_pitch=uniform(23, 27),
            rib_phase=uniform(0, 1),
            disc_pitch=uniform(22, 26),
            lung_hu=uniform(-872, -835),
            lung_gradient=uniform(15, 40),
            breast=uniform(0.6, 1.1) * (uniform() < 0.5),
            stomach_air=float(uniform() < 0.6),
            rotation=small_rotation(np.radians(uniform(-3.5, 3.5, size=3))),
            shift=uniform(-6, 6, size=3),
        )


class Chest:
    """A chest while it is painted. Distances are signed, in mm; fractions are in [0, 1]; arrays are (X, Y, Z).

    Args:
        findings: what the scan shows.
        patient: seed of the anatomy.
        scan: seed of the findings' places and shapes.
        recon: seed of the grid.
        voxel_mm: mean voxel edge.

    Attributes:
        anatomy: the patient's proportions.
        canvas: the grid and its HU.
        noise_sd: standard deviation of the scanner's noise in HU.
        masks: {finding: bool (X, Y, Z)}, the voxels that show it.
        body_distance: to the skin.
        cavity_distance: to the thoracic cavity.
        above_diaphragm: height above the diaphragm in mm.
        pleural_distance: to the lungs; set by `paint_lungs`.
        lung_fraction: of aerated lung; set by `paint_lungs`, reduced by what is painted over it.
        emphysema_fraction: of destroyed lung; None without emphysema.
    """

    pleural_distance: np.ndarray
    lung_fraction: np.ndarray
    emphysema_fraction: np.ndarray | None = None

    def __init__(self, findings: dict[str, Finding], patient: int, scan: int, recon: int, voxel_mm: float):
        self.findings, self.patient, self.scan = findings, patient, scan
        self.anatomy = a = Anatomy.sample(np.random.default_rng([patient, 0]))
        grid = np.random.default_rng([recon, 0])
        in_plane, through = grid.uniform(0.9, 1.1) * voxel_mm, grid.uniform(0.8, 1.2) * voxel_mm
        margin = grid.uniform(6, 26)
        body = np.array([a.half_width, a.half_depth + 5, 0]) + a.wall + a.fat
        extent = (2 * body[0] + margin, 2 * body[1] + margin + 12, grid.uniform(285, 305))
        self.canvas = Canvas(extent, np.array([in_plane, in_plane, through]), a.rotation, a.shift)
        self.noise_sd = np.float32(grid.uniform(7, 14))
        self.masks: dict[str, np.ndarray] = {}
        self._measure()

    def rng_of(self, finding: str) -> np.random.Generator:
        """Return a finding's own random generator, so that no finding changes another."""
        return np.random.default_rng([self.scan, 1 + FINDING_NAMES.index(finding)])

    def texture(self, which: int, cell: float) -> np.ndarray:
        """Return smooth noise (X, Y, Z) of the patient; `which` is its number, `cell` its scale in mm."""
        return self.canvas.smooth_noise(np.random.default_rng([self.patient, 10 + which]), cell)

    def _measure(self) -> None:
        """Set the distances to the skin, the thoracic cavity and the diaphragm."""
        a, c = self.anatomy, self.canvas
        narrowing = 1 - 0.16 * np.clip((c.z - 60) / 110, 0, 1) ** 2
        width, depth = a.half_width + a.wall + a.fat, a.half_depth + a.wall + a.fat + 5
        self.body_distance = (squircle(c.x / width, (c.y + 7) / depth, 0.35) / narrowing - 1) * np.float32(depth)

        # Below z = -40 mm the chest is a cylinder, above it a dome.
        height = np.maximum((c.z + 40) / np.float32(a.apex + 40), 0)
        radius = np.sqrt(squircle(c.x / a.half_width, c.y / a.half_depth, 0.3) ** 2 + height * height)
        self.cavity_distance = (radius - 1) * np.float32((a.half_width + a.half_depth) / 2)

        right = c.x > 0
        centre = np.where(right, np.float32(0.46 * a.half_width), np.float32(-0.48 * a.half_width))
        bulge = ((c.x - centre) / (0.62 * a.half_width)) ** 2 + (
            (c.y - 0.18 * a.half_depth) / (0.98 * a.half_depth)
        ) ** 2
        top = np.where(right, np.float32(a.dome), np.float32(a.dome - 12))
        self.above_diaphragm = (c.z - top + 50 * bulge) * np.float32(0.8)

    def lobe_fraction(self, lobe: str) -> np.ndarray:
        """Return a soft indicator (X, Y, Z) of a lobe, bounded by x = 0 and the oblique and horizontal fissures."""
        c = self.canvas
        side = -c.x if lobe.startswith("right") else c.x
        above_oblique = (c.z + 14 + 0.95 * c.y) * np.float32(0.72)
        parts = [side, above_oblique if "lower" in lobe else -above_oblique]
        if lobe.startswith("right") and "lower" not in lobe:
            parts.append(c.z - 12 if "middle" in lobe else 12 - c.z)
        return c.soft(np.maximum.reduce(parts))

    def lobe_centre(self, lobe: str, rng: np.random.Generator, jitter: float) -> np.ndarray:
        """Draw a point near the centre of a lobe.

        Args:
            lobe: one of LOBES.
            rng: source of the point.
            jitter: largest distance in mm along each coordinate.

        Returns:
            A patient point (3,) in mm.
        """
        fx, fy, z = _LOBE_CENTRES[lobe]
        return np.array([fx * self.anatomy.half_width, fy * self.anatomy.half_depth, z]) + rng.uniform(
            -jitter, jitter, 3
        )
