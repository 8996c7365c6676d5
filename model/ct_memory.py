"""Volumes that are no files on this machine: images of other libraries, open files, pydicom datasets, rows of data sets.

An image that carries its geometry keeps it: its affine counts in the coordinates that its library counts in. One that
carries an affine of unknown coordinates is refused, for a guess would swap the patient's sides. Libraries are told by the
names of their classes, so that none of them need be installed, or imported, for this.
"""

import inspect
import io
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .ct_dicom import TAGS
from .ct_dicom_pixels import NATIVE, pydicom, quiet_pydicom
from .ct_download import file_path, is_address, shown
from .ct_formats import (
    DEFLATE_MAX_RATIO,
    LPS_TO_RAS,
    CTReadError,
    StoredVolume,
    check_dtype,
    is_disk_error,
    nifti_affines,
    nifti_zooms,
    squeezed_shape,
)

try:
    import nibabel as nib
except ImportError:
    nib = None

try:
    import SimpleITK as sitk
except ImportError:
    sitk = None

_MAX_BYTES = 4 << 30  # of an open file: the largest CT there is
_CHUNK = 1 << 20
_IMPLICIT, _EXPLICIT, _BIG_ENDIAN = NATIVE  # transfer syntaxes
_CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
_PIXEL_DATA = (0x7FE0, 0x0010)
_WRITE_ERRORS = (AttributeError, KeyError, NotImplementedError, TypeError, ValueError)
_TAKEN = (
    "a path or an address, a list of DICOM files or pydicom datasets, an open file, a CTVolume, an array (X, Y, Z) "
    "in HU, or an image of nibabel, SimpleITK, MONAI, TorchIO or highdicom"
)
# What is no volume itself, but holds one: package, class, what to do.
_REMEDIES = (
    ("datasets", "Column", "A column is many volumes: pass one of them, column[0], or all as a list, column[:]"),
    ("datasets", "Dataset", 'A data set is many rows: pass the volume of one, such as dataset[0]["nifti"]'),
    ("datasets", "IterableDataset", "A data set is many rows: pass the volume of one"),
    ("torchio", "Subject", 'A subject holds images: pass one of them, such as subject["ct"]'),
    ("builtins", "bytes", "If these are a file's content, pass io.BytesIO(content)"),
    ("itk", "Image", "Write it with itk.imwrite(image, 'scan.nii.gz') and pass the path"),
    ("ants", "ANTsImage", "Pass image.to_nibabel()"),
)


def is_kind(image: Any, package: str, name: str) -> bool:
    """Whether an object is of this class of a package, or of one made from it."""
    return any(kind.__name__ == name and kind.__module__.partition(".")[0] == package for kind in type(image).__mro__)


def is_dataset(image: Any) -> bool:
    """Whether it is a pydicom dataset: one DICOM file in memory."""
    return is_kind(image, "pydicom", "Dataset")


def is_row(image: Any) -> bool:
    """Whether it is a file as `datasets` keeps one undecoded: {"bytes": …, "path": …}."""
    return (
        isinstance(image, Mapping) and 0 < len(image) <= 2 and set(image) <= {"bytes", "path"} and not is_image(image)
    )


def is_image(image: Any) -> bool:
    """Whether it is an image of a library that looks like a mapping, as TorchIO's do."""
    return is_kind(image, "torchio", "Image")


def _is_stream(image: Any) -> bool:
    return callable(getattr(image, "read", None)) and (hasattr(image, "seek") or hasattr(image, "readable"))


def is_file(image: Any) -> bool:
    """Whether `local_files` takes it: a path, an open file, a row, a pydicom dataset, or a list of them (no rows).

    Bytes alone are none: they could be a path, as elsewhere in Python.
    """
    if isinstance(image, (list, tuple)):
        return all(isinstance(file, (str, os.PathLike)) or is_dataset(file) or _is_stream(file) for file in image)
    return isinstance(image, (str, os.PathLike)) or is_row(image) or is_dataset(image) or _is_stream(image)


# ---------------------------------------------------------------------------------------------- files that are not on disk


def source_of(image: Any) -> str:
    """What messages call what `is_file` knows."""
    if isinstance(image, (list, tuple)):
        kind = "datasets" if image and is_dataset(image[0]) else "files"
        return f"{source_of(image[0])} and {len(image) - 1} more {kind}" if image else "an empty list of files"
    if is_row(image):
        return source_of(image["path"]) if image.get("path") else "bytes in memory"
    if is_dataset(image):
        return "a pydicom dataset"
    if isinstance(image, io.BytesIO):
        return "bytes in memory"
    if _is_stream(image):
        name = getattr(image, "name", None)
        return name if isinstance(name, str) and name else "an open file"
    return shown(image) if is_address(image) else str(image)


@contextmanager
def local_files(image: Any) -> Iterator[tuple[Any, bool]]:
    """What `is_file` knows as paths, and whether they are there within the block alone.

    The whole of an open file is read, wherever its position is, and the position put back; one that can't seek is read to
    its end. It is neither closed nor changed.

    Raises:
        CTReadError: closed, opened as text, or empty; says what to do.
    """
    image = _unwrapped(image)
    if isinstance(image, (str, os.PathLike)):
        yield image, False
        return
    many = isinstance(image, (list, tuple))
    if many and all(isinstance(file, (str, os.PathLike)) for file in image):
        yield image, False
        return
    if not many and (own := _own_path(image)) is not None:
        yield own, False
        return
    with tempfile.TemporaryDirectory(prefix="samf-") as folder:
        names: dict[str, str] = {}
        try:
            paths = []
            for number, file in enumerate(image if many else [image]):
                paths.append(_on_disk(file, Path(folder, f"{number:06d}")))
                names[str(paths[-1])] = source_of(file)
            yield paths if many else paths[0], True
        except CTReadError as error:
            words = str(error)
            for path, name in names.items():  # nobody knows the path of a file that is gone
                words = words.replace(path, name)
            raise type(error)(words) from error


def _unwrapped(image: Any) -> Any:
    """A row's bytes if it has them, else its path, which then is the file's; file:// addresses of a list as paths."""
    if isinstance(image, (list, tuple)):
        return [file_path(file) for file in image]
    if not is_row(image):
        return image
    content = image.get("bytes")
    if content is not None:
        return content
    if not image.get("path"):
        raise CTReadError("a row without bytes and without a path; expected one of them. Fill it in, or leave it out.")
    return file_path(image["path"])


def _own_path(stream: Any) -> str | None:
    """The path of a file that is open for reading, if it is still the file of that name: it can be mapped."""
    if not isinstance(stream, (io.BufferedReader, io.FileIO)) or stream.closed or not isinstance(stream.name, str):
        return None
    try:
        path = os.path.abspath(stream.name)
        same = stream.readable() and os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
        return path if same and os.path.isfile(path) else None
    except (OSError, ValueError):
        return None


def _on_disk(image: Any, path: Path) -> Path:
    """Writes the content of an open file, bytes or a dataset to `path`; a path stays what it is."""
    if isinstance(image, (str, os.PathLike)):
        return Path(image)
    if is_dataset(image):
        _write_dataset(image, path)
        return path
    with open(path, "wb") as out:
        if _is_stream(image):
            _copy_stream(image, out)
        else:
            out.write(image)
    return path


def _copy_stream(stream: Any, out: Any) -> None:
    source = source_of(stream)
    if isinstance(stream, io.TextIOBase):
        raise CTReadError(f"{source}: open as text; expected bytes. Open it with mode 'rb'.")
    if getattr(stream, "closed", False) is True:
        raise CTReadError(f"{source}: this file is closed. Open it again, or pass its path.")
    if inspect.iscoroutinefunction(stream.read):
        raise CTReadError(f"{source}: its read() must be awaited. Pass the plain file in it, such as upload.file.")
    try:
        place = stream.tell() if _can_seek(stream) else None
        if place is not None:
            stream.seek(0)
        try:
            _copy_bytes(stream, out, source)
        finally:
            if place is not None:
                stream.seek(place)
    except CTReadError:
        raise
    except (OSError, ValueError) as error:
        if is_disk_error(error):
            raise
        raise CTReadError(f"{source}: cannot be read ({type(error).__name__}). Open it with mode 'rb'.") from error


def _can_seek(stream: Any) -> bool:
    seekable = getattr(stream, "seekable", None)
    return hasattr(stream, "seek") and hasattr(stream, "tell") and (seekable() is True if callable(seekable) else True)


def _copy_bytes(stream: Any, out: Any, source: str) -> None:
    size = 0
    while chunk := stream.read(_CHUNK):
        if not isinstance(chunk, (bytes, bytearray, memoryview)):
            raise CTReadError(
                f"{source}: its read() gives {type(chunk).__name__}; expected bytes. Open it with mode 'rb'."
            )
        size += len(chunk)
        if size > _MAX_BYTES:
            raise CTReadError(f"{source}: more than {_MAX_BYTES} bytes. Save it as a file and pass its path.")
        out.write(chunk)


def _write_dataset(dataset: Any, path: Path) -> None:
    """What reading needs of a pydicom dataset, as a file: nothing of the patient goes to the disk."""
    if pydicom is None:
        raise CTReadError("a pydicom dataset: reading DICOM needs pydicom 3: pip install 'pydicom>=3'")
    try:
        if _PIXEL_DATA not in dataset and "Rows" in dataset:
            raise CTReadError(
                "a pydicom dataset without voxels; expected PixelData. Read it without stop_before_pixels, or pass the "
                "path of its file."
            )
        syntax = str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID", "") or "")
        implicit, little = dataset.original_encoding
        if not syntax:  # as a network sends it, or as it was made
            little = little is not False
            syntax = _IMPLICIT if implicit else (_EXPLICIT if little else _BIG_ENDIAN)
        kept = pydicom.Dataset()
        same = dataset.original_encoding == (syntax == _IMPLICIT, NATIVE.get(syntax, "<") == "<")
        for tag in map(pydicom.tag.Tag, (*TAGS, "PixelData")):
            if tag in dataset:
                kept[tag] = dataset.get_item(tag) if same else dataset[tag]
        kept.file_meta = pydicom.dataset.FileMetaDataset()
        kept.file_meta.TransferSyntaxUID = syntax
        kept.file_meta.MediaStorageSOPClassUID = str(dataset.get("SOPClassUID", "") or _CT_STORAGE)
        kept.file_meta.MediaStorageSOPInstanceUID = str(dataset.get("SOPInstanceUID", "") or "1.2.3")
        with quiet_pydicom():
            pydicom.dcmwrite(path, kept, enforce_file_format=True)
    except _WRITE_ERRORS as error:
        if isinstance(error, CTReadError):
            raise
        raise CTReadError(
            f"a pydicom dataset that cannot be written as a file ({type(error).__name__}). Pass the path of its file."
        ) from error


# ------------------------------------------------------------------------------------------------------ images in memory


def stored_image(image: Any) -> StoredVolume:
    """The values and the geometry of an image or array in memory.

    Raises:
        CTReadError: not one 3-D volume.
        TypeError: none of the kinds that are known; says what to do.
    """
    if nib is not None and isinstance(image, nib.spatialimages.SpatialImage):
        return _from_nibabel(image)
    if sitk is not None and isinstance(image, sitk.Image):
        return _from_itk(image)
    for package, name, read in _LIBRARIES:
        if is_kind(image, package, name):
            return read(image)
    if getattr(image, "affine", None) is not None:
        raise TypeError(
            f"an object of {type(image)} with an affine, of which nothing says whether it counts in RAS or LPS. Pass "
            f"nibabel.Nifti1Image(array, affine) with the affine in RAS+ millimetres; taken are {_TAKEN}"
        )
    if is_kind(image, "torch", "Tensor"):
        image = _tensor_values(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, f"array of shape {image.shape}", [np.eye(4)])
    raise TypeError(_refusal(image))


def _refusal(image: Any) -> str:
    remedy = next((words for package, name, words in _REMEDIES if is_kind(image, package, name)), None)
    if remedy is None and isinstance(image, Mapping):
        keys = ", ".join(str(key)[:24] for key in list(image)[:6])
        remedy = f"A mapping with keys {keys}: pass the image in it"
    if remedy is None and isinstance(image, (list, tuple)):
        kinds = ", ".join(sorted({type(item).__name__ for item in image})[:4])
        remedy = f"A list of {kinds}: pass its volumes one by one, or the path of pynrrd's (data, header)"
    return f"a volume is {_TAKEN}; got {type(image)}. {remedy or 'Pass one of these'}."


def _from_array(array: np.ndarray, source: str, affines: Sequence[np.ndarray]) -> StoredVolume:
    array = array.reshape(squeezed_shape(array.shape, source, leading=True), order="A")
    return StoredVolume(array, source, list(affines), assumed_axes="RAS", own=False)


def _tensor_values(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype.is_floating_point else tensor).numpy())  # NumPy has no bfloat16


def _from_monai(image: Any) -> StoredVolume:
    """A MetaTensor (X, Y, Z), perhaps with one channel before; its affine counts in meta["space"], RAS or LPS."""
    meta = image.meta
    path = meta.get("filename_or_obj")
    source = f"MONAI image {path}" if isinstance(path, str) and path else "MONAI image"
    space = meta.get("space") or "RAS"
    space = str(getattr(space, "value", space)).upper()
    if space not in ("RAS", "LPS"):
        raise CTReadError(
            f"{source}: meta['space'] is {space[:24]!r}; expected RAS or LPS. Set it to what its affine is."
        )
    plain = image.as_tensor()
    affine = np.asarray(_tensor_values(image.affine), dtype=np.float64).squeeze()
    if affine.shape != (4, 4):
        raise CTReadError(
            f"{source}: an affine of shape {affine.shape}; expected (4, 4). Pass the volumes of a batch one by one, e.g. "
            f"monai.data.decollate_batch(batch)."
        )
    affine = LPS_TO_RAS @ affine if space == "LPS" else affine
    return _from_array(_tensor_values(plain), source, [affine])


def _from_torchio(image: Any) -> StoredVolume:
    """TorchIO's images are (1, X, Y, Z) with an affine in RAS; their file is read when they are first asked."""
    path = getattr(image, "path", None)
    source = f"TorchIO image {path}" if isinstance(path, (str, os.PathLike)) else "TorchIO image"
    if is_kind(image, "torchio", "LabelMap"):
        raise CTReadError(f"{source}: found a label map; expected HU values. Pass the scan itself.")
    try:
        tensor, affine = image.data, image.affine
    except (OSError, RuntimeError, ValueError) as error:
        raise CTReadError(f"{source}: its file cannot be read ({type(error).__name__}). Check its path.") from error
    if tensor.ndim == 4 and tensor.shape[0] > 1:
        raise CTReadError(
            f"{source}: found {tensor.shape[0]} channels; expected one HU value a voxel. Pass one channel."
        )
    return _from_array(_tensor_values(tensor), source, [np.asarray(affine, dtype=np.float64)])


def _from_highdicom(volume: Any) -> StoredVolume:
    """highdicom's affine leads to DICOM's own coordinates, LPS."""
    source = "highdicom volume"
    space = str(getattr(volume.coordinate_system, "value", volume.coordinate_system)).upper()
    if space != "PATIENT":
        raise CTReadError(f"{source}: coordinates of a {space[:24].lower()}; expected a patient's. Pass a CT.")
    return _from_array(np.asarray(volume.array), source, [LPS_TO_RAS @ np.asarray(volume.affine, dtype=np.float64)])


_LIBRARIES = (
    ("monai", "MetaTensor", _from_monai),
    ("torchio", "Image", _from_torchio),
    ("highdicom", "Volume", _from_highdicom),
)


def _from_nibabel(image: Any) -> StoredVolume:
    """The values before scaling, slope and intercept: get_fdata would make a float64 volume."""
    name, proxy = image.get_filename(), image.dataobj
    source = f"nibabel image {name}" if name else "nibabel image"
    affines = [] if image.affine is None else [np.asarray(image.affine, dtype=np.float64)]
    zooms = (1.0, 1.0, 1.0)
    if isinstance(image.header, nib.Nifti1Header):
        affines, zooms = nifti_affines(source, image.header, *affines), nifti_zooms(source, image.header)
    lazy = hasattr(proxy, "get_unscaled")
    if lazy:  # only now does nibabel read the voxels
        check_dtype(proxy.dtype, source)
        voxels = math.prod(squeezed_shape(image.shape, source))
    try:
        # A header that claims more than deflate can pack lies, and nibabel would take the memory for it.
        if lazy and name and voxels * proxy.dtype.itemsize > DEFLATE_MAX_RATIO * os.path.getsize(name):
            raise EOFError
        array = np.asanyarray(proxy.get_unscaled() if lazy else proxy)
    except (EOFError, MemoryError, OSError, OverflowError, ValueError, zlib.error) as error:
        if is_disk_error(error) and not isinstance(error, FileNotFoundError):
            raise CTReadError(
                f"{source}: its file cannot be read ({error.strerror}). Check its permissions and its disk."
            ) from error
        raise CTReadError(
            f"{source}: its voxels cannot be read ({type(error).__name__}): its file ends early, is damaged or has gone. "
            f"Fetch or write it anew."
        ) from error
    slope, intercept = (float(proxy.slope), float(proxy.inter)) if lazy else (1.0, 0.0)
    return StoredVolume(array, source, affines, zooms, slope=slope, intercept=intercept, own=False)


def _from_itk(image: Any) -> StoredVolume:
    """SimpleITK counts in LPS and its arrays run z, y, x: both are turned round here."""
    source = "SimpleITK image"
    kind = image.GetPixelIDTypeAsString()
    if kind.startswith("label"):  # its library ends the process when it is asked for such an image's voxels
        raise CTReadError(f"{source}: found a label map ({kind}); expected HU values. Pass the scan itself.")
    components = image.GetNumberOfComponentsPerPixel()
    if components > 1:
        raise CTReadError(
            f"{source}: found {components} values a voxel (colour, vectors or several volumes in one file); "
            f"expected one HU value. Save a single volume."
        )
    dimension = image.GetDimension()
    shape = squeezed_shape(image.GetSize(), source)
    direction = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    array = _itk_array(image).T.reshape(shape, order="F")
    return StoredVolume(array, source, [LPS_TO_RAS @ affine], own=False)


def _itk_array(image: Any) -> np.ndarray:
    """A view of the image's own buffer that keeps the image alive, as SimpleITK's own view does not."""
    view = sitk.GetArrayViewFromImage(image)

    class Owner:
        __array_interface__ = view.__array_interface__
        owned = image

    return np.asarray(Owner())
