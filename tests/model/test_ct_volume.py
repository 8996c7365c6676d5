"""Reading CT volumes: values, geometry, and the errors of what is refused."""

import bz2
import errno
import gc
import gzip
import logging
import os
import zipfile
import zlib
from fractions import Fraction

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from samf.model import ct_streams
from samf.model.ct_common import VolumeRef, scale_to_hu
from samf.model.ct_intensity import to_hu
from samf.model.ct_nifti import read_nifti
from samf.model.ct_volume import AIR_HU, CTReadError, CTVolume, judge_intensity, read_ct, to_ct_volume

SHAPE = (9, 7, 5)
SPACING = (0.75, 1.25, 2.5)
ORIGIN = (-20.0, 30.0, -400.0)


def ramp(shape=SHAPE, dtype=np.int16) -> np.ndarray:
    """A volume in which every voxel differs."""
    return (np.arange(np.prod(shape)).reshape(shape) - 100).astype(dtype)


def ras_affine(spacing=SPACING, origin=ORIGIN) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def save_nifti(path, array, affine=None, **header):
    image = nib.Nifti1Image(array, ras_affine() if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def memory_map_under(array):
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array


# ------------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL", "PIR", "IRP"])
def test_axes_become_ras_and_affine_follows_every_voxel(tmp_path, codes):
    stored = ramp()
    rows = [{"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}[code] for code in codes]
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for column, (row, code) in enumerate(zip(rows, codes, strict=True)):
        affine[row, column] = SPACING[column] * (1 if code in "RAS" else -1)
    affine[:3, 3] = ORIGIN
    volume = read_ct(save_nifti(tmp_path / "scan.nii.gz", stored, affine))

    assert volume.shape == tuple(SHAPE[rows.index(row)] for row in range(3))
    np.testing.assert_allclose(volume.spacing, [SPACING[rows.index(row)] for row in range(3)])
    assert (np.diag(volume.affine) > 0).all()
    for index in np.ndindex(SHAPE):  # the same value is at the same place in space
        place = affine @ [*index, 1]
        i, j, k = np.rint(np.linalg.solve(volume.affine, place)[:3]).astype(int)
        assert volume.hu[i, j, k] == stored[index]


def world_ramp(affine, shape=(16, 14, 12)) -> np.ndarray:
    """HU that grow linearly through the room, which linear interpolation gives exactly: 6, -4 and 5 HU a mm."""
    indices = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return np.rint((indices @ affine[:3, :3].T + affine[:3, 3]) @ (6, -4, 5)).astype(np.int16)


def rotated(degrees, shear=0.0) -> np.ndarray:
    """Turned about the head-foot axis, the second axis leaning over by `shear` degrees."""
    angle, lean = np.deg2rad(degrees), np.deg2rad(shear)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    skew = np.array([[1, 0, 0], [0, np.cos(lean), 0], [0, np.sin(lean), 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ skew @ np.diag([-0.75, 1.25, 2.5])
    return affine


def test_axes_that_miss_right_angles_by_a_hair_are_kept(tmp_path):
    """ITK refuses such headers; rounding makes them."""
    affine = rotated(0, 0.4)
    volume = read_ct(save_nifti(tmp_path / "nearly.nii.gz", ramp(), affine))
    np.testing.assert_array_equal(volume.hu, ramp()[::-1])
    np.testing.assert_allclose(volume.spacing, np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-6)


def test_axes_to_front_foot_and_left_are_turned(tmp_path):
    affine = np.zeros((4, 4))
    affine[[1, 2, 0, 3], [0, 1, 2, 3]] = 1, -2, -3, 1
    assert nib.aff2axcodes(affine) == tuple("AIL")
    volume = read_ct(save_nifti(tmp_path / "ail.nii", ramp((3, 4, 5)), affine))
    assert (volume.shape, volume.spacing, volume.stored_orientation) == ((5, 3, 4), (3, 1, 2), "AIL")
    np.testing.assert_array_equal(volume.hu, ramp((3, 4, 5)).transpose(2, 0, 1)[::-1, :, ::-1])


def test_axes_within_ten_degrees_are_kept_with_their_true_spacing(tmp_path):
    volume = read_ct(save_nifti(tmp_path / "oblique.nii.gz", ramp(), rotated(9.9)))
    np.testing.assert_array_equal(volume.hu, ramp()[::-1])
    np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-6)


@pytest.mark.parametrize(("degrees", "shear"), [(10.1, 0), (35, 0), (0, 14), (-20, 0.6)])
def test_oblique_and_sheared_volumes_are_resampled_onto_the_patients_axes(tmp_path, caplog, degrees, shear):
    affine = rotated(degrees, shear)
    stored = world_ramp(affine)
    volume = read_ct(save_nifti(tmp_path / "oblique.nii.gz", stored, affine))
    assert "resampled linearly" in caplog.text and f"{max(abs(degrees), shear):.1f}° off" in caplog.text
    np.testing.assert_allclose(volume.affine[:3, :3], np.diag(volume.spacing), atol=1e-9)
    np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-6)
    indices = np.stack(np.meshgrid(*(np.arange(n) for n in volume.shape), indexing="ij"), axis=-1)
    places = indices @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    there = (places - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T  # stored index of each voxel
    inside = ((there >= 0) & (there <= np.array(stored.shape) - 1)).all(axis=-1)
    beyond = ((there <= -1) | (there >= np.array(stored.shape))).any(axis=-1)
    assert np.abs(volume.hu - places @ (6, -4, 5))[inside].max() <= 1.01
    assert (volume.hu[beyond] == AIR_HU).all() and beyond.any()
    # Nothing was cut off: every stored corner is within the new volume.
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(stored.shape) - 1) @ affine[:3, :3].T + affine[:3, 3]
    found = (corners - volume.affine[:3, 3]) / volume.spacing
    assert (found > -0.01).all() and (found < np.array(volume.shape) - 1 + 0.01).all()


def test_a_header_that_would_blow_the_volume_up_is_refused(tmp_path):
    """Voxels of nanometres by centimetres, turned: millions of rows in each column."""
    affine = rotated(30) @ np.diag([1e-5, 40, 1, 1])
    with pytest.raises(CTReadError, match="thin.nii: .* voxels after resampling; expected at most 5e.07"):
        read_ct(save_nifti(tmp_path / "thin.nii", ramp(), affine))


def test_axes_far_from_right_angles_are_refused(tmp_path):
    with pytest.raises(CTReadError, match="miss right angles by 50.0°"):
        read_ct(save_nifti(tmp_path / "sheared.nii.gz", ramp(), rotated(0, 50)))


def test_sform_counts_before_qform_and_their_quarrel_is_told(tmp_path, caplog):
    image = nib.Nifti1Image(ramp(), None)
    image.header.set_sform(np.diag([0.75, 1.25, 2.5, 1]), code=1)
    image.header.set_qform(np.diag([-0.75, 1.25, 2.5, 1]), code=1)
    nib.save(image, tmp_path / "scan.nii")
    np.testing.assert_array_equal(read_ct(tmp_path / "scan.nii").hu, ramp())
    assert "scan.nii: its sform and qform disagree" in caplog.text


def test_metres_become_millimetres(tmp_path):
    image = nib.Nifti1Image(ramp(), np.diag([0.00075, 0.00125, 0.0025, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "metres.nii")
    np.testing.assert_allclose(read_ct(tmp_path / "metres.nii").spacing, SPACING, rtol=1e-6)
    image = nib.Nifti1Image(ramp(), np.diag([0.75, 1.25, 2.5, 1]))
    image.header.set_xyzt_units("meter")  # a wrong unit
    nib.save(image, tmp_path / "wrong.nii")
    np.testing.assert_allclose(read_ct(tmp_path / "wrong.nii").spacing, SPACING, rtol=1e-6)


def test_qform_serves_where_sform_is_nan(tmp_path):
    image = nib.Nifti1Image(ramp(), None)
    image.header.set_qform(np.diag([-0.75, 1.25, 2.5, 1]), code=1)
    image.header["sform_code"] = 1
    image.header["srow_x"] = np.nan
    nib.save(image, tmp_path / "scan.nii")
    volume = read_ct(tmp_path / "scan.nii")
    np.testing.assert_array_equal(volume.hu, ramp()[::-1])
    np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-6)


@pytest.mark.parametrize("broken", ["nan", "singular", "absent"])
def test_no_usable_affine_takes_zooms_and_says_so(tmp_path, caplog, broken):
    image = nib.Nifti1Image(ramp(), None)
    image.header.set_zooms(SPACING)
    image.header["sform_code"] = 0 if broken == "absent" else 1
    if broken == "nan":
        image.header["srow_z"] = np.nan
    nib.save(image, tmp_path / "scan.nii")
    volume = read_ct(tmp_path / "scan.nii")
    np.testing.assert_allclose(volume.spacing, SPACING)
    np.testing.assert_array_equal(volume.hu, ramp()[::-1])  # as nibabel takes it: axes run left, front, head
    assert "scan.nii" in caplog.text and "0.75 x 1.25 x 2.5 mm" in caplog.text


def test_trailing_single_dimensions_are_dropped(tmp_path):
    stored = ramp()[..., None, None]
    np.testing.assert_array_equal(read_ct(save_nifti(tmp_path / "five.nii.gz", stored)).hu, ramp())


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_header_slope_and_intercept_count_once(tmp_path, suffix):
    stored = ramp()
    path = save_nifti(tmp_path / f"scan.{suffix}", stored)
    raw = bytearray(gzip.decompress(path.read_bytes()) if suffix == "nii.gz" else path.read_bytes())
    raw[112:120] = np.array([2.0, -1024.0], dtype="<f4").tobytes()  # scl_slope and scl_inter
    path.write_bytes(gzip.compress(bytes(raw)) if suffix == "nii.gz" else bytes(raw))
    np.testing.assert_array_equal(read_ct(path).hu, stored * 2 - 1024)
    with pytest.raises(CTReadError, match=r"scan\.nii.*rescale twice"):
        read_ct(path, rescale=(1, -1024))


def test_rescale_turns_raw_values_into_hu(tmp_path):
    raw = np.array([0, 24, 1024, 2048], dtype=np.int16).reshape(2, 2, 1)
    path = save_nifti(tmp_path / "raw.nii.gz", raw)
    assert read_ct(path, rescale=(1, -1024)).hu.ravel().tolist() == [-1024, -1000, 0, 1024]
    assert read_ct(path, rescale=(0.5, -8192)).hu.ravel().tolist() == [AIR_HU] * 4  # below -1500: padding
    with pytest.raises(CTReadError, match="slope not zero"):
        read_ct(path, rescale=(0, -1024))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.float32, np.float64, ">i2", ">f4"])
def test_every_real_type_becomes_int16(tmp_path, dtype):
    stored = np.clip(ramp(), 0, 120).astype(dtype)
    header = nib.Nifti1Header(endianness=">" if np.dtype(dtype).byteorder == ">" else "<")
    nib.save(nib.Nifti1Image(stored, ras_affine(), header, dtype=np.dtype(dtype)), tmp_path / "scan.nii.gz")
    hu = read_ct(tmp_path / "scan.nii.gz").hu
    assert hu.dtype == np.int16 and hu.dtype.isnative
    np.testing.assert_array_equal(hu, np.clip(ramp(), 0, 120))


def test_out_of_range_saturates_and_not_a_number_is_air(tmp_path, caplog):
    stored = np.array([1e9, -1e9, np.nan, np.inf, -np.inf, 40.4, -0.6, 40000], dtype=np.float32).reshape(2, 2, 2)
    hu = read_ct(save_nifti(tmp_path / "scan.nii.gz", stored)).hu
    assert hu.ravel().tolist() == [32767, AIR_HU, AIR_HU, AIR_HU, AIR_HU, 40, -1, 32767]
    assert "3 voxels are NaN or infinite" in caplog.text
    stored = np.array([0, 65535, 32768, 1000], dtype=np.uint16).reshape(2, 2, 1)
    assert read_ct(save_nifti(tmp_path / "unsigned.nii", stored)).hu.ravel().tolist() == [0, 32767, 32767, 1000]


def test_plain_int16_nifti_is_mapped_not_copied(tmp_path):
    volume = read_ct(save_nifti(tmp_path / "scan.nii", ramp(), np.diag([-1, -1, 1, 1.0])))
    assert memory_map_under(volume.hu) is not None
    np.testing.assert_array_equal(volume.hu, ramp()[::-1, ::-1])


# ------------------------------------------------------------------------------------------------------- is it HU at all?


def chest(shape=(48, 40, 32), seed=0) -> np.ndarray:
    """Air, a body of soft tissue with fat and bone, lungs, noise; the proportions of a chest CT."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    body = (x / 0.9) ** 2 + (y / 0.75) ** 2 < 1
    hu[body] = -90
    hu[(x / 0.82) ** 2 + (y / 0.67) ** 2 < 1] = 45
    hu[((abs(x) - 0.38) / 0.28) ** 2 + (y / 0.45) ** 2 + (z / 1.1) ** 2 < 1] = -850
    hu[x**2 + ((y - 0.5) / 1.0) ** 2 < 0.01] = 500
    return np.rint(hu + np.random.default_rng(seed).normal(0, 12, shape)).clip(-1024, 3071).astype(np.int16)


def wrap_uint16(hu):
    return hu.astype(np.int32) % 65536


NOT_HU = {
    "raw, +1024": lambda hu: hu + 1024,
    "raw, +8192": lambda hu: hu + 8192,
    "raw with padding, as GE writes it": lambda hu: np.where(hu < -990, -2000, hu + 1024),
    "rescaled twice by -1024": lambda hu: hu - 1024,
    "rescaled twice by -8192": lambda hu: hu - 8192,
    "rescaled twice and clipped": lambda hu: np.clip(hu - 1024, -1024, 3071),
    "negative HU wrapped": wrap_uint16,
    "a soft-tissue picture of 8 bits": lambda hu: np.clip((hu + 160) / 400 * 255, 0, 255),
    "scaled to 0..1": lambda hu: np.clip((hu + 1000) / 2000, 0, 1),
    "a mask": lambda hu: hu > -500,
    "another modality": lambda hu: np.where(hu < -900, 0, np.clip(hu + 1000, 0, None)) * 0.4,
}


@pytest.mark.parametrize("fault", NOT_HU)
def test_values_that_are_no_hu_are_refused_unless_allowed(tmp_path, fault):
    stored = np.asarray(NOT_HU[fault](chest().astype(np.int32)))
    stored = stored.astype(np.float32 if stored.dtype.kind == "f" else np.int32)
    path = save_nifti(tmp_path / "scan.nii.gz", stored)
    with pytest.raises(
        CTReadError, match=r"scan\.nii\.gz: its values are not Hounsfield units: 1st percentile.*allow_non_ct"
    ):
        read_ct(path)
    assert read_ct(path, allow_non_ct=True).shape == stored.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda hu: hu,
        lambda hu: np.where(hu < -990, -3024, hu),  # padding outside a round field
        lambda hu: np.where(hu < -990, -8192, hu),
        lambda hu: hu + np.random.default_rng(1).normal(0, 80, hu.shape).astype(np.int16),  # a noisy scan
        lambda hu: hu[8:40, 4:36, 4:28],  # a tight field
    ],
)
def test_hu_are_taken_as_they_are(tmp_path, caplog, change):
    hu = change(chest())
    read = read_ct(save_nifti(tmp_path / "scan.nii.gz", hu.astype(np.int16))).hu
    np.testing.assert_array_equal(read, np.where(hu < -1500, AIR_HU, hu))
    assert not [record for record in caplog.records if "cover" not in record.getMessage()]  # no warning but of its size


def test_a_crop_without_air_is_only_warned_of(tmp_path, caplog):
    tissue = np.random.default_rng(0).normal(50, 25, (32, 32, 32)).astype(np.int16)
    np.testing.assert_array_equal(read_ct(save_nifti(tmp_path / "liver.nii", tissue)).hu, tissue)
    assert "liver.nii" in caplog.text and "no air near -1000, possibly a crop" in caplog.text


def test_padding_is_air_and_counted_and_arrays_of_the_caller_stay_whole(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    hu = chest()
    hu[:5] = -3024
    path = save_nifti(tmp_path / "padded.nii", hu)
    read = read_ct(path).hu
    np.testing.assert_array_equal(read, np.where(hu == -3024, AIR_HU, hu))
    assert f"{5 * 40 * 32} voxels below -1500 HU (down to -3024) are padding" in caplog.text
    given = hu.copy()
    np.testing.assert_array_equal(to_ct_volume(given).hu, read)
    np.testing.assert_array_equal(given, hu)


def test_values_in_memory_are_warned_of_not_refused(caplog):
    raw = chest().astype(np.int32) + 1024
    np.testing.assert_array_equal(to_ct_volume(raw).hu, raw)
    assert "don't look like Hounsfield units" in caplog.text


@pytest.mark.parametrize("intercept", [-1024, -8192])
def test_first_release_volumes_take_metadata_once(tmp_path, caplog, intercept):
    """Raw values under a blank header: refused without metadata, read correctly with it; HU with metadata: refused."""
    caplog.set_level(logging.INFO)
    hu = chest()
    raw = save_nifti(tmp_path / "v1.nii.gz", (hu.astype(np.int32) - intercept).astype(np.int16), np.eye(4))
    with pytest.raises(CTReadError, match="v1.nii.gz: .*pass rescale="):
        read_ct(raw)
    volume = read_ct(raw, rescale=(1, intercept), spacing=(0.7, 0.8, 1.5))
    np.testing.assert_array_equal(volume.hu, hu[::-1, ::-1])  # axes to the left, back and head
    assert volume.spacing == (0.7, 0.8, 1.5)
    as_record = read_ct(raw, rescale=[1, intercept, 0.7, 0.8, 1.5])
    np.testing.assert_array_equal(as_record.hu, volume.hu)
    assert as_record.spacing == volume.spacing
    with pytest.raises(CTReadError, match="expected .slope, intercept., or those and three sizes"):
        read_ct(raw, rescale=(1, intercept, 0.7))
    assert f"HU = stored value * 1 + {intercept}" in caplog.text and "voxels of (0.7, 0.8, 1.5) mm" in caplog.text
    fixed = save_nifti(tmp_path / "v2.nii.gz", hu, np.diag([-0.7, -0.8, 1.5, 1]))
    with pytest.raises(CTReadError, match="v2.nii.gz: its values are Hounsfield units already.*rescale twice"):
        read_ct(fixed, rescale=(1, intercept))
    np.testing.assert_array_equal(read_ct(fixed, spacing=(0.7, 0.8, 1.5)).hu, hu[::-1, ::-1])
    with pytest.raises(CTReadError, match="v2.nii.gz: its header declares voxels of .0.7, 0.8, 1.5. mm"):
        read_ct(fixed, spacing=(0.7, 0.8, 5))
    with pytest.raises(CTReadError, match="expected three positive numbers of mm"):
        read_ct(raw, rescale=(1, intercept), spacing=(0.7, 0.8, float("nan")))
    other = {-1024: -8192, -8192: -1024}[intercept]
    with pytest.raises(CTReadError, match=f"rescale=.1, {other}. is not this file's"):
        read_ct(raw, rescale=(1, other))


def test_a_reference_carries_a_path_with_its_rescaling(tmp_path):
    path = save_nifti(tmp_path / "v1.nii", ramp() + 1024, np.eye(4))
    five = (1, -1024, *SPACING)
    for rescale in (None, (1, -1024), five):
        reference = VolumeRef(str(path), rescale)
        for read in (read_ct, to_ct_volume):
            volume, expected = read(reference), read_ct(path, rescale=rescale)
            np.testing.assert_array_equal(volume.hu, expected.hu)
            assert (volume.spacing, volume.source) == (expected.spacing, str(path))
    assert len({VolumeRef.of(path, list(five)), VolumeRef.of(str(path), five), VolumeRef(str(path), five)}) == 1
    assert VolumeRef.of(path) != VolumeRef.of(path, five) and VolumeRef.of(reference) is reference
    np.testing.assert_array_equal(read_ct(reference, rescale=five).stored_hu(), ramp())
    with pytest.raises(CTReadError, match="v1.nii: rescale=.1, 0. next to a VolumeRef.*expected one"):
        read_ct(reference, rescale=(1, 0))
    with pytest.raises(CTReadError, match="v1.nii: rescale=.1.0,.; expected .slope, intercept."):
        read_ct(VolumeRef(str(path), (1,)))


def test_a_blank_header_of_a_large_picture_is_warned_of(tmp_path, caplog):
    save_nifti(tmp_path / "blank.nii", np.full((400, 400, 2), -1000, dtype=np.int16), np.eye(4))
    read_ct(tmp_path / "blank.nii")
    assert "a blank header?" in caplog.text


def test_judgement_by_hand():
    assert judge_intensity(chest())[0] == "HU"
    assert judge_intensity(np.zeros((40, 40, 40), dtype=np.int16))[0] == "no air"
    assert judge_intensity(np.full((40, 40, 40), -1024, dtype=np.int16))[0] == "no air"  # one value says nothing
    assert judge_intensity(chest()[:8, :8, :8] + 1024)[0] == "no air"  # nor do few


# -------------------------------------------------------------------------------------------------- SimpleITK's formats


@pytest.mark.parametrize("suffix", ["nrrd", "mha", "mhd"])
def test_itk_formats_give_what_nifti_gives(tmp_path, suffix):
    image = sitk.GetImageFromArray(np.ascontiguousarray(ramp().T))
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection([0, -1, 0, 0, 0, 1, -1, 0, 0])
    sitk.WriteImage(image, str(tmp_path / f"scan.{suffix}"))
    sitk.WriteImage(image, str(tmp_path / "scan.nii.gz"))
    expected = nib.as_closest_canonical(nib.load(tmp_path / "scan.nii.gz"))
    for volume in (read_ct(tmp_path / f"scan.{suffix}"), read_ct(tmp_path / "scan.nii.gz"), to_ct_volume(image)):
        np.testing.assert_array_equal(volume.hu, np.asarray(expected.dataobj))
        np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)
        np.testing.assert_allclose(volume.spacing, expected.header.get_zooms(), rtol=1e-6)


@pytest.mark.parametrize("suffix", ["nrrd", "mha", "mhd"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32, np.uint8, np.int32, np.float64])
def test_nrrd_and_metaimage_give_what_simpleitk_gives(tmp_path, suffix, compressed, dtype):
    angle = np.deg2rad(5)
    image = sitk.GetImageFromArray(np.ascontiguousarray(np.clip(ramp(), 0, 250).astype(dtype).T))
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection([0, -np.cos(angle), np.sin(angle), 0, np.sin(angle), np.cos(angle), -1, 0, 0])
    sitk.WriteImage(image, str(tmp_path / f"scan.{suffix}"), useCompression=compressed)
    volume, expected = read_ct(tmp_path / f"scan.{suffix}"), to_ct_volume(sitk.ReadImage(tmp_path / f"scan.{suffix}"))
    np.testing.assert_array_equal(volume.hu, expected.hu)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-9)
    assert volume.stored_orientation == expected.stored_orientation


NRRD = """NRRD0004
# made by hand
type: short
dimension: 3
space: {space}
sizes: 9 7 5
space directions: (0.75,0,0) (0,1.25,0) (0,0,2.5)
endian: {endian}
encoding: {encoding}
space origin: (-20,30,-400)
note:=free text: with colons

"""


@pytest.mark.parametrize(
    ("space", "signs"), [("RAS", (1, 1, 1)), ("left-anterior-superior", (-1, 1, 1)), ("LPS", (-1, -1, 1))]
)
@pytest.mark.parametrize(
    ("encoding", "endian"), [("raw", "big"), ("gz", "little"), ("bzip2", "big"), ("ascii", "little")]
)
def test_nrrd_spaces_and_encodings(tmp_path, space, signs, encoding, endian):
    values = ramp().ravel(order="F")
    data = values.astype(">i2" if endian == "big" else "<i2").tobytes()
    pack = {"raw": bytes, "gz": gzip.compress, "bzip2": bz2.compress}
    body = " ".join(str(value) for value in values).encode() if encoding == "ascii" else pack[encoding](data)
    header = NRRD.format(space=space, endian=endian, encoding=encoding).encode()
    (tmp_path / "scan.nrrd").write_bytes(header + body)
    volume = read_ct(tmp_path / "scan.nrrd")
    np.testing.assert_array_equal(volume.stored_hu(), ramp())
    first = np.linalg.inv(volume.affine) @ [*(np.array(ORIGIN) * signs), 1]  # where the first stored voxel went to
    expected = [0 if sign > 0 else n - 1 for sign, n in zip(signs, SHAPE, strict=True)]
    np.testing.assert_allclose(first[:3], expected, atol=1e-6)


def test_data_beside_a_header(tmp_path):
    header = NRRD.format(space="RAS", endian="little", encoding="raw").rstrip("\n")
    (tmp_path / "voxels.raw").write_bytes(b"skip" + ramp().astype("<i2").tobytes(order="F"))
    (tmp_path / "scan.nhdr").write_text(f"{header}\nbyte skip: 4\ndata file: voxels.raw\n", encoding="utf-8")
    np.testing.assert_array_equal(read_ct(tmp_path / "scan.nhdr").hu, ramp())
    for place in ("../voxels.raw", "/etc/passwd", "voxels%03d.raw 1 5 1", "LIST"):
        (tmp_path / "scan.nhdr").write_text(f"{header}\ndata file: {place}\n", encoding="utf-8")
        with pytest.raises(CTReadError, match="outside the header.s folder|several files"):
            read_ct(tmp_path / "scan.nhdr")


def test_bytes_to_skip_within_packed_data(tmp_path):
    """More of them than are unpacked at a time."""
    header = NRRD.format(space="RAS", endian="little", encoding="gz").rstrip("\n") + "\nbyte skip: 3000001\n\n"
    packed = gzip.compress(bytes(3_000_001) + ramp().astype("<i2").tobytes(order="F"))
    (tmp_path / "scan.nrrd").write_bytes(header.encode() + packed)
    np.testing.assert_array_equal(read_ct(tmp_path / "scan.nrrd").hu, ramp())


def test_vectors_and_series_in_nrrd_and_metaimage_are_refused(tmp_path):
    colour = sitk.GetImageFromArray(np.zeros((5, 7, 9, 3), dtype=np.uint8), isVector=True)
    for suffix in ("nrrd", "mha"):
        sitk.WriteImage(colour, str(tmp_path / f"colour.{suffix}"))
        with pytest.raises(CTReadError, match=f"colour.{suffix}: found 3 values per voxel"):
            read_ct(tmp_path / f"colour.{suffix}")
    with pytest.raises(CTReadError, match="found 3 values per voxel"):
        to_ct_volume(colour)
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((2, 5, 7, 9), dtype=np.int16), isVector=False), str(tmp_path / "series.mha")
    )
    with pytest.raises(CTReadError, match="4-D image"):
        read_ct(tmp_path / "series.mha")


@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha"])
def test_what_packs_tightly_is_read_to_its_end(tmp_path, suffix):
    # An inflater that has been given the last byte may still hold output back.
    box = np.full((107, 70, 70), -1000, dtype=np.int16)
    box[6:-6, 6:-6, 6:-6] = 40
    # From 128 bytes below a whole MiB to 512 above one.
    arrays = [np.full((32 * n, 1, (1 << 14) + more), -1000, np.int16) for n in (1, 2) for more in (-1, 0, 1, 2, 4)]
    for array in (box, *arrays):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / f"packed.{suffix}"), useCompression=True)
        np.testing.assert_array_equal(read_ct(tmp_path / f"packed.{suffix}").hu, array.T[::-1, ::-1])


@pytest.mark.parametrize("level", [1, 6, 9])
def test_a_compressed_metaimage_without_its_last_bytes_is_refused(tmp_path, level):
    voxels = (1 << 19) + 150
    header = (
        f"NDims = 3\nDimSize = {voxels} 1 1\nElementType = MET_SHORT\nCompressedData = True\nElementDataFile = LOCAL\n"
    )
    packed = zlib.compress(np.full(voxels, -1000, dtype="<i2").tobytes(), level)
    path = tmp_path / "packed.mha"
    path.write_bytes(header.encode() + packed)
    assert read_ct(path).shape == (voxels, 1, 1)
    for cut in (1, 4, 5, 10, len(packed) // 2, len(packed) - 1, len(packed)):
        path.write_bytes(header.encode() + packed[:-cut])
        with pytest.raises(CTReadError, match="packed.mha: .*(ends early|cut short)"):
            read_ct(path)


def test_notes_in_words_beside_a_numpy_volume(tmp_path):
    np.savez(
        tmp_path / "noted.npz", hu=ramp(), spacing=np.array(SPACING), patient="x", notes=np.array([{}, "y"], object)
    )
    volume = read_ct(tmp_path / "noted.npz")
    assert volume.spacing == SPACING
    np.testing.assert_array_equal(volume.hu, ramp())
    np.savez(tmp_path / "words.npz", np.full(SHAPE, "x"))
    with pytest.raises(CTReadError, match="words.npz: voxels of type <U1"):
        read_ct(tmp_path / "words.npz")
    np.savez(tmp_path / "worded.npz", ramp(), spacing=np.array(["a", "b", "c"]))
    with pytest.raises(CTReadError, match="worded.npz: "):
        read_ct(tmp_path / "worded.npz")


def test_numpy_files_with_an_affine(tmp_path, caplog):
    affine = np.array([[0, 0, 2.5, -20], [-0.75, 0, 0, 30], [0, 1.25, 0, -400], [0, 0, 0, 1]])
    expected = read_ct(save_nifti(tmp_path / "scan.nii", ramp(), affine))
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "scan.npz", hu=np.asfortranarray(ramp()), affine=affine)
        volume = read_ct(tmp_path / "scan.npz")
        np.testing.assert_array_equal(volume.hu, expected.hu)
        np.testing.assert_allclose(volume.affine, expected.affine)
    np.savez(tmp_path / "spacing.npz", ramp().astype(np.float32), spacing=np.array(SPACING))
    assert read_ct(tmp_path / "spacing.npz").spacing == SPACING
    assert not caplog.records
    np.save(tmp_path / "scan.npy", ramp()[None])
    np.testing.assert_array_equal(read_ct(tmp_path / "scan.npy").hu, ramp())
    assert "voxels of 1 mm" in caplog.text
    np.savez(tmp_path / "rows.npz", ramp(), affine=affine[:3])
    np.testing.assert_allclose(read_ct(tmp_path / "rows.npz").affine, expected.affine)
    np.savez(tmp_path / "both.npz", ramp(), affine=np.full((4, 4), np.nan), spacing=np.array(SPACING))
    assert read_ct(tmp_path / "both.npz").spacing == SPACING and "uses the next" in caplog.text
    for name, values in {"affine": np.eye(3), "spacing": np.ones(2)}.items():
        np.savez(tmp_path / "odd.npz", ramp(), **{name: values})
        with pytest.raises(CTReadError, match=f"odd.npz: `{name}` of shape"):
            read_ct(tmp_path / "odd.npz")
    np.savez(tmp_path / "two.npz", a=ramp(), b=ramp())
    np.savez(tmp_path / "objects.npz", np.array([[[{}]]], dtype=object))
    for name, words in {"two.npz": "2 arrays of three dimensions", "objects.npz": "voxels of type object"}.items():
        with pytest.raises(CTReadError, match=words):
            read_ct(tmp_path / name)


def test_numpy_files_without_geometry_take_axes_and_spacing(tmp_path, caplog):
    """As RadChestCT stores them: slices first, from head to foot, then rows, then columns."""
    stored = np.ascontiguousarray(ramp()[::-1, ::-1, ::-1].transpose(2, 1, 0))
    np.savez_compressed(tmp_path / "scan.npz", ct=stored)
    np.save(tmp_path / "scan.npy", stored)
    for name in ("scan.npz", "scan.npy"):
        caplog.clear()
        volume = read_ct(tmp_path / name, spacing=SPACING[::-1], axes="IPL")
        np.testing.assert_array_equal(volume.hu, ramp())
        assert (volume.spacing, volume.stored_orientation) == (SPACING, "IPL") and not caplog.records
        # What is not given is warned of, and how to give it.
        read_ct(tmp_path / name)
        assert "assumes voxels of 1 mm and axes pointing right, front, head" in caplog.text
        assert "pass spacing= in mm and axes= (" in caplog.text
        caplog.clear()
        assert read_ct(tmp_path / name, axes="IPL").spacing == (1, 1, 1)
        assert "assumes voxels of 1 mm. " in caplog.text and "pass spacing= in mm, or" in caplog.text
        caplog.clear()
        assert read_ct(tmp_path / name, spacing=SPACING[::-1]).stored_orientation == "RAS"
        assert "assumes axes pointing right, front, head. " in caplog.text and "voxels of 1 mm" not in caplog.text
    np.savez(tmp_path / "spaced.npz", ct=stored, spacing=np.array(SPACING[::-1]))
    caplog.clear()
    assert read_ct(tmp_path / "spaced.npz", axes="IPL").spacing == SPACING and not caplog.records
    np.savez(tmp_path / "nan.npz", ct=stored, spacing=np.array([0.8, np.nan, 0.8]))
    assert read_ct(tmp_path / "nan.npz").spacing == (0.8, 1, 0.8)
    assert "its voxel sizes are invalid; assumes voxels of 0.8 x 1 x 0.8 mm" in caplog.text
    with pytest.raises(CTReadError, match="axes RAS, the caller axes IPL"):
        to_ct_volume(read_ct(tmp_path / "nan.npz"), axes="IPL")
    np.savez(tmp_path / "placed.npz", ct=ramp(), affine=ras_affine())
    for options, words in (
        ({"axes": "IPL"}, "axes RAS, the caller axes IPL"),
        ({"spacing": (1, 1, 1)}, "voxels of .0.75"),
    ):
        with pytest.raises(CTReadError, match=f"placed.npz: its header declares {words}"):
            read_ct(tmp_path / "placed.npz", **options)
    assert read_ct(tmp_path / "placed.npz", axes="RAS", spacing=SPACING).spacing == SPACING


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_zip_of_one_volume(tmp_path, packing):
    for name in ("scan.nii", "scan.nii.gz"):
        expected = read_ct(save_nifti(tmp_path / name, ramp()))
        with zipfile.ZipFile(tmp_path / "scan.zip", "w", packing) as archive:
            archive.write(tmp_path / name, f"deep/folder/{name}")
            archive.writestr("deep/readme.txt", "text")
        volume = read_ct(tmp_path / "scan.zip")
        np.testing.assert_array_equal(volume.hu, expected.hu)
        assert volume.source == str(tmp_path / "scan.zip") and memory_map_under(volume.hu) is None


def test_a_zip_of_a_pair(tmp_path):
    nib.save(nib.Nifti1Pair(ramp(), ras_affine()), tmp_path / "scan.hdr")
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        archive.write(tmp_path / "scan.img", "folder/scan.img")
        archive.write(tmp_path / "scan.hdr", "folder/scan.hdr")
    np.testing.assert_array_equal(read_ct(tmp_path / "scan.zip").hu, ramp())


def test_voxels_outlive_the_simpleitk_image(tmp_path):
    image = sitk.GetImageFromArray(np.full((64, 64, 64), 7, dtype=np.int16))
    sitk.WriteImage(image, str(tmp_path / "scan.nrrd"))
    hu = read_ct(tmp_path / "scan.nrrd").hu
    del image
    gc.collect()
    others = [sitk.Image([64, 64, 64], sitk.sitkInt16) for _ in range(8)]
    assert (hu == 7).all() and len(others) == 8


def test_rescale_counts_for_nrrd_too(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(ramp()), str(tmp_path / "raw.nrrd"))
    plain, rescaled = read_ct(tmp_path / "raw.nrrd"), read_ct(tmp_path / "raw.nrrd", rescale=(2, -1024))
    np.testing.assert_array_equal(rescaled.hu, plain.hu * 2 - 1024)


def test_what_is_in_memory_is_a_volume_too(tmp_path):
    array = ramp()
    nifti = nib.load(save_nifti(tmp_path / "scan.nii.gz", array, np.diag([-1, 1, 2, 1.0])))
    np.testing.assert_array_equal(to_ct_volume(nifti).hu, array[::-1])
    assert to_ct_volume(nifti).spacing == (1, 1, 2)
    bare = to_ct_volume(array.astype(np.float32))
    np.testing.assert_array_equal(bare.hu, array)
    assert bare.spacing == (1, 1, 1) and isinstance(bare, CTVolume) and to_ct_volume(bare) is bare
    np.testing.assert_array_equal(to_ct_volume(array[None, ..., None]).hu, array)
    np.testing.assert_array_equal(to_ct_volume(torch.from_numpy(array).to(torch.bfloat16)).hu[:2], array[:2])
    with pytest.raises(TypeError, match="got <class 'int'>"):
        to_ct_volume(3)
    with pytest.raises(CTReadError, match="a label map"):
        to_ct_volume(sitk.LabelImageToLabelMap(sitk.GetImageFromArray(np.ones((4, 4, 4), dtype=np.uint8))))


@pytest.mark.parametrize("form", ["sform", "qform", "neither"])
def test_a_nibabel_image_is_what_its_file_is(tmp_path, caplog, form):
    """Also where its affine is no number, or nibabel's own invention."""
    image = nib.Nifti1Image(ramp(), None)
    image.header.set_zooms(SPACING)
    image.header.set_qform(np.diag([*SPACING, 1]), code=1 if form == "qform" else 0)
    image.header["sform_code"] = 0 if form == "neither" else 1
    image.header["srow_x"] = [np.nan] * 4
    nib.save(image, tmp_path / "scan.nii")
    from_file, in_memory = read_ct(tmp_path / "scan.nii"), to_ct_volume(nib.load(tmp_path / "scan.nii"))
    np.testing.assert_array_equal(in_memory.hu, from_file.hu)
    np.testing.assert_array_equal(in_memory.affine, from_file.affine)
    np.testing.assert_allclose(in_memory.spacing, SPACING, rtol=1e-6)
    words = {"sform": "NaN or singular; assumes", "qform": "uses the next", "neither": "no orientation"}[form]
    assert (
        f"{tmp_path / 'scan.nii'}: its " in caplog.text
        and f"nibabel image {tmp_path / 'scan.nii'}: its " in caplog.text
    )
    assert caplog.text.count(words) == 2


def test_a_nibabel_image_whose_file_is_damaged_is_refused_by_name(tmp_path):
    path = save_nifti(tmp_path / "scan.nii.gz", ramp((20, 20, 20)))
    data = path.read_bytes()
    for name, content in {"cut.nii.gz": data[:2000], "cut.nii": gzip.decompress(data)[:2000]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CTReadError, match=f"nibabel image .*{name}: its voxels cannot be read"):
            to_ct_volume(nib.load(tmp_path / name))


def test_voxel_sizes_that_no_scanner_makes_are_warned_of(tmp_path, caplog):
    for mm in (0.3, 5.0):
        read_ct(save_nifti(tmp_path / "good.nii", ramp(), np.diag([mm, mm, mm, 1])))
    assert not caplog.records
    for mm in (0.01, 100.0):
        read_ct(save_nifti(tmp_path / "odd.nii", ramp(), np.diag([1, 1, mm, 1])))
        assert f"odd.nii: implausible voxel size 1 x 1 x {mm:g} mm; check the unit" in caplog.text


# ----------------------------------------------------------------------------------------------------------- bad inputs


def bad_inputs(tmp_path):
    """(path, words that the error must hold)"""
    good = save_nifti(
        tmp_path / "good.nii.gz", np.random.default_rng(0).integers(-1000, 1000, (30, 30, 30), dtype=np.int16)
    )
    data = good.read_bytes()
    cases = {"missing.nii.gz": (None, "no such file")}
    cases["empty.nii.gz"] = (b"", "an empty file")
    cases["notes.nii.gz"] = (b"This is a text file, however it is called.\n" * 20, "found a text file; expected NIfTI")
    cases["short.txt"] = (b"hi", "found a text file")
    cases["page.nii.gz"] = (b"<!DOCTYPE html><html>", "found a web page")
    cases["pointer.nii.gz"] = (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer.*git lfs pull")
    cases["picture.dcm"] = (b"\x89PNG\r\n\x1a\n" + bytes(400), "a PNG image")
    cases["bytes"] = (b"\x01\xf2\x03\x04" * 100, "the bytes 01 f2 03 04")
    cases["study.tar.gz"] = (gzip.compress(bytes(257) + b"ustar" + bytes(400)), "a tar archive inside of a gzip file")
    cases["slice.dcm.gz"] = (gzip.compress(bytes(128) + b"DICM" + bytes(400)), "a DICOM file inside of a gzip file")
    cases["cut.nii.gz"] = (data[: len(data) // 2], "ends early|cut short")
    cases["cut_in_header.nii.gz"] = (data[:100], "ends early|expected a NIfTI header")
    cases["flipped.nii.gz"] = (data[:20000] + bytes([data[20000] ^ 16]) + data[20001:], "damaged")
    cases["flipped_checksum.nii.gz"] = (data[:-8] + bytes([data[-8] ^ 1]) + data[-7:], "damaged")
    cases["cut.nii"] = (gzip.decompress(data)[:5000], "cut short")
    cases["other.nii.gz"] = (gzip.compress(b"not a volume" * 100), "expected a NIfTI header")
    sitk.WriteImage(sitk.GetImageFromArray(ramp((40, 40, 40))), str(tmp_path / "good.nrrd"))
    cases["cut.nrrd"] = ((tmp_path / "good.nrrd").read_bytes()[:20000], "cut short")
    cases["lonely.mhd"] = (
        b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = x.raw\n",
        "data file 'x.raw' is missing next to it",
    )
    for name, (content, words) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        yield tmp_path / name, words


def test_bad_files_give_errors_that_name_them(tmp_path):
    for path, words in bad_inputs(tmp_path):
        with pytest.raises(CTReadError, match=words) as error:
            read_ct(path)
        assert str(path) in str(error.value), path


@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha", "npz"])
def test_what_the_system_will_not_read_is_not_called_damaged(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"scan.{suffix}"
    if suffix == "npz":
        np.savez_compressed(path, ramp(), spacing=np.array(SPACING))
    else:
        sitk.WriteImage(sitk.GetImageFromArray(ramp()), str(path), useCompression=True)

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ct_streams, "_consume", refuse)
    with pytest.raises(CTReadError, match="cannot be read .Input/output error.*its disk") as error:
        read_ct(path)
    assert str(path) in str(error.value) and "damaged" not in str(error.value)


def test_nor_is_a_lazy_nibabel_image(tmp_path, monkeypatch):
    image = nib.load(save_nifti(tmp_path / "scan.nii.gz", ramp()))

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(type(image.dataobj), "get_unscaled", refuse)
    with pytest.raises(CTReadError, match="scan.nii.gz: its file cannot be read .Input/output error"):
        to_ct_volume(image)


def test_every_flipped_bit_of_a_compressed_body_is_noticed(tmp_path):
    data = save_nifti(tmp_path / "good.nii.gz", ramp((16, 16, 16))).read_bytes()
    expected = read_ct(tmp_path / "good.nii.gz").hu.copy()
    rng = np.random.default_rng(1)
    path = tmp_path / "flipped.nii.gz"
    for position in rng.integers(40, len(data) - 4, 60):
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(CTReadError, match="flipped.nii.gz"):
            read_ct(path)
    assert expected.shape == (16, 16, 16)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 5, 6, 2), dtype=np.int16), r"4-D image of shape \(4, 5, 6, 2\).*four_to_three"),
        (np.zeros((4, 5, 6, 1, 2), dtype=np.int16), r"5-D image of shape \(4, 5, 6, 1, 2\)"),
        (np.zeros((4, 5), dtype=np.int16), "2-D image"),
        (np.zeros((4, 5, 6), dtype=np.complex64), "complex64"),
        (np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), "RGB"),
    ],
)
def test_nifti_that_is_no_ct_volume_is_refused(tmp_path, array, words):
    with pytest.raises(CTReadError, match=f"odd.nii.gz: .*{words}"):
        read_ct(save_nifti(tmp_path / "odd.nii.gz", array))


def test_folders_without_a_series_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CTReadError, match="empty: an empty folder"):
        read_ct(tmp_path / "empty")
    save_nifti(tmp_path / "scan.nii.gz", ramp())
    with pytest.raises(CTReadError, match="without DICOM slices .*1 .gz files"):
        read_ct(tmp_path)


def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(tmp_path):
    raw = bytearray(gzip.decompress(save_nifti(tmp_path / "good.nii.gz", ramp()).read_bytes()))
    for sides, words in (((900, 900, 900), "cut short"), ((32000, 32000, 32000), "at most 1850000000")):
        raw[40:56] = np.array([3, *sides, 1, 1, 1, 1], dtype="<i2").tobytes()
        for name, data in (("huge.nii", bytes(raw)), ("huge.nii.gz", gzip.compress(bytes(raw)))):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(CTReadError, match=words):
                read_ct(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_volume_that_unpacks_to_more_than_the_memory_allowed_is_refused(tmp_path, monkeypatch, dtype):
    """The voxels as they are stored and, if they are not int16, those made of them."""
    needed = 9 * 7 * 5 * {np.int16: 2, np.float32: 4 + 2}[dtype]
    path = save_nifti(tmp_path / "scan.nii.gz", ramp().astype(dtype))
    np.savez(tmp_path / "scan.npz", ramp().astype(dtype))
    plain = save_nifti(tmp_path / "scan.nii", ramp().astype(dtype))
    for limit in (needed, needed - 1):
        monkeypatch.setattr(ct_streams, "_MAX_MEMORY", limit)
        np.testing.assert_array_equal(read_ct(plain).hu, ramp())  # mapped
        for packed in (path, tmp_path / "scan.npz"):
            if limit == needed:
                np.testing.assert_array_equal(read_ct(packed).hu, ramp())
                continue
            with pytest.raises(CTReadError, match=f"{packed.name}: 9 x 7 x 5 voxels of type .*Save them as int16 HU"):
                read_ct(packed)


def test_suffix_does_not_matter(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", ramp())
    save_nifti(tmp_path / "b.nii", ramp())
    os.rename(tmp_path / "a.nii.gz", tmp_path / "zipped.nii")
    os.rename(tmp_path / "b.nii", tmp_path / "plain.nii.gz")
    for name in ("zipped.nii", "plain.nii.gz"):
        np.testing.assert_array_equal(read_ct(tmp_path / name).hu, ramp())


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i2", "u2", "i4", "u4", "f2", "f4", ">f4", "f8"])
def test_every_type_becomes_hu_as_exact_numbers_say(dtype):
    """Slope and intercept, rounding to even and saturation, by Python's own whole numbers and fractions."""
    rng, dtype = np.random.default_rng(0), np.dtype(dtype)
    if dtype.kind == "f":
        stored = np.append(rng.normal(0, 3e4, 60), [0.5, 1.5, 2.5, -0.5, 32767.5, -32768.5, np.nan, np.inf])
        stored = stored.clip(-6e4, 6e4).astype(dtype)
        stored[-2:] = np.nan, -np.inf
    else:
        limits = np.iinfo(dtype)
        stored = rng.integers(limits.min, limits.max, 64, dtype=dtype.newbyteorder("="), endpoint=True).astype(dtype)
        stored[:2] = limits.min, limits.max
    for slope, intercept in ((1, 0), (1, -1024), (-1, 3), (2, -8192), (Fraction(1, 2), Fraction(1, 4)), (40000, 0)):
        found = np.empty(stored.shape, dtype=np.int16)
        lost = scale_to_hu(stored, float(slope), float(intercept), found)
        finite = [bool(np.isfinite(value)) for value in stored]
        assert lost == finite.count(False)
        expected = [
            min(max(round(Fraction(value.item()) * slope + intercept), -32768), 32767) if known else AIR_HU
            for value, known in zip(stored, finite, strict=True)
        ]
        assert found.tolist() == expected, (slope, intercept)


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", ">u2"])
@pytest.mark.parametrize(("slope", "intercept"), [(0.5, -1024.0), (-0.375, 99.25)])
def test_every_value_of_16_bits_is_scaled_as_exact_numbers_say(dtype, slope, intercept):
    """Products and sums of these numbers have no rounding in double precision. The result may take the values' place."""
    stored = np.arange(1 << 16).astype(dtype)
    expected = [min(max(round(value * slope + intercept), -32768), 32767) for value in stored.tolist()]
    for out in (np.empty(stored.shape, np.int16), stored.view(np.int16)):
        assert scale_to_hu(stored, slope, intercept, out) == 0
        assert out.tolist() == expected


# ------------------------------------------------------------------------------------------------ scaled as they are read


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [">i2", "u2", "i4", "f4", "f8", "i1"])
@pytest.mark.parametrize("scale", [(1, 0), (1, -1024), (2, -1024), (0.0754, -1024.3)])
def test_values_scaled_as_they_are_read_are_those_scaled_at_once(tmp_path, monkeypatch, dtype, scale, compressed):
    """Chunks end within a value, and the last one is short."""
    monkeypatch.setattr(ct_streams, "_CHUNK", 1001)
    monkeypatch.setattr(ct_streams, "_PIECE", 37)
    values = np.random.default_rng(0).uniform(-100, 3000, (9, 10, 11)).clip(0, 126 if dtype == "i1" else None)
    if "f" in dtype:
        values[1, 2, 3], values[4, 5, 6] = np.nan, np.inf
    header = nib.Nifti1Header(endianness=dtype[0] if dtype[0] == ">" else "<")
    image = nib.Nifti1Image(values.astype(dtype), np.diag([1.5, 1.5, 2, 1]), header, dtype=dtype)
    image.header.set_slope_inter(*scale)
    path = tmp_path / f"scan.nii{'.gz' if compressed else ''}"
    nib.save(image, path)
    now, later = (read_nifti(path, compressed, as_hu) for as_hu in (True, False))
    assert later.array.dtype == np.dtype(dtype) and (later.slope, later.intercept) == pytest.approx(scale)
    expected = to_hu(later.array, later.slope, later.intercept, "")
    assert now.array.dtype == np.int16 and (now.slope, now.intercept) == (1, 0)
    np.testing.assert_array_equal(now.array, expected)
    assert now.not_finite == np.count_nonzero(~np.isfinite(later.array.astype(float)))
