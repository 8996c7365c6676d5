"""What the page shows is where the scan is: checked with nibabel and SimpleITK's own geometry."""

import nibabel
import numpy as np
import pytest
from PIL import Image

from samf.model.ct_volume import CTVolume
from samf.model.evidence_samf import Evidence, SentenceEvidence
from samf.web.display import display_volume, save_display, save_montage, save_overlay


def volume_of(hu, affine):
    return CTVolume(hu.astype(np.int16), tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()), affine, "scan")


def ramp(shape, affine):
    """HU that are linear in the place in mm, so that any average of a box is the value at its centre."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    mm = index @ affine[:3, :3].T + affine[:3, 3]
    return (mm @ np.array([2.0, -3.0, 4.0])).round()


@pytest.mark.parametrize("shape", [(60, 50, 40), (300, 260, 30), (40, 300, 290)])
def test_the_copy_is_small_and_in_register(shape, tmp_path):
    affine = np.array([[0.7, 0.02, 0, -90], [-0.02, 0.7, 0, 30], [0, 0, 1.5, 12], [0, 0, 0, 1.0]])
    volume = volume_of(ramp(shape, affine), affine)
    values, placed = display_volume(volume)
    assert max(values.shape) <= 256 and values.dtype == np.int16
    inside = (slice(1, -1),) * 3
    assert np.abs(values - ramp(values.shape, placed))[inside].max() <= 2.5
    save_display(volume, tmp_path / "ct.nii.gz")
    stored = nibabel.load(tmp_path / "ct.nii.gz")
    assert np.array_equal(np.asarray(stored.dataobj), values) and np.allclose(stored.affine, placed, atol=1e-4)
    assert bytes(stored.header["descrip"]).strip(b"\0") == b"" and bytes(stored.header["db_name"]).strip(b"\0") == b""


def test_simpleitk_reads_the_copy_at_the_same_place(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    affine = np.diag([0.8, 0.8, 2.0, 1.0])
    affine[:3, 3] = (-100, -80, 20)
    hu = np.full((300, 280, 40), -800)
    hu[200:208, 100:108, 20:22] = 1500
    save_display(volume_of(hu, affine), tmp_path / "ct.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "ct.nii.gz"))
    x, y, z = affine[:3, :3] @ (203.5, 103.5, 20.5) + affine[:3, 3]
    assert image[image.TransformPhysicalPointToIndex((-x, -y, z))] > 1000  # SimpleITK's are LPS
    assert max(image.GetSize()) <= 256


def test_the_montage_is_in_radiological_convention(tmp_path):
    hu = np.full((60, 60, 60), -1000)
    hu[45:, 45:, 45:] = 500  # the patient's right, front and head
    save_montage(volume_of(hu, np.eye(4)), tmp_path / "m.png")
    picture = np.asarray(Image.open(tmp_path / "m.png"))
    side = picture.shape[0] // 3
    axial, coronal, sagittal = (picture[row * side : (row + 1) * side, 5 * side :] for row in range(3))
    for tile in (axial, coronal, sagittal):  # right at the left, front at the top; head at the top, front at the left
        rows, columns = np.nonzero(tile > 200)
        assert len(rows) and rows.max() < side / 2 and columns.max() < side / 2


def test_the_overlay_is_the_evidence_on_a_finer_grid(tmp_path):
    affine = np.array([[6.0, 0, 0, -50], [0, 6, 0, -40], [0, 0, 5, 7], [0, 0, 0, 1]])
    heat = np.zeros((8, 7, 6), dtype=np.float32)
    heat[2:5, 2:5, 1:4] = 1
    sentences = tuple(SentenceEvidence(f"{n}.", -1.0, None, (), (), None, heat * n) for n in range(2))
    rows = tuple(map(tuple, affine.tolist()))
    evidence = Evidence("s", "p", sentences, {}, heat.shape, rows, (1, 1, 1), rows)
    save_overlay(evidence, tmp_path / "heat.nii.gz")
    image = nibabel.load(tmp_path / "heat.nii.gz")
    values = image.get_fdata()
    assert values.shape == (16, 14, 12, 2) and values[..., 0].max() == 0
    for cell, expected in (((3, 3, 2), 1.0), ((0, 0, 0), 0.0)):  # a cell inside, and one far away
        mm = affine @ (*cell, 1)
        index = np.rint((np.linalg.inv(image.affine) @ mm)[:3]).astype(int)
        assert values[(*index, 1)] == pytest.approx(expected, abs=0.01)
    corners = [image.affine @ (*np.array(end) - 0.5, 1) for end in ((0, 0, 0), (16, 14, 12))]
    assert np.allclose(corners[0], affine @ (-0.5, -0.5, -0.5, 1)) and np.allclose(
        corners[1], affine @ (7.5, 6.5, 5.5, 1)
    )
