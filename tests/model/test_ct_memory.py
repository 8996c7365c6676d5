"""Volumes that are no files on this machine: what carries geometry keeps it, and open files stay as they were."""

import asyncio
import gzip
import io
import logging
import shutil
import tempfile
import types
from contextlib import ExitStack

import datasets
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from dicom_series import stack_positions, write_enhanced, write_series

from samf import SamfImageProcessor
from samf.model.ct_volume import CTReadError, CTVolume, read_ct, to_ct_volume

SHAPE, AFFINE = (
    (9, 7, 5),
    np.array([[0, -1.25, 0, 20], [-0.75, 0, 0, 30], [0, 0, -2.5, -400], [0, 0, 0, 1.0]]),
)  # P, L, I


def ramp() -> np.ndarray:
    """A volume in which every voxel differs."""
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) - 100).astype(np.int16)


@pytest.fixture
def scan(tmp_path):
    nib.save(nib.Nifti1Image(ramp(), AFFINE), tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Image(ramp(), AFFINE), tmp_path / "scan.nii")
    return tmp_path / "scan.nii.gz"


def assert_same(volume: CTVolume, expected: CTVolume) -> None:
    np.testing.assert_array_equal(volume.hu, expected.hu)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)
    assert volume.stored_orientation == expected.stored_orientation


# -------------------------------------------------------------------------------------------- images of other libraries


class MetaTensor(torch.Tensor):
    """As MONAI's: a tensor with an affine, and the coordinates that it counts in."""

    __module__ = "monai.data.meta_tensor"

    def __new__(cls, array, affine, space="RAS"):
        tensor = torch.as_tensor(array).as_subclass(cls)
        tensor.affine, tensor.meta = torch.as_tensor(affine), {"space": space}
        return tensor

    def as_tensor(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("space", ["RAS", "LPS"])
@pytest.mark.parametrize("channel", [False, True])
def test_a_meta_tensor_keeps_its_affine(scan, caplog, space, channel):
    affine = AFFINE if space == "RAS" else np.diag([-1, -1, 1, 1]) @ AFFINE
    array = ramp().astype(np.float32)
    assert_same(to_ct_volume(MetaTensor(array[None] if channel else array, affine, space)), read_ct(scan))
    assert not caplog.records


def test_a_meta_tensor_that_says_too_little_is_refused():
    with pytest.raises(CTReadError, match=r"MONAI image: meta\['space'\] is 'SCANNER'; expected RAS or LPS"):
        to_ct_volume(MetaTensor(ramp(), AFFINE, "scanner"))
    with pytest.raises(CTReadError, match="affine of shape .2, 4, 4.*decollate_batch"):
        to_ct_volume(MetaTensor(np.stack([ramp()[None]] * 2), np.stack([AFFINE] * 2)))


@pytest.mark.parametrize("holder", ["tensor", "array", "object"])
def test_an_affine_of_unknown_coordinates_is_never_dropped(holder):
    """A guess would swap left and right: RAS and LPS are both common."""
    image = {"tensor": torch.from_numpy(ramp()), "object": types.SimpleNamespace(array=ramp())}.get(holder)
    image = ramp().view(type("Array", (np.ndarray,), {})) if image is None else image
    image.affine = AFFINE
    with pytest.raises(TypeError, match="an affine, but nothing says whether it is in RAS or LPS.*Nifti1Image"):
        to_ct_volume(image)


def test_real_meta_tensors(scan):
    transforms = pytest.importorskip("monai.transforms")
    expected = read_ct(scan)
    for options in ({}, {"ensure_channel_first": True}):
        image = transforms.LoadImage(image_only=True, **options)(str(scan))
        assert_same(to_ct_volume(image), expected)
    turned = transforms.Orientation(axcodes="RAS", labels=None)(
        transforms.LoadImage(ensure_channel_first=True)(str(scan))
    )
    volume = to_ct_volume(turned)
    np.testing.assert_array_equal(volume.hu, expected.hu)
    assert volume.stored_orientation == "RAS" and volume.spacing == pytest.approx(expected.spacing)


def test_real_torchio_images(scan):
    torchio = pytest.importorskip("torchio")
    assert_same(to_ct_volume(torchio.ScalarImage(scan)), read_ct(scan))
    processor = SamfImageProcessor(slices_per_plane=2, size=16)
    image = torchio.ScalarImage(tensor=ramp()[None], affine=AFFINE)
    assert torch.equal(processor(image)["pixel_values"], processor(scan)["pixel_values"])  # a mapping, and an image
    with pytest.raises(CTReadError, match="found a label map"):
        to_ct_volume(torchio.LabelMap(tensor=ramp()[None] > 0))
    with pytest.raises(CTReadError, match="found 2 channels"):
        to_ct_volume(torchio.ScalarImage(tensor=np.stack([ramp()] * 2)))
    with pytest.raises(TypeError, match='A subject holds images.*subject."ct".'):
        to_ct_volume(torchio.Subject(ct=image))


def test_real_highdicom_volumes(tmp_path):
    highdicom = pytest.importorskip("highdicom")
    folder = write_series(tmp_path / "series")
    slices = [pydicom.dcmread(path) for path in folder.iterdir()]
    for dataset in slices:  # highdicom looks at the series only where its time and frame of reference are known
        dataset.FrameOfReferenceUID, dataset.StudyTime = "1.2.9", "101010"
    volume = to_ct_volume(highdicom.get_volume_from_series(slices))
    expected = read_ct(folder)
    np.testing.assert_array_equal(volume.hu, expected.hu)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)


class Image(dict):
    __module__ = "torchio.data.image"
    path = None

    def __init__(self, tensor, affine):
        super().__init__(type="intensity")
        self.data, self.affine = tensor, affine


class Volume:
    __module__ = "highdicom.volume"
    coordinate_system = "PATIENT"

    def __init__(self, array, affine):
        self.array, self.affine = array, affine


def test_images_of_torchio_and_highdicom_count_in_their_own_coordinates(scan):
    """TorchIO's affine is RAS; highdicom's, DICOM's LPS."""
    expected = read_ct(scan)
    assert_same(to_ct_volume(Image(torch.from_numpy(ramp()[None]), AFFINE)), expected)
    assert_same(to_ct_volume(Volume(ramp(), np.diag([-1, -1, 1, 1]) @ AFFINE)), expected)
    slide = Volume(ramp(), AFFINE)
    slide.coordinate_system = "SLIDE"
    with pytest.raises(CTReadError, match="coordinates of a slide"):
        to_ct_volume(slide)


def test_what_holds_volumes_is_refused_with_what_to_pass(scan):
    table = datasets.Dataset.from_dict({"nifti": [str(scan)] * 2}).cast_column("nifti", datasets.Nifti())
    processor = SamfImageProcessor(slices_per_plane=2, size=16)
    assert processor(table["nifti"])["pixel_values"].shape[0] == 2  # to the image processor it is a list
    for wrong, words in (
        (table["nifti"], r"A column is many volumes: pass one of them, column\[0\]"),
        (table, r"A data set is many rows: pass the volume of one"),
        ({"image": ramp()}, "A mapping with keys image: pass the image in it"),
        ((ramp(), {"space": "LPS"}), "pynrrd"),
        (3, "got <class 'int'>"),
        (b"scan.nii", r"got <class 'bytes'>. If these are a file's content, pass io.BytesIO\(content\)"),
    ):
        with pytest.raises(TypeError, match=words):
            to_ct_volume(wrong)


def test_spacing_and_axes_of_an_array(caplog):
    """Slices first, from head to foot, rows from front to back, columns from right to left, as RadChestCT stores them."""
    stored = np.ascontiguousarray(ramp()[::-1, ::-1, ::-1].transpose(2, 1, 0))
    volume = to_ct_volume(stored, spacing=(2.5, 1.25, 0.75), axes="ipl")
    np.testing.assert_array_equal(volume.hu, ramp())
    assert volume.spacing == (0.75, 1.25, 2.5) and volume.stored_orientation == "IPL" and not caplog.records
    assert to_ct_volume(stored, spacing=(2.5, 1.25, 0.75)).stored_orientation == "RAS"
    for axes in ("IPP", "IP", "XYZ", 3):
        with pytest.raises(CTReadError, match="axes=.*expected one letter for each stored axis"):
            to_ct_volume(stored, axes=axes)


# ------------------------------------------------------------------------------------------------------------ open files


class NotSeekable(io.RawIOBase):
    """A stream as a network gives it."""

    def __init__(self, data):
        self.inner = io.BytesIO(data)

    def readable(self):
        return True

    def readinto(self, target):
        return self.inner.readinto(target)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_open_files_are_read_and_left_as_they_were(scan, name):
    path = scan.with_name(name)
    expected, content = read_ct(path), path.read_bytes()
    with ExitStack() as files:
        spooled = files.enter_context(tempfile.SpooledTemporaryFile())
        kept = [io.BytesIO(content), spooled, files.enter_context(tempfile.TemporaryFile())]
        for stream in kept[1:]:
            stream.write(content)  # and nothing is flushed
        opened = [path.open("rb"), path.open("rb", buffering=0), path.open("r+b")]
        for stream in (*kept, *map(files.enter_context, opened)):
            stream.seek(7)
            assert_same(to_ct_volume(stream), expected)
            assert not stream.closed and stream.tell() == 7
            stream.seek(0)
            assert stream.read() == content  # it was not detached either
        for other in (NotSeekable(content), files.enter_context(gzip.open(scan))):
            np.testing.assert_array_equal(to_ct_volume(other).hu, expected.hu)


def test_a_plain_file_that_is_open_stays_mapped(scan):
    with open(scan.with_name("scan.nii"), "rb") as stream:
        hu = to_ct_volume(stream).hu
    while hu is not None and not isinstance(hu, np.memmap):
        hu = hu.base
    assert hu is not None


def test_open_files_that_cannot_be_read_say_why(scan, tmp_path):
    with open(scan, "rb") as closed:
        pass

    class Upload:  # as web frameworks have them
        async def read(self, size=-1):
            return b""

        async def seek(self, place):
            return 0

    with open(scan, encoding="latin-1") as text, open(tmp_path / "new", "wb") as new:
        for stream, words in (
            (text, "scan.nii.gz: open as text.*mode 'rb'"),
            (closed, "scan.nii.gz: this file is closed"),
            (new, "new: cannot be read .UnsupportedOperation"),
            (Upload(), r"its read\(\) must be awaited.*upload.file"),
            (io.BytesIO(b""), "bytes in memory: found an empty file"),
            (io.BytesIO(b"hello"), "^bytes in memory: found a text file"),
            (io.BytesIO(scan.read_bytes()[:200]), "^bytes in memory: the file ends early|cut short"),
        ):
            with pytest.raises(CTReadError, match=words) as error:
                to_ct_volume(stream)
            assert "samf-" not in str(error.value)  # the path of a file that is gone
    assert asyncio.run(Upload().read()) == b""


def test_rows_of_an_undecoded_column(scan):
    table = datasets.Dataset.from_dict({"nifti": [str(scan)]}).cast_column("nifti", datasets.Nifti(decode=False))
    expected, processor = read_ct(scan), SamfImageProcessor(slices_per_plane=2, size=16)
    row = table[0]["nifti"]
    rows = [row, {"bytes": scan.read_bytes(), "path": None}, {"bytes": scan.read_bytes(), "path": "elsewhere.nii.gz"}]
    for row in [*rows, {"path": str(scan)}]:
        assert_same(to_ct_volume(row), expected)
        assert torch.equal(processor(row)["pixel_values"], processor(scan)["pixel_values"])
    with pytest.raises(CTReadError, match="a row without bytes and without a path"):
        to_ct_volume({"bytes": None, "path": None})
    with pytest.raises(CTReadError, match="absent.nii: no such file"):
        to_ct_volume({"bytes": None, "path": "absent.nii"})


def test_nifti_2_as_bytes():
    """`datasets` 5.2.0 can't decode it from bytes."""
    content = nib.Nifti2Image(ramp(), AFFINE).to_bytes()
    np.testing.assert_array_equal(to_ct_volume({"bytes": content, "path": None}).stored_hu(), ramp())


# --------------------------------------------------------------------------------------------------------------- pydicom


@pytest.mark.parametrize("syntax", ["ExplicitVRLittleEndian", "ImplicitVRLittleEndian", "RLELossless"])
def test_a_list_of_pydicom_datasets_is_one_volume(tmp_path, syntax):
    folder = write_series(tmp_path / "series")
    expected = read_ct(folder)
    slices = [pydicom.dcmread(path) for path in sorted(folder.iterdir())[::-1]]
    for dataset in slices:
        if syntax == "RLELossless":
            dataset.compress(pydicom.uid.RLELossless)
        elif syntax == "ImplicitVRLittleEndian":  # read lazily, written otherwise
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    assert_same(to_ct_volume(slices), expected)
    assert_same(read_ct(tuple(slices)), expected)
    assert slices[0].PatientName == "SECRET PatientName"  # unchanged


def test_datasets_count_as_they_are_in_memory(tmp_path):
    folder = write_series(tmp_path / "series", stack_positions(3))
    slices = [pydicom.dcmread(path) for path in folder.iterdir()]
    expected = read_ct(folder).hu
    for dataset in slices:
        dataset.RescaleIntercept = -1000
        del dataset.file_meta  # as a network sends it
    np.testing.assert_array_equal(to_ct_volume(slices).hu, expected + 24)
    enhanced = pydicom.dcmread(write_enhanced(tmp_path / "enhanced.dcm", stack_positions(4), [1, 2, 1, 2]))
    assert_same(to_ct_volume(enhanced), read_ct(tmp_path / "enhanced.dcm"))
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in folder.iterdir()]
    with pytest.raises(CTReadError, match="a pydicom dataset.* without voxels; expected PixelData.*stop_before_pixels"):
        to_ct_volume(headers)


def test_nothing_of_the_patient_goes_to_the_disk(tmp_path, monkeypatch):
    slices = [pydicom.dcmread(path) for path in write_series(tmp_path / "series", stack_positions(2)).iterdir()]
    kept, written = shutil.rmtree, []

    def look(folder, *args, **options):
        written.extend(path.read_bytes() for path in tmp_path.__class__(folder).rglob("*") if path.is_file())
        return kept(folder, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", look)
    monkeypatch.setattr(tempfile._shutil, "rmtree", look)
    to_ct_volume(slices)
    assert len(written) >= 2 and not [data for data in written if b"SECRET" in data]


def test_slices_of_one_volume_are_not_as_many_volumes(tmp_path):
    slices = [pydicom.dcmread(path) for path in write_series(tmp_path / "series", stack_positions(3)).iterdir()]
    processor = SamfImageProcessor(slices_per_plane=2, size=16)
    with pytest.raises(ValueError, match=r"3 pydicom datasets of one slice each.*Pass read_ct\(datasets\)"):
        processor(slices)
    assert processor(read_ct(slices))["pixel_values"].shape[0] == 1


def test_open_dicom_files_are_one_volume(tmp_path, caplog):
    folder = write_series(tmp_path / "series")
    uploads = [io.BytesIO(path.read_bytes()) for path in sorted(folder.iterdir())]
    assert_same(to_ct_volume(uploads), read_ct(folder))
    assert_same(to_ct_volume([*uploads[:3], *sorted(folder.iterdir())[3:]]), read_ct(folder))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_simpleitk_and_nibabel_images_still_keep_theirs(scan):
    expected = read_ct(scan)
    assert_same(to_ct_volume(nib.load(scan)), expected)
    assert_same(to_ct_volume(sitk.ReadImage(str(scan))), expected)
