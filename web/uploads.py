"""What a visitor gives: uploaded files or the name of a phantom, turned into one scan in the visitor's folder.

The browser renames files before it sends them, so that a name, which may be a patient's, never arrives. Nothing here uses the
names that do arrive, except to find the files.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from samf.model.ct_common import CTReadError
from samf.model.ct_zip import unpack_zip
from samf.phantoms.single import write_phantom
from samf.utils.private_paths import without_paths

MAX_FILES = 5000
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
# Advice for callers in Python or on a command line, such as "allow_non_ct=True takes them as they are."
_SENTENCES, _PROGRAMMERS = re.compile(r"(?<=[.!?]) (?=[A-Z]|\w+=|--)"), re.compile(r"\b\w+=|--\w")
_SCAN, _SERIES = "scan", "series"


class UploadError(Exception):
    """Something that can't be used; the message goes to the visitor as one sentence."""


@dataclass(frozen=True)
class BundledPhantom:
    """A synthetic scan to try the page with.

    Attributes:
        title: of its button.
        findings: of the phantom; none = a normal chest.
        seed: of everything else.
    """

    title: str
    findings: tuple[str, ...]
    seed: int


PHANTOMS = {
    "effusion": BundledPhantom("Effusion and nodule", ("Cardiomegaly", "Lung nodule", "Pleural effusion"), 3),
    "consolidation": BundledPhantom("Consolidation", ("Consolidation", "Arterial wall calcification"), 5),
    "emphysema": BundledPhantom("Emphysema", ("Emphysema", "Pericardial effusion"), 11),
    "normal": BundledPhantom("Normal chest", (), 2),
}
_PHANTOM_MM = 2.0
_ONE_PHANTOM = threading.Lock()  # making one takes 200 MB


def phantom_file(name: object, folder: Path) -> Path:
    """Return the file of a bundled phantom, which is made when it is asked for first.

    Args:
        name: key of `PHANTOMS`.
        folder: of the phantoms' files.

    Raises:
        UploadError: no such phantom.
    """
    if not isinstance(name, str) or name not in PHANTOMS:
        raise UploadError("There is no such phantom. Choose one of those on the page.")
    path = folder / f"{name}.nii.gz"
    with _ONE_PHANTOM:
        if not path.exists():
            write_phantom(path, PHANTOMS[name].seed, PHANTOMS[name].findings, _PHANTOM_MM)
    return path


def find_uploads(files: object, uploads: Path, max_bytes: int) -> list[Path]:
    """Return the uploaded files that a browser names, after checking that they are ones.

    Args:
        files: paths as the upload route returned them.
        uploads: folder that the route writes into.
        max_bytes: of all files together.

    Raises:
        UploadError: none, too many or too much; or a path that no upload has.
    """
    if not isinstance(files, Sequence) or isinstance(files, str) or not files:
        raise UploadError("No file arrived. Choose a NIfTI, NRRD or MHA file, a zip, or the files of a DICOM series.")
    if len(files) > MAX_FILES:
        raise UploadError(f"{len(files)} files; at most {MAX_FILES} are taken. Choose one series of the study.")
    found = [_upload(file, uploads) for file in files]
    size = sum(path.stat().st_size for path in found)
    if size > max_bytes:
        raise UploadError(f"{size / 1e6:.0f} MB; this page takes {max_bytes / 1e6:.0f} MB. Choose one series.")
    return found


def _upload(file: object, uploads: Path) -> Path:
    """Return the path of one uploaded file: UPLOADS/HASH/NAME, and no link."""
    if isinstance(file, Mapping):  # as gradio's clients name files
        file = file.get("path")
    try:
        path = Path(file) if isinstance(file, str) else None
        own = path is not None and path.parent.parent == uploads and path.resolve() == path and path.is_file()
    except (OSError, ValueError):  # too long, or a null byte
        own = False
    if path is None or not own:
        raise UploadError("An uploaded file is no longer there. Choose the files again.")
    return path


def take_scan(files: Sequence[Path], folder: Path) -> Path:
    """Move uploaded files into a folder and return the scan: a file, or a folder of DICOM slices.

    Args:
        files: of one scan; a single zip is unpacked.
        folder: of the visitor's scan.

    Raises:
        UploadError: a zip among several files.
        CTReadError: a zip that can't be unpacked.
    """
    zipped = [_is_zip(file) for file in files]
    if len(files) > 1 and any(zipped):
        raise UploadError("A zip and other files; expected one zip, or the files of one series. Choose either.")
    if len(files) == 1:
        scan = _moved(files[0], folder / _SCAN)
        if not zipped[0]:
            return scan
        (series := folder / _SERIES).mkdir()
        unpacked = unpack_zip(scan, series)
        scan.unlink()
        if not unpacked:
            raise UploadError("This zip is empty; expected the files of one series. Choose another one.")
        return unpacked[0] if len(unpacked) == 1 else series
    (series := folder / _SERIES).mkdir()
    for number, file in enumerate(files):
        _moved(file, series / f"{number:06d}")
    return series


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(4) in _ZIP


def _moved(file: Path, target: Path) -> Path:
    """Move an upload to its place, and remove the folder that it had."""
    try:
        file.rename(target)
        file.parent.rmdir()
    except FileNotFoundError as error:
        raise UploadError("An uploaded file is no longer there. Choose the files again.") from error
    except OSError:
        if not target.exists():
            raise
    return target


def plain_words(error: object, root: Path) -> str:
    """Return an error or a warning as one line in which no path of this server stands.

    Args:
        error: an exception or a text.
        root: folder of all files of the page.
    """
    words = " ".join(str(error).split())
    words = " ".join(part for part in _SENTENCES.split(words) if not _PROGRAMMERS.search(part)) or words
    words = re.sub(r"^the scan(?=:(\s|$))", "This scan", without_paths(words, {root: "the scan"}))
    return words[:1].upper() + words[1:] if isinstance(error, (CTReadError, UploadError)) else words
