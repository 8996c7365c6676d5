#!/usr/bin/env bash
# Under accelerate (so in transformers' Trainer too) two processes train on half of a LitData StreamingDataset.
#
# Guessed: StreamingDataset gives each process its own part, and Accelerator.prepare, or a plain Trainer, leaves that alone.
# Seen: accelerate splits every IterableDataset itself. By default process 0 reads its own half and shares it out; with
# dispatch_batches=False each process takes every other batch of its half. Either way half of the samples is never read
# in the epoch (with N processes, all but 1/N), the number of steps is halved or filled up with repeats, and nothing warns.
# The loader that isn't prepared reads everything once.
# Here: records are rows of a map-style dataset, whose order a sampler gives (training/shard_order.py); accelerate's split is the
# only one.
#
# Versions: litdata 0.2.76, accelerate 1.15.0, torch 2.13.0+cpu, Python 3.11, no GPU.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet "$@"; }
pip "torch==2.13.0+cpu" 2> /dev/null || pip --index-url https://download.pytorch.org/whl/cpu "torch==2.13.0"
pip "accelerate==1.15.0" lightning-utilities filelock numpy boto3 requests tifffile obstore
pip --no-deps "litdata==0.2.76"
cd "$folder"
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HOME="$folder/home"

cat > write.py <<'PYTHON'
import litdata


def sample(number):
    return {"n": number}


if __name__ == "__main__":
    litdata.optimize(sample, list(range(24)), "store", chunk_size=3, num_workers=1)
PYTHON
"$folder/venv/bin/python" write.py > write.log 2>&1

cat > read.py <<'PYTHON'
import litdata
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

for name, dispatch in (("not prepared", "no"), ("prepared", None), ("prepared, dispatch_batches=False", False)):
    options = DataLoaderConfiguration(dispatch_batches=None if dispatch == "no" else dispatch)
    run = Accelerator(cpu=True, dataloader_config=options)
    loader = DataLoader(litdata.StreamingDataset("store", shuffle=False), batch_size=2)
    loader = loader if dispatch == "no" else run.prepare_data_loader(loader)
    mine = [number for batch in loader for number in batch["n"].tolist()]
    ranks = [None] * run.num_processes
    dist.all_gather_object(ranks, mine)
    if run.is_main_process:
        print(f"{name}: {len(set(sum(ranks, [])))} of 24 samples are read")
    run.free_memory()
dist.destroy_process_group()
PYTHON
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 read.py 2> read.log | tee seen.txt || tail -20 read.log
diff seen.txt - <<'SEEN'
not prepared: 24 of 24 samples are read
prepared: 12 of 24 samples are read
prepared, dispatch_batches=False: 12 of 24 samples are read
SEEN
echo "as seen"
