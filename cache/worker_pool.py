"""Worker processes that may crash, hang or be killed without affecting each other's jobs.

`utils.parallel.process_pool` is for jobs that can be trusted. Here each job is monitored: if a damaged file crashes the
process, if it is killed for lack of memory, or if it exceeds the timeout, only its job fails, and the process is replaced.
"""

import ctypes
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Protocol, TypeVar

from samf.utils.parallel import one_thread

logger = logging.getLogger(__name__)

if sys.platform == "linux":  # fork shares the libraries' memory among workers and replaces a worker in milliseconds
    _CONTEXT = multiprocessing.get_context("fork")
    _LIBC = ctypes.CDLL(None)
else:
    _CONTEXT = multiprocessing.get_context("spawn")
    _LIBC = None
_POLL = 1.0  # seconds after which an idle worker checks whether its parent is alive
_PR_SET_PDEATHSIG = 1  # of prctl(2)

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class WorkerDied:
    """Outcome of a job without a result.

    Attributes:
        error: name of an exception or signal, "Timeout", or "WorkerExited".
        message: what happened.
    """

    error: str
    message: str


class JobStream(Protocol):
    """Source of jobs that arrive while others run, such as a connection."""

    def fileno(self) -> int:
        """Return the file descriptor that is readable when there is a job."""
        ...

    def recv(self) -> Any:
        """Return the next job; raise EOFError if no more jobs come."""
        ...


class WorkerPool(Generic[Job, Result]):
    """Single-threaded processes that run `work(job)`.

    Args:
        work: a function of one job. Jobs and results must be picklable; an exception becomes a WorkerDied.
        count: number of processes.
        timeout: seconds that a job may take; None = no limit. The kernel's alarm then ends the process, even if it hangs
            within a library, or if this process was killed.
    """

    def __init__(self, work: Callable[[Job], Result], count: int, timeout: float | None = None):
        self.work, self.timeout = work, timeout
        self._workers: list[_Worker[Job, Result]] = [_Worker(work, timeout) for _ in range(count)]

    def __enter__(self) -> "WorkerPool[Job, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Return the number of processes."""
        return len(self._workers)

    def map(
        self, jobs: Iterable[Job], more: JobStream | None = None, idle: float | None = None
    ) -> Iterator[tuple[Job, Result | WorkerDied]]:
        """Yield (job, its result or WorkerDied), in the order of completion.

        Args:
            jobs: the jobs.
            more: further jobs are received from it until its end; those that aren't finished then are given up.
            idle: seconds without a job after which `more` is no longer waited for; None = no limit.
        """
        waiting, free = deque(jobs), list(self._workers)
        busy: dict[Any, tuple[_Worker[Job, Result], Job]] = {}

        def give_next() -> None:
            while waiting and free:
                worker, job = free.pop(), waiting.popleft()
                worker.give(job)
                busy[worker.connection] = worker, job

        give_next()
        while busy or more is not None:
            ready = wait([*busy, more] if more is not None else list(busy), None if busy else idle)
            if not ready:
                return
            for connection in ready:
                if connection is more:
                    try:
                        waiting.append(more.recv())
                    except (EOFError, OSError):
                        return
                    give_next()
                    continue
                worker, job = busy.pop(connection)
                result = worker.take()
                free.append(self._replace(worker) if isinstance(result, WorkerDied) else worker)
                give_next()
                yield job, result

    def map_beside(
        self, jobs: Sequence[Job], control: Sequence[Job]
    ) -> Iterator[list[tuple[Job, Result | WorkerDied]]]:
        """Yield the outcomes of a few jobs together with those of `control`, which were run next to them.

        Args:
            jobs: the jobs; as many at once as leave a process free.
            control: at most one job, which is run again with each of those groups.
        """
        at_once = max(1, self.size - 1)
        for start in range(0, len(jobs), at_once):
            yield list(self.map([*jobs[start : start + at_once], *control]))

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _replace(self, worker: "_Worker[Job, Result]") -> "_Worker[Job, Result]":
        """Return a new worker in the place of one that died."""
        worker.kill()
        new = self._workers[self._workers.index(worker)] = _Worker(self.work, self.timeout)
        return new


class _Worker(Generic[Job, Result]):
    """One process of a pool, and the connection to it."""

    def __init__(self, work: Callable[[Job], Result], timeout: float | None):
        self.timeout = timeout
        self.connection, theirs = _CONTEXT.Pipe()
        # For the process's temporary files, which it can't remove when it is killed.
        self.folder = tempfile.mkdtemp(prefix="samf-")
        arguments = (theirs, work, timeout, os.getpid(), self.folder)
        self.process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # only the worker has it now, so that its death closes the connection

    def give(self, job: Job) -> None:
        try:
            self.connection.send(job)
        except OSError:  # it died while it was idle; `take` finds out
            logger.debug("worker %s is gone", self.process.pid)

    def take(self) -> Result | WorkerDied:
        """Return the result of the job that was given, once it is there."""
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
        return WorkerDied(name, "its process was killed, probably for lack of memory")
    return WorkerDied(name, "its process crashed, probably because a library can't handle a damaged file")


def _die_with_parent() -> None:
    """Let the kernel end this process with the thread that started it, even if it is busy; only Linux can."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(
    connection: Connection, work: Callable[[Job], Result], timeout: float | None, parent: int, folder: str
) -> None:
    """Run a worker until its parent has no more jobs or is gone; `folder` is for its temporary files."""
    _die_with_parent()
    one_thread()
    tempfile.tempdir = folder
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group: the parent decides what to do
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        while True:
            while not connection.poll(_POLL):
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
        shutil.rmtree(folder, ignore_errors=True)  # a parent that was killed doesn't remove it
