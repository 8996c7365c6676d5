"""One process under torchrun: train a model that `fully_shard` has sharded on the CPU, and save it by SamfTrainer."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import tiny_batch, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from samf.training.trainer import SamfTrainer

STEPS, LEARNING_RATE = 3, 0.05
TARGETS = r".*language_model.*\.(qkv_proj|o_proj|gate_up_proj|down_proj)"


def build(with_adapter: bool):
    """Return a tiny model, the same on every process by its seed."""
    model = tiny_model(finding_names=["a", "b"], aggregator_dropout=0.0)
    if with_adapter:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["fusion"]))
    return model.train()


def shard(model) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for part in (*base.model.language_model.layers, base.model.slice_encoder, base.model.aggregator):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(model, rows: slice) -> list[float]:
    batch = {name: value[rows] for name, value in tiny_batch("ao2d", rows=4).items()}
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(folder: Path, with_adapter: bool) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(with_adapter)
    shard(model)
    losses = train(model, slice(rank * 4 // world, (rank + 1) * 4 // world))
    arguments = TrainingArguments(folder / "saved", use_cpu=True, report_to="none", disable_tqdm=True)
    SamfTrainer(model=model, args=arguments).save_model()
    facts = {
        "sharded": all(isinstance(weight, DTensor) for weight in model.parameters()),
        "own_share": sum(weight.to_local().numel() for weight in model.parameters())
        / sum(weight.numel() for weight in model.parameters()),
        "losses": losses,
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "adapter")
