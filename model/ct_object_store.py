"""Files and folders in object stores: s3:// and gs:// addresses, through fsspec with s3fs or gcsfs, which are optional.

Credentials, regions and endpoints are those libraries' own: profiles and variables (AWS_PROFILE, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, …) and fsspec's configuration. None of them comes into a message.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .ct_common import CTReadError, DownloadError

# Schemes of addresses, and the packages that fsspec needs for them.
STORES = {"s3": "s3fs", "gs": "gcsfs"}
_TAGS = ("ETag", "etag", "generation")  # what a store calls the version of an object's content
_MAX_OBJECTS = 100_000  # of one folder
_ACCESS_ERRORS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "RefreshError")
_ACCESS_STATUS = (401, 403)


class StoredFile(NamedTuple):
    """One object.

    Attributes:
        name: its path below the folder; "" where it is the volume itself.
        size: bytes.
        tag: changes with the content.
    """

    name: str
    size: int
    tag: str


@dataclass(frozen=True)
class StoredState:
    """What a store says about a file or folder.

    Attributes:
        files: the objects, in the order of their names.
        is_folder: there is no object of this name, but some below it.
    """

    files: tuple[StoredFile, ...]
    is_folder: bool

    @property
    def size(self) -> int:
        """Return the bytes of all objects."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """Return a digest that changes with the content."""
        return hashlib.sha256(json.dumps([self.is_folder, self.files]).encode()).hexdigest()[:40]


# What is known of addresses in this process. One request per volume and run, also where workers are forked from it later.
_states: dict[str, StoredState] = {}


def is_store_address(path: Any) -> bool:
    """Return whether `path` is the address of a file or folder in an object store."""
    return isinstance(path, str) and path.partition("://")[0].lower() in STORES and "://" in path


def stored_state(address: str, refresh: bool = False) -> StoredState:
    """Return what a store says about a file or folder; it is asked once per process.

    Args:
        address: s3:// or gs://bucket/path.
        refresh: ask again.

    Raises:
        DownloadError: there is nothing, no access or no connection.
        CTReadError: the package for this store is missing.
    """
    address = normalised(address)
    state = _states.get(address)
    if state is None or refresh:
        try:
            state = _ask(address)
        except Exception as error:  # each store's libraries have exceptions of their own
            raise explain_store_error(address, error) from error
        _states[address] = state
    return state


def has_stored(address: str) -> bool:
    """Return whether there is a file or folder of this address; asks the store each time.

    Raises:
        DownloadError: no access or no connection.
    """
    address = normalised(address)
    try:
        _file_system(address).info(address)
    except Exception as error:
        explained = explain_store_error(address, error)
        if isinstance(explained, DownloadError) and not explained.is_temporary:
            return False
        raise explained from error
    return True


def stored_names(address: str) -> set[str]:
    """Return the names of the files and folders in a folder; none where there is no such folder.

    Args:
        address: s3:// or gs://bucket[/path].

    Raises:
        DownloadError: no access, no connection or no such bucket.
    """
    address = normalised(address)
    try:
        found = _file_system(address).ls(address, detail=False)
    except FileNotFoundError as error:
        explained = explain_store_error(address, error)
        if "there is no bucket" in str(explained):
            raise explained from error
        return set()
    except Exception as error:
        raise explain_store_error(address, error) from error
    return {path.rstrip("/").rpartition("/")[2] for path in found}


def list_stored(address: str) -> list[StoredFile]:
    """Return all objects below a folder, at any depth and by name, and remember the state of each.

    Args:
        address: s3:// or gs://bucket[/path].

    Raises:
        DownloadError: see `stored_state`.
    """
    address = normalised(address)
    try:
        files = _objects_below(address)
    except Exception as error:
        raise explain_store_error(address, error) from error
    for file in files:
        _states[f"{address}/{file.name}"] = StoredState((StoredFile("", file.size, file.tag),), is_folder=False)
    return files


def known_states() -> dict[str, StoredState]:
    """Return what this process knows of addresses, for `remember_states` in another one."""
    return dict(_states)


def remember_states(states: dict[str, StoredState]) -> None:
    """Take over what another process knows of addresses, so that a store is asked once for all of them."""
    _states.update(states)


def remember_folder(address: str, files: Sequence[StoredFile]) -> None:
    """Remember the state of a folder from a listing that holds all of its objects.

    Args:
        address: the folder.
        files: its objects; names are relative to it.
    """
    _states[normalised(address)] = StoredState(tuple(files), is_folder=True)


def read_stored_head(address: str, size: int) -> bytes:
    """Return the first bytes of an object.

    Args:
        address: the object.
        size: how many bytes.

    Raises:
        DownloadError: see `stored_state`.
    """
    try:
        head: bytes = _file_system(address).cat_file(address, start=0, end=size)
    except Exception as error:
        raise explain_store_error(address, error) from error
    return head


def download_stored(address: str, state: StoredState, target: Path) -> None:
    """Download a file, or a folder with all objects below it.

    Args:
        address: s3:// or gs://bucket/path.
        state: what the store says about it now.
        target: the file or folder to write; it doesn't exist yet.

    Raises:
        DownloadError: see `stored_state`; or the content changed meanwhile.
        CTReadError: a name that can't be a path, or too many objects.
        OSError: the disk is full, or can't be written.
    """
    address = normalised(address)
    places = _places(address, state, target)
    for folder in {place.parent for place in places.values()}:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        # Lists in, lists out: s3fs and gcsfs then fetch several at a time.
        _file_system(address).get(list(places), [str(place) for place in places.values()])
    except Exception as error:
        raise explain_store_error(address, error) from error
    # Large objects are fetched in parts, each by a request of its own: parts of two versions would fit together.
    changed = [place for place, file in zip(places.values(), state.files, strict=True) if _size(place) != file.size]
    if changed or stored_state(address, refresh=True) != state:
        raise DownloadError(f"{address}: changed while it was fetched. Wait until it is written, then try again.")


def _places(address: str, state: StoredState, target: Path) -> dict[str, Path]:
    """Return {address of each object: its local path}."""
    if not state.is_folder:
        return {address: target}
    if len(state.files) > _MAX_OBJECTS:
        raise CTReadError(
            f"{address}: a folder of {len(state.files)} objects; expected one volume, at most {_MAX_OBJECTS}. "
            f"Name the folder of one series."
        )
    target.mkdir(parents=True)
    for file in state.files:
        if ".." in file.name.split("/") or "\\" in file.name or "\0" in file.name:
            raise CTReadError(f'{address}: an object\'s name holds ".." or "\\". Rename it, or name another folder.')
    return {f"{address}/{file.name}": target / file.name for file in state.files}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def normalised(address: str) -> str:
    """Return an address with its scheme in lower case and without slashes at its end.

    Raises:
        CTReadError: it names no bucket.
    """
    scheme, _, path = address.partition("://")
    if path[:1] in ("", "/"):
        raise CTReadError(f"{address}: names no bucket; expected {scheme.lower()}://bucket/path.")
    return f"{scheme.lower()}://{path.rstrip('/')}"


def _file_system(address: str) -> Any:
    """Return the fsspec file system of an address: this process's own, also after a fork, and without old listings."""
    scheme = address.partition("://")[0].lower()
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise explain_store_error(address, error) from error


def _ask(address: str) -> StoredState:
    found = _file_system(address).info(address)
    if found["type"] != "directory":
        return StoredState((_described(found, ""),), is_folder=False)
    files = _objects_below(address)
    if not files:
        raise FileNotFoundError(address)
    return StoredState(tuple(files), is_folder=True)


def _objects_below(address: str) -> list[StoredFile]:
    """Return the objects below a folder by name, without hidden ones and the empty ones that stand for folders."""
    file_system = _file_system(address)
    root = file_system._strip_protocol(address).strip("/")
    found = file_system.find(address, detail=True)
    names = {path.strip("/")[len(root) :].strip("/"): path for path in found if not path.endswith("/")}
    visible = sorted(name for name in names if name and not any(part[:1] == "." for part in name.split("/")))
    if not found:
        file_system.info(address)  # raises, where there is no such bucket or folder
    return [_described(found[names[name]], name) for name in visible]


def _described(info: dict[str, Any], name: str) -> StoredFile:
    tag = next((str(info[key]).strip('"') for key in _TAGS if info.get(key)), "")
    return StoredFile(name, int(info["size"] or 0), tag)


def explain_store_error(address: str, error: Exception) -> CTReadError:
    """Return an error that says what to do for an error of a store's libraries, whose own texts may quote requests.

    Args:
        address: s3:// or gs://, as it may be shown.
        error: what was raised at it.
    """
    if isinstance(error, CTReadError):
        return error
    if isinstance(error, ImportError):
        scheme = address.partition("://")[0].lower()
        return CTReadError(f"{address}: {scheme}:// addresses need {STORES[scheme]}: pip install {STORES[scheme]}")
    chain = _chain(error)
    names = [type(cause).__name__ for cause in chain]
    bucket = address.partition("://")[2].partition("/")[0]
    if any(isinstance(cause, FileNotFoundError) for cause in chain):
        is_bucket = "bucket" in str(error).lower() and "exist" in str(error).lower()
        what = f"there is no bucket {bucket}" if is_bucket else "there is no such file or folder"
        return DownloadError(f"{address}: {what}. Check the address.", is_temporary=False)
    if any(isinstance(cause, PermissionError) for cause in chain) or _is_refused(chain, names):
        return DownloadError(
            f"{address}: no access ({names[0]}). Check the credentials: {_credentials(address)}. A public bucket: "
            f"{_anonymous(address)}."
        )
    system = next((cause.strerror for cause in chain if isinstance(cause, OSError) and cause.strerror), None)
    reason = f"{names[-1]}: {system}" if system else names[-1]
    return DownloadError(f"{address}: cannot be fetched ({reason}). Check the address, the endpoint and the network.")


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and its causes."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    return chain


def _is_refused(chain: Sequence[BaseException], names: Sequence[str]) -> bool:
    status = {getattr(cause, "code", None) or getattr(cause, "status", None) for cause in chain}
    return bool(status & set(_ACCESS_STATUS)) or any(name in _ACCESS_ERRORS for name in names)


def _credentials(address: str) -> str:
    if address.startswith("gs://"):
        return "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS"
    return "AWS_PROFILE, AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL of another store than AWS"


def _anonymous(address: str) -> str:
    return "FSSPEC_GS_TOKEN=anon" if address.startswith("gs://") else "FSSPEC_S3_ANON=true"
