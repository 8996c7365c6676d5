"""Several processes under `torchrun` or `accelerate launch` that share one output folder.

They never exchange tensors: a rank takes its share of the batches, writes its own files, and waits for the others. So
gloo is enough on any device, and the waiting may take as long as the slowest rank does.
"""

import functools
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

# A rank that is done waits for the others: hours, where the usual limits are 10 (nccl) or 30 (gloo) minutes.
PATIENCE = timedelta(days=30)

P, R, T = ParamSpec("P"), TypeVar("R"), TypeVar("T")
# Set while rank 0 works for all: what it calls must not wait for the others, who wait for its result.
_works_for_all: ContextVar[bool] = ContextVar("_works_for_all", default=False)


class Processes:
    """This process among its fellows; alone where there are none.

    Attributes:
        rank: 0 … count - 1. count: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.count, self._group = 0, 1, None
        if _works_for_all.get():
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            self._group = _gloo_group(dist.group.WORLD)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until every process has come here."""
        if self._group is not None:
            dist.barrier(self._group)

    def from_first(self, make: Callable[[], T]) -> T:
        """Return on every process what rank 0's `make` returns; what it raises, every process raises.

        For what is decided by looking at a disk: another process may see files earlier or later.
        """
        if self._group is None:
            return make()
        outcome: list[Any] = [None]
        if self.is_first:
            token = _works_for_all.set(True)
            try:
                outcome = [(make(), None)]
            except Exception as error:  # noqa: BLE001 - raised on every process below
                outcome = [(None, _portable(error))]
            finally:
                _works_for_all.reset(token)
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank, on every process."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def raise_together(self, error: Exception | None) -> None:
        """Raise the first process's error on all of them, if one has any: none is left waiting for one that stopped."""
        if self._group is None:
            if error is not None:
                raise error
            return
        errors = self.gather(None if error is None else _portable(error))
        first = next((found for found in errors if found is not None), None)
        if first is not None:
            raise error or first

    def check_equal(self, what: str, count: int) -> None:
        """Raise ValueError on all processes when they have different counts of something that they train on together."""
        counts = self.gather(count)
        if len(set(counts)) > 1:
            raise ValueError(
                f"The processes have different numbers of {what}: {', '.join(map(str, counts))} (by rank). They would take "
                f"different numbers of steps and wait for each other for ever. Do all machines see the same files?"
            )

    def any(self, value: bool) -> bool:
        """Tell whether `value` holds on any process; all must call."""
        if self._group is None:
            return value
        found = torch.tensor(int(value))
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return bool(found)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block, then all others do: for what fills a folder that all of them read."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


def _portable(error: Exception) -> Exception:
    """An error that another process can be sent: the same, or one of its words. A failed sending would leave it waiting."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception as reason:  # noqa: BLE001 - whatever an exception's own pickling raises
        return RuntimeError(f"{type(error).__name__}: {error} (not sent as it is: {type(reason).__name__})")
    return error


@functools.cache
def _gloo_group(world: Any) -> Any:
    """One for all: each has threads and connections of its own. `world` is what it belongs to."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def is_first_process() -> bool:
    """Whether this is rank 0, or the only process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def join_processes() -> None:
    """Join the processes that a launcher started; does nothing without one, or when they are joined already."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)


def leave_processes() -> None:
    """End the process group, if there is one: what `join_processes` or a Trainer began."""
    if dist.is_available() and dist.is_initialized():
        _gloo_group.cache_clear()  # it belongs to the group that ends
        dist.destroy_process_group()


def processes_here() -> int:
    """How many of the launcher's processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def leaves_processes(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate a script's main function: when it is done, or leaves by SystemExit, end the process group.

    Not after another exception: the other processes may be waiting in a collective, and their launcher ends them.
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


def local_rank() -> int:
    """This process's number on its machine: which accelerator is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def default_device() -> torch.device:
    """The accelerator that is this process's, else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, local_rank())
