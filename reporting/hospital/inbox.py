"""What series come from: what the worker asks of the listener's folders and of a watched folder alike."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_KEY_LENGTH = 16


@dataclass(frozen=True)
class Fingerprint:
    """The state of a series on disk; it changes when a file comes, goes or is replaced.

    Attributes:
        digest: of the files' names, sizes and times of change.
        files: how many there are.
    """

    digest: str
    files: int


class Inbox(Protocol):
    """Series on disk, each under a key that says nothing about the patient.

    Attributes:
        discards: whether images are removed some time after their report, so that fewer of them are no whole series.
    """

    discards: bool

    def present(self) -> Iterator[str]:
        """Yield the keys of all series that are on disk."""
        ...

    def fingerprint(self, key: str) -> Fingerprint | None:
        """Return the state of a series; None if there is none."""
        ...

    def opened(self, key: str) -> AbstractContextManager[Path]:
        """Give the path of a series for the report pipeline."""
        ...

    def origin(self, key: str) -> Path:
        """Return the path of a series by which people know it."""
        ...

    def name(self, key: str) -> str:
        """Return the name of a series for people: its SeriesInstanceUID, or that of its file or folder."""
        ...

    def aside(self, key: str) -> Path:
        """Return where `set_aside` keeps a series."""
        ...

    def set_aside(self, key: str, state: Fingerprint) -> None:
        """Keep a series that can't be reported where a person finds it, unless it has changed meanwhile."""
        ...

    def reopen(self, key: str) -> None:
        """Take a series back from those that were set aside."""
        ...

    def discard(self, key: str, digest: str) -> None:
        """Remove the images of a reported series, unless they have changed meanwhile."""
        ...


def make_key(name: str) -> str:
    """Return the key of a series: a digest, which file names and log lines may hold."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_KEY_LENGTH]


def fingerprint_of(files: Iterable[tuple[str, os.stat_result]]) -> Fingerprint:
    """Return the fingerprint of files, given by name and state."""
    listed = sorted((name, state.st_size, state.st_mtime_ns) for name, state in files)
    return Fingerprint(hashlib.sha256(repr(listed).encode("utf-8", "surrogatepass")).hexdigest(), len(listed))
