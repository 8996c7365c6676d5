"""Measurements with spread and limits, and the machine that they come from.

Two tasks are compared only within rounds that time one after the other, so that a drift of the machine's speed affects
both. Medians and quartiles are reported, never a single time.
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
from typing import Any, TypedDict

import torch
from tqdm import tqdm

from samf.training.memory import peak_bytes, peak_resident

_MEASURED_PACKAGES = (
    *("samf", "torch", "transformers", "accelerate", "peft", "torchao", "safetensors"),
    *("numpy", "nibabel", "isal", "pillow", "xllamacpp"),
)
_SHORTEST_SAMPLE = 0.05  # seconds; shorter tasks are called several times per sample
FEWEST_ROUNDS, MOST_ROUNDS = 3, 30


@dataclass(frozen=True)
class Measurement:
    """One measured quantity.

    Args:
        name: of the quantity.
        unit: of the values.
        values: one value per repeat; the median is compared with the limits.
        at_least: lower limit; None for no limit.
        note: conditions that a reader needs to repeat it.
        at_most: upper limit; None for no limit.
    """

    name: str
    unit: str
    values: Sequence[float]
    at_least: float | None = None
    note: str = ""
    at_most: float | None = None

    def summary(self) -> "Summary":
        """Return the measurement as it is written to JSON."""
        spread = summarise(self.values)
        passed = None
        if self.at_least is not None:
            passed = spread["median"] >= self.at_least
        if self.at_most is not None:
            passed = spread["median"] <= self.at_most and passed is not False
        return {
            "name": self.name,
            "unit": self.unit,
            **spread,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "passed": passed,
            "note": self.note,
        }


class Spread(TypedDict):
    """Median, quartiles, extremes and number of values."""

    median: float
    first_quartile: float
    third_quartile: float
    minimum: float
    maximum: float
    repeats: int


class Summary(Spread):
    """A measurement as JSON holds it; `passed` is None without a limit."""

    name: str
    unit: str
    at_least: float | None
    at_most: float | None
    passed: bool | None
    note: str


def summarise(values: Sequence[float]) -> Spread:
    """Return the spread of at least one value.

    Raises:
        ValueError: there are no values, or one isn't finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"A measurement needs finite values; found {list(values)}.")
    values = [float(value) for value in values]  # NumPy's numbers and what comparing them gives aren't JSON's
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
        device: where the tasks run.
        budget: seconds that `in_turns` may take after its warm-up; at least the fewest rounds are run.
        clock: returns seconds.
    """

    device: torch.device
    budget: float
    clock: Callable[[], float] = field(default=time.perf_counter)

    def seconds(self, task: Callable[[], Any], calls: int = 1) -> float:
        """Return the mean seconds of `calls` calls, until the device has finished."""
        self._wait()
        started = self.clock()
        for _ in range(calls):
            task()
        self._wait()
        return (self.clock() - started) / calls

    def in_turns(
        self, tasks: Mapping[str, Callable[[], Any]], label: str, fewest: int = FEWEST_ROUNDS
    ) -> dict[str, list[float]]:
        """Time tasks in rounds; every other round runs them in reverse order.

        Args:
            tasks: name → task.
            label: of the progress bar.
            fewest: rounds that are run whatever the budget.

        Returns:
            Name → seconds, one value per round.
        """
        warm = {name: self._warm_up(task) for name, task in tasks.items()}
        calls = {name: max(1, math.ceil(_SHORTEST_SAMPLE / max(seconds, 1e-7))) for name, seconds in warm.items()}
        one_round = max(sum(warm[name] * calls[name] for name in tasks), 1e-7)
        rounds = min(MOST_ROUNDS, max(fewest, int(self.budget / one_round)))
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for number in tqdm(range(rounds), desc=label, leave=False):
            for name in list(tasks) if number % 2 == 0 else reversed(list(tasks)):
                times[name].append(self.seconds(tasks[name], calls[name]))
        return times

    def _warm_up(self, task: Callable[[], Any]) -> float:
        """Return the seconds of a call; a short task is called twice, since the first call includes set-up costs."""
        seconds = self.seconds(task)
        return seconds if seconds > 1 else self.seconds(task)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def ratios(numerators: Iterable[float], denominators: Iterable[float]) -> list[float]:
    """Return the ratios round by round."""
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def resident() -> int:
    """Return the bytes of memory that this process holds now; its peak on systems that don't report it."""
    facts = Path("/proc/self/statm")
    if not facts.is_file():
        return peak_resident()
    return int(facts.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: torch.device) -> list[Measurement]:
    """Return the peak memory of this process so far: resident, and on the GPU if it uses one."""
    peaks = [Measurement("peak resident memory", "GB", [peak_resident() / 1e9])]
    if device.type == "cuda":
        peaks.append(Measurement("peak GPU memory", "GB", [peak_bytes(device) / 1e9]))
    return peaks


def free_memory(device: torch.device) -> float:
    """Return the bytes that can still be used; infinite on systems that don't report it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), math.inf)


Machine = dict[str, str | int | float | None]


def describe_machine(device: torch.device) -> Machine:
    """Return the properties of the machine that measurements depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: Machine = {
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
    """Return the versions of Python and of the packages that matter; None for one that isn't installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _MEASURED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
