"""The choice of a reader for the local files of one volume."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .ct_arrays import read_npy, read_npz
from .ct_common import CTReadError, StoredVolume
from .ct_dicom_files import dicom_files
from .ct_metaimage import read_metaimage
from .ct_nifti import read_nifti
from .ct_nrrd import read_nrrd
from .ct_signatures import file_format, paired_header
from .ct_source import LocalFiles

if TYPE_CHECKING:
    from .ct_dicom import FoundSeries

logger = logging.getLogger(__name__)

# Of a path and of whether values may be scaled while they are read.
_READERS: dict[str, Callable[[Path, bool], StoredVolume]] = {
    "NIfTI": lambda path, as_hu: read_nifti(path, compressed=False, as_hu=as_hu),
    "compressed NIfTI": lambda path, as_hu: read_nifti(path, compressed=True, as_hu=as_hu),
    "NRRD": read_nrrd,
    "MetaImage": read_metaimage,
    "NumPy": lambda path, _: read_npy(path),
    "npz": lambda path, _: read_npz(path),
}


@dataclass(frozen=True)
class ReadOptions:
    """What the caller of `read_ct` says about a volume, as far as it concerns the readers.

    Attributes:
        series_uid: which series of a DICOM study to read.
        allow_non_ct: take other modalities and units.
        rescaled: the caller gives slope and intercept, which DICOM slices carry themselves.
    """

    series_uid: str | None = None
    allow_non_ct: bool = False
    rescaled: bool = False


def read_stored(local: LocalFiles, options: ReadOptions) -> StoredVolume:
    """Read one volume as it is stored.

    Args:
        local: its files.
        options: what the caller says about it.

    Raises:
        CTReadError: no single volume that can be read.
    """
    if local.kind == "list":
        stored = _read_list(local, options)
    elif local.paths[0].is_dir():
        stored = _read_folder(local.paths[0], local.source, options, archive=local.kind == "archive")
    else:
        stored = _read_file(local.paths[0], local.source, options)
    if local.temporary and not stored.own:
        stored = replace(stored, array=np.array(stored.array, order="K"), own=True)  # a map would outlive its file
    return stored


def find_dicom_series(local: LocalFiles, series_uid: str | None = None) -> "FoundSeries | None":
    """Return the DICOM slices that `read_stored` reads, without their voxels; None where it reads another format.

    Args:
        local: the files of one volume.
        series_uid: SeriesInstanceUID of the series, or the label of a series or stack; None = the largest axial one.

    Raises:
        CTReadError: no single DICOM volume.
    """
    files = list(local.paths)
    if local.kind != "list":
        if files[0].is_file():
            kind = file_format(files[0])
            files = dicom_files(files[0].parent) if kind == "DICOMDIR" else files if kind == "DICOM" else []
        else:
            files = dicom_files(files[0])
    if not files:
        return None
    from .ct_dicom import find_series  # not above: pydicom takes 0.1 s, which other formats don't need

    return find_series(local.source, files, series_uid=series_uid, listed=local.kind == "list")


def _read_list(local: LocalFiles, options: ReadOptions) -> StoredVolume:
    missing = next((file for file in local.paths if not file.is_file()), None)
    if missing is not None or not local.paths:
        raise CTReadError(f"{missing or local.source}: no such file. Expected a list of the DICOM files of one series.")
    return _read_dicom(local.paths, local.source, options, listed=True)


def _read_file(path: Path, source: str, options: ReadOptions) -> StoredVolume:
    if not path.is_file():
        raise CTReadError(f"{path}: no such file or folder. Check the path; a relative one starts at {Path.cwd()}.")
    if path.suffix.lower() in (".img", ".gz"):
        path = paired_header(path) or path
    kind = file_format(path)
    if kind == "DICOMDIR":
        logger.info("%s: the directory of a disc; reads the folder that holds it", source)
        return _read_folder(path.parent, source, options)
    if kind == "DICOM":
        return _read_dicom([path], source, options)
    if options.series_uid is not None:
        raise CTReadError(f"{source}: series_uid is for DICOM, and this is {kind}. Leave it out.")
    return replace(_READERS[kind](path, not options.rescaled), source=source)


def _read_folder(folder: Path, source: str, options: ReadOptions, archive: bool = False) -> StoredVolume:
    """Read the DICOM slices in a folder; without any, the only volume file of an unpacked zip (`archive`)."""
    files = dicom_files(folder)
    if files:
        return _read_dicom(files, source, options)
    if archive:
        return _read_only_volume(folder, source, options)
    entries = sorted(folder.iterdir())
    if not entries:
        raise CTReadError(f"{source}: an empty folder; expected the DICOM slices of one CT series.")
    kinds = Counter("folders" if entry.is_dir() else f"{entry.suffix or 'suffixless'} files" for entry in entries)
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
    raise CTReadError(
        f"{source}: a folder without DICOM slices (found {found}); expected the slices of one CT series. "
        f"Name the folder that holds them, or the volume file itself."
    )


def _read_only_volume(folder: Path, source: str, options: ReadOptions) -> StoredVolume:
    volumes = [file for file in sorted(folder.iterdir()) if _is_volume(file)]
    volumes = [file for file in volumes if paired_header(file) is None]  # the .hdr represents both
    if len(volumes) != 1:
        raise CTReadError(
            f"{source}: a zip with {len(volumes)} volumes; expected DICOM slices or one volume file. "
            f"Unpack it and name one."
        )
    return replace(_READERS[file_format(volumes[0])](volumes[0], not options.rescaled), source=source)


def _is_volume(file: Path) -> bool:
    try:
        return file_format(file) in _READERS
    except CTReadError:
        return False


def _read_dicom(files: Sequence[Path], source: str, options: ReadOptions, listed: bool = False) -> StoredVolume:
    if options.rescaled:
        raise CTReadError(f"{source}: DICOM slices carry their own slope and intercept; leave rescale out.")
    from .ct_dicom import read_dicom

    return read_dicom(source, files, series_uid=options.series_uid, allow_non_ct=options.allow_non_ct, listed=listed)
