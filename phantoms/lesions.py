"""Findings painted into a chest."""

import math

import numpy as np

from samf.phantoms.canvas import AIR, small_rotation
from samf.phantoms.chest import LUNG_EMPTY, WATER, Chest


def empty_lung(chest: Chest, tissue: np.ndarray) -> np.ndarray:
    """Return the HU of lungs with emphysema, and set the chest's fraction of it.

    Clusters of destroyed lung, most of them in the upper half; the rest is a little overinflated.

    Args:
        chest: the chest.
        tissue: HU (X, Y, Z) of healthy lungs.
    """
    c, rng = chest.canvas, chest.rng_of("Emphysema")
    clusters = c.smooth_noise(rng, rng.uniform(20, 27))
    threshold = rng.uniform(-0.25, 0.15)
    upper = np.clip((c.z + 55) / 70, -0.6, 1)
    chest.emphysema_fraction = np.clip((clusters + upper - threshold - 0.35) / 0.35, 0, 1)
    tissue = tissue - 12
    return tissue + chest.emphysema_fraction * (LUNG_EMPTY - tissue)


def paint_lymph_nodes(chest: Chest) -> None:
    """Paint two or three enlarged lymph nodes in the fat of the mediastinum."""
    if "Lymphadenopathy" not in chest.findings:
        return
    c, rng = chest.canvas, chest.rng_of("Lymphadenopathy")
    stations = np.array([(16, -12, 66), (-34, 10, 50), (0, -30, 22), (50, -16, 2), (20, 22, 70)], dtype=np.float64)
    chest.masks["Lymphadenopathy"] = mask = np.zeros(c.shape, dtype=bool)
    for centre in rng.permutation(stations)[: rng.integers(2, 4)]:
        axes = rng.uniform(7.5, 11, 3)
        box = c.around(centre, axes.max())
        fraction = c.soft(c.distance_to_ellipsoid(centre, axes, box))
        c.paint(fraction, 44, box)
        mask[box] |= fraction > 0.5


def paint_calcium(chest: Chest, distance: np.ndarray, line: np.ndarray) -> None:
    """Paint calcified patches of the aorta's wall.

    Args:
        chest: the chest.
        distance: (X, Y, Z) to the aorta's centre line, in mm.
        line: the centre line (N, 3).
    """
    c, rng = chest.canvas, chest.rng_of("Arterial wall calcification")
    wall = np.abs(distance - chest.anatomy.aorta_radius + 1) - 2.2
    patches = np.full(c.shape, 99, dtype=np.float32)
    places = np.concatenate([rng.choice(np.arange(3, 8), 2, replace=False), [9, 10, 11]]) + rng.uniform(0, 0.9, 5)
    for place in places:
        k, t = int(place), place % 1
        angle = rng.uniform(0, 2 * np.pi)
        offset = chest.anatomy.aorta_radius * np.array([math.cos(angle), math.sin(angle), 0.3 * math.sin(angle)])
        centre, radius = (1 - t) * line[k] + t * line[k + 1] + offset, rng.uniform(14, 21)
        box = c.around(centre, radius)
        ball = c.distance_to_ellipsoid(centre, (radius,) * 3, box)
        patches[box] = np.minimum(patches[box], ball)
    calcium = c.soft(np.maximum(wall, patches))
    c.paint(calcium, rng.uniform(700, 1000))
    chest.masks["Arterial wall calcification"] = calcium > 0.3


def paint_consolidation(chest: Chest) -> None:
    """Fill a part of a lobe, with a ragged border and open bronchi (air bronchograms) in it."""
    if (finding := chest.findings.get("Consolidation")) is None or finding.lobe is None:
        return
    c, rng = chest.canvas, chest.rng_of("Consolidation")
    centre, axes = chest.lobe_centre(finding.lobe, rng, 8), rng.uniform(29, 38, 3)
    box = c.around(centre, 60)
    ragged = 6 * c.smooth_noise(rng, 16)[box]
    distance = c.distance_to_ellipsoid(centre, axes, box) + ragged
    fraction = c.soft(distance / 1.6) * (chest.lung_fraction * chest.lobe_fraction(finding.lobe))[box]
    c.paint(fraction, rng.uniform(25, 55), box)
    mask = np.zeros(c.shape, dtype=bool)
    mask[box] = fraction > 0.5
    chest.masks["Consolidation"] = mask
    hilum = np.array([math.copysign(40, centre[0]), -20, 14.0])
    for _ in range(4):
        end = centre + rng.uniform(-0.7, 0.7, 3) * axes
        start = centre + 0.8 * (hilum - centre) * min(1, axes.mean() / np.linalg.norm(hilum - centre))
        c.paint_tube(np.stack([start, (start + end) / 2 + rng.uniform(-5, 5, 3), end]), 1.4, AIR)
    chest.lung_fraction[box] *= 1 - fraction


def paint_pleural_effusion(chest: Chest) -> None:
    """Paint water at the back of the pleural space, deepest at the base, its surface rising towards the chest wall."""
    if (finding := chest.findings.get("Pleural effusion")) is None:
        return
    a, c, rng = chest.anatomy, chest.canvas, chest.rng_of("Pleural effusion")
    total = np.zeros(c.shape, dtype=np.float32)
    for side, name in ((1, "right"), (-1, "left")):
        depth, top = rng.uniform(44, 60), rng.uniform(25, 75)
        if finding.side not in (name, "bilateral"):
            continue
        fall = np.clip((top - c.z) / (top + 110), 0, 1.1)
        climb = 10 * ((np.abs(c.x) - 0.5 * a.half_width) / (0.5 * a.half_width)) ** 2
        level = -a.half_depth + depth * fall + climb * fall
        distance = np.maximum.reduce([chest.pleural_distance, c.y - level.astype(np.float32), -side * c.x])
        fluid = c.soft(distance) * (chest.lung_fraction > 0)
        c.paint(fluid, WATER + rng.uniform(-3, 4))
        total = np.maximum(total, fluid)
    chest.masks["Pleural effusion"] = total > 0.5
    chest.lung_fraction *= 1 - total


def paint_nodule(chest: Chest) -> None:
    """Paint a nearly spherical nodule at a place of the lobe that is free of everything else."""
    if (finding := chest.findings.get("Lung nodule")) is None or finding.lobe is None or finding.size_mm is None:
        return
    c, rng, radius = chest.canvas, chest.rng_of("Lung nodule"), finding.size_mm / 2
    free = chest.lung_fraction * chest.lobe_fraction(finding.lobe)
    centre, best = np.zeros(3), -1.0
    for jitter in np.linspace(12, 30, 16):
        candidate = chest.lobe_centre(finding.lobe, rng, jitter)
        share = _share_in_ball(chest, free, candidate, radius + 3)
        if share > best:
            centre, best = candidate, share
        if best > 0.97:
            break
    axes = radius * rng.uniform(0.93, 1.07, 3)
    box = c.around(centre, axes.max())
    fraction = c.soft(c.distance_to_ellipsoid(centre, axes, box))
    c.paint(fraction, rng.uniform(30, 60), box)
    chest.lung_fraction[box] *= 1 - fraction
    chest.masks["Lung nodule"] = mask = np.zeros(c.shape, dtype=bool)
    mask[box] = fraction > 0.5


def _share_in_ball(chest: Chest, fraction: np.ndarray, centre: np.ndarray, radius: float) -> float:
    """Return the mean of `fraction` (X, Y, Z) over the ball of `radius` mm at `centre` (3,)."""
    box = chest.canvas.around(centre, radius)
    ball = chest.canvas.soft(chest.canvas.distance_to_ellipsoid(centre, (radius,) * 3, box))
    return float((ball * fraction[box]).sum() / max(ball.sum(), 1e-6))


def paint_atelectasis(chest: Chest) -> None:
    """Paint a thin plate of collapsed lung above the diaphragm."""
    if (finding := chest.findings.get("Atelectasis")) is None or finding.lobe is None:
        return
    a, c, rng = chest.anatomy, chest.canvas, chest.rng_of("Atelectasis")
    side = 1 if finding.lobe.startswith("right") else -1
    centre = np.array([side * 0.55 * a.half_width, -0.3 * a.half_depth, a.dome + rng.uniform(4, 14)])
    orientation = small_rotation(rng.uniform(-0.3, 0.3, 3))
    axes = np.array([rng.uniform(26, 36), rng.uniform(20, 28), rng.uniform(2.5, 3.5)])
    fraction = c.soft(c.distance_to_ellipsoid(centre, axes, orientation=orientation)) * chest.lung_fraction
    c.paint(fraction, rng.uniform(-80, 10))
    chest.masks["Atelectasis"] = fraction > 0.3
