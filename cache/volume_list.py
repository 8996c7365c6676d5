"""List of the volumes of a run, with the names of their cache entries, and its division into shards."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from samf.cache.volume_identity import Identity, identity_bytes, volume_identity
from samf.model.ct_common import DownloadError
from samf.model.ct_download import is_address, redacted
from samf.model.ct_object_store import is_store_address
from samf.model.ct_volume import CTReadError, NotCTError, VolumeRef

STAT_THREADS = 16  # on a network file system they mostly wait
_PART = 64  # volumes that a thread looks up at once
_MOST_WAITED, _MOST_FOR_ONE = 0.05, 1e-4  # s, of all volumes and of each, beyond which threads look them up
_MOST_UNREACHED = 20  # volumes that a store doesn't give, and none before, after which the rest isn't tried
NOT_CT = NotCTError.__name__  # error of an intact file that is no CT


class Store(Protocol):
    """Cache that names its entries: `SliceCache` or `EmbeddingCache`."""

    def namer(self) -> Callable[[VolumeRef, Identity], str]:
        """Return the function that names the entries of volumes."""
        ...


@dataclass(frozen=True)
class Volume:
    """One volume of the list.

    Attributes:
        ref: its path or address, and its rescale.
        key: name of its entry; None if the volume can't be accessed.
        bytes: total size of its files.
        problem: why it can't be accessed.
        searched: whether it was found in a folder instead of being named.
        is_unreached: whether the problem may be temporary, such as a store that doesn't answer.
    """

    ref: VolumeRef
    key: str | None
    bytes: int = 0
    problem: str = ""
    searched: bool = False
    is_unreached: bool = False

    @property
    def path(self) -> str:
        """Return its path or address."""
        return self.ref.path

    @property
    def label(self) -> str:
        """Return its path, or its address without what may be a key; for messages and lists."""
        return redacted(self.path) if is_address(self.path) else self.path

    @property
    def name(self) -> str:
        """Return the name of its entry.

        Raises:
            ValueError: the volume can't be accessed.
        """
        if self.key is None:
            raise ValueError(f"{self.label} has no entry: {self.problem}")
        return self.key

    def is_passed_over(self, error: str) -> bool:
        """Return whether this error is not a failure: a file that was found by searching is no CT."""
        return self.searched and error == NOT_CT


@dataclass(frozen=True)
class Shard:
    """Part of the list that one process works on: every `count`-th volume, starting with number `index` (from 0)."""

    index: int = 0
    count: int = 1

    @classmethod
    def choose(cls, text: str | None, environment: Mapping[str, str]) -> "Shard":
        """Return the part of `--shard 3/16` (1/16 to 16/16) that the rank under `torchrun` or `accelerate launch` has.

        Args:
            text: the option's value; None is 1/1.
            environment: the environment variables.

        Raises:
            ValueError: the text has another form.
        """
        number, _, count = (text or "1/1").partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ValueError(f"--shard {text}: expected a number and how many there are, 1/16 to 16/16.")
        rank, ranks = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        return cls((int(number) - 1) * ranks + rank, int(count) * ranks)

    def of(self, volumes: Sequence[Volume]) -> list[Volume]:
        """Return the volumes of this shard."""
        return list(volumes[self.index :: self.count])

    def __str__(self) -> str:
        return f"{self.index + 1}of{self.count}"


def inspect_volumes(volumes: Sequence[VolumeRef], store: Store, searched: Collection[str] = ()) -> list[Volume]:
    """Return the list with the names of its entries, in order; reads the volumes' directories, not their contents.

    Args:
        volumes: the volumes of the run.
        store: names the entries.
        searched: paths that were found in folders instead of being named.

    Raises:
        DownloadError: object stores give none of the volumes, which would take minutes to hear for each.
    """
    searched = frozenset(searched)
    unreached: list[DownloadError] = []
    reached: list[str] = []
    name = store.namer()

    def no_answer() -> bool:
        return len(unreached) >= _MOST_UNREACHED and not reached

    def inspect(volume: VolumeRef) -> Volume:
        is_searched = volume.path in searched
        try:
            if no_answer():
                raise unreached[0]
            identity = volume_identity(volume.path)
        except DownloadError as error:
            if error.is_temporary:
                unreached.append(error)
            problem = str(error)
            return Volume(volume, None, problem=problem, searched=is_searched, is_unreached=error.is_temporary)
        except CTReadError as error:
            return Volume(volume, None, problem=str(error), searched=is_searched)
        if is_store_address(volume.path) and not reached:
            reached.append(volume.path)
        return Volume(volume, name(volume, identity), identity_bytes(identity), searched=is_searched)

    listed = _mapped(inspect, volumes)
    if no_answer():
        raise unreached[0]
    return listed


def _mapped(inspect: Callable[[VolumeRef], Volume], volumes: Sequence[VolumeRef]) -> list[Volume]:
    """Return what `inspect` returns for each volume: in this thread while that is fast, and in others once it waits.

    On a local disk threads only hinder each other.
    """
    listed: list[Volume] = []
    started = time.perf_counter()
    for volume in volumes:
        listed.append(inspect(volume))
        if time.perf_counter() - started > _MOST_WAITED + _MOST_FOR_ONE * len(listed):
            break
    left = volumes[len(listed) :]
    parts = [left[start : start + _PART] for start in range(0, len(left), _PART)]
    if parts:
        with ThreadPoolExecutor(STAT_THREADS) as threads:
            listed += chain.from_iterable(threads.map(lambda part: list(map(inspect, part)), parts))
    return listed
