"""Volumes of requests as files: uploads in a folder of the service's own, or files below the scan folder."""

import base64
import binascii
import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from samf.serving.errors import ApiError
from samf.utils.private_paths import without_paths

_PREFIX = "samf-api-"
_LOCK = "lock"
UPLOAD = "upload"  # what reports call an uploaded scan, whose file name is never kept


@dataclass(frozen=True)
class ScanFile:
    """A volume on this machine.

    Attributes:
        key: equal for equal content.
        path: of its file or folder.
        label: what the client may see in its place.
    """

    key: str
    path: Path
    label: str

    def without_paths(self, message: str) -> str:
        """Return a message in which the scan has its label, and temporary files have no name."""
        temporary = Path(tempfile.gettempdir())
        places = (temporary.resolve(), temporary, self.path.parent)
        return without_paths(message, {self.path: self.label, **dict.fromkeys(places, "the volume")})


class Spool:
    """A temporary folder for uploads; what a killed process left in its own is removed when the next one starts."""

    def __init__(self) -> None:
        _remove_abandoned(Path(tempfile.gettempdir()))
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = (self.folder / _LOCK).open("w", encoding="ascii")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    @contextlib.contextmanager
    def stored(self, content: bytes) -> Iterator[ScanFile]:
        """Yield an upload as a file, in a folder of its own: a header may name any file next to it."""
        folder = self.folder / uuid.uuid4().hex
        try:
            folder.mkdir(mode=0o700)
            path = folder / "scan"
            path.write_bytes(content)
            yield ScanFile(hashlib.sha256(content).hexdigest(), path, UPLOAD)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Remove folders of processes that are gone: their locks are free."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), lock.open("r+", encoding="ascii") as stream:  # another user's, or just gone
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


class Budget:
    """A number of bytes that requests share; one that would exceed it is refused."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Take bytes.

        Raises:
            ApiError: 429; others have taken too many.
        """
        with self._lock:
            if self.used + count > self.limit:
                raise ApiError(429, "Too many uploads at once. Send this one again later.", "uploads_full", None, 5)
            self.used += count

    def give_back(self, count: int) -> None:
        """Give bytes back."""
        with self._lock:
            self.used -= count


def decode_upload(data: str, max_upload: int) -> bytes:
    """Return the bytes of a base64 text or a data: URL.

    Args:
        data: the text.
        max_upload: bytes that it may have.

    Raises:
        ApiError: 400, no base64, or empty; 413, too large.
    """
    if data[:5].lower() == "data:":
        head, comma, data = data.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ApiError(400, "The volume's data: URL isn't in base64; expected data:…;base64,…", "bad_base64")
    if len(data) // 4 * 3 > max_upload + 2:
        raise too_large(max_upload)
    try:
        content = base64.b64decode(data.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, "The volume's data isn't base64; send the whole file in it.", "bad_base64") from error
    if not content:
        raise ApiError(400, "The volume's data is empty; send the whole file in base64.", "bad_base64")
    if len(content) > max_upload:
        raise too_large(max_upload)
    return content


def too_large(max_upload: int) -> ApiError:
    """Return the error of a volume that is too large."""
    return ApiError(413, f"The volume is too large; expected at most {max_upload} bytes as a file.", "volume_too_large")


def scan_below(folder: Path | None, name: str) -> ScanFile:
    """Return a scan below the scan folder.

    Args:
        folder: the scan folder; None where there is none.
        name: path of the scan, relative to the folder or below it.

    Raises:
        ApiError: 404; not there, or elsewhere, which the client can't tell apart.
    """
    missing = ApiError(404, "No such scan below the server's scan folder.", "scan_not_found", "messages")
    if folder is None:
        raise ApiError(
            404, "This server has no scan folder (--scan-folder); send the volume itself.", "scan_not_found", "messages"
        )
    try:
        root = folder.resolve(strict=True)
        path = (root / name).resolve(strict=True)
        if path == root or not path.is_relative_to(root) or not (path.is_file() or path.is_dir()):
            raise missing
        return ScanFile(_key_of(path), path, path.relative_to(root).as_posix())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a name that is too long, a loop of links
        raise missing from error


def _key_of(path: Path) -> str:
    """Return a key that changes with a file, or with the files of a folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    stats = [
        (str(file), stat.st_size, stat.st_mtime_ns) for file in files if (stat := os.stat(file, follow_symlinks=True))
    ]
    return hashlib.sha256(repr(stats).encode("utf-8", "surrogateescape")).hexdigest()
