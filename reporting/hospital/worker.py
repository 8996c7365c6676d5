"""The worker: takes complete series one by one, makes their reports and journals what became of them."""

import contextlib
import logging
import queue
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from samf.model.report_samf import Report
from samf.reporting.hospital.durable import is_passing
from samf.reporting.hospital.inbox import Fingerprint, Inbox
from samf.reporting.hospital.journal import Entry, Journal
from samf.reporting.hospital.quiet import QuietClock
from samf.reporting.hospital.report_files import Exporter, Source, write_report
from samf.reporting.hospital.status import write_failures

logger = logging.getLogger(__name__)

MAX_STARTS = 5  # reports of one series during which the process ended
_PAUSES = (1.0, 5.0, 30.0, 60.0)  # seconds to wait for a disk that refuses; the last one again and again

# The report of a scan; raises ValueError or OSError for one that can't be read or shows no chest.
ReportMaker = Callable[[Path], Report]


@dataclass(frozen=True)
class Output:
    """Where reports go.

    Attributes:
        root: the folder of journal and reports.
        formats: of the files.
        destinations: their names in the journal.
        export: writes the files.
    """

    root: Path
    formats: Sequence[str]
    destinations: Sequence[str]
    export: Exporter


class Worker:
    """Makes the reports of complete series, in one thread.

    Args:
        inbox: where the series are.
        journal: of the output folder.
        make_report: the model.
        output: where reports go.
        clock: of the series that are being gathered, among them those whose files change during their report.
        written: called after each report that is to be sent.
    """

    def __init__(
        self,
        inbox: Inbox,
        journal: Journal,
        make_report: ReportMaker,
        output: Output,
        clock: QuietClock,
        written: Callable[[], None] = lambda: None,
    ):
        self._inbox, self._journal, self._make_report, self._output = inbox, journal, make_report, output
        self._clock, self._written = clock, written
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reports", daemon=True)
        self.current: str | None = None

    def start(self) -> None:
        """Begin to work on what is queued."""
        self._thread.start()

    def put(self, key: str) -> None:
        """Queue a complete series."""
        self._waiting.put(key)

    def stop(self, timeout: float) -> bool:
        """End after the current series, and return whether that was within `timeout` seconds."""
        self._stop.set()
        self._waiting.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (key := self._waiting.get()) is not None and not self._stop.is_set():
            if key in self._clock:  # more came since it was complete; it is queued again when that ends
                continue
            self.current = key
            try:
                self._persist(key)
            except Exception as error:  # noqa: BLE001 - the next series is served; this one again at the next start
                logger.error("series %s: internal error: %s", key, type(error).__name__)
            self.current = None

    def _persist(self, key: str) -> None:
        """Process a series, and wait as long as the disk refuses."""
        for attempt in range(1 << 30):
            try:
                return self.process(key)
            except (OSError, sqlite3.Error) as error:
                logger.error("series %s: the disk refuses (%s); tried again later", key, type(error).__name__)
                with contextlib.suppress(sqlite3.Error):
                    self._journal.release(key)
            if self._stop.wait(_PAUSES[min(attempt, len(_PAUSES) - 1)]):
                return None
        return None

    def process(self, key: str) -> None:
        """Make the report of a series, unless the journal knows that of the same files.

        Raises:
            OSError: the disk refuses; the series is to be tried again.
            sqlite3.Error: so does the journal's.
        """
        state = self._inbox.fingerprint(key)
        entry = self._journal.find(key)
        if state is None:
            return
        if entry is not None and entry.is_settled(state):
            if entry.state == "failed":
                self._inbox.set_aside(key, state)
            return
        name = self._inbox.name(key)
        if self._journal.start(key, name, state) > MAX_STARTS:
            reason = f"the process ended {MAX_STARTS} times during its report, for lack of memory perhaps"
            return self._fail(key, state, reason)
        if entry is not None and self._inbox.discards and state.files < entry.reported_files:
            return self._fail(key, state, _late(entry, state))
        self._report(key, state, 0 if entry is None else entry.version)

    def _report(self, key: str, state: Fingerprint, version: int) -> None:
        began = time.monotonic()
        try:
            with self._inbox.opened(key) as scan:
                source = Source(scan, self._inbox.origin(key))
                report = self._make_report(scan)
                if self._inbox.fingerprint(key) != state:
                    logger.info("series %s: images came during its report, which is made again", key)
                    self._journal.release(key)
                    return self._clock.touch(key)
                output = self._output
                folder = output.root / "reports" / key / f"v{version + 1}"
                files = write_report(output.root, folder, report, source, output.formats, output.export)
        except sqlite3.Error:
            raise
        except Exception as error:  # whatever a scan brings about, the next one is served
            if isinstance(error, OSError) and is_passing(error):
                raise
            return self._fail(key, state, _reason(error, scan=self._inbox.origin(key)))
        self._journal.report(key, version + 1, state, files, self._output.destinations)
        logger.info("series %s: report %d written, %.1f s", key, version + 1, time.monotonic() - began)
        self._written()
        return None

    def _fail(self, key: str, state: Fingerprint, reason: str) -> None:
        """Journal why a series has no report and set it aside, in this order: a kill between is made up for at the start."""
        self._journal.fail(key, reason, str(self._inbox.aside(key)))
        self._inbox.set_aside(key, state)
        write_failures(self._output.root)
        logger.info("series %s: no report; failures.json says why", key)


def _late(entry: Entry, state: Fingerprint) -> str:
    return (
        f"{state.files} files came after the report of {entry.reported_files}, whose images are no longer kept; "
        "send the whole series again"
    )


def _reason(error: Exception, scan: Path) -> str:
    """Return why there is no report: the reader's own words, without the folder; of other errors only where they arose."""
    if isinstance(error, (OSError, ValueError)):
        return " ".join(str(error).replace(str(scan), "scan").split()) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "not enough memory for this scan"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"internal error: {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
