"""Take a DINO step on a slice encoder of random weights, with the Trainer's optimizer."""

from typing import Any

import torch
from transformers import ViTConfig, ViTModel

from samf.pretraining.dino import DinoArguments, DinoModel

_MOMENTUM = 0.996


def run(task: dict[str, Any], recorder: Any) -> float:
    """Take a step; return its loss.

    Args:
        task: `vit` and `dino` (options), `rows` (slices of a batch).
        recorder: takes the figures.
    """
    torch.manual_seed(0)
    config, args = ViTConfig(**task["vit"]), DinoArguments(**task["dino"])
    model = DinoModel(ViTModel(config, add_pooling_layer=False), args).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5, fused=True)

    def crops(number: int, side: int) -> torch.Tensor:
        return torch.randn(task["rows"], number, 3, side, side)  # (B, views, C, H, W)

    batch = {"global_crops": crops(2, config.image_size), "local_crops": crops(args.local_crops, args.local_crop_size)}

    with recorder.measure("DINO step"):
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(_MOMENTUM)
        value = float(loss.detach())
    return value
