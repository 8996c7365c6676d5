"""What a caller may pass as a volume that is, or becomes, files; and its name in messages.

Libraries are recognised by the names of their classes, so that none of them need be installed or imported.
"""

import io
import os
from collections.abc import Mapping
from typing import Any

from .ct_common import CTReadError, VolumeRef
from .ct_download import file_path, is_address, redacted


def identify(image: Any) -> tuple[Any, str]:
    """Return a source without its wrapping, and its name in messages.

    A row becomes its bytes or, without them, its path; a file:// address becomes a path, also in a list.

    Args:
        image: what `is_source` accepts, except for a `VolumeRef`.

    Raises:
        TypeError: anything else.
        CTReadError: a row without content, or a file:// address of another machine.
    """
    if not is_source(image):
        raise TypeError(
            f"expected a path, an address or a list of DICOM files, or a file that is open; got {type(image)}"
        )
    image = file_path(image)
    name = source_name(image)
    if isinstance(image, (list, tuple)):
        return [file_path(file) for file in image], name
    if not is_row(image):
        return image, name
    content = image.get("bytes")
    if content is not None:
        return content, name
    if not image.get("path"):
        raise CTReadError("a row without bytes and without a path; expected one of them. Fill it in, or leave it out.")
    return file_path(image["path"]), name


def is_kind(value: Any, package: str, name: str) -> bool:
    """Return whether a value is an instance of a class that is known by name, without importing its package.

    Args:
        value: any object.
        package: top-level package of the class.
        name: name of the class; subclasses count.
    """
    return any(kind.__name__ == name and kind.__module__.partition(".")[0] == package for kind in type(value).__mro__)


def is_source(image: Any) -> bool:
    """Return whether `read_ct` takes it: a path or reference, an open file, a row, a pydicom dataset, or a list of files.

    Bytes are no source: elsewhere in Python they could be a path.
    """
    if isinstance(image, (list, tuple)):
        return all(isinstance(file, (str, os.PathLike)) or is_dataset(file) or is_stream(file) for file in image)
    if isinstance(image, (str, os.PathLike, VolumeRef)):
        return True
    return is_row(image) or is_dataset(image) or is_stream(image)


def is_dataset(image: Any) -> bool:
    """Return whether it is a pydicom dataset: one DICOM file in memory."""
    return is_kind(image, "pydicom", "Dataset")


def is_row(image: Any) -> bool:
    """Return whether it is a file as `datasets` keeps one undecoded: {"bytes": …, "path": …}."""
    return (
        isinstance(image, Mapping) and 0 < len(image) <= 2 and set(image) <= {"bytes", "path"} and not is_image(image)
    )


def is_image(image: Any) -> bool:
    """Return whether it is an image of a library whose images look like mappings, as TorchIO's do."""
    return is_kind(image, "torchio", "Image")


def is_stream(image: Any) -> bool:
    """Return whether it is a file that is open for reading."""
    return callable(getattr(image, "read", None)) and (hasattr(image, "seek") or hasattr(image, "readable"))


def source_name(image: Any) -> str:
    """Return the name of a source in messages."""
    if isinstance(image, (list, tuple)):
        kind = "datasets" if image and is_dataset(image[0]) else "files"
        return f"{source_name(image[0])} and {len(image) - 1} more {kind}" if image else "an empty list of files"
    if is_row(image):
        return source_name(image["path"]) if image.get("path") else "bytes in memory"
    if is_dataset(image):
        return "a pydicom dataset"
    if isinstance(image, io.BytesIO):
        return "bytes in memory"
    if is_stream(image):
        name = getattr(image, "name", None)
        return name if isinstance(name, str) and name else "an open file"
    return redacted(image) if is_address(image) else str(image)
