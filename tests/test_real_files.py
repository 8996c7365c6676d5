"""Real files: what each holds once read, or why it is refused; and one scan in every form that it can take.

The files are not part of the repository; see tests/conftest.py.
"""

import gzip
import logging
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from samf import SamfImageProcessor
from samf.ct_volume import AIR_HU, CTReadError, CTVolume, read_ct, to_ct_volume

NO_HU = "its values are no Hounsfield units"

# Path → what is read: shape, orientation of the stored array, spacing in mm, lowest and highest HU.
READ = {
    "ct/cip_ct-64.nrrd": ((64, 64, 79), "LPS", (4.171872, 4.171872, 3.987342), (-1007, 1095)),
    "ct/elastix_3DCT_lung_small.mha": ((57, 78, 64), "LPS", (2.732, 2.732, 5), (-1130, 1379)),
    "ct/pyradiomics_lung1.nrrd": ((512, 512, 48), "LPS", (0.5703125, 0.5703125, 5), (-1024, 3071)),
    "ct/totalseg_abdomen_small_3mm.nii.gz": ((122, 101, 30), "RAS", (3, 3, 3), (-1100, 1207)),
    "ct/totalseg_chest_cta_1.5mm.nii.gz": ((233, 167, 191), "LPS", (1.5, 1.5, 1.5), (-1094, 3343)),
    "dicom/cip_ct-64_79sl": ((64, 64, 79), "LPS", (4.171872, 4.171872, 3.987342), (-1007, 1095)),
    "dicom/totalseg_abdomen_20sl_j2k": ((512, 512, 20), "LPS", (0.9765625, 0.9765625, 2), (-1024, 1839)),
    "odd/CT_small.dcm": ((128, 128, 1), "LPS", (0.661468, 0.661468, 5), (-896, 1167)),
    "odd/niivue_low_res_7x5x3.nii.gz": ((7, 5, 3), "RAS", (2, 2, 2), (0, 1)),
}
# The same, with words that the log must hold.
READ_WITH_A_WARNING = {
    "odd/cip_ct-64-transformed_rot20deg.nrrd": (
        ((82, 82, 79), "LPS", (4.171872, 4.171872, 3.987342), (-1024, 1029)),
        "axes 20.0° off the patient's; resampled",
    ),
    "odd/niivue_minimal_bigendian_noxform.nii.gz": (
        ((64, 64, 10), "LAS", (3, 3, 3), (0, 63)),
        "its header has no orientation",
    ),
}
# Path → words of the error, and what is read with allow_non_ct=True (None: refused all the same).
REFUSED = {
    "ct/cip_wholeLung-64_mask.nrrd": (
        NO_HU,
        ((64, 64, 79), "LPS", (4.171872, 4.171872, 3.987342), (0, 1)),
    ),
    "dicom/dicom2nifti_gantrytilting": (  # noise instead of pixels
        f"{NO_HU}.*14.0° off a right angle",
        ((512, 497, 15), "LPS", (0.41796875, 0.41796875, 5), (-1024, -770)),
    ),
    "dicom/dicom2nifti_notavolume": ("4 slices at 1 positions", None),
    "dicom/torchio_MR_labelled_CT_17sl_rot180": (NO_HU, ((88, 128, 17), "RAS", (2, 2, 2), (0, 696))),
    "odd/functional.nii": (r"4-D image of shape \(17, 21, 3, 20\)", None),
    "odd/niivue_CT_pitch_oblique16.nii.gz": (  # a picture of 8 bits
        NO_HU,
        ((175, 286, 80), "RAS", (0.8125, 0.8125, 2.397049), (-1024, 251)),
    ),
    "odd/niivue_complex64.nii.gz": ("voxels of type complex64", None),
}
# One MR picture in 24 axis orders.
# fmt: off
ORIENTATIONS = (
    "AIR", "ALS", "ARS", "ASR", "IAR", "ILP", "IPR", "IRP", "LAS", "LIP", "LPS", "LSP",
    "PIR", "PLS", "PRS", "PSR", "RAS", "RIP", "RPS", "RSP", "SAR", "SLP", "SPR", "SRP",
)
# fmt: on
# Axes R, A, S of that picture: voxels, mm.
MR_SHAPE, MR_SPACING = (64, 79, 67), (2.385232, 2.389754, 2.366486)
# What holds no volume: for other tests.
NO_VOLUMES = ("tokenizers", "nltk", "lm", "reports", "README.md")


def assert_is(volume: CTVolume, expected: tuple) -> None:
    shape, orientation, spacing, limits = expected
    assert (volume.shape, volume.stored_orientation) == (shape, orientation)
    np.testing.assert_allclose(volume.spacing, spacing, rtol=2e-6)
    assert (int(volume.hu.min()), int(volume.hu.max())) == limits
    assert volume.hu.dtype == np.int16 and (np.diag(volume.affine)[:3] > 0).all()


def test_the_tables_name_every_file(test_data):
    named = {*READ, *READ_WITH_A_WARNING, *REFUSED, *(f"orient/{name}.nii.gz" for name in ORIENTATIONS)}
    for path in test_data.rglob("*"):
        parts = path.relative_to(test_data).parts
        if path.is_file() and parts[0] not in NO_VOLUMES:
            assert any("/".join(parts[:n]) in named for n in range(1, len(parts) + 1)), parts
    assert all((test_data / name).exists() for name in named)


@pytest.mark.parametrize("name", READ)
def test_read_right(test_data, caplog, name):
    assert_is(read_ct(test_data / name), READ[name])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", READ_WITH_A_WARNING)
def test_read_with_a_warning(test_data, caplog, name):
    expected, words = READ_WITH_A_WARNING[name]
    assert_is(read_ct(test_data / name), expected)
    assert f"{Path(name).name}: {words}" in caplog.text


@pytest.mark.parametrize("name", REFUSED)
def test_refused_for_the_right_reason(test_data, name):
    words, allowed = REFUSED[name]
    with pytest.raises(CTReadError, match=words) as error:
        read_ct(test_data / name)
    assert str(test_data / name) in str(error.value)
    if allowed is None:
        with pytest.raises(CTReadError, match=words):
            read_ct(test_data / name, allow_non_ct=True)
    else:
        assert_is(read_ct(test_data / name, allow_non_ct=True), allowed)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_one_picture_in_24_axis_orders(test_data, name):
    path = test_data / f"orient/{name}.nii.gz"
    with pytest.raises(CTReadError, match=NO_HU):
        read_ct(path)
    volume = read_ct(path, allow_non_ct=True)
    assert_is(volume, (MR_SHAPE, name, MR_SPACING, (0, 93)))
    np.testing.assert_array_equal(volume.hu, read_ct(test_data / "orient/RAS.nii.gz", allow_non_ct=True).hu)


def test_the_turned_scan_is_the_scan_turned(test_data):
    """The same voxels under a header turned by 20°: the carina, say, is found where the header puts it."""
    plain, turned = (
        read_ct(test_data / "ct/cip_ct-64.nrrd"),
        read_ct(test_data / "odd/cip_ct-64-transformed_rot20deg.nrrd"),
    )
    header = sitk.ReadImage(str(test_data / "odd/cip_ct-64-transformed_rot20deg.nrrd"))
    array = sitk.GetArrayFromImage(header)
    rng = np.random.default_rng(0)
    differences = []
    for index in rng.integers(4, 60, (300, 3)):
        place = np.array(header.TransformContinuousIndexToPhysicalPoint([float(i) for i in index])) * (-1, -1, 1)
        found = np.rint(np.linalg.solve(turned.affine, [*place, 1])[:3]).astype(int)
        window = array[index[2], index[1] - 1 : index[1] + 2, index[0] - 1 : index[0] + 2]
        differences.append(window.min() - 1 <= turned.hu[tuple(found)] <= window.max() + 1)
    assert np.mean(differences) > 0.99 and plain.shape != turned.shape


# ------------------------------------------------------------------------------------------------- one scan in every form


@pytest.fixture(scope="module")
def scan(test_data) -> CTVolume:
    return read_ct(test_data / "ct/cip_ct-64.nrrd")


def all_forms(scan: CTVolume, test_data: Path, folder: Path):
    """(name, what read_ct or to_ct_volume takes): DICOM, NRRD, MetaImage, zips, images in memory, 48 NIfTI orders."""
    yield "DICOM folder", test_data / "dicom/cip_ct-64_79sl"
    nested = folder / "nested" / "a" / "b"
    nested.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files = sorted((test_data / "dicom/cip_ct-64_79sl").iterdir())
    for number, file in zip(rng.permutation(len(files)), files, strict=True):
        shutil.copy(file, (nested if number % 2 else nested.parent) / f"{number:04d}")
    yield "DICOM in nested folders, shuffled, without extension", folder / "nested"
    with zipfile.ZipFile(folder / "dicom.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, f"study/{file.name}")
    yield "zipped DICOM", folder / "dicom.zip"
    image = sitk.ReadImage(str(test_data / "ct/cip_ct-64.nrrd"))
    yield "SimpleITK image", image
    for suffix in ("nrrd", "mha", "mhd", "nii.gz"):
        sitk.WriteImage(image, str(folder / f"itk.{suffix}"))
        yield f"SimpleITK's {suffix}", folder / f"itk.{suffix}"
    with zipfile.ZipFile(folder / "nrrd.zip", "w") as archive:
        archive.write(test_data / "ct/cip_ct-64.nrrd")
    yield "zipped NRRD", folder / "nrrd.zip"
    nifti = nib.load(folder / "itk.nii.gz")
    yield "nibabel image", nifti
    np.savez_compressed(folder / "scan.npz", hu=np.asarray(nifti.dataobj), affine=nifti.affine)
    yield "npz", folder / "scan.npz"
    for axes in np.array(list(np.ndindex(3, 3, 3))):
        if len(set(axes)) == 3:
            for signs in np.ndindex(2, 2, 2):
                orientation = np.stack([axes, 1 - 2 * np.array(signs)], axis=1)
                turned = nifti.as_reoriented(orientation)
                codes = "".join(nib.aff2axcodes(turned.affine))
                nib.save(turned, folder / f"{codes}.nii")
                yield f"NIfTI {codes}", folder / f"{codes}.nii"


def test_one_scan_in_every_form_gives_one_stack(scan, test_data, tmp_path):
    processor = SamfImageProcessor(slices_per_plane=5, size=48)
    expected = processor.extract(scan)
    names = set()
    for name, form in all_forms(scan, test_data, tmp_path):
        volume = to_ct_volume(form)
        stack = processor.extract(volume)
        np.testing.assert_array_equal(volume.hu, scan.hu, err_msg=name)
        np.testing.assert_allclose(volume.affine, scan.affine, atol=2e-3, err_msg=name)
        for key in ("slices", "slice_planes", "slice_positions", "slice_indices"):
            np.testing.assert_array_equal(stack[key], expected[key], err_msg=f"{name}: {key}")
        names.add(name)
    assert len(names) == 59 and sum(name.startswith("NIfTI ") for name in names) == 48


# --------------------------------------------------------------------------------------------- what that scan can suffer


@pytest.fixture
def nifti(scan, tmp_path):
    """Saves an array under the scan's affine."""

    def save(array, name="scan.nii.gz", affine=scan.affine, dtype=None):
        image = nib.Nifti1Image(array, affine, dtype=dtype or array.dtype)
        nib.save(image, tmp_path / name)
        return tmp_path / name

    return save


def test_types_and_shapes_of_the_scan(scan, nifti):
    hu = np.ascontiguousarray(scan.hu)
    for array in (hu.astype(np.int32), hu.astype(np.float32), hu.astype(">i2"), hu.astype(np.float64), hu[..., None]):
        np.testing.assert_array_equal(read_ct(nifti(array)).hu, hu)
    raw = (hu.astype(np.int32) + 1024).astype(np.uint16)
    np.testing.assert_array_equal(read_ct(nifti(raw), rescale=(1, -1024)).hu, hu)
    with pytest.raises(CTReadError, match="4-D"):
        read_ct(nifti(np.stack([hu, hu], axis=-1)))


def test_voxels_and_affines_that_are_not_numbers(scan, nifti, caplog):
    values = scan.hu.astype(np.float32)
    values[10:20, 30, 40] = np.nan
    values[5, 5, :3] = np.inf
    hu = read_ct(nifti(values)).hu
    assert (hu[10:20, 30, 40] == AIR_HU).all() and (hu[5, 5, :3] == AIR_HU).all() and "13 voxels are NaN" in caplog.text
    rest = np.isfinite(values)
    np.testing.assert_array_equal(hu[rest], scan.hu[rest])
    path = nifti(np.ascontiguousarray(scan.hu), "nan.nii")
    data = bytearray(path.read_bytes())
    data[280:328] = np.full(12, np.nan, "<f4").tobytes()  # the sform's rows
    data[252:254] = (0).to_bytes(2, "little")  # no qform
    path.write_bytes(data)
    volume = read_ct(path)
    np.testing.assert_allclose(volume.spacing, scan.spacing, rtol=1e-6)
    assert "nan.nii: its affine is NaN or singular" in caplog.text


@pytest.mark.parametrize("slope", [np.nan, 0.0, np.inf])
def test_a_slope_that_is_no_number_means_none(scan, nifti, slope):
    path = nifti(np.ascontiguousarray(scan.hu), "scan.nii")
    data = bytearray(path.read_bytes())
    data[112:120] = np.array([slope, np.nan], "<f4").tobytes()
    path.write_bytes(data)
    np.testing.assert_array_equal(read_ct(path).hu, scan.hu)


def test_damaged_copies_of_the_scan(scan, nifti):
    path = nifti(np.ascontiguousarray(scan.hu))
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for share in (0.001, 0.1, 0.5, 0.999):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CTReadError, match="scan.nii.gz"):
            read_ct(path)
    for place in rng.integers(100, len(data) - 4, 20):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.integers(8))]) + data[place + 1 :])
        with pytest.raises(CTReadError, match="scan.nii.gz"):
            read_ct(path)


def test_any_name_will_do(scan, nifti, test_data, tmp_path):
    path = nifti(np.ascontiguousarray(scan.hu))
    (tmp_path / "plain.nii.gz").write_bytes(gzip.decompress(path.read_bytes()))
    shutil.copy(path, tmp_path / "packed.nii")
    shutil.copy(test_data / "ct/cip_ct-64.nrrd", tmp_path / "nrrd.nii.gz")
    shutil.copy(test_data / "dicom/cip_ct-64_79sl/IMG0001.dcm", tmp_path / "slice.nii")
    for name in ("plain.nii.gz", "packed.nii", "nrrd.nii.gz"):
        np.testing.assert_array_equal(read_ct(tmp_path / name).hu, scan.hu)
    assert read_ct(tmp_path / "slice.nii").shape == (64, 64, 1)


def dicom_copy(test_data, folder, keep=lambda k: True, change=None):
    """The scan's slices, from foot to head, those that `keep` names; `change(dataset, k)` may alter them."""
    folder.mkdir(exist_ok=True)
    datasets = [pydicom.dcmread(path) for path in (test_data / "dicom/cip_ct-64_79sl").iterdir()]
    datasets.sort(key=lambda dataset: dataset.ImagePositionPatient[2])
    for k, dataset in enumerate(datasets):
        if keep(k):
            if change is not None:
                change(dataset, k)
            dataset.save_as(folder / f"{len(list(folder.iterdir())):04d}")
    return folder


def test_two_series_in_one_folder(scan, test_data, tmp_path, caplog):
    def other(dataset, k):
        dataset.SeriesInstanceUID = "1.2.3.4"

    folder = dicom_copy(test_data, tmp_path / "study")
    dicom_copy(test_data, folder, lambda k: k < 30, other)
    np.testing.assert_array_equal(read_ct(folder).hu, scan.hu)
    assert "2 series" in caplog.text
    np.testing.assert_array_equal(read_ct(folder, series_uid="1.2.3.4").hu, scan.hu[..., :30])


def test_a_missing_slice_is_interpolated_and_more_are_refused(scan, test_data, tmp_path, caplog):
    volume = read_ct(dicom_copy(test_data, tmp_path / "one", lambda k: k != 40))
    assert volume.shape == scan.shape and "8.0 of 311.0 mm lie in 1 odd gaps" in caplog.text
    kept = np.arange(79) != 40
    np.testing.assert_array_equal(volume.hu[..., kept], scan.hu[..., kept])
    between = (scan.hu[..., 39].astype(float) + scan.hu[..., 41]) / 2
    assert np.abs(volume.hu[..., 40] - between).max() <= 0.6
    with pytest.raises(CTReadError, match="11.96 mm after slice 40"):
        read_ct(dicom_copy(test_data, tmp_path / "two", lambda k: k not in (40, 41)))


def test_first_release_and_rescaled_twice(scan, nifti, caplog):
    hu = np.ascontiguousarray(scan.hu).astype(np.int32)
    for intercept in (-1024, -8192):
        raw = nifti((hu[::-1, ::-1] - intercept).astype(np.int16), "v1.nii.gz", np.eye(4))  # stored as DICOM's axes run
        volume = read_ct(raw, rescale=(1, intercept), spacing=scan.spacing)
        np.testing.assert_array_equal(volume.hu, scan.hu)
        np.testing.assert_allclose(volume.spacing, scan.spacing)
        with pytest.raises(CTReadError, match=f"{NO_HU}.*pass rescale="):
            read_ct(raw)
        fixed = nifti(hu.astype(np.int16), "v2.nii.gz")
        with pytest.raises(CTReadError, match="Hounsfield units already"):
            read_ct(fixed, rescale=(1, intercept))
        twice = nifti(np.clip(hu + intercept, -32768, 32767).astype(np.int16), "twice.nii.gz")
        with pytest.raises(CTReadError, match=f"{NO_HU}.*rescaled twice"):
            read_ct(twice)


def test_padding_around_the_scan(scan, nifti, caplog):
    caplog.set_level(logging.INFO)
    hu = np.ascontiguousarray(scan.hu)
    x, y = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64), indexing="ij")
    outside = np.broadcast_to((x**2 + y**2 > 1)[..., None], hu.shape)
    for padding in (-3024, -8192, -2000):
        read = read_ct(nifti(np.where(outside, padding, hu).astype(np.int16))).hu
        np.testing.assert_array_equal(read, np.where(outside, AIR_HU, hu))
        assert f"{outside.sum()} voxels below -1500 HU (down to {padding})" in caplog.text
