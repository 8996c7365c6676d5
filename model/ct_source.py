"""Resolve what callers pass to `read_ct` (paths, addresses, zips, open files, pydicom datasets, rows) into local files.

Nothing below resolves anything: readers see only files on this machine.
"""

import inspect
import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .ct_common import CTReadError, is_disk_error
from .ct_download import local_path
from .ct_inputs import identify, is_dataset, is_stream, source_name
from .ct_signatures import is_zip
from .ct_zip import unpack_zip

_MAX_BYTES = 4 << 30  # of an open file: holds the largest CT there is
_CHUNK = 1 << 20


@dataclass(frozen=True)
class LocalFiles:
    """The files of one volume on this machine.

    Attributes:
        paths: one file or folder, or the listed DICOM files.
        source: name in messages.
        kind: "path", one file or folder; "list", DICOM files that the caller named; "archive", the folder into which a
            zip was unpacked.
        temporary: the files are deleted after the block of `open_source`, so that no volume may map them.
    """

    paths: tuple[Path, ...]
    source: str
    kind: Literal["path", "list", "archive"] = "path"
    temporary: bool = False


@contextmanager
def open_source(image: Any) -> Iterator[LocalFiles]:
    """Yield the local files of a volume, and name the volume in every error of the block.

    An open file is read as a whole, wherever its position is, and its position is restored; one that can't seek is read to
    its end. It is neither closed nor changed.

    Args:
        image: what `is_source` accepts, except for a `VolumeRef`.

    Raises:
        TypeError: anything else.
        CTReadError: not to be downloaded, a damaged zip, or a file that is closed or opened as text.
    """
    image, source = identify(image)
    with _errors_named(source), ExitStack() as cleanup:
        yield _localise(image, source, cleanup)


def _localise(image: Any, source: str, cleanup: ExitStack) -> LocalFiles:
    """Return the local files of an identified source; temporary ones go when `cleanup` closes."""
    if isinstance(image, (list, tuple)):
        return _listed(image, source, cleanup)
    temporary = False
    if isinstance(image, (str, os.PathLike)):
        path = local_path(image)
    elif (own := _own_path(image)) is not None:
        path = own
    else:
        path, temporary = _write_all([image], cleanup)[0], True
    if path.is_file() and is_zip(path):
        folder = _temporary_folder(cleanup)
        unpack_zip(path, folder)
        return LocalFiles((folder,), source, "archive", temporary=True)
    return LocalFiles((path,), source, temporary=temporary)


def _listed(files: Sequence[Any], source: str, cleanup: ExitStack) -> LocalFiles:
    if all(isinstance(file, (str, os.PathLike)) for file in files):
        return LocalFiles(tuple(Path(file) for file in files), source, "list")
    return LocalFiles(tuple(_write_all(files, cleanup)), source, "list", temporary=True)


@contextmanager
def _errors_named(source: str) -> Iterator[None]:
    """Turn errors of the block into CTReadErrors that name the source, not only a file in a cache or an archive."""
    try:
        yield
    except CTReadError as error:
        if source.rstrip("/").lower() in str(error).lower():  # an address may be told in its plain form
            raise
        raise type(error)(f"{source}: {error}") from error
    except MemoryError as error:
        raise CTReadError(f"{source}: not enough memory for this volume. Crop or coarsen it.") from error
    except OSError as error:
        raise CTReadError(
            f"{source}: cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error


# --- Temporary files --------------------------------------------------------------------------------------------------


def _own_path(stream: Any) -> Path | None:
    """Return the path of a file that is open for reading, if it still has that name: such a file can be mapped."""
    if not isinstance(stream, (io.BufferedReader, io.FileIO)) or stream.closed or not isinstance(stream.name, str):
        return None
    try:
        path = os.path.abspath(stream.name)
        same = stream.readable() and os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
        return Path(path) if same and os.path.isfile(path) else None
    except (OSError, ValueError):
        return None


def _temporary_folder(cleanup: ExitStack) -> Path:
    return Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="samf-")))


def _write_all(images: Sequence[Any], cleanup: ExitStack) -> list[Path]:
    """Return paths of files, of which those in memory are written to a temporary folder."""
    folder = _temporary_folder(cleanup)
    names: dict[str, str] = {}
    cleanup.enter_context(_temporary_paths_replaced(names))
    paths = []
    for number, image in enumerate(images):
        path, name = folder / f"{number:06d}", source_name(image)
        names[str(path)] = name
        paths.append(_on_disk(image, path, name))
    return paths


@contextmanager
def _temporary_paths_replaced(names: Mapping[str, str]) -> Iterator[None]:
    """Replace temporary paths, which are of no use to the caller, by names in the errors of the block."""
    try:
        yield
    except CTReadError as error:
        words = str(error)
        for path, name in names.items():
            words = words.replace(path, name)
        raise type(error)(words) from error


def _on_disk(image: Any, path: Path, name: str) -> Path:
    """Write an open file, bytes or a dataset to `path` and return it; a path is returned unchanged. `name`: in messages."""
    if isinstance(image, (str, os.PathLike)):
        return Path(image)
    if is_dataset(image):
        from .ct_dicom_storage import write_dataset

        write_dataset(image, path)
        return path
    with open(path, "wb") as out:
        if is_stream(image):
            _copy_stream(image, out, name)
        else:
            out.write(image)
    return path


def _copy_stream(stream: Any, out: io.BufferedWriter, source: str) -> None:
    if isinstance(stream, io.TextIOBase):
        raise CTReadError(f"{source}: open as text; expected bytes. Open it with mode 'rb'.")
    if getattr(stream, "closed", False) is True:
        raise CTReadError(f"{source}: this file is closed. Open it again, or pass its path.")
    if inspect.iscoroutinefunction(stream.read):
        raise CTReadError(f"{source}: its read() must be awaited. Pass the plain file in it, such as upload.file.")
    try:
        position = stream.tell() if _can_seek(stream) else None
        if position is not None:
            stream.seek(0)
        try:
            _copy_bytes(stream, out, source)
        finally:
            if position is not None:
                stream.seek(position)
    except CTReadError:
        raise
    except (OSError, ValueError) as error:
        if is_disk_error(error):
            raise
        raise CTReadError(f"{source}: cannot be read ({type(error).__name__}). Open it with mode 'rb'.") from error


def _can_seek(stream: Any) -> bool:
    seekable = getattr(stream, "seekable", None)
    return hasattr(stream, "seek") and hasattr(stream, "tell") and (seekable() is True if callable(seekable) else True)


def _copy_bytes(stream: Any, out: io.BufferedWriter, source: str) -> None:
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
