"""Threads of the readers."""

import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor


def thread_count() -> int:
    """Return how many threads torch uses; before it is imported, how many processors there are."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_parallel(task: Callable[[int], object], items: Iterable[int]) -> None:
    """Call `task` for each item on as many threads as torch uses; NumPy and reads release the interpreter lock meanwhile.

    Args:
        task: called once per item.
        items: of which the first, in their order, whose task raises decides what is raised here.
    """
    threads = thread_count()
    if threads == 1:  # a DataLoader worker among others
        for item in items:
            task(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(task, items):
            pass  # raises what a task raised
