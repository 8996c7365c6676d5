"""What the rules read in a report: labels, sides and lengths, once per distinct report, in a second process if one is free."""

import gc
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from tqdm.auto import tqdm

from samf.evaluation.metrics.report_sizes import read_sizes
from samf.model.text_labeller import TERMS, finding_sides, label_report

logger = logging.getLogger(__name__)

_FEWEST_IN_BACKGROUND = 200  # reports; fewer take less time than a process
_MOST_KEPT = 1 << 17


@dataclass(frozen=True)
class Reading:
    """What the rules read in a report.

    Attributes:
        labels: CT-RATE's 18 labels, 0 or 1, in the order of `TERMS`.
        sides: (finding, "left" or "right") of the findings that the report affirms.
        sizes: lengths in mm, as `read_sizes` returns them.
    """

    labels: tuple[int, ...]
    sides: frozenset[tuple[str, str]]
    sizes: tuple[float, ...]


_known: dict[str, Reading] = {}
_running: list[tuple[Connection, Sequence[str]]] = []  # one at most: the process that reads, and its reports


def read_report(report: str) -> Reading:
    """Return what the rules read in a report."""
    if report not in _known and _running:
        _collect()
    if report not in _known:
        if len(_known) >= _MOST_KEPT:
            _known.clear()
        _known[report] = _read(report)
    return _known[report]


def rule_labels(reports: Sequence[str]) -> np.ndarray:
    """Return the labels of N reports as an int64 array (N, 18), as `label_reports` does."""
    return np.array([read_report(report).labels for report in reports], dtype=np.int64).reshape(-1, len(TERMS))


def _read(report: str) -> Reading:
    sizes = tuple(read_sizes(report).elements())
    return Reading(tuple(label_report(report).values()), finding_sides(report), sizes)


@contextmanager
def reading_in_background(reports: Sequence[str]) -> Iterator[None]:
    """Read reports in a forked process while the body runs; `read_report` waits for it.

    Nothing is forked for a few reports, on one core, or where a fork isn't safe: in a process with threads or torch.
    """
    new = [report for report in dict.fromkeys(reports) if report not in _known]
    if len(new) < _FEWEST_IN_BACKGROUND or _running or not _can_fork():
        yield
        return
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_readings, args=(sender, new), daemon=True)
    gc.freeze()  # otherwise the other process would copy each page whose objects its collector visits
    process.start()
    gc.unfreeze()
    sender.close()
    _running.append((receiver, new))
    try:
        yield
    finally:
        _running.clear()
        receiver.close()
        process.terminate()
        process.join()


def _can_fork() -> bool:
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        return False
    return "torch" not in sys.modules and threading.active_count() == 1


def _send_readings(sender: Connection, reports: Sequence[str]) -> None:
    sender.send([_read(report) for report in tqdm(reports, desc="labels", unit=" reports", disable=None, leave=False)])


def _collect() -> None:
    """Wait for the process that reads; without its readings, as when it was killed, reports are read here."""
    receiver, reports = _running.pop()
    try:
        _known.update(zip(reports, receiver.recv(), strict=True))
    except (EOFError, OSError):
        logger.warning("The process that reads reports ended early; they are read in this process.")
