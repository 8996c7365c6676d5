"""Scripts in their own processes, one or several under torchrun, for tests of what a single process can't show."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent


def command(script: str, processes: int, options: dict) -> list[str]:
    """Return the command `python script`, or torchrun on this machine, with `--key=value` for each option."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(REPOSITORY / script), *flags(options)]


def flags(options: dict) -> list[str]:
    """Return `--key=value` for each option; a list is several values, a mapping is JSON."""
    arguments = []
    for key, value in options.items():
        if isinstance(value, list | tuple):
            arguments += [f"--{key}", *map(str, value)]
        else:
            arguments.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return arguments


def environment() -> dict[str, str]:
    """Return the environment with one thread per process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_script(script: str, processes: int, options: dict) -> None:
    """Run a script to its end; a failure shows its last lines."""
    done = subprocess.run(
        command(script, processes, options), env=environment(), capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-3000:]


def kill_script(script: str, processes: int, options: dict, when: Path, timeout: float = 240.0) -> None:
    """Start a script and kill it with all its processes (SIGKILL) as soon as the path `when` exists."""
    process = subprocess.Popen(
        command(script, processes, options),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started = time.monotonic()
    try:
        while not when.exists() and process.poll() is None and time.monotonic() - started < timeout:
            time.sleep(0.02)
        assert when.exists() and process.poll() is None, f"{when} didn't appear before the script's end"
    finally:
        parent = psutil.Process(process.pid)
        for child in (*parent.children(recursive=True), parent):  # torchrun's workers have process groups of their own
            child.kill()
        process.wait()


def logged(folder: Path, name: str = "loss") -> list[float]:
    """Return the values that a finished run logged under `name`, in the order of its steps."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [row[name] for row in state["log_history"] if name in row]
