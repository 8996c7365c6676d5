"""Worker processes that don't fight each other for cores."""

import os
from concurrent.futures import ProcessPoolExecutor

import torch
from threadpoolctl import threadpool_limits


def one_thread() -> None:
    """Keep this process to one thread: with a process a core, more threads each make all of them slower."""
    torch.set_num_threads(1)
    threadpool_limits(limits=1)


def process_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of `workers` single-threaded processes."""
    return ProcessPoolExecutor(workers, initializer=one_thread)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
