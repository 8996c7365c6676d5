"""The slice image: complete, with every slice and no patient data."""

import os
import subprocess
import sys
import zipfile

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_series import write_series
from PIL import Image

from samf.model.ct_volume import read_ct, to_ct_volume
from samf.model.image_processing_samf import SamfImageProcessor
from samf.reporting.slice_view import _draw, has_orientation, main, save_slice_image


@pytest.fixture(scope="module")
def volume():
    """Tissue with a box of air at the patient's right, in front, at the head."""
    hu = np.full((30, 30, 30), 40, dtype=np.int16)
    hu[20:, 20:, 20:] = -1000
    return to_ct_volume(hu)


@pytest.fixture
def processor():
    return SamfImageProcessor(slices_per_plane=3, size=32)


def test_image_shows_every_slice(tmp_path, volume, processor):
    path = save_slice_image(volume, tmp_path / "new" / "slices.png", image_processor=processor)
    image = np.asarray(Image.open(path).convert("L"))
    assert list(path.parent.iterdir()) == [path]
    # Three rows of three bright squares on black: along a line through a row's middle, three bright runs.
    bright = image > 150
    runs = [int((np.diff(line.astype(int)) == 1).sum() + line[0]) for line in bright]
    assert np.mean(np.array(runs) >= 3) > 0.6 and image.shape[0] > 300


def test_each_window_gives_another_image_and_titles_and_weights_show(tmp_path, volume, processor):
    extracted = processor.extract(volume)
    images = {
        "lung": save_slice_image(extracted, tmp_path / "a.png"),
        "wide": save_slice_image(extracted, tmp_path / "b.png", window=2),
        "title": save_slice_image(extracted, tmp_path / "c.png", title="Nodule?"),
        "weights": save_slice_image(extracted, tmp_path / "d.png", weights=np.linspace(0, 1, 9)),
        "zero weights": save_slice_image(extracted, tmp_path / "e.png", weights=[0.0] * 9),
    }
    assert len({path.read_bytes() for path in images.values()}) == 5
    again = save_slice_image(extracted, tmp_path / "f.png")
    assert again.read_bytes() == images["lung"].read_bytes()


def test_wrong_calls_say_so(tmp_path, volume, processor):
    extracted = processor.extract(volume)
    with pytest.raises(ValueError, match="window=3.*0 to 2"):
        save_slice_image(extracted, tmp_path / "x.png", window=3)
    with pytest.raises(ValueError, match="4 weights for 9 slices"):
        save_slice_image(extracted, tmp_path / "x.png", weights=[1, 2, 3, 4])
    assert not (tmp_path / "x.png").exists()


def letters(processor: SamfImageProcessor, volume) -> list[list[str]]:
    figure = _draw(processor.extract(volume), 0, None, "", has_orientation(processor))
    return [[text.get_text() for text in axes.texts] for axes in figure.axes]


def test_letters_say_which_way_the_patient_lies_only_where_it_is_known(volume, processor):
    """The published preset shows the array as it is stored: any letter would be a guess."""
    expected = {"axial": list("RLAP"), "coronal": list("RLSI"), "sagittal": list("APSI")}
    assert letters(processor, volume) == [expected[plane] for plane in processor.planes for _ in range(3)]
    assert not any(letters(SamfImageProcessor(preset="published"), volume))


def test_each_slice_bears_its_plane_and_place(volume, processor):
    figure = _draw(processor.extract(volume), 0, None, "", True)
    titles = [axes.get_title() for axes in figure.axes]
    # 30 voxels of 1 mm from 0 mm on: three slices are at 5, 15 and 25.
    assert titles == [f"{plane} {mm} mm" for plane in ("axial", "coronal", "sagittal") for mm in (5, 15, 25)]


@pytest.fixture
def scans(tmp_path):
    """One scan in each format that there is a writer for, and a DICOM series as folder, zip and single slice."""
    hu = np.random.default_rng(0).integers(-1000, 400, (12, 14, 10), dtype=np.int16)
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("scan.nii", "scan.nii.gz"):
        nib.save(nib.Nifti1Image(hu, np.diag([-1.5, -1.5, 3, 1])), folder / name)
    nib.save(nib.Nifti2Image(hu, np.diag([-1.5, -1.5, 3, 1])), folder / "scan2.nii")
    for suffix in ("nrrd", "mha", "mhd"):
        sitk.WriteImage(sitk.GetImageFromArray(hu.T), str(folder / f"scan.{suffix}"))
    np.save(folder / "scan.npy", hu)
    np.savez(folder / "scan.npz", hu=hu, spacing=(1.5, 1.5, 3.0))
    write_series(folder / "dicom")
    with zipfile.ZipFile(folder / "dicom.zip", "w") as archive:
        for file in (folder / "dicom").iterdir():
            archive.write(file, file.name)
    (folder / "noextension").write_bytes((folder / "scan.nii.gz").read_bytes())
    return sorted(path for path in folder.iterdir() if path.suffix != ".raw")


def test_every_format_gives_the_image_of_its_slices(scans, tmp_path):
    assert len(scans) == 11
    for path in scans:
        output = tmp_path / "images" / f"{path.name}.png"
        assert main([str(path), "--output", str(output), "--slices", "1"]) == 0, path
        expected = SamfImageProcessor(slices_per_plane=1, hu_windows=((-1350, 150),)).extract(read_ct(path))
        drawn = save_slice_image(expected, tmp_path / "expected.png")
        assert np.array_equal(_below_heading(output), _below_heading(drawn)), path


def _below_heading(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"))[40:]


def test_real_files_of_every_kind_are_shown(test_data, tmp_path):
    for name in ("ct/totalseg_abdomen_small_3mm.nii.gz", "ct/cip_ct-64.nrrd", "ct/elastix_3DCT_lung_small.mha"):
        assert main([str(test_data / name), "--output", str(tmp_path / "x.png"), "--slices", "1"]) == 0
    mr = str(test_data / "orient" / sorted(os.listdir(test_data / "orient"))[0])
    assert main([mr, "--output", str(tmp_path / "mr.png"), "--slices", "1"]) == 1
    assert not (tmp_path / "mr.png").exists()
    assert main([mr, "--output", str(tmp_path / "mr.png"), "--slices", "1", "--allow_non_ct"]) == 0


def test_command_line_shows_only_the_body_and_picks_a_series(tmp_path, monkeypatch):
    hu = np.full((60, 60, 10), -1000, dtype=np.int16)
    hu[20:40, 25:35] = 40
    nib.save(nib.Nifti1Image(hu, np.diag([4, 4, 4, 1])), tmp_path / "scan.nii")
    monkeypatch.chdir(tmp_path)
    images = []
    for field in ([], ["--field", "full"], ["--field", "body"]):
        assert main([str(tmp_path / "scan.nii"), "--slices", "1", *field]) == 0
        images.append((tmp_path / "slices.png").read_bytes())  # the default path
    assert images[0] == images[1] != images[2]
    write_series(tmp_path / "study", names=[f"a{k}" for k in range(6)])
    write_series(tmp_path / "study", names=[f"b{k}" for k in range(6)], SeriesInstanceUID="1.2.3.5", intercept=-500)
    assert main([str(tmp_path / "study"), "--series_uid", "1.2.3.5", "--slices", "1"]) == 0
    assert main([str(tmp_path / "study"), "--series_uid", "1.2.3.9", "--slices", "1"]) == 1


def test_command_line(tmp_path, volume):
    image = nib.Nifti1Image(volume.hu, np.eye(4))
    image.header["descrip"] = b"SECRET NAME"
    nib.save(image, tmp_path / "SECRET.nii.gz")
    SamfImageProcessor(slices_per_plane=2, size=24).save_pretrained(tmp_path / "model")
    for window in ("lung", "mediastinum", "wide"):
        output = str(tmp_path / f"{window}.png")
        assert main([str(tmp_path / "SECRET.nii.gz"), "--output", output, "--slices", "2", "--window", window]) == 0
        assert b"SECRET" not in (tmp_path / f"{window}.png").read_bytes()
    arguments = [
        str(tmp_path / "SECRET.nii.gz"),
        "--output",
        str(tmp_path / "m.png"),
        "--processor",
        str(tmp_path / "model"),
    ]
    assert main(arguments) == 0
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 4


def test_command_line_reports_a_bad_file(tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "samf.reporting.slice_view",
            str(tmp_path / "missing.nii.gz"),
            "--output",
            str(tmp_path / "x.png"),
        ],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=tmp_path,
        timeout=120,
    )
    assert run.returncode == 1 and "missing.nii.gz: no such file" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "x.png").exists()
