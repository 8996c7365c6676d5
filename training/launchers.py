"""Precision, limits and saving of models that `accelerate launch` shards: FSDP2 and DeepSpeed.

FSDP2 with accelerate's defaults rounds outputs and reduced gradients to the computing precision; DeepSpeed holds trained
weights in it and keeps float32 copies in its optimizer. Here losses stay float32, and float32 weights are saved as such.
"""

import dataclasses
import os
from collections.abc import Callable, Collection

import torch
from accelerate import DeepSpeedPlugin
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

_LANGUAGE_MODEL = ("language_model.", "lm_head.")


def refuse_strangers(training: TrainingArguments) -> None:
    """Refuse to train where a launcher has started several processes that don't see each other.

    accelerate does so with the recipes for GPUs on a machine without one. Each process would train on all records, as the main
    one, and write the same files.

    Args:
        training: The run's arguments, which know the launcher.

    Raises:
        ValueError: There are several processes, and this one takes itself for the only one.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if launched > 1 and training.world_size == 1:
        raise ValueError(
            f"The launcher started {launched} processes, and each takes itself for the only one: all would train on the same "
            "records and write the same files. accelerate does this without a GPU: start with `torchrun --nproc_per_node "
            f"{launched} SCRIPT … --use_cpu true`, or one process without a launcher."
        )


def refuse_shards(training: TrainingArguments, stage: str) -> None:
    """Refuse a launcher that shards weights, before anything is loaded under it.

    Under ZeRO-3 `from_pretrained` returns empty shards, and the run would fail later, far from the cause.

    Args:
        training: The run's arguments, which know the launcher.
        stage: What the script trains, for the message, e.g. "The aggregator's warm-up".

    Raises:
        ValueError: The launcher is FSDP or DeepSpeed.
    """
    kind = str(getattr(training.distributed_state, "distributed_type", "")).rpartition(".")[2]
    if training.deepspeed or training.fsdp or "DEEPSPEED" in kind or "FSDP" in kind:
        raise ValueError(
            f"{stage} needs whole weights on every process, and this launcher ({kind or 'DeepSpeed or FSDP'}) shards them. "
            "They fit on any GPU: start with `accelerate launch --config_file recipes/accelerate/ddp.yaml` or torchrun."
        )


def keep_float32_losses(state: AcceleratorState) -> None:
    """Let FSDP2 reduce gradients in float32 and leave outputs as the model computes them.

    accelerate sets all three precisions to the computing precision. A loss then has bfloat16's 8 bits (5.96875 for 5.975),
    and gradients are summed over processes with as many.

    Args:
        state: The accelerator's state before it prepares the model; unchanged without FSDP2 or mixed precision.
    """
    plugin = getattr(state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is None or plugin.fsdp_version != 2 or policy is None or policy.param_dtype is None:
        return
    plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def whole_count(count: torch.Tensor | int | None) -> torch.Tensor | int | None:
    """Return Trainer's count of label tokens as an integer.

    Trainer divides the count by its parallel sizes, which makes it a float32 tensor, and sharded models round floating
    inputs: in bfloat16 674 tokens become 672, and loss and gradients grow by 0.3 %.
    """
    if isinstance(count, torch.Tensor) and count.is_floating_point():
        return count.round().long()
    return count


def float32_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the trained parameters that are float32 now, before a launcher casts them."""
    return frozenset(
        name for name, weight in model.named_parameters() if weight.requires_grad and weight.dtype == torch.float32
    )


def float32_weights(
    model: nn.Module, names: frozenset[str], read: Callable[[nn.Parameter], torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """Gather the float32 copies of weights that DeepSpeed holds in another precision. Every process must call it.

    Args:
        model: The model within DeepSpeed's engine.
        names: Parameters to gather; those that are float32 in the model are left out.
        read: DeepSpeed's `safe_get_full_fp32_param`.

    Returns:
        Tensors on the CPU by parameter name.
    """
    copies = {}
    for name, weight in model.named_parameters():
        if name in names and weight.dtype != torch.float32:
            copy = read(weight)
            if copy is not None:
                copies[name] = copy.detach().float().cpu().reshape(getattr(weight, "ds_shape", weight.shape))
    return copies


def touch_unread_parts(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Return the loss plus zero times the trained weights that read a volume.

    ZeRO-1 and ZeRO-2 reduce gradients in the order in which they are computed. A process whose batch has no volume would
    send fewer numbers than the others, which then wait forever; this term gives it zero gradients for these weights.

    Args:
        model: The model, whole on this process.
        loss: Loss of a batch without a volume, a scalar.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and not any(part in name for part in _LANGUAGE_MODEL):
            loss = loss + 0.0 * weight.flatten()[:1].sum().to(loss)
    return loss


def has_volume(inputs: Collection[str]) -> bool:
    """Return whether a batch of the collator, or its names, has any volume."""
    return "pixel_values" in inputs or "slice_embeddings" in inputs


def is_zero3(plugin: DeepSpeedPlugin | None) -> bool:
    """Return whether DeepSpeed shards the weights."""
    return plugin is not None and plugin.zero_stage == 3


def is_sharded(model: nn.Module) -> bool:
    """Return whether this process holds shards of the weights, as after `fully_shard`."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gather a sharded model's weights on the main process's CPU. Every process must call it; the others get {}."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
