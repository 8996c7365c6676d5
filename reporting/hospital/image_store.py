"""The images that were received, in one folder per series; what was acknowledged is on the disk."""

import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from samf.reporting.hospital.durable import make_folder, sync, write_part
from samf.reporting.hospital.inbox import Fingerprint, fingerprint_of, make_key

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_MAX_UID = 64
_SUFFIX = ".dcm"


def is_uid(text: str) -> bool:
    """Return whether a text is a DICOM UID, and so safe as a file name."""
    return len(text) <= _MAX_UID and _UID.fullmatch(text) is not None


class ImageStore:
    """Images below one folder: `series/KEY/UID.dcm`, and `failed/KEY/` for series without a report.

    Methods may be called from several threads.

    Args:
        root: the folder; made when missing.
    """

    discards = True

    def __init__(self, root: Path):
        self.series, self.failed, self._incoming = root / "series", root / "failed", root / "incoming"
        self._lock = threading.RLock()
        shutil.rmtree(self._incoming, ignore_errors=True)  # of a run that was killed: never acknowledged, or discarded
        for folder in (self.series, self.failed, self._incoming):
            make_folder(folder)

    def put(self, series_uid: str, instance_uid: str, content: bytes) -> tuple[str, bool]:
        """Store an image so that it survives a kill and a power cut.

        An image that is there already, byte for byte, is left as it is; another one of the same UID replaces it.

        Args:
            series_uid: SeriesInstanceUID, checked by `is_uid`.
            instance_uid: SOPInstanceUID, checked as well.
            content: a whole DICOM file.

        Returns:
            The key of the series, and whether anything changed.

        Raises:
            OSError: it could not be stored.
        """
        key = make_key(series_uid)
        name = f"{instance_uid}{_SUFFIX}"
        if self._holds(key, name, content):
            return key, False
        part = write_part(self._incoming, content)
        try:
            with self._lock:  # a series isn't moved while an image goes into it
                folder = self._reopened(key)
                os.replace(part, folder / name)
                sync(folder)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        return key, True

    def _holds(self, key: str, name: str, content: bytes) -> bool:
        """Return whether a series that isn't set aside has an image of these bytes."""
        path = self.series / key / name
        try:
            return path.stat().st_size == len(content) and path.read_bytes() == content
        except FileNotFoundError:
            return False

    def _reopened(self, key: str) -> Path:
        """Return the folder of a series, made anew or taken back from those without a report."""
        folder, aside = self.series / key, self.failed / key
        if not folder.is_dir():
            if aside.is_dir():
                os.replace(aside, folder)
                sync(self.failed)
            else:
                folder.mkdir(exist_ok=True)
            sync(self.series)
        return folder

    def present(self) -> Iterator[str]:
        """Yield the keys of all series except those that were set aside."""
        yield from sorted(path.name for path in self.series.iterdir() if path.is_dir())

    def fingerprint(self, key: str) -> Fingerprint | None:
        """Return the state of a series; None if there is none."""
        with self._lock:
            return self._state(self.series / key)

    @staticmethod
    def _state(folder: Path) -> Fingerprint | None:
        try:
            found = fingerprint_of((entry.name, entry.stat()) for entry in os.scandir(folder))
        except FileNotFoundError:
            return None
        return found if found.files else None

    @contextmanager
    def opened(self, key: str) -> Iterator[Path]:
        """Yield the folder of a series."""
        yield self.series / key

    def origin(self, key: str) -> Path:
        """Return the folder of a series, or where it was set aside."""
        return self.failed / key if (self.failed / key).is_dir() else self.series / key

    def name(self, key: str) -> str:
        """Return the SeriesInstanceUID that the images of a series have; its key if they can't be read."""
        from samf.reporting.hospital.dicom_headers import read_header

        for path in sorted(self.origin(key).glob(f"*{_SUFFIX}"))[:1]:
            header = read_header(path)
            if header is not None and header.get("SeriesInstanceUID"):
                return str(header.SeriesInstanceUID)
        return key

    def aside(self, key: str) -> Path:
        """Return the folder of a series without a report."""
        return self.failed / key

    def set_aside(self, key: str, state: Fingerprint) -> None:
        """Move a series to those without a report, unless an image came meanwhile."""
        with self._lock:
            if self._state(self.series / key) == state:
                shutil.rmtree(self.failed / key, ignore_errors=True)
                os.replace(self.series / key, self.failed / key)
                sync(self.failed)
                sync(self.series)

    def reopen(self, key: str) -> None:
        """Take a series back from those without a report."""
        with self._lock:
            if (self.failed / key).is_dir():
                self._reopened(key)

    def discard(self, key: str, digest: str) -> None:
        """Remove the images of a series, unless one came meanwhile; a kill leaves all of them or none."""
        trash = self._incoming / uuid.uuid4().hex
        with self._lock:
            state = self._state(self.series / key)
            if state is None or state.digest != digest:
                return
            os.replace(self.series / key, trash)
            sync(self.series)
        shutil.rmtree(trash, ignore_errors=True)

    def find(self, instance_uids: Iterable[str]) -> dict[str, Path]:
        """Return the files of those images that are stored, by their SOPInstanceUID."""
        wanted = {f"{uid}{_SUFFIX}": uid for uid in instance_uids if is_uid(uid)}
        found = {}
        with self._lock:
            for top in (self.series, self.failed):
                for folder in filter(Path.is_dir, top.iterdir()):
                    for name in wanted.keys() & set(os.listdir(folder)):
                        found[wanted[name]] = folder / name
        return found
