"""Seconds and memory of a command and of the processes that it starts, measured from outside."""

import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

_SAMPLED_EVERY = 0.05  # seconds


@dataclass(frozen=True)
class MeasuredProcess:
    """What a command took.

    Attributes:
        seconds: from its start to its end.
        processor: seconds on a processor, with the processes that it waited for.
        memory: bytes of all its processes at the peak, shared pages once; 0 where not watched.
        status: its exit status.
        messages: what it wrote to standard error.
    """

    seconds: float
    processor: float
    memory: float
    status: int
    messages: str


def run_measured(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    *,
    watches_memory: bool = True,
) -> MeasuredProcess:
    """Run a command to its end. If this process is interrupted meanwhile, the command's processes are killed.

    Args:
        command: the program and its arguments.
        environment: of the process; None = this one's.
        folder: where it starts; None = here.
        watches_memory: sample the memory every 0.05 s.
    """
    with tempfile.TemporaryFile() as messages:
        busy, started = _children_seconds(), time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=messages,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
        try:
            with _Sampler(process.pid) if watches_memory else nullcontext() as sampler:
                process.wait()
                seconds = time.perf_counter() - started
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        messages.seek(0)
        text = messages.read().decode(errors="replace")
    peak = 0.0 if sampler is None else sampler.peak
    return MeasuredProcess(seconds, _children_seconds() - busy, peak, process.returncode, text)


class _Sampler:
    """The peak memory of a process and its descendants within the block, in bytes.

    Args:
        pid: of the process.
    """

    def __init__(self, pid: int):
        self.pid, self.peak = pid, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLED_EVERY):
            self.peak = max(self.peak, tree_memory(self.pid))


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tree_memory(pid: int) -> float:
    """Return the bytes of a process and of all that descend from it; what they share counts once."""
    return _proportional_size(pid) + sum(map(tree_memory, _children(pid)))


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split())]
    return []


def _proportional_size(pid: int) -> float:
    """Return the bytes of a process's memory, shared pages divided among those that share them; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * float(line.split()[1]) for line in lines if line.startswith("Pss:")), 0.0)
