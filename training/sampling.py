"""The order of training records, by seed and epoch alone."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from samf.data.mixture import TaskMixture

MEGABATCH = 50  # batches whose records are sorted together: enough to find equals, few enough to stay random


class RecordOrder(Sampler[int]):
    """Every record once an epoch, in an order that seed and `epoch` decide alone.

    An interrupted run, on one process or several, then sees the rest of what an unbroken one would have seen. The
    library's own sampler forgets the epoch when several processes resume within it, and its grouping by length draws from
    the generator that dropout draws from.

    Args:
        seed: the order without lengths is the library's own for this seed.
        lengths: tokens of each record: records of about equal length then share a batch.
        batch_size: records of one step on all processes.
        mixture: which records an epoch has; None = all.
        within_steps: only records of the same step are put beside others of their length. A step has what it would have
            at random, and its micro-batches little padding.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
        mixture: TaskMixture | None = None,
        within_steps: bool = False,
    ):
        self.count = count if mixture is None else len(mixture)
        self.seed, self.lengths, self.batch_size, self.mixture = seed, lengths, batch_size, mixture
        self.within_steps, self.epoch = within_steps, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        if self.mixture is not None:
            rows = self.mixture.epoch_rows(self.epoch).tolist()
            order = [rows[k] for k in order]
        if self.within_steps:
            order = sort_within_steps(order, self.lengths, self.batch_size)
        elif self.lengths is not None:
            order = group_by_length(order, self.lengths, self.batch_size, generator)
        return iter(order)


def group_by_length(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> list[int]:
    """`order` with neighbours of about equal length, so that its successive batches need little padding.

    Batches come in random order, but that of the longest record is the first: what doesn't fit in memory shows at once.
    An incomplete batch stays the last.
    """
    size = MEGABATCH * batch_size
    groups = [sorted(order[start : start + size], key=lambda k: lengths[k]) for start in range(0, len(order), size)]
    ordered = [index for group in groups for index in group]
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    rest = batches.pop() if len(batches[-1]) < batch_size else []
    shuffled = [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]
    if shuffled:
        longest = max(range(len(shuffled)), key=lambda k: max(lengths[index] for index in shuffled[k]))
        shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
    return [index for batch in [*shuffled, rest] for index in batch]


def sort_within_steps(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    """`order` with each step's records by length, the longest first: their gradients are summed, in whatever order."""
    steps = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return [index for step in steps for index in sorted(step, key=lambda k: -lengths[k])]
