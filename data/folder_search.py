"""Volume files and DICOM folders below a folder, found by their names and first bytes."""

import fnmatch
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from samf.cache.screening import mask_by_header
from samf.data.file_kinds import has_volume_suffix, is_dicom_file
from samf.model.ct_common import VolumeRef
from samf.model.ct_dicom_files import walk_once

logger = logging.getLogger(__name__)

NOT_MATCHING, _MASK = "not matching the pattern", "8-bit masks or images"  # why a file is passed over
DICOM_SAMPLE = 5  # files of a folder, other than volumes, that are checked for DICOM


def volumes_below(
    root: Path, patterns: Sequence[str] = (), passed_over: Counter[str] | None = None
) -> Iterator[VolumeRef]:
    """Find volume files and DICOM folders in and below a folder, ordered by path; no folder is visited twice.

    Args:
        root: the folder.
        patterns: file patterns, as in `SourceOptions` of `samf.data.volume_discovery`.
        passed_over: counts what is left out, by reason.
    """
    passed_over = Counter() if passed_over is None else passed_over
    for folder, files in walk_once(root, on_error=_log_unlisted):
        names = [name for name in files if has_volume_suffix(name) and name[0] != "."]
        volumes = [os.path.join(folder, name) for name in names]
        known = set(names)
        others = [name for name in files if name not in known]
        if any(_is_dicom(Path(folder, name)) for name in others[:DICOM_SAMPLE]):
            volumes = sorted([*volumes, folder])
        for path in map(os.path.normpath, volumes):
            if patterns and not fits(os.path.relpath(path, root), patterns):
                passed_over[NOT_MATCHING] += 1
            elif mask_by_header(path):
                passed_over[_MASK] += 1
            else:
                yield VolumeRef(path)


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a path below the data's folder matches a pattern; its last part, for a pattern without "/"."""
    return any(fnmatch.fnmatchcase(name if "/" in pattern else os.path.basename(name), pattern) for pattern in patterns)


def _log_unlisted(error: OSError) -> None:
    logger.warning("%s: cannot be listed (%s); left out", error.filename, error.strerror)


def _is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM; one that can't be read is not, and a warning names it."""
    try:
        return is_dicom_file(path)
    except OSError as error:
        logger.warning("%s: cannot be read (%s); left out", path, error.strerror)
        return False
