"""Size and time of filling a cache."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from samf.cache.fill_options import PreprocessError
from samf.cache.volume_list import Volume
from samf.model.image_processing_samf import SamfImageProcessor

_MIN_SAMPLE = 3  # volumes that are measured at least
_COORDINATE_BYTES = 24  # plane, position, index and mm of a slice
_HEADER_BYTES = 600


@dataclass(frozen=True)
class Estimate:
    """What filling a cache will take.

    Attributes:
        volumes: volumes in the list.
        pending: those of the list without an entry.
        here: those of this shard without an entry.
        entry_bytes: size of an entry.
        free_bytes: free space on the disk.
        workers: volumes that are processed at the same time.
        seconds: time for this shard; None if it wasn't measured.
        sample: number of volumes that were measured.
        fetched: those of `pending` that are downloaded from the Hub or the web.
    """

    volumes: int
    pending: int
    here: int
    entry_bytes: int
    free_bytes: int
    workers: int
    seconds: float | None = None
    sample: int = 0
    fetched: int = 0

    @property
    def needed_bytes(self) -> int:
        """Return the total size of the pending entries."""
        return self.pending * self.entry_bytes

    @property
    def fits(self) -> bool:
        """Return whether the pending entries fit on the disk."""
        return self.needed_bytes <= self.free_bytes

    def check_space(self, folder: Path, force: bool) -> None:
        """Raise PreprocessError if the pending entries don't fit on the disk, unless `force` is set."""
        if not self.fits and not force:
            raise PreprocessError(
                f"{folder}: the entries don't fit. {self} Choose another disk, fewer or smaller slices, or --force."
            )

    def with_time(self, here: Sequence[Volume], measured: Iterable[tuple[Volume, float]]) -> "Estimate":
        """Return the estimate with the time for this shard, in proportion to file sizes as far as they are known.

        Args:
            here: the volumes of this shard without an entry.
            measured: volumes that were processed, and the seconds that each took.
        """
        done = [(volume.bytes or 1, seconds) for volume, seconds in measured]
        if not done:
            return self
        seconds_per_byte = sum(seconds for _, seconds in done) / sum(size for size, _ in done)
        seconds = seconds_per_byte * sum(volume.bytes or 1 for volume in here) / self.workers
        return replace(self, seconds=seconds, sample=len(done))

    def __str__(self) -> str:
        size = (
            f"{self.volumes} volumes, {self.volumes - self.pending} done or failed, {self.pending} to make "
            f"({self.here} of them here). An entry takes {describe_bytes(self.entry_bytes)}: "
            f"{describe_bytes(self.needed_bytes)} more, {describe_bytes(self.volumes * self.entry_bytes)} in total; "
            f"{describe_bytes(self.free_bytes)} are free."
        )
        if self.fetched:
            size += f" {self.fetched} volumes are fetched, which is not counted: from the Hub to $TMPDIR."
        if self.seconds is None:
            return size
        return (
            f"{size} About {describe_seconds(self.seconds)} here with {self.workers} at once, "
            f"by {self.sample} volumes measured now."
        )


def entry_bytes(image_processor: SamfImageProcessor) -> int:
    """Return the approximate size of an entry of slices: pixels, coordinates and header."""
    pixels = image_processor.num_channels * image_processor.size**2
    return image_processor.num_slices * (pixels + _COORDINATE_BYTES) + _HEADER_BYTES


def describe_bytes(count: float) -> str:
    """Return a size as text with a decimal unit."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def describe_seconds(seconds: float) -> str:
    """Return a time as text."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def free_bytes(folder: Path) -> int:
    """Return the free space on the file system of a folder, which may not exist yet. Quotas are not considered."""
    folder = folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def split_sample(volumes: Sequence[Volume], workers: int) -> tuple[list[Volume], list[Volume]]:
    """Return volumes for measuring the time, evenly spread over the list, and the others.

    Args:
        volumes: the list.
        workers: number of worker processes; the sample has at least one volume for each.
    """
    count = min(len(volumes), max(_MIN_SAMPLE, workers))
    sampled = {int((i + 0.5) * len(volumes) / count) for i in range(count)}
    return [volumes[i] for i in sorted(sampled)], [v for i, v in enumerate(volumes) if i not in sampled]
