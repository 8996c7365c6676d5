"""The slices that DICOM files hold, from their headers: one of a plain file, several of an enhanced multi-frame file."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from .ct_common import EXPORT_AGAIN, is_disk_error
from .ct_dicom_storage import (
    EXPLICIT_LITTLE,
    NATIVE,
    PARSE_ERRORS,
    TAGS,
    DicomPixels,
    contents,
    pixel_element,
    pydicom,
    quiet_pydicom,
)
from .ct_dicom_walk import HeaderWalker
from .ct_signatures import DICOMDIR_CLASS, looks_like_dicom, read_head

_CT_CLASS = re.compile(rb"(?<![\d.])1\.2\.840\.10008\.5\.1\.4\.1\.1\.2(\.[12])?(?![\d.])")  # plain, enhanced, converted
_COMMA_NUMBERS = re.compile(r"(?=[^,]*,)[-+0-9eE., \\\0]*")
_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture and its multi-frame kinds
_IMPLICIT_LITTLE = "1.2.840.10008.1.2"

# `value(keyword, functional group)` of a file, or of one frame of it.
TagReader: TypeAlias = Callable[..., Any]


class LeftOutError(Exception):
    """A file that is no slice of a CT volume; the message completes "left out 3 …"."""


class BrokenSliceError(Exception):
    """A CT slice that can't be read.

    Attributes:
        uid: UID of its series, "" where unknown.
        kind: why in a few words; completes "left out 3 …".
    """

    def __init__(self, uid: str = "", reason: str = "", kind: str = "cut short or damaged"):
        super().__init__(reason or f"a CT slice that is damaged or was cut short. {EXPORT_AGAIN} Or move it elsewhere.")
        self.uid, self.kind = uid, kind


@dataclass(frozen=True)
class DicomSlice:
    """One slice of a series: a file, or a frame of one.

    Attributes:
        pixels: how its file stores it.
        frame: number of the frame in the file, from 0.
        series: SeriesInstanceUID.
        space: StudyInstanceUID and FrameOfReferenceUID; only positions that share both are comparable.
        stack: StackID of a frame.
        series_number: SeriesNumber.
        modality: Modality.
        instance: SOPInstanceUID and frame, to sort by.
        position: (3,) LPS mm of the first pixel's centre.
        cosines: (6,) direction along a row, then along a column.
        spacing: mm from row to row, from column to column.
        thickness: mm from slice to slice.
        slope: HU per stored unit.
        intercept: HU of a stored 0.
        padding: lowest and highest stored value that mean "outside the field of view".
        time_point: tags and values that distinguish passes over the same location.
    """

    pixels: DicomPixels
    frame: int
    series: str
    space: tuple[str, str]
    stack: str
    series_number: str
    modality: str
    instance: str
    position: np.ndarray | None
    cosines: np.ndarray | None
    spacing: tuple[float, float] | None
    thickness: float | None
    slope: float
    intercept: float
    padding: tuple[float, float] | None
    time_point: tuple[tuple[str, str], ...]

    def fits(self, other: "DicomSlice") -> bool:
        """Return whether both can be slices of one stack: same orientation, matrix and pixel size."""
        mine, its = self.pixels, other.pixels
        if (mine.rows, mine.columns) != (its.rows, its.columns):
            return False
        return _are_close(self.cosines, other.cosines, 2e-3) and _are_close(self.spacing, other.spacing, 1e-3)

    @property
    def is_placed(self) -> bool:
        """Return whether position, orientation and pixel size are known."""
        return self.position is not None and self.cosines is not None and self.spacing is not None

    @property
    def normal(self) -> np.ndarray:
        """Return the direction (3,) across the slice. Only with an orientation."""
        assert self.cosines is not None
        return np.cross(self.cosines[:3], self.cosines[3:])

    def location_along(self, normal: np.ndarray) -> float:
        """Return where the slice is along a direction (3,), in mm. Only with a position."""
        assert self.position is not None
        return float(self.position @ normal)


def _are_close(
    one: np.ndarray | tuple[float, float] | None, two: np.ndarray | tuple[float, float] | None, tolerance: float
) -> bool:
    if one is None or two is None:
        return one is two
    return bool(np.abs(np.subtract(one, two)).max() <= tolerance)


@dataclass
class Headers:
    """What the headers of many files say.

    Attributes:
        series: slices by SeriesInstanceUID.
        left_out: how many files were left out, by reason.
        broken: slices that can't be read, and why.
    """

    series: dict[str, list[DicomSlice]]
    left_out: "Counter[str]"
    broken: dict[Path, BrokenSliceError]


def read_headers(files: Iterable[Path], allow_non_ct: bool) -> Headers:
    """Read the headers of DICOM files; other files are counted and left out.

    Args:
        files: to look through.
        allow_non_ct: take any modality and any unit.
    """
    series: dict[str, list[DicomSlice]] = defaultdict(list)
    headers, walker = Headers({}, Counter(), {}), HeaderWalker()
    with quiet_pydicom():
        for path in files:
            try:
                for piece in _slices_of(path, allow_non_ct, walker):
                    series[piece.series].append(piece)
            except LeftOutError as reason:
                headers.left_out[str(reason)] += 1
            except BrokenSliceError as error:
                headers.broken[path] = error
                headers.left_out[error.kind] += 1
    headers.series = dict(series)
    return headers


# --- One file ---------------------------------------------------------------------------------------------------------


def _slices_of(path: Path, allow_non_ct: bool, walker: HeaderWalker) -> list[DicomSlice]:
    if (plain := walker.walk(path)) is not None:
        try:
            return _slices_from(plain.header, path, (plain.syntax, plain.offset, plain.length), allow_non_ct)
        except PARSE_ERRORS:
            pass  # the whole header, below, tells which tag can't be read
    return _parsed_slices(path, allow_non_ct)


def _parsed_slices(path: Path, allow_non_ct: bool) -> list[DicomSlice]:
    """Return the slices of any file that pydicom can parse."""
    head = read_head(path, 4096)
    if not looks_like_dicom(head) and not _CT_CLASS.search(head):
        raise LeftOutError("that are not DICOM files")
    header = None
    try:
        with contents(path) as (stream, inflated):
            header = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=TAGS)
            syntax = inflated or str(header.file_meta.get("TransferSyntaxUID", ""))
            implicit = header.original_encoding[0] is True
            if not syntax:
                syntax = _IMPLICIT_LITTLE if implicit else EXPLICIT_LITTLE
            offset, length = pixel_element(stream, NATIVE.get(syntax, "<"), implicit)
            return _slices_from(header, path, (syntax, offset, length), allow_non_ct, deflated=inflated != "")
    except PARSE_ERRORS as error:
        if is_disk_error(error):
            raise
        if _CT_CLASS.search(head):
            raise _broken_slice(header) from error
        # Not the error's message: it may quote the file.
        raise LeftOutError(f"with a damaged header ({type(error).__name__}, e.g. {path.name})") from error


def _broken_slice(header: Any) -> BrokenSliceError:
    """Return the error of a CT slice that can't be read, with the tag that is no number if it is one."""
    found = None if header is None else _unreadable_tag(header)
    if found is None:
        return BrokenSliceError()
    tag, comma = found
    keyword = pydicom.datadict.keyword_for_tag(tag) or "private tag"
    what = "is written with a decimal comma; DICOM's numbers have a point" if comma else "can't be read"
    return BrokenSliceError(
        "",
        f"its {keyword} ({tag.group:04x},{tag.element:04x}) {what}. Export the series again, or correct the tag, e.g. "
        f"with pydicom.",
        f"with a {keyword} that can't be read",
    )


def _unreadable_tag(header: Any) -> tuple[Any, bool] | None:
    """Return the first tag whose value can't be read, also within sequences, and whether a decimal comma is the cause."""
    for tag in sorted(header.keys()):
        value: Any = None
        try:
            value = header[tag].value
            if header[tag].VR in ("DS", "IS"):
                [float(number) for number in _many(value)]  # pydicom leaves invalid numbers as text
        except PARSE_ERRORS:
            raw = header.get_item(tag).value if value is None else "\\".join(map(str, _many(value)))
            text = raw.decode("latin-1") if isinstance(raw, bytes) else str(raw)
            return tag, _COMMA_NUMBERS.fullmatch(text) is not None
        for item in value if header[tag].VR == "SQ" else ():
            if (found := _unreadable_tag(item)) is not None:
                return found
    return None


def _slices_from(
    header: Any, path: Path, storage: tuple[str, int, int], allow_non_ct: bool, deflated: bool = False
) -> list[DicomSlice]:
    """Return the slices of a header.

    Args:
        header: pydicom's dataset, or a `PlainHeader`.
        path: the file.
        storage: transfer syntax, and offset and length of the pixel data.
        allow_non_ct: take any modality and any unit.
        deflated: the file was inflated to be read.
    """
    modality = str(header.get("Modality", "") or "")
    if "Rows" not in header or "Columns" not in header:
        kind = str(header.file_meta.get("MediaStorageSOPClassUID") or header.get("SOPClassUID") or "")
        if _CT_CLASS.fullmatch(kind.encode()):
            raise BrokenSliceError(str(header.get("SeriesInstanceUID", "") or "")[:64])
        if DICOMDIR_CLASS.fullmatch(kind.encode()):
            raise LeftOutError("directories of a disc (DICOMDIR: name its folder)")
        raise LeftOutError("reports or other objects without images" if kind else "damaged files")
    _check_kind(header, modality, allow_non_ct)
    pixels = _pixels(header, path, *storage, deflated)
    if pixels.rows < 1 or pixels.columns < 1 or pixels.frames < 1:
        raise LeftOutError("empty images")
    if "PerFrameFunctionalGroupsSequence" in header:
        return _enhanced_slices(header, pixels, modality, allow_non_ct)
    if pixels.frames > 1:
        raise LeftOutError(f"with {pixels.frames} frames in one file and no position for each")
    return [_slice(header, pixels, 0, modality, allow_non_ct, lambda keyword, group=None: header.get(keyword))]


def _pixels(header: Any, path: Path, syntax: str, offset: int, length: int, deflated: bool) -> DicomPixels:
    stored = int(header.get("BitsStored") or header.BitsAllocated)
    return DicomPixels(
        file=path,
        syntax=syntax,
        offset=offset,
        length=length,
        rows=int(header.Rows),
        columns=int(header.Columns),
        frames=int(header.get("NumberOfFrames") or 1),
        allocated=int(header.BitsAllocated),
        stored=stored,
        high_bit=int(header.get("HighBit") or stored - 1),
        signed=int(header.get("PixelRepresentation") or 0) == 1,
        deflated=deflated,
    )


def _check_kind(header: Any, modality: str, allow_non_ct: bool) -> None:
    if int(header.get("SamplesPerPixel") or 1) > 1:
        raise LeftOutError(f"colour images ({str(header.get('PhotometricInterpretation', ''))[:16]})")
    kind = {str(value).upper() for value in _many(header.get("ImageType"))}
    if kind & {"LOCALIZER", "SCOUT", "TOPOGRAM"}:
        raise LeftOutError("scouts (localizers)")
    if modality != "CT" and not allow_non_ct:
        raise LeftOutError(f"of modality {modality[:16]}" if modality else "of modality not given")
    placed = header.get("ImagePositionPatient") or "PerFrameFunctionalGroupsSequence" in header
    if str(header.get("SOPClassUID", "")).startswith(_CAPTURE) and not placed:
        raise LeftOutError("screen captures")


def _enhanced_slices(header: Any, pixels: DicomPixels, modality: str, allow_non_ct: bool) -> list[DicomSlice]:
    """Return the frames of an enhanced multi-frame file, each with its own functional groups or the shared ones."""
    frames = list(header.PerFrameFunctionalGroupsSequence)
    if len(frames) != pixels.frames:
        raise LeftOutError("whose frames are not all described")
    shared = header.get("SharedFunctionalGroupsSequence") or [None]

    def reader_of(frame: Any) -> TagReader:
        def value(keyword: str, group: str | None = None) -> Any:
            for item in (frame, shared[0]):
                if group and item is not None and item.get(group):
                    return item.get(group)[0].get(keyword)
            return header.get(keyword)

        return value

    return [_slice(header, pixels, i, modality, allow_non_ct, reader_of(frame)) for i, frame in enumerate(frames)]


# --- One slice --------------------------------------------------------------------------------------------------------


def _slice(
    header: Any, pixels: DicomPixels, frame: int, modality: str, allow_non_ct: bool, value: TagReader
) -> DicomSlice:
    slope, intercept = _rescale(header, allow_non_ct, value)
    spacing = _numbers(value("PixelSpacing", "PixelMeasuresSequence"), 2)
    return DicomSlice(
        pixels=pixels,
        frame=frame,
        series=_text(header, "SeriesInstanceUID"),
        space=(_text(header, "StudyInstanceUID"), _text(header, "FrameOfReferenceUID")),
        stack=str(value("StackID", "FrameContentSequence") or "")[:16],
        series_number=str(header.get("SeriesNumber", "") or "")[:16],
        modality=modality[:16],
        instance=f"{header.get('SOPInstanceUID', '')}#{frame}",
        position=_numbers(value("ImagePositionPatient", "PlanePositionSequence"), 3),
        cosines=_unit_cosines(_numbers(value("ImageOrientationPatient", "PlaneOrientationSequence"), 6)),
        spacing=(float(spacing[0]), float(spacing[1])) if spacing is not None and min(spacing) > 0 else None,
        thickness=_thickness(value),
        slope=slope,
        intercept=intercept,
        padding=_padding(header, pixels, slope, intercept),
        time_point=_time_point(value),
    )


def _rescale(header: Any, allow_non_ct: bool, value: TagReader) -> tuple[float, float]:
    """Return slope and intercept of a slice in HU."""
    unit = str(value("RescaleType", "PixelValueTransformationSequence") or "HU").upper()
    if unit not in ("HU", "US", "HU_MOD") and not allow_non_ct:
        raise LeftOutError(f"in unit {unit[:16]} instead of HU")
    slope = value("RescaleSlope", "PixelValueTransformationSequence")
    intercept = value("RescaleIntercept", "PixelValueTransformationSequence")
    if slope is None and intercept is None and header.get("ModalityLUTSequence"):
        raise LeftOutError("with a table (Modality LUT) instead of slope and intercept")
    slope, intercept = (1.0 if slope is None else float(slope)), float(intercept or 0)
    if slope == 0 or not (math.isfinite(slope) and math.isfinite(intercept)):
        raise LeftOutError(f"with rescale slope {slope:g} and intercept {intercept:g}")
    return slope, intercept


def _text(header: Any, keyword: str) -> str:
    return str(header.get(keyword, "") or "")[:64]


def _numbers(values: Any, count: int) -> np.ndarray | None:
    """Return `count` finite numbers, or None."""
    numbers = np.array([float(value) for value in _many(values)])
    return numbers if numbers.shape == (count,) and np.isfinite(numbers).all() else None


def _many(values: Any) -> list[Any]:
    if values is None or values == "":
        return []
    return [values] if isinstance(values, (str, int, float)) else list(values)


def _unit_cosines(cosines: np.ndarray | None) -> np.ndarray | None:
    """Return two directions of length 1, None where they cannot be the axes of an image."""
    if cosines is None:
        return None
    lengths = np.linalg.norm(cosines.reshape(2, 3), axis=1)
    if lengths.min() < 0.5 or abs(cosines[:3] @ cosines[3:]) > 0.02 * lengths.prod():
        return None
    return (cosines.reshape(2, 3) / lengths[:, None]).ravel()


def _thickness(value: TagReader) -> float | None:
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        numbers = _numbers(value(keyword, "PixelMeasuresSequence"), 1)
        if numbers is not None and abs(numbers[0]) > 1e-3:
            return abs(float(numbers[0]))
    return None


def _padding(header: Any, pixels: DicomPixels, slope: float, intercept: float) -> tuple[float, float] | None:
    """Return the range of stored values that mean "outside", unless tissue has such HU."""
    if header.get("PixelPaddingValue") is None:
        return None
    values = [int(header.PixelPaddingValue), int(header.get("PixelPaddingRangeLimit") or header.PixelPaddingValue)]
    if pixels.signed:  # some writers give the unsigned number of the same bits
        values = [
            value - (1 << pixels.allocated) if value >= 1 << (pixels.allocated - 1) else value for value in values
        ]
    elif min(values) < 0:
        values = [value % (1 << pixels.allocated) for value in values]
    low, high = min(values), max(values)
    hu = sorted(value * slope + intercept for value in (low, high))
    return (low, high) if hu[1] <= -500 or hu[0] > 3071 else None


def _time_point(value: TagReader) -> tuple[tuple[str, str], ...]:
    groups = {"TemporalPositionIndex": "FrameContentSequence", "StackID": "FrameContentSequence"}
    keywords = ("TemporalPositionIdentifier", "AcquisitionNumber", "ConvolutionKernel", "AcquisitionTime", *groups)
    found = ((keyword, value(keyword, groups.get(keyword))) for keyword in keywords)
    return tuple((keyword, str(tag)) for keyword, tag in found if tag not in (None, ""))
