"""One process under torchrun: the language model split over the processes by the library's plan, against the whole model.

tensor_parallel.py FOLDER      # gets rank_0.json, rank_1.json and `saved`
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import tiny_batch, tiny_model
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from samf import SamfForConditionalGeneration


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def facts(model: Any, reference: Any) -> dict[str, Any]:
    """Return what differs between a split model and a whole one: logits, loss, gradients, generated tokens."""
    batch = tiny_batch("ao2d")
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    outputs = [each(**batch) for each in (model, reference)]
    for output in outputs:
        output.loss.backward()
    grads = [{name: whole(weight.grad) for name, weight in each.named_parameters()} for each in (model, reference)]
    tokens = [each.generate(**prompt, max_new_tokens=6, do_sample=False).tolist() for each in (model, reference)]
    split = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    return {
        "logits": float((whole(outputs[0].logits) - outputs[1].logits).abs().max()),
        "losses": [output.loss.item() for output in outputs],
        "gradients": max(float((grads[0][name] - grad).abs().max()) for name, grad in grads[1].items()),
        "tokens": tokens,
        "share": sum(weight.to_local().numel() for weight in split) / sum(weight.numel() for weight in split),
        "split": len(split),
    }


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        tiny_model(text={"vocab_size": 100, "intermediate_size": 36}).save_pretrained(folder / "whole")
    dist.barrier()
    plan = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())
    model = SamfForConditionalGeneration.from_pretrained(folder / "whole", distributed_config=plan)
    reference = SamfForConditionalGeneration.from_pretrained(folder / "whole")
    found = facts(model, reference)
    (folder / f"rank_{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    model.save_pretrained(folder / "saved", is_main_process=dist.get_rank() == 0)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
