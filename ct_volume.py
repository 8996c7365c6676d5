"""One CT volume from a file or a folder: Hounsfield units, spacing and canonical orientation.

`read_ct` takes NIfTI-1/2 (`.nii`, `.nii.gz`), a folder of DICOM slices or one slice, NRRD and MetaImage (`.mha`,
`.mhd`). Formats are told apart by their first bytes, never by their suffix. Whatever the file's own axes, the result is
RAS+: the first index grows from the patient's left to the right, the second from back to front, the third from foot to
head.
"""

import gzip
import logging
import math
import os
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

try:
    import nibabel as nib
    from nibabel.spatialimages import HeaderDataError
except ImportError:
    nib = None
    HeaderDataError = ValueError

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None

try:  # two to three times faster than zlib; not needed
    from isal import igzip
    from isal.isal_zlib import IsalError
except ImportError:
    igzip = None
    IsalError = zlib.error

logger = logging.getLogger(__name__)

AIR_HU = -1024  # what stands outside a scanner's field of view, and what we put where there is no value
_GZIP_ERRORS = (EOFError, OSError, zlib.error, IsalError)
_GZIP_MAX_RATIO = 1032  # deflate cannot compress more tightly, so a header that claims more lies
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAX_TILT_DEGREES = 0.5
_MAX_GAP_DEVIATION = 0.1  # share of the median distance between slices


class CTReadError(ValueError):
    """A file or folder that cannot be read as one CT volume. The message names it, what was found, and the remedy."""


@dataclass(frozen=True)
class CTVolume:
    """One CT volume in canonical orientation.

    Attributes:
        hu: int16 array (X, Y, Z) of Hounsfield units in RAS+ order. May be a read-only view of the file (memory map).
        spacing: voxel size in mm along X, Y, Z.
        affine: float64 (4, 4), voxel index → RAS+ millimetres. For oblique scans its axes are not the patient's.
        source: where it came from.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    source: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.hu.shape


def read_ct(
    path: str | os.PathLike, *, rescale: tuple[float, float] | None = None, allow_non_ct: bool = False
) -> CTVolume:
    """Reads one CT volume.

    Args:
        path: NIfTI, NRRD or MetaImage file, one DICOM slice, or a folder of DICOM slices (its largest CT series).
        rescale: (slope, intercept) for a file that holds raw stored values under a header that says nothing, as in
            CT-RATE's first release. Never for values that are HU already.
        allow_non_ct: take a DICOM series whose modality isn't CT.

    Returns:
        CTVolume in RAS+ order, HU in int16 (saturated). NaN and infinite voxels are air (-1024). Oblique scans keep
        their own axes, each named after the nearest patient axis; nothing is resampled.

    Raises:
        CTReadError: the path holds no single CT volume; says what was found, what was expected and what to do.
    """
    path = Path(path)
    if path.is_dir():
        return _read_dicom_folder(path, rescale, allow_non_ct)
    if not path.is_file():
        raise CTReadError(f"{path}: no such file or folder. Check the path; a relative one starts at {Path.cwd()}.")
    kind = _sniff(path)
    if kind == "dicom":
        return _read_dicom_files(path, [str(path)], rescale, allow_non_ct)
    if kind in ("nifti", "nifti.gz"):
        return _read_nifti(path, kind == "nifti.gz", rescale)
    return _read_itk_file(path, kind, rescale)


def to_ct_volume(image: Any) -> CTVolume:
    """CTVolume from what people hold in memory, or a path.

    Args:
        image: a CTVolume (returned as it is), a path, a nibabel or SimpleITK image, or an array or tensor (X, Y, Z) of
            HU, taken as RAS+ with voxels of 1 mm.

    Raises:
        CTReadError: not one 3-D volume.
        TypeError: none of these.
    """
    if isinstance(image, CTVolume):
        return image
    if isinstance(image, (str, os.PathLike)):
        return read_ct(image)
    if nib is not None and isinstance(image, nib.spatialimages.SpatialImage):
        array, slope, intercept = _nibabel_stored(image)
        affines = [] if image.affine is None else [image.affine]
        affine = _usable_affine(affines, None, array.shape, "nibabel image")
        return _build(array, slope, intercept, affine, "nibabel image", None)
    if sitk is not None and isinstance(image, sitk.Image):
        return _from_itk(image, "SimpleITK image", None)
    if hasattr(image, "detach"):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        return _build(image, 1.0, 0.0, np.eye(4), f"array of shape {image.shape}", None)
    raise TypeError(
        f"a volume is a path, a CTVolume, an array (X, Y, Z) in HU, a nibabel or a SimpleITK image; got {type(image)}"
    )


# ------------------------------------------------------------------------------------------------ telling formats apart


def _sniff(path: Path) -> str:
    """nifti | nifti.gz | dicom | NrrdImageIO | MetaImageIO, from the first bytes."""
    with open(path, "rb") as stream:
        head = stream.read(352)
    if head[:2] == b"\x1f\x8b":
        return "nifti.gz"  # what is inside is checked where it is unpacked
    if _nifti_header_size(head) is not None:
        return "nifti"
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith(b"NRRD"):
        return "NrrdImageIO"
    if b"NDims" in head:
        return "MetaImageIO"
    what = "an empty file" if not head else f"a file that starts with {head[:12]!r}"
    raise CTReadError(
        f"{path}: found {what}; expected NIfTI, NRRD, MetaImage or DICOM. "
        f"Convert the scan to one of them, e.g. with dcm2niix, or fetch the file anew if it was one."
    )


def _nifti_header_size(head: bytes) -> int | None:
    """348 (NIfTI-1) or 540 (NIfTI-2) as the header's first number in either byte order, else None."""
    if len(head) < 4:
        return None
    return next((n for order in "<>" for n in struct.unpack(f"{order}i", head[:4]) if n in (348, 540)), None)


# ---------------------------------------------------------------------------------------------------------------- NIfTI


def _read_nifti(path: Path, compressed: bool, rescale: tuple[float, float] | None) -> CTVolume:
    if nib is None:
        raise CTReadError(f"{path}: reading NIfTI needs nibabel: pip install nibabel")
    try:
        with _open_binary(path, compressed) as stream:
            header, position = _nifti_header(path, stream)
            array = _nifti_array(path, stream, header, position, compressed)
    except _GZIP_ERRORS as error:
        raise CTReadError(
            f"{path}: the file ends early or its bytes are damaged ({error}). Fetch or write it anew."
        ) from error
    slope, intercept = _nifti_scaling(path, header)
    affines = [form for form in (_nifti_form(header, "sform"), _nifti_form(header, "qform")) if form is not None]
    affine = _usable_affine(affines, header, array.shape, str(path))
    return _build(array, slope, intercept, affine, str(path), rescale)


def _open_binary(path: Path, compressed: bool) -> BinaryIO:
    if not compressed:
        return open(path, "rb")
    return igzip.open(path, "rb") if igzip is not None else gzip.open(path, "rb")


def _nifti_header(path: Path, stream: BinaryIO) -> tuple[Any, int]:
    """nibabel's header and how many bytes of the stream it took."""
    block = stream.read(348)
    size = _nifti_header_size(block)
    if size is None or len(block) < 348:
        raise CTReadError(
            f"{path}: found {'compressed ' if path.suffix == '.gz' else ''}bytes that start with {block[:12]!r}; "
            f"expected a NIfTI header. Convert the scan to NIfTI, e.g. with dcm2niix."
        )
    block += stream.read(size - 348)
    magic = block[344:348] if size == 348 else block[4:8]
    if magic not in (b"n+1\0", b"n+2\0"):
        pair = magic in (b"ni1\0", b"ni2\0")
        found = "half of a .hdr/.img pair" if pair else "an Analyze 7.5 header, which has no orientation"
        raise CTReadError(
            f"{path}: found {found}; "
            f"expected NIfTI in one file. Convert it, e.g. nibabel.save(nibabel.load(path), 'scan.nii.gz')."
        )
    header_class = nib.Nifti1Header if size == 348 else nib.Nifti2Header
    try:
        return header_class(block, check=False), size
    except (HeaderDataError, ValueError) as error:
        raise CTReadError(f"{path}: damaged NIfTI header ({error}). Fetch or write it anew.") from error


def _nifti_array(path: Path, stream: BinaryIO, header: Any, position: int, compressed: bool) -> np.ndarray:
    """The stored values (X, Y, Z), a memory map where the file isn't compressed."""
    shape, dtype = _nifti_layout(path, header)
    offset = float(header["vox_offset"])
    offset = position + 4 if offset == 0 else offset
    expected = math.prod(shape) * dtype.itemsize
    limit = path.stat().st_size * (_GZIP_MAX_RATIO if compressed else 1)
    if not (position <= offset and offset + expected <= limit):
        raise CTReadError(
            f"{path}: its header tells of {expected} bytes of voxels from byte {offset:.0f} on, shape {shape}; "
            f"the file holds {path.stat().st_size} bytes. It was cut short: fetch or write it anew."
        )
    offset = int(offset)
    if not compressed:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F")
    stream.read(offset - position)
    buffer = np.empty(expected, dtype=np.uint8)
    _read_exactly(path, stream, memoryview(buffer))
    while stream.read(1 << 20):  # gzip's checksum is only compared at the stream's end
        pass
    return buffer.view(dtype).reshape(shape, order="F")


def _nifti_layout(path: Path, header: Any) -> tuple[tuple[int, int, int], np.dtype]:
    try:
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
    except (HeaderDataError, ValueError, KeyError) as error:
        raise CTReadError(f"{path}: damaged NIfTI header ({error}). Fetch or write it anew.") from error
    shape = tuple(int(n) for n in shape)
    _check_dtype(dtype, str(path))
    return _volume_shape(shape, str(path)), dtype


def _read_exactly(path: Path, stream: BinaryIO, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = stream.readinto(target[done : done + (1 << 24)])
        if not count:
            raise CTReadError(
                f"{path}: ends after {done} of {len(target)} bytes of voxels. It was cut short: fetch or write it anew."
            )
        done += count


def _nifti_scaling(path: Path, header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):  # the standard's "no scaling"
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise CTReadError(
            f"{path}: the header has slope {slope} and intercept {intercept}. Mend the header, "
            f"e.g. image.header.set_slope_inter(1, 0) in nibabel if the stored values are HU."
        )
    return slope, intercept


def _nifti_form(header: Any, form: str) -> np.ndarray | None:
    """The header's sform or qform, None where its code says that it has none."""
    if header[f"{form}_code"] <= 0:
        return None
    try:
        return header.get_sform() if form == "sform" else header.get_qform()
    except (HeaderDataError, ValueError, np.linalg.LinAlgError):
        return np.full((4, 4), np.nan)


def _nibabel_stored(image: Any) -> tuple[np.ndarray, float, float]:
    """A nibabel image's values before scaling, slope and intercept: get_fdata would make a float64 volume."""
    proxy = image.dataobj
    if hasattr(proxy, "get_unscaled"):
        return np.asanyarray(proxy.get_unscaled()), float(proxy.slope), float(proxy.inter)
    return np.asanyarray(proxy), 1.0, 0.0


# ------------------------------------------------------------------------------------------- NRRD, MetaImage, SimpleITK


def _read_itk_file(path: Path, image_io: str, rescale: tuple[float, float] | None) -> CTVolume:
    _need_itk(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(image_io)
    try:
        with _quiet_itk():
            image = reader.Execute()
    except RuntimeError as error:
        raise CTReadError(
            f"{path}: damaged or incomplete {image_io.removesuffix('ImageIO')} file ({_last_line(error)}). "
            f"Fetch or write it anew; a header with a separate data file needs that file beside it."
        ) from error
    return _from_itk(image, str(path), rescale)


def _from_itk(image: Any, source: str, rescale: tuple[float, float] | None) -> CTVolume:
    """SimpleITK counts in LPS and its arrays run z, y, x: both are turned round here."""
    components = image.GetNumberOfComponentsPerPixel()
    if components > 1:
        raise CTReadError(
            f"{source}: found {components} values a voxel (colour, vectors or several volumes in one file); "
            f"expected one HU value. Save a single volume."
        )
    dimension = image.GetDimension()
    shape = _volume_shape(image.GetSize(), source)
    array = _itk_array(image).T.reshape(shape, order="F")
    direction = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    affine = _usable_affine([_LPS_TO_RAS @ affine], None, shape, source)
    return _build(array, 1.0, 0.0, affine, source, rescale)


def _itk_array(image: Any) -> np.ndarray:
    """A view of the image's own buffer that keeps the image alive, as SimpleITK's own view does not."""
    view = sitk.GetArrayViewFromImage(image)

    class Owner:
        __array_interface__ = view.__array_interface__
        owned = image

    return np.asarray(Owner())


@contextmanager
def _quiet_itk():
    """Without ITK's warnings on stderr: what matters of them is checked and said here."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def _need_itk(path: Path) -> None:
    if sitk is None:
        raise CTReadError(f"{path}: reading DICOM, NRRD and MetaImage needs SimpleITK: pip install SimpleITK")


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


# ---------------------------------------------------------------------------------------------------------------- DICOM


def _read_dicom_folder(folder: Path, rescale: tuple[float, float] | None, allow_non_ct: bool) -> CTVolume:
    _need_itk(folder)
    entries = sorted(folder.iterdir())
    if not entries:
        raise CTReadError(f"{folder}: an empty folder; expected the DICOM slices of one CT series.")
    with _quiet_itk():
        names = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        series = [sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), name) for name in names]
    series = [list(files) for files in series if files]
    if not series:
        inside = Counter("folders" if entry.is_dir() else f"{entry.suffix or 'suffixless'} files" for entry in entries)
        found = ", ".join(f"{count} {kind}" for kind, count in inside.most_common(4))
        raise CTReadError(
            f"{folder}: a folder without DICOM slices (found {found}); expected the slices of one CT series. "
            f"Name the folder that holds them, or the volume file itself."
        )
    return _read_dicom_files(folder, _choose_series(folder, series, allow_non_ct), rescale, allow_non_ct)


def _choose_series(folder: Path, series: list[list[str]], allow_non_ct: bool) -> list[str]:
    """The files of the largest series that may be read; the others are counted in the log."""
    reasons = [_unfit(files[0], allow_non_ct) for files in series]
    fit = [files for files, reason in zip(series, reasons, strict=True) if reason is None]
    if not fit:
        found = "; ".join(f"{len(files)} files: {reason}" for files, reason in zip(series, reasons, strict=True))
        raise CTReadError(f"{folder}: no CT series here ({found}). {_NON_CT_REMEDY}")
    chosen = max(fit, key=len)
    if len(series) > 1:
        logger.info("%s: reads the largest of %d series (%d files)", folder, len(series), len(chosen))
    return chosen


_NON_CT_REMEDY = "Expected one greyscale value a voxel and modality CT; allow_non_ct=True takes other modalities."


def _unfit(file: str, allow_non_ct: bool) -> str | None:
    """Why this DICOM file is no slice of a CT volume, or None. Reads the header only, and no patient data from it."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.SetImageIO("GDCMImageIO")
    try:
        with _quiet_itk():
            reader.ReadImageInformation()
    except RuntimeError as error:
        return f"not readable as a picture ({_last_line(error)})"
    modality = _tag(reader, "0008|0060")
    if reader.GetNumberOfComponents() > 1:
        return f"colour pictures ({_tag(reader, '0028|0004')})"
    if modality != "CT" and not allow_non_ct:
        return f"modality {modality or 'not given'}"
    if len(reader.GetSize()) > 2 and reader.GetSize()[2] > 1:
        return f"{reader.GetSize()[2]} frames in one file (convert with dcm2niix)"
    return None


def _tag(reader: Any, key: str) -> str:
    return reader.GetMetaData(key).strip() if reader.HasMetaDataKey(key) else ""


def _read_dicom_files(
    source: Path, files: Sequence[str], rescale: tuple[float, float] | None, allow_non_ct: bool
) -> CTVolume:
    """One series, sorted by position. GDCM applies each slice's own slope and intercept."""
    _need_itk(source)
    if rescale is not None:
        raise CTReadError(f"{source}: DICOM slices carry their own slope and intercept; leave rescale out.")
    reason = _unfit(files[0], allow_non_ct)
    if reason is not None:
        raise CTReadError(f"{source}: {reason}. {_NON_CT_REMEDY}")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.SetImageIO("GDCMImageIO")
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        with _quiet_itk():
            image = reader.Execute()
    except RuntimeError as error:
        raise CTReadError(
            f"{source}: the {len(files)} slices of this series do not make one volume ({_last_line(error)}). "
            f"Put the slices of one series, all of one size, in a folder of their own."
        ) from error
    if len(files) > 1:
        _set_stack_geometry(source, reader, image, len(files))
    return _from_itk(image, str(source), None)


def _set_stack_geometry(source: Path, reader: Any, image: Any, count: int) -> None:
    """Writes the third axis into `image`, once the slices are known to stand evenly in one straight stack."""
    try:
        positions = np.array([_numbers(reader, i, "0020|0032", 3) for i in range(count)])
        cosines = _numbers(reader, 0, "0020|0037", 6)
    except (RuntimeError, ValueError) as error:
        raise CTReadError(
            f"{source}: slices without a readable position or orientation (tags 0020,0032 and 0020,0037); "
            f"expected both in every slice. Export the series again."
        ) from error
    rows, columns = cosines[:3], cosines[3:]
    normal = np.cross(rows, columns)
    steps = np.diff(positions @ normal)
    _check_steps(source, steps)
    run = positions[-1] - positions[0]
    tilt = math.degrees(math.acos(min(1.0, abs(run @ normal) / (np.linalg.norm(run) * np.linalg.norm(normal)))))
    if tilt > _MAX_TILT_DEGREES:
        raise CTReadError(
            f"{source}: tilted gantry: slices are sheared by {tilt:.1f}° against their stacking direction. "
            f"Resample the series first, e.g. with dcm2niix, which corrects the tilt."
        )
    step = float(steps.mean())
    image.SetSpacing((*image.GetSpacing()[:2], abs(step)))
    image.SetDirection(np.column_stack([rows, columns, normal * np.sign(step)]).ravel().tolist())
    image.SetOrigin(positions[0].tolist())


def _numbers(reader: Any, slice_index: int, key: str, count: int) -> np.ndarray:
    numbers = np.array([float(value) for value in reader.GetMetaData(slice_index, key).split("\\")])
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError(f"tag {key} holds {numbers.size} numbers")
    return numbers


def _check_steps(source: Path, steps: np.ndarray) -> None:
    """Refuses doubled positions and uneven distances. `steps`: mm from each slice to the next along the normal."""
    median = float(np.median(steps))
    doubled = np.count_nonzero(np.abs(steps) < 1e-3)
    if doubled:
        raise CTReadError(
            f"{source}: {len(steps) + 1} slices at {len(steps) + 1 - doubled} positions; expected one for each. "
            f"Split time points or reconstructions into folders of their own."
        )
    uneven = np.flatnonzero(np.abs(steps - median) > _MAX_GAP_DEVIATION * abs(median))
    if uneven.size:
        raise CTReadError(
            f"{source}: uneven distances between slices: {steps[uneven[0]]:.2f} mm after slice {uneven[0] + 1}, "
            f"{median:.2f} mm elsewhere ({uneven.size} such gaps). Slices are missing: export the series again."
        )


# ----------------------------------------------------------------------------------------------- what all formats share


def _volume_shape(shape: Sequence[int], source: str) -> tuple[int, int, int]:
    """`shape` without trailing ones, when it is three-dimensional and not empty."""
    kept = list(shape)
    while len(kept) > 3 and kept[-1] == 1:
        kept.pop()
    if len(kept) != 3:
        remedy = (
            "Save one time point, e.g. nibabel.funcs.four_to_three(image)[0]."
            if len(kept) > 3
            else "Save all slices as one volume."
        )
        raise CTReadError(
            f"{source}: {len(kept)}-D image of shape {tuple(shape)}; one CT volume has 3 dimensions. {remedy}"
        )
    if min(kept) < 1:
        raise CTReadError(f"{source}: empty image of shape {tuple(shape)}; expected voxels along every axis.")
    return tuple(kept)


def _check_dtype(dtype: np.dtype, source: str) -> None:
    if dtype.fields is not None:
        raise CTReadError(f"{source}: a colour (RGB) image is not CT; expected one HU value a voxel.")
    if dtype.kind not in "iufb":
        raise CTReadError(f"{source}: voxels of type {dtype}; expected integer or real HU values. Save the real part.")


def _usable_affine(candidates: list[np.ndarray], header: Any, shape: Sequence[int], source: str) -> np.ndarray:
    """The first affine that maps voxels to a real volume; failing that, one made of the header's voxel sizes.

    The makeshift follows nibabel for headers without a transform: axes run left, front, head, the centre is the origin.
    """
    for affine in candidates:
        affine = np.asarray(affine, dtype=np.float64)
        if _is_regular(affine):
            return affine
    zooms = np.ones(3)
    if header is not None:
        found = np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
        zooms = np.where(np.isfinite(found) & (found > 1e-6), found, 1.0)
    logger.warning(
        "%s: %s; assumes voxels of %s mm with axes running left, front, head. Check the pictures' sides.",
        source,
        "its affine is NaN or singular" if candidates else "its header has no orientation",
        " x ".join(f"{zoom:g}" for zoom in zooms),
    )
    affine = np.diag([-zooms[0], zooms[1], zooms[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape[:3]) - 1) / 2)
    return affine


def _is_regular(affine: np.ndarray) -> bool:
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        return False
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(norms.min() > 1e-6 and abs(np.linalg.det(affine[:3, :3] / norms)) > 1e-3)


def _build(
    stored: np.ndarray,
    slope: float,
    intercept: float,
    affine: np.ndarray,
    source: str,
    rescale: tuple[float, float] | None,
) -> CTVolume:
    """CTVolume from stored values and what the header says of them."""
    if rescale is not None:
        if (slope, intercept) != (1.0, 0.0):
            raise CTReadError(
                f"{source}: its header holds slope {slope:g} and intercept {intercept:g}, so rescale={rescale} would "
                f"rescale twice. Leave rescale out."
            )
        slope, intercept = (float(value) for value in rescale)
        if not (math.isfinite(slope) and math.isfinite(intercept) and slope != 0):
            raise CTReadError(f"{source}: rescale={rescale}; expected two finite numbers, the slope not zero.")
        logger.info("%s: HU = stored value * %g + %g, as the caller says", source, slope, intercept)
    _check_dtype(stored.dtype, source)
    stored = stored.reshape(_volume_shape(stored.shape, source), order="A")
    hu, affine = _canonical(_to_hu(stored, slope, intercept, source), affine)
    spacing = tuple(float(norm) for norm in np.linalg.norm(affine[:3, :3], axis=0))
    return CTVolume(hu=hu, spacing=spacing, affine=affine, source=source)


def _to_hu(stored: np.ndarray, slope: float, intercept: float, source: str) -> np.ndarray:
    """int16 HU, saturated. Native int16 without scaling stays what it is, a memory map included."""
    plain = (slope, intercept) == (1.0, 0.0)
    if plain and stored.dtype == np.int16:
        return stored
    if plain and stored.dtype.kind in "iub" and np.can_cast(stored.dtype, np.int16):
        return stored.astype(np.int16)
    limits = np.iinfo(np.int16)
    hu = np.empty_like(stored, dtype=np.int16, subok=False)
    not_finite = 0
    # Float64 keeps every 32-bit value exact, and one plane at a time keeps it small.
    axis = int(np.argmax(np.abs(stored.strides)))
    for source_plane, target_plane in zip(np.moveaxis(stored, axis, 0), np.moveaxis(hu, axis, 0), strict=True):
        values = source_plane.astype(np.float64)
        bad = ~np.isfinite(values) if stored.dtype.kind == "f" else None
        if not plain:
            values = values * slope + intercept
        if bad is not None and bad.any():
            values[bad] = AIR_HU
            not_finite += int(bad.sum())
        target_plane[...] = np.clip(np.rint(values), limits.min, limits.max)
    if not_finite:
        logger.warning("%s: %d voxels are NaN or infinite; read as air (%d HU)", source, not_finite, AIR_HU)
    return hu


def _canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`array` as a RAS+ view, by the nearest axis permutation and flips, and the affine that fits it."""
    axes, signs = _nearest_axes(affine)
    transform = np.zeros((4, 4))
    transform[3, 3] = 1
    for axis, (stored_axis, sign) in enumerate(zip(axes, signs, strict=True)):
        transform[stored_axis, axis] = sign
        if sign < 0:
            transform[stored_axis, 3] = array.shape[stored_axis] - 1
    array = array.transpose(axes)
    array = array[tuple(slice(None, None, sign) for sign in signs)]
    return array, affine @ transform + 0.0  # + 0.0 turns -0.0 into 0.0


def _nearest_axes(affine: np.ndarray) -> tuple[list[int], list[int]]:
    """For R, A and S: which stored axis runs nearest to it, and its sign.

    Of the six ways to assign axes, the one with the largest sum of squared cosines.
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    axes = max(orders, key=lambda order: sum(cosines[row, column] ** 2 for row, column in enumerate(order)))
    return list(axes), [1 if cosines[row, column] > 0 else -1 for row, column in enumerate(axes)]
