"""DICOM series: order, geometry, values, what is repaired and what is refused.

Most slices show HU that grow linearly through space (`dicom_series.world_hu`): a voxel read correctly holds the HU of the
point to which the affine maps it, whatever the slices' order, tilt or gaps.
"""

import base64
import errno
import gzip
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import (
    AXIAL,
    COLUMNS,
    FIRST,
    ROWS,
    SPACING,
    EachSlice,
    slice_dataset,
    slice_hu,
    stack_positions,
    world_hu,
    write_enhanced,
    write_series,
)
from pydicom.fileset import FileSet

from samf import SamfImageProcessor
from samf.cache.slice_cache import SliceCache
from samf.model import ct_dicom, ct_dicom_decoders
from samf.model.ct_dicom_walk import HeaderWalker
from samf.model.ct_volume import AIR_HU, CTReadError, read_ct
from samf.reporting import slice_view as view

TILT = np.deg2rad(14)


def places(volume) -> np.ndarray:
    """LPS millimetres of every voxel, (X, Y, Z, 3), by the volume's affine."""
    indices = np.stack(np.meshgrid(*(np.arange(n) for n in volume.shape), indexing="ij"), axis=-1)
    return (indices @ volume.affine[:3, :3].T + volume.affine[:3, 3]) * (-1, -1, 1)


def assert_every_voxel_in_place(volume, tolerance=1.0, inside=None):
    difference = np.abs(volume.hu - world_hu(places(volume)))
    inside = np.ones(volume.shape, dtype=bool) if inside is None else inside(places(volume))
    assert inside.sum() > 0.3 * inside.size
    assert difference[inside].max() <= tolerance


# ----------------------------------------------------------------------------------------------------- order and geometry


@pytest.mark.parametrize(
    ("cosines", "axis"),
    [
        (AXIAL, (0, 0, 1)),  # head first, supine
        (AXIAL, (0, 0, -1)),  # from head to foot
        ((-1, 0, 0, 0, -1, 0), (0, 0, 1)),  # prone
        ((-1, 0, 0, 0, 1, 0), (0, 0, -1)),  # feet first
        ((1, 0, 0, 0, 0, -1), (0, 1, 0)),  # coronal
        ((0, 1, 0, 0, 0, -1), (-1, 0, 0)),  # sagittal
        ((0.9962, 0.0872, 0, -0.0872, 0.9962, 0), (0, 0, 1)),  # lying 5° askew: axes are kept
    ],
)
def test_every_position_of_the_patient_is_read_right(tmp_path, cosines, axis):
    positions = stack_positions(axis=axis)
    volume = read_ct(write_series(tmp_path / "series", positions, cosines))
    assert_every_voxel_in_place(volume)
    assert volume.hu.size == len(positions) * ROWS * COLUMNS
    assert (np.diag(volume.affine)[:3] > 0).all()


def test_slices_are_sorted_by_place_not_by_name_or_number(tmp_path):
    numbers = [3, 1, 6, 2, 5, 4]
    names = ["c", "a.dcm", "f.ima", "b", "e.txt", "0001"]
    volume = read_ct(write_series(tmp_path / "series", names=names, InstanceNumber=EachSlice(numbers)))
    assert_every_voxel_in_place(volume)
    np.testing.assert_allclose(volume.spacing, (SPACING[1], SPACING[0], 2.5))


def test_tilted_gantry_is_straightened_and_said(tmp_path, caplog):
    cosines = (1, 0, 0, 0, np.cos(TILT), -np.sin(TILT))
    volume = read_ct(write_series(tmp_path / "tilted", stack_positions(12), cosines))
    assert "14.0° off a right angle (tilted gantry)" in caplog.text
    np.testing.assert_allclose(volume.affine[:3, :3], np.diag(volume.spacing), atol=1e-9)

    def inside(lps):
        """Well within the sheared stack: what is outside of it is air."""
        column = (lps[..., 1] - FIRST[1]) / np.cos(TILT)
        run = lps[..., 2] - FIRST[2] + column * np.sin(TILT)
        return (run >= 0) & (run <= 11 * 2.5) & (column >= 0) & (column <= (ROWS - 1) * SPACING[0])

    assert_every_voxel_in_place(volume, 1.5, inside)
    corner = volume.hu[0, -1, 0]  # back and foot: beyond the first slice's lower edge or before it
    assert AIR_HU in (corner, volume.hu[0, 0, 0])


def test_oblique_reformats_are_turned_upright(tmp_path, caplog):
    angle = np.deg2rad(25)
    cosines = (np.cos(angle), np.sin(angle), 0, -np.sin(angle), np.cos(angle), 0)
    volume = read_ct(write_series(tmp_path / "series", cosines=cosines))
    assert "25.0° off the patient's" in caplog.text

    def inside(lps):
        x, y = ((lps - FIRST) @ np.array([cosines[:3], cosines[3:]]).T)[..., :2].transpose(3, 0, 1, 2)
        return (x >= 0) & (x <= (COLUMNS - 1) * SPACING[1]) & (y >= 0) & (y <= (ROWS - 1) * SPACING[0])

    assert_every_voxel_in_place(volume, 1.5, inside)


def test_one_slice_alone(tmp_path):
    folder = write_series(tmp_path / "one", stack_positions(1), SpacingBetweenSlices=3.0)
    volume = read_ct(folder / "slice000.dcm")
    assert volume.shape == (COLUMNS, ROWS, 1) and volume.spacing[2] == 3.0
    assert_every_voxel_in_place(volume)


# ------------------------------------------------------------------------------------------------- gaps, copies, passes


def test_missing_slices_are_interpolated_with_a_word_of_how_many_mm(tmp_path, caplog):
    positions = np.delete(stack_positions(12), [4, 8, 9], axis=0)
    volume = read_ct(write_series(tmp_path / "gaps", positions))
    assert volume.shape[2] == 12 and volume.spacing[2] == pytest.approx(2.5)
    assert_every_voxel_in_place(volume)
    assert "2.50 to 7.50 mm" in caplog.text and "12.5 of 27.5 mm are in 2 uneven gaps" in caplog.text


def test_slices_that_are_there_stay_untouched_beside_a_gap(tmp_path):
    rng = np.random.default_rng(0)
    stack = rng.integers(-1000, 1000, (8, ROWS, COLUMNS))
    kept = [0, 1, 2, 4, 5, 6, 7]
    volume = read_ct(write_series(tmp_path / "gap", stack_positions(8)[kept], hu=EachSlice(stack[kept])))
    for k in kept:
        np.testing.assert_array_equal(volume.hu[::-1, ::-1, k].T, stack[k])


@pytest.mark.parametrize(
    ("places_mm", "gap"),
    [([0, 1, 2, 3, 9, 10], "6.00 mm after slice 4"), ([0, 5, 10, 25, 30], "15.00 mm after slice 3")],
)
def test_wide_gaps_are_refused(tmp_path, places_mm, gap):
    positions = np.array(FIRST) + np.outer(places_mm, (0, 0, 1))
    with pytest.raises(CTReadError, match=f"gap: uneven distances.*{gap}.*Slices are missing"):
        read_ct(write_series(tmp_path / "gap", positions))


def test_positions_rounded_to_tenths_are_even(tmp_path, caplog):
    positions = np.round(stack_positions(9, step=0.625), 1)
    volume = read_ct(write_series(tmp_path / "rounded", positions))
    assert volume.shape[2] == 9 and volume.spacing[2] == pytest.approx(0.625, abs=0.02)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_copies_of_slices_are_left_out(tmp_path, caplog):
    folder = write_series(tmp_path / "twice")
    shutil.copy(folder / "slice002.dcm", folder / "slice002 (copy).dcm")
    renamed = pydicom.dcmread(folder / "slice004.dcm")
    renamed.SOPInstanceUID = "1.2.3.99"  # an anonymiser's
    renamed.save_as(folder / "again")
    volume = read_ct(folder)
    assert volume.shape[2] == 6 and "2 of 8 slices are copies" in caplog.text
    assert_every_voxel_in_place(volume)


@pytest.mark.parametrize("tag", ["AcquisitionNumber", "TemporalPositionIdentifier"])
def test_two_time_points_are_refused_by_what_tells_them_apart(tmp_path, tag):
    positions = np.repeat(stack_positions(), 2, axis=0)
    hu = EachSlice(slice_hu(position) + 5 * (k % 2) for k, position in enumerate(positions))
    folder = write_series(tmp_path / "passes", positions, hu=hu, **{tag: EachSlice(k % 2 + 1 for k in range(12))})
    with pytest.raises(CTReadError, match=rf"12 slices at 6 positions.*{tag}: 1 \(6 slices\), 2 \(6 slices\).*list"):
        read_ct(folder)
    first = sorted(folder.iterdir())[::2]
    assert_every_voxel_in_place(read_ct(first))
    assert_every_voxel_in_place(read_ct([str(path) for path in reversed(first)]))


def test_passes_in_one_file_or_told_apart_by_time(tmp_path):
    positions = np.tile(stack_positions(), (2, 1))
    with pytest.raises(CTReadError, match="12 slices at 6 positions.*Export only one of them"):
        read_ct(write_enhanced(tmp_path / "enhanced.dcm", positions, [1] * 6 + [2] * 6))
    hu = EachSlice(slice_hu(position) + 5 * (k // 6) for k, position in enumerate(positions))
    times = EachSlice(["101112"] * 6 + ["131415.5"] * 6)
    with pytest.raises(CTReadError, match=r"AcquisitionTime: no. 1 \(6 slices\), no. 2 \(6 slices\)"):
        read_ct(write_series(tmp_path / "passes", positions, hu=hu, AcquisitionTime=times))


def test_slices_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ct_dicom, "MAX_VOXELS", 10 * ROWS * COLUMNS)
    assert read_ct(write_series(tmp_path / "ten", stack_positions(10))).shape[2] == 10
    gap = np.delete(stack_positions(7), 3, axis=0)  # six slices and the seven that they would become
    for name, positions in (("eleven", stack_positions(11)), ("gap", gap)):
        with pytest.raises(CTReadError, match=f"{name}: .* voxels; expected at most"):
            read_ct(write_series(tmp_path / name, positions))


def test_slices_beside_the_line_are_refused(tmp_path):
    positions = stack_positions()
    positions[3, 0] += 4
    with pytest.raises(CTReadError, match="4.0 mm from one straight line"):
        read_ct(write_series(tmp_path / "askew", positions))


def test_slices_without_a_place_are_refused(tmp_path):
    with pytest.raises(CTReadError, match="without a readable position"):
        read_ct(write_series(tmp_path / "nowhere", ImagePositionPatient=None))


# --------------------------------------------------------------------------------------------------- series and other files


def test_the_largest_axial_ct_series_is_read_and_the_others_are_named(tmp_path, caplog):
    study = tmp_path / "study"
    write_series(study / "a" / "thick", stack_positions(4, 5.0), SeriesInstanceUID="1.2.9", SeriesNumber=7)
    write_series(study / "b", stack_positions(9), SeriesInstanceUID="1.2.8")
    write_series(study / "cor", stack_positions(20, axis=(0, 1, 0)), (1, 0, 0, 0, 0, -1), SeriesInstanceUID="1.2.7")
    write_series(study / "mr", stack_positions(30), SeriesInstanceUID="1.2.6", Modality="MR")
    assert read_ct(study).shape[2] == 9
    labels = {uid: hashlib.sha256(uid.encode()).hexdigest()[:8] for uid in ("1.2.9", "1.2.8", "1.2.7")}
    assert f"3 series; reads {labels['1.2.8']}" in caplog.text
    assert f"{labels['1.2.9']}: number 7, CT, 4 slices of 18 x 14" in caplog.text and "1.2." not in caplog.text
    for name in ("1.2.9", labels["1.2.9"]):
        thick = read_ct(study, series_uid=name)
        assert thick.shape[2] == 4
        assert_every_voxel_in_place(thick)
    with pytest.raises(CTReadError, match=f"names no CT series here; there are {labels['1.2.7']}: CT, 20 slices"):
        read_ct(study, series_uid="1.2.6")
    assert read_ct(study, series_uid="1.2.6", allow_non_ct=True).shape[2] == 30


def test_what_is_no_slice_is_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = write_series(tmp_path / "study")
    write_series(folder, stack_positions(2), names=["s1", "s2"], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    capture = slice_dataset(
        np.zeros((4, 4)), (0, 0, 0), SOPClassUID="1.2.840.10008.5.1.4.1.1.7", ImagePositionPatient=None
    )
    capture.save_as(folder / "capture")
    colour = slice_dataset(np.zeros((4, 4)), (0, 0, 0), SamplesPerPixel=3, PhotometricInterpretation="RGB")
    colour.PixelData = bytes(48)
    colour.save_as(folder / "colour.dcm")
    report = slice_dataset(np.zeros((4, 4)), (0, 0, 0), Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    for keyword in ("Rows", "Columns", "PixelData"):
        delattr(report, keyword)
    report.save_as(folder / "report.dcm")
    (folder / "notes.txt").write_text("not DICOM", encoding="utf-8")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    volume = read_ct(folder)
    assert volume.shape[2] == 6
    assert_every_voxel_in_place(volume)
    for words in ("2 scouts", "1 screen captures", r"1 colour images (RGB)", "1 reports or other objects"):
        assert words in caplog.text
    for name, words in {
        "capture": "screen captures",
        "colour.dcm": "colour",
        "report.dcm": "reports",
        "s1": "scouts",
    }.items():
        with pytest.raises(CTReadError, match=f"{name}: no CT series here .*{words}"):
            read_ct(folder / name)


def test_other_modalities_and_units_need_leave(tmp_path):
    for name, tags, words in (
        ("mr", {"Modality": "MR"}, "6 of modality MR"),
        ("none", {"Modality": None}, "modality not given"),
        ("density", {"RescaleType": "EDW"}, "6 in unit EDW instead of HU"),
    ):
        folder = write_series(tmp_path / name, **tags)
        with pytest.raises(CTReadError, match=f"{name}: no CT series here .*{words}.*allow_non_ct"):
            read_ct(folder)
        assert read_ct(folder, allow_non_ct=True).shape[2] == 6


def test_odd_slices_in_a_series_are_left_out_with_a_word(tmp_path, caplog):
    folder = write_series(tmp_path / "series")
    write_series(folder, stack_positions(1, axis=(0, 1, 0)), (1, 0, 0, 0, 0, -1), names=["reformat"])
    assert_every_voxel_in_place(read_ct(folder))
    assert "1 of 7 slices have another orientation" in caplog.text


def test_a_stack_mixed_with_another_is_refused(tmp_path):
    folder = write_series(tmp_path / "mixed")
    write_series(folder, stack_positions(4, axis=(0, 1, 0)), (1, 0, 0, 0, 0, -1), names=list("abcd"))
    with pytest.raises(CTReadError, match="10 slices in 2 orientations, matrices or pixel sizes"):
        read_ct(folder)


def test_radial_slices_are_refused(tmp_path):
    folder = tmp_path / "radial"
    for k, angle in enumerate(np.linspace(0, 1, 5)):
        write_series(folder, stack_positions(1), (np.cos(angle), np.sin(angle), 0, 0, 0, -1), names=[f"{k}"])
    with pytest.raises(CTReadError, match="5 slices in 5 orientations"):
        read_ct(folder)


# --------------------------------------------------------------------------------------- series of one slice, and stacks


def own_uids(count=6, tag="SeriesInstanceUID"):
    return {tag: EachSlice(f"1.2.77777.{len(tag)}.{k}" for k in range(count))}


def test_a_series_uid_for_each_file_is_one_series(tmp_path, caplog):
    """As some anonymisers leave them."""
    tags = {**own_uids(), "FrameOfReferenceUID": "1.2.5", "SOPInstanceUID": EachSlice(f"1.2.6.{k}" for k in range(6))}
    folder = write_series(tmp_path / "own", **tags)
    volume = read_ct(folder)
    assert volume.shape == (COLUMNS, ROWS, 6)
    assert_every_voxel_in_place(volume)
    words = (
        "6 slices of which each has a SeriesInstanceUID of its own, in one study, frame of reference and orientation"
    )
    assert words in caplog.text and "1.2.77777" not in caplog.text
    one = read_ct(folder, series_uid="1.2.77777.17.2")  # a series that is named is read
    assert one.shape[2] == 1
    write_series(folder, stack_positions(9), names=[f"b{k}" for k in range(9)])
    assert read_ct(folder).shape[2] == 9  # a series of more slices counts before them
    label = hashlib.sha256(b"1.2.77777.17.0 and others").hexdigest()[:8]
    assert f"{label}: CT, 6 slices" in caplog.text
    assert_every_voxel_in_place(read_ct(folder, series_uid=label))


@pytest.mark.parametrize("tag", ["FrameOfReferenceUID", "StudyInstanceUID"])
def test_slices_of_several_rooms_are_one_volume_only_where_somebody_lists_them(tmp_path, caplog, tag):
    """Positions of two frames of reference can't be compared; anonymisers invent those too."""
    folder = write_series(tmp_path / "own", **own_uids(), **own_uids(tag=tag))
    assert read_ct(folder).shape[2] == 1
    assert "6 series; reads" in caplog.text and "if they are one volume, pass their files as a list" in caplog.text
    volume = read_ct(sorted(folder.iterdir()))
    assert volume.shape[2] == 6 and "6 series in the list make one even stack" in caplog.text
    assert_every_voxel_in_place(volume)


def test_a_list_of_files_is_one_volume(tmp_path, caplog):
    """With a gap, a copy and a scout in it; and where a series was cut in two."""
    folder = write_series(tmp_path / "own", np.delete(stack_positions(8), 3, axis=0), **own_uids(7))
    shutil.copy(folder / "slice001.dcm", folder / "copy.dcm")
    write_series(folder, stack_positions(1), (1, 0, 0, 0, 0, -1), names=["scout"], SeriesInstanceUID="1.2.9")
    volume = read_ct(list(folder.iterdir()))
    assert volume.shape[2] == 8 and "are copies" in caplog.text and "interpolated" in caplog.text
    assert_every_voxel_in_place(volume)
    halves = write_series(tmp_path / "halves", SeriesInstanceUID=EachSlice(["1.2.7"] * 3 + ["1.2.8"] * 3))
    assert read_ct(list(halves.iterdir())).shape[2] == 6
    assert read_ct(halves).shape[2] == 3  # of a folder, each is a series


def test_pictures_of_one_place_in_series_of_their_own_are_no_volume(tmp_path, caplog):
    """Bolus tracking: one image per series, all at one location."""
    watched = np.repeat(stack_positions(1), 8, axis=0)
    hu = EachSlice(slice_hu(watched[0]) + k for k in range(8))
    folder = write_series(tmp_path / "study", watched, hu=hu, names=[f"w{k}" for k in range(8)], **own_uids(8))
    write_series(folder, SeriesInstanceUID="1.2.7")
    assert_every_voxel_in_place(read_ct(folder))
    assert "of its own" not in caplog.text and "9 series" in caplog.text


def enhanced_stacks(path, stacks, named=True):
    """One enhanced file with stacks of (positions, cosines)."""
    frames = [(position, cosines, number) for number, (places, cosines) in enumerate(stacks, 1) for position in places]
    write_enhanced(path, np.array([position for position, *_ in frames]), [1] * len(frames))
    dataset = pydicom.dcmread(path)
    for group, (_, cosines, number) in zip(dataset.PerFrameFunctionalGroupsSequence, frames, strict=True):
        group.PlaneOrientationSequence = [pydicom.Dataset()]
        group.PlaneOrientationSequence[0].ImageOrientationPatient = [float(value) for value in cosines]
        group.FrameContentSequence = [pydicom.Dataset()]
        if named:
            group.FrameContentSequence[0].StackID = str(number)
    images = [slice_hu(position, cosines) + 1024 for position, cosines, _ in frames]
    dataset.PixelData = np.stack(images).astype(np.int16).tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


CORONAL = (1, 0, 0, 0, 0, -1)


@pytest.mark.parametrize("named", [True, False])
def test_of_two_stacks_in_one_file_the_largest_axial_one_is_read(tmp_path, caplog, named):
    coronal = stack_positions(9, axis=(0, 1, 0))
    path = enhanced_stacks(tmp_path / "two.dcm", [(coronal, CORONAL), (stack_positions(6), AXIAL)], named)
    volume = read_ct(path)
    assert volume.shape == (COLUMNS, ROWS, 6)
    assert_every_voxel_in_place(volume)
    labels = [hashlib.sha256(f"1.2.3.4 stack {k:04d}".encode()).hexdigest()[:8] for k in (1, 2)]
    assert f"2 series or stacks; reads {labels[1]}, the largest axial one" in caplog.text
    assert f"{labels[0]}: CT, 9 slices" in caplog.text and "series_uid=" in caplog.text
    chosen = read_ct(path, series_uid=labels[0])  # as the warning says
    assert chosen.shape == (COLUMNS, 9, ROWS)
    assert_every_voxel_in_place(chosen)
    assert read_ct(path, series_uid="1.2.3.4").shape == volume.shape  # the series: by the same rule


def test_two_axial_stacks_far_apart_and_two_that_are_one(tmp_path, caplog):
    apart = [(stack_positions(5), AXIAL), (stack_positions(7) + (0, 0, 400), AXIAL)]
    volume = read_ct(enhanced_stacks(tmp_path / "apart.dcm", apart))
    assert volume.shape[2] == 7 and volume.affine[2, 3] == pytest.approx(FIRST[2] + 400)
    whole = [(stack_positions(6)[:3], AXIAL), (stack_positions(6)[3:], AXIAL)]
    caplog.clear()
    assert_every_voxel_in_place(read_ct(enhanced_stacks(tmp_path / "whole.dcm", whole)))
    numbered = [(stack_positions(6)[k : k + 1], AXIAL) for k in range(6)]  # a number for each frame
    assert read_ct(enhanced_stacks(tmp_path / "numbered.dcm", numbered)).shape[2] == 6
    assert not caplog.records
    with pytest.raises(CTReadError, match="radial.dcm: 5 slices in 5 orientations.*Export only one stack"):
        turns = [(np.cos(angle), np.sin(angle), 0, 0, 0, -1) for angle in np.linspace(0, 1, 5)]
        read_ct(enhanced_stacks(tmp_path / "radial.dcm", [(stack_positions(1), turn) for turn in turns]))


# ------------------------------------------------------------------------------------------------ directories, and numbers


def test_the_directory_of_a_disc_stands_for_its_folder(tmp_path):
    files = FileSet()
    tags = {"PatientID": "1", "PatientName": "A^B", "StudyDate": "20200101", "StudyTime": "120000", "StudyID": "1"}
    series = write_series(tmp_path / "series", SeriesNumber=1, InstanceNumber=EachSlice(range(1, 7)), **tags)
    for path in sorted(series.iterdir()):
        files.add(pydicom.dcmread(path))
    files.write(tmp_path / "disc")
    expected = read_ct(series)
    np.testing.assert_array_equal(read_ct(tmp_path / "disc" / "DICOMDIR").hu, expected.hu)
    renamed = tmp_path / "disc" / "index"
    (tmp_path / "disc" / "DICOMDIR").rename(renamed)  # known by what is in it
    for path in (renamed, tmp_path / "disc"):
        np.testing.assert_array_equal(read_ct(path).hu, expected.hu)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(renamed, alone / "DICOMDIR")
    with pytest.raises(CTReadError, match="without DICOM slices.*Name the folder that holds them"):
        read_ct(alone / "DICOMDIR")
    with pytest.raises(CTReadError, match="directories of a disc .DICOMDIR: name its folder"):
        read_ct([renamed])


@pytest.mark.parametrize(
    ("tag", "number", "written", "words"),
    [
        ("PixelSpacing", ["0.9", "0.9"], b"0,9\\0,9 ", r"PixelSpacing \(0028,0030\) is written with a decimal comma"),
        ("RescaleIntercept", "-1024.5", b"-1024,5 ", r"RescaleIntercept \(0028,1052\) is written with a decimal comma"),
        ("RescaleSlope", "1.0025", b"1 0025", r"RescaleSlope \(0028,1053\) can't be read"),
    ],
)
def test_a_number_that_is_none_is_named_by_its_tag(tmp_path, caplog, tag, number, written, words):
    folder = write_series(tmp_path / "comma", **{tag: number})
    plain = "\\".join(number) if isinstance(number, list) else number
    for path in folder.iterdir():
        data = path.read_bytes()
        plain_bytes = plain.encode().ljust(len(written))
        assert data.count(plain_bytes) == 1
        path.write_bytes(data.replace(plain_bytes, written))
    with pytest.raises(CTReadError, match=rf"comma/slice\d+.dcm: its {words}.*Export the series again") as error:
        read_ct(folder)
    assert written.decode().strip() not in str(error.value) + caplog.text and "allow_non_ct" not in str(error.value)
    assert f"left out 6 with a {tag} that can't be read" in caplog.text


def test_a_comma_within_an_enhanced_file_is_named_too(tmp_path):
    path = write_enhanced(tmp_path / "enhanced.dcm", stack_positions(3) + 0.25, [1, 1, 1])
    data = path.read_bytes()
    assert data.count(b"-11.75") == 3
    path.write_bytes(data.replace(b"-11.75", b"-11,75"))
    with pytest.raises(CTReadError, match=r"its ImagePositionPatient \(0020,0032\) is written with a decimal comma"):
        read_ct(path)


# --------------------------------------------------------------------------------------------------------------- values


def test_each_slice_has_its_own_slope_and_intercept(tmp_path):
    slopes, intercepts = [1, 2, 0.5, 1, 4, 0.25], [-1024, 0, -1000, -8192, 100, -1024]
    volume = read_ct(write_series(tmp_path / "own", slope=EachSlice(slopes), intercept=EachSlice(intercepts)))
    assert_every_voxel_in_place(volume, 2.6)  # a slope of 4 stores multiples of it


@pytest.mark.parametrize(
    ("tags", "stored"),
    [
        ({"PixelPaddingValue": -2000}, -2000),
        ({"PixelPaddingValue": 63536, "PixelRepresentation": 0}, 63536),
        ({"PixelPaddingValue": 0, "PixelRepresentation": 0}, 0),
        ({"PixelPaddingValue": 4500, "PixelPaddingRangeLimit": 32767}, 5000),  # above any tissue
    ],
)
def test_padding_is_air(tmp_path, caplog, tags, stored):
    caplog.set_level(logging.INFO)
    folder = write_series(tmp_path / "padded", **tags)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        pixels = dataset.pixel_array.astype(np.int64)
        pixels[0, :5] = stored
        dataset.PixelData = pixels.astype(np.uint16 if stored > 32767 else dataset.pixel_array.dtype).tobytes()
        dataset.save_as(path)
    hu = read_ct(folder).hu[::-1, ::-1]
    assert (hu[:5, 0] == AIR_HU).all() and (hu[5:] > AIR_HU).all()
    assert "30 voxels hold the padding value" in caplog.text


def test_a_padding_value_that_tissue_has_counts_for_nothing(tmp_path):
    volume = read_ct(write_series(tmp_path / "water", PixelPaddingValue=1024))  # 0 HU
    assert_every_voxel_in_place(volume)


@pytest.mark.parametrize("signed", [0, 1])
def test_bits_beyond_those_stored_are_ignored(tmp_path, signed):
    folder = tmp_path / "overlay"
    folder.mkdir()
    hu = slice_hu(FIRST)
    dataset = slice_dataset(
        hu, FIRST, PixelRepresentation=signed, BitsStored=12, HighBit=11, intercept=-1024 * (1 - signed)
    )
    stored = np.frombuffer(dataset.PixelData, dtype=np.uint16) & 0x0FFF
    dataset.PixelData = (stored | 0xA000).astype(np.uint16).tobytes()
    dataset.save_as(folder / "slice", enforce_file_format=True)
    np.testing.assert_array_equal(read_ct(folder).hu[::-1, ::-1, 0].T, hu)


# ------------------------------------------------------------------------------------------------------------- encodings


def test_enhanced_multi_frame(tmp_path):
    positions = stack_positions(6)[[3, 0, 5, 1, 4, 2]]
    volume = read_ct(write_enhanced(tmp_path / "enhanced.dcm", positions, [1, 2, 1, 4, 1, 2]))
    assert volume.shape == (COLUMNS, ROWS, 6)
    assert_every_voxel_in_place(volume, 2.6)


def test_many_frames_that_lie_nowhere_are_refused(tmp_path):
    dataset = slice_dataset(np.zeros((4, 4)), (0, 0, 0), NumberOfFrames=3)
    dataset.PixelData = bytes(96)
    dataset.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    with pytest.raises(CTReadError, match="with 3 frames in one file and no position for each"):
        read_ct(tmp_path / "film.dcm")


def save_in(folder, syntax):
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == pydicom.uid.ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return folder


@pytest.mark.parametrize(
    "syntax",
    ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian"],
)
def test_plain_transfer_syntaxes(tmp_path, syntax):
    folder = write_series(tmp_path / syntax)
    if syntax != "ExplicitVRBigEndian":
        save_in(folder, getattr(pydicom.uid, syntax))
    else:
        for path in folder.iterdir():
            dataset = pydicom.dcmread(path)
            data = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
            plain = pydicom.Dataset({element.tag: element for element in dataset})
            plain.file_meta, plain.PixelData = dataset.file_meta, data
            plain["PixelData"].VR = "OW"
            pydicom.dcmwrite(path, plain, implicit_vr=False, little_endian=False, enforce_file_format=True)
    assert_every_voxel_in_place(read_ct(folder))


def test_files_without_preamble(tmp_path):
    folder = write_series(tmp_path / "bare")
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        bare = pydicom.Dataset({element.tag: element for element in dataset})
        pydicom.dcmwrite(path, bare, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[128:132] != b"DICM"
    assert_every_voxel_in_place(read_ct(folder))


@pytest.mark.parametrize("signed", [0, 1])
def test_rle(tmp_path, signed):
    folder = write_series(tmp_path / "rle", PixelRepresentation=signed)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(pydicom.uid.RLELossless)
        dataset.save_as(path)
    assert_every_voxel_in_place(read_ct(folder))


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
@pytest.mark.parametrize("signed", [0, 1])
def test_jpeg_lossless_and_jpeg_2000(tmp_path, compressor, signed):
    folder = write_series(tmp_path / "packed", PixelRepresentation=signed)
    for path in folder.iterdir():
        pixels = pydicom.dcmread(path)
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.SetFileName(str(tmp_path / "one.dcm"))
        writer.Execute(sitk.GetImageFromArray(pixels.pixel_array[None]))
        packed = pydicom.dcmread(tmp_path / "one.dcm")
        pixels.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
        pixels.PixelData = packed.PixelData
        pixels["PixelData"].is_undefined_length = True
        pixels.save_as(path)
    assert_every_voxel_in_place(read_ct(folder))


WITHOUT_IMAGECODECS = ct_dicom_decoders._DECODE_SCRIPT.replace("import imagecodecs", "raise ImportError")


# 16 x 16 pixels, the number at place i being 9 i + 100, packed by CharLS.
JPEG_LS = (
    "|JeWc01FHN5C9MX0TBTI+5iXv0RR9100{JF+g&r(wXEkk%rH`+b(K+TQk0~nNS>;ys;a7}h@ehHL`fu)NpUqKl1U_zSWHPIl2uhmwN+JBP>NM"
    "mRdz(b|5*_Ke?&X~eGt$8bV9%XQ3(HkBpd&HkWc?~|Je"
)


def test_jpeg_ls(tmp_path):
    dataset = slice_dataset(np.zeros((16, 16)), FIRST, PixelRepresentation=0)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    dataset.PixelData = pydicom.encaps.encapsulate([base64.b85decode(JPEG_LS)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "slice", enforce_file_format=True)
    hu = read_ct(tmp_path / "slice").hu[::-1, ::-1, 0].T
    np.testing.assert_array_equal(hu.ravel(), np.arange(256) * 9 + 100 - 1024)


# The same image, packed by OpenJPH 0.26.3: unsigned, and 1124 less in signed numbers.
HTJ2K = (
    "|4;u>04YEK0000G0000G00000000000000G0000G0000000000009pH0sl|{2mk^A000XAQUDA90ssL31q1{@0smY86Cj9?kdTm&kdTm&kdTmw"
    "h=~7W02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00000egFaglfVEb!TALTbN~Rr0206e69A$C2Xp{N`U3}a0KfnfKmZef5cB|obO0a)=>Vft"
    "0Kfnh5C8>O#u)ReZ~}Dzh8i+t=)gh&?6v^F04pE>7MK74008H}r>CdFcmN(fJUl!+JUssWj9`2AF@fy50RPz"
)
HTJ2K_SIGNED = (
    "|4;u>04YEK0000G0000G00000000000000G0000G000000000000EBy0sl|{2mk^A000XAQUDA90ssL31q1{@0smY86Cj9?kdTm&kdTm&kdTmw"
    "h=~7W02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00000egFaglfVEbiT(lybN~Rr0206e69A$C2Xp{N`U3}a0KfnfKmZef5cB|obO0a)=>Vft"
    "0Kfnh5C8>O#u)ReZ~}Dzh8i+t=)gh&?6v^F04pE>7MK74008H}r>CdFcmN(fJUl!+JUssWj9`2AF@fy50RPz"
)


def write_htj2k(path, syntax, signed):
    dataset = slice_dataset(np.zeros((16, 16)), FIRST, PixelRepresentation=int(signed), intercept=-1024 + 1124 * signed)
    dataset.file_meta.TransferSyntaxUID = f"1.2.840.10008.1.2.4.{syntax}"
    dataset.PixelData = pydicom.encaps.encapsulate([base64.b85decode(HTJ2K_SIGNED if signed else HTJ2K)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(("syntax", "signed"), [(201, False), (202, True), (203, False)])
def test_htj2k(tmp_path, syntax, signed):
    hu = read_ct(write_htj2k(tmp_path / "slice", syntax, signed)).hu[::-1, ::-1, 0].T
    np.testing.assert_array_equal(hu.ravel(), np.arange(256) * 9 + 100 - 1024)


def test_htj2k_needs_a_simpleitk_that_unpacks_it(tmp_path, monkeypatch):
    """Version 2.4 gives no image. It does unpack JPEG 2000, which needs no message."""
    older = WITHOUT_IMAGECODECS.replace("SimpleITK.Version.MinorVersion()", "-1")
    assert older != WITHOUT_IMAGECODECS
    monkeypatch.setattr(ct_dicom_decoders, "_DECODE_SCRIPT", older)
    with pytest.raises(CTReadError, match="slice: its voxels are compressed as HTJ2K.*pip install -U 'SimpleITK>=2.5'"):
        read_ct(write_htj2k(tmp_path / "slice", 201, False))
    assert_every_voxel_in_place(read_ct(packed_series(tmp_path)))


def test_a_packing_that_nobody_unpacks_is_named(tmp_path):
    path = write_htj2k(tmp_path / "slice", 201, False)
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.4.201", b"1.2.840.10008.1.2.4.110"))  # JPEG XL
    with pytest.raises(CTReadError, match=r"slice: transfer syntax 1\.2\.840\.10008\.1\.2\.4\.110.*uncompressed"):
        read_ct(path)


# ---------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("packed", [False, True])
def test_a_slice_cut_short_is_never_read_in_part(tmp_path, packed):
    folder = write_series(tmp_path / "cut", stack_positions(3))
    if packed:
        for path in folder.iterdir():
            dataset = pydicom.dcmread(path)
            dataset.compress(pydicom.uid.RLELossless)
            dataset.save_as(path)
    path = folder / "slice001.dcm"
    data = path.read_bytes()
    for share in (*np.linspace(0.32, 0.98, 10), 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CTReadError, match="slice001.dcm: .*cut short|slice001.dcm: .* damaged"):
            read_ct(folder)


def test_a_damaged_header_is_warned_of(tmp_path, caplog):
    folder = write_series(tmp_path / "damaged")
    (folder / "broken").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00" + b"\xff" * 40)
    assert_every_voxel_in_place(read_ct(folder))
    assert "left out 1" in caplog.text


def test_compressed_pictures_of_another_size_are_refused(tmp_path):
    dataset = slice_dataset(np.zeros((16, 20)), FIRST, PixelRepresentation=0)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    dataset.PixelData = pydicom.encaps.encapsulate([base64.b85decode(JPEG_LS)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "slice", enforce_file_format=True)
    with pytest.raises(CTReadError, match="not one greyscale image of 20 x 16"):
        read_ct(tmp_path / "slice")


PRIVATE = {  # what can be looked for: texts hold SECRET, see dicom_series
    "StudyInstanceUID": "1.2.77777.1",
    "FrameOfReferenceUID": "1.2.77777.2",
    "AccessionNumber": "SECRET4711",
    "StudyID": "SECRET4712",
    "StudyDate": "19770707",
    "AcquisitionDate": "19770708",
    "ContentTime": "070707.7777",
    "PatientBirthDate": "19270707",
    "InstanceCreatorUID": "1.2.77777.3",
}


def private_studies(folder):
    """(name, folder or file): what is read with and without warnings, and what is refused, for each reason there is."""
    passes = np.repeat(stack_positions(), 2, axis=0)
    moving = EachSlice(slice_hu(position) + 5 * (k % 2) for k, position in enumerate(passes))
    upright = (1, 0, 0, 0, 0, -1)
    studies = {
        "good": {},
        "gap": {"positions": np.delete(stack_positions(9), 4, axis=0)},
        "wide_gap": {"positions": stack_positions(9)[[0, 1, 7, 8]]},
        "tilted": {"cosines": (1, 0, 0, 0, np.cos(TILT), -np.sin(TILT))},
        "passes": {"positions": passes, "hu": moving, "AcquisitionTime": EachSlice(["070707.1", "070707.9"] * 6)},
        "numbers": {"positions": passes, "hu": moving, "AcquisitionNumber": EachSlice([1, 2] * 6)},
        "mr": {"Modality": "MR"},
        "scout": {"ImageType": ["ORIGINAL", "LOCALIZER"]},
        "unit": {"RescaleType": "EDW"},
        "nowhere": {"ImagePositionPatient": None},
        "askew": {"positions": stack_positions() + np.array([[0, 0, 0]] * 5 + [[9, 0, 0]])},
        "raw": {"intercept": 0, "hu": EachSlice([np.full((40, 60), 1040) + np.arange(60)] * 6)},
    }
    for number, (name, options) in enumerate(studies.items()):
        uid = {
            "SeriesInstanceUID": f"1.2.77777.{number}",
            "SOPInstanceUID": EachSlice(f"1.2.77777.4.{k}" for k in range(12)),
        }
        yield name, write_series(folder / name, **{**PRIVATE, **uid, **options})
    two = write_series(folder / "two", SeriesInstanceUID="1.2.77777.98", **PRIVATE)
    write_series(two, stack_positions(3), upright, names="abc", SeriesInstanceUID="1.2.77777.99", **PRIVATE)
    write_series(two, stack_positions(3), names=["x", "y", "z"], SeriesInstanceUID="1.2.77777.99", **PRIVATE)
    yield "two", two
    for name, change in (
        ("cut", lambda data: data[:-100]),
        ("cut_header", lambda data: data[: len(data) - 2 * ROWS * COLUMNS - 60]),
        ("no_number", lambda data: data.replace(b"1.5\\1.25", b"SECRETxx")),
        ("odd_length", lambda data: data.replace(b"SECRET PatientID", b"\xff" * 16)),
    ):
        broken = write_series(folder / name, **PRIVATE)
        path = sorted(broken.iterdir())[2]
        path.write_bytes(change(path.read_bytes()))
        yield name, broken
    for name, head in (
        ("report.txt", b"SECRET NAME, born 1927"),
        ("report.csv.gz", gzip.compress(b"SECRET;1.2.77777" * 99)),
    ):
        (folder / name).write_bytes(head)
        yield name, folder / name


def test_no_patient_data_in_any_log_error_or_written_file(tmp_path, caplog, capfd):
    """Whatever is read or refused: no log line, traceback or file holds names, dates, numbers or UIDs."""
    caplog.set_level(logging.DEBUG)
    said, outcomes = [], {}
    cache = SliceCache(tmp_path / "written", SamfImageProcessor(slices_per_plane=2, size=32))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        studies = list(private_studies(tmp_path / "studies"))
        caught.clear()
        for name, path in studies:
            for options in ({}, {"allow_non_ct": True}, {"series_uid": "1.2.77777.98"}):
                try:
                    read_ct(path, **options)
                    outcomes.setdefault(name, "read")
                except CTReadError as error:
                    outcomes.setdefault(name, "refused")
                    said.append("".join(traceback.format_exception(error)))
            if outcomes[name] == "read":
                cache.get(path)
                view.main([str(path), "--output", str(tmp_path / "written" / f"{name}.png"), "--slices", "2"])
    said += [str(warning.message) for warning in caught] + [caplog.text, *capfd.readouterr()]
    written = {path: path.read_bytes() for path in (tmp_path / "written").rglob("*") if path.is_file()}
    assert list(outcomes.values()).count("read") >= 5 and list(outcomes.values()).count("refused") >= 11, outcomes
    assert len(written) >= 10 and len("".join(said)) > 10_000
    private = (b"SECRET", b"1.2.77777", b"7070", b"070707")
    for text in (*(text.encode() for text in said), *written.values()):
        assert not [word for word in private if word in text], text[:3000]


def packed_series(tmp_path):
    folder = write_series(tmp_path / "packed", stack_positions(2))
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(pydicom.uid.RLELossless)
        dataset.save_as(path)
    return folder


def test_without_pydicom_or_simpleitk_the_error_says_what_to_install(tmp_path, monkeypatch):
    folder = write_series(tmp_path / "series", stack_positions(2))
    packed = packed_series(tmp_path)
    monkeypatch.setattr(ct_dicom_decoders, "_DECODE_SCRIPT", WITHOUT_IMAGECODECS.replace("SimpleITK", "not_installed"))
    assert_every_voxel_in_place(read_ct(folder))  # native voxels need only pydicom
    with pytest.raises(CTReadError, match="slice000.dcm: compressed voxels need SimpleITK: pip install SimpleITK"):
        read_ct(packed)
    monkeypatch.setattr(ct_dicom, "pydicom", None)
    with pytest.raises(CTReadError, match="needs pydicom 3: pip install pydicom"):
        read_ct(folder)


@pytest.mark.parametrize(
    "fault", ["import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "import time; time.sleep(60)"]
)
def test_a_decoder_that_crashes_or_hangs_is_an_error(tmp_path, monkeypatch, fault):
    folder = packed_series(tmp_path)
    monkeypatch.setattr(ct_dicom_decoders, "_DECODE_SCRIPT", fault)
    monkeypatch.setattr(ct_dicom_decoders, "_SECONDS_PER_PROCESS", 0.5)
    monkeypatch.setattr(ct_dicom_decoders, "_SECONDS_PER_FRAME", 0.1)
    with pytest.raises(CTReadError, match="slice000.dcm: its compressed voxels are damaged|takes far too long"):
        read_ct(folder)


def test_no_room_to_unpack_into_is_not_called_damage(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    folder = packed_series(tmp_path)
    narrow = f"import resource; resource.setrlimit({resource.RLIMIT_FSIZE}, (64, 64))\n"
    with monkeypatch.context() as patch:
        patch.setattr(ct_dicom_decoders, "_DECODE_SCRIPT", narrow + ct_dicom_decoders._DECODE_SCRIPT)
        with pytest.raises(CTReadError, match="slice000.dcm: cannot be decoded into .*samf-.*TMPDIR"):
            read_ct(folder)

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    started, start = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **options: started.append(start(*args, **options)) or started[-1]
    )
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(CTReadError, match="slice000.dcm: cannot be read, or decoded into .*No space left.*TMPDIR"):
        read_ct(folder)
    assert started and all(process.returncode is not None for process in started)  # decoders that waited have ended


@pytest.mark.parametrize("reader", ["walk", "pydicom"])
def test_a_header_that_the_system_will_not_read_is_not_left_out(tmp_path, monkeypatch, reader):
    folder = write_series(tmp_path / "series")
    owner, name = (HeaderWalker, "walk") if reader == "walk" else (pydicom, "dcmread")
    read = getattr(owner, name)

    def refuse(*args, **options):
        if refuse.calls == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        refuse.calls += 1
        return read(*args, **options)

    refuse.calls = 0
    if reader == "pydicom":
        monkeypatch.setattr(HeaderWalker, "walk", lambda *_: None)
    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(CTReadError, match="series: cannot be read .Input/output error"):
        read_ct(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_decoder_ends_with_its_parent(tmp_path):
    note = tmp_path / "decoder"
    hang = f"open({str(note)!r}, 'w').write(str(os.getpid())); import time; time.sleep(60)"
    script = ct_dicom_decoders._DECODE_SCRIPT.replace("import numpy", hang)
    start = (
        f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {script!r}, str(os.getpid()), '60', 'x'])"
    )
    parent = subprocess.Popen([sys.executable, "-c", start])
    assert waited_for(lambda: note.is_file() and note.read_text(encoding="utf-8"))
    decoder = int(note.read_text(encoding="utf-8"))
    assert alive(decoder)
    parent.kill()
    parent.wait()
    assert waited_for(lambda: not alive(decoder))


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits on CPU time")
def test_a_decoder_that_computes_for_ever_ends_by_itself():
    script = ct_dicom_decoders._DECODE_SCRIPT.replace("import numpy", "while True: pass")
    done = subprocess.run([sys.executable, "-c", script, str(os.getpid()), "1", "x"], timeout=60)
    assert done.returncode == -signal.SIGKILL


def waited_for(condition) -> bool:
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.1)
    return False


def alive(process: int) -> bool:
    """Whether it runs; a zombie counts as dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_raw_values_of_slices_are_refused_with_their_own_remedy(tmp_path):
    rng = np.random.default_rng(0)
    hu = EachSlice(rng.normal(1040, 30, (32, 32)).round() for _ in range(12))
    with pytest.raises(CTReadError, match="raw: its values are not Hounsfield units.*export the series again"):
        read_ct(write_series(tmp_path / "raw", stack_positions(12), hu=hu, intercept=0))


def test_rescale_is_never_for_dicom(tmp_path):
    with pytest.raises(CTReadError, match="leave rescale out"):
        read_ct(write_series(tmp_path / "good"), rescale=(1, -1024))
