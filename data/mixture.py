"""Which records an epoch has, when tasks are mixed by weight."""

import zlib
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import pyarrow.compute as pc


def parse_weights(items: Sequence[str]) -> dict[str, float]:
    """`["report=1", "multiple_choice=0.5"]` as weights by task. Raises ValueError for anything else."""
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
    """The rows of each epoch: a pure function of seed and epoch, so that a run can be resumed anywhere.

    Every epoch has exactly the same number of records of a task, in proportion to its weight (by largest remainders). A
    task's records are dealt like cards: all of them in random order, then all again in another; epochs take up where the
    last one stopped. So none comes twice before all have come once, and what a short epoch leaves out the next ones have.
    Only where a new deal begins within an epoch can it have a record twice.

    Args:
        records: with a column `task`.
        weights: {task: weight}; a task without one, or with 0, is left out.
        seed: of the random orders.
        epoch_size: records of an epoch. None: until the first task has been read once, so that reports and multiple
            choice of equal weight give every report once and as many questions.

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
                "Weigh those alone, for example --mixture report=1."
            )
        if epoch_size is None:
            epoch_size = int(
                sum(weights.values()) * min(len(self.rows[task]) / weights[task] for task in weights) + 1e-6
            )
        self.seed = seed
        self.counts = apportion(weights, epoch_size)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """Row numbers (len(self),) of an epoch, task by task: shuffle them before use."""
        return np.concatenate([self._dealt(task, epoch * count, count) for task, count in self.counts.items()])

    def _dealt(self, task: str, start: int, count: int) -> np.ndarray:
        """`count` rows of a task's endless deal from its `start`-th on."""
        rows, dealt = self.rows[task], [np.zeros(0, np.int64)]
        while count > 0:
            deal, first = divmod(start, len(rows))
            random = np.random.default_rng([self.seed, zlib.crc32(task.encode()), deal])
            dealt.append(rows[random.permutation(len(rows))[first : first + count]])
            start, count = start + len(dealt[-1]), count - len(dealt[-1])
        return np.concatenate(dealt)


def apportion(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in proportion to `weights` that add up to `total`, by largest remainders."""
    shares = {task: total * weight / sum(weights.values()) for task, weight in weights.items()}
    counts = {task: int(share + 1e-9) for task, share in shares.items()}
    by_remainder = sorted(shares, key=lambda task: (round(counts[task] - shares[task], 9), task))
    for task in by_remainder[: total - sum(counts.values())]:
        counts[task] += 1
    return counts
