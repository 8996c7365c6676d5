"""Our launchers' recipes as they are, on CPU processes over gloo, for the tests of this folder."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launch import REPOSITORY, environment, flags
from safetensors.torch import load_file
from small_run import options_of

SHARDING = ("fsdp2", "deepspeed_zero2", "deepspeed_zero3")
RECIPES = ("ddp", *SHARDING)
STEPS = 6
FULL = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "learning_rate": 3e-3,
    "learning_rates": {"fusion": 5e-3, "language_model": 2e-3},
    "mixture": ["report=1", "multiple_choice=2"],
    "finding_names": ["Cardiomegaly", "Pleural effusion"],
    "aggregator_dropout": 0.0,
    "per_device_train_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # so that the first checkpoint is the best one, not the last
}
RECORDS = 8  # per step
SAMPLES = {"generate_samples": 1, "generate_tokens": 4}
SHIM = str(REPOSITORY / "tests/launchers/cpu_shards.py")
TIMEOUT = 600  # seconds of one launch on a busy machine
_DEVICES = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}


def need(recipe: str) -> None:
    """Skip a test whose launcher isn't installed."""
    if "deepspeed" in recipe and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -e '.[launchers]'")


def accelerate(recipe: str, *, processes: int = 2, bf16: bool = False, more: tuple[str, ...] = ()) -> list[str]:
    """Return `accelerate launch` with one of our recipes; a script and its arguments follow."""
    file = REPOSITORY / "recipes/accelerate" / f"{recipe}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={file}", "--main_process_port=0"]
    return [*launcher, f"--num_processes={processes}", f"--mixed_precision={'bf16' if bf16 else 'no'}", *more, SHIM]


def torchrun(processes: int, *more: str) -> list[str]:
    """Return torchrun; a script and its arguments follow."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [*launcher, *(more or ("--standalone",)), SHIM]


def launch_environment(**variables: Any) -> dict[str, str]:
    """Return the environment of a launcher: devices are CPUs, and scripts find the helpers of the tests."""
    found = environment()
    paths = [str(REPOSITORY / "tests"), *filter(None, [found.get("PYTHONPATH")])]
    return {**found, **_DEVICES, "PYTHONPATH": os.pathsep.join(paths), **{k: str(v) for k, v in variables.items()}}


def launch(command: list[str], **variables: Any) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end; if it takes too long, kill it with its workers."""
    process = subprocess.Popen(
        command,
        env=launch_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:  # torchrun's workers have process groups of their own
            for child in (*psutil.Process(process.pid).children(recursive=True), process):
                child.kill()
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def start(launcher: list[str], script: str, options: dict[str, Any], **variables: Any) -> subprocess.CompletedProcess:
    """Run a script under a launcher to its end, with facts of each process in `output_dir`/_facts."""
    facts = Path(options["output_dir"], "_facts")
    return launch([*launcher, str(REPOSITORY / script), *flags(options)], SHARD_FACTS=facts, **variables)


def succeed(*args: Any, **kwargs: Any) -> None:
    """Run a script under a launcher; a failure shows its last lines."""
    done = start(*args, **kwargs)
    assert done.returncode == 0, done.stderr[-4000:]


@dataclass(frozen=True)
class Run:
    """The folder of a finished run."""

    folder: Path

    def logged(self, name: str = "loss") -> list[float]:
        state = json.loads((self.folder / "trainer_state.json").read_text(encoding="utf-8"))
        return [row[name] for row in state["log_history"] if name in row]

    def facts(self) -> list[dict[str, Any]]:
        """Return what each process held after the first step, by rank."""
        files = sorted(self.folder.glob("_facts/rank_*.json"), key=lambda file: int(file.stem.partition("_")[2]))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def weights(self, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
        return load_file(self.folder / file)


def assert_same_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float) -> None:
    """Compare tensors by name, with the largest difference in the message."""
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(
            found[name], weight, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def full_options(work: Path, output: Path, processes: int, **options) -> dict:
    """Return the options of a full run with the same records per step on any number of processes."""
    accumulated = RECORDS // processes // FULL["per_device_train_batch_size"]
    # A validation loss weighs the tokens within a batch of all processes: 16 records are four batches.
    sizes = {"gradient_accumulation_steps": accumulated, "per_device_eval_batch_size": 4 // processes}
    settings = {**FULL, **sizes, **options}
    return options_of(work, "", **settings, output_dir=output)


def without_cpu(options: dict) -> dict:
    return {key: value for key, value in options.items() if key != "use_cpu"}
