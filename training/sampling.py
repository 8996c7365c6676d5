"""The order of training records as a function of seed and epoch only."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from samf.data.mixture import TaskMixture
from samf.training.shard_order import ShardWindow

# Batches whose records are sorted together: enough to find records of equal length, few enough to stay random.
_MEGABATCH = 50


def order_seed(training: TrainingArguments) -> int:
    """Return the seed of the order of the data: `data_seed`, which may be 0, or else `seed`."""
    return training.seed if training.data_seed is None else training.data_seed


class EpochSampler(Sampler):
    """Every index of a data set once per epoch, as pairs (epoch, index), in an order that depends on seed and epoch only.

    With the epoch in the key, a data set can draw each item's augmentation from (seed, epoch, index): neither the number of
    processes and workers nor an interruption changes what is seen.

    Args:
        length: Number of items.
        seed: Seed of the order.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return ((self.epoch, int(index)) for index in order)


class SetEpoch(TrainerCallback):
    """A callback that sets a sampler's epoch.

    Trainer's own call doesn't reach the sampler when several processes resume within an epoch.

    Args:
        sampler: Gets the epoch as its attribute `epoch`.
    """

    def __init__(self, sampler: "EpochSampler | RecordOrder"):
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the sampler's epoch.

        Args:
            args: Unused.
            state: Knows the epoch.
            control: Unused.
            **kwargs: Unused; what Trainer passes to callbacks.
        """
        self.sampler.epoch = int(state.epoch or 0)


class RecordOrder(Sampler[int]):
    """Every record once per epoch, in an order that depends on seed and `epoch` only.

    A run that was interrupted, on one process or several, sees the rest of what an unbroken run would have seen. The
    library's own sampler loses the epoch when several processes resume within it, and its grouping by length draws from
    the generator that dropout draws from.

    Args:
        count: Number of records.
        seed: Seed of the order; without lengths, the order is the library's own for this seed.
        lengths: Tokens of each record: records of similar length then share a batch. None = random batches.
        batch_size: Records of one step on all processes.
        mixture: The records of each epoch; None = all.
        within_steps: Sort by length only within a step: each step has the records that it would have at random, and its
            micro-batches need little padding.
        window: Keeps records of one shard near each other; None = any record anywhere.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
        mixture: TaskMixture | None = None,
        within_steps: bool = False,
        window: ShardWindow | None = None,
    ):
        self.window = window
        self.count = count if mixture is None else len(mixture)
        self.seed, self.lengths, self.batch_size, self.mixture = seed, lengths, batch_size, mixture
        self.within_steps, self.epoch = within_steps, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = np.arange(self.count) if self.mixture is None else self.mixture.epoch_rows(self.epoch)
        if self.window is None:
            order = rows[torch.randperm(self.count, generator=generator).numpy()].tolist()
        else:
            order = self.window.order(rows, [self.seed, self.epoch]).tolist()
        if self.within_steps:
            order = _sort_within_steps(order, self.lengths, self.batch_size)
        elif self.lengths is not None:
            order = group_by_length(order, self.lengths, self.batch_size, generator)
        if self.window is None:
            return iter(order)
        self.window.check_room(order)
        return self.window.follow(order)


def group_by_length(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> list[int]:
    """Return `order` with records of similar length next to each other, so that successive batches need little padding.

    Batches come in random order, except that the batch of the longest record is the first: a step that doesn't fit in
    memory fails at once. An incomplete batch stays the last.

    Args:
        order: Indices of records in random order.
        lengths: Tokens of each record, by index.
        batch_size: Records of one batch.
        generator: Draws the order of the batches.
    """
    size = _MEGABATCH * batch_size
    groups = [sorted(order[start : start + size], key=lambda k: lengths[k]) for start in range(0, len(order), size)]
    ordered = [index for group in groups for index in group]
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    rest = batches.pop() if len(batches[-1]) < batch_size else []
    shuffled = [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]
    if shuffled:
        longest = max(range(len(shuffled)), key=lambda k: max(lengths[index] for index in shuffled[k]))
        shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
    return [index for batch in [*shuffled, rest] for index in batch]


def _sort_within_steps(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    """Return `order` with each step's records sorted by length, the longest first.

    A step sums its records' gradients, so their order within it changes nothing but rounding.

    Args:
        order: Indices of records.
        lengths: Tokens of each record, by index.
        batch_size: Records of one step.
    """
    steps = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return [index for step in steps for index in sorted(step, key=lambda k: -lengths[k])]
