"""A folder, or a prefix of an object store: where shards are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from samf.model.ct_download import redacted
from samf.model.ct_object_store import explain_store_error, is_store_address
from samf.utils.files import atomic_write


def is_remote(address: str) -> bool:
    """Return whether files at an address have to be fetched before they can be mapped."""
    return "://" in address and not address.lower().startswith("file://")


class Storage:
    """Named files in a local folder, or below an address that fsspec knows, such as s3://bucket/prefix.

    Can be pickled and used in forked processes: each opens a connection of its own.

    Args:
        address: the folder or the address. Credentials and the endpoint are those of the environment.
    """

    def __init__(self, address: str | os.PathLike[str]):
        self.address = os.fspath(address).rstrip("/")
        self.is_remote = is_remote(self.address)
        self.shown = redacted(self.address) if self.is_remote else self.address
        self._opened: tuple[int, Any, str] | None = None  # process id, file system, root

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    def _open(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                system, root = fsspec.core.url_to_fs(self.address if self.is_remote else str(self.local("")))
            except (ImportError, ValueError) as error:
                known = is_store_address(self.address)
                raise ImportError(
                    str(explain_store_error(self.shown, error)) if known else f"{self.shown}: {error}"
                ) from error
            self._opened = os.getpid(), system, root.rstrip("/")
        return self._opened[1], self._opened[2]

    @contextmanager
    def _as_os_error(self, name: str) -> Iterator[None]:
        """Turn errors of a store's own library (no credentials, no connection) into an OSError that names the file.

        Volumes in stores have the same errors, see `samf.model.ct_object_store`.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, PermissionError):
                raise  # a missing file, a full disk, no connection: says what it is
            if is_store_address(self.address):
                raise OSError(str(explain_store_error(f"{self.shown}/{name}", error))) from error
            raise OSError(f"{self.shown}/{name}: {type(error).__name__}: {error}") from error

    def local(self, name: str) -> Path:
        """Return the path of a file of a local folder."""
        return Path(self.address.removeprefix("file://")).expanduser().absolute() / name

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it can't be read.
        """
        system, root = self._open()
        with self._as_os_error(name):
            content: bytes = system.cat_file(f"{root}/{name}")
        return content

    def exists(self, name: str) -> bool:
        """Return whether there is such a file now."""
        system, root = self._open()
        system.invalidate_cache()
        return bool(system.exists(f"{root}/{name}"))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file; it appears whole."""
        if self.is_remote:
            system, root = self._open()
            system.pipe_file(f"{root}/{name}", content)
        else:
            atomic_write(self.local(name), content)

    def put(self, file: Path, name: str) -> None:
        """Store a local file and delete it; it appears whole: an object store shows no object before it is complete."""
        if self.is_remote:
            system, root = self._open()
            system.put_file(str(file), f"{root}/{name}")
            file.unlink()
        else:
            self.local(name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, self.local(name))

    def get(self, name: str, file: Path) -> None:
        """Fetch a file.

        Args:
            name: of the stored file.
            file: the local path to write: a temporary one, which may be incomplete after an error.

        Raises:
            OSError: it can't be fetched.
        """
        system, root = self._open()
        with self._as_os_error(name):
            system.get_file(f"{root}/{name}", str(file))

    def remove(self, name: str) -> None:
        """Delete a file."""
        system, root = self._open()
        system.rm_file(f"{root}/{name}")
