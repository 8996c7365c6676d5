"""Compressed DICOM frames: what they are, whether their size is the header's, and files of single ones for decoders."""

import struct
from functools import lru_cache
from io import BytesIO
from typing import Any

from .ct_common import EXPORT_AGAIN, CTReadError
from .ct_dicom_storage import DicomPixels, pydicom

try:
    from pydicom.encaps import encapsulate
except ImportError:
    encapsulate = None  # type: ignore[assignment]

_RLE = "1.2.840.10008.1.2.5"
_JPEG_LS = "1.2.840.10008.1.2.4.80"
_PERHAPS_LOSSY = {f"1.2.840.10008.1.2.4.{n}" for n in (91, 203)}  # where decoders may round differently
_HTJ2K = {f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203)}
_JPEG_2000 = {f"1.2.840.10008.1.2.4.{n}" for n in (90, 91)} | _HTJ2K
DECODED = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81)} | {_RLE} | _JPEG_2000
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_MAX_FRAME_PIXELS = 1 << 26  # 8192 x 8192: a compressed frame may claim any size


def stored_type(pixels: DicomPixels) -> str:
    """Return the type of the stored values, such as "i2"."""
    return f"{'i' if pixels.signed else 'u'}{pixels.allocated // 8}"


def decoder_of(pixels: DicomPixels, frame: bytes) -> str:
    """Return the end of a frame's file name, by which the process chooses its decoder.

    It is "plain." and a kind for frames that any decoder of that kind reads alike: their own header agrees with the
    file's. These are imagecodecs', where it is installed; all others are GDCM's.
    """
    if pixels.syntax == _RLE:
        return "plain.rle" if pixels.allocated in (8, 16) else "any.dcm"
    if pixels.syntax == _JPEG_LS:
        start = frame.find(b"\xff\xf7", 0, 4096)
        return "plain.jls" if start >= 0 and frame[start + 4] == pixels.stored else "any.dcm"
    kind = "htj2k" if pixels.syntax in _HTJ2K else "j2k" if pixels.syntax in _JPEG_2000 else "dcm"
    if kind != "dcm" and pixels.syntax not in _PERHAPS_LOSSY:
        start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
        depth, signed = (frame[start + 42] & 127) + 1, frame[start + 42] >> 7
        if pixels.stored <= depth <= pixels.allocated and signed == pixels.signed:
            return f"plain.{kind}"
    return f"any.{kind}"


def single_frame(pixels: DicomPixels, frame: bytes) -> bytes:
    """Return a DICOM file of one compressed frame and nothing else that a decoder does not need."""
    header = _bare_header(pixels.syntax, pixels.rows, pixels.columns, pixels.allocated, pixels.stored, pixels.signed)
    pixel_data = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return b"".join((header, pixel_data, encapsulate([frame]), end))


@lru_cache(maxsize=8)
def _bare_header(syntax: str, rows: int, columns: int, allocated: int, stored: int, signed: bool) -> bytes:
    """Return a DICOM file of one compressed frame up to its pixel data."""
    data: Any = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = _SECONDARY_CAPTURE
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = rows, columns
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = allocated, stored, stored - 1
    data.PixelRepresentation = int(signed)
    file = BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


def check_fragments(pixels: DicomPixels, data: bytes) -> None:
    """Raise CTReadError for compressed data that end inside a fragment, which not every decoder notices."""
    offset = 0
    while offset + 8 <= len(data):
        group, element, length = struct.unpack("<HHI", data[offset : offset + 8])
        if (group, element) != (0xFFFE, 0xE000):
            return
        offset += 8 + length
    if offset > len(data):
        raise CTReadError(
            f"{pixels.file}: ends inside its compressed voxels. It was cut short: download or export it again."
        )


def check_codestream(pixels: DicomPixels, frame: bytes) -> None:
    """Raise CTReadError unless a compressed frame's own size, for which the decoder takes memory, is the header's."""
    if pixels.rows * pixels.columns > _MAX_FRAME_PIXELS:
        raise CTReadError(
            f"{pixels.file}: compressed images of {pixels.columns} x {pixels.rows} pixels. {EXPORT_AGAIN}"
        )
    if pixels.syntax == _RLE:
        good = struct.unpack("<I", frame[:4])[0] == pixels.allocated // 8  # segments
    elif pixels.syntax in _JPEG_2000:
        good = _is_jpeg_2000_of(frame, pixels.rows, pixels.columns)
    else:
        good = _jpeg_size(frame) == (pixels.rows, pixels.columns, 1)
    if not good:
        raise CTReadError(
            f"{pixels.file}: compressed voxels that are not one greyscale image of {pixels.columns} x {pixels.rows}, "
            f"as its header says. {EXPORT_AGAIN}"
        )


def _is_jpeg_2000_of(frame: bytes, rows: int, columns: int) -> bool:
    """Return whether a JPEG 2000 codestream declares one component of this size and few enough tiles."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start < 0:
        return False
    width, height, left, top, tile, tile_height, *_ = struct.unpack(">8I", frame[start + 8 : start + 40])
    components = struct.unpack(">H", frame[start + 40 : start + 42])[0]
    if (width - left, height - top, components) != (columns, rows, 1):
        return False
    return tile > 0 and tile_height > 0 and -(-width // tile) * -(-height // tile_height) <= 65535


def _jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    """Return (rows, columns, components) of a JPEG or JPEG-LS stream, from its frame header."""
    offset = 2
    while frame[:2] == b"\xff\xd8" and offset + 10 <= len(frame):
        marker, length = frame[offset + 1], struct.unpack(">H", frame[offset + 2 : offset + 4])[0]
        if frame[offset] != 0xFF:
            return None
        if marker == 0xFF:  # fill
            offset += 1
            continue
        if marker in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7):
            rows, columns, components = struct.unpack(">HHB", frame[offset + 5 : offset + 10])
            return rows, columns, components
        offset += 2 + length
    return None
