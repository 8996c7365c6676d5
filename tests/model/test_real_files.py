"""Real files: what each holds once read, or why it is refused; and one scan in every form that it can take.

The files are not part of the repository; see tests/conftest.py.
"""

import gzip
import logging
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from samf import SamfImageProcessor
from samf.model.ct_volume import AIR_HU, CTReadError, CTVolume, read_ct, to_ct_volume

NO_HU = "its values are not Hounsfield units"

# Path → what is read: shape, orientation of the stored array, spacing in mm, lowest and highest HU.
TOY_VOXELS = 10_000
LEAST_CHEST_MM = 60  # a newborn's chest has more, along each axis
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
    "odd/niivue_CT_pitch_oblique16.nii.gz": (  # an image of 8 bits
        NO_HU,
        ((175, 286, 80), "RAS", (0.8125, 0.8125, 2.397049), (-1024, 251)),
    ),
    "odd/niivue_complex64.nii.gz": ("voxels of type complex64", None),
}
# One MR image in 24 axis orders.
# fmt: off
ORIENTATIONS = (
    "AIR", "ALS", "ARS", "ASR", "IAR", "ILP", "IPR", "IRP", "LAS", "LIP", "LPS", "LSP",
    "PIR", "PLS", "PRS", "PSR", "RAS", "RIP", "RPS", "RSP", "SAR", "SLP", "SPR", "SRP",
)
# fmt: on
# Axes R, A, S of that image: voxels, mm.
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
    """Without a warning, but for a volume that covers less than a chest (and is no toy), of which one says how little."""
    volume = read_ct(test_data / name)
    assert_is(volume, READ[name])
    covered = min(np.array(volume.hu.shape) * volume.spacing)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == (covered < LEAST_CHEST_MM and volume.hu.size >= TOY_VOXELS)
    assert all(f"{covered:.0f} mm" in warning and "too little for a chest" in warning for warning in warnings)


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
    yield "list of DICOM files", files[::-1]
    (folder / "packed").mkdir()
    for file in files:
        dataset = pydicom.dcmread(file)
        dataset.compress(pydicom.uid.RLELossless)
        dataset.save_as(folder / "packed" / file.stem)
    yield "DICOM packed by RLE", folder / "packed"
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
    nib.save(nib.Nifti2Image.from_image(nifti), folder / "two.nii.gz")
    yield "second version of NIfTI", folder / "two.nii.gz"
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
    assert len(names) == 62 and sum(name.startswith("NIfTI ") for name in names) == 48


# --------------------------------------------------------------------------------------------- what that scan can suffer


class Bench:
    """Makes files of the scan: `hu` (RAS+), `affine`; each `make` below returns a path."""

    def __init__(self, scan: CTVolume, test_data: Path, folder: Path):
        self.scan, self.test_data, self.folder = scan, test_data, folder
        self.hu = np.ascontiguousarray(scan.hu)
        self.outside = np.broadcast_to(  # of a round field of view
            (np.hypot(*np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64))) > 1)[..., None], self.hu.shape
        )

    def nifti(
        self, array: np.ndarray, name: str = "scan.nii.gz", affine: np.ndarray | None = None, header=None
    ) -> Path:
        affine = self.scan.affine if affine is None else affine
        kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        nib.save(kind(array, affine, header, dtype=array.dtype), self.folder / name)
        return self.folder / name

    def header(self, **fields) -> Path:
        """The scan under a header with other fields."""
        path = self.nifti(self.hu, "scan.nii")
        data = path.read_bytes()
        header = nib.Nifti1Header(data[:348], check=False)
        for name, value in fields.items():
            header[name] = value
        path.write_bytes(header.binaryblock + data[348:])
        return path

    def bytes(self, change, name: str = "scan.nii.gz") -> Path:
        """The compressed file with its bytes changed."""
        path = self.nifti(self.hu)
        data = change(path.read_bytes())
        path = self.folder / name
        path.write_bytes(data)
        return path

    def voxels(self, change, dtype=np.int16) -> Path:
        return self.nifti(change(self.hu.astype(np.float64)).clip(-32768, 32767).astype(dtype))

    def dicom(self, keep=lambda k: True, change=None, name: str = "study") -> Path:
        """The scan's slices that `keep` names, from foot to head, under shuffled names; `change(dataset)` may alter them."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        datasets = [pydicom.dcmread(path) for path in (self.test_data / "dicom/cip_ct-64_79sl").iterdir()]
        datasets.sort(key=lambda dataset: dataset.ImagePositionPatient[2])
        names = np.random.default_rng(0).permutation(1000) + len(list(folder.iterdir())) * 1000
        for k, dataset in enumerate(datasets):
            if keep(k):
                if change is not None:
                    change(dataset)
                dataset.save_as(folder / f"{names[k]}")
        return folder

    def two_series(self) -> Path:
        self.dicom()
        return self.dicom(lambda k: k < 30, lambda dataset: setattr(dataset, "SeriesInstanceUID", "1.2.3.4"))

    def raw(self, intercept: int) -> Path:
        """As in CT-RATE's first release: raw values, stored as DICOM's axes run, under a blank header."""
        return self.nifti((self.hu.astype(np.int32)[::-1, ::-1] - intercept).astype(np.int16), "v1.nii.gz", np.eye(4))


class Derived(NamedTuple):
    """What is made of the scan, and what reading it gives: the scan itself, but for what is named here."""

    make: Callable[[Bench], Path]
    options: dict = {}
    error: str | None = None
    says: str | None = None  # in the log
    hu: Callable[[Bench], np.ndarray] = lambda bench: bench.hu
    limits: tuple[int, int] = (-1007, 1095)
    orientation: str = "RAS"
    rounding: int = 0  # HU


def with_nan(hu: np.ndarray) -> np.ndarray:
    hu[10:20, 30, 40], hu[5, 5, :3] = np.nan, [np.inf, -np.inf, np.inf]
    return hu


def without_finite(bench: Bench) -> np.ndarray:
    values = with_nan(bench.hu.astype(np.float32))
    return np.where(np.isfinite(values), values, AIR_HU)


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


def interpolated(bench: Bench) -> np.ndarray:
    hu = bench.hu.copy()
    hu[..., 40] = np.rint((hu[..., 39].astype(np.float32) + hu[..., 41]) / 2)
    return hu


COLOUR = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
V1 = {intercept: {"rescale": (1, intercept), "spacing": (4.171872, 4.171872, 3.987342)} for intercept in (-1024, -8192)}
DERIVED = {
    # types and shapes
    "int32": Derived(lambda bench: bench.nifti(bench.hu.astype(np.int32))),
    "float32": Derived(lambda bench: bench.nifti(bench.hu.astype(np.float32))),
    "float64": Derived(lambda bench: bench.nifti(bench.hu.astype(np.float64))),
    "big-endian": Derived(lambda bench: bench.nifti(bench.hu.astype(">i2"), header=nib.Nifti1Header(endianness=">"))),
    "NIfTI-2": Derived(lambda bench: bench.nifti(bench.hu, header=nib.Nifti2Header())),
    "uint16, raw": Derived(lambda bench: bench.voxels(lambda hu: hu + 1024, np.uint16), {"rescale": (1, -1024)}),
    "uint16, raw, alone": Derived(
        lambda bench: bench.voxels(lambda hu: hu + 1024, np.uint16), error=f"{NO_HU}.*pass rescale="
    ),
    "uint16, wrapped": Derived(
        lambda bench: bench.nifti((bench.hu.astype(np.int32) % 65536).astype(np.uint16)), error=NO_HU
    ),
    "singleton dimensions": Derived(lambda bench: bench.nifti(bench.hu[..., None, None])),
    "4-D": Derived(
        lambda bench: bench.nifti(np.stack([bench.hu] * 2, axis=-1)), error=r"4-D image of shape \(64, 64, 79, 2\)"
    ),
    "RGB": Derived(lambda bench: bench.nifti(np.zeros(bench.hu.shape, COLOUR)), error="a colour .RGB. image is not CT"),
    # values
    "NaN and infinities": Derived(
        lambda bench: bench.nifti(with_nan(bench.hu.astype(np.float32))),
        says="13 voxels are NaN or infinite; read as air",
        hu=without_finite,
        limits=(-1024, 1095),
    ),
    "slope NaN": Derived(lambda bench: bench.header(scl_slope=np.nan, scl_inter=np.nan)),
    "slope 0": Derived(lambda bench: bench.header(scl_slope=0, scl_inter=7)),
    "slope infinite": Derived(lambda bench: bench.header(scl_slope=np.inf, scl_inter=np.nan)),
    "slope and intercept": Derived(
        lambda bench: bench.header(scl_slope=0.75, scl_inter=-200),
        hu=lambda bench: np.rint(bench.hu * 0.75 - 200),
        limits=(-955, 621),
    ),
    "v1, -1024": Derived(lambda bench: bench.raw(-1024), V1[-1024], orientation="LPS"),
    "v1, -8192": Derived(lambda bench: bench.raw(-8192), V1[-8192], orientation="LPS"),
    "v1, -1024, alone": Derived(lambda bench: bench.raw(-1024), error=f"{NO_HU}.*pass rescale="),
    "v1, -8192, alone": Derived(lambda bench: bench.raw(-8192), error=f"{NO_HU}.*pass rescale="),
    "v1 with the other intercept": Derived(lambda bench: bench.raw(-1024), V1[-8192], error="is not this file's"),
    "v2 with -1024": Derived(
        lambda bench: bench.nifti(bench.hu), {"rescale": (1, -1024)}, error="Hounsfield units already"
    ),
    "v2 with -8192": Derived(
        lambda bench: bench.nifti(bench.hu), {"rescale": (1, -8192)}, error="Hounsfield units already"
    ),
    "v2": Derived(lambda bench: bench.nifti(bench.hu), says="scan.nii.gz: Hounsfield units"),
    "rescaled twice, -1024": Derived(
        lambda bench: bench.voxels(lambda hu: hu - 1024), error=f"{NO_HU}.*If they were rescaled twice"
    ),
    "rescaled twice, -8192": Derived(
        lambda bench: bench.voxels(lambda hu: hu - 8192), error=f"{NO_HU}.*If they were rescaled twice"
    ),
    **{
        f"padding {padding}": Derived(
            lambda bench, padding=padding: bench.nifti(np.where(bench.outside, np.int16(padding), bench.hu)),
            says=f"voxels below -1500 HU (down to {padding}) are padding; read as air",
            hu=lambda bench: np.where(bench.outside, AIR_HU, bench.hu),
            limits=(-1024, 1095),
        )
        for padding in (-3024, -8192, -2000)
    },
    # geometry
    "NaN affine": Derived(
        lambda bench: bench.header(srow_x=np.nan, srow_y=np.nan, srow_z=np.nan, qform_code=0),
        says="its affine is NaN or singular; assumes voxels of 4.17187 x 4.17187 x 3.98734 mm",
        hu=lambda bench: bench.hu[::-1],
        orientation="LAS",
    ),
    "singular affine": Derived(
        lambda bench: bench.header(srow_x=0, qform_code=0),
        says="its affine is NaN or singular",
        hu=lambda bench: bench.hu[::-1],
        orientation="LAS",
    ),
    "NaN sform beside a qform": Derived(
        lambda bench: bench.header(srow_x=np.nan, qform_code=1),
        says="its first affine is NaN or singular; uses the next",
    ),
    "sform against qform": Derived(
        lambda bench: bench.header(sform_code=1, qform_code=1, quatern_b=0, quatern_c=1, quatern_d=0),
        says="its sform and qform disagree; uses the sform",
    ),
    "no form at all": Derived(
        lambda bench: bench.header(sform_code=0, qform_code=0),
        says="its header has no orientation",
        hu=lambda bench: bench.hu[::-1],
        orientation="LAS",
    ),
    # damage and names
    "gzip cut short": Derived(lambda bench: bench.bytes(lambda data: data[: len(data) // 2]), error="ends|damaged"),
    "gzip cut in its checksum": Derived(lambda bench: bench.bytes(lambda data: data[:-3]), error="ends|damaged"),
    "gzip with one bit flipped": Derived(lambda bench: bench.bytes(flipped), error="damaged"),
    "plain file called .nii.gz": Derived(lambda bench: bench.bytes(gzip.decompress)),
    "gzip called .nii": Derived(lambda bench: bench.bytes(bytes, "scan.nii")),
    "gzip called .dcm": Derived(lambda bench: bench.bytes(bytes, "scan.dcm")),
    # DICOM
    "DICOM, shuffled names": Derived(lambda bench: bench.dicom(), orientation="LPS"),
    "two series": Derived(
        lambda bench: bench.two_series(), says="2 series; reads b630eb21, the largest axial one", orientation="LPS"
    ),
    "one slice missing": Derived(
        lambda bench: bench.dicom(lambda k: k != 40),
        says="8.0 of 311.0 mm are in 1 uneven gaps",
        hu=interpolated,
        rounding=1,
        orientation="LPS",
    ),
    "two slices missing": Derived(
        lambda bench: bench.dicom(lambda k: k not in (40, 41)), error="11.96 mm after slice 40.*Slices are missing"
    ),
}


@pytest.mark.parametrize("name", DERIVED)
def test_what_is_made_of_the_scan(scan, test_data, tmp_path, caplog, name):
    caplog.set_level(logging.INFO)
    case, bench = DERIVED[name], Bench(scan, test_data, tmp_path)
    path = case.make(bench)
    if case.error is not None:
        with pytest.raises(CTReadError, match=case.error) as error:
            read_ct(path, **case.options)
        assert str(path) in str(error.value)
        return
    volume = read_ct(path, **case.options)
    assert_is(volume, (scan.shape, case.orientation, scan.spacing, case.limits))
    np.testing.assert_allclose(volume.hu, case.hu(bench), rtol=0, atol=case.rounding)
    if case.says is not None:
        assert f"{path.name}: " in caplog.text and case.says in caplog.text
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert bool(warned) == (case.says is not None and "padding" not in name and name != "v2")


def test_every_flipped_bit_and_every_cut_of_the_scan_is_noticed(scan, test_data, tmp_path):
    path = Bench(scan, test_data, tmp_path).nifti(np.ascontiguousarray(scan.hu))
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for share in (0.001, 0.1, 0.9, 0.999):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CTReadError, match="scan.nii.gz"):
            read_ct(path)
    for place in rng.integers(100, len(data) - 4, 20):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.integers(8))]) + data[place + 1 :])
        with pytest.raises(CTReadError, match="scan.nii.gz"):
            read_ct(path)


def test_the_other_series_is_read_by_its_uid_or_its_label(scan, test_data, tmp_path, caplog):
    study = Bench(scan, test_data, tmp_path).two_series()
    read_ct(study)
    label = next(word for word in re.findall(r"([0-9a-f]{8}): number", caplog.text) if word != "b630eb21")
    for name in ("1.2.3.4", label):
        np.testing.assert_array_equal(read_ct(study, series_uid=name).hu, scan.hu[..., :30])


def test_a_crop_without_air_is_warned_of_alone(scan, test_data, tmp_path, caplog):
    hu = read_ct(test_data / "ct/totalseg_abdomen_small_3mm.nii.gz").hu
    cubes = (hu[i : i + 24, j : j + 24, :24] for i, j in np.ndindex(90, 70))
    crop = np.ascontiguousarray(next(cube for cube in cubes if cube.min() > -700))
    volume = read_ct(Bench(scan, test_data, tmp_path).nifti(crop))
    np.testing.assert_array_equal(volume.hu, crop)
    assert "no air near -1000, possibly a crop" in caplog.text
