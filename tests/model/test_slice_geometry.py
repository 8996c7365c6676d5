"""Where a voxel is seen, and as what: places, windows and limits from millimetres and HU alone, computed by hand."""

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.affines import apply_affine

from samf.model.ct_volume import CTVolume
from samf.model.image_processing_samf import PLANES, SLABS, SamfImageProcessor, body_box

AIR, BRIGHT = -1024, 3071
# A plane's normal, and the axes of its rows and columns, both of which run against the RAS+ axes.
AXES = {"axial": (2, 1, 0), "coronal": (1, 2, 0), "sagittal": (0, 2, 1)}


def make_volume(hu, spacing=(1.0, 1.0, 1.0), affine=None) -> CTVolume:
    affine = np.diag([*spacing, 1.0]) if affine is None else affine
    return CTVolume(np.asarray(hu, dtype=np.int16), tuple(spacing), affine, "test")


@pytest.mark.parametrize(
    ("shape", "spacing", "size"),
    [
        ((20, 16, 12), (1.0, 1.0, 1.0), 40),  # two pixels a voxel and more
        ((40, 24, 32), (1.0, 1.0, 1.0), 20),  # two voxels a pixel and fewer
        ((24, 24, 12), (1.0, 1.0, 2.0), 24),  # a voxel a pixel in the axial plane
        ((21, 16, 11), (0.8, 1.1, 2.0), 50),
    ],
)
def test_a_marked_voxel_stands_where_its_millimetres_say(shape, spacing, size):
    """Its distance from the middle of the field in square pixels, of which the longer side fills `size`; in its own slice.

    The shorter side is centred: exactly where voxels and the air beside them are whole pixels, else within half a pixel.
    """
    rng, exact = np.random.default_rng(0), 0
    processor = SamfImageProcessor(slices_per_plane=shape[::-1], size=size, hu_windows=((AIR, BRIGHT),))
    for place in rng.integers(3, np.array(shape) - 3, (3, 3)):
        hu = np.full(shape, AIR)
        hu[tuple(place)] = BRIGHT
        stack = processor.extract(make_volume(hu, spacing))
        for number, plane in enumerate(PLANES):
            normal, *sides = AXES[plane]
            images = stack["slices"][stack["slice_planes"] == number, 0].astype(float)
            assert np.flatnonzero(images.any(axis=(1, 2))).tolist() == [place[normal]]
            image = images[place[normal]]
            pixel_mm = max(shape[axis] * spacing[axis] for axis in sides) / size
            for axis, profile in zip(sides, (image.sum(axis=1), image.sum(axis=0)), strict=True):
                pixels = spacing[axis] / pixel_mm  # of one voxel
                middle = size / 2 + (shape[axis] / 2 - (place[axis] + 0.5)) * pixels
                air = (size - shape[axis] * pixels) / 2
                whole = abs(air) < 1e-6 or (pixels in (0.5, 1, 2) and air.is_integer())
                exact += whole
                found = np.average(np.arange(size) + 0.5, weights=profile)
                sampling = 0.1 if pixels < 1 else 0.05  # pixels that average voxels share out what lies between them
                assert found == pytest.approx(middle, abs=sampling + 0.5 * (not whole)), (plane, place, axis)
    assert exact >= 9  # the longer sides at least


@pytest.mark.parametrize("memory", ["C", "F"])
@pytest.mark.parametrize("slab", SLABS)
def test_values_are_limited_to_what_twelve_bits_hold(slab, memory):
    """A scanner's 12 bits are -1024 to 3071 HU: padding below and metal above count as those, before anything is averaged."""
    processor = SamfImageProcessor(
        slices_per_plane=4, size=8, slab=slab, hu_windows=((3000, 4000), (-1100, -1000), (0, 2048)), planes=("axial",)
    )

    def greys(hu: np.ndarray) -> list[int]:
        volume = make_volume(np.array(hu, order=memory, dtype=np.int16))
        return processor.extract(volume)["slices"][:, :, 4, 4].tolist()

    # (3071 - 3000) / 1000 · 255 = 18.1; (-1024 + 1100) / 100 · 255 = 193.8
    assert greys(np.full((8, 8, 16), 20000)) == [[18, 255, 255]] * 4
    assert greys(np.full((8, 8, 16), -20000)) == [[0, 194, 0]] * 4
    if slab == "mean":
        hu = np.full((8, 8, 16), AIR)
        hu[:, :, ::2] = 20000
        # (3071 - 1024) / 2 = 1023.5; 1023.5 / 2048 · 255 = 127.4
        assert greys(hu) == [[0, 255, 127]] * 4


@pytest.mark.parametrize(("hu", "tissue"), [(-295, True), (-305, False)])
def test_what_is_denser_than_300_below_water_is_body(hu, tissue):
    volume = np.full((60, 60, 20), -1000)
    volume[10:50, 20:40] = hu
    box = [limit for side in body_box(make_volume(volume, (4.0, 4.0, 4.0))) for limit in (side.start, side.stop)]
    assert box == pytest.approx([10, 50, 20, 40, 0, 20] if tissue else [0, 60, 0, 60, 0, 20], abs=1)


@pytest.mark.parametrize(("columns", "counts"), [(22, True), (18, False)])
def test_a_part_counts_as_body_from_a_quarter_of_the_largest_on(columns, counts):
    """Two bars through the whole field, of 20 x 20 and 5 x `columns` grid points of 4 mm: 27.5 or 22.5 % as large."""
    volume = np.full((60, 80, 20), -1000)
    volume[5:25, 10:30] = 40
    volume[40:45, 10 : 10 + columns] = 40
    x = body_box(make_volume(volume, (4.0, 4.0, 4.0)))[0]
    assert (x.start, x.stop) == pytest.approx((5, 45 if counts else 25), abs=1)


@pytest.mark.parametrize("field", ["full", "body"])
def test_a_slice_of_a_turned_volume_lies_where_its_own_centre_lies(field):
    """Millimetres of the centre of what a image shows, along the plane's normal; the corners are up to 20 mm off."""
    shape, spacing = (40, 50, 30), (4.0, 4.0, 5.0)
    hu = np.full(shape, -1000)
    hu[6:25, 10:48, :] = 40
    turn = nib.eulerangles.euler2mat(0.1, -0.08, 0.12)
    affine = nib.affines.from_matvec(turn @ np.diag(spacing), (-80, 35, 910))
    volume = make_volume(hu, spacing, affine)
    stack = SamfImageProcessor(slices_per_plane=5, size=16, field=field).extract(volume)
    box = body_box(volume) if field == "body" else tuple(slice(0, count) for count in shape)
    for plane, index, mm in zip(stack["slice_planes"], stack["slice_indices"], stack["slice_mm"], strict=True):
        normal = AXES[PLANES[plane]][0]
        centre = np.array([np.mean(range(side.start, side.stop)) for side in box])
        centre[normal] = index
        assert mm == pytest.approx(apply_affine(affine, centre)[normal], abs=1e-3)


def test_a_setting_of_none_in_a_call_is_the_processors_own():
    """As elsewhere in the library; the processor's own settings here are none of the defaults."""
    settings = {
        "planes": ("sagittal", "axial"),
        "slices_per_plane": (1, 2),
        "hu_windows": ((-900, 100),),
        "field": "body",
        "slab": "mip",
        "size": 12,
        "do_rescale": False,
        "rescale_factor": 0.5,
        "do_normalize": True,
        "image_mean": 3.0,
        "image_std": 2.0,
    }
    processor = SamfImageProcessor(**settings)
    hu = np.random.default_rng(0).integers(-1000, 400, (14, 12, 10)).astype(np.int16)
    expected = processor(hu)
    for given in (dict.fromkeys(settings), *({name: None} for name in settings)):
        found = processor(hu, **given)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items()), given
