"""Zip archives of volumes, unpacked within limits."""

import re
import shutil
import zipfile
import zlib
from pathlib import Path

from .ct_common import CTReadError, is_disk_error, system_message

_MAX_BYTES = 4 << 30  # holds the largest CT there is
_MAX_MEMBERS = 100_000
_CHUNK = 1 << 20
# Headers (.mhd, .nhdr, .hdr) name the file of their voxels, or share its name, so that it must keep it.
_VOXEL_FILE = re.compile(r"\w[\w.-]{0,99}\.(raw|zraw|img|hdr|bin|gz|bz2)", re.ASCII | re.IGNORECASE)
# Each means a damaged or unreadable member: NotImplementedError an unknown compression, RuntimeError a password.
_ZIP_ERRORS: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OSError,
)


def unpack_zip(path: Path, folder: Path) -> list[Path]:
    """Unpack the files of a zip into one folder.

    They are numbered, because their own names could lead anywhere. Files of plain names that a header may refer to keep the
    last part of theirs.

    Args:
        path: the zip.
        folder: an empty folder.

    Returns:
        Paths of the unpacked files.

    Raises:
        CTReadError: damaged, encrypted, more than 4 GiB or 100,000 files once unpacked, or no space for them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _unpack_members(path, archive, folder)
    except CTReadError:
        raise
    except _ZIP_ERRORS as error:
        if is_disk_error(error):
            raise CTReadError(
                f"{path}: cannot be unpacked into {folder} ({system_message(error)}). Free space there or set $TMPDIR."
            ) from error
        encrypted = isinstance(error, RuntimeError) and "password" in str(error)
        what = "is encrypted" if encrypted else f"is damaged ({type(error).__name__})"
        raise CTReadError(f"{path}: this zip {what}. Unpack it yourself, or create it again.") from error


def _unpack_members(path: Path, archive: zipfile.ZipFile, folder: Path) -> list[Path]:
    members = [info for info in archive.infolist() if not info.is_dir()]
    claimed = sum(info.file_size for info in members)
    if len(members) > _MAX_MEMBERS or claimed > _MAX_BYTES:
        raise CTReadError(
            f"{path}: {len(members)} files, {claimed} bytes unpacked; expected at most {_MAX_MEMBERS} and "
            f"{_MAX_BYTES}. Unpack it yourself and name the folder of one study."
        )
    files: list[Path] = []
    size = 0
    for number, info in enumerate(members):
        name = info.filename.replace("\\", "/").rpartition("/")[2]
        kept = _VOXEL_FILE.fullmatch(name) and not (folder / name).exists()
        files.append(folder / (name if kept else f"{number:06d}"))
        with archive.open(info) as stream, open(files[-1], "wb") as out:
            shutil.copyfileobj(stream, out, _CHUNK)  # zipfile gives no more than the member's size
        size += files[-1].stat().st_size
        if size > _MAX_BYTES:
            raise CTReadError(f"{path}: unpacks to more than {_MAX_BYTES} bytes. Unpack it yourself.")
    return files
