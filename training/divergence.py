"""Detection of a loss or weights that aren't finite, before anything is saved over a good checkpoint."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from samf.training.checkpoints import CheckpointError, last_checkpoint

# Steps between two reads of the watched losses on an accelerator: a read waits for the device, a step needn't.
READ_EVERY = 10


class DivergenceError(RuntimeError):
    """The loss or the weights of a run aren't finite; the message names the step and the last good checkpoint."""


class LossWatch:
    """Keeps the first step whose loss isn't finite on the device, so that no step waits for it.

    Attributes:
        step: int64 scalar, the first such step; 0 = none so far. None before the first loss.
        loss: Its loss, float32.
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
        """Return the first step whose loss wasn't finite, and that loss; None if there was none. Waits for the device."""
        if self.step is None or not (step := int(self.step)):
            return None
        # Where another process had the bad loss, only its step is known here.
        return step, float(self.loss) if not math.isfinite(float(self.loss)) else math.nan


@torch.no_grad()
def has_finite_weights(model: nn.Module) -> torch.Tensor:
    """Return whether all trained weights are finite: a bool scalar on their device; of sharded weights, this process's."""
    norms = []
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)
        if parameter.requires_grad and local.numel():
            norms.append(torch.linalg.vector_norm(local.detach(), ord=math.inf).float())
    device = norms[0].device if norms else torch.device("cpu")
    return torch.stack([norm.to(device) for norm in norms]).isfinite().all() if norms else torch.tensor(True)


def diverged(what: str, step: int, output_dir: str) -> DivergenceError:
    """Return the error that ends a diverged run.

    Args:
        what: What isn't finite, as the start of a sentence, e.g. "the loss is nan".
        step: The step after which it was found, counted from 1.
        output_dir: The run's folder, whose last good checkpoint the message names.
    """
    try:
        checkpoint = last_checkpoint(output_dir)
    except CheckpointError:
        checkpoint = None
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint else f"there is no checkpoint in {output_dir} yet"
    resume = f" Resume from {Path(checkpoint).name} with --resume_from_checkpoint last." if checkpoint else ""
    return DivergenceError(
        f"step {step}: {what}. Training stops here, and nothing was saved: {kept}. Lower learning_rate, raise "
        "warmup_steps, set max_grad_norm (1.0 is common), or compute in bf16 or float32 instead of fp16; if it happens at "
        f"the same step again, check that step's data.{resume}"
    )
