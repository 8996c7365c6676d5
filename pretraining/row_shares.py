"""Computing rows of an array on several processes, each its share."""

from collections.abc import Callable

import numpy as np
import torch


def share_rows(compute: Callable[[list[int]], np.ndarray], rows: int) -> np.ndarray:
    """Compute each process's share of some rows, and return all of them on every process, which must all call it.

    Args:
        compute: Returns the results (n, …) for n row numbers.
        rows: Number of rows; row i is computed by process i modulo the number of processes.

    Returns:
        The results (rows, …) in the order of the rows.
    """
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = list(range(rank, rows, world))
    part = compute(share) if share else None
    if world == 1:
        return part
    parts: list[np.ndarray | None] = [None] * world
    torch.distributed.all_gather_object(parts, part)
    joined = np.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype)
    for start, other in enumerate(parts):
        joined[start::world] = 0 if other is None else other
    return joined
