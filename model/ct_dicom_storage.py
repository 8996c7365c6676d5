"""How one DICOM file is stored: where its voxels are, which tags are read, and how a dataset becomes a file."""

import logging
import mmap
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from .ct_common import CTReadError

try:
    import pydicom
    from pydicom.errors import BytesLengthException, InvalidDicomError
except ImportError:
    pydicom = None  # type: ignore[assignment]
    BytesLengthException = InvalidDicomError = ValueError  # type: ignore[assignment,misc]

__all__ = [
    "DEFLATED",
    "EXPLICIT_LITTLE",
    "NATIVE",
    "PARSE_ERRORS",
    "TAGS",
    "DicomPixels",
    "contents",
    "pixel_element",
    "pydicom",
    "quiet_pydicom",
    "write_dataset",
]

# pydicom lets through what Python raises on damaged bytes.
PARSE_ERRORS: tuple[type[Exception], ...] = (
    BytesLengthException,
    InvalidDicomError,
    AttributeError,
    EOFError,
    KeyError,
    IndexError,
    LookupError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
_IMPLICIT, EXPLICIT_LITTLE, _EXPLICIT_BIG = (f"1.2.840.10008.1.2{suffix}" for suffix in ("", ".1", ".2"))
NATIVE = {_IMPLICIT: "<", EXPLICIT_LITTLE: "<", _EXPLICIT_BIG: ">"}  # transfer syntaxes without compression: byte order
DEFLATED = "1.2.840.10008.1.2.1.99"
_CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
_PIXEL_TAG = (0x7FE0, 0x0010)
_MAX_INFLATED = 1 << 30
_WRITE_ERRORS = (AttributeError, KeyError, NotImplementedError, TypeError, ValueError)
# The only tags that are ever read. UIDs are compared, never shown.
TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "SeriesNumber",
    "Modality",
    "ImageType",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "ModalityLUTSequence",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "AcquisitionNumber",
    "AcquisitionTime",
    "TemporalPositionIdentifier",
    "ConvolutionKernel",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]


@dataclass(frozen=True)
class DicomPixels:
    """How one file stores its frames.

    Attributes:
        file: its path.
        syntax: UID of the transfer syntax.
        offset: of the pixel data's value in bytes, -1 where there is none.
        length: of that value in bytes, 0xFFFFFFFF where it is compressed.
        rows: rows of a frame.
        columns: columns of a frame.
        frames: number of frames.
        allocated: bits per voxel.
        stored: bits of them that count.
        high_bit: index of the highest of those.
        signed: whether they are two's complement.
        deflated: whether the whole file is, so that `offset` counts in its inflated content.
    """

    file: Path
    syntax: str
    offset: int
    length: int
    rows: int
    columns: int
    frames: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool
    deflated: bool = False


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Silence pydicom's warnings, which may quote the file; what matters of them is checked and reported here."""
    log = logging.getLogger("pydicom")
    before = log.disabled
    log.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


class _Map(mmap.mmap):
    """A memory map that can seek past its end, as a file can."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: len(self)}[whence]
        super().seek(min(max(start + offset, 0), len(self)))


@contextmanager
def contents(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield a file to read from, and its transfer syntax if it had to be inflated to be read at all, else "".

    A map gives no more bytes than the file holds, whatever length a damaged element claims.
    """
    with open(path, "rb") as stream, _Map(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        # The UID is in the first few hundred bytes of a file whose remainder is deflated.
        if DEFLATED.encode() not in mapped[:1024]:
            yield mapped, ""
            return
        meta = pydicom.filereader.read_file_meta_info(path)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflater.decompress(mapped[144 + int(meta.FileMetaInformationGroupLength) :], _MAX_INFLATED)
        if inflater.unconsumed_tail:
            raise ValueError("inflates to more than a gigabyte")
        yield BytesIO(data), EXPLICIT_LITTLE


def pixel_element(stream: Any, order: str, implicit: bool) -> tuple[int, int]:
    """Return the offset and the length of the pixel data's value, (-1, 0) where there is none.

    Args:
        stream: at the first byte of the element, where pydicom stopped.
        order: byte order, "<" or ">".
        implicit: whether the transfer syntax leaves value representations out.
    """
    start, head = stream.tell(), stream.read(12)
    if len(head) < 12 or struct.unpack(order + "HH", head[:4]) != _PIXEL_TAG:
        return -1, 0
    if implicit:
        return start + 8, struct.unpack(order + "I", head[4:8])[0]
    return start + 12, struct.unpack(order + "I", head[8:])[0]


def write_dataset(dataset: Any, path: Path) -> None:
    """Write the tags of a pydicom dataset that reading needs; nothing that identifies the patient goes to disk.

    Raises:
        CTReadError: without voxels, or not to be written as a file.
    """
    if pydicom is None:
        raise CTReadError("a pydicom dataset: reading DICOM needs pydicom 3: pip install 'pydicom>=3'")
    try:
        if _PIXEL_TAG not in dataset and "Rows" in dataset:
            raise CTReadError(
                "a pydicom dataset without voxels; expected PixelData. Read it without stop_before_pixels, or pass the "
                "path of its file."
            )
        kept = _reduced(dataset)
        with quiet_pydicom():
            pydicom.dcmwrite(path, kept, enforce_file_format=True)
    except _WRITE_ERRORS as error:
        if isinstance(error, CTReadError):
            raise
        raise CTReadError(
            f"a pydicom dataset that cannot be written as a file ({type(error).__name__}). Pass the path of its file."
        ) from error


def _reduced(dataset: Any) -> Any:
    """Return a dataset of `TAGS` and the voxels, with the meta information of a file."""
    syntax = str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID", "") or "")
    implicit, little = dataset.original_encoding
    if not syntax:  # received over a network, or made in memory
        little = little is not False
        syntax = _IMPLICIT if implicit else (EXPLICIT_LITTLE if little else _EXPLICIT_BIG)
    kept: Any = pydicom.Dataset()
    same = dataset.original_encoding == (syntax == _IMPLICIT, NATIVE.get(syntax, "<") == "<")
    for tag in map(pydicom.tag.Tag, (*TAGS, "PixelData")):
        if tag in dataset:
            kept[tag] = dataset.get_item(tag) if same else dataset[tag]
    kept.file_meta = pydicom.dataset.FileMetaDataset()
    kept.file_meta.TransferSyntaxUID = syntax
    kept.file_meta.MediaStorageSOPClassUID = str(dataset.get("SOPClassUID", "") or _CT_STORAGE)
    kept.file_meta.MediaStorageSOPInstanceUID = str(dataset.get("SOPInstanceUID", "") or "1.2.3")
    return kept
