"""Figures with their spread and limits, measured in turns; the machine they come from.

Two things are compared only by rounds in which both were timed one after the other: a machine whose speed drifts then
slows both. Medians and quartiles are stated, never a single time.
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from samf.training.memory import peak_bytes, peak_resident

MEASURED_PACKAGES = (
    *("samf", "torch", "transformers", "accelerate", "peft", "torchao", "safetensors"),
    *("numpy", "nibabel", "isal", "pillow"),
)
SHORTEST_SAMPLE = 0.05  # seconds; quicker tasks are called several times a sample
FEWEST_ROUNDS, MOST_ROUNDS = 3, 30


@dataclass(frozen=True)
class Figure:
    """One measured quantity.

    Args:
        values: one value a repeat; the median is what counts.
        at_least, at_most: the limit, None = the figure is only stated.
        note: what a reader needs to know to repeat it.
    """

    name: str
    unit: str
    values: Sequence[float]
    at_least: float | None = None
    note: str = ""
    at_most: float | None = None

    def summary(self) -> dict[str, Any]:
        """The figure as JSON has it."""
        result = {"name": self.name, "unit": self.unit, **summarise(self.values)}
        result |= {"at_least": self.at_least, "at_most": self.at_most, "passed": None}
        if self.at_least is not None:
            result["passed"] = result["median"] >= self.at_least
        if self.at_most is not None:
            result["passed"] = result["median"] <= self.at_most and result["passed"] is not False
        return {**result, "note": self.note}


def summarise(values: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles, extremes and number of values.

    Raises:
        ValueError: no values, or one that isn't finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"A figure needs finite values; found {list(values)}.")
    first, _, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "first_quartile": first,
        "third_quartile": third,
        "minimum": min(values),
        "maximum": max(values),
        "repeats": len(values),
    }


@dataclass
class Stopwatch:
    """Times calls on a device, within a time budget.

    Args:
        budget: seconds that `in_turns` may take beside its warm-up; it makes the fewest rounds all the same.
    """

    device: torch.device
    budget: float
    clock: Callable[[], float] = field(default=time.perf_counter)

    def seconds(self, task: Callable[[], Any], calls: int = 1) -> float:
        """Mean seconds of `calls` calls, until the device has finished."""
        self._wait()
        started = self.clock()
        for _ in range(calls):
            task()
        self._wait()
        return (self.clock() - started) / calls

    def in_turns(
        self, tasks: Mapping[str, Callable[[], Any]], label: str, fewest: int = FEWEST_ROUNDS
    ) -> dict[str, list[float]]:
        """Seconds of each task, one value a round; every other round runs the tasks in reverse order."""
        warm = {name: self._warm_up(task) for name, task in tasks.items()}
        calls = {name: max(1, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-7))) for name, seconds in warm.items()}
        one_round = max(sum(warm[name] * calls[name] for name in tasks), 1e-7)
        rounds = min(MOST_ROUNDS, max(fewest, int(self.budget / one_round)))
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for number in tqdm(range(rounds), desc=label, leave=False):
            for name in list(tasks) if number % 2 == 0 else reversed(list(tasks)):
                times[name].append(self.seconds(tasks[name], calls[name]))
        return times

    def _warm_up(self, task: Callable[[], Any]) -> float:
        """Seconds of a call. The first also pays for allocations and kernel choices, so a quick task has a second."""
        seconds = self.seconds(task)
        return seconds if seconds > 1 else self.seconds(task)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def ratios(numerators: Iterable[float], denominators: Iterable[float]) -> list[float]:
    """Round by round."""
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def resident() -> int:
    """Bytes of memory that this process holds now; the most it has held so far where the system doesn't tell."""
    facts = Path("/proc/self/statm")
    if not facts.is_file():
        return peak_resident()
    return int(facts.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: torch.device) -> list[Figure]:
    """The most memory that this process has held so far: resident, and on the GPU if it uses one."""
    figures = [Figure("peak resident memory", "GB", [peak_resident() / 1e9])]
    if device.type == "cuda":
        figures.append(Figure("peak GPU memory", "GB", [peak_bytes(device) / 1e9]))
    return figures


def free_memory(device: torch.device) -> float:
    """Bytes that can still be used; infinite where the system doesn't tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}
    return machine


def _cpu_name() -> str:
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_versions() -> dict[str, str | None]:
    """Python and the packages that matter; None = not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in MEASURED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
