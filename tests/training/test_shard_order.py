"""The order of streamed records: a permutation, near by shard, well mixed, and what it needs at a time."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr

from samf.data.shards.index import ShardsError
from samf.training.sampling import RecordOrder
from samf.training.shard_order import ShardUse, ShardWindow, shuffle_in_window

SHARDS, VOLUMES, RECORDS = 60, 6, 10  # of volumes each, of records each
NUMBERS = np.repeat(np.arange(SHARDS), VOLUMES * RECORDS)


class Store:
    """Shards that are fetched into a list."""

    def __init__(self, limit: float = 1e9, size: int = 100):
        self.shards = [SimpleNamespace(size=size, members=[None] * VOLUMES) for _ in range(SHARDS)]
        self.storage, self.limit, self.fetched = SimpleNamespace(is_remote=True), limit, []

    def fetch(self, number: int, wait: bool = True) -> Path:
        self.fetched.append(number)
        return Path()


@pytest.mark.parametrize("window", [1, 600, 10_000_000])
def test_every_record_once_by_seed_and_epoch(window):
    orders = [shuffle_in_window(NUMBERS, window, [3, epoch]) for epoch in (0, 1, 0)]
    assert all(sorted(order) == list(range(len(NUMBERS))) for order in orders)
    assert np.array_equal(orders[0], orders[2]) and not np.array_equal(orders[0], orders[1])


def test_a_shard_is_needed_for_its_own_length_and_a_window():
    order = shuffle_in_window(NUMBERS, 600, [0, 0])
    for number in range(SHARDS):
        places = np.flatnonzero(NUMBERS[order] == number)
        assert places[-1] - places[0] < 600 + 2 * VOLUMES * RECORDS


def test_records_are_mixed():
    order = shuffle_in_window(NUMBERS, 1200, [0, 0])
    assert abs(spearmanr(np.arange(len(order)), order).statistic) < 0.35  # 60 shards in random order: ±0.13
    batches = NUMBERS[order][: len(order) // 32 * 32].reshape(-1, 32)
    # Of 20 shards of the window, 32 draws meet 16.1 on average; 32 neighbours in storage meet 1 or 2.
    assert np.mean([len(set(batch)) for batch in batches]) > 14
    assert all(len(set(batch)) > 5 for batch in batches)  # also at both ends


def test_records_without_a_volume_are_anywhere():
    numbers = np.where(np.arange(len(NUMBERS)) % 10 == 0, -1, NUMBERS)
    places = np.flatnonzero(numbers[shuffle_in_window(numbers, 300, [0, 0])] < 0) / len(numbers)
    assert np.histogram(places, 4, (0, 1))[0].min() > 60  # of 90 each
    assert sorted(shuffle_in_window(np.full(5, -1), 3, [0])) == [0, 1, 2, 3, 4]


def test_what_is_needed_at_a_time_is_counted():
    rng = np.random.default_rng(0)
    shards, sizes = rng.integers(-1, 8, 40), rng.integers(1, 100, 8)
    use = ShardUse.of(shards)
    spans = {number: np.flatnonzero(shards == number) for number in range(8) if number in shards}
    needed = [sum(sizes[n] for n, at in spans.items() if at[0] <= k <= at[-1]) for k in range(40)]
    assert use.most_bytes(sizes) == max(needed)
    assert list(use.first) == sorted(at[0] for at in spans.values())
    assert {int(n): (f, l) for n, f, l in zip(use.numbers, use.first, use.last, strict=True)} == {
        n: (at[0], at[-1]) for n, at in spans.items()
    }


def test_shards_are_fetched_ahead_and_each_once():
    store = Store()
    window = ShardWindow(store, NUMBERS, volumes=60, ahead=3)
    order = window.order(np.arange(len(NUMBERS)), [0, 0])
    use = ShardUse.of(NUMBERS[order])
    for place, _ in enumerate(window.follow(order)):
        near = int(np.searchsorted(use.first, place, side="right")) + 3
        if place in (1000, 3000):
            wanted = set(use.numbers[:near][use.last[:near] >= place].tolist())
            deadline = time.monotonic() + 10
            while not wanted <= set(store.fetched) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert wanted <= set(store.fetched)
        assert len(store.fetched) <= near
    assert sorted(store.fetched) == sorted(set(store.fetched))


def test_a_resumed_epoch_does_not_fetch_what_it_passes_over():
    store = Store()
    window = ShardWindow(store, NUMBERS, volumes=60, ahead=2)
    order = window.order(np.arange(len(NUMBERS)), [0, 0])
    rows = window.follow(order)
    for _ in range(3000):  # as accelerate skips batches
        next(rows)
    use = ShardUse.of(NUMBERS[order])
    wanted = set(use.numbers[(use.last >= 2999) & (use.first <= use.first[use.first > 2999][1])].tolist())
    deadline = time.monotonic() + 10
    while not wanted <= set(store.fetched) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(store.fetched) == wanted
    rows.close()


def test_the_sampler_streams_and_refuses_a_folder_that_is_too_small():
    order = RecordOrder(len(NUMBERS), 5, window=ShardWindow(Store(), NUMBERS, 60, 0))
    first = list(order)
    order.epoch = 1
    assert sorted(first) == list(range(len(NUMBERS))) and list(order) != first
    small = RecordOrder(len(NUMBERS), 5, window=ShardWindow(Store(limit=1000), NUMBERS, 60, 2))
    with pytest.raises(ShardsError, match=r"shuffling among 60 volumes needs .* raise it to .* lower shuffle_volumes"):
        iter(small)
