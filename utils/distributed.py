"""Coordination of the processes that `torchrun` or `accelerate launch` starts.

For what they agree on (who reads a folder, which file is used), not for tensors: each rank takes its share of the batches,
writes its own files and waits for the others. So gloo is enough on any device, and a wait may take as long as the slowest
rank does.
"""

import functools
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch

# A rank that has finished waits for the others: hours, where the default limits are 10 (nccl) or 30 (gloo) minutes.
_TIMEOUT = timedelta(days=30)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
# Set while rank 0 runs the function of `from_first`: that function must not wait for the other ranks, which wait for it.
_runs_for_all: ContextVar[bool] = ContextVar("_runs_for_all", default=False)


def _started() -> Any:
    """Return torch.distributed if its process group was started; a process that hasn't imported torch has none."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


class Processes:
    """The processes of this run, and this one's place among them; a run without a launcher is one process.

    `is_first` and `count` can be read at any time. All processes must call the other methods, in the same order.

    Attributes:
        rank: this process's number, from 0.
        count: the number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        dist = _started()
        if dist is not None and not _runs_for_all.get():
            self.rank, self.count = dist.get_rank(), dist.get_world_size()

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, or the only process."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.count > 1:
            _started().barrier(self._group())

    def from_first(self, make: Callable[[], T]) -> T:
        """Return on every process what rank 0's `make` returns, and raise on every process what it raises.

        For decisions that depend on the state of a disk: another process may see its files earlier or later.
        """
        if self.count == 1:
            return make()
        outcome: list[Any] = [None]
        if self.is_first:
            token = _runs_for_all.set(True)
            try:
                outcome = [(make(), None)]
            except Exception as error:  # noqa: BLE001 - raised on every process below
                outcome = [(None, _portable(error))]
            finally:
                _runs_for_all.reset(token)
        _started().broadcast_object_list(outcome, src=0, group=self._group())
        result, raised = outcome[0]
        if raised is not None:
            raise raised
        return result

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on all other processes: for filling a folder that all of them read."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def gather(self, value: T) -> list[T]:
        """Return the value of every process, by rank, on every process."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        _started().all_gather_object(values, value, group=self._group())
        return values

    def any(self, value: bool) -> bool:
        """Return whether `value` is true on any process."""
        if self.count == 1:
            return value
        import torch
        import torch.distributed as dist

        found = torch.tensor(int(value))
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group())
        return bool(found)

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every process the first error of any, so that no process waits for one that has stopped."""
        if self.count == 1:
            if error is not None:
                raise error
            return
        errors = self.gather(None if error is None else _portable(error))
        first = next((found for found in errors if found is not None), None)
        if first is not None:
            raise error or first

    def check_equal(self, what: str, count: int) -> None:
        """Raise ValueError on every process unless all have the same `count` of `what` they train on together."""
        counts = self.gather(count)
        if len(set(counts)) > 1:
            raise ValueError(
                f"The processes have different numbers of {what}: {', '.join(map(str, counts))} (by rank). They would take "
                f"different numbers of steps and wait for each other for ever. Do all machines see the same files?"
            )

    def _group(self) -> Any:
        return _gloo_group(_started().group.WORLD)


@functools.cache
def _gloo_group(world: Any) -> Any:
    """Make one group per default group `world`: each has threads and connections of its own."""
    return _started().new_group(backend="gloo", timeout=_TIMEOUT)


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent to other processes: the same if it pickles, else a RuntimeError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception as reason:  # noqa: BLE001 - whatever an exception's own pickling raises
        return RuntimeError(f"{type(error).__name__}: {error} (not sent as it is: {type(reason).__name__})")
    return error


# --- The process group of a script ------------------------------------------------------------------------------------


def join_processes() -> None:
    """Start the process group that a launcher has prepared; do nothing without one, or if it has been started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ and _started() is None:
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=_TIMEOUT)


def leave_processes() -> None:
    """End the process group that `join_processes` or a Trainer has started, if there is one."""
    dist = _started()
    if dist is not None:
        _gloo_group.cache_clear()  # its group ends with the default one
        dist.destroy_process_group()


def leaves_processes(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate a script's main function so that the process group ends when it returns or raises SystemExit.

    Not after another exception: then other processes may be waiting in a collective, and the launcher ends them.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result = main(*args, **kwargs)
        except SystemExit:
            leave_processes()
            raise
        leave_processes()
        return result

    return run


# --- This machine -----------------------------------------------------------------------------------------------------


def processes_here() -> int:
    """Return how many of the launcher's processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's number on its machine, which is also the index of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def default_device() -> "torch.device":
    """Return this process's accelerator, or the CPU on a machine without one."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, local_rank())
