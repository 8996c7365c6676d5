"""A watched folder: each file or folder dropped into it is one series. Nothing in it is ever changed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samf.model.ct_common import CTReadError
from samf.model.ct_dicom_files import dicom_files, walk_once
from samf.model.ct_signatures import is_zip
from samf.model.ct_zip import unpack_zip
from samf.reporting.hospital.durable import make_folder
from samf.reporting.hospital.inbox import Fingerprint, fingerprint_of, make_key

# Names under which programs write what isn't complete.
_UNFINISHED = (".tmp", ".part", ".partial", ".filepart", ".crdownload", ".download")


class FolderInbox:
    """Series in a folder: NIfTI and other files, zips, and folders of DICOM slices.

    Args:
        folder: that is watched.
        scratch: zips of DICOM slices are unpacked below it, because their headers are needed for DICOM reports.

    Raises:
        FileNotFoundError: no such folder.
    """

    discards = False

    def __init__(self, folder: Path, scratch: Path):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; name the one that series are dropped into.")
        self.folder, self._scratch = folder, scratch
        self._items: dict[str, Path] = {}
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        make_folder(scratch)

    def present(self) -> Iterator[str]:
        """Yield the keys of all series that are in the folder now."""
        names = sorted(name for name in os.listdir(self.folder) if _is_wanted(name))
        self._items = {make_key(f"watch {name}"): self.folder / name for name in names}
        yield from self._items

    def fingerprint(self, key: str) -> Fingerprint | None:
        """Return the state of a series; None if it is gone or can't be listed."""
        try:
            path = self._items[key]
            if not path.is_dir():
                return fingerprint_of([(path.name, path.stat())])
            below = (Path(parent, name) for parent, names in walk_once(path) for name in names)
            found = fingerprint_of((os.fspath(file.relative_to(path)), file.stat()) for file in below)
        except (KeyError, OSError):
            return None
        return found if found.files else None

    @contextmanager
    def opened(self, key: str) -> Iterator[Path]:
        """Yield the path of a series; of a zip with DICOM slices, the folder into which it is unpacked meanwhile.

        Raises:
            CTReadError: a zip that can't be unpacked.
        """
        path = self.origin(key)
        if path.is_dir() or not is_zip(path):
            yield path
            return
        with tempfile.TemporaryDirectory(dir=self._scratch) as unpacked:
            unpack_zip(path, Path(unpacked))
            try:
                has_slices = bool(dicom_files(Path(unpacked)))
                yield Path(unpacked) if has_slices else path
            except CTReadError as error:
                raise CTReadError(str(error).replace(unpacked, str(path))) from error

    def origin(self, key: str) -> Path:
        """Return the path of a series."""
        return self._items.get(key, self.folder / key)

    def name(self, key: str) -> str:
        """Return the name of its file or folder."""
        return self.origin(key).name

    def aside(self, key: str) -> Path:
        """Return the path of a series, which stays where it is."""
        return self.origin(key)

    def set_aside(self, key: str, state: Fingerprint) -> None:
        """Leave the series where it is: the folder belongs to others."""

    def reopen(self, key: str) -> None:
        """Leave the series where it is."""

    def discard(self, key: str, digest: str) -> None:
        """Leave the series where it is."""


def _is_wanted(name: str) -> bool:
    return not name.startswith((".", "~")) and not name.lower().endswith(_UNFINISHED)


class FolderWatch:
    """Tells which series of a watched folder have changed since the last look.

    Args:
        inbox: of the folder.
    """

    def __init__(self, inbox: FolderInbox):
        self._inbox = inbox
        self._seen: dict[str, Fingerprint] = {}

    def changed(self) -> list[str]:
        """Return series that are new or whose files have changed."""
        states = {key: state for key in self._inbox.present() if (state := self._inbox.fingerprint(key)) is not None}
        changed = [key for key, state in states.items() if self._seen.get(key) != state]
        self._seen = states
        return changed
