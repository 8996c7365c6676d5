"""Batches without volumes that can't be read, for `--on_error skip`."""

import logging
import zlib
from collections.abc import Sequence

import datasets
import torch

from samf.data.collator import SamfCollator
from samf.data.schema import OnError, Record
from samf.model.ct_volume import CTReadError

logger = logging.getLogger(__name__)

# A volume without an entry in the embedding cache couldn't be read when the cache was filled.
_UNREADABLE = (CTReadError, FileNotFoundError)
# Unreadable substitutes in a row after which the disk, rather than the volumes, must be the cause.
_TRIES = 20


class SkippingCollator:
    """A SamfCollator that replaces records whose volume can't be read, and counts them.

    Every process needs a batch at every step, so a record can't just be left out. The substitute is another record of the
    batch, or else a training record chosen by the failed record's id: the same in every run and on any number of processes.

    Args:
        collator: Makes the batches.
        substitutes: Records to choose from.

    Attributes:
        unreadable: Number of records replaced in this process.
    """

    def __init__(self, collator: SamfCollator, substitutes: datasets.Dataset):
        self.collator, self.substitutes = collator, substitutes
        self.unreadable = 0
        self._named: set[str] = set()

    @property
    def truncated(self) -> int:
        """Return the collator's count of answers that were cut."""
        return self.collator.truncated

    def __call__(self, records: Sequence[Record]) -> dict[str, torch.Tensor]:
        """Return a batch of the records, or of substitutes for those that can't be read."""
        try:
            return self.collator(records)
        except _UNREADABLE:
            return self.collator(self._replace_unreadable(records))

    def _replace_unreadable(self, records: Sequence[Record]) -> list[Record]:
        failed = {place for place, record in enumerate(records) if not self._can_read(record)}
        self.unreadable += len(failed)
        good = [record for place, record in enumerate(records) if place not in failed and record["volume"] is not None]
        return [
            (good[place % len(good)] if good else self._substitute(record)) if place in failed else record
            for place, record in enumerate(records)
        ]

    def _can_read(self, record: Record) -> bool:
        try:
            self.collator.read_volume(record)
        except _UNREADABLE as error:
            if record["volume"] not in self._named:
                self._named.add(record["volume"])
                logger.warning("skipped, another record takes its place: %s", error)
            return False
        return True

    def _substitute(self, record: Record) -> Record:
        tried = 0
        for step in range(len(self.substitutes)):
            row = (zlib.crc32(str(record["id"]).encode()) + step) % len(self.substitutes)
            other = self.substitutes[row]
            if other["volume"] in (None, record["volume"]):
                continue
            if self._can_read(other):
                return other
            tried += 1
            if tried == _TRIES:
                break
        raise CTReadError(
            f"{record['volume']}: can't be read, and neither can {tried} others, one after the other. Is their disk there?"
        )


def skip_unreadable(
    collator: SamfCollator, on_error: OnError, substitutes: datasets.Dataset
) -> SamfCollator | SkippingCollator:
    """Return the collator, wrapped for `on_error="skip"` so that it replaces records that can't be read.

    Args:
        collator: Makes the batches.
        on_error: "raise" or "skip".
        substitutes: Records to choose from.
    """
    return SkippingCollator(collator, substitutes) if on_error == "skip" else collator
