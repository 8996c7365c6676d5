"""Benchmark of a DINO step against lightly's example of one: the same ViT, head, crops and loss."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from samf.benchmarks.measuring import Measurement, ratios
from samf.benchmarks.workloads import LineSkipped, Settings
from samf.pretraining import dino
from samf.pretraining.dino import DinoArguments, DinoModel

_ROWS = {"full": 4, "medium": 2, "tiny": 2}
_MOMENTUM = 0.996
_SMALL: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
_TINY: dict[str, Any] = {
    "image_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def dino_options(settings: Settings) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the options of the ViT and of DINO, and the number of slices."""
    is_tiny = settings.size == "tiny"
    options = (
        {"head_dim": 64, "head_hidden_dim": 32, "head_bottleneck_dim": 16, "local_crop_size": 16} if is_tiny else {}
    )
    return dict(_TINY if is_tiny else _SMALL), options, _ROWS[settings.size]


def dino_setup(settings: Settings) -> tuple[ViTModel, DinoArguments, list[torch.Tensor]]:
    """Return a ViT (S/16 at full size), DINO's arguments and the crops of each view, (B, C, H, W)."""
    vit, options, rows = dino_options(settings)
    config = ViTConfig(**vit)
    args = DinoArguments(**options)
    torch.manual_seed(0)
    encoder = ViTModel(config, add_pooling_layer=False)
    sides = [config.image_size] * 2 + [args.local_crop_size] * args.local_crops
    return encoder, args, [torch.randn(rows, 3, side, side) for side in sides]


class ExampleStep:
    """A step as in lightly's PyTorch example: one call per view, Adam, and the teacher's update before the forward pass.

    Args:
        encoder: the ViT; its copy is the teacher's.
        args: sizes of the head, and temperatures.
        views: crops of each view; the first two are the large ones.
    """

    def __init__(self, encoder: ViTModel, args: DinoArguments, views: list[torch.Tensor]):
        sizes = (encoder.config.hidden_size, args.head_hidden_dim, args.head_bottleneck_dim, args.head_dim)
        self.views, self.encoder, self.teacher_encoder = views, encoder, copy.deepcopy(encoder)
        self.head, self.teacher_head = (dino.DINOProjectionHead(*sizes) for _ in range(2))
        nn.ModuleList([self.teacher_encoder, self.teacher_head]).requires_grad_(False)
        self.loss = dino.DINOLoss(args.head_dim, warmup_teacher_temp_epochs=5)
        trained = [*self.encoder.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam([weight for weight in trained if weight.requires_grad], lr=1e-5)

    def __call__(self) -> float:
        """Take a step; return its loss."""
        dino.update_momentum(self.encoder, self.teacher_encoder, _MOMENTUM)
        dino.update_momentum(self.head, self.teacher_head, _MOMENTUM)
        teacher = [self._scores(self.teacher_encoder, self.teacher_head, view) for view in self.views[:2]]
        student = [self._scores(self.encoder, self.head, view) for view in self.views]
        loss = self.loss(teacher, student, epoch=0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _scores(self, encoder: ViTModel, head: nn.Module, view: torch.Tensor) -> torch.Tensor:
        tokens = encoder(pixel_values=view, interpolate_pos_encoding=True).last_hidden_state
        scores: torch.Tensor = head(tokens[:, 0])
        return scores


class OurStep:
    """A step of `DinoModel`, with the Trainer's optimizer.

    Args:
        encoder: the ViT.
        args: sizes of the head, and temperatures.
        views: crops of each view; the first two are the large ones.
    """

    def __init__(self, encoder: ViTModel, args: DinoArguments, views: list[torch.Tensor]):
        self.model = DinoModel(encoder, args).train()
        self.crops = {"global_crops": torch.stack(views[:2], dim=1), "local_crops": torch.stack(views[2:], dim=1)}
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def __call__(self) -> float:
        """Take a step; return its loss."""
        loss = self.model(**self.crops)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.update_teacher(_MOMENTUM)
        return float(loss.detach())


def time_dino(settings: Settings) -> list[Measurement]:
    """Time steps in turns.

    Raises:
        LineSkipped: lightly isn't installed.
    """
    if dino.DINOLoss is None:
        raise LineSkipped("needs lightly: pip install lightly")
    encoder, args, views = dino_setup(settings)
    tasks: dict[str, Any] = {
        "lightly's example": ExampleStep(copy.deepcopy(encoder), args, views),
        "ours": OurStep(encoder, args, views),
    }
    times = settings.stopwatch.in_turns(tasks, "dino")
    note = f"{_ROWS[settings.size]} slices, 2 large and {args.local_crops} small crops, {args.head_dim} prototypes"
    gains = ratios(times["lightly's example"], times["ours"])
    return [
        *(Measurement(f"DINO step, {name}", "s", values, note=note) for name, values in times.items()),
        Measurement("lightly's example / ours", "x", gains, settings.limit(1.3)),
    ]


STAGES = {"dino": {"dino": time_dino}}
