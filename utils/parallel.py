"""Worker processes with one thread each."""

import os
from concurrent.futures import ProcessPoolExecutor

import torch
from threadpoolctl import threadpool_limits


def one_thread() -> None:
    """Limit this process to one thread: with one process per core, more threads slow all of them down."""
    torch.set_num_threads(1)
    threadpool_limits(limits=1)


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of `workers` single-threaded processes."""
    return ProcessPoolExecutor(workers, initializer=one_thread)


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
