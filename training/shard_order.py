"""The order of records that are streamed from shards: random, while each shard is needed for a part of the epoch only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from samf.data.shards.index import ShardsError
from samf.data.shards.records import shard_numbers
from samf.data.shards.store import ShardStore
from samf.training.arguments import DataArguments
from samf.training.shard_prefetch import ShardPrefetcher

GB = 1e9


def shuffle_in_window(shards: np.ndarray, window: int, seed: Sequence[int]) -> np.ndarray:
    """Return a permutation (N,) in which the records of a shard are at most about `window` records apart.

    The shards come in random order, and the records of each in random order; then each record moves by a random number of
    places, up to half a window in either direction, reflected at both ends. So every record meets those of all shards of the
    window, and shards enter and leave it one by one.

    Args:
        shards: the shard of each record, (N,); -1 for records without one, which can be anywhere.
        window: records of the window.
        seed: of everything random.
    """
    rng = np.random.default_rng(list(seed))
    count = len(shards)
    window = min(window, 2 * count)
    rank = rng.permutation(int(shards.max(initial=-1)) + 1)
    is_free = shards < 0
    by_shard = np.where(is_free, rng.integers(0, max(len(rank), 1), count), rank[shards] if len(rank) else 0)
    order = np.lexsort((rng.random(count), by_shard))
    places = np.arange(count) + rng.uniform(-window / 2, window / 2, count)
    places = np.where(is_free[order], rng.uniform(0, count, count), places)
    places = count - np.abs(count - np.abs(places))
    return order[np.argsort(places, kind="stable")]


@dataclass(frozen=True)
class ShardUse:
    """When shards are needed: numbers, first and last places in the order, by first place."""

    numbers: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, shards: np.ndarray) -> "ShardUse":
        """Return the use by an order.

        Args:
            shards: the shard of each record in the order of training, (N,); -1 for none.
        """
        numbers, first = np.unique(shards, return_index=True)
        last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
        kept = np.flatnonzero(numbers >= 0)
        kept = kept[np.argsort(first[kept])]
        return cls(numbers[kept], first[kept], last[kept])

    def most_bytes(self, sizes: np.ndarray) -> int:
        """Return the most bytes that are needed at one time.

        Args:
            sizes: of all shards, by number.
        """
        places = np.concatenate([self.first, self.last + 1])
        changes = np.concatenate([sizes[self.numbers], -sizes[self.numbers]])
        order = np.lexsort((changes, places))
        return int(np.cumsum(changes[order]).max(initial=0))


class ShardWindow:
    """Streaming of training records: their order, and the prefetching of the shards that it needs.

    Args:
        store: the shards.
        shards: the shard of each training record, (N,); -1 for none.
        volumes: volumes whose records are mixed.
        ahead: shards that are fetched before they are needed.
    """

    def __init__(self, store: ShardStore, shards: np.ndarray, volumes: int, ahead: int):
        self.shards = shards
        self._store, self._volumes, self._ahead = store, volumes, ahead
        self._prefetcher = ShardPrefetcher(store, ahead)

    def order(self, rows: np.ndarray, seed: Sequence[int]) -> np.ndarray:
        """Return the rows of an epoch in their order.

        Args:
            rows: row numbers of the records, (N,), in any order.
            seed: of the order.
        """
        shards = self.shards[rows]
        used = np.unique(shards[shards >= 0])
        volumes = sum(len(self._store.shards[number].members) for number in used)
        window = round(self._volumes * len(rows) / max(volumes, 1))
        return rows[shuffle_in_window(shards, window, seed)]

    def check_room(self, order: Sequence[int]) -> int:
        """Return the bytes that the folder of fetched shards must have, for an order and what is fetched ahead.

        Args:
            order: rows in the order of training.

        Raises:
            ShardsError: its limit is lower; names the options.
        """
        sizes = np.array([shard.size for shard in self._store.shards])
        needed = ShardUse.of(self.shards[np.asarray(order)]).most_bytes(sizes) + 2 * self._ahead * int(sizes.max())
        if self._store.storage.is_remote and needed > self._store.limit:
            raise ShardsError(
                f"shuffling among {self._volumes} volumes needs {needed / GB:.2f} GB of shards on the disk at a time, and "
                f"shard_cache_gb is {self._store.limit / GB:g}: raise it to {np.ceil(needed / GB * 10) / 10:g}, or lower "
                "shuffle_volumes."
            )
        return needed

    def follow(self, order: Sequence[int]) -> Iterator[int]:
        """Yield the rows, and have the shards that come next fetched meanwhile.

        Args:
            order: rows in the order of training.
        """
        use = ShardUse.of(self.shards[np.asarray(order)])
        self._prefetcher.start(use.numbers, use.first, use.last)
        try:
            for place, row in enumerate(order):
                self._prefetcher.advance(place)
                yield row
        finally:
            self._prefetcher.stop()


def order_for_trainer(
    store: ShardStore, records: datasets.Dataset, volumes: int = 256, seed: int = 0
) -> datasets.Dataset:
    """Return records in an order that needs each shard for a part of an epoch only, the same in each epoch.

    For `transformers.Trainer` with `train_sampling_strategy="sequential"`. Its default, a random order of all records, fetches
    a shard for almost every record, and so does the packed table's own order: volumes were assigned to shards at random.

    Args:
        store: the shards.
        records: records of the shards.
        volumes: volumes whose records are mixed.
        seed: of the order.
    """
    window = ShardWindow(store, shard_numbers(store, records), volumes, ahead=0)
    order = window.order(np.arange(len(records)), [seed])
    window.check_room(order)
    return records.select(order)


def build_window(args: DataArguments, store: ShardStore | None, records: datasets.Dataset) -> ShardWindow | None:
    """Return the streaming of training records; None without shards.

    Args:
        args: Say how many volumes are mixed, and how many shards are fetched ahead.
        store: The shards.
        records: The training records.
    """
    if store is None:
        return None
    return ShardWindow(store, shard_numbers(store, records), args.shuffle_volumes, args.shard_prefetch)
