"""One CT series of DICOM slices → a volume in Hounsfield units.

pydicom reads the headers. Files are told from their bytes and sorted by where they lie in the patient; names and instance
numbers count for nothing. Log lines and errors hold no patient data and no identifiers: only technical tags are ever
looked at, and a series is called by a short digest of its UID (`series_label`), which `series_uid` takes as well.

What is mended and what is refused:
- scouts, reports, colour captures, captures without a position, other modalities and units: left out, counted;
- slices of which each is a series by itself, as some anonymisers leave them: one series, if they were passed as a list, or
  if they share study, frame of reference, orientation, matrix and pixel size (`_joined`);
- several stacks in one enhanced file: the largest axial one, like a series; the log gives each a label (`_split`);
- numbers that can't be read, such as those with a decimal comma: refused, with the tag's name;
- up to three slices, or a tenth, of another orientation, matrix or pixel size: left out, counted. More: refused;
- a CT slice that is damaged or was cut short: its series is refused, never read in part;
- copies of a slice: left out, counted. Different slices at one place (time points, reconstructions): refused;
- distances that differ by at most a tenth, or 0.1 mm, of their median: even. Otherwise the stack is interpolated onto
  even distances, unless a gap is wider than `MAX_GAP_STEPS` medians (or 5 mm, and never above 10 mm): refused;
- slices that are shifted sideways off one straight line by more than 1 mm: refused;
- a tilted gantry: the stack keeps its sheared affine, and whoever makes a RAS+ volume of it straightens it.
"""

import hashlib
import logging
import math
import os
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .ct_dicom_pixels import (
    ANEW,
    NATIVE,
    PARSE_ERRORS,
    DicomPixels,
    Frames,
    contents,
    pixel_element,
    pydicom,
    quiet_pydicom,
)
from .ct_formats import (
    AIR_HU,
    LPS_TO_RAS,
    MAX_VOXELS,
    CTReadError,
    NotCTError,
    StoredVolume,
    is_disk_error,
    scale_to_hu,
)

logger = logging.getLogger(__name__)

MAX_GAP_STEPS = 3
_MIN_GAP_LIMIT, _MAX_GAP_LIMIT = 5.0, 10.0  # mm
_STEP_TOLERANCE, _STEP_TOLERANCE_MM = 0.1, 0.1
_MAX_SIDEWAYS_MM = 1.0
_SAME_PLACE_MM = 0.01
_MAX_ODD_SLICES, _MAX_ODD_SHARE = 3, 0.1  # of another orientation, matrix or pixel size, whichever is more
_MAX_FILES = 100_000
_MAX_LISTED = 12  # series in one message
_CT_CLASS = re.compile(rb"(?<![\d.])1\.2\.840\.10008\.5\.1\.4\.1\.1\.2(\.[12])?(?![\d.])")  # plain, enhanced, converted
_DIRECTORY = re.compile(rb"(?<![\d.])1\.2\.840\.10008\.1\.3\.10(?![\d.])")  # DICOMDIR
_COMMA_NUMBERS = re.compile(r"(?=[^,]*,)[-+0-9eE., \\\0]*")
_MAX_COPIES = 3  # of one slice under its SeriesInstanceUID
_MIN_JOINED = 3  # series of one slice that a folder must have to be one volume
_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture and its multi-frame kinds
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
_NON_CT_REMEDY = "Expected one greyscale value a voxel and modality CT; allow_non_ct=True takes other modalities."


class _LeftOutError(Exception):
    """A DICOM file that is no slice of a CT volume; the message says what it is."""


class _BrokenSliceError(Exception):
    """A CT slice that can't be read, as the message says; its series' UID, if that is known; and in few words why."""

    def __init__(self, uid: str = "", reason: str = "", kind: str = "cut short or damaged"):
        super().__init__(reason or f"a CT slice that is damaged or was cut short. {ANEW} Or move it elsewhere.")
        self.uid, self.kind = uid, kind


@dataclass(frozen=True)
class _Slice:
    """One picture of a series: a file, or a frame of one."""

    pixels: DicomPixels
    frame: int
    series: str
    room: tuple[str, str]  # study and frame of reference: positions count in one room
    stack: str  # StackID of a frame
    series_number: str
    modality: str
    instance: str
    position: np.ndarray | None  # (3,) LPS mm of the first pixel's centre
    cosines: np.ndarray | None  # (6,) direction along a row, then along a column
    spacing: tuple[float, float] | None  # mm from row to row, from column to column
    thickness: float | None
    slope: float
    intercept: float
    padding: tuple[float, float] | None  # stored values from .. to that mean "outside the field"
    time_point: tuple[tuple[str, str], ...]  # tags that tell two passes over the same place apart

    def fits(self, other: "_Slice") -> bool:
        """Whether both can be slices of one stack: same orientation, matrix and pixel size."""
        mine, its = self.pixels, other.pixels
        if (mine.rows, mine.columns) != (its.rows, its.columns):
            return False
        for one, two, tolerance in ((self.cosines, other.cosines, 2e-3), (self.spacing, other.spacing, 1e-3)):
            if (one is None) != (two is None) or (one is not None and np.abs(np.subtract(one, two)).max() > tolerance):
                return False
        return True

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.cosines[:3], self.cosines[3:])


# ------------------------------------------------------------------------------------------------------ what others call


def looks_like_dicom(head: bytes) -> bool:
    """Whether a file that begins so (132 bytes or more) is DICOM, with or without its preamble."""
    if head[128:132] == b"DICM":
        return True
    if len(head) < 132:
        return False
    group, element = struct.unpack("<HH", head[:4])
    vr, length = head[4:6], struct.unpack("<I", head[4:8])[0]
    return group == 8 and element <= 0x70 and (vr in (b"UL", b"CS", b"UI", b"DA", b"TM", b"LO") or 0 < length <= 256)


def series_label(uid: str) -> str:
    """What messages call a series: eight digits made of its UID, from which the UID cannot be had back."""
    return hashlib.sha256(uid.encode()).hexdigest()[:8]


def is_dicomdir(path: Path) -> bool:
    """Whether a file is the directory of a disc, whose volumes lie in its folder."""
    return _DIRECTORY.search(_head(path, 1024)) is not None


def read_dicom(
    source: Path | str,
    files: Sequence[Path],
    *,
    series_uid: str | None = None,
    allow_non_ct: bool = False,
    listed: bool = False,
) -> StoredVolume:
    """The largest axial CT series among `files`, or the one named, as a volume in HU.

    Args:
        source: what messages call it.
        files: to look through; what is no DICOM slice is passed over.
        series_uid: SeriesInstanceUID of the series to take, or the label of a series or stack (see `series_label`).
        allow_non_ct: take any modality and any unit.
        listed: somebody named each of these files: they are one volume, if they can be.

    Raises:
        CTReadError: no such series, or one that doesn't make a volume; see this module's rules.
    """
    if pydicom is None:
        raise CTReadError(f"{source}: reading DICOM needs pydicom 3: pip install pydicom")
    if len(files) > _MAX_FILES:
        raise CTReadError(f"{source}: {len(files)} files; expected at most {_MAX_FILES}. Name the folder of one study.")
    series, left_out, broken = _read_headers(files, allow_non_ct)
    if left_out:
        wrong = any(word in reason for reason in left_out for word in ("damaged", "no DICOM", "can't be read"))
        level = logging.WARNING if wrong else logging.INFO
        logger.log(level, "%s: left out %s", source, _counted(left_out))
    if not series and broken:
        path, error = next(iter(broken.items()))
        raise CTReadError(f"{path}: {error}")
    slices = _choose_series(source, series, left_out, series_uid, listed)
    chosen = {piece.series for piece in slices}
    for path, error in broken.items():
        # Of a UID that was itself cut short nobody knows which series it names.
        if error.uid in chosen or (error.uid not in series and series_uid is None):
            raise CTReadError(f"{path}: {error}")
    notes: list[str] = []
    slices = _one_plane(source, slices, notes)
    if len(slices) == 1:
        affine, steps = _single_slice_affine(source, slices[0]), None
    else:
        slices, affine, steps = _stack(source, slices, notes)
    _check_size(source, slices, steps)
    hu = _read_pixels(source, slices)
    if steps is not None:
        hu = _interpolate(hu, steps)
    for note in notes:
        logger.warning("%s: %s", source, note)
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    hu = hu.T  # (slices, rows, columns) → (X, Y, Z)
    return StoredVolume(hu, str(source), [LPS_TO_RAS @ affine], zooms, own_scaling=True, notes=notes)


def walk_once(
    folder: str | os.PathLike, on_error: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """`folder` and the folders below it, each with its files' names, both sorted.

    Links to folders are followed, but no folder comes twice, however many links lead to it. Hidden folders below `folder`
    are left out, hidden files are not.

    Raises:
        OSError: a folder that can't be listed; where there is `on_error`, it gets that, and the walk goes on.
    """
    visited = set()
    for parent, folders, names in os.walk(folder, onerror=on_error or _raise, followlinks=True):
        place = os.path.realpath(parent)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield parent, sorted(names)


def _raise(error: OSError) -> None:
    raise error


def dicom_files(folder: Path) -> list[Path]:
    """Every file in and below a folder that begins as DICOM does, but for directories of discs (see `walk_once`)."""
    found, seen = [], 0
    try:
        for parent, names in walk_once(folder):
            seen += len(names)
            if seen > _MAX_FILES:
                raise CTReadError(f"{folder}: more than {_MAX_FILES} files in it. Name the folder of one study.")
            for name in names:
                path = Path(parent, name)
                if path.is_file() and not name.upper().startswith("DICOMDIR") and looks_like_dicom(_head(path)):
                    found.append(path)
    except OSError as error:
        raise CTReadError(
            f"{error.filename or folder}: cannot be read ({error.strerror}). Check its permissions and its disk."
        ) from error
    return found


def _head(path: Path, size: int = 352) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(size)


# -------------------------------------------------------------------------------------------------------------- headers


def _read_headers(
    files: Iterable[Path], allow_non_ct: bool
) -> tuple[dict[str, list[_Slice]], Counter, dict[Path, _BrokenSliceError]]:
    """Slices by series; how many files were left out for which reason; slices that can't be read, and why."""
    series, left_out, broken = defaultdict(list), Counter(), {}
    for path in files:
        try:
            for piece in _slices_of(path, allow_non_ct):
                series[piece.series].append(piece)
        except _LeftOutError as reason:
            left_out[str(reason)] += 1
        except _BrokenSliceError as error:
            broken[path] = error
            left_out[error.kind] += 1
    return dict(series), left_out, broken


def _slices_of(path: Path, allow_non_ct: bool) -> list[_Slice]:
    head = _head(path, 4096)
    if not looks_like_dicom(head) and not _CT_CLASS.search(head):
        raise _LeftOutError("that are no DICOM files")
    header = None
    try:
        with contents(path) as (stream, syntax), quiet_pydicom():
            header = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=TAGS)
            syntax = syntax or str(header.file_meta.get("TransferSyntaxUID", ""))
            implicit = header.original_encoding[0] is True
            if not syntax:
                syntax = "1.2.840.10008.1.2" if implicit else "1.2.840.10008.1.2.1"
            offset, length = pixel_element(stream, NATIVE.get(syntax, "<"), implicit)
            return _slices_from(path, header, syntax, offset, length, allow_non_ct)
    except PARSE_ERRORS as error:
        if is_disk_error(error):
            raise
        if _CT_CLASS.search(head):
            with quiet_pydicom():
                raise _broken_slice(header) from error
        # Not the error's own words: they may quote the file.
        raise _LeftOutError(f"with a damaged header ({type(error).__name__}, e.g. {path.name})") from error


def _broken_slice(header: Any) -> _BrokenSliceError:
    """What is said of a CT slice that can't be read: the tag whose number is none, or that it is damaged."""
    found = None if header is None else _unreadable_tag(header)
    if found is None:
        return _BrokenSliceError()
    tag, comma = found
    keyword = pydicom.datadict.keyword_for_tag(tag) or "private tag"
    what = "is written with a decimal comma; DICOM's numbers have a point" if comma else "can't be read"
    return _BrokenSliceError(
        "",
        f"its {keyword} ({tag.group:04x},{tag.element:04x}) {what}. Export the series again, or write the tag anew, e.g. "
        f"with pydicom.",
        f"with a {keyword} that can't be read",
    )


def _unreadable_tag(header: Any) -> tuple[Any, bool] | None:
    """The first tag whose value can't be read, also within sequences, and whether that is for a decimal comma."""
    for tag in sorted(header.keys()):
        value: Any = None
        try:
            value = header[tag].value
            if header[tag].VR in ("DS", "IS"):
                [float(number) for number in _many(value)]  # pydicom leaves as text what is none
        except PARSE_ERRORS:
            raw = header.get_item(tag).value if value is None else "\\".join(map(str, _many(value)))
            text = raw.decode("latin-1") if isinstance(raw, bytes) else str(raw)
            return tag, _COMMA_NUMBERS.fullmatch(text) is not None
        for item in value if header[tag].VR == "SQ" else ():
            if (found := _unreadable_tag(item)) is not None:
                return found
    return None


def _slices_from(path: Path, header: Any, syntax: str, offset: int, length: int, allow_non_ct: bool) -> list[_Slice]:
    modality = str(header.get("Modality", "") or "")
    if "Rows" not in header or "Columns" not in header:
        kind = str(header.file_meta.get("MediaStorageSOPClassUID") or header.get("SOPClassUID") or "")
        if _CT_CLASS.fullmatch(kind.encode()):
            raise _BrokenSliceError(str(header.get("SeriesInstanceUID", "") or "")[:64])
        if _DIRECTORY.fullmatch(kind.encode()):
            raise _LeftOutError("directories of a disc (DICOMDIR: name its folder)")
        raise _LeftOutError("reports or other objects without pictures" if kind else "damaged files")
    _check_kind(header, modality, allow_non_ct)
    stored = int(header.get("BitsStored") or header.BitsAllocated)
    pixels = DicomPixels(
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
    )
    if pixels.rows < 1 or pixels.columns < 1 or pixels.frames < 1:
        raise _LeftOutError("empty pictures")
    if "PerFrameFunctionalGroupsSequence" in header:
        return _enhanced_slices(header, pixels, modality, allow_non_ct)
    if pixels.frames > 1:
        raise _LeftOutError(f"with {pixels.frames} frames in one file that don't say where they lie")
    return [_slice(header, pixels, 0, modality, allow_non_ct, lambda keyword, group=None: header.get(keyword))]


def _check_kind(header: Any, modality: str, allow_non_ct: bool) -> None:
    if int(header.get("SamplesPerPixel") or 1) > 1:
        raise _LeftOutError(f"colour pictures ({str(header.get('PhotometricInterpretation', ''))[:16]})")
    kind = {str(value).upper() for value in _many(header.get("ImageType"))}
    if kind & {"LOCALIZER", "SCOUT", "TOPOGRAM"}:
        raise _LeftOutError("scouts (localizers)")
    if modality != "CT" and not allow_non_ct:
        raise _LeftOutError(f"of modality {modality[:16]}" if modality else "of modality not given")
    placed = header.get("ImagePositionPatient") or "PerFrameFunctionalGroupsSequence" in header
    if str(header.get("SOPClassUID", "")).startswith(_CAPTURE) and not placed:
        raise _LeftOutError("screen captures")


def _enhanced_slices(header: Any, pixels: DicomPixels, modality: str, allow_non_ct: bool) -> list[_Slice]:
    """The frames of an enhanced multi-frame file: each has its own functional groups, or the shared ones."""
    frames = list(header.PerFrameFunctionalGroupsSequence)
    if len(frames) != pixels.frames:
        raise _LeftOutError("whose frames are not all described")
    shared = header.get("SharedFunctionalGroupsSequence") or [None]

    def look_up(frame: Any):
        def value(keyword: str, group: str | None = None) -> Any:
            for item in (frame, shared[0]):
                if group and item is not None and item.get(group):
                    return item.get(group)[0].get(keyword)
            return header.get(keyword)

        return value

    return [_slice(header, pixels, i, modality, allow_non_ct, look_up(frame)) for i, frame in enumerate(frames)]


def _slice(header: Any, pixels: DicomPixels, frame: int, modality: str, allow_non_ct: bool, value: Any) -> _Slice:
    """`value(keyword, functional group)` gives a tag of the file or of one frame of it."""
    unit = str(value("RescaleType", "PixelValueTransformationSequence") or "HU").upper()
    if unit not in ("HU", "US", "HU_MOD") and not allow_non_ct:
        raise _LeftOutError(f"in unit {unit[:16]} instead of HU")
    slope = value("RescaleSlope", "PixelValueTransformationSequence")
    intercept = value("RescaleIntercept", "PixelValueTransformationSequence")
    if slope is None and intercept is None and header.get("ModalityLUTSequence"):
        raise _LeftOutError("with a table (Modality LUT) instead of slope and intercept")
    slope, intercept = (1.0 if slope is None else float(slope)), float(intercept or 0)
    if slope == 0 or not (math.isfinite(slope) and math.isfinite(intercept)):
        raise _LeftOutError(f"with rescale slope {slope:g} and intercept {intercept:g}")
    spacing = _numbers(value("PixelSpacing", "PixelMeasuresSequence"), 2)
    return _Slice(
        pixels=pixels,
        frame=frame,
        series=str(header.get("SeriesInstanceUID", "") or "")[:64],
        room=(_text(header, "StudyInstanceUID"), _text(header, "FrameOfReferenceUID")),
        stack=str(value("StackID", "FrameContentSequence") or "")[:16],
        series_number=str(header.get("SeriesNumber", "") or "")[:16],
        modality=modality[:16],
        instance=f"{header.get('SOPInstanceUID', '')}#{frame}",
        position=_numbers(value("ImagePositionPatient", "PlanePositionSequence"), 3),
        cosines=_unit_cosines(_numbers(value("ImageOrientationPatient", "PlaneOrientationSequence"), 6)),
        spacing=tuple(spacing) if spacing is not None and min(spacing) > 0 else None,
        thickness=_thickness(value),
        slope=slope,
        intercept=intercept,
        padding=_padding(header, pixels, slope, intercept),
        time_point=_time_point(value),
    )


def _text(header: Any, keyword: str) -> str:
    return str(header.get(keyword, "") or "")[:64]


def _numbers(values: Any, count: int) -> np.ndarray | None:
    """`count` finite numbers, or None."""
    values = np.array([float(value) for value in _many(values)])
    return values if values.shape == (count,) and np.isfinite(values).all() else None


def _many(values: Any) -> list:
    if values is None or values == "":
        return []
    return [values] if isinstance(values, (str, int, float)) else list(values)


def _unit_cosines(cosines: np.ndarray | None) -> np.ndarray | None:
    """Two directions of length 1, None where they are no axes of a picture."""
    if cosines is None:
        return None
    lengths = np.linalg.norm(cosines.reshape(2, 3), axis=1)
    if lengths.min() < 0.5 or abs(cosines[:3] @ cosines[3:]) > 0.02 * lengths.prod():
        return None
    return (cosines.reshape(2, 3) / lengths[:, None]).ravel()


def _thickness(value: Any) -> float | None:
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        numbers = _numbers(value(keyword, "PixelMeasuresSequence"), 1)
        if numbers is not None and abs(numbers[0]) > 1e-3:
            return abs(float(numbers[0]))
    return None


def _padding(header: Any, pixels: DicomPixels, slope: float, intercept: float) -> tuple[float, float] | None:
    """The range of stored values that mean "outside", where no tissue has such HU."""
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


def _time_point(value: Any) -> tuple[tuple[str, str], ...]:
    groups = {"TemporalPositionIndex": "FrameContentSequence", "StackID": "FrameContentSequence"}
    keywords = ("TemporalPositionIdentifier", "AcquisitionNumber", "ConvolutionKernel", "AcquisitionTime", *groups)
    found = ((keyword, value(keyword, groups.get(keyword))) for keyword in keywords)
    return tuple((keyword, str(tag)) for keyword, tag in found if tag not in (None, ""))


# ----------------------------------------------------------------------------------------------------- choosing a series


def _choose_series(
    source: Path | str, series: dict[str, list[_Slice]], left_out: Counter, series_uid: str | None, listed: bool
) -> list[_Slice]:
    """The slices of the series or stack named, else of the largest axial one; the log says which others there were."""
    if not series:
        found = _counted(left_out) or "no DICOM file"
        raise NotCTError(f"{source}: no CT series here (found {found}). {_NON_CT_REMEDY}")
    apart = {name: stack for uid, slices in series.items() for name, stack in _split(uid, slices).items()}
    if series_uid is None:
        choices = _joined(source, apart, listed)
    else:
        choices = _named(apart, series_uid) or _named(_joined(source, apart, listed), series_uid)
    if not choices:
        raise CTReadError(
            f"{source}: series_uid names no CT series here; there are {_listing(apart)}. Pass one of these labels, or a "
            f"SeriesInstanceUID."
        )
    chosen = max(sorted(choices), key=lambda name: _rank(choices[name]))
    if len(choices) > 1:
        logger.warning(
            "%s: %d %s; reads %s, the largest axial one. All: %s. Choose another by series_uid=.%s",
            source,
            len(choices),
            "series" if set(choices) <= set(series) else "series or stacks",
            series_label(chosen),
            _listing(choices),
            " They are single slices: if they are one volume, pass their files as a list."
            * (len(choices[chosen]) == 1),
        )
    return choices[chosen]


def _named(choices: dict[str, list[_Slice]], name: str) -> dict[str, list[_Slice]]:
    """Those of a SeriesInstanceUID (several where it has several stacks), or the one of a label."""
    of_uid = {key: stack for key, stack in choices.items() if {piece.series for piece in stack} == {name}}
    return of_uid or {key: stack for key, stack in choices.items() if series_label(key) == name}


def _listing(series: dict[str, list[_Slice]]) -> str:
    largest = sorted(series, key=lambda name: (-len(series[name]), name))
    listing = "; ".join(f"{series_label(name)}: {_described(series[name])}" for name in largest[:_MAX_LISTED])
    return listing + (f"; and {len(series) - _MAX_LISTED} more" if len(series) > _MAX_LISTED else "")


def _split(uid: str, slices: list[_Slice]) -> dict[str, list[_Slice]]:
    """The stacks of a series in enhanced files, each under a name of its own; of any other the series itself.

    Frames belong to the stack that their StackID names or, where none does and one file holds them all, that their
    orientation, matrix and pixel size make. Stacks that together make one even volume stay one.
    """
    by_id = defaultdict(list)
    for piece in slices:
        by_id[piece.stack].append(piece)
    stacks = list(by_id.values())
    if len(stacks) == 1 and len({piece.pixels.file for piece in slices}) == 1:
        stacks = _stacks(slices)
        if _mostly_one(stacks):
            return {uid: slices}
    # Frames that each have a number of their own are no stacks, nor are radial ones.
    if sum(len(stack) > 1 for stack in stacks) < 2 or _is_even(slices):
        return {uid: slices}
    return {f"{uid} stack {number:04d}": stack for number, stack in enumerate(stacks, 1)}


def _is_even(slices: list[_Slice]) -> bool:
    """Whether slices make one volume without gaps, copies and odd ones."""
    first = slices[0]
    if any(piece.position is None or piece.cosines is None or piece.spacing is None for piece in slices):
        return False
    if len(slices) < 2 or not all(piece.fits(first) for piece in slices):
        return False
    steps = np.diff(np.sort([float(piece.position @ first.normal) for piece in slices]))
    median = float(np.median(steps))
    return median > _SAME_PLACE_MM and bool(np.abs(steps - median).max() <= _step_tolerance(median))


def _joined(source: Path | str, series: dict[str, list[_Slice]], listed: bool) -> dict[str, list[_Slice]]:
    """The series, those of one slice that belong together as one. Some anonymisers give each file a series of its own.

    Files that somebody listed belong together if they fit, or if all of them, series of many slices too, make one even
    stack. Those of a folder must share study and frame of reference as well, and lie at different places.
    """
    slices = [piece for stack in series.values() for piece in stack]
    if listed and len(series) > 1 and _is_even(slices):
        logger.warning("%s: %d series in the list make one even stack; read as one volume.", source, len(series))
        return {"all that was listed": slices}
    joined = dict(series)
    for names in _alike({name: stack[0] for name, stack in series.items() if _is_one_place(stack)}, listed):
        slices = [piece for name in names for piece in series[name]]
        places = {round(float(piece.position @ slices[0].normal) / _SAME_PLACE_MM) for piece in slices}
        if len(names) < 2 or not (listed or len(places) >= max(_MIN_JOINED, len(slices) / 2)):
            continue
        logger.warning(
            "%s: %d slices of which each has a SeriesInstanceUID of its own%s; read as one series.",
            source,
            len(slices),
            "" if listed else ", in one study, frame of reference and orientation",
        )
        joined = {name: stack for name, stack in joined.items() if name not in set(names)}
        joined[f"{names[0]} and others"] = slices
    return joined


def _is_one_place(slices: list[_Slice]) -> bool:
    """Whether a series is one slice, perhaps with a copy of it."""
    first = slices[0]
    if len(slices) > _MAX_COPIES or any(piece.position is None or piece.cosines is None for piece in slices):
        return False
    return all(piece.fits(first) and np.abs(piece.position - first.position).max() < _SAME_PLACE_MM for piece in slices)


def _alike(slices: dict[str, _Slice], listed: bool) -> list[list[str]]:
    """Names of slices that could be one stack's: they fit, and, unless somebody listed them, share room and modality."""
    rooms: dict[Any, list[str]] = defaultdict(list)
    for name, piece in slices.items():
        rooms[piece.pixels.rows, piece.pixels.columns, None if listed else (piece.room, piece.modality)].append(name)
    groups = []
    for names in rooms.values():
        by_piece = {id(slices[name]): name for name in names}
        stacks = _stacks([slices[name] for name in names])
        groups += [[by_piece[id(piece)] for piece in stack] for stack in stacks]
    return groups


def _counted(left_out: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.most_common(6))


def _rank(slices: list[_Slice]) -> tuple:
    stack = max(_stacks(slices), key=len)
    axial = stack[0].cosines is not None and abs(stack[0].normal[2]) > 0.8
    return axial and len(stack) > 1, len(stack)


def _stacks(slices: list[_Slice]) -> list[list[_Slice]]:
    stacks: list[list[_Slice]] = []
    for piece in slices:
        home = next((stack for stack in stacks if piece.fits(stack[0])), None)
        if home is None:
            stacks.append([piece])
        else:
            home.append(piece)
    return stacks


def _described(slices: list[_Slice]) -> str:
    number = f"number {slices[0].series_number}, " if slices[0].series_number else ""
    first = slices[0].pixels
    return f"{number}{slices[0].modality or 'no modality'}, {len(slices)} slices of {first.columns} x {first.rows}"


def _one_plane(source: Path | str, slices: list[_Slice], notes: list[str]) -> list[_Slice]:
    """The slices that share orientation, matrix and pixel size with most others."""
    stacks = _stacks(slices)
    chosen = max(stacks, key=len)
    others = len(slices) - len(chosen)
    if not _mostly_one(stacks):
        raise CTReadError(
            f"{source}: {len(slices)} slices in {len(stacks)} orientations, matrices or pixel sizes; expected one stack. "
            f"{_remedy_for_several(slices, 'stack')}"
        )
    if others:
        notes.append(
            f"{others} of {len(slices)} slices have another orientation, matrix or pixel size and are left out"
        )
    return chosen


def _mostly_one(stacks: list[list[_Slice]]) -> bool:
    """Whether what isn't of the largest stack is so little that it can be left out."""
    count, largest = sum(map(len, stacks)), max(map(len, stacks))
    return count - largest <= max(_MAX_ODD_SLICES, _MAX_ODD_SHARE * count) and count - largest < largest


def _remedy_for_several(slices: Sequence[_Slice], what: str) -> str:
    if len({piece.pixels.file for piece in slices}) == 1:
        return f"Export one {what} alone."
    return f"Pass the files of one {what} as a list."


# ------------------------------------------------------------------------------------------------------------- geometry


def _single_slice_affine(source: Path | str, piece: _Slice) -> np.ndarray:
    """LPS affine of one slice."""
    missing = [
        name
        for name, tag in (("position", piece.position), ("orientation", piece.cosines), ("pixel size", piece.spacing))
        if tag is None
    ]
    if missing:
        logger.warning("%s: one slice without %s: taken as axial, 1 mm.", source, " and ".join(missing))
    cosines = np.array([1.0, 0, 0, 0, 1, 0]) if piece.cosines is None else piece.cosines
    row_mm, column_mm = piece.spacing or (1.0, 1.0)
    normal = np.cross(cosines[:3], cosines[3:])
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([cosines[:3] * column_mm, cosines[3:] * row_mm, normal * (piece.thickness or 1.0)])
    affine[:3, 3] = 0.0 if piece.position is None else piece.position
    return affine


def _stack(
    source: Path | str, slices: list[_Slice], notes: list[str]
) -> tuple[list[_Slice], np.ndarray, np.ndarray | None]:
    """Slices in the order of their places, the LPS affine, and where to interpolate between them (None: nowhere)."""
    if any(piece.position is None or piece.cosines is None or piece.spacing is None for piece in slices):
        raise CTReadError(
            f"{source}: slices without a readable position, orientation or pixel size (tags 0020,0032, 0020,0037 and "
            f"0028,0030); expected them in every slice. Export the series again."
        )
    slices = sorted(slices, key=lambda piece: (float(piece.position @ slices[0].normal), piece.instance))
    slices = _without_copies(source, slices, notes)
    if len(slices) == 1:
        return slices, _single_slice_affine(source, slices[0]), None
    positions = np.array([piece.position for piece in slices])
    places = positions @ slices[0].normal
    run = (positions[-1] - positions[0]) / (places[-1] - places[0])  # mm in the room for each mm along the normal
    _check_sideways(source, positions - positions[0] - np.outer(places - places[0], run))
    steps = _even_steps(source, places, notes)
    count = len(slices) if steps is None else len(steps)
    row_mm, column_mm = slices[0].spacing
    affine = np.eye(4)
    affine[:3, 0] = slices[0].cosines[:3] * column_mm
    affine[:3, 1] = slices[0].cosines[3:] * row_mm
    affine[:3, 2] = (positions[-1] - positions[0]) / (count - 1)
    affine[:3, 3] = positions[0]
    return slices, affine, steps


def _without_copies(source: Path | str, slices: list[_Slice], notes: list[str]) -> list[_Slice]:
    """Each place once. Files that hold the same picture are copies; different pictures at one place are refused."""
    places = np.array([piece.position @ slices[0].normal for piece in slices])
    fresh = np.concatenate([[True], np.diff(places) >= _SAME_PLACE_MM])
    if fresh.all():
        return slices
    # Judged by the voxels: instance UIDs are copied and invented by anonymisers.
    firsts = np.flatnonzero(fresh)[np.cumsum(fresh) - 1]  # for each slice, the first one at its place
    doubled = np.unique(np.concatenate([np.flatnonzero(~fresh), firsts[~fresh]]))
    pictures = dict(zip(doubled, _read_pixels(source, [slices[k] for k in doubled]), strict=True))
    if any(not np.array_equal(pictures[k], pictures[firsts[k]]) for k in np.flatnonzero(~fresh)):
        raise CTReadError(
            f"{source}: {len(slices)} slices at {int(fresh.sum())} positions; expected one for each. "
            f"{_time_points(slices)}{_remedy_for_several(slices, 'of them')}"
        )
    kept = [piece for piece, new in zip(slices, fresh, strict=True) if new]
    notes.append(f"{len(slices) - len(kept)} of {len(slices)} slices are copies of others and are left out")
    return kept


def _time_points(slices: list[_Slice]) -> str:
    """Which tag tells the passes over one place apart, and how many slices each has."""
    for keyword in dict.fromkeys(name for piece in slices for name, _ in piece.time_point):
        counts = Counter(dict(piece.time_point).get(keyword, "none") for piece in slices)
        if 1 < len(counts) <= len(slices) // 2:
            # When a patient was scanned is nobody's business.
            names = [f"no. {k}" if "Time" in keyword else value[:24] for k, value in enumerate(sorted(counts), 1)]
            sizes = [counts[value] for value in sorted(counts)]
            passes = ", ".join(f"{name} ({size} slices)" for name, size in list(zip(names, sizes, strict=True))[:6])
            return f"They differ in {keyword}: {passes}: time points or reconstructions. "
    return "They are time points, reconstructions or overlapping passes. "


def _check_sideways(source: Path | str, offsets: np.ndarray) -> None:
    largest = float(np.linalg.norm(offsets, axis=1).max())
    if largest > _MAX_SIDEWAYS_MM:
        raise CTReadError(
            f"{source}: slices stand up to {largest:.1f} mm beside one straight line; expected at most "
            f"{_MAX_SIDEWAYS_MM:g} mm. They were cut out differently: pass the files of one stack as a list."
        )


def _even_steps(source: Path | str, places: np.ndarray, notes: list[str]) -> np.ndarray | None:
    """Where the slices of an even stack lie among those there are, as fractional indices; None if they are even.

    `places`: mm along the normal, rising.
    """
    steps = np.diff(places)
    median = float(np.sort(steps)[(len(steps) - 1) // 2])  # the finer one of two
    tolerance = _step_tolerance(median)
    uneven = np.abs(steps - median) > tolerance
    drift = np.abs(places - np.linspace(places[0], places[-1], len(places))).max()
    if not uneven.any() and drift <= max(0.5 * median, tolerance):
        return None
    limit = min(max(MAX_GAP_STEPS * median, _MIN_GAP_LIMIT), _MAX_GAP_LIMIT)
    widest = int(steps.argmax())
    if steps[widest] > max(limit, median + tolerance):
        raise CTReadError(
            f"{source}: uneven distances between slices: {steps[widest]:.2f} mm after slice {widest + 1}, "
            f"{median:.2f} mm elsewhere ({int(uneven.sum())} such gaps; up to {limit:.1f} mm would be filled). "
            f"Slices are missing: export the series again."
        )
    count = max(round((places[-1] - places[0]) / median), 1) + 1
    if count > 10 * len(places):
        raise CTReadError(
            f"{source}: distances between slices from {steps.min():.2f} to {steps.max():.2f} mm; expected even ones. "
            f"Export the series again."
        )
    even = np.linspace(places[0], places[-1], count)
    indices = np.interp(even, places, np.arange(len(places)))
    filled = float(steps[uneven].sum() if uneven.any() else places[-1] - places[0])
    notes.append(
        f"uneven distances between slices, {steps.min():.2f} to {steps.max():.2f} mm (median {median:.2f}): interpolated "
        f"onto {count} slices {even[1] - even[0]:.2f} mm apart; {filled:.1f} of {places[-1] - places[0]:.1f} mm lie in "
        f"{int(uneven.sum())} odd gaps"
    )
    return indices


def _step_tolerance(median: float) -> float:
    """By how many mm distances between slices may differ."""
    return max(_STEP_TOLERANCE * median, _STEP_TOLERANCE_MM)


def _check_size(source: Path | str, slices: Sequence[_Slice], steps: np.ndarray | None) -> None:
    """Refuses what would not fit in memory: the slices, and those that they are interpolated onto."""
    count = len(slices) + (0 if steps is None else len(steps))
    voxels = count * slices[0].pixels.rows * slices[0].pixels.columns
    if voxels > MAX_VOXELS:
        raise CTReadError(f"{source}: {voxels} voxels; expected at most {MAX_VOXELS}. Crop or coarsen the scan.")


def _interpolate(hu: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """hu (slices, rows, columns) at fractional slice indices, linearly."""
    out = np.empty((len(indices), *hu.shape[1:]), dtype=np.int16)
    for target, place in zip(out, indices, strict=True):
        below = min(int(place), len(hu) - 1)
        share = place - below
        if share < 1e-3 or below + 1 == len(hu):
            target[...] = hu[below]
        elif share > 1 - 1e-3:
            target[...] = hu[below + 1]
        else:
            mixed = hu[below] * np.float32(1 - share) + hu[below + 1] * np.float32(share)
            target[...] = np.rint(mixed)
    return out


# --------------------------------------------------------------------------------------------------------------- voxels


def _read_pixels(source: Path | str, slices: Sequence[_Slice]) -> np.ndarray:
    """int16 HU (slices, rows, columns): each slice with its own slope and intercept, padding as air."""
    _check_size(source, slices, None)
    first = slices[0].pixels
    hu, padded = None, 0
    with Frames([(piece.pixels, piece.frame) for piece in slices]) as frames:
        for i, piece in enumerate(slices):
            stored = frames[i]
            if hu is None:  # the first slice was there: only now is the memory taken
                hu = np.empty((len(slices), first.rows, first.columns), dtype=np.int16)
            _slice_to_hu(stored, piece, hu[i])
            if piece.padding is not None:
                outside = (stored >= piece.padding[0]) & (stored <= piece.padding[1])
                hu[i][outside] = AIR_HU
                padded += int(outside.sum())
    if padded:
        logger.info("%s: %d voxels hold the padding value; read as air (%d HU)", source, padded, AIR_HU)
    return hu


def _slice_to_hu(stored: np.ndarray, piece: _Slice, out: np.ndarray) -> None:
    if piece.slope == 1 and piece.intercept == int(piece.intercept) and abs(piece.intercept) < 1 << 30:
        limits = np.iinfo(np.int16)
        wide = stored.astype(np.int64 if stored.dtype.itemsize > 2 else np.int32)
        np.clip(wide + int(piece.intercept), limits.min, limits.max, out=wide)
        out[...] = wide
    else:
        scale_to_hu(stored, piece.slope, piece.intercept, out)
