"""The slice stack: orientation, geometry, windows, slabs, settings."""

import itertools
import json
import logging
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from samf.model.ct_volume import CTReadError, CTVolume, read_ct
from samf.model.image_processing_samf import EXTRACT_VERSION, PLANES, SLABS, SamfImageProcessor, body_box

SHAPE = (20, 28, 24)
SPACING = (2.0, 1.5, 1.75)
LANDMARK_HU = {"right front head": 900, "left back foot": 500}


@pytest.fixture(scope="module")
def landmarks() -> np.ndarray:
    """RAS+ array of noisy air with a bright box right-front-head and a less bright one left-back-foot."""
    hu = np.random.default_rng(0).integers(-1020, -980, SHAPE, dtype=np.int16)
    hu[15:18, 20:25, 17:22] = LANDMARK_HU["right front head"]
    hu[2:5, 3:8, 2:7] = LANDMARK_HU["left back foot"]
    return hu


def make_volume(hu, spacing=(1.0, 1.0, 1.0)) -> CTVolume:
    return CTVolume(np.asarray(hu, dtype=np.int16), tuple(spacing), np.diag([*spacing, 1.0]), "test")


def all_axis_orders(tmp_path, ras):
    """The same anatomy stored in each of the 48 axis orders, as NIfTI files."""
    origin = np.array([-33.0, 12.0, -250.0])
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            stored = ras.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
            affine = np.eye(4)
            affine[:3, :3] = 0
            affine[:3, 3] = origin
            for column, (row, sign) in enumerate(zip(order, signs, strict=True)):
                affine[row, column] = sign * SPACING[row]
                if sign < 0:
                    affine[row, 3] += SPACING[row] * (SHAPE[row] - 1)
            name = "".join(("LPI", "RAS")[sign > 0][row] for row, sign in zip(order, signs, strict=True))
            nib.save(nib.Nifti1Image(np.ascontiguousarray(stored), affine), tmp_path / f"{name}.nii")
            yield name, tmp_path / f"{name}.nii"


# ---------------------------------------------------------------------------------------------------------- orientation


def test_all_48_axis_orders_give_one_stack(tmp_path, landmarks):
    processor = SamfImageProcessor(slices_per_plane=4, size=48)
    stacks = {name: processor.extract(read_ct(path)) for name, path in all_axis_orders(tmp_path, landmarks)}
    assert len(stacks) == 48
    for name, stack in stacks.items():
        for key, array in stacks["RAS"].items():
            assert np.array_equal(stack[key], array), (name, key)


def quadrant_means(image):
    half = image.shape[0] // 2
    return {
        "top left": image[:half, :half].mean(),
        "top right": image[:half, half:].mean(),
        "bottom left": image[half:, :half].mean(),
        "bottom right": image[half:, half:].mean(),
    }


@pytest.mark.parametrize(
    ("plane", "right_front_head", "left_back_foot"),
    [
        ("axial", "top left", "bottom right"),  # front on top, patient's right on the left
        ("coronal", "top left", "bottom right"),  # head on top, patient's right on the left
        ("sagittal", "top left", "bottom right"),  # head on top, front on the left
    ],
)
def test_landmarks_stand_where_radiologists_expect_them(landmarks, plane, right_front_head, left_back_foot):
    processor = SamfImageProcessor(planes=(plane,), slices_per_plane=2, size=64, slab="mip", hu_windows=((-200, 1000),))
    far_away, near = processor.extract(make_volume(landmarks, SPACING))["slices"][:, 0]
    # Slices run foot→head, back→front and left→right: the second half holds the right-front-head box alone.
    for image, place in ((near, right_front_head), (far_away, left_back_foot)):
        means = quadrant_means(image)
        assert means[place] > 5 and sum(means.values()) == means[place], (plane, means)
    assert near.max() > far_away.max()


def test_each_axis_alone_shows_on_the_right_side():
    """A volume that brightens along one axis only brightens along one image axis, in the right sense."""
    for axis, brighter in (
        (0, {"axial": "left", "coronal": "left"}),
        (1, {"axial": "top", "sagittal": "left"}),
        (2, {"coronal": "top", "sagittal": "top"}),
    ):
        hu = np.zeros((16, 16, 16))
        hu += (np.arange(16) * 50).reshape([-1 if a == axis else 1 for a in range(3)])
        processor = SamfImageProcessor(slices_per_plane=4, size=16, hu_windows=((0, 800),))
        stack = processor.extract(make_volume(hu))
        for plane in PLANES:
            images = stack["slices"][stack["slice_planes"] == PLANES.index(plane), 0].astype(int)
            rows, columns = images[2].mean(axis=1), images[2].mean(axis=0)
            assert (rows[0] > rows[-1]) == (brighter.get(plane) == "top")
            assert (columns[0] > columns[-1]) == (brighter.get(plane) == "left")
            if plane not in brighter:  # the plane's normal: later slices are brighter
                assert (np.diff(images.mean(axis=(1, 2))) > 0).all()


def test_orders_of_one_real_scan_give_one_stack(test_data):
    processor = SamfImageProcessor()
    files = sorted((test_data / "orient").glob("*.nii.gz"))
    assert len(files) == 24
    reference = processor.extract(read_ct(files[0], allow_non_ct=True))  # an MR image
    for path in files[1:]:
        stack = processor.extract(read_ct(path, allow_non_ct=True))
        for key in ("slices", "slice_planes", "slice_positions", "slice_indices"):
            assert np.array_equal(stack[key], reference[key]), (path, key)


def test_real_scan_as_dicom_and_nrrd_gives_one_stack(test_data):
    processor = SamfImageProcessor()
    dicom, nrrd = (
        processor.extract(read_ct(test_data / name)) for name in ("dicom/cip_ct-64_79sl", "ct/cip_ct-64.nrrd")
    )
    np.testing.assert_array_equal(dicom["slices"], nrrd["slices"])
    np.testing.assert_array_equal(dicom["slice_indices"], nrrd["slice_indices"])
    np.testing.assert_allclose(dicom["slice_mm"], nrrd["slice_mm"], atol=1e-3)


def test_real_chest_stands_upright(test_data):
    """Anatomy that has one side only: the heart's, the liver's, and the lungs reaching lowest at the back."""
    volume = read_ct(test_data / "ct/totalseg_chest_cta_1.5mm.nii.gz")
    stack = SamfImageProcessor(hu_windows=((-160, 240),)).extract(volume)
    axial, coronal, sagittal = (stack["slices"][stack["slice_planes"] == plane, 0].astype(float) for plane in range(3))
    heart = axial[8:12].mean(axis=0)[60:130]
    assert heart[:, 112:164].mean() > 1.5 * heart[:, 60:112].mean()  # mostly left of the middle: right in the image
    belly = coronal[12, 150:200]
    assert belly[:, :112].mean() > belly[:, 112:].mean()  # liver against a stomach full of air
    assert coronal[12, 160:200].mean() > coronal[12, 60:130].mean()  # belly below lungs
    right_side = sagittal[15:18, 150:185].mean(axis=0)
    assert right_side[:, 60:110].mean() > 5 * right_side[:, 130:180].mean()  # liver in front, lung behind


# ------------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 2.5), (1.5, 1.0, 0.8), (1.0, 1.0, 5.0)])
def test_a_sphere_stays_round(spacing):
    """Its image in the middle of each plane has the area and the width of a circle in square pixels of known size."""
    radius, extent = 32.0, np.array([90.0, 120.0, 150.0])
    shape = np.rint(extent / spacing).astype(int)
    grids = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing, strict=True)]
    squared = sum(np.square(g) for g in np.meshgrid(*grids, indexing="ij"))
    hu = np.where(squared <= radius**2, 1000, -1000)
    stack = SamfImageProcessor(slices_per_plane=1, hu_windows=((-1000, 1000),)).extract(make_volume(hu, spacing))
    sides = shape * np.array(spacing)
    for normal, image in zip((2, 1, 0), stack["slices"][:, 0], strict=True):
        pixel_mm = np.delete(sides, normal).max() / 224
        inside = image > 127
        assert inside.sum() * pixel_mm**2 == pytest.approx(np.pi * radius**2, rel=0.03)
        tolerance = max(spacing)  # the sphere is made of voxels
        for axis in (0, 1):
            places = np.flatnonzero(inside.any(axis=axis))
            assert (places[-1] - places[0] + 1) * pixel_mm == pytest.approx(2 * radius, abs=tolerance)
            assert (places[-1] + places[0] + 1) / 2 == pytest.approx(112, abs=1)


def test_scale_along_both_sides_is_the_same():
    """Two thin walls a known distance apart, along rows and along columns, of a field that isn't square."""
    hu = np.full((60, 40, 30), -1000)
    hu[[10, 49]] = 2000  # 39 voxels of 2 mm apart
    hu[:, [5, 34]] = 2000  # 29 voxels of 1.5 mm apart
    stack = SamfImageProcessor(planes="axial", slices_per_plane=1, hu_windows=((-1000, 3000),))
    image = stack.extract(make_volume(hu, (2.0, 1.5, 1.0)))["slices"][0, 0].astype(float)
    pixel_mm = 120 / 224
    for profile, distance in ((image[112 - 20 : 112 + 20].min(axis=0), 78.0), (image[:, 80:140].min(axis=1), 43.5)):
        middle = len(profile) // 2
        centres = [
            np.average(np.arange(224)[part], weights=profile[part]) for part in (slice(0, middle), slice(middle, None))
        ]
        assert (centres[1] - centres[0]) * pixel_mm == pytest.approx(distance, abs=0.1)


def test_short_side_is_centred_in_air():
    stack = SamfImageProcessor(planes="axial", slices_per_plane=1, hu_windows=((-1024, 1000),), size=100)
    image = stack.extract(make_volume(np.full((50, 20, 3), 1000)))["slices"][0, 0]
    assert (image[31:69] == 255).all()
    assert (image[:29] == 0).all() and (image[71:] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (300, 2, 2), (1, 40, 7), (2, 500, 3), (40, 41, 42)])
def test_whatever_the_shape_the_image_holds_its_area(shape):
    """Also of a field thinner than a pixel: it becomes a faint line, and neither vanishes nor swells."""
    spacing = (0.5, 1.0, 7.0)
    processor = SamfImageProcessor(slices_per_plane=1, size=32, hu_windows=((-1024, 100),))
    images = processor.extract(make_volume(np.full(shape, 100), spacing))["slices"][:, 0] / 255
    sides = np.array(shape) * spacing
    for normal, image in zip((2, 1, 0), images, strict=True):
        height, width = np.delete(sides, normal)
        area = height * width / max(height, width) ** 2 * 32**2
        assert image.sum() == pytest.approx(area, rel=0.05, abs=0.25)


def test_slices_stand_in_the_middle_of_their_share_of_the_field():
    hu = np.zeros((10, 7, 100))
    volume = CTVolume(
        hu.astype(np.int16), (1, 1, 2), np.array([[1, 0, 0, -5], [0, 1, 0, 3], [0, 0, 2, -90.0], [0, 0, 0, 1]]), "test"
    )
    stack = SamfImageProcessor(slices_per_plane=(4, 7, 20), size=16).extract(volume)
    parts = [{key: array[stack["slice_planes"] == plane] for key, array in stack.items()} for plane in range(3)]
    assert parts[0]["slice_indices"].tolist() == [12, 37, 62, 87]
    np.testing.assert_allclose(parts[0]["slice_positions"], [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(parts[0]["slice_mm"], np.array([12, 37, 62, 87]) * 2 - 90)
    assert parts[1]["slice_indices"].tolist() == list(range(7))
    assert parts[2]["slice_indices"].tolist() == [i // 2 for i in range(20)]  # more slices than voxels: repeats
    assert stack["slices"].dtype == np.uint8 and stack["slice_mm"].dtype == stack["slice_positions"].dtype == np.float32


# --------------------------------------------------------------------------------------------------- windows and slabs


def test_windows_by_hand():
    by_hand = {  # HU: lung -1350..150, mediastinum -160..240, wide -1000..1000
        -2000: (55, 0, 0),  # padding counts as air, -1024: 326 / 1500 * 255 = 55.4
        -1050: (55, 0, 0),
        -1000: (60, 0, 0),  # 350 / 1500 * 255 = 59.5
        -850: (85, 0, 19),
        0: (230, 102, 128),
        80: (243, 153, 138),
        240: (255, 255, 158),
        1000: (255, 255, 255),
        3000: (255, 255, 255),
    }
    processor = SamfImageProcessor(slices_per_plane=1, size=8)
    for hu, expected in by_hand.items():
        slices = processor.extract(make_volume(np.full((4, 4, 4), hu)))["slices"]
        assert (slices == slices[:, :, :1, :1]).all()
        # One grey value either way where the true value is a half.
        assert np.abs(slices[0, :, 0, 0].astype(int) - expected).max() <= (hu in (-1000, 0)), (hu, slices[0, :, 0, 0])


def test_mip_keeps_a_single_bright_voxel():
    rng = np.random.default_rng(3)
    processor = SamfImageProcessor(slices_per_plane=5, size=32, slab="mip", hu_windows=((-1000, 1000),))
    for _ in range(20):
        hu = np.full((32, 32, 32), -1000)
        place = rng.integers(0, 32, 3)
        hu[tuple(place)] = 1000
        stack = processor.extract(make_volume(hu))
        for plane, normal in enumerate((2, 1, 0)):
            images = stack["slices"][stack["slice_planes"] == plane, 0]
            bright = np.argwhere(images == 255)
            row, column = (axis for axis in (2, 1, 0) if axis != normal)
            assert bright[:, 1:].tolist() == [[31 - place[row], 31 - place[column]]]
            centres = (np.arange(5) + 0.5) * 32 / 5
            assert abs(centres[bright[0, 0]] - (place[normal] + 0.5)) <= 32 / 5 / 2 + 1e-9


def test_mean_slabs_share_out_every_voxel_once():
    hu = np.random.default_rng(4).integers(-1000, 1000, (30, 30, 30))
    volume = make_volume(hu)
    processor = SamfImageProcessor(slices_per_plane=7, size=30, slab="mean", hu_windows=((-1024, 1200),))
    stack = processor.extract(volume)
    centres = (np.arange(30) + 0.5) / 30
    nearest = np.abs(centres[:, None] - (np.arange(7) + 0.5) / 7).argmin(axis=1)
    for plane, normal in enumerate((2, 1, 0)):
        images = stack["slices"][stack["slice_planes"] == plane, 0] / 255 * 2224 - 1024
        for i, image in enumerate(images):
            expected = np.moveaxis(hu, normal, 0)[nearest == i].mean(axis=0).T[::-1, ::-1]
            np.testing.assert_allclose(image, expected, atol=2224 / 255 / 2 + 1e-3)


def test_slab_none_is_the_slice_itself():
    hu = np.random.default_rng(5).integers(-1000, 1000, (12, 12, 12))
    stack = SamfImageProcessor(slices_per_plane=3, size=12, hu_windows=((-1000, 1040),)).extract(make_volume(hu))
    for s in range(9):
        normal = (2, 1, 0)[stack["slice_planes"][s]]
        expected = np.moveaxis(hu, normal, 0)[stack["slice_indices"][s]].T[::-1, ::-1]
        np.testing.assert_allclose(stack["slices"][s, 0] / 255 * 2040 - 1000, expected, atol=4.01)


def test_each_window_can_have_a_slab_of_its_own(tmp_path):
    """Each channel is that of a processor with its slab for all channels."""
    volume = make_volume(np.random.default_rng(9).integers(-1000, 1000, (20, 22, 24)), SPACING)
    settings = {"slices_per_plane": 5, "size": 24}
    uniform = {slab: SamfImageProcessor(slab=slab, **settings).extract(volume)["slices"] for slab in SLABS}
    for slabs in itertools.product(SLABS, repeat=3):
        mixed = SamfImageProcessor(slab=slabs, **settings)
        expected = np.stack([uniform[slab][:, channel] for channel, slab in enumerate(slabs)], axis=1)
        np.testing.assert_array_equal(mixed.extract(volume)["slices"], expected)
    names = [SamfImageProcessor(slab=slab).settings_hash() for slab in ("mip", ("mip",) * 3, ["mip", "mean", "mean"])]
    assert names[0] == names[1] != names[2]
    SamfImageProcessor(slab=("mip", "mean", "none")).save_pretrained(tmp_path)
    assert SamfImageProcessor.from_pretrained(tmp_path).slab == ("mip", "mean", "none")


MEMORY_ORDERS = list(itertools.permutations(range(3)))


@pytest.mark.parametrize("order", MEMORY_ORDERS)
@pytest.mark.parametrize("shape", [(23, 31, 27), (5, 31, 27), (31, 3, 2)])
def test_how_a_volume_lies_in_memory_changes_nothing(order, shape):
    """Slabs along each axis take other ways through memory; also where there are fewer voxels than slices."""
    hu = np.random.default_rng(6).integers(-3000, 4000, shape).astype(np.int16)
    stored = np.ascontiguousarray(hu[::-1, :, ::-1].transpose(order)).transpose(np.argsort(order))[::-1, :, ::-1]
    for slab in SLABS:
        processor = SamfImageProcessor(slices_per_plane=6, size=24, slab=slab)
        plain, turned = (processor.extract(make_volume(array, SPACING))["slices"] for array in (hu, stored))
        np.testing.assert_array_equal(plain, turned)


@pytest.mark.parametrize("slab", ["mean", "mip"])
def test_no_small_nodule_falls_between_slices(slab):
    """4 mm of soft tissue in the lung of a chest of 300 mm shows in each plane, wherever it lies; without slabs it may not."""
    spacing, shape = (1.0, 1.0, 1.0), (300, 240, 300)
    lung = np.random.default_rng(7).normal(-850, 20, shape).astype(np.int16)
    rng, processor = np.random.default_rng(8), SamfImageProcessor(slab=slab, hu_windows=((-1000, 0),))
    before, single = processor.extract(make_volume(lung, spacing)), SamfImageProcessor(hu_windows=((-1000, 0),))
    missed = 0
    for _ in range(4):
        centre = rng.uniform(5, np.array(shape) - 5)
        box = tuple(slice(int(c) - 3, int(c) + 5) for c in centre)
        grid = np.meshgrid(*(np.arange(side.start, side.stop) for side in box), indexing="ij")
        nodule = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= 2**2
        assert 25 <= nodule.sum() <= 42  # the sphere has 33.5 mm³
        hu = lung.copy()
        hu[box][nodule] = 40
        after = processor.extract(make_volume(hu, spacing))
        brighter = (after["slices"].astype(int) - before["slices"]).max(axis=(1, 2, 3))
        for plane in range(3):
            shown = brighter[after["slice_planes"] == plane]
            assert (shown > 25).sum() in (1, 2), (slab, plane, shown)  # tenfold the noise that is left
        plain = (single.extract(make_volume(x, spacing))["slices"].astype(int) for x in (hu, lung))
        missed += int(np.abs(np.subtract(*plain)).reshape(3, -1).max(axis=1).min() == 0)
    assert missed  # the slabs are needed


def test_shrinking_averages_instead_of_skipping():
    """A checkerboard of single voxels becomes even grey."""
    hu = np.indices((64, 64, 64)).sum(axis=0) % 2 * 1000
    image = SamfImageProcessor(slices_per_plane=1, size=16, hu_windows=((0, 1000),)).extract(make_volume(hu))["slices"]
    assert np.abs(image[:, 0, 2:-2, 2:-2].astype(int) - 127).max() <= 6


# ----------------------------------------------------------------------------------------------------- the body's field


def body_on_a_table(shape=(120, 110, 60), spacing=(3.0, 3.0, 4.0)) -> CTVolume:
    """An elliptic cylinder of tissue with two lungs, 210 x 150 mm, in air; behind it a table of two thin shells."""
    x, y, _ = np.meshgrid(*((np.arange(n) - n / 2) * mm for n, mm in zip(shape, spacing, strict=True)), indexing="ij")
    hu = np.full(shape, -1000, dtype=np.int16)
    hu[(x / 105) ** 2 + ((y - 30) / 75) ** 2 <= 1] = 40
    for side in (-45, 45):
        hu[((x - side) / 35) ** 2 + ((y - 30) / 50) ** 2 <= 1] = -850
    hu[:, 12:14] = hu[:, 22:24] = 100  # 6 mm each, as wide as the field
    return make_volume(hu, spacing)


def test_the_bodys_box_leaves_air_and_table_out():
    volume = body_on_a_table()
    x, y, z = body_box(volume)
    mm = 3.0
    assert x.start * mm == pytest.approx(180 - 105, abs=8) and x.stop * mm == pytest.approx(180 + 105, abs=8)
    assert y.start * mm == pytest.approx(165 + 30 - 75, abs=8) and y.stop * mm == pytest.approx(165 + 30 + 75, abs=8)
    assert (z.start, z.stop) == (0, 60)  # the body goes on beyond the field
    tissue = np.argwhere(volume.hu[:, 30:] > 0) + [0, 30, 0]
    assert (tissue.min(axis=0) >= [x.start, y.start, z.start]).all()
    assert (tissue.max(axis=0) < [x.stop, y.stop, z.stop]).all()


def test_the_bodys_field_is_what_a_cropped_volume_gives():
    upright = body_on_a_table()
    turn = np.eye(4)  # a little oblique: then a slice's place depends on where its own middle lies
    turn[:2, :2] = [[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]
    volume = CTVolume(upright.hu, upright.spacing, turn @ upright.affine, "turned")
    box = body_box(volume)
    shift = np.eye(4)
    shift[:3, 3] = [side.start for side in box]
    cropped = CTVolume(volume.hu[box], volume.spacing, volume.affine @ shift, "cropped")
    for slab in SLABS:
        body, full = (
            SamfImageProcessor(field=field, slab=slab, slices_per_plane=5, size=64).extract(v)
            for field, v in (("body", volume), ("full", cropped))
        )
        for key in ("slices", "slice_positions", "slice_planes"):
            np.testing.assert_array_equal(body[key], full[key])
        np.testing.assert_allclose(body["slice_mm"], full["slice_mm"], atol=1e-3)
        starts = np.array([box[normal].start for normal in (2, 1, 0)])[body["slice_planes"]]
        np.testing.assert_array_equal(body["slice_indices"], full["slice_indices"] + starts)


def test_two_legs_are_one_body_and_a_small_thing_beside_is_none():
    hu = np.full((100, 60, 40), -1000)
    hu[10:30, 20:40] = hu[65:80, 22:42] = 50
    hu[90:98, 50:58, :10] = 50
    x, y, _ = body_box(make_volume(hu, (4.0, 4.0, 4.0)))
    assert (x.start, x.stop) == pytest.approx((10, 80), abs=1) and (y.start, y.stop) == pytest.approx((20, 42), abs=1)


def test_a_body_in_two_slices_is_found():
    hu = np.full((60, 60, 2), -1000)
    hu[20:40, 30:50] = 50
    x, y, z = body_box(make_volume(hu, (4.0, 4.0, 5.0)))
    assert (x.start, x.stop) == pytest.approx((20, 40), abs=1) and (y.start, y.stop) == pytest.approx((30, 50), abs=1)
    assert (z.start, z.stop) == (0, 2)


@pytest.mark.parametrize(
    "hu", [np.full((30, 20, 10), -1000), np.full((30, 20, 10), 50), np.full((1, 1, 1), 50), np.full((40, 2, 40), 50)]
)
def test_without_air_or_without_a_body_the_field_is_the_whole_volume(hu):
    volume = make_volume(hu)
    assert [(side.start, side.stop) for side in body_box(volume)] == [(0, n) for n in hu.shape]
    stacks = [
        SamfImageProcessor(field=field, slices_per_plane=3, size=16).extract(volume) for field in ("body", "full")
    ]
    for key, array in stacks[0].items():
        np.testing.assert_array_equal(array, stacks[1][key])


def test_real_bodies_are_found(test_data):
    """A patient with arms at the sides on a two-shelled table, and a chest whose field fits the body from side to side."""
    volume = read_ct(test_data / "dicom/totalseg_abdomen_20sl_j2k")
    x, y, z = body_box(volume)
    assert x.stop - x.start > 500 and (z.start, z.stop) == (0, 20)
    assert y.stop - y.start < 0.55 * 512
    # The outer shell lies behind the box, the belly's front within it.
    shell = np.flatnonzero((volume.hu[200:300] > 0).mean(axis=(0, 2)) > 0.5)
    assert shell.min() < y.start
    front = np.flatnonzero((volume.hu[200:300] > -100).mean(axis=(0, 2)) > 0.3).max()
    assert y.stop - 20 < front < y.stop
    chest = body_box(read_ct(test_data / "ct/pyradiomics_lung1.nrrd"))
    assert (chest[0].start, chest[0].stop) == (0, 512) and chest[1].stop - chest[1].start < 400


# ------------------------------------------------------------------------------------------------------- model inputs


@pytest.fixture(scope="module")
def small() -> SamfImageProcessor:
    return SamfImageProcessor(slices_per_plane=2, size=16)


def test_rescale_and_normalise_by_hand(small, landmarks):
    pixels = small.extract(make_volume(landmarks))["slices"].astype(np.float64)
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    settings = {
        (): (pixels / 255 - mean) / std,
        (("do_normalize", False),): pixels / 255,
        (("do_rescale", False), ("do_normalize", False)): pixels,
        (("rescale_factor", -1.0), ("do_normalize", False)): -pixels,
        (("image_mean", 0.5), ("image_std", (0.5, 0.5, 1.0))): (pixels / 255 - 0.5)
        / np.array([0.5, 0.5, 1])[:, None, None],
    }
    for changes, expected in settings.items():
        output = small(make_volume(landmarks), return_tensors="pt", **dict(changes))
        np.testing.assert_allclose(output["pixel_values"][0].numpy(), expected, atol=1e-4)
    assert small.do_rescale and small.do_normalize  # a call changes nothing for the next


def test_normalize_gives_any_slices_the_pixel_values_of_the_encoder(small, landmarks):
    """In place and for any leading dimensions, as training on cached slices needs it."""
    slices = torch.from_numpy(small.extract(make_volume(landmarks))["slices"])
    expected = small(make_volume(landmarks))["pixel_values"][0]
    pixels = slices.float()
    assert small.normalize_(pixels) is pixels and torch.equal(pixels, expected)
    assert torch.equal(small.normalize_(slices[None, :1].float()), expected[None, :1])
    plain = SamfImageProcessor(slices_per_plane=2, size=16, do_rescale=False, do_normalize=False)
    assert torch.equal(plain.normalize_(slices.float()), slices.float())


def test_calls_take_all_kinds_of_volumes(small, landmarks, tmp_path):
    volume = make_volume(landmarks)
    nib.save(nib.Nifti1Image(landmarks, np.eye(4)), tmp_path / "scan.nii.gz")
    kinds = [
        volume,
        landmarks,
        torch.from_numpy(landmarks),
        landmarks.astype(np.float32),
        str(tmp_path / "scan.nii.gz"),
        tmp_path / "scan.nii.gz",
        nib.load(tmp_path / "scan.nii.gz"),
        small.extract(volume),
    ]
    batch = small(kinds)
    assert batch["pixel_values"].shape == (8, 6, 3, 16, 16) and batch["pixel_values"].dtype == torch.float32
    for name in ("slice_mask", "slice_planes", "slice_positions", "slice_indices", "slice_mm"):
        assert batch[name].shape == (8, 6)
    assert (batch["pixel_values"] == batch["pixel_values"][:1]).all() and batch["slice_mask"].all()
    for one in kinds:
        assert torch.equal(small(one)["pixel_values"], batch["pixel_values"][:1])
    assert set(small.model_input_names) <= set(batch)
    assert isinstance(small(volume, return_tensors="np")["pixel_values"], np.ndarray)


def test_stacks_of_different_length_are_padded_and_masked(small, landmarks):
    longer = SamfImageProcessor(slices_per_plane=3, size=16).extract(make_volume(landmarks))
    batch = small([small.extract(make_volume(landmarks)), longer])
    assert batch["slice_mask"].sum(dim=1).tolist() == [6, 9]
    assert not batch["slice_mask"][0, 6:].any() and (batch["pixel_values"][0, 6:] == 0).all()
    assert torch.equal(batch["pixel_values"][:1, :6], small(make_volume(landmarks))["pixel_values"])


def test_bad_calls_say_what_is_wrong(small, landmarks, tmp_path):
    with pytest.raises(TypeError, match="do_convert_rgb"):
        small(landmarks, do_convert_rgb=True)
    with pytest.raises(CTReadError, match="4-D"):
        small(np.zeros((2, 3, 4, 5)))
    with pytest.raises(CTReadError, match="missing.nii.gz"):
        small([landmarks, tmp_path / "missing.nii.gz"])
    with pytest.raises(ValueError, match=r"\(3, 16, 16\)"):
        small(SamfImageProcessor(slices_per_plane=2, size=24).extract(make_volume(landmarks)))
    with pytest.raises(ValueError, match="no volume"):
        small([])


def test_the_volume_is_not_changed_and_not_remembered(small, landmarks):
    volume = make_volume(landmarks.copy())
    first = small(volume)["pixel_values"]
    small(make_volume(np.zeros(SHAPE)))
    assert torch.equal(small(volume)["pixel_values"], first)
    np.testing.assert_array_equal(volume.hu, landmarks)


def test_threads_change_nothing(landmarks):
    before, made = torch.get_num_threads(), {}
    try:
        for threads, slab in itertools.product((1, 4), SLABS):
            torch.set_num_threads(threads)
            processor = SamfImageProcessor(slices_per_plane=5, size=57, slab=slab)
            made[threads, slab] = processor.extract(make_volume(landmarks, SPACING))["slices"]
    finally:
        torch.set_num_threads(before)
    for slab in SLABS:
        np.testing.assert_array_equal(made[1, slab], made[4, slab])


def test_what_goes_wrong_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    volume = make_volume(np.zeros((8, 8, 8)))
    processor = SamfImageProcessor(slices_per_plane=2, size=8)
    processor.hu_windows = ((0, 1), "broken")
    with pytest.raises(ValueError, match="unpack"):
        processor.extract(volume)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"planes": ("axial", "oblique")}, "oblique"),
        ({"planes": ()}, "planes="),
        ({"planes": ("axial", "axial")}, "at most once"),
        ({"slices_per_plane": 0}, "positive"),
        ({"slices_per_plane": (24, 24)}, "for 3 planes"),
        ({"slices_per_plane": 2.5}, "whole|iterable"),
        ({"hu_windows": ((150, -1350),)}, "low below high"),
        ({"hu_windows": ()}, "empty"),
        ({"hu_windows": ((-1000, 1000),), "image_mean": (0.1, 0.2, 0.3)}, "3 values for 1 HU windows"),
        ({"slab": "median"}, "none, mean, mip"),
        ({"slab": ("mip", "median", "mean")}, "none, mean, mip"),
        ({"slab": ("mip", "mean")}, "3 HU windows"),
        ({"field": "lungs"}, "full, body"),
        ({"preset": "published", "field": "body"}, "can't be chosen"),
        ({"orientation": {"axial": "LRAP"}}, "orientation=.*can't be set"),
        ({"pixel_spacing": 0.7}, "pixel_spacing=0.7"),
        ({"version": EXTRACT_VERSION + 1}, "newer code"),
        ({"version": "1"}, "version=1"),
        ({"size": {"height": 224, "width": 112}}, "equal"),
        ({"size": 0}, "positive"),
        ({"image_std": 0.0}, "positive"),
        ({"slice_count": 3}, "no setting slice_count"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        SamfImageProcessor(**settings)


def test_settings_hash_follows_what_changes_the_pixels():
    base = SamfImageProcessor()
    same = [
        SamfImageProcessor(slices_per_plane=(24, 24, 24)),
        SamfImageProcessor(hu_windows=[[-1350, 150], [-160, 240], [-1000, 1000]], planes=list(PLANES)),
        SamfImageProcessor(hu_windows=((-1350.0, 150.0), (-160.0, 240.0), (-1000.0, 1000.0))),
        SamfImageProcessor(do_normalize=False, image_mean=0.1, size={"height": 224, "width": 224}),
    ]
    other = [
        SamfImageProcessor(slices_per_plane=23),
        SamfImageProcessor(slab="mip"),
        SamfImageProcessor(field="body"),
        SamfImageProcessor(size=112),
        SamfImageProcessor(planes=("coronal", "axial", "sagittal")),
        SamfImageProcessor(hu_windows=((-1350, 151), (-160, 240), (-1000, 1000))),
    ]
    assert {p.settings_hash() for p in same} == {base.settings_hash()}
    assert len({p.settings_hash() for p in [base, *other]}) == 7


ODD_SETTINGS = {
    "planes": ("sagittal", "axial"),
    "slices_per_plane": (3, 5),
    "hu_windows": ((-1000, -500.5), (0, 80)),
    "field": "body",
    "slab": "mean",
    "size": 40,
    "rescale_factor": 1 / 127.5,
    "do_normalize": False,
    "image_mean": (0.25, 0.75),
}


def test_settings_survive_saving(tmp_path):
    first = SamfImageProcessor(**ODD_SETTINGS)
    first.save_pretrained(tmp_path)
    second = SamfImageProcessor.from_pretrained(tmp_path)
    assert second.to_dict() == first.to_dict() and second.settings_hash() == first.settings_hash()
    for name, value in ODD_SETTINGS.items():
        assert getattr(second, name) == value, name
    changed = SamfImageProcessor.from_pretrained(tmp_path, slab="mip", do_normalize=True)
    assert changed.slab == "mip" and changed.do_normalize and changed.size == 40


def test_the_saved_file_says_what_the_images_are(tmp_path):
    """Window, spacing, order and version stand in the file that others read."""
    SamfImageProcessor().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert saved["hu_windows"] == [[-1350, 150], [-160, 240], [-1000, 1000]]
    assert saved["planes"] == list(PLANES) and (saved["field"], saved["slab"], saved["size"]) == ("full", "none", 224)
    assert saved["orientation"] == {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
    assert "longer side of the field in mm" in saved["pixel_spacing"]
    assert saved["version"] == EXTRACT_VERSION
    changed = SamfImageProcessor.from_pretrained(tmp_path, planes=("axial",))  # what is described follows
    assert changed.planes == ("axial",)
    SamfImageProcessor(preset="published").save_pretrained(tmp_path / "published")
    saved = json.loads((tmp_path / "published/preprocessor_config.json").read_text(encoding="utf-8"))
    assert saved["orientation"] == "as stored" and "shorter side" in saved["pixel_spacing"]


def test_files_saved_before_there_were_fields_and_versions_load_as_they_were(tmp_path):
    SamfImageProcessor(**ODD_SETTINGS).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    for key in ("field", "version", "orientation", "pixel_spacing"):
        del saved[key]
    path.write_text(json.dumps(saved), encoding="utf-8")
    loaded = SamfImageProcessor.from_pretrained(tmp_path)
    assert loaded.field == "full"
    assert loaded.settings_hash() == SamfImageProcessor(**{**ODD_SETTINGS, "field": "full"}).settings_hash()
    # The hash that these settings had then: caches stay good.
    assert SamfImageProcessor().settings_hash() == "2fac67b08d5815eb"


def test_another_codes_file_is_warned_of_or_refused(tmp_path, caplog):
    SamfImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**saved, "version": EXTRACT_VERSION - 1}), encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="samf.model.image_processing_samf"):
        assert SamfImageProcessor.from_pretrained(tmp_path).to_dict()["version"] == EXTRACT_VERSION
    assert f"version {EXTRACT_VERSION - 1}" in caplog.text
    path.write_text(json.dumps({**saved, "version": EXTRACT_VERSION + 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="newer code.*Update samf"):
        SamfImageProcessor.from_pretrained(tmp_path)


def test_auto_class_finds_it_in_this_process(tmp_path):
    SamfImageProcessor(**ODD_SETTINGS).save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).size == 40


def test_saved_folder_works_as_remote_code_in_a_fresh_process(tmp_path, landmarks):
    """Nothing of this package may be imported there: the code in the folder must be enough."""
    processor = SamfImageProcessor(**ODD_SETTINGS)
    processor.save_pretrained(tmp_path / "repo")
    assert {"ct_volume.py", "image_processing_samf.py"} <= {path.name for path in (tmp_path / "repo").iterdir()}
    np.save(tmp_path / "volume.npy", landmarks)
    script = (
        "import sys, numpy as np\n"
        "from transformers import AutoImageProcessor\n"
        f"p = AutoImageProcessor.from_pretrained({str(tmp_path / 'repo')!r}, trust_remote_code=True)\n"
        f"v = np.load({str(tmp_path / 'volume.npy')!r})\n"
        f"np.save({str(tmp_path / 'pixels.npy')!r}, p(v, return_tensors='np')['pixel_values'])\n"
        "assert 'samf' not in sys.modules, 'imported from the installed package'\n"
        f"p.save_pretrained({str(tmp_path / 'again')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=_offline(tmp_path), timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "pixels.npy"), processor(landmarks)["pixel_values"].numpy())
    assert {path.name for path in (tmp_path / "again").iterdir()} >= {"ct_volume.py", "image_processing_samf.py"}


def _offline(home):
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf")}
