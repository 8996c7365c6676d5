"""Processes of a workload: run in one build, measured from outside or by themselves."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samf.benchmarks.build_lines.builds import Build, last_line
from samf.benchmarks.build_lines.plan import PROGRAMS, Workload
from samf.benchmarks.process_memory import run_measured


class WorkloadError(RuntimeError):
    """The process of a workload failed; the message has its last line."""


@dataclass(frozen=True)
class Reading:
    """One figure of one process.

    Attributes:
        seconds: of the clock.
        processor: seconds of all its processes on a processor.
        memory: MB at the peak, of a whole command (shared pages once) or added by the part that is timed; None = not measured.
    """

    seconds: float
    processor: float
    memory: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a process of a workload gave: figures by name, and results to compare."""

    readings: dict[str, Reading]
    results: Any


def run_workload(workload: Workload, build: Build, folder: Path, out: Path) -> Outcome:
    """Run a workload once.

    Args:
        workload: a command or a program.
        build: it imports this one.
        folder: kept by the build over all rounds.
        out: an empty folder of this round, where the process starts.

    Raises:
        WorkloadError: the process failed, or its results can't be read.
        BuildError: it imported another build.
    """
    if workload.program is not None:
        return _run_program(workload, dict(workload.task), build, folder, out)
    named = {"samf": str(build.path / "samf"), "out": str(out)}
    arguments = [argument.format(**named) for argument in workload.command]
    measured = _run(arguments, workload, build, out, watches_memory=workload.watches_memory)
    try:
        results = None if workload.read_results is None else workload.read_results(out)
    except (OSError, ValueError, KeyError) as error:
        raise WorkloadError(f"{build.name}: its results can't be read: {type(error).__name__}: {error}") from error
    return Outcome({workload.name: measured}, results)


def prepare_workload(workload: Workload, build: Build, folder: Path, out: Path) -> None:
    """Do what a workload needs once in each build; arguments and exceptions as `run_workload`."""
    if workload.prepare is not None:
        _run_program(workload, dict(workload.prepare), build, folder, out)


def _run_program(workload: Workload, task: dict[str, Any], build: Build, folder: Path, out: Path) -> Outcome:
    task_file, outcome_file = out / "task.json", out / "outcome.json"
    task_file.write_text(json.dumps({**task, "folder": str(folder), "out": str(out)}), encoding="utf-8")
    arguments = [PROGRAMS / "driver.py", PROGRAMS / f"{workload.program}.py", task_file, outcome_file]
    _run(list(map(str, arguments)), workload, build, out, watches_memory=False)
    found = json.loads(outcome_file.read_text(encoding="utf-8"))
    build.check_import(Path(found["samf"]))
    readings = {
        name: Reading(figure["seconds"], figure["processor"], figure["memory"] / 1e6 if "memory" in figure else None)
        for name, figure in found["figures"].items()
    }
    return Outcome(readings, found["results"])


def _run(arguments: list[str], workload: Workload, build: Build, out: Path, *, watches_memory: bool) -> Reading:
    # -P: nothing but PYTHONPATH says where samf is, neither the folder of a script nor the working folder.
    command = [sys.executable, "-P", *arguments]
    done = run_measured(command, build.environment(workload.threads), out, watches_memory=watches_memory)
    if done.status:
        raise WorkloadError(f"{build.name}: exit status {done.status}: {last_line(done.messages)}")
    return Reading(done.seconds, done.processor, done.memory / 1e6 if watches_memory else None)
