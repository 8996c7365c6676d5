"""CT images in memory: arrays, tensors, and images of nibabel, SimpleITK, MONAI, TorchIO and highdicom.

An image that carries its geometry keeps it: its affine counts in the coordinates of its library. An affine in unknown
coordinates is refused, because a guess could swap left and right. Libraries are recognised by the names of their classes,
so that none of them need be installed or imported.
"""

import math
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .ct_common import (
    LPS_TO_RAS,
    CTReadError,
    Sizes,
    StoredVolume,
    check_dtype,
    is_disk_error,
    squeezed_shape,
    system_message,
)
from .ct_inputs import is_kind
from .ct_nifti import nifti_affines, nifti_zooms
from .ct_streams import DEFLATE_MAX_RATIO

_ACCEPTED = (
    "a path or an address, a list of DICOM files or pydicom datasets, an open file, a CTVolume, an array (X, Y, Z) "
    "in HU, or an image of nibabel, SimpleITK, MONAI, TorchIO or highdicom"
)
# What is no volume itself but holds one: package, class, remedy.
_REMEDIES = (
    ("datasets", "Column", "A column is many volumes: pass one of them, column[0], or all as a list, column[:]"),
    ("datasets", "Dataset", 'A data set is many rows: pass the volume of one, such as dataset[0]["nifti"]'),
    ("datasets", "IterableDataset", "A data set is many rows: pass the volume of one"),
    ("torchio", "Subject", 'A subject holds images: pass one of them, such as subject["ct"]'),
    ("builtins", "bytes", "If these are a file's content, pass io.BytesIO(content)"),
    ("itk", "Image", "Write it with itk.imwrite(image, 'scan.nii.gz') and pass the path"),
    ("ants", "ANTsImage", "Pass image.to_nibabel()"),
)


def stored_image(image: Any) -> StoredVolume:
    """Return the values and the geometry of an image or array in memory.

    Raises:
        CTReadError: not one 3-D volume.
        TypeError: of no known kind; says what to do.
    """
    if is_kind(image, "nibabel", "SpatialImage"):
        return _from_nibabel(image)
    if is_kind(image, "SimpleITK", "Image"):
        return _from_itk(image)
    if is_kind(image, "monai", "MetaTensor"):
        return _from_monai(image)
    if is_kind(image, "torchio", "Image"):
        return _from_torchio(image)
    if is_kind(image, "highdicom", "Volume"):
        return _from_highdicom(image)
    if getattr(image, "affine", None) is not None:
        raise TypeError(
            f"an object of {type(image)} with an affine, but nothing says whether it is in RAS or LPS. Pass "
            f"nibabel.Nifti1Image(array, affine) with the affine in RAS+ millimetres; accepted are {_ACCEPTED}"
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
    return f"a volume is {_ACCEPTED}; got {type(image)}. {remedy or 'Pass one of these'}."


def _from_array(array: np.ndarray, source: str, affines: Sequence[np.ndarray]) -> StoredVolume:
    array = array.reshape(squeezed_shape(array.shape, source, leading=True), order="A")
    return StoredVolume(array, source, list(affines), assumed_axes="RAS", own=False)


def _tensor_values(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype.is_floating_point else tensor).numpy())  # NumPy has no bfloat16


# --- MONAI, TorchIO, highdicom ----------------------------------------------------------------------------------------


def _from_monai(image: Any) -> StoredVolume:
    """Read a MetaTensor (X, Y, Z), perhaps with one leading channel; its affine is in meta["space"], RAS or LPS."""
    meta = image.meta
    path = meta.get("filename_or_obj")
    source = f"MONAI image {path}" if isinstance(path, str) and path else "MONAI image"
    space = meta.get("space") or "RAS"
    space = str(getattr(space, "value", space)).upper()
    if space not in ("RAS", "LPS"):
        raise CTReadError(
            f"{source}: meta['space'] is {space[:24]!r}; expected RAS or LPS. Set it to the space of its affine."
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
    """Read a TorchIO image (1, X, Y, Z) with an affine in RAS; TorchIO reads its file only now."""
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
            f"{source}: found {tensor.shape[0]} channels; expected one HU value per voxel. Pass one channel."
        )
    return _from_array(_tensor_values(tensor), source, [np.asarray(affine, dtype=np.float64)])


def _from_highdicom(volume: Any) -> StoredVolume:
    """Read a highdicom volume, whose affine is in DICOM's own coordinates, LPS."""
    source = "highdicom volume"
    space = str(getattr(volume.coordinate_system, "value", volume.coordinate_system)).upper()
    if space != "PATIENT":
        raise CTReadError(f"{source}: coordinates of a {space[:24].lower()}; expected a patient's. Pass a CT.")
    return _from_array(np.asarray(volume.array), source, [LPS_TO_RAS @ np.asarray(volume.affine, dtype=np.float64)])


# --- nibabel, SimpleITK -----------------------------------------------------------------------------------------------


def _from_nibabel(image: Any) -> StoredVolume:
    """Read the values before scaling, with slope and intercept: get_fdata would make a float64 volume."""
    name, proxy = image.get_filename(), image.dataobj
    source = f"nibabel image {name}" if name else "nibabel image"
    affines = [] if image.affine is None else [np.asarray(image.affine, dtype=np.float64)]
    zooms: Sizes = (1.0, 1.0, 1.0)
    if is_kind(image.header, "nibabel", "Nifti1Header"):
        affines, zooms = nifti_affines(source, image.header, *affines), nifti_zooms(source, image.header)
    lazy = hasattr(proxy, "get_unscaled")
    array = _nibabel_array(image, source, lazy)
    slope, intercept = (float(proxy.slope), float(proxy.inter)) if lazy else (1.0, 0.0)
    return StoredVolume(array, source, affines, zooms, slope=slope, intercept=intercept, own=False)


def _nibabel_array(image: Any, source: str, lazy: bool) -> np.ndarray:
    """Return the stored values of an image; `lazy`: nibabel reads its voxels only now."""
    name, proxy, size = image.get_filename(), image.dataobj, 0
    if lazy:
        check_dtype(proxy.dtype, source)
        size = math.prod(squeezed_shape(image.shape, source)) * proxy.dtype.itemsize
    try:
        # A header that claims more than deflate can compress is wrong, and nibabel would take the memory for it.
        if lazy and name and size > DEFLATE_MAX_RATIO * os.path.getsize(name):
            raise EOFError
        return np.asanyarray(proxy.get_unscaled() if lazy else proxy)
    except (EOFError, MemoryError, OSError, OverflowError, ValueError, zlib.error) as error:
        if is_disk_error(error) and not isinstance(error, FileNotFoundError):
            raise CTReadError(
                f"{source}: its file cannot be read ({system_message(error)}). Check its permissions and its disk."
            ) from error
        raise CTReadError(
            f"{source}: its voxels cannot be read ({type(error).__name__}): its file ends early, is damaged or no longer "
            f"exists. Download or export it again."
        ) from error


def _from_itk(image: Any) -> StoredVolume:
    """Read a SimpleITK image, which is in LPS and whose arrays run z, y, x."""
    source = "SimpleITK image"
    kind = image.GetPixelIDTypeAsString()
    if kind.startswith("label"):  # SimpleITK ends the process when asked for the voxels of such an image
        raise CTReadError(f"{source}: found a label map ({kind}); expected HU values. Pass the scan itself.")
    components = image.GetNumberOfComponentsPerPixel()
    if components > 1:
        raise CTReadError(
            f"{source}: found {components} values per voxel (colour, vectors or several volumes in one file); "
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
    """Return a view of the image's own buffer that keeps the image alive, as SimpleITK's own view does not."""
    try:
        import SimpleITK as sitk  # here, because it takes a while, and who has such an image has imported it
    except ImportError as error:  # which an image can't be without
        raise TypeError(f"an image of SimpleITK, which can't be imported: {error}") from error
    view = sitk.GetArrayViewFromImage(image)

    class Owner:
        __array_interface__ = view.__array_interface__
        owned = image

    return np.asarray(Owner())
