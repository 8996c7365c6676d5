"""A voxel grid on which shapes with soft edges are painted, and their geometry.

Shapes are signed distances in mm, negative inside; `Canvas.soft` turns a distance into the fraction of a voxel that the
shape fills, so that a phantom of 5 mm voxels has the partial volumes of a real scan.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import EllipsisType
from typing import TypeAlias

import numpy as np

AIR = -1000.0  # HU

Box: TypeAlias = tuple[slice | EllipsisType, ...]  # slices of the grid
Point: TypeAlias = Sequence[float] | np.ndarray


class Canvas:
    """A voxel grid, and the HU painted on it so far.

    Args:
        field_of_view: extent of the grid in mm along x, y and z.
        spacing: voxel edges (3,) in mm.
        rotation: (3, 3), from scanner to patient coordinates.
        shift: (3,) in mm; a scanner point s is the patient point `rotation` s + `shift`.

    Attributes:
        x: patient coordinates of the voxel centres in mm, float32 (X, Y, Z); y and z likewise.
        hu: float32 (X, Y, Z).
        spacing: voxel edges (3,) in mm.
        voxel: mean voxel edge in mm.
        shape: (X, Y, Z).
    """

    def __init__(self, field_of_view: Iterable[float], spacing: np.ndarray, rotation: np.ndarray, shift: np.ndarray):
        self.spacing = np.asarray(spacing, dtype=np.float64)
        self.voxel = float(self.spacing.mean())
        self.shape = tuple(math.ceil(extent / edge) for extent, edge in zip(field_of_view, self.spacing, strict=True))
        self.rotation, self.shift = rotation, shift
        self.axes = [(np.arange(n) - (n - 1) / 2) * edge for n, edge in zip(self.shape, self.spacing, strict=True)]
        # R s + shift, summed from three broadcast axes.
        columns = [axis.reshape(np.roll([-1, 1, 1], k)) for k, axis in enumerate(self.axes)]
        self.x, self.y, self.z = (
            sum((rotation[i, k] * columns[k]).astype(np.float32) for k in range(3)) + np.float32(shift[i])
            for i in range(3)
        )
        self.hu = np.full(self.shape, AIR, dtype=np.float32)

    @property
    def affine(self) -> np.ndarray:
        """Return the transform (4, 4) from voxel index to scanner coordinates in mm, RAS+."""
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = [axis[0] for axis in self.axes]
        return affine

    def index(self, point: np.ndarray) -> np.ndarray:
        """Return the fractional voxel indices (..., 3) of patient points (..., 3) in mm."""
        scanner = (np.asarray(point) - self.shift) @ self.rotation
        return (scanner - [axis[0] for axis in self.axes]) / self.spacing

    def around(self, point: np.ndarray, radius: float) -> tuple[slice, ...]:
        """Return slices of the box around the ball of `radius` mm at a patient point (3,), with a margin of one voxel."""
        centre, reach = self.index(point), radius / self.spacing + 1
        low, high = np.floor(centre - reach).astype(int), np.ceil(centre + reach).astype(int) + 1
        return tuple(slice(min(max(a, 0), n), min(max(b, 0), n)) for a, b, n in zip(low, high, self.shape, strict=True))

    def between(self, low: Iterable[float], high: Iterable[float]) -> tuple[slice, ...]:
        """Return slices of the box around a cuboid in patient space, given by two opposite corners in mm."""
        corners = self.index(np.array(np.meshgrid(*zip(low, high, strict=True))).reshape(3, 8).T)
        first = np.clip(np.floor(corners.min(0)).astype(int), 0, self.shape)
        last = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, self.shape)
        return tuple(slice(a, b) for a, b in zip(first, last, strict=True))

    def soft(self, distance: np.ndarray) -> np.ndarray:
        """Return the filled fraction [0, 1] of voxels from signed distances in mm."""
        return np.clip(0.5 - distance / np.float32(self.voxel), 0, 1)

    def paint(self, fraction: np.ndarray, value: float | np.ndarray, box: Box = (...,)) -> None:
        """Mix HU into a box of the canvas, by the fraction of each voxel.

        Args:
            fraction: [0, 1], of the box's shape.
            value: HU, a number or an array of the box's shape.
            box: slices of the grid; default: all of it.
        """
        region = self.hu[box]
        change = np.float32(value) - region
        change *= fraction
        region += change

    def distance_to_ellipsoid(
        self,
        centre: Point,
        axes: Point,
        box: Box = (...,),
        orientation: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the approximate signed distance to an ellipsoid in mm.

        Args:
            centre: patient point (3,) in mm.
            axes: half axes (3,) in mm.
            box: slices of the grid; default: all of it.
            orientation: (3, 3), the directions of the axes as rows; None for those of the patient.
        """
        offset = [
            self.x[box] - np.float32(centre[0]),
            self.y[box] - np.float32(centre[1]),
            self.z[box] - np.float32(centre[2]),
        ]
        if orientation is not None:
            offset = [sum(np.float32(row[k]) * offset[k] for k in range(3)) for row in orientation]
        radius = np.sqrt(sum((part / np.float32(axis)) ** 2 for part, axis in zip(offset, axes, strict=True)))
        return (radius - 1) * np.float32(np.min(axes))

    def distance_to_line(self, start: Point, end: Point, box: Box) -> np.ndarray:
        """Return the distance in mm to a line segment.

        Args:
            start: patient point (3,) in mm.
            end: patient point (3,) in mm.
            box: slices of the grid.
        """
        first, line = np.asarray(start, np.float32), np.asarray(end, np.float32) - np.asarray(start, np.float32)
        dx, dy, dz = self.x[box] - first[0], self.y[box] - first[1], self.z[box] - first[2]
        along = np.clip((dx * line[0] + dy * line[1] + dz * line[2]) / np.float32(max(float(line @ line), 1e-6)), 0, 1)
        return np.sqrt((dx - along * line[0]) ** 2 + (dy - along * line[1]) ** 2 + (dz - along * line[2]) ** 2)

    def paint_tube(self, points: np.ndarray, radius: float, value: float) -> None:
        """Paint a tube; one thinner than a voxel fills only its share of it.

        Args:
            points: polyline (N, 3) of patient points in mm.
            radius: in mm.
            value: HU.
        """
        share = min(1.0, (2.2 * radius / self.voxel) ** 2)
        for start, end in pairwise(points):
            box = self.around((start + end) / 2, float(np.linalg.norm(end - start)) / 2 + radius + self.voxel)
            self.paint(self.soft(self.distance_to_line(start, end, box) - radius) * share, value, box)

    def smooth_noise(self, rng: np.random.Generator, cell: float) -> np.ndarray:
        """Return smooth noise (X, Y, Z) of about unit variance.

        Args:
            rng: source of the noise, which doesn't depend on the voxel size.
            cell: length in mm over which the noise varies.
        """
        reach = 240.0
        n = int(2 * reach / cell) + 2
        field = rng.standard_normal((n, n, n), dtype=np.float32)
        for axis in self.axes:
            position = (axis + reach) / cell
            low = np.clip(position.astype(int), 0, n - 2)
            weights = np.zeros((len(axis), n), dtype=np.float32)
            weights[np.arange(len(axis)), low] = 1 - (position - low)
            weights[np.arange(len(axis)), low + 1] = position - low
            field = np.tensordot(field, weights, axes=([0], [1]))  # the finished axis becomes the last
        return field * np.float32(1.8)  # linear interpolation removes about 0.7 of the variance

    def splat(self, points: np.ndarray, volumes: np.ndarray) -> np.ndarray:
        """Return the fraction (X, Y, Z) that small bodies fill, distributed trilinearly.

        Args:
            points: their patient points (N, 3) in mm.
            volumes: their volumes (N,) in mm³.
        """
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


# --- Geometry ---------------------------------------------------------------------------------------------------------


def small_rotation(angles: np.ndarray) -> np.ndarray:
    """Return the rotation (3, 3) about x, then y, then z, by `angles` (3,) in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def squircle(x: np.ndarray, y: np.ndarray, squareness: float) -> np.ndarray:
    """Return the radius of points under a norm between those of a circle and a square; 1 is the border.

    Args:
        x: first coordinate.
        y: second coordinate.
        squareness: 0 for a circle, 1 for a square.
    """
    x2, y2 = np.minimum(x * x, 3), np.minimum(y * y, 3)  # above 3 the product would dominate and close the curve again
    return np.sqrt(x2 + y2 - np.float32(squareness) * x2 * y2)


def tube_points(
    rng: np.random.Generator, starts: np.ndarray, ends: np.ndarray, radii: tuple[float, float], n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sample tapering tubes as points scattered over their cross-sections.

    Args:
        rng: source of the scatter.
        starts: patient points (T, 3) in mm.
        ends: patient points (T, 3) in mm.
        radii: at the start and at the end, in mm.
        n: points per tube.

    Returns:
        The points (T·n, 3), and the volume (T·n,) in mm³ that each represents.
    """
    along = (np.arange(n) + 0.5) / n
    radius = radii[0] + along * (radii[1] - radii[0])  # (n,)
    lines = (ends - starts)[:, None]  # (T, 1, 3)
    points = starts[:, None] + along[:, None] * lines + rng.uniform(-0.7, 0.7, (len(starts), n, 3)) * radius[:, None]
    volumes = np.pi * radius**2 * np.linalg.norm(lines, axis=-1) / n
    return points.reshape(-1, 3), volumes.ravel()
