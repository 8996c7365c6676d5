"""A procedural chest CT: analytic shapes with soft edges, painted one over the other on a voxel grid.

Everything is drawn in patient coordinates (mm, RAS+: x to the patient's right, y to the front, z to the head; the
origin lies in the middle of the chest). Shapes are signed distances, negative inside; `Canvas.soft` turns a distance
into the fraction of a voxel that the shape fills, so that a phantom of 5 mm voxels shows a real scan's partial volumes.

Three independent sources of chance: `patient` (anatomy), `scan` (findings and where they lie), `recon` (grid and
noise). Two reconstructions of one scan differ in the last alone.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from samf.phantoms.findings import FINDING_NAMES, LOBES, Finding, index_findings, sample_findings

# Hounsfield units.
AIR, LUNG_EMPTY, FAT, WATER, BLOOD, MUSCLE, LIVER = -1000.0, -985.0, -100.0, 10.0, 42.0, 52.0, 60.0
BONE_CORTEX, BONE_SPONGE, RIB = 520.0, 190.0, 420.0

# Lobe centres as fractions of the thoracic cavity's half axes (x, y), and z in mm.
LOBE_CENTRES = {
    "right upper lobe": (0.56, 0.02, 52.0),
    "right middle lobe": (0.64, 0.36, -24.0),
    "right lower lobe": (0.55, -0.44, -34.0),
    "left upper lobe": (-0.58, 0.05, 50.0),
    "left lower lobe": (-0.60, -0.44, -36.0),
}


@dataclass
class Phantom:
    """A synthetic chest CT.

    Attributes:
        hu: int16 (X, Y, Z), RAS+.
        affine: (4, 4) float64, voxel index → mm.
        findings: {name: Finding} of what is present, in the order of FINDING_NAMES.
        masks: {name: bool (X, Y, Z)} the voxels that show each present finding (the heart, for cardiomegaly).
    """

    hu: np.ndarray
    affine: np.ndarray
    findings: dict[str, Finding]
    masks: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel edges in mm along the array's axes."""
        return tuple(float(edge) for edge in np.linalg.norm(self.affine[:3, :3], axis=0))


@dataclass(frozen=True)
class Anatomy:
    """One patient's proportions, in mm, HU or fractions. Normal variation only; findings are not part of it."""

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
    shift: np.ndarray  # (3,) of the patient in the scanner's field

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Anatomy":
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


def small_rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation matrix (3, 3) about x, then y, then z, by `angles` (3,) in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


class Canvas:
    """The voxel grid and the HU painted so far.

    Attributes:
        x, y, z: float32 (X, Y, Z), patient coordinates of the voxel centres in mm.
        hu: float32 (X, Y, Z).
        spacing: (3,) mm; voxel: their mean.
    """

    def __init__(self, field_of_view: Iterable[float], spacing: np.ndarray, rotation: np.ndarray, shift: np.ndarray):
        self.spacing = np.asarray(spacing, dtype=np.float64)
        self.voxel = float(self.spacing.mean())
        self.shape = tuple(math.ceil(extent / edge) for extent, edge in zip(field_of_view, self.spacing, strict=True))
        self.rotation, self.shift = rotation, shift
        self.axes = [(np.arange(n) - (n - 1) / 2) * edge for n, edge in zip(self.shape, self.spacing, strict=True)]
        # A scanner point s is the patient point R s + shift, summed from three broadcast axes.
        columns = [axis.reshape(np.roll([-1, 1, 1], k)) for k, axis in enumerate(self.axes)]
        self.x, self.y, self.z = (
            sum((rotation[i, k] * columns[k]).astype(np.float32) for k in range(3)) + np.float32(shift[i])
            for i in range(3)
        )
        self.hu = np.full(self.shape, AIR, dtype=np.float32)

    @property
    def affine(self) -> np.ndarray:
        """Voxel index → scanner mm (4, 4), RAS+."""
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = [axis[0] for axis in self.axes]
        return affine

    def index(self, point: np.ndarray) -> np.ndarray:
        """Patient points (..., 3) in mm → fractional voxel indices (..., 3)."""
        scanner = (np.asarray(point) - self.shift) @ self.rotation
        return (scanner - [axis[0] for axis in self.axes]) / self.spacing

    def around(self, point: np.ndarray, radius: float) -> tuple[slice, slice, slice]:
        """Slices of the box that holds the ball of `radius` mm about a patient point (3,), one voxel to spare."""
        centre, reach = self.index(point), radius / self.spacing + 1
        low, high = np.floor(centre - reach).astype(int), np.ceil(centre + reach).astype(int) + 1
        return tuple(slice(min(max(a, 0), n), min(max(b, 0), n)) for a, b, n in zip(low, high, self.shape, strict=True))

    def between(self, low: Iterable[float], high: Iterable[float]) -> tuple[slice, slice, slice]:
        """Slices of the box that holds a cuboid of patient space, given by two opposite corners in mm."""
        corners = self.index(np.array(np.meshgrid(*zip(low, high, strict=True))).reshape(3, 8).T)
        first = np.clip(np.floor(corners.min(0)).astype(int), 0, self.shape)
        last = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, self.shape)
        return tuple(slice(a, b) for a, b in zip(first, last, strict=True))

    def soft(self, distance: np.ndarray) -> np.ndarray:
        """Signed distance in mm → filled fraction of the voxel in [0, 1]."""
        return np.clip(0.5 - distance / np.float32(self.voxel), 0, 1)

    def paint(self, fraction: np.ndarray, value: float | np.ndarray, box: tuple[slice, ...] = (...,)) -> None:
        """Mix `value` HU into the box of the canvas, by the fraction of each voxel."""
        region = self.hu[box]
        change = np.float32(value) - region
        change *= fraction
        region += change

    def distance_to_ellipsoid(self, centre, axes, box=(...,), orientation: np.ndarray | None = None) -> np.ndarray:
        """Approximate signed distance to an ellipsoid of half `axes` (3,) mm; `orientation` (3, 3) has them as rows."""
        offset = [
            self.x[box] - np.float32(centre[0]),
            self.y[box] - np.float32(centre[1]),
            self.z[box] - np.float32(centre[2]),
        ]
        if orientation is not None:
            offset = [sum(np.float32(row[k]) * offset[k] for k in range(3)) for row in orientation]
        radius = np.sqrt(sum((part / np.float32(axis)) ** 2 for part, axis in zip(offset, axes, strict=True)))
        return (radius - 1) * np.float32(min(axes))

    def distance_to_capsule(self, start, end, box: tuple[slice, ...]) -> np.ndarray:
        """Distance in mm to the line from `start` to `end` (patient points) inside a box."""
        start, line = np.asarray(start, np.float32), np.asarray(end, np.float32) - np.asarray(start, np.float32)
        dx, dy, dz = self.x[box] - start[0], self.y[box] - start[1], self.z[box] - start[2]
        along = np.clip((dx * line[0] + dy * line[1] + dz * line[2]) / np.float32(max(line @ line, 1e-6)), 0, 1)
        return np.sqrt((dx - along * line[0]) ** 2 + (dy - along * line[1]) ** 2 + (dz - along * line[2]) ** 2)

    def paint_tube(self, points: np.ndarray, radius: float, value: float) -> None:
        """A tube along a polyline (N, 3); one thinner than a voxel fills only its share of it."""
        share = min(1.0, (2.2 * radius / self.voxel) ** 2)
        for start, end in pairwise(points):
            box = self.around((start + end) / 2, np.linalg.norm(end - start) / 2 + radius + self.voxel)
            self.paint(self.soft(self.distance_to_capsule(start, end, box) - radius) * share, value, box)

    def smooth_noise(self, rng: np.random.Generator, cell: float) -> np.ndarray:
        """Random field (X, Y, Z), about unit variance, that varies over `cell` mm and not with the voxel size."""
        reach = 240.0
        n = int(2 * reach / cell) + 2
        field = rng.standard_normal((n, n, n), dtype=np.float32)
        for axis in self.axes:
            position = (axis + reach) / cell
            low = np.clip(position.astype(int), 0, n - 2)
            weights = np.zeros((len(axis), n), dtype=np.float32)
            weights[np.arange(len(axis)), low] = 1 - (position - low)
            weights[np.arange(len(axis)), low + 1] = position - low
            field = np.tensordot(field, weights, axes=([0], [1]))  # the axis done moves to the end
        return field * np.float32(1.8)  # linear interpolation takes about 0.7 of the variance

    def splat(self, points: np.ndarray, volumes: np.ndarray) -> np.ndarray:
        """Fraction (X, Y, Z) that small bodies of `volumes` (N,) mm³ at patient `points` (N, 3) fill, trilinearly."""
        index = self.index(points)
        low = np.floor(index).astype(int)
        inside = np.all((low >= 0) & (low < np.array(self.shape) - 1), axis=1)
        low, high, volumes = low[inside], (index - low)[inside], volumes[inside]
        shares = (1 - high, high)
        flat, weights = [], []
        for corner in np.ndindex(2, 2, 2):
            flat.append(np.ravel_multi_index((low + corner).T, self.shape))
            weights.append(math.prod(shares[corner[k]][:, k] for k in range(3)) * volumes)
        total = np.bincount(np.concatenate(flat), np.concatenate(weights), minlength=math.prod(self.shape))
        return np.minimum(total.astype(np.float32).reshape(self.shape) / np.float32(self.spacing.prod()), 1)


def make_phantom(
    rng: np.random.Generator,
    *,
    voxel_mm: float = 5.0,
    findings: Mapping[str, Finding] | Iterable[Finding] | None = None,
) -> Phantom:
    """One synthetic chest CT.

    Args:
        rng: source of everything random. One state gives one patient, grid and noise, whatever the `findings` are.
        voxel_mm: mean voxel edge; x and y vary by ±10 %, z by ±20 %.
        findings: what the scan shows; None draws them (`sample_findings`), an empty list makes a normal chest.
    """
    patient, scan, recon = (int(seed) for seed in rng.integers(0, 2**63, size=3))
    drawn = sample_findings(np.random.default_rng([scan, 0]))
    if findings is not None:
        drawn = index_findings(findings.values() if isinstance(findings, Mapping) else findings)
    return render_phantom(drawn, patient=patient, scan=scan, recon=recon, voxel_mm=voxel_mm)


def render_phantom(
    findings: dict[str, Finding], *, patient: int, scan: int, recon: int, voxel_mm: float = 5.0
) -> Phantom:
    """The scan of given findings; `patient`, `scan` and `recon` are seeds (see the module's docstring)."""
    painter = ChestPainter(findings, patient, scan, recon, voxel_mm)
    painter.paint()
    canvas = painter.canvas
    canvas.hu += painter.noise_sd * np.random.default_rng([recon, 1]).standard_normal(canvas.shape, dtype=np.float32)
    hu = np.rint(np.clip(canvas.hu, -1024, 3071)).astype(np.int16)
    return Phantom(hu, canvas.affine, findings, {name: painter.masks[name] for name in findings})


class ChestPainter:
    """Paints one chest, outside in. Attributes `*_distance` are signed distances in mm, `*_fraction` in [0, 1]."""

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

    def random(self, what: str) -> np.random.Generator:
        """A finding's own source of chance, so that one finding never moves another."""
        return np.random.default_rng([self.scan, 1 + FINDING_NAMES.index(what)])

    def texture(self, which: int, cell: float) -> np.ndarray:
        """Smooth noise (X, Y, Z) of the patient."""
        return self.canvas.smooth_noise(np.random.default_rng([self.patient, 10 + which]), cell)

    def paint(self) -> None:
        self.measure_chest()
        self.paint_body()
        self.paint_ribs()
        self.paint_abdomen()
        self.paint_lungs()
        self.paint_mediastinum()
        self.paint_heart()
        self.paint_aorta()
        self.paint_spine()
        self.paint_airways()
        self.paint_lung_vessels()
        self.paint_consolidation()
        self.paint_pleural_effusion()
        self.paint_nodule()
        self.paint_atelectasis()
        if self.emphysema_fraction is not None:  # what is left of the lungs is known only now
            self.masks["Emphysema"] = (self.emphysema_fraction > 0.5) & (self.lung_fraction > 0.8)

    # ---- the chest's frame -------------------------------------------------------------------------------------

    def measure_chest(self) -> None:
        """Distances to the body's surface, the thoracic cavity and the diaphragm."""
        a, c = self.anatomy, self.canvas
        narrowing = 1 - 0.16 * np.clip((c.z - 60) / 110, 0, 1) ** 2
        width, depth = a.half_width + a.wall + a.fat, a.half_depth + a.wall + a.fat + 5
        self.body_distance = (squircle(c.x / width, (c.y + 7) / depth, 0.35) / narrowing - 1) * np.float32(depth)

        height = np.maximum(
            (c.z + 40) / np.float32(a.apex + 40), 0
        )  # below z = -40 the chest is a cylinder, above a dome
        radius = np.sqrt(squircle(c.x / a.half_width, c.y / a.half_depth, 0.3) ** 2 + height * height)
        self.cavity_distance = (radius - 1) * np.float32((a.half_width + a.half_depth) / 2)

        right = c.x > 0
        centre = np.where(right, np.float32(0.46 * a.half_width), np.float32(-0.48 * a.half_width))
        bulge = ((c.x - centre) / (0.62 * a.half_width)) ** 2 + (
            (c.y - 0.18 * a.half_depth) / (0.98 * a.half_depth)
        ) ** 2
        top = np.where(right, np.float32(a.dome), np.float32(a.dome - 12))
        self.above_diaphragm = (c.z - top + 50 * bulge) * np.float32(0.8)  # mm, positive above

    def paint_body(self) -> None:
        a, c = self.anatomy, self.canvas
        table = np.abs(c.y + a.half_depth + a.wall + a.fat + 19 - 0.0012 * c.x**2) - 3
        c.paint(c.soft(table) * (np.abs(c.x) < 190), -600)
        fat = FAT + 6 * self.texture(0, 30)
        c.paint(c.soft(self.body_distance), fat)
        if a.breast:
            for side in (1, -1):
                centre = np.array([side * 0.55 * a.half_width, a.half_depth + a.wall - 4, -10])
                axes = np.array([52, 30, 48]) * a.breast
                box = c.around(centre, axes.max())
                c.paint(c.soft(c.distance_to_ellipsoid(centre, axes, box)), fat[box], box)
        muscle = self.body_distance + a.fat + 4 * self.texture(1, 40)
        c.paint(c.soft(muscle), MUSCLE + 5 * self.texture(2, 15))
        c.paint(c.soft(self.cavity_distance), fat)  # what lies between the organs

    def paint_ribs(self) -> None:
        a, c = self.anatomy, self.canvas
        phase = (c.z + 0.42 * c.y) / np.float32(a.rib_pitch) + np.float32(a.rib_phase)
        from_centre = np.abs(phase - np.floor(phase) - 0.5) * np.float32(a.rib_pitch) - 5.5
        shell = np.abs(self.cavity_distance - 6) - 4
        not_front = (np.abs(c.x) > 28) | (c.y < 0)
        cartilage = np.clip((c.y - 0.62 * a.half_depth) / 15, 0, 1)
        ribs = c.soft(np.maximum(from_centre, shell)) * not_front * (c.z < a.apex + 8)
        c.paint(ribs, RIB - (RIB - 110) * cartilage)
        sternum = np.maximum(np.abs(c.x) - 16, np.abs(self.cavity_distance - 7) - 5)
        c.paint(c.soft(sternum) * ((c.y > 0) & (c.z > -60) & (c.z < 75)), BONE_SPONGE)
        blade = np.maximum(np.abs(self.cavity_distance - 17) - 2.5, np.abs(np.abs(c.x) - 0.72 * a.half_width) - 30)
        c.paint(c.soft(np.maximum(blade, np.abs(c.z - 68) - 48)) * (c.y < -5), 380)

    def paint_abdomen(self) -> None:
        a, c = self.anatomy, self.canvas
        below = c.soft(np.maximum(self.cavity_distance, self.above_diaphragm))
        liver = np.maximum(self.above_diaphragm + 2, -(c.x + 25 - 0.3 * (c.y - 20)))
        c.paint(below * c.soft(liver), LIVER + 4 * self.texture(3, 20))
        spleen = ((-0.62 * a.half_width, -0.45 * a.half_depth, a.dome - 55), (34, 30, 48), 52)
        stomach = ((-0.42 * a.half_width, 0.25 * a.half_depth, a.dome - 52), (40, 40, 36), 25)
        bubble = ((-0.42 * a.half_width, 0.50 * a.half_depth, a.dome - 45), (24, 18, 20), -950)
        for centre, axes, value in (spleen, stomach, bubble)[: 3 if a.stomach_air else 2]:
            box = c.around(np.array(centre), max(axes))
            c.paint(below[box] * c.soft(c.distance_to_ellipsoid(centre, axes, box)), value, box)

    # ---- lungs -------------------------------------------------------------------------------------------------

    def paint_lungs(self) -> None:
        a, c = self.anatomy, self.canvas
        between = 11 + 17 * np.exp(-(((c.y + 18) / 34) ** 2)) + 5 * np.clip((c.z - 50) / 60, 0, 1)
        self.pleural_distance = np.maximum(self.cavity_distance, between - np.abs(c.x + 2))
        np.maximum(self.pleural_distance, 3 - self.above_diaphragm, out=self.pleural_distance)
        self.lung_fraction = c.soft(self.pleural_distance)
        tissue = a.lung_hu - np.float32(a.lung_gradient / a.half_depth) * c.y + 16 * self.texture(4, 22)
        self.emphysema_fraction = None
        if "Emphysema" in self.findings:
            tissue = self.empty_lung(tissue)
        c.paint(self.lung_fraction, tissue)

    def empty_lung(self, tissue: np.ndarray) -> np.ndarray:
        """Emphysema: clusters of destroyed lung, most of them in the upper half; the rest is a little overinflated."""
        c, rng = self.canvas, self.random("Emphysema")
        clusters = c.smooth_noise(rng, rng.uniform(20, 27))
        threshold = rng.uniform(-0.25, 0.15)
        upper = np.clip((c.z + 55) / 70, -0.6, 1)
        self.emphysema_fraction = np.clip((clusters + upper - threshold - 0.35) / 0.35, 0, 1)
        tissue = tissue - 12
        return tissue + self.emphysema_fraction * (LUNG_EMPTY - tissue)

    def lobe_fraction(self, lobe: str) -> np.ndarray:
        """Soft indicator (X, Y, Z) of one lobe: sides by x, lobes by the oblique and the horizontal fissure."""
        c = self.canvas
        side = -c.x if lobe.startswith("right") else c.x
        above_oblique = (c.z + 14 + 0.95 * c.y) * np.float32(0.72)
        parts = [side, above_oblique if "lower" in lobe else -above_oblique]
        if lobe.startswith("right") and "lower" not in lobe:
            parts.append(c.z - 12 if "middle" in lobe else 12 - c.z)
        return c.soft(np.maximum.reduce(parts))

    def lobe_centre(self, lobe: str, rng: np.random.Generator, jitter: float) -> np.ndarray:
        """A point (3,) within `jitter` mm a coordinate of the lobe's centre."""
        fx, fy, z = LOBE_CENTRES[lobe]
        return np.array([fx * self.anatomy.half_width, fy * self.anatomy.half_depth, z]) + rng.uniform(
            -jitter, jitter, 3
        )

    # ---- mediastinum -------------------------------------------------------------------------------------------

    def paint_mediastinum(self) -> None:
        """Vessels and oesophagus, and enlarged lymph nodes in the fat between them."""
        c = self.canvas
        tubes = (
            ([(-14, 30, 0), (-20, 14, 24), (-34, -4, 32), (-52, -14, 26)], 12, BLOOD),  # pulmonary trunk, left artery
            ([(-16, 12, 24), (14, -4, 22), (50, -10, 18)], 10, BLOOD),  # right pulmonary artery
            ([(27, 10, -10), (27, 12, 50), (22, 16, 92)], 8.5, BLOOD),  # superior vena cava
            ([(22, 16, 88), (-24, 22, 108)], 6, BLOOD),
            ([(8, 8, 60), (22, 2, 125)], 6, BLOOD),  # arch branches
            ([(-10, -4, 62), (-14, -2, 130)], 5, BLOOD),
            ([(-18, -18, 60), (-34, -14, 130)], 5, BLOOD),
            ([(4, -46, -120), (-4, -40, -20), (-4, -36, 40), (-5, -34, 130)], 7, 34),  # oesophagus
        )
        for points, radius, value in tubes:
            c.paint_tube(np.array(points, dtype=np.float64), radius, value)
        if "Lymphadenopathy" in self.findings:
            self.paint_lymph_nodes()

    def paint_lymph_nodes(self) -> None:
        c, rng = self.canvas, self.random("Lymphadenopathy")
        stations = np.array([(16, -12, 66), (-34, 10, 50), (0, -30, 22), (50, -16, 2), (20, 22, 70)], dtype=np.float64)
        self.masks["Lymphadenopathy"] = mask = np.zeros(c.shape, dtype=bool)
        for centre in rng.permutation(stations)[: rng.integers(2, 4)]:
            axes = rng.uniform(7.5, 11, 3)
            box = c.around(centre, axes.max())
            fraction = c.soft(c.distance_to_ellipsoid(centre, axes, box))
            c.paint(fraction, 44, box)
            mask[box] |= fraction > 0.5

    def paint_heart(self) -> None:
        """An ellipsoid with its tip to the left, front and foot; its width is a share of the thorax's."""
        a, c = self.anatomy, self.canvas
        ratio = a.heart_ratio
        if "Cardiomegaly" in self.findings:
            ratio = self.random("Cardiomegaly").uniform(0.58, 0.66)
        tilt, turn = a.heart_angle, math.radians(35)
        long_axis = np.array([-math.cos(tilt) * math.cos(turn), math.cos(tilt) * math.sin(turn), -math.sin(tilt)])
        second = np.cross(long_axis, [0, 0, 1]) / np.linalg.norm(np.cross(long_axis, [0, 0, 1]))
        orientation = np.stack([long_axis, second, np.cross(long_axis, second)])
        shape = np.array([1.12, 0.92, 0.86])
        axes = shape * ratio * a.half_width / np.sqrt(((shape[:, None] * orientation) ** 2).sum(0)[0])
        growth = ratio * a.half_width - 50
        centre = np.array([-0.13 * a.half_width - 0.25 * growth, 14 + 0.12 * growth, -34 + 0.1 * growth])

        self.heart_distance = c.distance_to_ellipsoid(centre, axes, orientation=orientation)
        np.maximum(self.heart_distance, self.cavity_distance + 4, out=self.heart_distance)
        self.paint_pericardium()
        heart = c.soft(self.heart_distance)
        c.paint(heart, BLOOD + 3 * self.texture(5, 25))
        if "Cardiomegaly" in self.findings:
            self.masks["Cardiomegaly"] = heart > 0.5

    def paint_pericardium(self) -> None:
        """Fat around the heart and, where there is an effusion, a layer of water around that, thicker at the back."""
        c = self.canvas
        fat = self.heart_distance - 3
        outside = np.maximum(fat, self.cavity_distance + 2)
        if "Pericardial effusion" in self.findings:
            rng = self.random("Pericardial effusion")
            thickness = rng.uniform(11, 17) * (1 - 0.25 * np.clip((c.y - 14) / 50, -1, 1))
            layer = np.maximum(fat - thickness.astype(np.float32), self.cavity_distance + 2)
            layer = np.maximum(layer, c.z - 26)
            fluid = c.soft(layer)
            c.paint(fluid, WATER + rng.uniform(-4, 6))
            self.masks["Pericardial effusion"] = (fluid > 0.5) & (fat > c.voxel / 2)
            outside = np.minimum(outside, layer)
        c.paint(c.soft(fat), FAT + 15)
        self.lung_fraction *= 1 - c.soft(outside)

    def paint_aorta(self) -> None:
        """Ascending, arch, descending; calcium lies in patches of its wall."""
        a, c = self.anatomy, self.canvas
        back = -a.half_depth + 38
        arch = np.linspace(0, np.pi, 7)
        start, end = np.array([10, 18, 42]), np.array([-25, back + 6, 42])
        curve = (start + end) / 2 + np.cos(arch)[:, None] * (start - end) / 2 + np.sin(arch)[:, None] * [0, 0, 28]
        descent = [(-27, back, 10), (-26, back - 2, -40), (-20, back - 1, -95), (-12, back, -160)]
        line = np.concatenate([[(4, 16, -8), (14, 22, 16)], curve, descent])
        distance = np.full(c.shape, 99, dtype=np.float32)
        for p, q in pairwise(line):
            box = c.around((p + q) / 2, np.linalg.norm(q - p) / 2 + a.aorta_radius + 2 * c.voxel)
            distance[box] = np.minimum(distance[box], c.distance_to_capsule(p, q, box))
        aorta = c.soft(distance - a.aorta_radius)
        c.paint(aorta, BLOOD)
        self.lung_fraction *= 1 - aorta
        if "Arterial wall calcification" in self.findings:
            self.paint_calcium(distance, line)

    def paint_calcium(self, distance: np.ndarray, line: np.ndarray) -> None:
        c, rng = self.canvas, self.random("Arterial wall calcification")
        wall = np.abs(distance - self.anatomy.aorta_radius + 1) - 2.2
        patches = np.full(c.shape, 99, dtype=np.float32)
        places = np.concatenate([rng.choice(np.arange(3, 8), 2, replace=False), [9, 10, 11]]) + rng.uniform(0, 0.9, 5)
        for place in places:
            k, t = int(place), place % 1
            angle = rng.uniform(0, 2 * np.pi)
            offset = self.anatomy.aorta_radius * np.array([math.cos(angle), math.sin(angle), 0.3 * math.sin(angle)])
            centre, radius = (1 - t) * line[k] + t * line[k + 1] + offset, rng.uniform(14, 21)
            box = c.around(centre, radius)
            ball = c.distance_to_ellipsoid(centre, (radius,) * 3, box)
            patches[box] = np.minimum(patches[box], ball)
        calcium = c.soft(np.maximum(wall, patches))
        c.paint(calcium, rng.uniform(700, 1000))
        self.masks["Arterial wall calcification"] = calcium > 0.3

    def paint_spine(self) -> None:
        """Vertebral bodies and discs, the canal behind them, the neural arch with its processes."""
        a, c = self.anatomy, self.canvas
        box = c.between((-42, -a.half_depth - 45, -400), (42, -a.half_depth + 45, 400))
        x, z = c.x[box], c.z[box]
        y = c.y[box] + np.float32(a.half_depth - 13) - 0.0006 * z * z
        x2 = x * x
        body = np.sqrt(x2 / 400 + (y / 16) ** 2) * 16 - 16
        phase = z / np.float32(a.disc_pitch)
        to_disc = (0.5 - np.abs(phase - np.floor(phase) - 0.5)) * np.float32(a.disc_pitch) - 2.5
        bone = np.maximum(body, -to_disc)
        c.paint(c.soft(body), 85, box)
        c.paint(c.soft(bone), BONE_CORTEX, box)
        c.paint(c.soft(bone + 3), BONE_SPONGE, box)
        canal = np.sqrt(x2 + (y + 24) ** 2) - 8
        spinous = np.maximum(np.abs(x) - 4, np.abs(y + 42) - 10)
        transverse = np.maximum(np.abs(np.abs(x) - 22) - 14, np.abs(y + 22 + 0.25 * np.abs(x)) - 4)
        processes = np.maximum(np.minimum(spinous, transverse), 4 - to_disc)
        c.paint(c.soft(np.minimum(canal - 4, processes)), 360, box)
        c.paint(c.soft(canal), 25, box)
        self.lung_fraction[box] *= 1 - c.soft(body)

    # ---- airways and vessels -----------------------------------------------------------------------------------

    def airway_tree(self) -> list[tuple[np.ndarray, float]]:
        """(polyline, radius) of the trachea, main, lobar and segmental bronchi."""
        rng = np.random.default_rng([self.patient, 1])
        carina = np.array([2, -16, 46.0])
        tree = [(np.array([[1, -6, 150.0], [1, -10, 100.0], carina]), 8.5)]
        hila = {1: np.array([36, -20, 18.0]), -1: np.array([-42, -22, 14.0])}
        for side, hilum in hila.items():
            tree.append((np.stack([carina, hilum]), 6.5))
            for lobe in (name for name in LOBES if name.startswith("right" if side > 0 else "left")):
                target = self.lobe_centre(lobe, rng, 12)
                middle = hilum + 0.45 * (target - hilum)
                tree.append((np.stack([hilum, middle]), 4.0))
                for _ in range(3):
                    tree.append((np.stack([middle, target + rng.uniform(-28, 28, 3)]), 2.4))
        return tree

    def paint_airways(self) -> None:
        c, tree = self.canvas, self.airway_tree()
        for points, radius in tree:
            c.paint_tube(points, radius + 1.4, 20 if radius > 5 else -250)
        if "Peribronchial thickening" in self.findings:
            wall = self.random("Peribronchial thickening").uniform(3, 4.5)
            before = c.hu.copy()
            for points, radius in tree[1:]:
                c.paint_tube(points, radius + wall, 25)
            thickened = c.hu - before > 80
        for points, radius in tree:
            c.paint_tube(points, radius, AIR)
        if "Peribronchial thickening" in self.findings:
            self.masks["Peribronchial thickening"] = thickened & (c.hu > -900)

    def paint_lung_vessels(self) -> None:
        """Arteries and veins that branch from each hilum, thinning outwards; each gives its volume to the grid."""
        c, rng = self.canvas, np.random.default_rng([self.patient, 2])
        sides = np.repeat([[1.0], [-1.0]], 14, axis=0)  # (28, 1)
        hila = sides * [40, 0, 0] + [0, -12, 14]
        direction = rng.standard_normal((28, 3)) * [0.6, 0.9, 1.1] + sides * [0.8, 0, 0]
        tips = hila + direction / np.linalg.norm(direction, axis=1, keepdims=True) * rng.uniform(60, 95, (28, 1))
        forks = np.repeat(hila, 4, axis=0) + rng.uniform(0.35, 0.9, (112, 1)) * np.repeat(tips - hila, 4, axis=0)
        branches = tube_points(rng, hila, tips, (4.2, 1.8), 140)
        twigs = tube_points(rng, forks, forks + rng.uniform(-42, 42, (112, 3)), (2.0, 0.9), 30)
        points, volumes = (np.concatenate(parts) for parts in zip(branches, twigs, strict=True))
        vessels = c.splat(points, volumes) * self.lung_fraction
        if self.emphysema_fraction is not None:
            vessels *= 1 - 0.7 * self.emphysema_fraction
        c.paint(vessels, BLOOD)

    # ---- findings in the lungs ---------------------------------------------------------------------------------

    def paint_consolidation(self) -> None:
        """Part of a lobe filled, with a ragged border and open bronchi (air bronchograms) in it."""
        if (finding := self.findings.get("Consolidation")) is None:
            return
        c, rng = self.canvas, self.random("Consolidation")
        centre, axes = self.lobe_centre(finding.lobe, rng, 8), rng.uniform(29, 38, 3)
        box = c.around(centre, 60)
        ragged = 6 * c.smooth_noise(rng, 16)[box]
        distance = c.distance_to_ellipsoid(centre, axes, box) + ragged
        fraction = c.soft(distance / 1.6) * (self.lung_fraction * self.lobe_fraction(finding.lobe))[box]
        c.paint(fraction, rng.uniform(25, 55), box)
        mask = np.zeros(c.shape, dtype=bool)
        mask[box] = fraction > 0.5
        self.masks["Consolidation"] = mask
        hilum = np.array([math.copysign(40, centre[0]), -20, 14.0])
        for _ in range(4):
            end = centre + rng.uniform(-0.7, 0.7, 3) * axes
            start = centre + 0.8 * (hilum - centre) * min(1, axes.mean() / np.linalg.norm(hilum - centre))
            c.paint_tube(np.stack([start, (start + end) / 2 + rng.uniform(-5, 5, 3), end]), 1.4, AIR)
        self.lung_fraction[box] *= 1 - fraction

    def paint_pleural_effusion(self) -> None:
        """Water at the back of the pleural space, deepest at the base, its surface rising towards the chest wall."""
        if (finding := self.findings.get("Pleural effusion")) is None:
            return
        a, c, rng = self.anatomy, self.canvas, self.random("Pleural effusion")
        total = np.zeros(c.shape, dtype=np.float32)
        for side, name in ((1, "right"), (-1, "left")):
            depth, top = rng.uniform(44, 60), rng.uniform(25, 75)
            if finding.side not in (name, "bilateral"):
                continue
            fall = np.clip((top - c.z) / (top + 110), 0, 1.1)
            climb = 10 * ((np.abs(c.x) - 0.5 * a.half_width) / (0.5 * a.half_width)) ** 2
            level = -a.half_depth + depth * fall + climb * fall
            distance = np.maximum.reduce([self.pleural_distance, c.y - level.astype(np.float32), -side * c.x])
            fluid = c.soft(distance) * (self.lung_fraction > 0)
            c.paint(fluid, WATER + rng.uniform(-3, 4))
            total = np.maximum(total, fluid)
        self.masks["Pleural effusion"] = total > 0.5
        self.lung_fraction *= 1 - total

    def paint_nodule(self) -> None:
        """A ball with a slightly wavy border, where the lobe is free of everything else."""
        if (finding := self.findings.get("Lung nodule")) is None:
            return
        c, rng = self.canvas, self.random("Lung nodule")
        free = self.lung_fraction * self.lobe_fraction(finding.lobe)
        centre, best = None, -1.0
        for jitter in np.linspace(12, 30, 16):
            candidate = self.lobe_centre(finding.lobe, rng, jitter)
            share = self.share_in_ball(free, candidate, finding.size_mm / 2 + 3)
            if share > best:
                centre, best = candidate, share
            if best > 0.97:
                break
        axes = finding.size_mm / 2 * rng.uniform(0.93, 1.07, 3)
        box = c.around(centre, axes.max())
        fraction = c.soft(c.distance_to_ellipsoid(centre, axes, box))
        c.paint(fraction, rng.uniform(30, 60), box)
        self.lung_fraction[box] *= 1 - fraction
        self.masks["Lung nodule"] = mask = np.zeros(c.shape, dtype=bool)
        mask[box] = fraction > 0.5

    def share_in_ball(self, fraction: np.ndarray, centre: np.ndarray, radius: float) -> float:
        """Mean of `fraction` (X, Y, Z) over the ball."""
        box = self.canvas.around(centre, radius)
        ball = self.canvas.soft(self.canvas.distance_to_ellipsoid(centre, (radius,) * 3, box))
        return float((ball * fraction[box]).sum() / max(ball.sum(), 1e-6))

    def paint_atelectasis(self) -> None:
        """A thin plate of collapsed lung above the diaphragm."""
        if (finding := self.findings.get("Atelectasis")) is None:
            return
        a, c, rng = self.anatomy, self.canvas, self.random("Atelectasis")
        side = 1 if finding.lobe.startswith("right") else -1
        centre = np.array([side * 0.55 * a.half_width, -0.3 * a.half_depth, a.dome + rng.uniform(4, 14)])
        orientation = small_rotation(rng.uniform(-0.3, 0.3, 3))
        axes = np.array([rng.uniform(26, 36), rng.uniform(20, 28), rng.uniform(2.5, 3.5)])
        fraction = c.soft(c.distance_to_ellipsoid(centre, axes, orientation=orientation)) * self.lung_fraction
        c.paint(fraction, rng.uniform(-80, 10))
        self.masks["Atelectasis"] = fraction > 0.3


def squircle(x: np.ndarray, y: np.ndarray, squareness: float) -> np.ndarray:
    """Radius of (x, y) under a norm between a circle's (0) and a square's (1): 1 on the border."""
    x2, y2 = np.minimum(x * x, 3), np.minimum(y * y, 3)  # beyond 3 the product would win and close the curve again
    return np.sqrt(x2 + y2 - np.float32(squareness) * x2 * y2)


def tube_points(
    rng: np.random.Generator, starts: np.ndarray, ends: np.ndarray, radii: tuple[float, float], n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Thinning tubes from `starts` to `ends` (T, 3) as points scattered over their cross-sections.

    Returns the points (T·n, 3) and the volume (T·n,) in mm³ that each stands for.
    """
    along = (np.arange(n) + 0.5) / n
    radius = radii[0] + along * (radii[1] - radii[0])  # (n,)
    lines = (ends - starts)[:, None]  # (T, 1, 3)
    points = starts[:, None] + along[:, None] * lines + rng.uniform(-0.7, 0.7, (len(starts), n, 3)) * radius[:, None]
    volumes = np.pi * radius**2 * np.linalg.norm(lines, axis=-1) / n
    return points.reshape(-1, 3), volumes.ravel()
