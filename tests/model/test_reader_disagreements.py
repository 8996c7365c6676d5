"""Valid files that readers of this field read differently: what is read here, as docs/reference/readers.md says and why.

What another package does is asked of it where it is at hand (nibabel, SimpleITK, pydicom); of others the page gives the
version that was run.
"""

import gzip
import logging
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import EachSlice, slice_dataset, slice_hu, stack_positions, world_hu, write_enhanced, write_series

from samf.model.ct_volume import AIR_HU, CTReadError, read_ct, to_ct_volume

SHAPE, SPACING = (9, 7, 5), (0.7, 0.8, 1.5)
ROOT = Path(__file__).parents[2]


def ramp() -> np.ndarray:
    """A volume in which every voxel differs."""
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) - 100).astype(np.int16)


def itk(path) -> sitk.Image:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    return reader.Execute()


def nifti(path, qform=None, sform=None, zooms=SPACING, unit="mm", array=None):
    """A NIfTI with the forms that are given, code 1, and no other."""
    image = nib.Nifti1Image(ramp() if array is None else array, None)
    image.header.set_zooms(zooms)
    image.header.set_xyzt_units(unit)
    for form, affine in (("qform", qform), ("sform", sform)):
        if affine is not None:
            getattr(image.header, f"set_{form}")(affine, code=1)
    nib.save(image, path)
    return path


def patched(path, **fields):
    """The header's numbers of an uncompressed NIfTI-1, by place: float32 at each."""
    data = bytearray(path.read_bytes())
    for place, value in fields.items():
        place = int(place.removeprefix("at"))
        data[place : place + 4] = np.float32(value).tobytes()
    path.write_bytes(data)
    return path


def lps(spacing=SPACING, origin=(20, 30, -400)) -> np.ndarray:
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = origin
    return affine


def warned(caplog) -> str:
    return " ".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


# ---------------------------------------------------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e-3), ("micron", 1e3)])
@pytest.mark.parametrize("forms", [False, True])
def test_nifti_in_metres_or_micrometres(tmp_path, caplog, unit, factor, forms):
    sizes = tuple(mm * factor for mm in SPACING)
    affine = np.diag([factor, factor, factor, 1]) @ lps() if forms else None
    path = nifti(tmp_path / "scan.nii", affine, affine, sizes, unit)
    np.testing.assert_allclose(nib.load(path).header.get_zooms(), sizes, rtol=1e-6)  # nibabel leaves them
    np.testing.assert_allclose(itk(path).GetSpacing(), SPACING, rtol=1e-6)
    for volume in (read_ct(path), to_ct_volume(nib.load(path))):
        np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-6)
    assert "unit" not in warned(caplog)  # the unit is right
    assert ("no orientation" in warned(caplog)) == (not forms)


@pytest.mark.parametrize("forms", [False, True])
def test_a_wrong_unit_is_passed_over_with_a_word(tmp_path, caplog, forms):
    path = nifti(tmp_path / "scan.nii", lps() if forms else None, None, SPACING, "meter")
    np.testing.assert_allclose(itk(path).GetSpacing(), np.array(SPACING) * 1000, rtol=1e-6)
    np.testing.assert_allclose(read_ct(path).spacing, SPACING, rtol=1e-6)
    assert (
        "scan.nii: in its header's units voxels would measure 700 x 800 x 1500 mm; reads its numbers as mm"
        in caplog.text
    )


def test_nifti_without_a_form(tmp_path, caplog):
    path = nifti(tmp_path / "scan.nii")
    assert nib.aff2axcodes(nib.load(path).affine) == tuple("LAS")
    assert itk(path).GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)  # left, back, head
    assert read_ct(path).stored_orientation == "LAS"
    assert "no orientation; assumes voxels of 0.7 x 0.8 x 1.5 mm with axes pointing left, front, head" in caplog.text
    caplog.clear()
    told = read_ct(path, axes="LPS")
    np.testing.assert_array_equal(told.hu, ramp()[::-1, ::-1])
    np.testing.assert_allclose(told.spacing, SPACING)
    assert not warned(caplog)


@pytest.mark.parametrize("qfac", [0, 0.5, 2, np.nan])
def test_a_qfac_that_is_none_is_1(tmp_path, caplog, qfac):
    good = read_ct(nifti(tmp_path / "good.nii", lps()))
    path = patched(nifti(tmp_path / "odd.nii", lps()), at76=qfac)
    assert nib.aff2axcodes(nib.load(path).affine) == tuple("LPS")
    if qfac == 0:
        assert itk(path).GetDirection()[::4] == (1, 1, 1)
    caplog.clear()
    volume = read_ct(path)
    np.testing.assert_array_equal(volume.hu, good.hu)
    np.testing.assert_allclose(volume.affine, good.affine, atol=1e-6)
    assert f"odd.nii: in the header of its qform pixdim[0] (qfac) is {qfac:g}, read as 1" in warned(caplog)
    assert "NaN or singular" not in caplog.text


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_negative_pixdim_keeps_its_form(tmp_path, caplog, axis):
    good = read_ct(nifti(tmp_path / "good.nii", lps()))
    path = patched(nifti(tmp_path / "odd.nii", lps()), **{f"at{76 + 4 * axis}": -SPACING[axis - 1]})
    assert itk(path).GetDirection()[::4] != (1, 1, 1)  # it turns that axis round
    assert nib.aff2axcodes(nib.load(path).affine) == tuple("LPS")
    caplog.clear()
    np.testing.assert_array_equal(read_ct(path).hu, good.hu)
    assert f"odd.nii: in the header of its qform pixdim[{axis}] is -{SPACING[axis - 1]:g}" in warned(caplog)


def test_a_size_of_zero_loses_its_size_and_not_the_sides(tmp_path, caplog):
    path = patched(nifti(tmp_path / "odd.nii", lps()), at88=0)
    volume = read_ct(path)
    np.testing.assert_array_equal(volume.hu, ramp()[::-1, ::-1])
    np.testing.assert_allclose(volume.spacing, (0.7, 0.8, 1), rtol=1e-6)
    np.testing.assert_allclose(itk(path).GetSpacing(), (0.7, 0.8, 1), rtol=1e-6)
    assert "pixdim[3] is 0, read as 1 mm" in caplog.text


def test_a_quaternion_longer_than_1_keeps_its_direction(tmp_path, caplog):
    """The axes to the left, back and head are half a turn about z: b, c, d = 0, 0, 1."""
    for length, words in ((1.00003, False), (1.2, True)):
        path = patched(nifti(tmp_path / "odd.nii", lps()), at264=length)
        np.testing.assert_allclose(itk(path).GetDirection(), np.eye(3).ravel(), atol=1e-6)
        caplog.clear()
        volume = read_ct(path)
        np.testing.assert_array_equal(volume.hu, ramp()[::-1, ::-1])
        np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-6)
        assert ("its quaternion's length is 1.2, read as 1" in caplog.text) == words


def test_odd_numbers_of_a_qform_that_does_not_count_are_not_told(tmp_path, caplog):
    path = patched(nifti(tmp_path / "scan.nii", lps(), lps()), at76=0)
    np.testing.assert_array_equal(read_ct(path).hu, ramp()[::-1, ::-1])
    assert not warned(caplog)


def test_a_sform_beside_a_qform(tmp_path, caplog):
    """SimpleITK takes the qform where the sform's code is 2, and its sizes from pixdim wherever the form is from."""
    path = nifti(tmp_path / "scan.nii", lps())
    image = nib.load(path)
    image.header.set_sform(np.diag([1, 1, 2, 1]), code=2)
    nib.save(nib.Nifti1Image(ramp(), None, image.header), path)
    assert itk(path).GetDirection()[::4] == (1, 1, 1) and itk(path).GetSpacing()[0] == pytest.approx(0.7)
    volume = read_ct(path)
    np.testing.assert_array_equal(volume.hu, ramp())
    assert volume.spacing == (1, 1, 2) and "sform and qform disagree" in caplog.text


def test_a_slope_that_is_no_number(tmp_path):
    """nibabel passes slope and intercept over; SimpleITK adds the intercept."""
    raw = np.random.default_rng(0).normal(1040, 30, (24, 24, 24)).astype(np.int16)
    path = patched(nifti(tmp_path / "scan.nii", lps(), array=raw), at112=np.nan, at116=-1024)
    assert itk(path)[0, 0, 0] == raw[0, 0, 0] - 1024
    np.testing.assert_array_equal(nib.load(path).get_fdata(), raw)
    with pytest.raises(CTReadError, match="not Hounsfield units.*pass rescale="):
        read_ct(path)
    np.testing.assert_array_equal(read_ct(path, rescale=(1, -1024)).stored_hu(), raw - 1024)


def test_a_fourth_axis_of_one(tmp_path):
    path = nifti(tmp_path / "scan.nii", lps(), array=ramp()[..., None], zooms=(*SPACING, 1))
    assert (itk(path).GetDimension(), nib.load(path).ndim) == (3, 4)
    assert read_ct(path).shape == SHAPE


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_nifti_in_two_files(tmp_path, packed):
    nib.save(nib.Nifti1Pair(ramp(), lps()), tmp_path / "scan.hdr")
    expected = read_ct(nifti(tmp_path / "one.nii", lps()))
    if packed:
        for name in ("scan.hdr", "scan.img"):
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
            (tmp_path / name).unlink()
    for name in ("scan.hdr", "scan.img"):
        volume = read_ct(tmp_path / f"{name}{packed}")
        np.testing.assert_array_equal(volume.hu, expected.hu)
        np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-5)
    (tmp_path / f"scan.img{packed}").unlink()
    with pytest.raises(CTReadError, match="scan.hdr.*: found half of a .hdr/.img pair; the .img is missing next to it"):
        read_ct(tmp_path / f"scan.hdr{packed}")


def test_analyze_is_refused_by_either_name(tmp_path):
    """It has no orientation, and the two libraries guess differently."""
    nib.save(nib.Spm99AnalyzeImage(ramp(), np.diag([-1, 1, 1, 1])), tmp_path / "scan.hdr")
    (tmp_path / "scan.mat").unlink(missing_ok=True)
    assert itk(tmp_path / "scan.hdr").GetDirection()[::4] == (1, 1, 1)
    for name in ("scan.hdr", "scan.img"):
        with pytest.raises(
            CTReadError, match=f"{name}.* an Analyze 7.5 header, which has no orientation .nibabel assumes"
        ):
            read_ct(tmp_path / name)


# ---------------------------------------------------------------------------------------------------- NRRD and MetaImage


def nrrd(path, *lines, sizes=SHAPE, array=None):
    head = ["NRRD0004", "type: short", f"dimension: {len(sizes)}", f"sizes: {' '.join(map(str, sizes))}"]
    head += ["endian: little", "encoding: raw", *lines]
    data = (ramp() if array is None else array).astype("<i2").tobytes(order="F")
    path.write_bytes(("\n".join(head) + "\n\n").encode() + data)
    return path


@pytest.mark.parametrize("spacings", [(0.7, 0.8, 1.5), (0.7, 0.8, -1.5), (-0.7, -0.8, -1.5)])
def test_nrrd_spacings_without_directions(tmp_path, caplog, spacings):
    """pynrrd's {"spacings": …}: SimpleITK, and so Slicer and ITK-SNAP, take the axes as LPS; a minus turns one round."""
    path = nrrd(tmp_path / "scan.nrrd", f"spacings: {' '.join(map(str, spacings))}")
    volume, expected = read_ct(path), to_ct_volume(itk(path))
    np.testing.assert_array_equal(volume.hu, expected.hu)
    np.testing.assert_allclose(volume.spacing, SPACING)
    assert volume.stored_orientation == expected.stored_orientation
    runs = ["left" if spacings[0] > 0 else "right", "back" if spacings[1] > 0 else "front"]
    runs += ["head" if spacings[2] > 0 else "foot"]
    assert f"no orientation; assumes voxels of 0.7 x 0.8 x 1.5 mm with axes pointing {', '.join(runs)}" in caplog.text
    caplog.clear()
    assert read_ct(path, axes="RAI").stored_orientation == "RAI" and not warned(caplog)


@pytest.mark.parametrize(("unit", "factor"), [("cm", 0.1), ("m", 1e-3), ("um", 1e3), ("µm", 1e3), ("mm", 1)])
def test_nrrd_units(tmp_path, caplog, unit, factor):
    """The same voxels as under the header in mm. SimpleITK and pynrrd don't look at the units."""
    units = " ".join([f'"{unit}"'] * 3)
    sizes = [mm * factor for mm in SPACING]
    directions = f"space directions: ({sizes[0]},0,0) (0,{sizes[1]},0) (0,0,{sizes[2]})"
    origin = f"space origin: ({20 * factor},{30 * factor},{-400 * factor})"
    path = nrrd(tmp_path / "scan.nrrd", "space: LPS", directions, origin, f"space units: {units}")
    np.testing.assert_allclose(itk(path).GetSpacing(), sizes, rtol=1e-6)
    volume = read_ct(path)
    np.testing.assert_array_equal(volume.stored_hu(), ramp())
    np.testing.assert_allclose(volume.spacing, SPACING)
    np.testing.assert_allclose(volume.affine @ [8, 6, 0, 1], (-20, -30, -400, 1), atol=1e-6)  # the first stored voxel
    assert not warned(caplog)
    path = nrrd(tmp_path / "plain.nrrd", f"spacings: {sizes[0]} {sizes[1]} {sizes[2]}", f"units: {units}")
    np.testing.assert_allclose(read_ct(path).spacing, SPACING)


def test_nrrd_units_that_cannot_be_are_passed_over_with_a_word(tmp_path, caplog):
    directions = "space directions: (0.7,0,0) (0,0.8,0) (0,0,1.5)"
    for units, words in (('"m" "m" "m"', "would measure 700 x 800 x 1500 mm"), ('"ft" "ft" "ft"', "are not known")):
        path = nrrd(tmp_path / "scan.nrrd", "space: LPS", directions, f"space units: {units}")
        np.testing.assert_allclose(read_ct(path).spacing, SPACING)
        assert words in caplog.text


def test_nrrd_of_an_unknown_space(tmp_path, caplog):
    path = nrrd(tmp_path / "scan.nrrd", "space dimension: 3", "space directions: (0.7,0,0) (0,0.8,0) (0,0,1.5)")
    assert itk(path).GetDirection()[::4] == (1, 1, 1)
    assert read_ct(path).stored_orientation == "LPS" and "read as left-posterior-superior" in caplog.text


@pytest.mark.parametrize("first", [True, False])
def test_nrrd_axes_that_are_no_room(tmp_path, first):
    directions = ["(0.7,0,0)", "(0,0.8,0)", "(0,0,1.5)"]
    for count in (1, 3):
        sizes = (count, *SHAPE) if first else (*SHAPE, count)
        array = np.stack([ramp()] * count, axis=0 if first else -1)
        parts = ["none", *directions] if first else [*directions, "none"]
        spacings = ["NaN", "0.7", "0.8", "1.5"] if first else ["0.7", "0.8", "1.5", "NaN"]
        for lines in (("space: LPS", f"space directions: {' '.join(parts)}"), (f"spacings: {' '.join(spacings)}",)):
            path = nrrd(tmp_path / "scan.nrrd", *lines, sizes=sizes, array=array)
            if count == 1:
                np.testing.assert_array_equal(read_ct(path).stored_hu(), ramp())
                np.testing.assert_allclose(read_ct(path).spacing, SPACING)
                continue
            with pytest.raises(CTReadError, match="found 3 values per voxel"):
                read_ct(path)


def meta(path, *lines):
    head = ["ObjectType = Image", "NDims = 3", f"DimSize = {' '.join(map(str, SHAPE))}", "ElementType = MET_SHORT"]
    head += ["BinaryData = True", "BinaryDataByteOrderMSB = False", *lines, "ElementDataFile = LOCAL"]
    path.write_bytes(("\n".join(head) + "\n").encode() + ramp().astype("<i2").tobytes(order="F"))
    return path


@pytest.mark.parametrize("matrix", [None, "0 1 0 1 0 0 0 0 1", "0 1 0 0 0 1 1 0 0"])  # the last isn't its own transpose
@pytest.mark.parametrize("spacing", ["0.7 0.8 -1.5", "-0.7 0.8 1.5"])
def test_metaimage_with_a_minus_in_its_spacing(tmp_path, matrix, spacing):
    lines = [f"ElementSpacing = {spacing}", "Offset = 20 30 -400"]
    path = meta(tmp_path / "scan.mha", *lines, *([f"TransformMatrix = {matrix}"] if matrix else []))
    volume, expected = read_ct(path), to_ct_volume(itk(path))
    np.testing.assert_array_equal(volume.hu, expected.hu)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)
    assert volume.stored_orientation == expected.stored_orientation not in ("LPS", "PLS")


def test_metaimage_anatomical_orientation_counts_for_nothing(tmp_path):
    for code in ("RAI", "LPI", "ASL"):
        path = meta(tmp_path / "scan.mha", f"AnatomicalOrientation = {code}", "ElementSpacing = 0.7 0.8 1.5")
        assert itk(path).GetDirection()[::4] == (1, 1, 1) and read_ct(path).stored_orientation == "LPS"


def test_metaimage_units(tmp_path):
    path = meta(tmp_path / "scan.mha", "DistanceUnits = cm", "ElementSpacing = 0.07 0.08 0.15", "Offset = 2 3 -40")
    volume, expected = (
        read_ct(path),
        read_ct(meta(tmp_path / "mm.mha", "ElementSpacing = 0.7 0.8 1.5", "Offset = 20 30 -400")),
    )
    np.testing.assert_allclose(volume.affine, expected.affine)


# ---------------------------------------------------------------------------------------------------------------- DICOM


def itk_series(folder) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def assert_every_voxel_in_place(volume, tolerance=1.0):
    indices = np.stack(np.meshgrid(*(np.arange(n) for n in volume.shape), indexing="ij"), axis=-1)
    places = (indices @ volume.affine[:3, :3].T + volume.affine[:3, 3]) * (-1, -1, 1)
    assert np.abs(volume.hu - world_hu(places)).max() <= tolerance


def test_an_enhanced_file_with_an_intercept_for_each_frame_and_its_frames_in_disorder(tmp_path):
    """SimpleITK: the first frame's slope for all, stored order, voxels of 1 mm; pydicom's apply_rescale: raw values."""
    positions = stack_positions(6)[[3, 0, 5, 1, 4, 2]]
    path = write_enhanced(tmp_path / "enhanced.dcm", positions, [1, 2, 1, 4, 1, 2])
    assert itk(path).GetSpacing()[2] == 1
    dataset = pydicom.dcmread(path)
    raw = pydicom.pixels.apply_rescale(dataset.pixel_array, dataset)
    np.testing.assert_array_equal(raw, dataset.pixel_array)
    assert_every_voxel_in_place(read_ct(path), 2.6)


def test_slopes_and_intercepts_that_vary_in_a_series(tmp_path):
    """SimpleITK gives all slices the first file's type: uint16 where its intercept is 0, and air below becomes 64,536."""
    folder = write_series(
        tmp_path / "own",
        intercept=EachSlice([0, *[-1024] * 5]),
        PixelRepresentation=0,
        hu=EachSlice([np.zeros((14, 18))] + [slice_hu(position) for position in stack_positions()[1:]]),
    )
    assert sitk.GetArrayFromImage(itk_series(folder)).max() > 60_000
    assert read_ct(folder).hu.min() < 0 and read_ct(folder).hu.max() < 1000


def test_a_missing_slice_moves_no_other(tmp_path, caplog):
    """SimpleITK spreads the slices evenly over the gap."""
    folder = write_series(tmp_path / "gap", np.delete(stack_positions(12), 5, axis=0))
    assert itk_series(folder).GetSpacing()[2] == pytest.approx(27.5 / 10)
    volume = read_ct(folder)
    assert volume.spacing[2] == pytest.approx(2.5) and "interpolated" in caplog.text
    assert_every_voxel_in_place(volume)


def test_two_passes_under_one_uid_are_refused(tmp_path):
    """SimpleITK stacks the second behind the first, at half the distance."""
    positions = np.repeat(stack_positions(), 2, axis=0)
    hu = EachSlice(slice_hu(position) + 5 * (k % 2) for k, position in enumerate(positions))
    folder = write_series(tmp_path / "passes", positions, hu=hu, AcquisitionNumber=EachSlice([1, 2] * 6))
    assert itk_series(folder).GetSize()[2] == 12
    with pytest.raises(CTReadError, match="12 slices at 6 positions.*They differ in AcquisitionNumber"):
        read_ct(folder)


def test_padding_is_air_here_and_a_value_elsewhere(tmp_path):
    hu = np.full((14, 18), 40)
    hu[:3] = -3024
    folder = write_series(tmp_path / "padded", hu=EachSlice([hu] * 6), PixelPaddingValue=-2000)
    assert sitk.GetArrayFromImage(itk_series(folder)).min() == -3024
    assert read_ct(folder).hu.min() == AIR_HU


def test_spectral_maps_are_no_hu(tmp_path):
    folder = write_series(tmp_path / "iodine", RescaleType="MGML")
    assert itk_series(folder).GetSize()[2] == 6  # read like HU
    with pytest.raises(CTReadError, match="in unit MGML instead of HU"):
        read_ct(folder)


def test_a_scout_under_the_series_uid(tmp_path):
    """SimpleITK fails, or turns the whole CT's axes."""
    folder = write_series(tmp_path / "study")
    scout = slice_dataset(slice_hu((-12, 7, 60))[:9], (-12, 7, 60), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    scout.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    scout.save_as(folder / "scout", enforce_file_format=True)
    with pytest.raises(RuntimeError):
        itk_series(folder)
    assert_every_voxel_in_place(read_ct(folder))


# ------------------------------------------------------------------------------------------------------------- the page


def test_every_row_of_the_page_names_a_test_that_there_is():
    text = (ROOT / "docs" / "reference" / "readers.md").read_text(encoding="utf-8")
    rows = [
        line for line in text.splitlines() if line.startswith("| ") and "---" not in line and "| tested by" not in line
    ]
    files = (ROOT / "tests").rglob("test_*.py")
    tests = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)}
    named = [re.findall(r"`(test_\w+)`", row) for row in rows]
    assert len(rows) >= 35 and all(named), [row for row, found in zip(rows, named, strict=True) if not found]
    assert not {name for found in named for name in found if name not in tests}
