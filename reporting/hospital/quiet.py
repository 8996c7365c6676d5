"""When a series is complete: nothing has come for a while."""

import threading

# A process that was suspended has not listened, so a longer pause between two looks counts no more than this.
_LONGEST_LOOK = 2.0  # seconds


class QuietClock:
    """How long nothing has come for each series that is being gathered.

    Neither the release of an association nor a count says that a series is complete: senders release after errors and
    open several associations for one series. So it is complete when nothing has come for `quiet` seconds, of which only
    those count in which this process could have received something.

    Args:
        quiet: seconds without an image.
    """

    def __init__(self, quiet: float):
        self.quiet = quiet
        self._ages: dict[str, float] = {}
        self._lock = threading.Lock()

    def touch(self, key: str) -> None:
        """Note that something has come for a series, or that it is to be gathered."""
        with self._lock:
            self._ages[key] = 0.0

    def advance(self, seconds: float) -> list[str]:
        """Let time pass and return the series that are now complete, which are no longer gathered."""
        with self._lock:
            for key in self._ages:
                self._ages[key] += min(seconds, _LONGEST_LOOK)
            complete = [key for key, age in self._ages.items() if age >= self.quiet]
            for key in complete:
                del self._ages[key]
            return complete

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._ages

    def __len__(self) -> int:
        with self._lock:
            return len(self._ages)
