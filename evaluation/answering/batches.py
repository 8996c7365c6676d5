"""Group records into batches, and divide the batches among processes."""

from collections.abc import Sequence
from itertools import groupby

from samf.data.prompts import record_prompt
from samf.data.schema import Record

__all__ = ["make_batches", "share_batches"]


def make_batches(records: Sequence[Record], batch_size: int) -> list[list[Record]]:
    """Return batches of one task each, with the questions about one volume next to each other, short ones first."""

    def order(record: Record) -> tuple[str, str, int, str]:
        return record["task"], record["volume"] or "", len(record_prompt(record)), record["id"]

    batches = []
    for _, group in groupby(sorted(records, key=order), key=lambda record: record["task"]):
        members = list(group)
        batches += [members[start : start + batch_size] for start in range(0, len(members), batch_size)]
    return batches


def share_batches(batches: Sequence[list[Record]], rank: int, count: int) -> list[int]:
    """Return the positions of the batches that a process answers.

    Of each task a process has one run of neighbours, so that it reads a volume once. Every batch belongs to one process; the
    runs differ in length by at most one batch.

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
