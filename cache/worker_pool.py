"""Worker processes that may die or hang without harm to the work of the others.

`data.workers.process_pool` is for work that can be trusted. Here each job is watched: a process that a damaged file
crashes, that is killed for want of memory, or that doesn't come back in time, costs its job alone and is replaced.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from samf.utils.parallel import one_thread

logger = logging.getLogger(__name__)

# fork shares the libraries' memory among workers and replaces one in milliseconds.
_START = "fork" if sys.platform == "linux" else "spawn"
_LOOK_UP = 1.0  # seconds after which an idle worker looks whether its parent lives


@dataclass(frozen=True)
class WorkerDied:
    """Instead of a result: why there is none. `error` is an exception's or signal's name."""

    error: str
    message: str


class WorkerPool:
    """`count` single-threaded processes that run `work(job)`.

    Args:
        work: a function of one job; what it returns, and jobs, must be picklable. An exception of it is a WorkerDied.
        count: how many processes.
        timeout: seconds that a job may take; None for any number. The kernel's alarm ends the process then, also when
            it hangs within a library, and when this process has been killed.
    """

    def __init__(self, work: Callable[[Any], Any], count: int, timeout: float | None = None):
        self.work, self.timeout = work, timeout
        self._context = multiprocessing.get_context(_START)
        self._workers = [_Worker(self) for _ in range(count)]

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, jobs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """(job, its result or WorkerDied), in the order in which they are done."""
        waiting = deque(jobs)
        busy: dict[Connection, _Worker] = {}
        for worker in self._workers:
            self._give(worker, waiting, busy)
        while busy:
            for connection in wait(list(busy)):
                worker = busy.pop(connection)
                job, result = worker.job, worker.take()
                if isinstance(result, WorkerDied):
                    place = self._workers.index(worker)
                    worker.kill()
                    worker = self._workers[place] = _Worker(self)
                self._give(worker, waiting, busy)
                yield job, result

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    @staticmethod
    def _give(worker: "_Worker", waiting: deque, busy: "dict[Connection, _Worker]") -> None:
        if waiting:
            worker.give(waiting.popleft())
            busy[worker.connection] = worker


class _Worker:
    def __init__(self, pool: WorkerPool):
        self.timeout = pool.timeout
        self.connection, theirs = pool._context.Pipe()
        # For its temporary files, which it can't remove when it is killed.
        self.folder = tempfile.mkdtemp(prefix="samf-")
        arguments = (theirs, pool.work, pool.timeout, os.getpid(), self.folder)
        self.process = pool._context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # the worker alone has it now: its death is the connection's end
        self.job: Any = None

    def give(self, job: Any) -> None:
        self.job = job
        try:
            self.connection.send(job)
        except OSError:  # it died while it had nothing to do; `take` finds out
            logger.debug("worker %s is gone", self.process.pid)

    def take(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return _describe_death(self.process.exitcode or 0, self.timeout)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _describe_death(exitcode: int, timeout: float | None) -> WorkerDied:
    if exitcode >= 0:
        return WorkerDied("WorkerExited", f"its process ended with exit status {exitcode}; its message is in the log")
    if exitcode == -signal.SIGALRM:
        return WorkerDied("Timeout", f"took longer than {timeout:g} seconds")
    name = signal.Signals(-exitcode).name
    if exitcode == -signal.SIGKILL:
        return WorkerDied(name, "its process was killed, as systems do for want of memory")
    return WorkerDied(name, "its process crashed: a damaged file that a library doesn't withstand")


def _serve(connection: Connection, work: Callable[[Any], Any], timeout: float | None, parent: int, folder: str) -> None:
    """A worker's life: until its parent has no more jobs, or is gone. `folder` gets its temporary files."""
    one_thread()
    tempfile.tempdir = folder
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of a job's processes: the parent decides what follows
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        while True:
            while not connection.poll(_LOOK_UP):
                if os.getppid() != parent:
                    return
            job = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, timeout or 0)
            try:
                result = work(job)
            except Exception as error:
                connection.send(WorkerDied(type(error).__name__, str(error)))
                raise
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(result)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        return
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a parent that was killed doesn't
