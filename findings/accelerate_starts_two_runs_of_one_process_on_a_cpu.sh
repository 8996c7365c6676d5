#!/usr/bin/env bash
# accelerate launch with an FSDP recipe for two processes starts, without a GPU, two runs of one process, both of them "main".
#
# Guessed: `use_cpu: true` with `distributed_type: FSDP` shards over gloo, which torch's fully_shard can do; or it is refused.
# With `distributed_type: MULTI_CPU` and `num_processes: 2` two processes train together.
# Seen: the launcher starts two processes with RANK 0 and 1 of WORLD_SIZE 2, and in each Accelerator() says that it is the only
# one (num_processes 1, is_main_process True, no FSDP), with use_cpu true or false. Both would train on all data and write the same
# files; losses look right. ACCELERATE_USE_CPU=true joins them, as DDP: each holds the whole model. The MULTI_CPU recipe starts
# one process instead of two. torchrun with Accelerator(cpu=True) is two. No warning names any of this.
# Here: the training scripts stop when a launcher has started several processes that don't see each other
# (training/launchers.py); the documentation says torchrun for CPUs.
#
# Versions: accelerate 1.15.0, torch 2.13.0+cpu, Python 3.11, no GPU.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet "$@"; }
pip "torch==2.13.0+cpu" 2> /dev/null || pip --index-url https://download.pytorch.org/whl/cpu "torch==2.13.0"
pip "accelerate==1.15.0"
cd "$folder"
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HOME="$folder/home"
PATH="$folder/venv/bin:$PATH"

cat > who.py <<'PYTHON'
import os
import sys

from accelerate import Accelerator

run = Accelerator(cpu="cpu" in sys.argv)
sharded = getattr(run.state, "fsdp_plugin", None) is not None
print(
    f"  launched as {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}: {run.distributed_type.value},"
    f" process {run.process_index} of {run.num_processes}, main {run.is_main_process}, FSDP {sharded}\n",
    end="",
    flush=True,
)
PYTHON
recipe() {
    printf 'compute_environment: LOCAL_MACHINE\nmixed_precision: "no"\nnum_machines: 1\nnum_processes: 2\n' > "$1.yaml"
    printf 'distributed_type: %s\nuse_cpu: %s\n' "$2" "$3" >> "$1.yaml"
    if [ "$2" = FSDP ]; then
        printf 'fsdp_config:\n  fsdp_version: 2\n  fsdp_auto_wrap_policy: NO_WRAP\n' >> "$1.yaml"
    fi
}
recipe fsdp_cpu FSDP true
recipe fsdp FSDP false
recipe multi_cpu MULTI_CPU true

{
    echo "FSDP, use_cpu true"
    accelerate launch --config_file fsdp_cpu.yaml who.py 2> errors.txt | sort
    echo "FSDP, use_cpu false"
    accelerate launch --config_file fsdp.yaml who.py 2>> errors.txt | sort
    echo "FSDP, use_cpu false, ACCELERATE_USE_CPU=true"
    ACCELERATE_USE_CPU=true accelerate launch --config_file fsdp.yaml who.py 2>> errors.txt | sort
    echo "MULTI_CPU, use_cpu true"
    accelerate launch --config_file multi_cpu.yaml who.py 2>> errors.txt | sort
    echo "torchrun, Accelerator(cpu=True)"
    torchrun --nproc_per_node 2 who.py cpu 2>> errors.txt | sort
} | grep . | tee seen.txt || { cat errors.txt; exit 1; }
diff seen.txt - <<'SEEN'
FSDP, use_cpu true
  launched as 0 of 2: NO, process 0 of 1, main True, FSDP False
  launched as 1 of 2: NO, process 0 of 1, main True, FSDP False
FSDP, use_cpu false
  launched as 0 of 2: NO, process 0 of 1, main True, FSDP False
  launched as 1 of 2: NO, process 0 of 1, main True, FSDP False
FSDP, use_cpu false, ACCELERATE_USE_CPU=true
  launched as 0 of 2: MULTI_CPU, process 0 of 2, main True, FSDP False
  launched as 1 of 2: MULTI_CPU, process 1 of 2, main False, FSDP False
MULTI_CPU, use_cpu true
  launched as None of None: NO, process 0 of 1, main True, FSDP False
torchrun, Accelerator(cpu=True)
  launched as 0 of 2: MULTI_CPU, process 0 of 2, main True, FSDP False
  launched as 1 of 2: MULTI_CPU, process 1 of 2, main False, FSDP False
SEEN
echo "as seen"
