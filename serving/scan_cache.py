"""The scans that were encoded last, so that the second question about one needs no encoder."""

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samf.model.pipeline_samf import EncodedScan


class ScanCache:
    """Encoded scans by the hash of their content; the one that was used longest ago goes first.

    Args:
        max_scans: how many are kept.
        max_bytes: memory that they may take together.
    """

    def __init__(self, max_scans: int, max_bytes: int) -> None:
        self._max_scans = max_scans
        self._max_bytes = max_bytes
        self._scans: OrderedDict[str, EncodedScan] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._scans)

    def get(self, key: str, with_images: bool = False) -> "EncodedScan | None":
        """Return a scan, if it is kept.

        Args:
            key: of its content.
            with_images: only with its slices' pixels, which evidence needs.
        """
        scan = self._scans.get(key)
        if scan is None or (with_images and scan.images is None):
            self.misses += 1
            return None
        self.hits += 1
        self._scans.move_to_end(key)
        return scan

    def put(self, key: str, scan: "EncodedScan") -> None:
        """Keep a scan, in place of others where there is no room; one that is too large by itself is not kept."""
        self._remove(key)
        size = _size_of(scan)
        if size > self._max_bytes or self._max_scans < 1:
            return
        while self._scans and (len(self._scans) >= self._max_scans or self.bytes + size > self._max_bytes):
            self._remove(next(iter(self._scans)))
        self._scans[key] = scan
        self.bytes += size

    def _remove(self, key: str) -> None:
        if (scan := self._scans.pop(key, None)) is not None:
            self.bytes -= _size_of(scan)


def _size_of(scan: "EncodedScan") -> int:
    """Return the bytes of a scan's arrays."""
    images = scan.images
    pixels = 0 if images is None else images.slices.nbytes + images.indices.nbytes + images.mm.nbytes
    return pixels + sum(array.nbytes for array in scan.features.values())
