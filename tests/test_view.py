"""The slice picture: written whole, with every slice and nothing of the patient's."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from samf.ct_volume import to_ct_volume
from samf.image_processing_samf import SamfImageProcessor
from samf.view import _draw, _knows_sides, main, save_slice_picture


@pytest.fixture(scope="module")
def volume():
    """Tissue with a box of air at the patient's right, in front, at the head."""
    hu = np.full((30, 30, 30), 40, dtype=np.int16)
    hu[20:, 20:, 20:] = -1000
    return to_ct_volume(hu)


@pytest.fixture
def processor():
    return SamfImageProcessor(slices_per_plane=3, size=32)


def test_picture_shows_every_slice(tmp_path, volume, processor):
    path = save_slice_picture(volume, tmp_path / "new" / "slices.png", image_processor=processor)
    picture = np.asarray(Image.open(path).convert("L"))
    assert list(path.parent.iterdir()) == [path]
    # Three rows of three bright squares on black: along a line through a row's middle, three bright runs.
    bright = picture > 150
    runs = [int((np.diff(line.astype(int)) == 1).sum() + line[0]) for line in bright]
    assert np.mean(np.array(runs) >= 3) > 0.6 and picture.shape[0] > 300


def test_each_window_gives_another_picture_and_titles_and_weights_show(tmp_path, volume, processor):
    extracted = processor.extract(volume)
    pictures = {
        "lung": save_slice_picture(extracted, tmp_path / "a.png"),
        "wide": save_slice_picture(extracted, tmp_path / "b.png", window=2),
        "title": save_slice_picture(extracted, tmp_path / "c.png", title="Nodule?"),
        "weights": save_slice_picture(extracted, tmp_path / "d.png", weights=np.linspace(0, 1, 9)),
        "zero weights": save_slice_picture(extracted, tmp_path / "e.png", weights=[0.0] * 9),
    }
    assert len({path.read_bytes() for path in pictures.values()}) == 5
    again = save_slice_picture(extracted, tmp_path / "f.png")
    assert again.read_bytes() == pictures["lung"].read_bytes()


def test_wrong_calls_say_so(tmp_path, volume, processor):
    extracted = processor.extract(volume)
    with pytest.raises(ValueError, match="window=3.*0 to 2"):
        save_slice_picture(extracted, tmp_path / "x.png", window=3)
    with pytest.raises(ValueError, match="4 weights for 9 slices"):
        save_slice_picture(extracted, tmp_path / "x.png", weights=[1, 2, 3, 4])
    assert not (tmp_path / "x.png").exists()


def letters(processor: SamfImageProcessor, volume) -> list[list[str]]:
    figure = _draw(processor.extract(volume), 0, None, "", _knows_sides(processor))
    return [[text.get_text() for text in axes.texts] for axes in figure.axes]


def test_letters_say_which_way_the_patient_lies_only_where_it_is_known(volume, processor):
    """The published preset shows the array as it is stored: any letter would be a guess."""
    expected = {"axial": list("RLAP"), "coronal": list("RLSI"), "sagittal": list("APSI")}
    assert letters(processor, volume) == [expected[plane] for plane in processor.planes for _ in range(3)]
    assert not any(letters(SamfImageProcessor(preset="published"), volume))


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
        [sys.executable, "-m", "samf.view", str(tmp_path / "missing.nii.gz"), "--output", str(tmp_path / "x.png")],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=tmp_path,
        timeout=120,
    )
    assert run.returncode == 1 and "missing.nii.gz: no such file" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "x.png").exists()
