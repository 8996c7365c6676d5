"""The listener and the watcher as a whole: intake, worker and senders over one journal, until they are told to stop."""

import contextlib
import logging
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from samf.reporting.hospital.destinations import Destination
from samf.reporting.hospital.durable import make_folder
from samf.reporting.hospital.folder_inbox import FolderInbox, FolderWatch
from samf.reporting.hospital.image_store import ImageStore
from samf.reporting.hospital.inbox import Inbox
from samf.reporting.hospital.journal import Journal
from samf.reporting.hospital.quiet import QuietClock
from samf.reporting.hospital.receiver import Listening, Receiver
from samf.reporting.hospital.report_files import Exporter
from samf.reporting.hospital.sender import Sender
from samf.reporting.hospital.status import write_failures
from samf.reporting.hospital.worker import Output, ReportMaker, Worker

logger = logging.getLogger(__name__)

_TICK = 0.25  # seconds
_HOUSEKEEPING = 30.0  # seconds between looks for images to be discarded and files that don't arrive
_GRACE = 30.0  # seconds in which a report may end after SIGTERM; `docker stop` and systemd kill later or are told to


def _nothing() -> None:
    pass


class BusyFolderError(RuntimeError):
    """Another process works on the same folder."""


@dataclass(frozen=True)
class Plan:
    """What listener and watcher have in common.

    Attributes:
        out: folder of everything that is kept.
        formats: of the reports' files.
        destinations: where DICOM files of reports are sent.
        quiet: seconds without a change after which a series is complete.
        keep_images: seconds for which the listener keeps images after their report has arrived everywhere.
        make_report: the model.
        export: writes the files.
    """

    out: Path
    formats: Sequence[str]
    destinations: Sequence[Destination]
    quiet: float
    keep_images: float
    make_report: ReportMaker
    export: Exporter


class Service:
    """Series in, reports out.

    Args:
        plan: what to do.
        inbox: where the series are; `plan.out` is locked.
        journal: of `plan.out`.
    """

    def __init__(self, plan: Plan, inbox: Inbox, journal: Journal):
        self._plan, self._inbox, self.journal = plan, inbox, journal
        self.clock = QuietClock(plan.quiet)
        self.senders = [Sender(plan.out, journal, destination) for destination in plan.destinations]
        output = Output(plan.out, plan.formats, [place.name for place in plan.destinations], plan.export)
        self.worker = Worker(inbox, journal, plan.make_report, output, self.clock, self._notify)
        self.stopped = threading.Event()

    def _notify(self) -> None:
        for sender in self.senders:
            sender.notify()

    def recover(self) -> None:
        """Take up what an earlier process left: series without an entry, or with an entry of other files, are gathered.

        Their quiet time begins now, because nothing could come while no process listened.
        """
        self._retry()
        for key in self._inbox.present():
            state, entry = self._inbox.fingerprint(key), self.journal.find(key)
            if state is None:
                continue
            if entry is None or not entry.is_settled(state):
                self.clock.touch(key)
            elif entry.state == "failed":  # a kill between the entry and the move
                self._inbox.set_aside(key, state)
        write_failures(self._plan.out)

    def _retry(self) -> None:
        """Gather the series that a person wants to be tried again (`samf inbox --retry`)."""
        for key in self.journal.to_retry():
            self._inbox.reopen(key)
            self.clock.touch(key)
            self.journal.retried(key)

    def run(self, look: Callable[[], None] = _nothing, close: Callable[[], None] = _nothing) -> bool:
        """Work until `stopped` is set, and return whether the current report was finished.

        Args:
            look: called a few times per second; looks for what has come.
            close: called when it is to stop; from then on nothing comes.
        """
        self.worker.start()
        for sender in self.senders:
            sender.start()
        last, cleaned = time.monotonic(), 0.0
        while not self.stopped.wait(_TICK):
            now = time.monotonic()
            look()
            for key in self.clock.advance(now - last):
                self.worker.put(key)
            last = now
            if now - cleaned > _HOUSEKEEPING:
                cleaned = now
                self.tidy()
        close()
        return self._end()

    def _end(self) -> bool:
        finished = self.worker.stop(_GRACE)
        current = self.worker.current
        if not finished and current is not None:
            with contextlib.suppress(sqlite3.Error):
                self.journal.release(current)  # given up on purpose: no attempt that killed the process
        for sender in self.senders:
            finished &= sender.stop(_GRACE / 2)
        return finished

    def tidy(self) -> None:
        """Remove images whose time is over, and write failures.json."""
        try:
            if self._inbox.discards:
                for key, digest in self.journal.discardable(time.time() - self._plan.keep_images):
                    self._inbox.discard(key, digest)
                    self.journal.discarded(key)
            self._retry()
            write_failures(self._plan.out)
        except (OSError, sqlite3.Error) as error:
            logger.error("tidying up: %s; tried again later", type(error).__name__)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes until the block ends or this process does.

    Raises:
        BusyFolderError: another one has it.
    """
    import filelock

    make_folder(folder.absolute())
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise BusyFolderError(
            f"{folder}: another samf listen or samf watch works on it; choose another --out."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _stopping(service: Service) -> Iterator[None]:
    """Let SIGTERM and SIGINT stop a service; the second one ends the process at once."""

    def stop(number: int, _: object) -> None:
        if service.stopped.is_set():
            os._exit(128 + number)
        service.stopped.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report_thread_errors(arguments: threading.ExceptHookArgs) -> None:
    """Log that a thread ended, without the error's text, which may quote a data set."""
    name = arguments.thread.name if arguments.thread else "thread"
    logger.error("internal error in %s: %s", name.partition("@")[0], arguments.exc_type.__name__)


def listen(
    plan: Plan, listening: Listening, ready: Callable[[Service, int], None] = lambda service, port: None
) -> bool:
    """Receive series by DICOM and report on them until SIGTERM, and return whether the last report was finished.

    Args:
        plan: what to do.
        listening: how to listen.
        ready: called with the service and the port as soon as images are taken.

    Raises:
        BusyFolderError: another process works on the same folder.
        OSError: the port can't be opened, or the folder can't be written.
        MissingLibraryError: pynetdicom isn't installed.
    """
    with locked(plan.out), contextlib.closing(Journal(plan.out)) as journal:
        threading.excepthook = _report_thread_errors
        store = ImageStore(plan.out)
        service = Service(plan, store, journal)
        receiver = Receiver(store, journal, listening, service.clock.touch)
        service.recover()
        with _stopping(service):
            receiver.start()
            try:
                ready(service, receiver.port)
                return service.run(close=receiver.stop)
            finally:
                receiver.stop()


def watch(plan: Plan, folder: Path, ready: Callable[[Service], None] = lambda service: None) -> bool:
    """Report on series that are dropped into a folder until SIGTERM, and return whether the last report was finished.

    Args:
        plan: what to do.
        folder: that is watched.
        ready: called with the service when it begins.

    Raises:
        BusyFolderError: another process works on the same output folder.
        OSError: no such folder, or the output folder can't be written.
        ValueError: the output folder is in the watched one.
    """
    if plan.out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{plan.out} is in {folder}, so reports would be taken for series; choose another --out.")
    with locked(plan.out), contextlib.closing(Journal(plan.out)) as journal:
        threading.excepthook = _report_thread_errors
        inbox = FolderInbox(folder, plan.out / "unpacked")
        service = Service(plan, inbox, journal)
        look = _Look(FolderWatch(inbox), service)
        look()
        write_failures(plan.out)
        with _stopping(service):
            ready(service)
            return service.run(look)


class _Look:
    """Looks into a watched folder, the less often the longer it takes."""

    _SHARE = 10  # a tenth of the time at most

    def __init__(self, watch: FolderWatch, service: Service):
        self._watch, self._service, self._next = watch, service, 0.0

    def __call__(self) -> None:
        began = time.monotonic()
        if began < self._next:
            return
        try:
            for key in self._watch.changed():
                self._service.clock.touch(key)
        except OSError as error:
            logger.error("the watched folder can't be read (%s); tried again", type(error).__name__)
        now = time.monotonic()
        self._next = now + max(1.0, self._SHARE * (now - began))
