"""Computing rows of an array on several processes, each its share."""

from collections.abc import Callable

import numpy as np
import torch


def share_rows(compute: Callable[[list[int]], np.ndarray], rows: int) -> np.ndarray:
    """Compute each process's share of some rows, and return all of them on every process, which must all call it.

    Args:
        compute: Returns the results (n, …) for n row numbers.
        rows: Number of rows, at least 1; row i is computed by process i modulo the number of processes.

    Returns:
        The results (rows, …) in the order of the rows.
    """
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = list(range(rank, rows, world))
    if world == 1:
        return compute(share)
    parts: list[np.ndarray | None] = [None] * world
    torch.distributed.all_gather_object(parts, compute(share) if share else None)
    first = parts[0]  # process 0 has row 0
    joined = np.empty((rows, *first.shape[1:]), dtype=first.dtype)
    for start, part in enumerate(parts):
        if part is not None:
            joined[start::world] = part
    return joined
