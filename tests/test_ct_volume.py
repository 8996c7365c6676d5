"""Reading CT volumes: values, geometry, and what is refused with which words."""

import gc
import gzip
import logging
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from samf.ct_volume import AIR_HU, CTReadError, CTVolume, read_ct, to_ct_volume

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


def write_dicom(folder, hu, spacing=SPACING, modality="CT", positions=None, names=None, series="1.2.3.4", tags=None):
    """One DICOM file a slice of `hu` (X, Y, Z) with axes running Left, Posterior, Superior."""
    folder.mkdir(exist_ok=True)
    positions = [k * spacing[2] for k in range(hu.shape[2])] if positions is None else positions
    for k, z in enumerate(positions):
        image = sitk.GetImageFromArray(np.ascontiguousarray(hu[:, :, k].T)[None])
        image.SetSpacing(spacing)
        values = {
            "0008|0060": modality,
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0020|000e": series,
            "0020|000d": "1.2.3",
            "0020|0032": f"-10\\-12\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|1052": "-1024",
            "0028|1053": "1",
            "0010|0010": "SECRET^NAME",
            **(tags or {}),
        }
        for key, value in values.items():
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(folder / (names[k] if names else f"slice{k:03d}.dcm")))
        writer.Execute(image)
    return folder


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
    for index in np.ndindex(SHAPE):  # the same value stands at the same place in the room
        place = affine @ [*index, 1]
        i, j, k = np.rint(np.linalg.solve(volume.affine, place)[:3]).astype(int)
        assert volume.hu[i, j, k] == stored[index]


def test_oblique_scan_keeps_nearest_axes_and_true_spacing(tmp_path):
    angle = np.deg2rad(20)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-0.75, 1.25, 2.5])
    volume = read_ct(save_nifti(tmp_path / "oblique.nii.gz", ramp(), affine))
    np.testing.assert_array_equal(volume.hu, ramp()[::-1])
    np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-6)


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
    assert read_ct(path, rescale=(0.5, -8192)).hu.ravel().tolist() == [-8192, -8180, -7680, -7168]
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
    assert hu.ravel().tolist() == [32767, -32768, AIR_HU, AIR_HU, AIR_HU, 40, -1, 32767]
    assert "3 voxels" in caplog.text
    stored = np.array([0, 65535, 32768, 1000], dtype=np.uint16).reshape(2, 2, 1)
    assert read_ct(save_nifti(tmp_path / "unsigned.nii", stored)).hu.ravel().tolist() == [0, 32767, 32767, 1000]


def test_plain_int16_nifti_is_mapped_not_copied(tmp_path):
    volume = read_ct(save_nifti(tmp_path / "scan.nii", ramp(), np.diag([-1, -1, 1, 1.0])))
    assert memory_map_under(volume.hu) is not None
    np.testing.assert_array_equal(volume.hu, ramp()[::-1, ::-1])


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
    with pytest.raises(TypeError, match="got <class 'int'>"):
        to_ct_volume(3)


# ---------------------------------------------------------------------------------------------------------------- DICOM


def test_dicom_is_sorted_by_position_not_by_name(tmp_path):
    names = ["c", "a", "e.dcm", "b", "d"]
    volume = read_ct(write_dicom(tmp_path / "series", ramp(), names=names))
    np.testing.assert_array_equal(volume.hu, ramp()[::-1, ::-1])  # stored LPS
    np.testing.assert_allclose(volume.spacing, SPACING)
    np.testing.assert_allclose(volume.affine[:3, 3], [10 - 8 * 0.75, 12 - 6 * 1.25, 0])


def test_dicom_positions_running_down_are_turned(tmp_path):
    volume = read_ct(write_dicom(tmp_path / "series", ramp(), positions=[10.0, 7.5, 5.0, 2.5, 0.0]))
    np.testing.assert_array_equal(volume.hu, ramp()[::-1, ::-1, ::-1])


def test_largest_ct_series_is_read(tmp_path):
    folder = write_dicom(tmp_path / "study", ramp((4, 4, 2)), series="1.2.3.9", names=["s1", "s2"])
    write_dicom(folder, ramp((9, 7, 8)), modality="MR", series="1.2.3.8", names=[f"m{k}" for k in range(8)])
    write_dicom(folder, ramp())
    np.testing.assert_array_equal(read_ct(folder).hu, ramp()[::-1, ::-1])


def test_dicom_that_is_no_ct_volume_is_refused(tmp_path):
    refused = {
        "magnet": (write_dicom(tmp_path / "magnet", ramp(), modality="MR"), "modality MR"),
        "double": (write_dicom(tmp_path / "double", ramp(), positions=[0, 2, 2, 4, 6]), "5 slices at 4 positions"),
        "gap": (
            write_dicom(tmp_path / "gap", ramp(), positions=[0, 2, 4, 8, 10]),
            "uneven distances.*4.00 mm after slice 3",
        ),
        "tilted": (
            write_dicom(tmp_path / "tilted", ramp(), tags={"0020|0037": "1\\0\\0\\0\\0.9659258\\-0.2588190"}),
            "tilted gantry.*15.0°",
        ),
    }
    for name, (folder, words) in refused.items():
        with pytest.raises(CTReadError, match=f"{name}: .*{words}"):
            read_ct(folder)
    assert read_ct(refused["magnet"][0], allow_non_ct=True).shape == SHAPE
    with pytest.raises(CTReadError, match="leave rescale out"):
        read_ct(write_dicom(tmp_path / "good", ramp()), rescale=(1, -1024))


def test_colour_dicom_is_refused(tmp_path):
    image = sitk.GetImageFromArray(np.zeros((1, 8, 8, 3), dtype=np.uint8), isVector=True)
    image.SetMetaData("0008|0060", "CT")
    (tmp_path / "shots").mkdir()
    sitk.WriteImage(image, str(tmp_path / "shots" / "shot.dcm"))
    for path in (tmp_path / "shots", tmp_path / "shots" / "shot.dcm"):
        with pytest.raises(CTReadError, match=f"{path.name}: .*colour pictures"):
            read_ct(path)


def test_no_patient_name_in_logs_or_errors(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    read_ct(write_dicom(tmp_path / "good", ramp()))
    with pytest.raises(CTReadError) as error:
        read_ct(write_dicom(tmp_path / "gap", ramp(), positions=[0, 2, 4, 8, 10]))
    assert "SECRET" not in caplog.text + str(error.value)


# ----------------------------------------------------------------------------------------------------------- bad inputs


def bad_inputs(tmp_path):
    """(path, words that the error must hold)"""
    good = save_nifti(
        tmp_path / "good.nii.gz", np.random.default_rng(0).integers(-1000, 1000, (30, 30, 30), dtype=np.int16)
    )
    data = good.read_bytes()
    cases = {"missing.nii.gz": (None, "no such file")}
    cases["empty.nii.gz"] = (b"", "an empty file")
    cases["notes.nii.gz"] = (b"This is a text file, however it is called.\n" * 20, "starts with b'This is a te'")
    cases["short.txt"] = (b"hi", "starts with b'hi'")
    cases["cut.nii.gz"] = (data[: len(data) // 2], "ends early|cut short")
    cases["cut_in_header.nii.gz"] = (data[:100], "ends early|expected a NIfTI header")
    cases["flipped.nii.gz"] = (data[:20000] + bytes([data[20000] ^ 16]) + data[20001:], "damaged")
    cases["flipped_checksum.nii.gz"] = (data[:-8] + bytes([data[-8] ^ 1]) + data[-7:], "damaged")
    cases["cut.nii"] = (gzip.decompress(data)[:5000], "cut short")
    cases["other.nii.gz"] = (gzip.compress(b"not a volume" * 100), "expected a NIfTI header")
    sitk.WriteImage(sitk.GetImageFromArray(ramp((40, 40, 40))), str(tmp_path / "good.nrrd"))
    cases["cut.nrrd"] = ((tmp_path / "good.nrrd").read_bytes()[:20000], "damaged or incomplete Nrrd")
    cases["lonely.mhd"] = (
        b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = x.raw\n",
        "Meta",
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
    raw[40:56] = np.array([3, 32000, 32000, 32000, 1, 1, 1, 1], dtype="<i2").tobytes()
    for name, data in (("huge.nii", bytes(raw)), ("huge.nii.gz", gzip.compress(bytes(raw)))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CTReadError, match="cut short"):
            read_ct(tmp_path / name)


def test_suffix_does_not_matter(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", ramp())
    save_nifti(tmp_path / "b.nii", ramp())
    os.rename(tmp_path / "a.nii.gz", tmp_path / "zipped.nii")
    os.rename(tmp_path / "b.nii", tmp_path / "plain.nii.gz")
    for name in ("zipped.nii", "plain.nii.gz"):
        np.testing.assert_array_equal(read_ct(tmp_path / name).hu, ramp())


# ----------------------------------------------------------------------------------------------------------- real files


def test_one_scan_as_dicom_and_as_nrrd(test_data):
    dicom, nrrd = read_ct(test_data / "dicom/cip_ct-64_79sl"), read_ct(test_data / "ct/cip_ct-64.nrrd")
    np.testing.assert_array_equal(dicom.hu, nrrd.hu)
    np.testing.assert_allclose(dicom.affine, nrrd.affine, atol=1e-3)


def test_real_volumes(test_data):
    expected = {
        "ct/totalseg_chest_cta_1.5mm.nii.gz": ((233, 167, 191), (1.5, 1.5, 1.5), (-1094, 3343)),
        "ct/totalseg_abdomen_small_3mm.nii.gz": ((122, 101, 30), (3, 3, 3), (-1100, 1207)),
        "ct/elastix_3DCT_lung_small.mha": ((57, 78, 64), (2.732, 2.732, 5), (-1130, 1379)),
        "dicom/totalseg_abdomen_20sl_j2k": ((512, 512, 20), (0.9765625, 0.9765625, 2), (-1024, 1839)),
        "odd/CT_small.dcm": ((128, 128, 1), (0.661468, 0.661468, 5), (-896, 1167)),
    }
    for name, (shape, spacing, limits) in expected.items():
        volume = read_ct(test_data / name)
        assert volume.shape == shape and (volume.hu.min(), volume.hu.max()) == limits, name
        np.testing.assert_allclose(volume.spacing, spacing, rtol=1e-6, err_msg=name)


def test_real_oddities_are_refused(test_data):
    for name, words in {
        "odd/functional.nii": "4-D",
        "odd/niivue_complex64.nii.gz": "complex64",
        "dicom/dicom2nifti_gantrytilting/001": "14.0°",
        "dicom/dicom2nifti_notavolume/001": "4 slices at 1 positions",
    }.items():
        with pytest.raises(CTReadError, match=words):
            read_ct(test_data / name)


def test_real_nrrd_under_a_wrong_name(test_data, tmp_path):
    shutil.copy(test_data / "ct/cip_ct-64.nrrd", tmp_path / "scan.nii.gz")
    assert read_ct(tmp_path / "scan.nii.gz").shape == (64, 64, 79)
