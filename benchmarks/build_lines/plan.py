"""What a line runs in both builds: commands, or programs of `build_programs`, with rounds, targets and limits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from samf.benchmarks.workloads import Settings

PROGRAMS = Path(__file__).parents[1] / "build_programs"


@dataclass(frozen=True)
class Target:
    """What a figure shall reach now; None = no target.

    Attributes:
        seconds: at most.
        gain: before / now, at least.
        memory: MB, at most.
        limit: what no build can go below, in words.
    """

    seconds: float | None = None
    gain: float | None = None
    memory: float | None = None
    limit: str = ""


@dataclass(frozen=True)
class Workload:
    """What one process does. Each of its figures has the seconds of one part, or those of a whole command.

    Attributes:
        name: of the workload; a command's figure has the same name.
        program: a file of `build_programs`; its figures have the names that it gives them.
        task: the program's; it also gets `folder`, which a build keeps over all rounds, and `out`, empty in each round.
        prepare: a task that the program does once in each build, not timed.
        command: arguments of Python in place of a program; `{samf}` is the package's folder, `{out}` the round's.
        rounds: how often it runs in each build, at most.
        threads: OMP_NUM_THREADS; None = as it is.
        read_results: returns a command's results from the folder of the round; None = nothing to compare.
        tolerance: largest difference of two numbers that count as equal.
        targets: figure → target.
        note: conditions that a reader needs.
        watches_memory: whether the memory of a command is sampled, which may delay short ones.
        is_for_memory: whether only its memory counts, since it runs too seldom for its seconds.
    """

    name: str
    program: str | None = None
    task: Mapping[str, Any] = field(default_factory=dict)
    prepare: Mapping[str, Any] | None = None
    command: Sequence[str] = ()
    rounds: int = 5
    threads: int | None = None
    read_results: Callable[[Path], Any] | None = None
    tolerance: float = 0.0
    targets: Mapping[str, Target] = field(default_factory=dict)
    note: str = ""
    watches_memory: bool = True
    is_for_memory: bool = False


@dataclass(frozen=True)
class Inputs:
    """Where and at which size a line writes its inputs.

    Attributes:
        folder: of the line; removed after it.
        shared: of all lines, for the scan that several of them read.
        is_tiny: whether inputs are as small as possible: the line shows that it runs, and there are no targets.
    """

    folder: Path
    shared: Path
    is_tiny: bool

    def settings(self, folder: Path | None = None, dtype: torch.dtype = torch.float32) -> Settings:
        """Return the settings by which other benchmarks write such inputs.

        Args:
            folder: where; default: the line's.
            dtype: of weights and tensors.
        """
        size = "tiny" if self.is_tiny else "full"
        return Settings(size, torch.device("cpu"), dtype, budget=0, folder=folder or self.folder)

    def targets(self, by_figure: Mapping[str, Target]) -> Mapping[str, Target]:
        """Return the targets; none at the tiny size."""
        return {} if self.is_tiny else by_figure


Line = Callable[[Inputs], list[Workload]]
