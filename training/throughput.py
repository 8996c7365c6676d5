"""Throughput of training: tokens, slices and volumes per second, MFU, memory, padding, and answers that were cut."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields

import torch

from samf.data.collator import SamfCollator
from samf.data.schema import Record
from samf.training.flops import StepFlops, Work
from samf.training.memory import peak_bytes
from samf.training.skipping import SkippingCollator

TRUNCATED, UNREADABLE = "truncated", "unreadable"  # counts of a batch's records
_COUNTS = (TRUNCATED, UNREADABLE)


class CountingCollator:
    """A collator whose batches carry their counts of cut answers (`truncated`) and replaced records (`unreadable`).

    The wrapped collator's own counts stay in the worker process that made the batch.

    Args:
        collator: Makes the batches.
    """

    def __init__(self, collator: SamfCollator | SkippingCollator):
        self.collator = collator

    def __call__(self, records: Sequence[Record]) -> dict[str, torch.Tensor]:
        """Return the collator's batch with one more tensor (1,) for each count."""
        before = self._counts()
        batch = self.collator(records)
        after = self._counts()
        return {**batch, **{name: torch.tensor([after[name] - before[name]]) for name in _COUNTS}}

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self.collator, name, 0) for name in _COUNTS}


def drop_counts(inputs: dict[str, torch.Tensor]) -> None:
    """Remove a batch's counts, which aren't inputs of the model."""
    for name in _COUNTS:
        inputs.pop(name, None)


@torch.no_grad()
def batch_work(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the sizes of a batch, int64 in the order of Work's fields, without waiting for the device."""
    pixels, embeddings = inputs.get("pixel_values"), inputs.get("slice_embeddings")
    volumes = pixels if pixels is not None else embeddings
    tokens = inputs.get("input_ids")
    some = volumes if volumes is not None else tokens
    zeros = torch.zeros(some.shape[0], dtype=torch.int64, device=some.device)  # (B,)
    slices, mask = zeros, inputs.get("slice_mask")
    if volumes is not None:
        slices = zeros + volumes.shape[1] if mask is None else mask.sum(dim=1)
    length, text, padded = zeros, zeros, zeros
    if tokens is not None:
        attention = inputs.get("attention_mask")
        length = zeros + tokens.shape[1] if attention is None else attention.sum(dim=1)
        text, padded = length * (slices > 0), zeros + tokens.shape[1]
    seen = slices if pixels is not None else zeros
    present = (slices > 0).long()
    columns = [zeros + (tokens is not None), present, slices, seen, length, length**2, text, text * slices]
    columns += [((slices + 1) * present) ** 2, padded]
    return torch.stack([column.sum() for column in columns])


class Throughput:
    """Counts of the batches between two log entries. The time of evaluations and of saving doesn't count.

    Args:
        flops: Returns the operations of a step; None = MFU isn't reported.
        peak_tflops: Of one device; None = MFU isn't reported.
        clock: Returns seconds.
    """

    def __init__(
        self,
        flops: StepFlops | None = None,
        peak_tflops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.flops, self.peak_tflops, self.clock = flops, peak_tflops, clock
        self.counts: dict[str, torch.Tensor | int] = dict.fromkeys(_COUNTS, 0)
        self._pauses = 0
        self.restart()

    def restart(self) -> None:
        """Reset the counts, except those of answers and records over the whole run, and the time."""
        self.work: torch.Tensor | int = 0
        self.seconds, self._since = 0.0, self.clock()

    def count(self, inputs: dict[str, torch.Tensor]) -> None:
        """Add a batch, and remove its counts from it."""
        for name in _COUNTS:
            self.counts[name] = self.counts[name] + inputs.pop(name, torch.zeros(1, dtype=torch.int64)).sum()
        self.work = self.work + batch_work(inputs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock within the block; blocks may be nested."""
        if self._pauses == 0:
            self.seconds += self.clock() - self._since
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0:
                self._since = self.clock()

    def report(
        self, device: torch.device, reduce: Callable[[torch.Tensor], torch.Tensor], processes: int
    ) -> dict[str, float]:
        """Return the metrics since the last report, over all processes; {} where no batch was counted.

        Args:
            device: This process's, for its memory.
            reduce: Sums a tensor over the processes.
            processes: Number of processes, each with its own device.
        """
        if not isinstance(self.work, torch.Tensor):
            return {}
        seconds = max(self.seconds + self.clock() - self._since, 1e-9)
        counts = [torch.as_tensor(self.counts[name]).to(self.work.device).view(1) for name in _COUNTS]
        *counted, truncated, unreadable = reduce(torch.cat([self.work, *counts]).float()).tolist()
        work = Work(**dict(zip([field.name for field in fields(Work)], counted, strict=True)))
        report = {
            "tokens_per_second": work.tokens / seconds,
            "slices_per_second": work.slices / seconds,
            "volumes_per_second": work.volumes / seconds,
            "memory_gb": peak_bytes(device) / 1e9,
            "truncated_answers": int(truncated),
        }
        if unreadable:
            report["unreadable_volumes"] = int(unreadable)
        if work.padded:
            report["padding"] = 1 - work.tokens / work.padded
        if self.flops and self.peak_tflops:
            report["mfu"] = self.flops(work) / (seconds * self.peak_tflops * 1e12 * processes)
        self.restart()
        return report
