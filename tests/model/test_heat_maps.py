"""Where slice images are in a scan, and where back-projected heat is: checked with volumes that have one bright spot."""

import itertools

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from samf import SamfImageProcessor, read_ct
from samf.model.heat_map_samf import HeatGrid, back_project, meet, resample_heat, save_heat
from samf.model.slice_views_samf import ScanGeometry

SPACING = (2.0, 3.0, 5.0)
SHAPE = (40, 30, 22)


def turned(degrees):
    """Voxel axes turned about the patient's axis from foot to head, then about the one from left to right."""
    a, b = np.radians(degrees)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(SPACING)
    affine[:3, 3] = (-30, 12, 55)
    return affine


def spot_scan(path, voxel, axis_codes="RAS", degrees=(0, 0), shear=0.0):
    """Write a scan of water with a bright block around a voxel of its RAS+ array; return the block's centre in mm."""
    hu, affine = np.zeros(SHAPE, dtype=np.int16), turned(degrees)
    affine[:3, 2] += affine[:3, 1] * shear
    hu[tuple(slice(index - 1, index + 2) for index in voxel)] = 1000
    image = nibabel.Nifti1Image(hu, affine)
    change = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(affine), nibabel.orientations.axcodes2ornt(axis_codes)
    )
    nibabel.save(image.as_reoriented(change), path)
    return affine[:3, :3] @ voxel + affine[:3, 3]


def geometry_and_slices(path, processor):
    volume = read_ct(path, allow_non_ct=True)  # water and a block are no chest
    stack = processor.extract(volume)
    return ScanGeometry.of(volume, stack, processor), stack["slices"][:, 0].astype(np.float32) / 255


def processor_of(**settings):
    return SamfImageProcessor(hu_windows=((0, 1000),), size=48, **{"slices_per_plane": (7, 9, 8), **settings})


@pytest.mark.parametrize("settings", [{}, {"slab": "mip"}, {"slab": "mean"}, {"slices_per_plane": 50}])
@pytest.mark.parametrize("voxel", [(5, 7, 18), (33, 20, 4)])
def test_a_voxel_is_at_the_pixel_where_its_slice_shows_it(settings, voxel, tmp_path):
    spot_scan(tmp_path / "a.nii.gz", voxel)
    geometry, slices = geometry_and_slices(tmp_path / "a.nii.gz", processor_of(**{"slices_per_plane": 40, **settings}))
    for view in geometry.views:
        number, row, column = (float(value) for value in view.coordinates(np.array(voxel, dtype=float)))
        shown = slices[view.slices[round(number)]]
        rows, columns = np.indices(shown.shape)
        assert shown.sum() > 0, view.plane
        assert (shown * rows).sum() / shown.sum() == pytest.approx(row, abs=0.35), view.plane
        assert (shown * columns).sum() / shown.sum() == pytest.approx(column, abs=0.35), view.plane
        back = view.voxels(round(number), np.array(row), np.array(column))
        np.testing.assert_allclose(back, voxel, atol=1.1 if view.normal == 2 else 0.8)


@pytest.mark.parametrize("axis_codes", ["RAS", "LPS", "PIR", "SLA"])
def test_published_slices_are_located_in_stored_axes(axis_codes, tmp_path):
    voxel = (26, 12, 9)
    spot_scan(tmp_path / "a.nii.gz", voxel, axis_codes)
    processor = SamfImageProcessor(preset="published", hu_windows=((0, 1000),), size=28, slices_per_plane=40)
    geometry, slices = geometry_and_slices(tmp_path / "a.nii.gz", processor)
    (view,) = geometry.views
    number, row, column = (float(value) for value in view.coordinates(np.array(voxel, dtype=float)))
    shown = slices[view.slices[round(number)]]
    rows, columns = np.indices(shown.shape)
    assert (shown * rows).sum() / shown.sum() == pytest.approx(row, abs=0.5)
    assert (shown * columns).sum() / shown.sum() == pytest.approx(column, abs=0.5)


@pytest.mark.parametrize(
    ("axis_codes", "degrees", "shear"),
    [("RAS", (0, 0), 0), ("LPS", (4, 0), 0), ("IPL", (3, -4), 0), ("RAI", (20, 12), 0), ("LPS", (0, 0), 0.3)],
)
@pytest.mark.parametrize("planes", [("axial", "coronal", "sagittal"), ("sagittal", "axial")])
def test_the_slices_of_a_spot_meet_at_the_spot(axis_codes, degrees, shear, planes, tmp_path):
    """Also of files with flipped axes, and of oblique and tilted ones, which are resampled when they are read."""
    true_mm = spot_scan(tmp_path / "a.nii.gz", (29, 9, 15), axis_codes, degrees, shear)
    processor = processor_of(planes=planes, slices_per_plane=14, slab="mean")
    geometry, slices = geometry_and_slices(tmp_path / "a.nii.gz", processor)
    grid = HeatGrid.over(geometry, 4.0)
    heat = back_project(geometry, slices, grid.voxels()).prod(axis=0)
    cell = np.array(np.unravel_index(heat.argmax(), heat.shape))
    found = grid.affine[:3, :3] @ cell + grid.affine[:3, 3]
    assert np.abs(found - true_mm).max() < 6
    np.testing.assert_allclose(geometry.to_mm(grid.voxel(cell)), found, atol=1e-9)
    stored = nibabel.load(tmp_path / "a.nii.gz")
    assert geometry.stored_shape == stored.shape
    np.testing.assert_allclose(geometry.stored_affine, stored.affine, atol=1e-4)
    index = np.rint(geometry.to_stored(grid.voxel(cell))).astype(int)
    assert stored.get_fdata()[tuple(slice(max(i - 2, 0), i + 3) for i in index)].max() == 1000


@pytest.mark.parametrize(("degrees", "shear"), [((0, 0), 0), ((4, -3), 0), ((25, 15), 0), ((0, 0), 0.3)])
def test_the_file_is_in_register_with_an_oblique_scan_for_another_reader(degrees, shear, tmp_path):
    """SimpleITK resamples the coarse map onto the scan as it is stored: the warmest voxel is in the bright block."""
    spot_scan(tmp_path / "scan.nii.gz", (29, 9, 15), "LPS", degrees, shear)
    geometry, slices = geometry_and_slices(tmp_path / "scan.nii.gz", processor_of(slices_per_plane=14, slab="mean"))
    grid = HeatGrid.over(geometry, 4.0)
    heat = back_project(geometry, slices, grid.voxels()).prod(axis=0)
    heat /= heat.max()
    path = save_heat(tmp_path / "heat.nii.gz", np.stack([heat, heat[::-1]], axis=-1), grid.affine)
    scan = read_with_sitk(tmp_path / "scan.nii.gz")
    frames = sitk.ReadImage(str(path))
    assert frames.GetSize()[3] == 2
    extent = [*frames.GetSize()[:3], 0]
    shown = sitk.GetArrayFromImage(sitk.Resample(sitk.Extract(frames, extent, [0, 0, 0, 0]), scan))
    bright = sitk.GetArrayFromImage(scan) >= 1000
    warmest = np.argwhere(shown >= 0.97 * shown.max()).mean(axis=0)
    assert np.abs(warmest - np.argwhere(bright).mean(axis=0)).max() <= 2, "in voxels of the scan"
    own = resample_heat(heat, grid.affine, geometry.stored_shape, geometry.stored_affine)
    on_scan = save_heat(tmp_path / "own.nii.gz", own, geometry.stored_affine)
    fine = sitk.ReadImage(str(on_scan))
    if not shear:  # ITK has no sheared images; 3D Slicer reads the sform
        assert fine.GetSize() == scan.GetSize()
        np.testing.assert_allclose(fine.GetOrigin(), scan.GetOrigin(), atol=1e-3)
        np.testing.assert_allclose(fine.GetDirection(), scan.GetDirection(), atol=1e-5)
        inside = sitk.GetArrayFromImage(sitk.Resample(sitk.Extract(frames, extent, [0, 0, 0, 0]), scan)) > 0
        np.testing.assert_allclose(sitk.GetArrayFromImage(fine)[inside], shown[inside], atol=0.02)


def read_with_sitk(path):
    """Read a NIfTI's affine into SimpleITK's geometry by hand where ITK refuses it (sheared axes)."""
    stored = nibabel.load(path)
    image = sitk.GetImageFromArray(np.asarray(stored.dataobj).T)
    lps = np.diag([-1, -1, 1]) @ stored.affine[:3]
    sizes = np.linalg.norm(lps[:, :3], axis=0)
    image.SetSpacing(sizes.tolist())
    image.SetOrigin(lps[:, 3].tolist())
    image.SetDirection((lps[:, :3] / sizes).ravel().tolist())
    return image


def test_the_header_holds_geometry_and_nothing_of_the_patient(tmp_path):
    affine = turned((4, -3))
    heat = np.random.default_rng(0).random((5, 4, 3, 2)).astype(np.float32)
    image = nibabel.load(save_heat(tmp_path / "a.nii.gz", heat, affine))
    for form, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        np.testing.assert_allclose(form, affine, atol=1e-4)
        assert code == 1
    np.testing.assert_allclose(image.get_fdata(), heat, atol=0.5 / 255 + 1e-6)
    assert b"not for diagnosis" in image.header["descrip"].item()
    again = save_heat(tmp_path / "b.nii.gz", heat, affine)
    assert again.read_bytes() == (tmp_path / "a.nii.gz").read_bytes(), "no time and no name in it"
    coded = nibabel.load(save_heat(tmp_path / "c.nii.gz", np.array([[[0, 255]]], dtype=np.uint8), affine))
    assert coded.get_fdata().ravel().tolist() == pytest.approx([0, 1])


def test_a_grid_covers_the_volume_and_has_no_more_cells_than_voxels(tmp_path):
    spot_scan(tmp_path / "a.nii.gz", (20, 15, 10), degrees=(4, 2))
    geometry, _ = geometry_and_slices(tmp_path / "a.nii.gz", processor_of())
    for cell_mm in (1.0, 6.0, 7.3, 500.0):
        grid = HeatGrid.over(geometry, cell_mm)
        assert all(cells <= count for cells, count in zip(grid.shape, SHAPE, strict=True))
        for corner in itertools.product((0, 1), repeat=3):  # the outer corners of the boxes
            voxel = np.array(corner) * SHAPE - 0.5
            cell = np.array(corner) * grid.shape - 0.5
            found = grid.affine[:3, :3] @ cell + grid.affine[:3, 3]
            np.testing.assert_allclose(found, geometry.to_mm(voxel), atol=1e-9)


def test_planes_meet_where_all_are_hot():
    maps = np.zeros((3, 2, 2, 2))
    maps[:, 0, 0, 0], maps[:2, 1, 1, 1] = (2.0, 4.0, 8.0), 50.0
    maps[2, 1, 1, 1] = -1.0
    heat = meet(maps)
    assert heat[0, 0, 0] == 1 and heat.sum() == 1, "one plane that speaks against it is enough"
    alone = meet(maps[:1])
    assert alone[1, 1, 1] == 1 and alone[0, 0, 0] == pytest.approx(2 / 50)
    assert not meet(-np.abs(maps)).any()
