"""Addresses of volumes: file:// paths, and downloads of http(s)://, hf://, s3:// and gs:// addresses.

Downloads are kept in the Hugging Face cache and fetched again only if they changed. Their size is limited. Where several
processes of a machine want the same file at the same time, one fetches it and the others wait.
"""

import hashlib
import http.client
import json
import logging
import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # re-exported without a stub

from .ct_common import CTReadError, DownloadError
from .ct_object_store import STORES, StoredState, download_stored, is_store_address, normalised, stored_state
from .files_samf import atomic_path

logger = logging.getLogger(__name__)

_MAX_BYTES = 4 << 30  # holds the largest CT there is; $SAMF_MAX_DOWNLOAD_BYTES changes it
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20
# What the Hub's library raises without a connection, whichever HTTP library it uses.
_TRANSPORT_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError" and issubclass(base, Exception)),
)
_HUB_ERRORS: tuple[type[Exception], ...] = (*_TRANSPORT_ERRORS, HFValidationError, ValueError)
_REPOSITORY_TYPES = {"datasets": "dataset", "spaces": "space"}
_FETCH_ERRORS = (urllib.error.URLError, http.client.HTTPException, OSError, ValueError)

_VOLUME, _RECORD = "volume", "record.json"  # names in a folder of the cache

# What a server said about a file in the cache, as its `record.json` keeps it.
_CacheEntry = TypedDict("_CacheEntry", {"size": int, "etag": str | None, "last-modified": str | None})


class _HubFile(TypedDict):
    """One file of a repository, as the Hub's library names it."""

    repo_id: str
    filename: str
    repo_type: str
    revision: str | None


def is_address(path: Any) -> bool:
    """Return whether `path` is an address that `local_copy` fetches."""
    if not isinstance(path, str) or "://" not in path:
        return False
    scheme = path.partition("://")[0].lower()
    return scheme in ("http", "https", "hf") or scheme in STORES


def file_path(path: Any) -> Any:
    """Return the path that a file:// address stands for; anything else as it is.

    Raises:
        CTReadError: a file:// address of another machine, or without an absolute path.
    """
    if not (isinstance(path, str) and path.lower().startswith("file:")):
        return path
    try:
        parts = urllib.parse.urlsplit(path)
    except ValueError as error:
        raise CTReadError(f"{path}: not an address ({error}). Give the file's path instead.") from error
    if parts.netloc.lower() not in ("", "localhost") or not parts.path.startswith("/"):
        raise CTReadError(
            f"{path}: expected file:///absolute/path of a file on this machine; found host {parts.netloc!r}, path "
            f"{parts.path!r}. Give the file's path instead."
        )
    return urllib.parse.unquote(parts.path, errors="surrogateescape")


def redacted(address: str) -> str:
    """Return an address for messages: without user, password and query, which may hold keys."""
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError:  # no address at all
        return address.partition("?")[0].rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def local_path(path: str | os.PathLike[str], keep_name: bool = False) -> Path:
    """Return the local path of a path or an address; what an address names is downloaded.

    Args:
        path: the path or address.
        keep_name: see `local_copy`.

    Raises:
        CTReadError: an empty path, which would mean the current folder, an address of another scheme, or a download that
            fails.
    """
    text = os.fspath(path)
    if not text:
        raise CTReadError("an empty path; expected a file, a folder of DICOM slices or an address. Name one.")
    if is_address(path):
        return local_copy(text, keep_name)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) and not is_address(text):
        scheme = text.partition("://")[0]
        raise CTReadError(
            f"{redacted(text)}: an address of scheme {scheme}; expected file://, http(s)://, hf://, s3:// or gs://. "
            f"Download the file first."
        )
    return Path(path)


def local_copy(address: str, keep_name: bool = False) -> Path:
    """Download one file into the cache, unless it is there and unchanged.

    Args:
        address: http(s)://…, hf://[datasets/|spaces/]owner/name[@revision]/path of a file in a repository, or s3:// or
            gs://bucket/path of a file or folder.
        keep_name: give the copy the address's file name, for readers that need its ending and for messages.

    Returns:
        The file's path in the cache, or the folder's. Don't change it.

    Raises:
        CTReadError: not reachable, not there, too large, or cut short.
    """
    if address.lower().startswith("hf://"):
        return _from_hub(address)
    name = _file_name(address) if keep_name else _VOLUME
    return _from_store(address, name) if is_store_address(address) else _from_web(address, name)


def _file_name(address: str) -> str:
    """Return the last part of an address's path, without characters that a file system may not have."""
    return re.sub(r"[^\w.-]", "_", redacted(address).rstrip("/").rpartition("/")[2], flags=re.ASCII)[-100:].lstrip(".")


# Where files of the Hub and of stores go within `not_kept`: below $TMPDIR. Not into the cache, where another process could
# be reading them.
_download_folder: ContextVar[str | None] = ContextVar("_download_folder", default=None)


@contextmanager
def not_kept(address: Any) -> Iterator[None]:
    """Delete after the block what it downloads from the Hub or a store; files in the cache are read there and stay.

    For callers that keep what they make of a volume: the downloads of a data set are larger than its slices. Does nothing
    for other paths.
    """
    if not is_address(address) or address.lower().startswith(("http://", "https://")):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="samf-") as folder:
        token = _download_folder.set(folder)
        try:
            yield
        finally:
            _download_folder.reset(token)


def _limit() -> int:
    text = os.environ.get("SAMF_MAX_DOWNLOAD_BYTES", "")
    try:
        return int(text) if text else _MAX_BYTES
    except ValueError as error:
        raise CTReadError(f"$SAMF_MAX_DOWNLOAD_BYTES={text!r}; expected a whole number of bytes.") from error


def _check_size(address: str, size: int) -> None:
    if size > _limit():
        raise CTReadError(
            f"{redacted(address)}: {size} bytes; at most {_limit()} are fetched. Set $SAMF_MAX_DOWNLOAD_BYTES for more."
        )


# --- The cache --------------------------------------------------------------------------------------------------------


@contextmanager
def _cache_folder(address: str) -> Iterator[Path]:
    """Yield the folder of an address in the cache, which no other process or thread of this machine changes meanwhile."""
    key = hashlib.sha256(address.encode()).hexdigest()[:40]
    root = Path(constants.HF_HOME, "samf")
    lock = root / "locks" / f"{key}.lock"
    with ExitStack() as held:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(WeakFileLock(lock))
        except OSError as error:  # a cache that can't be written; what is in it can be read
            logger.debug("%s: no lock (%s)", lock, error.strerror)
        yield root / "volumes" / key


def _cache_entry(file: Path) -> _CacheEntry | None:
    """Return what the server said about the file in the cache, None where there is no complete one."""
    try:
        entry: _CacheEntry = json.loads((file.parent / _RECORD).read_text(encoding="utf-8"))
        return entry if file.is_dir() or file.stat().st_size == entry["size"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note(file: Path, entry: _CacheEntry) -> None:
    with atomic_path(file.parent / _RECORD) as temporary:
        temporary.write_text(json.dumps(entry), encoding="utf-8")


# --- The web ----------------------------------------------------------------------------------------------------------


def _from_web(address: str, file_name: str) -> Path:
    with _cache_folder(address) as folder:
        return _refreshed_from_web(address, folder / file_name)


def _refreshed_from_web(address: str, file: Path) -> Path:
    entry, name = _cache_entry(file), redacted(address)
    if constants.HF_HUB_OFFLINE:
        if entry is None:
            raise CTReadError(f"{name}: not in the cache, and HF_HUB_OFFLINE is set. Download it once online.")
        return file
    try:
        request = urllib.request.Request(address, headers=_request_headers(entry))
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            _save(address, response, file)
    except urllib.error.HTTPError as error:
        if error.code != 304:  # unchanged
            raise CTReadError(f"{name}: the server says {error.code} {error.reason}. Check the address.") from error
    except CTReadError:
        raise
    except _FETCH_ERRORS as error:
        if entry is None:
            raise CTReadError(
                f"{name}: cannot be fetched ({type(error).__name__}). Check the address and the network."
            ) from error
        logger.warning("%s: cannot be reached; reads the copy in the cache", name)
    return file


def _request_headers(entry: _CacheEntry | None) -> dict[str, str]:
    headers = {"User-Agent": "samf", "Accept-Encoding": "identity"}
    if entry is not None:
        conditions = {"If-None-Match": entry.get("etag"), "If-Modified-Since": entry.get("last-modified")}
        headers |= {name: value for name, value in conditions.items() if value}
    return headers


def _save(address: str, response: Any, file: Path) -> None:
    declared = response.headers.get("Content-Length")
    expected = int(declared) if declared and declared.isdigit() else None
    if expected is not None:
        _check_size(address, expected)
    with atomic_path(file) as temporary:
        with open(temporary, "wb") as out:
            size = _copy(address, response, out)
        if expected is not None and size != expected:
            raise CTReadError(f"{redacted(address)}: received {size} of {expected} bytes. Try again.")
    headers = response.headers
    _note(file, {"size": size, "etag": headers.get("etag"), "last-modified": headers.get("last-modified")})
    logger.info("%s: %d bytes fetched", redacted(address), size)


def _copy(address: str, stream: BinaryIO, out: BinaryIO) -> int:
    size = 0
    while chunk := stream.read(_CHUNK):
        size += len(chunk)
        _check_size(address, size)
        out.write(chunk)
    return size


# --- Object stores ----------------------------------------------------------------------------------------------------


def _from_store(address: str, file_name: str) -> Path:
    address = normalised(address)
    with _cache_folder(address) as folder:
        kept, temporary = folder / file_name, _download_folder.get()
        entry = _cache_entry(kept)
        if constants.HF_HUB_OFFLINE:
            if entry is None:
                raise CTReadError(f"{address}: not in the cache, and HF_HUB_OFFLINE is set. Download it once online.")
            return kept
        try:
            state = stored_state(address, refresh=True)
        except DownloadError as error:
            if entry is None or not error.is_temporary:
                raise
            logger.warning("%s: cannot be reached; reads the copy in the cache", address)
            return kept
        if entry is not None and entry["etag"] == state.digest:
            return kept
        _check_size(address, state.size)
        if temporary is not None:
            kept = Path(tempfile.mkdtemp(dir=temporary), file_name)
            download_stored(address, state, kept)
            return kept
        _save_stored(address, state, kept)
        return kept


def _save_stored(address: str, state: StoredState, kept: Path) -> None:
    """Download a file or folder in place of the copy in the cache."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".") as scratch:
        new = Path(scratch, "new")
        download_stored(address, state, new)
        if kept.is_dir():  # which can't be replaced
            os.replace(kept, Path(scratch, "old"))
        os.replace(new, kept)
    _note(kept, {"size": state.size, "etag": state.digest, "last-modified": None})
    logger.info("%s: %d bytes fetched", address, state.size)


# --- The Hub ----------------------------------------------------------------------------------------------------------


def _hub_file(address: str) -> _HubFile:
    parts = address[len("hf://") :].split("/")
    kind = _REPOSITORY_TYPES.get(parts[0], "model")
    if kind != "model":
        parts = parts[1:]
    if len(parts) < 3 or not all(parts):
        raise CTReadError(
            f"{address}: expected hf://[datasets/]owner/name[@revision]/path of one file. Name the file in full."
        )
    name, _, revision = parts[1].partition("@")
    return {
        "repo_id": f"{parts[0]}/{name}",
        "filename": "/".join(parts[2:]),
        "repo_type": kind,
        "revision": urllib.parse.unquote(revision) or None,
    }


def _from_hub(address: str) -> Path:
    file = _hub_file(address)
    try:
        _check_size(address, _hub_size(file))
        folder = _download_folder.get()
        if folder is not None and not isinstance(try_to_load_from_cache(**file), str):
            return Path(hf_hub_download(**file, local_dir=folder))
        return Path(hf_hub_download(**file))
    except CTReadError:
        raise
    except _HUB_ERRORS as error:
        raise CTReadError(
            f"{address}: cannot be fetched ({type(error).__name__}). Check the name, the network and, for a gated "
            f"repository, that you are logged in (hf auth login)."
        ) from error


def _hub_size(file: _HubFile) -> int:
    """Return the bytes of a file, 0 without a connection: then the copy in the cache is used, if there is one."""
    if constants.HF_HUB_OFFLINE:
        return 0
    try:
        return get_hf_file_metadata(hf_hub_url(**file)).size or 0
    except HfHubHTTPError:
        raise
    except _TRANSPORT_ERRORS:
        return 0
