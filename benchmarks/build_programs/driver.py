"""Run one program of this folder in the build that PYTHONPATH names, and write what it measured.

    PYTHONPATH=BUILD python -P driver.py PROGRAM TASK OUTCOME

Run as a file, so that the driver comes from the newer build while the program's imports of `samf` come from BUILD. TASK and
OUTCOME are JSON files; PROGRAM has a function `run(task, recorder)` that returns the results to compare.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def load_program(path: Path) -> ModuleType:
    """Return the module of a program; loading it imports `samf`."""
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path}: no Python file; expected a program of {Path(__file__).parent}.")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """Seconds of the clock, seconds of the processor and memory of the parts of a program, by name."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, float]] = {}

    @contextmanager
    def measure(self, name: str, *, memory: bool = False) -> Iterator[None]:
        """Measure the block.

        Args:
            name: of the figure.
            memory: also record how many bytes the block adds to this process at its peak.
        """
        before = _reset_peak() if memory else 0
        busy, started = _processor_seconds(), time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.figures[name] = {"seconds": seconds, "processor": _processor_seconds() - busy}
        if memory:
            self.figures[name]["memory"] = _status_bytes("VmHWM") - before


def _processor_seconds() -> float:
    """Return the seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _reset_peak() -> int:
    """Start the peak of this process's memory anew where the system allows that, and return the bytes that it holds now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    """Return a field of /proc/self/status in bytes; 0 on systems that don't have it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def imported_folder() -> Path:
    """Return the folder of the package `samf`.

    Raises:
        ImportError: a module of it comes from elsewhere.
    """
    root = Path(str(sys.modules["samf"].__file__)).parent
    modules = [(name, getattr(module, "__file__", None)) for name, module in sys.modules.items()]
    for name, file in modules:
        if name.startswith("samf.") and file and not Path(file).resolve().is_relative_to(root.resolve()):
            raise ImportError(f"{name} comes from {file}, outside of {root}. Is another copy of samf installed?")
    return root


def main() -> None:
    """Run the program and write the outcome."""
    program, task, outcome = map(Path, sys.argv[1:4])
    recorder = Recorder()
    results = load_program(program).run(json.loads(task.read_text(encoding="utf-8")), recorder)
    found = {"samf": str(imported_folder()), "figures": recorder.figures, "results": results}
    outcome.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
