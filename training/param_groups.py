"""The parts of a SAMF model by the names of their weights: which are trained, and at which learning rate."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from samf.data.schema import JsonObject

PARTS = {
    "slice_encoder": ("model.slice_encoder.",),
    "slice_position": ("model.slice_position.",),
    "aggregator": ("model.aggregator.",),
    "fusion": ("model.fusion.",),
    "finding_head": ("model.finding_head.",),
    "language_model": ("model.language_model.", "lm_head."),
}

# Prefixes that DDP and peft add to the names of a model's weights.
_WRAPPERS = ("module.", "base_model.model.")


def part_of(name: str) -> str:
    """Return the part that a weight belongs to, also in a model that DDP or peft wraps.

    Raises:
        ValueError: No part has such a weight.
    """
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    raise ValueError(f"The weight {name} belongs to none of a SAMF model's parts, {', '.join(PARTS)}.")


def check_parts(names: Iterable[str], option: str) -> None:
    """Raise ValueError where one of `names`, given as `option`, is no part."""
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise ValueError(f"{option} names {unknown}; a SAMF model's parts are {sorted(PARTS)}.")


def train_parts(model: nn.Module, parts: Collection[str]) -> None:
    """Let the weights of `parts` be trained, and freeze all others."""
    trained = tuple(prefix for part in parts for prefix in PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))


def split_by_part(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Split an optimizer's groups, before its first step, so that each part has its own learning rate.

    Args:
        optimizer: Holds the trained weights of `model`.
        model: The model, wrapped or not.
        rates: Learning rates by part; parts that aren't named keep the optimizer's.

    Raises:
        ValueError: A part that is named has no trained weight.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[JsonObject] = []
    for group in optimizer.param_groups:
        by_part: dict[str, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            by_part[part_of(names[id(parameter)])].append(parameter)
        groups += [
            {**group, "params": parameters, "part": part, "lr": rates.get(part, group["lr"])}
            for part, parameters in by_part.items()
        ]
    unused = sorted(set(rates) - {group["part"] for group in groups})
    if unused:
        raise ValueError(f"learning_rates names {unused}, which aren't trained or aren't there; see train_parts.")
    optimizer.param_groups[:] = groups


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the current learning rate of each part of an optimizer that `split_by_part` has split."""
    return {group["part"]: float(group["lr"]) for group in optimizer.param_groups if "part" in group}


class PartRates(TrainerCallback):
    """A callback that keeps the learning rates by part of the last step, for the log.

    When Trainer logs, the scheduler has already set the rates of the next step.

    Attributes:
        rates: Learning rate of each part; empty when the optimizer isn't split by part.
    """

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the optimizer's rates.

        Args:
            args: Unused.
            state: Unused.
            control: Unused.
            **kwargs: Hold the `optimizer`.
        """
        self.rates = learning_rates(kwargs["optimizer"])
