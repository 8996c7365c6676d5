"""Group records into batches, and divide the batches among processes."""

from collections.abc import Sequence
from itertools import groupby

from samf.data.prompts import record_prompt
from samf.data.schema import Record

__all__ = ["WINDOW", "make_batches", "share_batches"]


WINDOW = 256  # volumes whose questions are mixed; their embeddings are kept until all are answered


def make_batches(records: Sequence[Record], batch_size: int, window: int = WINDOW) -> list[list[Record]]:
    """Return batches of one task each.

    A batch takes as many steps as its longest answer, and equal questions have answers of similar length. So the questions
    about `window` volumes are sorted together: by prompt, short ones first.

    Args:
        records: in any order; the batches don't depend on it.
        batch_size: records of a batch at most.
        window: volumes, sorted by path, whose questions are sorted together.
    """
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record)
    batches = []
    for task in sorted(by_task):
        members = _by_prompt(by_task[task], window)
        batches += [members[start : start + batch_size] for start in range(0, len(members), batch_size)]
    return batches


def _by_prompt(records: Sequence[Record], window: int) -> list[Record]:
    """Return the records of a task in the order of `make_batches`."""
    volumes = {name: rank for rank, name in enumerate(sorted({record["volume"] or "" for record in records}))}

    def order(record: Record) -> tuple[int, int, str, int, str]:
        rank, prompt = volumes[record["volume"] or ""], record_prompt(record)
        return rank // window, len(prompt), prompt, rank, record["id"]

    return sorted(records, key=order)


def share_batches(batches: Sequence[list[Record]], rank: int, count: int) -> list[int]:
    """Return the positions of the batches that a process answers.

    Of each task a process has one run of neighbours, so that few volumes are read by two. Every batch belongs to one
    process; the runs differ in length by at most one batch.

    Args:
        batches: all batches, in the order of `make_batches`.
        rank: this process's number, from 0.
        count: the number of processes.
    """
    share = []
    for _, group in groupby(range(len(batches)), key=lambda number: batches[number][0]["task"]):
        numbers = list(group)
        share += [number for position, number in enumerate(numbers) if position * count // len(numbers) == rank]
    return share
