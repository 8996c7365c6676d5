"""Several processes under `torchrun` or `accelerate launch` that share one output folder.

They never exchange tensors: a rank takes its share of the batches, writes its own files, and waits for the others. So
gloo is enough on any device, and the waiting may take as long as the slowest rank does.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

P, R = ParamSpec("P"), TypeVar("R")

# A rank that is done waits for the others: hours, where the usual limits are 10 (nccl) or 30 (gloo) minutes.
PATIENCE = timedelta(days=30)


class Processes:
    """This process among its fellows; alone where there are none.

    Attributes:
        rank: 0 … count - 1. count: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.count, self._group = 0, 1, None
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

    @contextmanager
    def first_one_first(self) -> Iterator[None]:
        """Rank 0 runs the block, then all others do: for what fills a folder that all of them read."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


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
