"""The image processor's preset "published" against the published preprocessing, computed another way."""

import itertools
import logging

import nibabel
import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from samf import SamfImageProcessor, read_ct
from samf.model.image_processing_samf import PRESETS
from samf.model.published_slices import _warn_of_published


def cubic(x):
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


def scaled(values, length):
    """values (rows, columns) with `length` columns, each weighing all columns by the kernel, widened when it shrinks."""
    count = values.shape[1]
    step = count / length
    centres = (np.arange(length) + 0.5) * step
    weights = cubic((np.arange(count) + 0.5 - centres[:, None]) / max(step, 1))
    return np.clip(np.rint(values @ (weights / weights.sum(axis=1, keepdims=True)).T), 0, 255)


def published_stack(path, count, size):
    """float (count, 3, size, size) in 0..1 and the stored indices, from the stored array alone."""
    stored = np.asanyarray(nibabel.load(path).dataobj)
    depth = stored.shape[2]
    low, high = max(depth // 2 - 72, 0), min(depth // 2 + 72, depth - 1)
    indices = [int(low + (high - low) * i / (count - 1)) for i in range(count)]
    images = []
    for index in indices:
        image = stored[:, :, index].astype(int) % 256  # two's complement keeps the lowest eight bits
        lengths = [int(size * side / min(image.shape)) for side in image.shape]
        image = scaled(scaled(image.astype(float), lengths[1]).T, lengths[0]).T
        top, left = (round((length - size) / 2) for length in lengths)
        images.append(image[top : top + size, left : left + size] / 255)
    return np.repeat(np.array(images)[:, None], 3, axis=1), indices


def write_scan(path, shape, affine=None, seed=0):
    hu = np.random.default_rng(seed).normal(-300, 500, shape).clip(-1024, 3000).astype(np.int16)
    hu[: shape[0] // 2] += 700
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([-0.7, -0.7, 1.5, 1]) if affine is None else affine), path)
    return hu


@pytest.mark.parametrize("shape", [(40, 57, 200), (57, 40, 145), (30, 30, 20), (24, 31, 1)])
def test_images_of_the_published_preprocessing(shape, tmp_path):
    write_scan(tmp_path / "scan.nii.gz", shape)
    processor = SamfImageProcessor(preset="published", size=32)
    batch = processor(tmp_path / "scan.nii.gz", return_tensors="np")
    expected, indices = published_stack(tmp_path / "scan.nii.gz", 24, 32)
    assert batch["pixel_values"].shape == (1, 24, 3, 32, 32) and batch["slice_mask"].all()
    differences = np.abs(batch["pixel_values"][0] - expected) * 255
    assert differences.max() <= 1.01 and differences.mean() < 0.02  # Pillow's weights are whole numbers
    assert batch["slice_indices"][0].tolist() == indices  # stored foot to head


def test_images_that_need_no_scaling_are_exact(tmp_path):
    hu = write_scan(tmp_path / "scan.nii", (224, 229, 150))
    pixels = SamfImageProcessor(preset="published")(tmp_path / "scan.nii")["pixel_values"][0]
    assert pixels.shape == (24, 3, 224, 224)
    for image, index in zip(pixels, np.linspace(3, 147, 24).astype(int), strict=True):
        expected = torch.tensor(hu[:, 2:226, index].astype(int) & 255) / 255  # (229 - 224) / 2 rounds to 2
        torch.testing.assert_close(image, expected.float().expand(3, -1, -1), rtol=0, atol=1e-7)


def test_hu_wrap_as_is_known_of_the_published_cast(tmp_path):
    values = np.array([-1000, -900, -600, -1, 0, 40, 300, 1000])
    hu = np.broadcast_to(values[:, None, None], (8, 8, 3))
    slices = SamfImageProcessor(preset="published", size=8).extract(hu.astype(np.int16))["slices"]
    assert slices[0, 0, :, 0].tolist() == [24, 124, 168, 255, 0, 40, 44, 232]


def test_any_stored_order_is_taken_as_it_is_stored(tmp_path):
    """48 axis orders; the places of the slices are the patient's in each of them."""
    processor = SamfImageProcessor(preset="published", size=16, slices_per_plane=5)
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = 0
            for column, (row, sign) in enumerate(zip(order, signs, strict=True)):
                affine[row, column] = sign * (row + 1)
            affine[:3, 3] = (-7, 30, 4)
            path = tmp_path / "scan.nii"
            hu = write_scan(path, (16, 18, 21), affine)
            volume = read_ct(path)
            np.testing.assert_array_equal(volume.stored_hu(), hu)
            expected, indices = published_stack(path, 5, 16)
            stack = processor.extract(volume)
            assert np.abs(stack["slices"] / 255 - expected).max() <= 1.01 / 255
            normal = order[2]
            assert stack["slice_planes"].tolist() == [(2, 1, 0)[normal]] * 5
            millimetres = [(affine @ [0, 0, index, 1])[normal] for index in indices]
            np.testing.assert_allclose(stack["slice_mm"], millimetres)
            np.testing.assert_array_equal(volume.hu.take(stack["slice_indices"][1], normal).sum(), hu[:, :, 5].sum())


def test_settings_are_saved_and_named(tmp_path):
    processor = SamfImageProcessor(preset="published", size=48, slices_per_plane=7)
    processor.save_pretrained(tmp_path / "saved")
    again = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    assert again.to_dict() == processor.to_dict() and again.settings_hash() == processor.settings_hash()
    assert (again.preset, again.hu_windows, again.do_normalize, again.num_slices) == ("published", None, False, 7)
    others = [SamfImageProcessor(preset=preset, size=48, slices_per_plane=7) for preset in PRESETS]
    assert len({other.settings_hash() for other in others}) == len(PRESETS)
    axial = SamfImageProcessor(planes=("axial",), size=48, slices_per_plane=7)
    assert SamfImageProcessor(preset="paper", size=48, slices_per_plane=7).settings_hash() == axial.settings_hash()


def test_a_window_instead_of_the_wrap(tmp_path):
    hu = np.full((8, 8, 30), 100, dtype=np.int16)
    slices = SamfImageProcessor(preset="published", size=8).extract(hu)["slices"]
    assert slices.shape == (24, 3, 8, 8) and (slices == 100).all()
    windowed = SamfImageProcessor(preset="published", size=8, hu_windows=((0, 200),)).extract(hu)["slices"]
    assert windowed.shape == (24, 1, 8, 8) and (np.abs(windowed.astype(float) - 127.5) == 0.5).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preset": "authors"}, "triplanar, paper, published"),
        ({"preset": "published", "planes": ("coronal",)}, "can't be chosen"),
        ({"preset": "published", "slab": "mip"}, "can't be chosen"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        SamfImageProcessor(**settings)


def test_its_use_warns_once_of_each_fault(caplog):
    _warn_of_published.cache_clear()
    hu = np.zeros((8, 8, 30), dtype=np.int16)
    with caplog.at_level(logging.WARNING):
        for preset in ("triplanar", "published", "published"):
            SamfImageProcessor(preset=preset, size=8).extract(hu)
    assert len(caplog.messages) == 3
    for message, fault in zip(caplog.messages, ("wraps", "middle", "orientation"), strict=True):
        assert fault in message
