"""A worker pool in a process of its own, for programs that are no good parent for one.

A pool forks its workers, which is safe only in a process without other threads, and dask's workers have many and may have no
`multiprocessing` children. So each starts this module as a program, `python -m samf.cache.pool_process`, and keeps one end of
a socket: through it go jobs and results, pickled, which the caller needs no heavy imports to pass on. When the caller dies,
however it dies, the socket is closed, and the pool ends with its workers at once.
"""

import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from importlib import metadata
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

_IDLE = 900.0  # seconds without a job after which the process ends, since its client may be gone
_PATIENCE = 10.0  # seconds that a pool may take to end


class PoolRefusedError(RuntimeError):
    """The pool can't do the work that is asked for on this machine; the message says why."""


class PoolEndedError(RuntimeError):
    """The pool's process has ended before the job was done."""


class PoolProcess:
    """The caller's side of a pool in a process of its own. Its methods may be called from any thread.

    Args:
        work: a pickled pair of a function without arguments, which raises PoolRefusedError if the work can't be done here,
            and of (work, timeout) as WorkerPool takes them.
        versions: what `versions()` must return in the process, or the work is refused.
        size: number of workers.
        environment: variables of the process's environment; default: this one's.

    Raises:
        PoolRefusedError: the work can't be done on this machine.
    """

    def __init__(self, work: bytes, versions: dict[str, str], size: int, environment: Mapping[str, str] | None = None):
        self._connection, theirs = Pipe()
        # As for processes of multiprocessing: what can be imported here can be imported there.
        found = os.environ if environment is None else environment
        environment = {**found, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "samf.cache.pool_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        try:
            self._connection.send((work, versions, size))
            refusal = self._connection.recv()
        except (EOFError, OSError):
            refusal = (
                f"the pool's process ended with exit status {self._process.wait()}; its message is in the worker's log"
            )
        if refusal is not None:
            self._process.wait()
            raise PoolRefusedError(refusal)
        self._numbers, self._pending, self._lock = count(), dict[int, Future[bytes]](), threading.Lock()
        self._is_closed = False
        self._receiver = threading.Thread(target=self._receive, name="samf pool", daemon=True)
        self._receiver.start()

    def submit(self, job: bytes) -> "Future[bytes]":
        """Return the future of a job's result: its pickle, or a PoolEndedError.

        Args:
            job: the pickled job.
        """
        future: Future[bytes] = Future()
        with self._lock:
            number = next(self._numbers)
            self._pending[number] = future
            if self._is_closed:
                self._fail_pending()
                return future
            with contextlib.suppress(OSError):  # it ended; `_receive` finds out
                self._connection.send((number, job))
        return future

    def close(self) -> None:
        """End the process with its workers, whatever they are doing."""
        with self._lock:
            if not self._is_closed:
                with contextlib.suppress(OSError):
                    self._connection.send(None)
        self._receiver.join(_PATIENCE)
        if self._receiver.is_alive():
            self._process.kill()
            self._receiver.join()

    @property
    def is_closed(self) -> bool:
        """Return whether the process has ended."""
        return self._is_closed

    def _receive(self) -> None:
        """Hand out the results until the process ends."""
        while True:
            try:
                number, result = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                future = self._pending.pop(number)
            future.set_result(result)
        with self._lock:
            self._is_closed = True
            self._fail_pending()
            self._connection.close()
        self._process.wait()

    def _fail_pending(self) -> None:
        for future in self._pending.values():
            future.set_exception(PoolEndedError("the pool's process has ended"))
        self._pending.clear()


def versions() -> dict[str, str]:
    """Return the versions on which the contents and names of entries depend."""
    from samf.cache.slice_cache import ENTRY_VERSION
    from samf.model.image_processing_samf import EXTRACT_VERSION

    try:
        package = metadata.version("samf")
    except metadata.PackageNotFoundError:  # a checkout on the path
        package = "not installed"
    return {"samf": package, "EXTRACT_VERSION": str(EXTRACT_VERSION), "ENTRY_VERSION": str(ENTRY_VERSION)}


def _compare_versions(expected: dict[str, str]) -> None:
    for name, found in versions().items():
        if found != expected.get(name) and "not installed" not in (found, expected.get(name)):
            raise PoolRefusedError(
                f"{name} is {found} here and {expected.get(name)} where preprocess.py was started; install the same samf"
            )


def _prepare(connection: Connection) -> tuple[Callable[[Any], Any], float | None, int] | None:
    """Receive what is to be done; return (work, timeout, size), or None after telling the caller why it can't be done here."""
    pickled, expected, size = connection.recv()
    try:
        _compare_versions(expected)
        check, work, timeout = pickle.loads(pickled)
        check()
    except PoolRefusedError as refusal:
        connection.send(str(refusal))
        return None
    except (ImportError, AttributeError, TypeError, OSError, pickle.UnpicklingError) as error:
        connection.send(f"{type(error).__name__}: {error}")
        return None
    connection.send(None)
    return work, timeout, size


def _run_pickled(job: tuple[int, bytes], *, work: Callable[[Any], Any]) -> Any:
    return work(pickle.loads(job[1]))


class JobConnection:
    """Jobs from a connection whose other side may be open in further processes: None is their end.

    Args:
        connection: from which they come.
    """

    def __init__(self, connection: Connection):
        self.connection = connection

    def fileno(self) -> int:
        """Return the connection's file descriptor."""
        return self.connection.fileno()

    def recv(self) -> Any:
        """Return the next job; raise EOFError after the last one."""
        job = self.connection.recv()
        if job is None:
            raise EOFError
        return job


def main(descriptor: int) -> None:
    """Run a pool until the caller closes its end of the socket, or gives no job for a quarter of an hour.

    Args:
        descriptor: the file descriptor of this process's end.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group: the caller decides what to do
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)  # libraries that print do it to the log
    connection = Connection(descriptor)
    try:
        prepared = _prepare(connection)
        if prepared is None:
            return
        from samf.cache.worker_pool import WorkerPool

        work, timeout, size = prepared
        with WorkerPool(functools.partial(_run_pickled, work=work), size, timeout) as pool:
            for (number, _), result in pool.map((), more=JobConnection(connection), idle=_IDLE):
                connection.send((number, pickle.dumps(result)))
    except (EOFError, OSError):  # the caller is gone
        return
    finally:
        connection.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # the libraries' own endings take seconds, and there is nothing to save
