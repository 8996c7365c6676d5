"""The parts of a SAMF model by the names of their weights: what is trained, and at which learning rate."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

PARTS = {
    "slice_encoder": ("model.slice_encoder.",),
    "slice_position": ("model.slice_position.",),
    "aggregator": ("model.aggregator.",),
    "fusion": ("model.fusion.",),
    "finding_head": ("model.finding_head.",),
    "language_model": ("model.language_model.", "lm_head."),
}

# What DDP and peft put before the names of a model's weights.
WRAPPERS = ("module.", "base_model.model.")


def part_of(name: str) -> str:
    """The part that a weight belongs to, whatever wraps the model.

    Raises:
        ValueError: no part has such a weight.
    """
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    raise ValueError(f"The weight {name} belongs to none of a SAMF model's parts, {', '.join(PARTS)}.")


def check_parts(names: Iterable[str], what: str) -> None:
    """Raise ValueError where one of `names`, given as `what`, is no part."""
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise ValueError(f"{what} names {unknown}; a SAMF model's parts are {sorted(PARTS)}.")


def train_parts(model: nn.Module, parts: Collection[str]) -> None:
    """Let the weights of `parts` be trained, and freeze all others."""
    trained = tuple(prefix for part in parts for prefix in PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))


def split_by_part(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Split an optimizer's groups, before its first step, so that each part has a rate of its own.

    Args:
        rates: learning rates by part; a part that isn't named keeps the optimizer's.

    Raises:
        ValueError: a part that is named has no weight to train.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_part: dict[str, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            by_part[part_of(names[id(parameter)])].append(parameter)
        groups += [
            {**group, "params": parameters, "part": part, "lr": rates.get(part, group["lr"])}
            for part, parameters in by_part.items()
        ]
    idle = sorted(set(rates) - {group["part"] for group in groups})
    if idle:
        raise ValueError(f"learning_rates names {idle}, which aren't trained or aren't there; see train_parts.")
    optimizer.param_groups[:] = groups


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The present learning rate of each part of an optimizer that `split_by_part` has split."""
    return {group["part"]: float(group["lr"]) for group in optimizer.param_groups if "part" in group}
