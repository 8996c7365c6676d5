"""The results as a Markdown table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from samf.benchmarks.build_lines.results import Comparison, LineResult, WorkloadResult
from samf.benchmarks.measuring import Spread

_HEADER = ("line", "what", "before", "target", "now", "limit", "before / now", "of the processor", "memory", "results")


def markdown(lines: Sequence[LineResult], facts: Mapping[str, Any]) -> str:
    """Return a table of all figures, notes on the lines, and what the run depended on.

    Args:
        lines: the lines that have been run.
        facts: name → what is said about builds, machine and versions.
    """
    rows = [_HEADER, ["---"] * len(_HEADER), *(row for line in lines for row in _rows(line))]
    table = [f"| {' | '.join(row)} |" for row in rows]
    notes = [f"- {note}" for line in lines for note in _notes(line)]
    known = ", ".join(f"{name} {fact}" for name, fact in facts.items() if fact is not None)
    return "\n".join([*table, "", *notes, "", f"{known}.", ""])


def _rows(line: LineResult) -> Iterator[list[str]]:
    if line.skipped or line.error:
        yield _empty(line.name, "", f"skipped: {line.skipped}" if line.skipped else f"FAILED: {line.error}")
    for workload in line.workloads:
        if workload.error:
            yield _empty(line.name, workload.name, f"FAILED: {workload.error}")
        for figure in workload.figures:
            yield _row(line, workload, figure)


def _empty(line: str, what: str, reason: str) -> list[str]:
    return [line, what, *[""] * (len(_HEADER) - 3), reason.replace("|", "\\|")]


def _row(line: LineResult, workload: WorkloadResult, figure: Comparison) -> list[str]:
    target = figure.target
    parts = [
        "" if target.seconds is None else f"≤ {_seconds(target.seconds)}",
        "" if target.gain is None else f"≥ {target.gain:g} ×",
        "" if target.memory is None else f"≤ {target.memory:.0f} MB",
    ]
    verdict = {None: "", True: "", False: " **(missed)**"}[figure.reached]
    aims = ", ".join(filter(None, parts)) + verdict
    memory = "" if figure.memory_now is None else f"{figure.memory_before or 0:.0f} → {figure.memory_now:.0f} MB"
    equal = {None: "", True: "equal", False: "DIFFERENT"}[
        None if workload.difference is None else not workload.difference
    ]
    if workload.is_for_memory:
        return [line.name, figure.name, "", aims, "", target.limit, "", "", memory, equal]
    busy = "" if figure.processor_ratio is None else f"{figure.processor_ratio['median']:.2f} ×"
    return [
        *(line.name, figure.name, _spread(figure.before), aims, _spread(figure.now), target.limit),
        *(_ratio(figure.ratio), busy, memory, equal),
    ]


def _spread(spread: Spread) -> str:
    text = _seconds(spread["median"])
    if spread["repeats"] == 1:
        return text
    return f"{text} ({_digits(spread['first_quartile'])} to {_digits(spread['third_quartile'])})"


def _ratio(spread: Spread) -> str:
    text = f"{spread['median']:.2f} ×"
    if spread["repeats"] == 1:
        return text
    return f"{text} ({spread['first_quartile']:.2f} to {spread['third_quartile']:.2f})"


def _seconds(seconds: float) -> str:
    return f"{_digits(seconds)} s"


def _digits(value: float) -> str:
    """Return a number with three digits, and at most three of them after the point."""
    if value < 1:
        return f"{value:.3f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _notes(line: LineResult) -> Iterator[str]:
    if line.skipped:
        return
    took = [f"{line.name}: {line.seconds:.0f} s in all"]
    for workload in line.workloads:
        rounds = workload.figures[0].now["repeats"] if workload.figures else 0
        counted = f"{rounds} round{'s' * (rounds != 1)}"
        details = ", ".join(filter(None, [counted, workload.note]))
        took.append(f"{workload.name} ({details})")
        if workload.difference:
            took.append(f"results differ: {workload.difference}")
    yield "; ".join(took)
