"""Sending on: a thread per destination that delivers what the journal says is due, and never gives up."""

import logging
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from samf.reporting.hospital.destinations import Destination, RefusedError, Send, UnreachableError
from samf.reporting.hospital.journal import Delivery, Journal

logger = logging.getLogger(__name__)

LONGEST_PAUSE, LONGEST_REFUSAL = 300.0, 3600.0  # seconds between tries: of a far end, of a file that it refuses
_IDLE = 5.0  # seconds between looks into the journal when nothing is announced


def pause(tries: int, longest: float) -> float:
    """Return seconds to wait after a number of failed tries: 1, 2, 4, … up to the longest."""
    return float(min(2.0 ** min(tries - 1, 30), longest))


class Sender:
    """Delivers files to one destination, in a thread of its own.

    A file is journalled as sent after the far end has taken it. Between the two a kill may fall: the file is then sent
    again, byte for byte, under the same SOPInstanceUID.

    Args:
        root: to which the journal's paths are relative.
        journal: says what is due.
        destination: where to.
    """

    def __init__(self, root: Path, journal: Journal, destination: Destination):
        self._root, self._journal, self._destination = root, journal, destination
        self._news, self._stop = threading.Event(), threading.Event()
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name=f"to {destination.name}", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def notify(self) -> None:
        """Say that the journal has something new."""
        self._news.set()

    def stop(self, timeout: float) -> bool:
        """End after the current file, and return whether that was within `timeout` seconds."""
        self._stop.set()
        self._news.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while not self._stop.is_set():
            self._news.clear()
            try:
                wait = self.deliver()
            except (OSError, sqlite3.Error) as error:  # the own disk or journal
                logger.error("to %s: %s; tried again later", self._destination.name, type(error).__name__)
                wait = pause(5, LONGEST_PAUSE)
            except Exception as error:  # noqa: BLE001 - libraries raise much, and the next file must go out
                logger.error("to %s: internal error: %s", self._destination.name, type(error).__name__)
                wait = pause(5, LONGEST_PAUSE)
            if wait == _IDLE:
                self._news.wait(wait)
            elif wait:
                self._stop.wait(wait)  # news don't make a far end that is down come back

    def deliver(self) -> float:
        """Deliver what is due once, and return how many seconds to wait before the next call."""
        due = self._journal.due(self._destination.name, time.time())
        if not due:
            return _IDLE
        there = [item for item in due if (self._root / item.file).is_file()]
        for item in due:
            if item not in there:
                self._journal.postpone(item.id, time.time() + LONGEST_REFUSAL, "its file is gone")
                logger.error("series %s: the file of its report is gone", item.key)
        if not there:
            return 0.0
        try:
            with self._destination.connected([self._root / item.file for item in there]) as send:
                self._send(there, send)
        except UnreachableError as error:
            self._failures += 1
            self._journal.unreachable(self._destination.name, str(error))
            wait = pause(self._failures, LONGEST_PAUSE)
            logger.warning("%s: %s; tried again in %.0f s", self._destination.name, error, wait)
            return wait
        self._failures = 0
        return 0.0

    def _send(self, due: Sequence[Delivery], send: Send) -> None:
        for item in due:
            if self._stop.is_set():
                return
            try:
                send(self._root / item.file)
            except RefusedError as error:
                wait = pause(item.tries + 1, LONGEST_REFUSAL)
                self._journal.postpone(item.id, time.time() + wait, str(error))
                logger.warning("series %s: %s refuses its report: %s", item.key, self._destination.name, error)
            except UnreachableError as error:  # perhaps because of this file: let others go first
                wait = pause(item.tries + 1, LONGEST_PAUSE)
                self._journal.postpone(item.id, time.time() + wait, str(error))
                raise
            else:
                self._failures = 0
                self._journal.delivered(item.id)
                logger.info("series %s: sent to %s", item.key, self._destination.name)
