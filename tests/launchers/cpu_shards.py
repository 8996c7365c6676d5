"""Run a script under `accelerate launch` on CPUs although the launcher's recipe names GPUs: DeepSpeed and FSDP2 for real.

accelerate chooses the backend by the GPUs that it sees. Here it gets gloo, with the CPU as its device.

    DS_ACCELERATOR=cpu ACCELERATE_TORCH_DEVICE=cpu accelerate launch --config_file recipes/accelerate/fsdp2.yaml \
        --num_processes 2 tests/cpu_shards.py train.py --config …
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import transformers.training_args
from accelerate import state
from accelerate.utils import DistributedType


def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> tuple[str | None, DistributedType]:
    """Return what accelerate would choose with a GPU for each process, but over gloo."""
    if int(os.environ.get("LOCAL_RANK", "-1")) == -1:
        return None, DistributedType.NO
    return "gloo", DistributedType.MULTI_GPU


state.PartialState._prepare_backend = prepare_backend
transformers.training_args.is_torch_bf16_gpu_available = lambda: (
    True
)  # else bf16 asks for use_cpu, which drops the launcher

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
