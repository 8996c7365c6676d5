"""Who is at work on what, among processes that share a folder and know nothing else of each other."""

import errno
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@functools.cache
def _warn_of_no_locks(path: Path, reason: str) -> None:
    """Once a process, not once a volume."""
    logger.warning("%s: this file system has no locks (%s)", path, reason)


class EntryLocks:
    """EntryLocks on records by name: each is a lock on one byte of one file, at the place that the name gives.

    The kernel takes a lock back in the moment in which its process ends, however it ends, and an orphan that still works
    still has it. So no claim is ever stale, and none needs a heartbeat or a clock, unlike claim files, of which a killed
    run leaves some that others must judge and take over without a race. NFS hands such locks to its server (version 4:
    back within a minute or two when a machine goes down), as do the cluster file systems that are mounted with locks.
    Where there are none, or they hold for one machine alone, several machines need disjoint shards of the work; without
    them two may make the same record, which costs time but no harm, since records are renamed into place.

    Picklable and safe to fork: a lock belongs to the process that takes it. Within one process it excludes nobody.

    Args:
        path: the file, empty for ever; made if it is missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, int] | None = None  # process, file descriptor

    def __getstate__(self) -> dict:
        return {"path": self.path, "_opened": None}

    @contextmanager
    def hold(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Whether the claim on `name`, a hexadecimal number, is this process's within the block.

        `wait`: until whoever has it lets it go.
        """
        file, place = self._file(), int(name[:15], 16)  # below 2^60: file positions have 63 bits
        held = self._lock(file, place, wait)
        try:
            yield held
        finally:
            if held:
                self._unlock(file, place)

    def _file(self) -> int:
        if self._opened is None or self._opened[0] != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Never closed: that would let go all locks of this process on the file.
            self._opened = os.getpid(), os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return self._opened[1]

    def _lock(self, file: int, place: int, wait: bool) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno not in _NO_LOCKS:
                raise
            _warn_of_no_locks(self.path, error.strerror)
        return True

    @staticmethod
    def _unlock(file: int, place: int) -> None:
        try:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, place)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
