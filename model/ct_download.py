"""Where volumes lie that are not yet plain files: http(s) and hf:// addresses, and zip files.

What is fetched is kept under the Hugging Face cache and asked for again only if it changed. What is unpacked lies in one
folder, under numbers, or, where a header may name it, under the last part of its name. Both are limited in size.
"""

import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .ct_formats import CTReadError, is_disk_error
from .files_samf import atomic_path

logger = logging.getLogger(__name__)

# 4 GiB holds the largest CT there is, unpacked. $SAMF_MAX_DOWNLOAD_BYTES changes it for addresses.
_MAX_BYTES = 4 << 30
_MAX_MEMBERS = 100_000
# Headers (.mhd, .nhdr, .hdr) name the file with their voxels, or go by its name, which must stay what it is then.
_VOXEL_FILE = re.compile(r"\w[\w.-]{0,99}\.(raw|zraw|img|hdr|bin|gz|bz2)", re.ASCII | re.IGNORECASE)
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 20
# What the Hub's library raises where nobody answers, whichever library it fetches with.
_TRANSPORT_ERRORS = (OSError, *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"))
_KINDS = {"datasets": "dataset", "spaces": "space"}
_FETCH_ERRORS = (urllib.error.URLError, http.client.HTTPException, OSError, ValueError)
# Each stands for a damaged or unreadable member: NotImplementedError for a packing that Python lacks, RuntimeError for
# a password.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)


def is_address(path: Any) -> bool:
    """Whether `path` is an address that `local_copy` fetches."""
    return isinstance(path, str) and path.lower().startswith(("http://", "https://", "hf://"))


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


def shown(address: str) -> str:
    """An address as messages may show it: without user, password and query, which may hold keys."""
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError:  # no address at all
        return address.partition("?")[0].rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def local_copy(address: str) -> Path:
    """Fetches one file into the cache, unless it is there and unchanged.

    Args:
        address: http(s)://…, or hf://[datasets/|spaces/]owner/name[@revision]/path of a file in a repository.

    Returns:
        The file's path in the cache. Don't change it.

    Raises:
        CTReadError: not reachable, not there, too large, or cut short.
    """
    if address.lower().startswith("hf://"):
        return _from_hub(address)
    return _from_web(address)


# Where the Hub's files go within `not_kept`: below $TMPDIR. Not the cache, where another process could be reading them.
_passing: ContextVar[str | None] = ContextVar("_passing", default=None)


@contextmanager
def not_kept(address: Any) -> Iterator[None]:
    """What the block fetches of this address on the Hub is deleted afterwards; what the cache has is read there and stays.

    For who keeps what was made of it: a data set's downloads are larger than its slices. Does nothing for other paths.
    """
    if not (is_address(address) and address.lower().startswith("hf://")):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="samf-") as folder:
        token = _passing.set(folder)
        try:
            yield
        finally:
            _passing.reset(token)


def _limit() -> int:
    text = os.environ.get("SAMF_MAX_DOWNLOAD_BYTES", "")
    try:
        return int(text) if text else _MAX_BYTES
    except ValueError as error:
        raise CTReadError(f"$SAMF_MAX_DOWNLOAD_BYTES={text!r}; expected a whole number of bytes.") from error


def _check_size(address: str, size: int) -> None:
    if size > _limit():
        raise CTReadError(
            f"{shown(address)}: {size} bytes; at most {_limit()} are fetched. Set $SAMF_MAX_DOWNLOAD_BYTES for more."
        )


# -------------------------------------------------------------------------------------------------------------- the web


def _from_web(address: str) -> Path:
    folder = Path(constants.HF_HOME, "samf", "volumes", hashlib.sha256(address.encode()).hexdigest()[:40])
    file, record = folder / "volume", _record(folder)
    if constants.HF_HUB_OFFLINE:
        if record is None:
            raise CTReadError(f"{shown(address)}: not in the cache, and HF_HUB_OFFLINE is set. Fetch it once online.")
        return file
    headers = {"User-Agent": "samf", "Accept-Encoding": "identity"}
    for name, key in (("If-None-Match", "etag"), ("If-Modified-Since", "last-modified")):
        if record is not None and record.get(key):
            headers[name] = record[key]
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=_TIMEOUT) as response:
            _save(address, response, folder)
    except urllib.error.HTTPError as error:
        if error.code != 304:
            raise CTReadError(
                f"{shown(address)}: the server says {error.code} {error.reason}. Check the address."
            ) from error
    except CTReadError:
        raise
    except _FETCH_ERRORS as error:
        if record is None:
            raise CTReadError(
                f"{shown(address)}: cannot be fetched ({type(error).__name__}). Check the address and the network."
            ) from error
        logger.warning("%s: cannot be reached; reads the copy in the cache", shown(address))
    return file


def _record(folder: Path) -> dict[str, str] | None:
    """What the server said of the file that lies in the cache, None where there is no whole one."""
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        return record if (folder / "volume").stat().st_size == record["size"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save(address: str, response: Any, folder: Path) -> None:
    declared = response.headers.get("Content-Length")
    expected = int(declared) if declared and declared.isdigit() else None
    if expected is not None:
        _check_size(address, expected)
    with atomic_path(folder / "volume") as temporary:
        with open(temporary, "wb") as out:
            size = _copy(address, response, out)
        if expected is not None and size != expected:
            raise CTReadError(f"{shown(address)}: {size} of {expected} bytes came. Try again.")
    record = {"size": size, **{key: response.headers.get(key) for key in ("etag", "last-modified")}}
    with atomic_path(folder / "record.json") as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")
    logger.info("%s: %d bytes fetched", shown(address), size)


def _copy(address: str, stream: BinaryIO, out: BinaryIO) -> int:
    size = 0
    while chunk := stream.read(_CHUNK):
        size += len(chunk)
        _check_size(address, size)
        out.write(chunk)
    return size


# -------------------------------------------------------------------------------------------------------------- the Hub


def _hub_file(address: str) -> dict[str, Any]:
    """What the Hub's library takes: repository, its kind, revision, file. Raises CTReadError where one is missing."""
    parts = address[len("hf://") :].split("/")
    kind = _KINDS.get(parts[0], "model")
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
    where = _hub_file(address)
    try:
        _check_size(address, _hub_size(where))
        passing = _passing.get()
        if passing is not None and not isinstance(try_to_load_from_cache(**where), str):
            return Path(hf_hub_download(**where, local_dir=passing))
        return Path(hf_hub_download(**where))
    except CTReadError:
        raise
    except (*_TRANSPORT_ERRORS, HFValidationError, ValueError) as error:
        raise CTReadError(
            f"{address}: cannot be fetched ({type(error).__name__}). Check the name, the network and, for a gated "
            f"repository, that you are logged in (hf auth login)."
        ) from error


def _hub_size(where: dict[str, Any]) -> int:
    """Bytes of the file, 0 where nobody can be asked: then the copy in the cache is taken, if there is one."""
    if constants.HF_HUB_OFFLINE:
        return 0
    try:
        return get_hf_file_metadata(hf_hub_url(**where)).size or 0
    except HfHubHTTPError:
        raise
    except _TRANSPORT_ERRORS:
        return 0


# ------------------------------------------------------------------------------------------------------------------ zip


def unpack_zip(path: Path, folder: Path) -> list[Path]:
    """Unpacks a zip's files into `folder`: under numbers instead of their names, which could lead anywhere, but for those
    of plain words that a header beside them may tell of.

    Raises:
        CTReadError: damaged, encrypted, more than 4 GiB or 100,000 files once unpacked, or no room for them.
    """
    files, size = [], 0
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            claimed = sum(info.file_size for info in members)
            if len(members) > _MAX_MEMBERS or claimed > _MAX_BYTES:
                raise CTReadError(
                    f"{path}: {len(members)} files, {claimed} bytes unpacked; expected at most {_MAX_MEMBERS} and "
                    f"{_MAX_BYTES}. Unpack it yourself and name the folder of one study."
                )
            for number, info in enumerate(members):
                name = info.filename.replace("\\", "/").rpartition("/")[2]
                kept = _VOXEL_FILE.fullmatch(name) and not (folder / name).exists()
                files.append(folder / (name if kept else f"{number:06d}"))
                with archive.open(info) as stream, open(files[-1], "wb") as out:
                    shutil.copyfileobj(stream, out, _CHUNK)  # zipfile gives no more than the member's size
                size += files[-1].stat().st_size
                if size > _MAX_BYTES:
                    raise CTReadError(f"{path}: unpacks to more than {_MAX_BYTES} bytes. Unpack it yourself.")
    except CTReadError:
        raise
    except _ZIP_ERRORS as error:
        if is_disk_error(error):
            raise CTReadError(
                f"{path}: cannot be unpacked into {folder} ({error.strerror}). Free space there or set $TMPDIR."
            ) from error
        secret = isinstance(error, RuntimeError) and "password" in str(error)
        what = "is encrypted" if secret else f"is damaged ({type(error).__name__})"
        raise CTReadError(f"{path}: this zip {what}. Unpack it yourself, or write it anew.") from error
    return files
