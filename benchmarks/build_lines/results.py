"""Rounds of a workload as figures: medians, quartiles, ratios by pairs, and whether both builds give the same results."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samf.benchmarks.build_lines.plan import Target, Workload
from samf.benchmarks.build_lines.processes import Outcome, Reading
from samf.benchmarks.measuring import Spread, ratios, summarise


@dataclass(frozen=True)
class Comparison:
    """One figure of both builds.

    Attributes:
        name: of the figure.
        before, now: seconds of the clock.
        ratio: before / now, round by round.
        processor_ratio: the same of seconds on a processor, which other work on the machine disturbs less.
        memory_before, memory_now: MB, the median; None = not measured.
        target: what it shall reach, and what no build can go below.
        reached: whether it does; None = no target.
    """

    name: str
    before: Spread
    now: Spread
    ratio: Spread
    processor_ratio: Spread | None
    memory_before: float | None
    memory_now: float | None
    target: Target
    reached: bool | None


@dataclass(frozen=True)
class WorkloadResult:
    """One workload of a line.

    Attributes:
        name: of the workload.
        figures: of both builds; none if it failed.
        difference: the first difference between the builds' results; "" = equal, None = nothing to compare.
        seconds: of all its rounds in both builds.
        note: conditions.
        is_for_memory: whether seconds don't count.
        error: why it failed.
    """

    name: str
    figures: list[Comparison]
    difference: str | None
    seconds: float
    note: str = ""
    is_for_memory: bool = False
    error: str = ""


@dataclass(frozen=True)
class LineResult:
    """One line: its workloads, why it was skipped, or why its inputs couldn't be written; and the seconds of all of it."""

    name: str
    workloads: list[WorkloadResult]
    seconds: float
    skipped: str = ""
    error: str = ""


def compare_rounds(workload: Workload, rounds: Sequence[Mapping[str, Outcome]], seconds: float) -> WorkloadResult:
    """Return the result of a workload that ran in both builds.

    Args:
        workload: names the targets.
        rounds: "before" and "now" → outcome, one mapping per round.
        seconds: that they took.
    """
    outcomes = [outcome for pair in rounds for outcome in pair.values()]
    first = outcomes[0].results
    found = (difference(first, outcome.results, workload.tolerance) for outcome in outcomes)
    differs = next((text for text in found if text), "")
    names = [name for name in outcomes[0].readings if all(name in outcome.readings for outcome in outcomes)]
    figures = [_compare(name, rounds, workload.targets.get(name, Target())) for name in names]
    compared = None if first is None else differs
    return WorkloadResult(workload.name, figures, compared, seconds, workload.note, workload.is_for_memory)


def _compare(name: str, rounds: Sequence[Mapping[str, Outcome]], target: Target) -> Comparison:
    before, now = ([pair[build].readings[name] for pair in rounds] for build in ("before", "now"))
    seconds_before, seconds_now = [one.seconds for one in before], [one.seconds for one in now]
    busy_before, busy_now = [one.processor for one in before], [one.processor for one in now]
    # The system counts a process's seconds in hundredths: too coarse for parts that take few of them.
    tells = min([*busy_before, *busy_now]) >= 0.05
    comparison = Comparison(
        name,
        summarise(seconds_before),
        summarise(seconds_now),
        summarise(ratios(seconds_before, seconds_now)),
        summarise(ratios(busy_before, busy_now)) if tells else None,
        _memory(before),
        _memory(now),
        target,
        None,
    )
    return Comparison(**{**vars(comparison), "reached": _is_reached(comparison)})


def _memory(readings: Sequence[Reading]) -> float | None:
    values = [one.memory for one in readings if one.memory is not None]
    return summarise(values)["median"] if values else None


def _is_reached(found: Comparison) -> bool | None:
    target, checks = found.target, []
    if target.seconds is not None:
        checks.append(found.now["median"] <= target.seconds)
    if target.gain is not None:
        checks.append(found.ratio["median"] >= target.gain)
    if target.memory is not None and found.memory_now is not None:
        checks.append(found.memory_now <= target.memory)
    return all(checks) if checks else None


def difference(first: Any, second: Any, tolerance: float) -> str:
    """Return where two results differ first, "" if nowhere.

    Args:
        first: tree of mappings, sequences, numbers and texts.
        second: another one.
        tolerance: largest difference of two numbers that count as equal.
    """
    one, other = dict(_leaves(first)), dict(_leaves(second))
    for place in [*one, *(place for place in other if place not in one)]:
        if place not in one or place not in other:
            return f"only one build has {place}"
        left, right = one[place], other[place]
        if left != right and not _is_close(left, right, tolerance):
            return f"{place}: {str(left)[:60]} and {str(right)[:60]}"
    return ""


def _leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, branch in tree.items():
            yield from _leaves(branch, f"{place}/{name}")
    elif isinstance(tree, list | tuple):
        for index, branch in enumerate(tree):
            yield from _leaves(branch, f"{place}/{index}")
    else:
        yield place or "the result", tree


def _is_close(left: Any, right: Any, tolerance: float) -> bool:
    if not (isinstance(left, int | float) and isinstance(right, int | float)):
        return False
    return abs(left - right) <= tolerance or (math.isnan(left) and math.isnan(right))
