"""The volumes that a table names or holds."""

import os
from pathlib import Path

from datasets.utils.file_utils import xopen

from samf.data.addresses import folder_of, is_file_address, join_address
from samf.data.ct_rate.sources import HUB_NAME
from samf.model.ct_download import file_path, is_address
from samf.utils.files import atomic_write

_GZIP = b"\x1f\x8b"


class TablePaths:
    """The paths of a table's volumes: absolute, an address, or relative to a folder, to its address or to a repository.

    Args:
        source: the table or its address, or a data set's name on the Hub.
        image_root: the folder from which relative paths start, or its address; None takes the table's folder, or the
            repository.
    """

    def __init__(self, source: str | Path, image_root: str | Path | None):
        path = Path(file_path(str(source))).expanduser().absolute()
        match = HUB_NAME.fullmatch(str(source))
        self._root = path if path.is_dir() else path.parent
        self._address: str | None = None
        if image_root is not None and is_address(str(image_root)):
            self._address = str(image_root).rstrip("/")
        elif image_root is not None:
            self._root = Path(image_root).expanduser().absolute()
        elif is_file_address(str(source)):
            self._address = folder_of(str(source))
        elif match is not None and not path.exists():
            at = f"@{match['revision']}" if match["revision"] else ""
            self._address = f"hf://datasets/{match['name']}{at}"

    def locate(self, name: str) -> str:
        """Return the path or address of a volume by its name in the table."""
        name = file_path(name)
        if is_address(name) or os.path.isabs(name):
            return name
        return join_address(self._address, name) if self._address else os.path.normpath(self._root / name)


def volume_name(value: object, folder: Path, number: int) -> str | None:
    """Return the path or address of a row's volume; None where it has none.

    Args:
        value: a string, or what an undecoded `Nifti` column holds: {"path": …, "bytes": …}.
        folder: the folder for the files that rows hold themselves.
        number: the row's number.

    Raises:
        ValueError: a value of another type.
    """
    if value is None or isinstance(value, str):
        return value or None
    if not isinstance(value, dict) or not {"path", "bytes"} & value.keys():
        raise ValueError(
            f"row {number}: a volume of type {type(value).__name__}; expected a path, an address or a Nifti column."
        )
    path, data = value.get("path"), value.get("bytes")
    if data is None and path and "::" not in path:
        return path
    if data is None and path:  # within an archive
        with xopen(path, "rb") as stream:
            data = stream.read()
    if not data:
        return None
    target = folder / f"{number:07d}{'.nii.gz' if data.startswith(_GZIP) else '.nii'}"
    if not (target.is_file() and target.stat().st_size == len(data)):
        atomic_write(target, data)
    return str(target)
