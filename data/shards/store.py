"""Volumes from shards: shards are fetched into a folder of limited size, and mapped there."""

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from samf.cache.entries import Arrays, map_member
from samf.cache.locks import EntryLocks
from samf.data.schema import VolumeLike
from samf.data.shards.index import ShardFile, ShardIndex, ShardsError
from samf.data.shards.packing import file_sha256
from samf.data.shards.storage import Storage
from samf.model.ct_volume import VolumeRef
from samf.utils.files import TEMPORARY_SUFFIX

logger = logging.getLogger(__name__)

_TRIES = 3
_PAUSE = 1.0  # seconds before the second try, doubled each time
_ABANDONED = 3600  # seconds without a write, after which a temporary file is a killed run's
_ROOM = "0"  # the lock under which shards are evicted


class ShardStore:
    """The volumes of packed shards, for the collator.

    Processes of a machine share the folder: each shard is fetched by one of them while the others wait, compared with its
    checksum, and evicted when room is needed, the least recently used first. Shards in a local folder are mapped where they
    are. Can be pickled and forked.

    Args:
        storage: where the shards are.
        index: their index.
        folder: for fetched shards.
        limit: most bytes of the folder. What the shuffling window needs must fit; see `samf.training.shard_order`.

    Attributes:
        fetched: shards that this process has fetched.
    """

    def __init__(self, storage: Storage, index: ShardIndex, folder: Path, limit: int):
        self.storage, self.index, self.limit = storage, index, limit
        self.folder = folder / index.identity()
        self.shards: list[ShardFile] = index.shards
        self.fetched = 0
        self._places: Mapping[str, tuple[int, int, int]] = {
            member.volume: (number, member.start, member.size)
            for number, shard in enumerate(index.shards)
            for member in shard.members
        }
        self._locks = EntryLocks(self.folder / ".lock")
        self._threads: tuple[int, defaultdict[int, threading.Lock]] | None = None  # process id, locks

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_threads": None}

    def get(self, volume: VolumeLike, /) -> Arrays:
        """Return read-only memory maps of a volume's entry; its shard is fetched if it isn't there.

        Raises:
            ShardsError: the shards don't have this volume.
            OSError: the shard can't be fetched, or is damaged.
        """
        path = VolumeRef.of(volume).path
        if path not in self._places:
            raise ShardsError(f"{path}: not in the shards of {self.storage.shown}.")
        number, start, size = self._places[path]
        if not self.storage.is_remote:
            return map_member(self.storage.local(self.shards[number].name), start, size)
        while True:
            file = self.fetch(number)
            try:
                os.utime(file)  # for eviction: used now
                return map_member(file, start, size)
            except FileNotFoundError:
                continue  # evicted meanwhile

    def number_of(self, volume: str) -> int:
        """Return the number of a volume's shard."""
        return self._places[volume][0]

    def fetch(self, number: int, wait: bool = True) -> Path:
        """Return the local path of a shard, after fetching it if it isn't there.

        Args:
            number: of the shard.
            wait: whether to wait for another process that fetches it; if not, the path may not exist yet.

        Raises:
            OSError: it can't be fetched, or is damaged.
        """
        shard = self.shards[number]
        file = self.folder / shard.name
        if file.exists() or not self.storage.is_remote:
            return file
        # The kernel's lock keeps processes apart, the other one threads of this process.
        with self._thread_lock(number), self._locks.hold(shard.sha256, wait=wait) as held:
            if held and not file.exists():
                self._fetch(shard, file)
        return file

    def _thread_lock(self, number: int) -> threading.Lock:
        if self._threads is None or self._threads[0] != os.getpid():  # a lock may have been held when this one forked
            self._threads = os.getpid(), defaultdict(threading.Lock)
        return self._threads[1][number]

    def _fetch(self, shard: ShardFile, file: Path) -> None:
        pause = _PAUSE
        arrived = file.with_name(f".{file.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        for left in reversed(range(_TRIES)):
            try:
                self._make_room(shard.size, arrived)
                self.storage.get(shard.name, arrived)
                self._check(shard, arrived)
                os.replace(arrived, file)
                self.fetched += 1
                return
            except OSError as error:
                if not left:
                    raise
                logger.warning("%s; fetched again", error)
                time.sleep(pause)
                pause *= 2
            finally:
                arrived.unlink(missing_ok=True)

    def _check(self, shard: ShardFile, arrived: Path) -> None:
        found = file_sha256(arrived)
        if found != shard.sha256:
            raise OSError(
                f"{self.storage.shown}/{shard.name}: {arrived.stat().st_size} bytes with SHA-256 {found[:12]}…; the index "
                f"says {shard.size} bytes with {shard.sha256[:12]}…. Were the shards packed again?"
            )

    def _make_room(self, needed: int, arriving: Path) -> None:
        """Delete the least recently used shards until `needed` bytes fit, and reserve the room by an empty file."""
        with self._thread_lock(-1), self._locks.hold(_ROOM, wait=True):
            files, largest = [], max(shard.size for shard in self.shards)
            total = 0
            for file in self.folder.parent.glob("*/*"):  # of other shards too: one limit for the folder
                with suppress(FileNotFoundError):
                    stat = file.stat()
                    if not file.name.startswith("."):
                        files.append((stat.st_mtime, stat.st_size, file))
                    elif file.suffix == TEMPORARY_SUFFIX and time.time() - stat.st_mtime > _ABANDONED:
                        file.unlink()
                    elif file.suffix == TEMPORARY_SUFFIX:
                        total += largest  # what another process is fetching
            total += sum(size for _, size, _ in files)
            for _, size, file in sorted(files):
                if total + needed <= self.limit:
                    break
                if file.suffix == ".tar":
                    file.unlink(missing_ok=True)
                    total -= size
            arriving.touch()
