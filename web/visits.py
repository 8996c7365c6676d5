"""Visitors of the page and their files: a folder for each scan, removed when its visitor has gone."""

import contextlib
import logging
import secrets
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samf.web.turns import BusyError

if TYPE_CHECKING:
    from samf.model.pipeline_samf import EncodedScan
    from samf.model.report_samf import Report

logger = logging.getLogger(__name__)

_PREFIX = "samf-page-"
_LOCK = "in_use"
_KEPT = "vibe_edit_history"  # gradio makes this folder when it starts
_MOST_VISITORS = 200
_IDLE_SECONDS = 3600.0  # after which a visitor's files are removed, even if the tab is still open
_UNFINISHED_SECONDS = 600.0  # after which an upload without a byte of progress is removed


@dataclass(eq=False)
class Study:
    """One scan of a visitor, and what the model has made of it.

    Attributes:
        folder: of all its files.
        path: the scan: a file, or a folder of DICOM slices.
        encoded: the scan after the slice encoder.
        report: with its evidence, once that has been found.
        answers: pairs of question and answer.
    """

    folder: Path
    path: Path | None = None
    encoded: "EncodedScan | None" = None
    report: "Report | None" = None
    answers: list[tuple[str, str]] = field(default_factory=list)
    _holds: int = 0
    _ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def hold(self) -> None:
        """Keep the files until `release`, even if the visitor goes: something still works with them."""
        with self._lock:
            self._holds += 1

    def release(self) -> None:
        """Undo a `hold`."""
        with self._lock:
            self._holds -= 1
            gone = self._ended and not self._holds
        if gone:
            self._remove()

    def end(self) -> None:
        """Remove the files, at once or when nothing works with them any more."""
        with self._lock:
            self._ended = True
            gone = not self._holds
        if gone:
            self._remove()

    @property
    def busy(self) -> bool:
        """Return whether something works with the files."""
        return self._holds > 0

    @property
    def ended(self) -> bool:
        """Return whether the visitor has gone, or has another scan."""
        return self._ended

    def _remove(self) -> None:
        self.encoded = self.report = None
        self.answers.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(eq=False)
class Visit:
    """A visitor: one tab of a browser, or one client."""

    study: Study | None = None
    last_used: float = field(default_factory=time.monotonic)


class Visits:
    """All visitors, by the random name that the browser's tab has.

    Args:
        most: visitors at once.
        idle_seconds: after which an idle visitor's files are removed.
    """

    def __init__(self, most: int = _MOST_VISITORS, idle_seconds: float = _IDLE_SECONDS):
        self.most, self.idle_seconds = most, idle_seconds
        _remove_abandoned()
        self.root = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()
        self._own = _take(self.root)
        self.uploads, self.studies, self.phantoms = (self.root / name for name in ("uploads", "studies", "phantoms"))
        for folder in (self.uploads, self.studies, self.phantoms):
            folder.mkdir()
        self._visits: dict[str, Visit] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        threading.Thread(target=self._sweep_now_and_then, daemon=True).start()

    def new_study(self, name: str) -> Study:
        """Return a study with an empty folder for a visitor; an earlier one ends.

        Args:
            name: of the visitor.

        Raises:
            BusyError: too many visitors.
        """
        with self._lock:
            if name not in self._visits and len(self._visits) >= self.most:
                raise BusyError("Too many visitors at the moment. Try again in a few minutes.")
            visit = self._visits.setdefault(name, Visit())
            earlier, folder = visit.study, self.studies / secrets.token_hex(16)
            folder.mkdir()
            visit.study, visit.last_used = Study(folder), time.monotonic()
            study = visit.study
        if earlier is not None:
            earlier.end()
        return study

    def study(self, name: str) -> Study | None:
        """Return a visitor's study; None without one."""
        with self._lock:
            visit = self._visits.get(name)
            if visit is None:
                return None
            visit.last_used = time.monotonic()
            return visit.study

    def end(self, name: str) -> None:
        """Forget a visitor and remove the files."""
        with self._lock:
            visit = self._visits.pop(name, None)
        if visit is not None and visit.study is not None:
            visit.study.end()

    def __len__(self) -> int:
        return len(self._visits)

    def sweep(self) -> None:
        """End idle visits, and remove what interrupted uploads and ended work have left."""
        now = time.monotonic()
        with self._lock:
            for visit in self._visits.values():
                if visit.study is not None and visit.study.busy:
                    visit.last_used = now
            idle = [name for name, visit in self._visits.items() if now - visit.last_used > self.idle_seconds]
        for name in idle:
            self.end(name)
        with self._lock:
            known = {visit.study.folder for visit in self._visits.values() if visit.study is not None}
        for folder in self.studies.iterdir():
            if folder not in known and _age(folder) > self.idle_seconds:
                shutil.rmtree(folder, ignore_errors=True)
        for entry in self.uploads.iterdir():  # gradio's: a folder per file, and files while they come in
            if entry.name != _KEPT and _age(entry) > _UNFINISHED_SECONDS:
                _remove(entry)

    def close(self) -> None:
        """Remove everything."""
        self._stopped.set()
        shutil.rmtree(self.root, ignore_errors=True)
        if self._own is not None:
            self._own.close()
            self._own = None

    def _sweep_now_and_then(self) -> None:
        while not self._stopped.wait(60):
            try:
                self.sweep()
            except OSError as error:
                logger.warning("Temporary files were not swept: %s", type(error).__name__)


def _age(path: Path) -> float:
    """Return the seconds since a file or folder was changed; 0 for one that is gone."""
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _take(root: Path) -> Any:
    """Return an open file by whose lock other processes see that the folder is in use; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    held = open(root / _LOCK, "w")  # noqa: SIM115 - open as long as the page is
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.close()
        return None
    return held


def _remove_abandoned() -> None:
    """Remove the folders of pages that were killed."""
    for root in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if (root / _LOCK).exists() and (held := _take(root)) is not None:
                shutil.rmtree(root, ignore_errors=True)
                held.close()
