"""Prefetching of shards by threads, along the order of training."""

import logging
import threading
from dataclasses import dataclass, field

import numpy as np

from samf.data.shards.store import ShardStore

logger = logging.getLogger(__name__)

_THREADS = 4
_SETTLE = 0.2  # seconds: a resumed run passes over what it has seen in less


@dataclass
class _Plan:
    """The shards of an epoch, by first use; `next` is the one to look at."""

    numbers: np.ndarray
    first: np.ndarray
    last: np.ndarray
    place: int = 0
    next: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)
    is_over: bool = False


class ShardPrefetcher:
    """Fetches the shards that come next in the order of training.

    Each process of a machine follows the order that all share; a shard that another one is fetching is left to it. An error
    is only logged: the reader that needs the shard tries again and raises it.

    Args:
        store: the shards.
        ahead: shards beyond those whose records have been handed out.
    """

    def __init__(self, store: ShardStore, ahead: int):
        self.store, self.ahead = store, ahead
        self._plan: _Plan | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_plan": None}

    def start(self, numbers: np.ndarray, first: np.ndarray, last: np.ndarray) -> None:
        """Begin an epoch.

        Args:
            numbers: shards by first use, (M,).
            first: place in the order where each is needed first, (M,).
            last: place where each is needed last, (M,).
        """
        self.stop()
        if not self.store.storage.is_remote or not self.ahead:
            return
        self._plan = _Plan(numbers, first, last)
        for _ in range(_THREADS):
            threading.Thread(target=self._work, args=(self._plan,), daemon=True, name="shards").start()

    def advance(self, place: int) -> None:
        """Tell which record of the order was handed out."""
        plan = self._plan
        if plan is not None and not plan.is_over:
            plan.place = place
            if plan.next < len(plan.numbers) and self._is_near(plan, plan.next):
                with plan.changed:
                    plan.changed.notify()

    def stop(self) -> None:
        """End the epoch; what is being fetched is finished."""
        if self._plan is not None:
            self._plan.is_over = True
            with self._plan.changed:
                self._plan.changed.notify_all()
            self._plan = None

    def _is_near(self, plan: _Plan, item: int) -> bool:
        return item < int(np.searchsorted(plan.first, plan.place, side="right")) + self.ahead

    def _work(self, plan: _Plan) -> None:
        threading.Event().wait(_SETTLE)
        while (number := self._take(plan)) is not None:
            try:
                self.store.fetch(number, wait=False)
            except OSError as error:
                logger.warning("shard %d can't be fetched ahead: %s", number, error)

    def _take(self, plan: _Plan) -> int | None:
        """Return the next shard that is near and still needed, when there is one; None at the end."""
        with plan.changed:
            while not plan.is_over and plan.next < len(plan.numbers):
                if not self._is_near(plan, plan.next):
                    plan.changed.wait()
                    continue
                item, plan.next = plan.next, plan.next + 1
                if plan.last[item] >= plan.place:
                    return int(plan.numbers[item])
        return None
