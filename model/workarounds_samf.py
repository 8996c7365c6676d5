"""Workarounds for hardware and launchers, kept apart from the equations; they change no value beyond rounding."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_MAX_ROWS = 16
_MIN_WEIGHTS = 1 << 20


class FewRowsLinear(nn.Linear):
    """A linear layer that is fast on a CPU when it gets few rows.

    With few rows the time is that of reading the weight once. For a weight larger than the CPU's caches, the product with
    the rows as columns reads it more than twice as fast as `torch.nn.functional.linear`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (…, in) times the weight plus the bias, (…, out)."""
        rows = x.flatten(0, -2)  # (N, in)
        if torch.compiler.is_compiling() or x.device.type != "cpu":  # one graph for any number of rows
            return super().forward(x)
        if rows.shape[0] > _MAX_ROWS or self.weight.numel() < _MIN_WEIGHTS:
            return super().forward(x)
        output = (self.weight @ rows.mT).mT + self.bias  # (N, out)
        return output.reshape(*x.shape[:-1], -1)


def restore_positions(positions: torch.Tensor) -> torch.Tensor:
    """Return slice positions as floating-point numbers; int32 input holds the bits of float32 values.

    FSDP and DeepSpeed cast floating-point inputs to half precision, which would round neighbouring slices onto one
    another; integers pass unchanged. The trainer therefore sends `positions.float().view(torch.int32)`.
    """
    return positions.view(torch.float32) if positions.dtype == torch.int32 else positions


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """Give a model its own class for the time of saving.

    `fully_shard` replaces it by a class of torch's. The library would enter that as the model's class for AutoModel and
    save torch's private code as the model's, and nobody could load the folder.

    Args:
        model: the model; another one than a sharded one is left as it is.
    """
    given = type(model)
    model.__class__ = next(kind for kind in given.__mro__ if not kind.__module__.startswith("torch.distributed."))
    try:
        yield
    finally:
        model.__class__ = given
