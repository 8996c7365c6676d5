"""The walk over plain headers: what it reads is what pydicom reads, and anything unusual is left to pydicom."""

import random
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from dicom_series import slice_dataset, stack_positions, write_series
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate

from samf.model import ct_dicom_decoders, ct_dicom_headers
from samf.model.ct_dicom_storage import quiet_pydicom
from samf.model.ct_dicom_walk import HeaderWalker
from samf.model.ct_volume import CTReadError, read_ct

SLICE = slice_dataset(
    np.zeros((4, 4)), (1, 2, 3), ConvolutionKernel=["Br40d", "3"], AcquisitionTime="", SeriesNumber="7"
)


def outcome(read, *args):
    """Return the slices of a file as comparable values, or why there are none."""
    try:
        return [
            {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(piece).items()}
            for piece in read(*args)
        ]
    except (ct_dicom_headers.LeftOutError, ct_dicom_headers.BrokenSliceError) as error:
        return type(error), str(error), vars(error)


def both_readings(path):
    with quiet_pydicom():
        return (
            outcome(ct_dicom_headers._slices_of, path, False, HeaderWalker()),
            outcome(ct_dicom_headers._parsed_slices, path, False),
        )


def test_a_real_header_is_walked_and_means_what_pydicom_reads():
    path = Path(get_testdata_file("CT_small.dcm", download=False))
    header = pydicom.dcmread(path, stop_before_pixels=True)
    plain = HeaderWalker().walk(path)
    assert plain.syntax == header.file_meta.TransferSyntaxUID
    for keyword, value in plain.header.items():
        assert value == header[keyword].value, keyword
    assert {"Rows", "ImagePositionPatient", "RescaleIntercept", "SOPInstanceUID"} <= set(plain.header)
    data = path.read_bytes()
    assert data[plain.offset - 12 : plain.offset] == struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, plain.length)


def test_damaged_headers_mean_what_pydicom_reads(tmp_path):
    """Bytes changed, removed and added at random: where the walk goes on, pydicom finds the same."""
    SLICE.save_as(tmp_path / "whole", enforce_file_format=True)
    data, rng, walked = (tmp_path / "whole").read_bytes(), random.Random(0), 0
    for number in range(120):
        damaged, place = bytearray(data), rng.randrange(132, len(data) - 60)
        width = rng.choice((0, 1, 2, 8))
        damaged[place : place + width] = bytes(rng.randrange(256) for _ in range(rng.choice((width, width, 1))))
        path = tmp_path / str(number)
        path.write_bytes(damaged)
        walked += HeaderWalker().walk(path) is not None
        ours, expected = both_readings(path)
        assert ours == expected, number
    assert walked > 20


@pytest.mark.parametrize("undefined", [False, True])
def test_sequences_are_passed_over(tmp_path, undefined):
    inner = pydicom.Dataset()
    inner.CodeValue, inner.Rows = "1", 77  # not the image's
    outer = pydicom.Dataset()
    outer.PurposeOfReferenceCodeSequence = [inner, inner]
    dataset = slice_dataset(np.zeros((4, 4)), (1, 2, 3), ReferencedImageSequence=[outer])
    for sequence in (dataset["ReferencedImageSequence"], outer["PurposeOfReferenceCodeSequence"]):
        sequence.is_undefined_length = undefined
        for item in sequence.value:
            item.is_undefined_length_sequence_item = undefined
    dataset.save_as(tmp_path / "slice", enforce_file_format=True)
    assert HeaderWalker().walk(tmp_path / "slice").header.Rows == 4
    ours, expected = both_readings(tmp_path / "slice")
    assert ours == expected and ours[0]["pixels"].rows == 4


@pytest.mark.parametrize(
    "tags", [{"SpecificCharacterSet": ["", "ISO 2022 IR 87"]}, {"ModalityLUTSequence": [pydicom.Dataset()]}]
)
def test_unusual_headers_are_pydicoms(tmp_path, tags):
    slice_dataset(np.zeros((4, 4)), (1, 2, 3), **tags).save_as(tmp_path / "slice", enforce_file_format=True)
    assert HeaderWalker().walk(tmp_path / "slice") is None
    ours, expected = both_readings(tmp_path / "slice")
    assert ours == expected


# --- Decoders ---------------------------------------------------------------------------------------------------------


def rle(image):
    planes = [
        imagecodecs.packbits_encode((image.view(np.uint16) >> bits).astype(np.uint8).tobytes()) for bits in (8, 0)
    ]
    planes = [plane + bytes(len(plane) % 2) for plane in planes]
    return struct.pack("<16I", 2, 64, 64 + len(planes[0]), *[0] * 13) + b"".join(planes)


ENCODERS = {
    "1.2.840.10008.1.2.5": rle,
    "1.2.840.10008.1.2.4.80": lambda image: imagecodecs.jpegls_encode(image.view(np.uint16)),
    "1.2.840.10008.1.2.4.90": lambda image: imagecodecs.jpeg2k_encode(
        image, level=0, codecformat="j2k", reversible=True
    ),
    "1.2.840.10008.1.2.4.201": lambda image: imagecodecs.htj2k_encode(image, reversible=True),
}


@pytest.fixture(params=ENCODERS)
def packed(tmp_path, request):
    """A compressed series and the uncompressed one that it was made of; enough slices for several processes."""
    positions = stack_positions(17)
    plain, folder = (write_series(tmp_path / name, positions, PixelRepresentation=0) for name in ("plain", "packed"))
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        frame = ENCODERS[request.param](dataset.pixel_array)
        dataset.file_meta.TransferSyntaxUID = request.param
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.save_as(path)
    return folder, plain


@pytest.mark.parametrize(
    "change", [("", ""), ("import imagecodecs", "raise ImportError"), ("import SimpleITK", "1 / 0")]
)
def test_both_decoders_give_the_voxels_that_were_packed(packed, monkeypatch, change):
    """The last change shows that imagecodecs decodes them all: SimpleITK would fail."""
    script = ct_dicom_decoders._DECODE_SCRIPT.replace(*change)
    monkeypatch.setattr(ct_dicom_decoders, "_DECODE_SCRIPT", script)
    monkeypatch.setattr(ct_dicom_decoders, "thread_count", lambda: 2)
    folder, plain = packed
    np.testing.assert_array_equal(read_ct(folder).hu, read_ct(plain).hu)


def test_the_error_names_the_damaged_slice_of_several_processes(packed, monkeypatch):
    monkeypatch.setattr(ct_dicom_decoders, "thread_count", lambda: 3)
    folder, _ = packed
    path = folder / "slice013.dcm"
    dataset = pydicom.dcmread(path)
    dataset.PixelData = dataset.PixelData[:60] + bytes(len(dataset.PixelData) - 68) + dataset.PixelData[-8:]
    dataset.save_as(path)
    with pytest.raises(CTReadError, match=r"slice013\.dcm: "):
        read_ct(folder)
