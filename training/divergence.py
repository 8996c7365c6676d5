"""Stopping a run whose loss isn't finite any more, before anything is saved over a good checkpoint."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from samf.training.checkpoints import CheckpointError, last_checkpoint

# On an accelerator, steps between two looks at the losses: a look waits for the device, which a step needn't.
LOOK_EVERY = 10


class DivergenceError(RuntimeError):
    """The loss or the weights of a run aren't finite any more; the message names the step and the last good checkpoint."""


class LossWatch:
    """Remembers on the device the first step whose loss isn't finite, so that nothing waits for the device.

    Attributes:
        step: int64 scalar, the first such step; 0 = none so far. None before the first loss.
        loss: its loss, float32.
    """

    def __init__(self) -> None:
        self.step: torch.Tensor | None = None
        self.loss: torch.Tensor | None = None

    @torch.no_grad()
    def note(self, loss: torch.Tensor, step: int) -> None:
        """Take the scalar loss of one micro-batch of `step`, counted from 1."""
        if self.step is None:
            self.step = torch.zeros((), dtype=torch.int64, device=loss.device)
            self.loss = torch.zeros((), dtype=torch.float32, device=loss.device)
        is_first = ~torch.isfinite(loss) & (self.step == 0)
        self.step = torch.where(is_first, step, self.step)
        self.loss = torch.where(is_first, loss.float(), self.loss)

    def first(self) -> tuple[int, float] | None:
        """Return the first step whose loss wasn't finite, and the loss; None if there was none. Waits for the device."""
        if self.step is None or not (step := int(self.step)):
            return None
        # Another process's loss isn't known here.
        return step, float(self.loss) if not math.isfinite(float(self.loss)) else math.nan


@torch.no_grad()
def has_finite_weights(model: nn.Module) -> torch.Tensor:
    """Return whether all trained weights are finite, as a bool scalar on their device; of shards, this process's."""
    norms = []
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)
        if parameter.requires_grad and local.numel():
            norms.append(torch.linalg.vector_norm(local.detach(), ord=math.inf).float())
    device = norms[0].device if norms else torch.device("cpu")
    return torch.stack([norm.to(device) for norm in norms]).isfinite().all() if norms else torch.tensor(True)


def diverged(what: str, step: int, output_dir: str) -> DivergenceError:
    """Return the error for `what` that isn't finite after `step`; it names the remedies and the last good checkpoint."""
    try:
        checkpoint = last_checkpoint(output_dir)
    except CheckpointError:
        checkpoint = None
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint else f"there is no checkpoint in {output_dir} yet"
    go_on = f" Go on from {Path(checkpoint).name} by --resume_from_checkpoint last." if checkpoint else ""
    return DivergenceError(
        f"step {step}: {what}. Training stops here, and nothing was saved: {kept}. Lower learning_rate, raise "
        "warmup_steps, set max_grad_norm (1.0 is common), or compute in bf16 or float32 instead of fp16; if it happens at "
        f"the same step again, look at that step's data.{go_on}"
    )
