"""Turns at the model: one visitor at a time, in the order in which they came; patient work comes last."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

Result = TypeVar("Result")

_MOST_WAITING = 48


class BusyError(Exception):
    """More visitors than the page takes; the message goes to them."""


class Turns:
    """A queue for something that only one can use.

    Args:
        most: of those who wait or work; the next one is refused.
    """

    def __init__(self, most: int = _MOST_WAITING):
        self.most = most
        self._changed = threading.Condition()
        self._queue: deque[Ticket] = deque()

    def join(self, patient: bool = False) -> "Ticket":
        """Return a place in the queue.

        Args:
            patient: let those who come later pass who are not patient themselves.

        Raises:
            BusyError: the queue is full.
        """
        with self._changed:
            if len(self._queue) >= self.most:
                raise BusyError(f"{len(self._queue)} requests are waiting already. Try again in a few minutes.")
            ticket = Ticket(self, patient)
            places = (place for place, other in enumerate(self._queue) if place and other.patient)
            self._queue.insert(len(self._queue) if patient else next(places, len(self._queue)), ticket)
            return ticket

    def __len__(self) -> int:
        return len(self._queue)

    def ahead(self, ticket: "Ticket") -> int:
        """Return how many are before a ticket; 0 = it is its turn."""
        with self._changed:
            return self._queue.index(ticket) if ticket in self._queue else 0

    def wait(self, ticket: "Ticket", seconds: float) -> bool:
        """Wait until it is a ticket's turn, at most some seconds, and return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._queue) and self._queue[0] is ticket, seconds)

    def leave(self, ticket: "Ticket") -> None:
        """Take a ticket out of the queue; nothing happens if it has left already."""
        with self._changed:
            if ticket in self._queue:
                self._queue.remove(ticket)
                self._changed.notify_all()


class Ticket:
    """A place in the queue, and the work that is done when its turn has come.

    Work runs in a thread of its own, and whoever waits for it may go at any moment, as the visitor of a closed tab does: the
    turn ends when the work does, and only then `on_left` is called.
    """

    def __init__(self, turns: Turns, patient: bool = False):
        self._turns, self.patient = turns, patient
        self._job: Future[Any] | None = None
        self.on_left: list[Callable[[], object]] = []

    def waiting(self, interval: float) -> Iterator[int]:
        """Yield how many are ahead, at least every `interval` seconds, until it is the ticket's turn."""
        while not self._turns.wait(self, 0):
            yield self._turns.ahead(self)
            self._turns.wait(self, interval)

    def start(self, work: Callable[[], Result]) -> "Future[Result]":
        """Start work in a thread and return its future."""
        self._job = job = start(work)
        return job

    def leave(self) -> None:
        """End the turn, when the work that was started has ended."""
        if self._job is None:
            self._leave()
        else:
            self._job.add_done_callback(lambda _: self._leave())

    def _leave(self) -> None:
        self._turns.leave(self)
        while self.on_left:
            self.on_left.pop()()


def start(work: Callable[[], Result]) -> "Future[Result]":
    """Start work in a thread and return its future."""
    job: Future[Result] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            job.set_exception(error)
        else:
            job.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return job


def progress_of(job: "Future[Any]", interval: float) -> Iterator[float]:
    """Yield the seconds that have passed, at least every `interval` seconds, until a job is done."""
    started = time.monotonic()
    while not job.done():
        yield time.monotonic() - started
        wait([job], interval)
