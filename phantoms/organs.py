"""Organs painted into a chest, from the skin inwards."""

import math
from itertools import pairwise

import numpy as np

from samf.phantoms.canvas import AIR, tube_points
from samf.phantoms.chest import (
    BLOOD,
    BONE_CORTEX,
    BONE_SPONGE,
    FAT,
    LIVER,
    MUSCLE,
    RIB,
    WATER,
    Chest,
)
from samf.phantoms.findings import LOBES
from samf.phantoms.lesions import empty_lung, paint_calcium


def paint_body(chest: Chest) -> None:
    """Paint the scanner's table, fat, breasts and muscle, and fill the thoracic cavity with fat."""
    a, c = chest.anatomy, chest.canvas
    table = np.abs(c.y + a.half_depth + a.wall + a.fat + 19 - 0.0012 * c.x**2) - 3
    c.paint(c.soft(table) * (np.abs(c.x) < 190), -600)
    fat = FAT + 6 * chest.texture(0, 30)
    c.paint(c.soft(chest.body_distance), fat)
    if a.breast:
        for side in (1, -1):
            centre = np.array([side * 0.55 * a.half_width, a.half_depth + a.wall - 4, -10])
            axes = np.array([52, 30, 48]) * a.breast
            box = c.around(centre, axes.max())
            c.paint(c.soft(c.distance_to_ellipsoid(centre, axes, box)), fat[box], box)
    muscle = chest.body_distance + a.fat + 4 * chest.texture(1, 40)
    c.paint(c.soft(muscle), MUSCLE + 5 * chest.texture(2, 15))
    c.paint(c.soft(chest.cavity_distance), fat)  # remains between the organs


def paint_ribs(chest: Chest) -> None:
    """Paint the ribs with their cartilage, the sternum and the shoulder blades."""
    a, c = chest.anatomy, chest.canvas
    phase = (c.z + 0.42 * c.y) / np.float32(a.rib_pitch) + np.float32(a.rib_phase)
    from_centre = np.abs(phase - np.floor(phase) - 0.5) * np.float32(a.rib_pitch) - 5.5
    shell = np.abs(chest.cavity_distance - 6) - 4
    not_front = (np.abs(c.x) > 28) | (c.y < 0)
    cartilage = np.clip((c.y - 0.62 * a.half_depth) / 15, 0, 1)
    ribs = c.soft(np.maximum(from_centre, shell)) * not_front * (c.z < a.apex + 8)
    c.paint(ribs, RIB - (RIB - 110) * cartilage)
    sternum = np.maximum(np.abs(c.x) - 16, np.abs(chest.cavity_distance - 7) - 5)
    c.paint(c.soft(sternum) * ((c.y > 0) & (c.z > -60) & (c.z < 75)), BONE_SPONGE)
    blade = np.maximum(np.abs(chest.cavity_distance - 17) - 2.5, np.abs(np.abs(c.x) - 0.72 * a.half_width) - 30)
    c.paint(c.soft(np.maximum(blade, np.abs(c.z - 68) - 48)) * (c.y < -5), 380)


def paint_abdomen(chest: Chest) -> None:
    """Paint the liver, the spleen and the stomach with its air bubble, below the diaphragm."""
    a, c = chest.anatomy, chest.canvas
    below = c.soft(np.maximum(chest.cavity_distance, chest.above_diaphragm))
    liver = np.maximum(chest.above_diaphragm + 2, -(c.x + 25 - 0.3 * (c.y - 20)))
    c.paint(below * c.soft(liver), LIVER + 4 * chest.texture(3, 20))
    spleen = ((-0.62 * a.half_width, -0.45 * a.half_depth, a.dome - 55), (34, 30, 48), 52)
    stomach = ((-0.42 * a.half_width, 0.25 * a.half_depth, a.dome - 52), (40, 40, 36), 25)
    bubble = ((-0.42 * a.half_width, 0.50 * a.half_depth, a.dome - 45), (24, 18, 20), -950)
    for centre, axes, value in (spleen, stomach, bubble)[: 3 if a.stomach_air else 2]:
        box = c.around(np.array(centre), max(axes))
        c.paint(below[box] * c.soft(c.distance_to_ellipsoid(centre, axes, box)), value, box)


def paint_lungs(chest: Chest) -> None:
    """Paint the lungs, which are denser at the back, and set the chest's distances and fractions of them."""
    a, c = chest.anatomy, chest.canvas
    between = 11 + 17 * np.exp(-(((c.y + 18) / 34) ** 2)) + 5 * np.clip((c.z - 50) / 60, 0, 1)
    chest.pleural_distance = np.maximum(chest.cavity_distance, between - np.abs(c.x + 2))
    np.maximum(chest.pleural_distance, 3 - chest.above_diaphragm, out=chest.pleural_distance)
    chest.lung_fraction = c.soft(chest.pleural_distance)
    tissue = a.lung_hu - np.float32(a.lung_gradient / a.half_depth) * c.y + 16 * chest.texture(4, 22)
    if "Emphysema" in chest.findings:
        tissue = empty_lung(chest, tissue)
    c.paint(chest.lung_fraction, tissue)


def paint_mediastinum(chest: Chest) -> None:
    """Paint the large vessels and the oesophagus."""
    c = chest.canvas
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


def paint_heart(chest: Chest) -> None:
    """Paint the heart: an ellipsoid that points to the left, front and foot, as wide as a share of the thorax."""
    a, c = chest.anatomy, chest.canvas
    ratio = a.heart_ratio
    if "Cardiomegaly" in chest.findings:
        ratio = chest.rng_of("Cardiomegaly").uniform(0.58, 0.66)
    tilt, turn = a.heart_angle, math.radians(35)
    long_axis = np.array([-math.cos(tilt) * math.cos(turn), math.cos(tilt) * math.sin(turn), -math.sin(tilt)])
    second = np.cross(long_axis, [0, 0, 1]) / np.linalg.norm(np.cross(long_axis, [0, 0, 1]))
    orientation = np.stack([long_axis, second, np.cross(long_axis, second)])
    shape = np.array([1.12, 0.92, 0.86])
    axes = shape * ratio * a.half_width / np.sqrt(((shape[:, None] * orientation) ** 2).sum(0)[0])
    growth = ratio * a.half_width - 50
    centre = np.array([-0.13 * a.half_width - 0.25 * growth, 14 + 0.12 * growth, -34 + 0.1 * growth])

    distance = c.distance_to_ellipsoid(centre, axes, orientation=orientation)
    np.maximum(distance, chest.cavity_distance + 4, out=distance)
    _paint_pericardium(chest, distance)
    heart = c.soft(distance)
    c.paint(heart, BLOOD + 3 * chest.texture(5, 25))
    if "Cardiomegaly" in chest.findings:
        chest.masks["Cardiomegaly"] = heart > 0.5


def _paint_pericardium(chest: Chest, heart_distance: np.ndarray) -> None:
    """Paint the fat around the heart and, with an effusion, a layer of water around that, thicker at the back."""
    c = chest.canvas
    fat = heart_distance - 3
    outside = np.maximum(fat, chest.cavity_distance + 2)
    if "Pericardial effusion" in chest.findings:
        rng = chest.rng_of("Pericardial effusion")
        thickness = rng.uniform(11, 17) * (1 - 0.25 * np.clip((c.y - 14) / 50, -1, 1))
        layer = np.maximum(fat - thickness.astype(np.float32), chest.cavity_distance + 2)
        layer = np.maximum(layer, c.z - 26)
        fluid = c.soft(layer)
        c.paint(fluid, WATER + rng.uniform(-4, 6))
        chest.masks["Pericardial effusion"] = (fluid > 0.5) & (fat > c.voxel / 2)
        outside = np.minimum(outside, layer)
    c.paint(c.soft(fat), FAT + 15)
    chest.lung_fraction *= 1 - c.soft(outside)


def paint_aorta(chest: Chest) -> None:
    """Paint the ascending aorta, its arch and the descending aorta, with calcified patches of the wall."""
    a, c = chest.anatomy, chest.canvas
    back = -a.half_depth + 38
    arch = np.linspace(0, np.pi, 7)
    start, end = np.array([10, 18, 42]), np.array([-25, back + 6, 42])
    curve = (start + end) / 2 + np.cos(arch)[:, None] * (start - end) / 2 + np.sin(arch)[:, None] * [0, 0, 28]
    descent = [(-27, back, 10), (-26, back - 2, -40), (-20, back - 1, -95), (-12, back, -160)]
    line = np.concatenate([[(4, 16, -8), (14, 22, 16)], curve, descent])
    distance = np.full(c.shape, 99, dtype=np.float32)
    for p, q in pairwise(line):
        box = c.around((p + q) / 2, float(np.linalg.norm(q - p)) / 2 + a.aorta_radius + 2 * c.voxel)
        distance[box] = np.minimum(distance[box], c.distance_to_line(p, q, box))
    aorta = c.soft(distance - a.aorta_radius)
    c.paint(aorta, BLOOD)
    chest.lung_fraction *= 1 - aorta
    if "Arterial wall calcification" in chest.findings:
        paint_calcium(chest, distance, line)


def paint_spine(chest: Chest) -> None:
    """Paint vertebral bodies and discs, the spinal canal, and the neural arches with their processes."""
    a, c = chest.anatomy, chest.canvas
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
    chest.lung_fraction[box] *= 1 - c.soft(body)


def _airway_tree(chest: Chest) -> list[tuple[np.ndarray, float]]:
    """Return (polyline, radius) of the trachea and of the main, lobar and segmental bronchi."""
    rng = np.random.default_rng([chest.patient, 1])
    carina = np.array([2, -16, 46.0])
    tree = [(np.array([[1, -6, 150.0], [1, -10, 100.0], carina]), 8.5)]
    hila = {1: np.array([36, -20, 18.0]), -1: np.array([-42, -22, 14.0])}
    for side, hilum in hila.items():
        tree.append((np.stack([carina, hilum]), 6.5))
        for lobe in (name for name in LOBES if name.startswith("right" if side > 0 else "left")):
            target = chest.lobe_centre(lobe, rng, 12)
            middle = hilum + 0.45 * (target - hilum)
            tree.append((np.stack([hilum, middle]), 4.0))
            for _ in range(3):
                tree.append((np.stack([middle, target + rng.uniform(-28, 28, 3)]), 2.4))
    return tree


def paint_airways(chest: Chest) -> None:
    """Paint the walls and the air of trachea and bronchi; with peribronchial thickening, thick walls."""
    c, tree = chest.canvas, _airway_tree(chest)
    for points, radius in tree:
        c.paint_tube(points, radius + 1.4, 20 if radius > 5 else -250)
    if "Peribronchial thickening" in chest.findings:
        wall = chest.rng_of("Peribronchial thickening").uniform(3, 4.5)
        before = c.hu.copy()
        for points, radius in tree[1:]:
            c.paint_tube(points, radius + wall, 25)
        thickened = c.hu - before > 80
    for points, radius in tree:
        c.paint_tube(points, radius, AIR)
    if "Peribronchial thickening" in chest.findings:
        chest.masks["Peribronchial thickening"] = thickened & (c.hu > -900)


def paint_lung_vessels(chest: Chest) -> None:
    """Paint the arteries and veins of the lungs, which branch from each hilum and taper outwards."""
    c, rng = chest.canvas, np.random.default_rng([chest.patient, 2])
    sides = np.repeat([[1.0], [-1.0]], 14, axis=0)  # (28, 1)
    hila = sides * [40, 0, 0] + [0, -12, 14]
    direction = rng.standard_normal((28, 3)) * [0.6, 0.9, 1.1] + sides * [0.8, 0, 0]
    tips = hila + direction / np.linalg.norm(direction, axis=1, keepdims=True) * rng.uniform(60, 95, (28, 1))
    forks = np.repeat(hila, 4, axis=0) + rng.uniform(0.35, 0.9, (112, 1)) * np.repeat(tips - hila, 4, axis=0)
    branches = tube_points(rng, hila, tips, (4.2, 1.8), 140)
    twigs = tube_points(rng, forks, forks + rng.uniform(-42, 42, (112, 3)), (2.0, 0.9), 30)
    points, volumes = (np.concatenate(parts) for parts in zip(branches, twigs, strict=True))
    vessels = c.splat(points, volumes) * chest.lung_fraction
    if chest.emphysema_fraction is not None:
        vessels *= 1 - 0.7 * chest.emphysema_fraction
    c.paint(vessels, BLOOD)
