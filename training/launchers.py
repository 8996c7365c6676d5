"""Precision, limits and saving of models that `accelerate launch` shards: FSDP2 and DeepSpeed.

FSDP2 with accelerate's defaults rounds outputs and reduced gradients to the computing precision; DeepSpeed holds trained
weights in it and keeps float32 copies in its optimizer. Here losses stay float32, and float32 weights are saved as such.
"""

import dataclasses
import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from accelerate import DeepSpeedPlugin
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

_LANGUAGE_MODEL = ("language_model.", "lm_head.")
NO_SAMPLES = (
    "generate_samples needs whole weights on every process, and this launcher shards them: leave it out and "
    "answer with eval.py afterwards, or start with recipes/accelerate/ddp.yaml."
)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def sharding(training: TrainingArguments) -> str | None:
    """Return what the launcher shards the weights or the optimizer by: ZeRO-1, -2, -3 or FSDP; None = nothing.

    accelerate says by the type of its state that it will use FSDP only once a Trainer exists; before that, its
    launcher's environment does.

    Args:
        training: The run's arguments.
    """
    if training.deepspeed_plugin is not None:
        return f"ZeRO-{training.deepspeed_plugin.zero_stage}"
    return "FSDP" if training.fsdp or _is_set("ACCELERATE_USE_FSDP") else None


def check_launcher(training: TrainingArguments) -> None:
    """Refuse what accelerate doesn't do and doesn't say: shards without GPUs, and processes that aren't connected.

    Args:
        training: The run's arguments, before anything is loaded.

    Raises:
        ValueError: The launcher's recipe asks for FSDP and accelerate would train without it; its processes would train
            alone; it asks for a mesh of parallel dimensions.
    """
    # A cluster may name a size of its own where no launcher, which numbers its processes, has started several.
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    kind = str(getattr(training.distributed_state, "distributed_type", "")).rpartition(".")[2]
    if sharding(training) == "FSDP" and kind in ("NO", "MULTI_CPU"):
        raise ValueError(
            f"The launcher's recipe asks for FSDP, which needs two processes or more with a GPU each; found {started} on "
            f"{training.device}, where accelerate would train without shards. Start with recipes/accelerate/ddp.yaml on a GPU, "
            "or without one by `torchrun --nproc_per_node N … --use_cpu true`."
        )
    if started > 1 and training.world_size == 1:
        raise ValueError(
            f"The launcher started {started} processes, and accelerate, which finds no GPU, doesn't connect them: each "
            "would train alone and write the same files. Start with `torchrun --nproc_per_node N … --use_cpu true`."
        )
    sizes = {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")) for name in ("tp", "cp", "sp")}
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG") and any(size > 1 for size in sizes.values()):
        asked = ", ".join(f"{name}_size {size}" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"The launcher asks for {asked}: the fusion reads each prompt as a whole, which context and sequence parallelism "
            "cut, and training loads whole weights, not tensor-parallel ones. Leave it out, and shard with "
            "recipes/accelerate/fsdp2.yaml."
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
    if (kind := sharding(training)) is not None:
        raise ValueError(
            f"{stage} needs whole weights on every process, and this launcher ({kind}) shards them. "
            "They fit on any GPU: start with `accelerate launch --config_file recipes/accelerate/ddp.yaml` or torchrun."
        )


def refuse_unsharded_options(training: TrainingArguments, *, samples: bool, merge: bool) -> None:
    """Refuse options of stage 3 that need whole weights under a launcher that shards them, before anything is loaded.

    Args:
        training: The run's arguments.
        samples: Whether answers are generated during training.
        merge: Whether the adapter is merged at the end.

    Raises:
        ValueError: One of them is asked for.
    """
    kind = sharding(training)
    if samples and kind in ("FSDP", "ZeRO-3"):
        raise ValueError(NO_SAMPLES)
    if merge and kind == "ZeRO-3":
        out = training.output_dir
        raise ValueError(
            "merge can't be used with ZeRO-3, under which one process can't load a model on its own: leave it out, and "
            f"afterwards call `python -m samf.training.adapter {out} {Path(out, 'merged')}`."
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
