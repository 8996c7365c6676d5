"""The records of each epoch, with tasks mixed by weight."""

import zlib
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import pyarrow.compute as pc


def parse_weights(items: Sequence[str]) -> dict[str, float]:
    """Parse `["report=1", "multiple_choice=0.5"]` into weights by task. Raises ValueError for anything else."""
    weights: dict[str, float] = {}
    for item in items:
        task, _, text = item.partition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = float("nan")
        if not task or not 0 <= weight < float("inf") or task in weights:
            raise ValueError(f"mixture has {item!r}; expected each task once with a weight, like 'report=1'.")
        weights[task] = weight
    return weights


class TaskMixture:
    """A sampler of rows by task: a pure function of seed and epoch, so that a run can be resumed anywhere.

    Every epoch has the same number of records of a task, in proportion to its weight (by largest remainders). Each task has
    an endless sequence of random permutations of its records, and an epoch continues where the last one ended. So no record
    is repeated before all have been used, and the next epochs use what a short one leaves out. Only an epoch that contains
    the boundary of two permutations can have a record twice.

    Args:
        records: a Dataset with a column `task`.
        weights: {task: weight}; a task without a weight, or with 0, is left out.
        seed: of the permutations.
        epoch_size: records per epoch. None ends an epoch when the first task has been used once: with equal weights
            every report, and as many multiple-choice questions.

    Raises:
        ValueError: a task without records, or no positive weight.
    """

    def __init__(
        self, records: datasets.Dataset, weights: Mapping[str, float], seed: int = 0, epoch_size: int | None = None
    ):
        weights = {task: float(weight) for task, weight in weights.items() if weight}
        if not weights or min(weights.values()) < 0:
            raise ValueError(f"The mixture's weights are {weights}; expected positive numbers.")
        tasks = records.select_columns("task").with_format("arrow")[:].column("task")
        self.rows = {task: np.flatnonzero(pc.equal(tasks, task).to_numpy()) for task in weights}
        if empty := sorted(task for task, rows in self.rows.items() if not len(rows)):
            raise ValueError(
                f"The mixture names {', '.join(empty)}; the records' tasks are {sorted(tasks.unique().to_pylist())}. "
                "Give weights to these only, for example --mixture report=1."
            )
        if epoch_size is None:
            epoch_size = int(
                sum(weights.values()) * min(len(self.rows[task]) / weights[task] for task in weights) + 1e-6
            )
        self.seed = seed
        self.counts = apportion(weights, epoch_size)

    def __len__(self) -> int:
        """Return the number of records of an epoch."""
        return sum(self.counts.values())

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Return the row numbers (len(self),) of an epoch, task by task: shuffle them before use."""
        return np.concatenate([self._task_rows(task, epoch * count, count) for task, count in self.counts.items()])

    def _task_rows(self, task: str, start: int, count: int) -> np.ndarray:
        """Return `count` rows of a task's endless sequence, beginning with its `start`-th."""
        rows, parts = self.rows[task], [np.zeros(0, np.int64)]
        while count > 0:
            permutation, first = divmod(start, len(rows))
            rng = np.random.default_rng([self.seed, zlib.crc32(task.encode()), permutation])
            parts.append(rows[rng.permutation(len(rows))[first : first + count]])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)


def apportion(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Return integers in proportion to `weights` whose sum is `total`, by largest remainders."""
    shares = {task: total * weight / sum(weights.values()) for task, weight in weights.items()}
    counts = {task: int(share + 1e-9) for task, share in shares.items()}
    by_remainder = sorted(shares, key=lambda task: (round(counts[task] - shares[task], 9), task))
    for task in by_remainder[: total - sum(counts.values())]:
        counts[task] += 1
    return counts
