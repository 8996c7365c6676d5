"""Run a script under `accelerate launch` on CPUs although the recipe names GPUs: DDP, FSDP2 and DeepSpeed over gloo.

accelerate chooses the backend by the GPUs that it sees; here it gets gloo, with the CPU as its device. Without this it
replaces FSDP by DDP, or starts processes that don't know of each other, and says nothing.

    DS_ACCELERATOR=cpu ACCELERATE_TORCH_DEVICE=cpu accelerate launch --config_file recipes/accelerate/fsdp2.yaml \
        --num_processes 2 tests/launchers/cpu_shards.py train.py --config …

`$SHARD_FACTS` is a folder to which each process writes what it holds after the first step. `$DIE_AT=RANK:STEP` kills that
process (SIGKILL) after that step, once: the file `$SHARD_FACTS/died` says that it has happened.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
import transformers.training_args
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState


def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> tuple[str | None, DistributedType]:
    """Return what accelerate would choose with a GPU for each process, but over gloo."""
    if int(os.environ.get("LOCAL_RANK", "-1")) == -1:
        return None, DistributedType.NO
    shards = any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("DEEPSPEED", "FSDP"))
    return "gloo", DistributedType.MULTI_GPU if shards else DistributedType.MULTI_CPU


def held(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return how many numbers this process holds of the weights and of the optimizer's first moments, and of how many."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    moments = [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
    return {
        "model": type(model).__name__,
        "whole": sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights),
        "local": sum(map(local_numel, weights)),
        "moments": sum(map(local_numel, moments)),
        "placements": sorted({type(p).__name__ for w in weights if isinstance(w, DTensor) for p in w.placements}),
        "unsharded": sum(not isinstance(w, DTensor) and not hasattr(w, "ds_tensor") for w in weights),
    }


def local_numel(weight: torch.Tensor) -> int:
    if hasattr(weight, "ds_tensor"):
        return weight.ds_tensor.numel()
    return (weight.to_local() if isinstance(weight, DTensor) else weight).numel()


class Probe(TrainerCallback):
    """Writes what this process holds after its first step; kills this process where `$DIE_AT` says so."""

    def __init__(self) -> None:
        self.folder, self.rank = Path(os.environ["SHARD_FACTS"]), int(os.environ.get("RANK", "0"))
        rank, _, step = os.environ.get("DIE_AT", "-1:0").partition(":")
        self.dies_after = int(step) if int(rank) == self.rank else None
        self.is_written = False

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.is_written:
            return
        optimizer = kwargs["optimizer"]
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, then DeepSpeed's
            optimizer = optimizer.optimizer
        facts = json.dumps(held(kwargs["model"], optimizer))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"rank_{self.rank}.json").write_text(facts, encoding="utf-8")
        self.is_written = True

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        died = self.folder / "died"
        if self.dies_after == state.global_step and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)


state.PartialState._prepare_backend = prepare_backend
# Otherwise bf16 asks for use_cpu, which drops the launcher.
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
if "SHARD_FACTS" in os.environ:
    transformers.trainer.DEFAULT_CALLBACKS.append(Probe)

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
