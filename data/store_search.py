"""Volume files and DICOM folders below an address in an object store, found by their names and first bytes."""

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from samf.data.file_kinds import HEAD_BYTES, has_volume_suffix
from samf.data.folder_search import DICOM_SAMPLE, NOT_MATCHING, fits
from samf.model.ct_common import VolumeRef
from samf.model.ct_object_store import StoredFile, list_stored, read_stored_head, remember_folder
from samf.model.ct_signatures import looks_like_dicom

_THREADS = 16  # which mostly wait for the store


def volumes_stored_below(
    root: str, patterns: Sequence[str] = (), passed_over: Counter[str] | None = None
) -> list[VolumeRef]:
    """Find volume files and DICOM folders below an address, ordered by path.

    The store is listed once, which also gives the identity of each volume. Of other files than volumes, a few per folder
    are read to see whether they are DICOM. Masks are not recognised before they are read.

    Args:
        root: s3:// or gs://bucket[/path].
        patterns: see `samf.data.folder_search.volumes_below`.
        passed_over: counts what is left out, by reason.

    Raises:
        DownloadError: no such bucket or folder, no access or no connection.
    """
    root, passed_over = root.rstrip("/"), Counter() if passed_over is None else passed_over
    files = list_stored(root)
    candidates: dict[str, list[str]] = {}
    for file in files:
        if not has_volume_suffix(file.name):
            candidates.setdefault(os.path.dirname(file.name), []).append(file.name)
    with ThreadPoolExecutor(_THREADS) as threads:
        is_dicom = threads.map(lambda names: _any_dicom(root, names), candidates.values())
        series = [folder for folder, found in zip(candidates, is_dicom, strict=True) if found]
    _remember(root, series, files)
    volumes = []
    for name in sorted([*series, *(file.name for file in files if has_volume_suffix(file.name))]):
        if patterns and not fits(name, patterns):
            passed_over[NOT_MATCHING] += 1
        else:
            volumes.append(VolumeRef(f"{root}/{name}" if name else root))
    return volumes


def _any_dicom(root: str, names: Sequence[str]) -> bool:
    """Return whether one of the first files of a folder is DICOM."""
    names = [name for name in names if not os.path.basename(name).upper().startswith("DICOMDIR")]
    return any(looks_like_dicom(read_stored_head(f"{root}/{name}", HEAD_BYTES)) for name in names[:DICOM_SAMPLE])


def _remember(root: str, folders: Sequence[str], files: Sequence[StoredFile]) -> None:
    """Remember the state of folders, so that the store need not list each of them again."""
    names = [file.name for file in files]
    for folder in folders:
        prefix = f"{folder}/" if folder else ""
        below = _starting_with(prefix, names)
        inside = [files[k]._replace(name=files[k].name[len(prefix) :]) for k in below]
        remember_folder(f"{root}/{folder}".rstrip("/"), inside)


def _starting_with(prefix: str, names: Sequence[str]) -> Iterator[int]:
    """Yield the places of the sorted `names` that start with a prefix."""
    for place in range(bisect_left(names, prefix), len(names)):
        if not names[place].startswith(prefix):
            return
        yield place
