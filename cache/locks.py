"""Advisory per-entry file locks for processes that share a cache directory."""

import errno
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

# Error numbers of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@functools.cache  # once per process, not once per volume
def _warn_of_no_locks(path: Path, reason: str | None) -> None:
    logger.warning("%s: this file system has no locks (%s)", path, reason)


class EntryLocks:
    """Locks on entries by name: each is a lock on one byte of a common file, at the offset that the name gives.

    The kernel releases a lock when its process ends, however it ends, and an orphaned worker keeps its lock while it runs
    (on Linux it ends with its parent).
    So no lock is ever stale, and none needs a heartbeat or a clock, unlike lock files, which a killed run leaves behind and
    others must judge and take over without a race. NFS passes such locks to its server (version 4: released within a minute
    or two when a machine goes down), as do cluster file systems that are mounted with locks. Without such support, or
    where locks are valid on one machine only, several machines need disjoint shards of the work; otherwise two may make
    the same entry, which wastes time but does no harm, since entries are written atomically.

    Can be pickled and forked: a lock belongs to the process that takes it, and doesn't exclude other threads of it.

    Args:
        path: the common file, which stays empty; it is created if it is missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, int] | None = None  # process id, file descriptor

    def __getstate__(self) -> dict[str, Path | None]:
        return {"path": self.path, "_opened": None}

    @contextmanager
    def hold(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Hold the lock on an entry within the block; yield whether this process has it.

        Args:
            name: the entry's name, a hexadecimal number.
            wait: whether to wait until the process that has the lock releases it.
        """
        file, offset = self._file(), int(name[:15], 16)  # below 2^60: file offsets have 63 bits
        held = self._lock(file, offset, wait)
        try:
            yield held
        finally:
            if held:
                self._unlock(file, offset)

    def _file(self) -> int:
        if self._opened is None or self._opened[0] != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Never closed: that would release all locks of this process on the file.
            self._opened = os.getpid(), os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return self._opened[1]

    def _lock(self, file: int, offset: int, wait: bool) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, offset)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno not in _NO_LOCKS:
                raise
            _warn_of_no_locks(self.path, error.strerror)
        return True

    @staticmethod
    def _unlock(file: int, offset: int) -> None:
        try:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, offset)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
