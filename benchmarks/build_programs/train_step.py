"""Take training steps of a model of random weights: LoRA on the language model, frozen slice encoder, checkpointing."""

import inspect
from typing import Any

import torch

from samf.benchmarks.workloads import random_model
from samf.model.configuration_samf import SamfConfig
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.training.adapter import add_lora
from samf.training.arguments import TuningArguments
from samf.training.param_groups import PARTS, train_parts


def run(task: dict[str, Any], recorder: Any) -> dict[str, float]:
    """Take a step for each batch; return the losses.

    Args:
        task: `config` (options of the configuration), `dtype`, `batches` (name → file of tensors).
        recorder: takes the figures.
    """
    config = SamfConfig(**task["config"])
    dtype = getattr(torch, task["dtype"])
    plain = random_model(SamfForConditionalGeneration, config, torch.device("cpu"), dtype)
    parts = [part for part in PARTS if part != "slice_encoder"]
    train_parts(plain, parts)
    tuning = TuningArguments(lora_rank=16, lora_alpha=32, lora_dropout=0.0)
    model: Any = add_lora(plain, tuning, parts, base="").get_base_model()
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-6, fused=True)
    # As train.py calls the model: a build that has the option skips logits that no loss needs.
    skips = "skip_logits" in inspect.signature(model.forward).parameters
    options = {"skip_logits": True} if skips else {}
    losses = {}
    for name, file in task["batches"].items():
        batch = torch.load(file)
        with recorder.measure(name, memory=True):
            loss = model(**batch, **options).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name] = float(loss.detach())
    return losses
