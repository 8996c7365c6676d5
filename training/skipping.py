"""Batches without the volumes that can't be read, for `--on_error skip`."""

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch

from samf.data.collator import SamfCollator
from samf.model.ct_volume import CTReadError

logger = logging.getLogger(__name__)

# Without a record of embeddings, a volume couldn't be read when they were made.
UNREADABLE = (CTReadError, FileNotFoundError)
# Substitutes that can't be read either, one after the other: then it is the disk, and not they.
TRIES = 20


class SkippingCollator:
    """A SamfCollator that puts another record in the place of one whose volume can't be read, and counts them.

    Every process needs a batch at every step, so that records can't just be left out. The substitute is another record of
    the batch, or else a training record that the failed one's id chooses: the same in every run and on any number of
    processes.

    Args:
        collator: makes the batches.
        substitutes: records to choose from.

    Attributes:
        unreadable: how many records were replaced in this process.
    """

    def __init__(self, collator: SamfCollator, substitutes: datasets.Dataset):
        self.collator, self.substitutes = collator, substitutes
        self.unreadable = 0
        self._named: set[str] = set()

    @property
    def truncated(self) -> int:
        return self.collator.truncated

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        try:
            return self.collator(records)
        except UNREADABLE:
            return self.collator(self._readable(records))

    def _readable(self, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        failed = {place for place, record in enumerate(records) if not self._can_read(record)}
        self.unreadable += len(failed)
        good = [record for place, record in enumerate(records) if place not in failed and record["volume"] is not None]
        return [
            (good[place % len(good)] if good else self._substitute(record)) if place in failed else record
            for place, record in enumerate(records)
        ]

    def _can_read(self, record: Mapping[str, Any]) -> bool:
        try:
            self.collator.read_volume(record)
        except UNREADABLE as error:
            if record["volume"] not in self._named:
                self._named.add(record["volume"])
                logger.warning("skipped, another record takes its place: %s", error)
            return False
        return True

    def _substitute(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        tried = 0
        for step in range(len(self.substitutes)):
            row = (zlib.crc32(str(record["id"]).encode()) + step) % len(self.substitutes)
            other = self.substitutes[row]
            if other["volume"] in (None, record["volume"]):
                continue
            if self._can_read(other):
                return other
            tried += 1
            if tried == TRIES:
                break
        raise CTReadError(
            f"{record['volume']}: can't be read, and neither can {tried} others, one after the other. Is their disk there?"
        )


def skipping(collator: SamfCollator, on_error: str, substitutes: datasets.Dataset) -> Callable[..., Any]:
    """Return the collator, for `on_error="skip"` as one that leaves out what can't be read."""
    return SkippingCollator(collator, substitutes) if on_error == "skip" else collator
