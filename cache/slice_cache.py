"""Cache of slice stacks: the output of `SamfImageProcessor.extract` for each volume, on disk.

An entry is one safetensors file per volume. Its name depends on the path, size and modification time of the volume's
files, the rescale, the image processor's `settings_hash()`, and the versions of the code (`ENTRY_VERSION`, and
`EXTRACT_VERSION` within the hash). A changed volume, setting or version therefore has an entry of its own: nothing needs
to be invalidated, and old entries can be deleted at any time. Entries are written atomically, so that several processes
can fill one cache.
"""

import os
from collections.abc import Sequence
from functools import partial

from samf.cache.entries import Arrays, Namer, VolumeCache, check_entry, entry_file, entry_key, read_entry, write_entry
from samf.cache.screening import refuse_mask
from samf.cache.volume_identity import Identity, volume_identity
from samf.data.schema import VolumeLike
from samf.model.ct_download import not_kept
from samf.model.ct_volume import CTVolume, VolumeRef, read_ct
from samf.model.image_processing_samf import SamfImageProcessor

__all__ = [
    "ENTRY_VERSION",
    "SliceCache",
    "check_entry",
    "entry_file",
    "entry_key",
    "read_entry",
    "volume_identity",
    "write_entry",
]

# Increased whenever `read_ct` gives other HU for the same file, or the layout of entries changes.
ENTRY_VERSION = 3
# The same for one format, by the suffix of its files. 1: RAD-ChestCT's files have their own orientation.
_FORMAT_VERSIONS = {".npz": 1}


class SliceCache(VolumeCache):
    """Slice stacks of volumes: `get(volume)` reads the entry, or makes it first.

    Can be pickled, so that the workers of a DataLoader share a cache; each process writes the entries that it makes.

    Args:
        folder: the cache directory; it is created if it is missing.
        image_processor: extracts the slices. Its `settings_hash()` is part of every entry's name.
        min_coverage: mm that a volume must cover along each axis, as for `read_ct`; part of the name if it isn't 0.
    """

    def __init__(self, folder: str | os.PathLike, image_processor: SamfImageProcessor, min_coverage: float = 0.0):
        super().__init__(folder)
        self.image_processor = image_processor
        self.min_coverage = min_coverage

    def namer(self) -> Namer:
        """Return the function that names the entries of many volumes, by the settings of this moment."""
        limits = [self.min_coverage] if self.min_coverage else []
        settings = self.image_processor.settings_hash()  # takes longer than all of a volume's own

        def name(volume: VolumeRef, identity: Identity) -> str:
            suffix = os.path.splitext(volume.path)[1].lower()
            formats = [f"{suffix} {_FORMAT_VERSIONS[suffix]}"] if suffix in _FORMAT_VERSIONS else []
            return entry_key(identity, volume.rescale, settings, ENTRY_VERSION, *limits, *formats)

        return name

    def get(self, volume: VolumeLike, *, rescale: Sequence[float] | None = None, searched: bool = False) -> Arrays:
        """Return the output of `image_processor.extract` for a volume, as read-only maps of its entry.

        Args:
            volume: one file, folder or address, or a `VolumeRef` of it. Its rescale is part of the entry's name. Downloads
                from the Hub are deleted afterwards.
            rescale: of a path, as for `read_ct`.
            searched: the volume was found in a folder instead of being named: refuse what may be a mask.

        Raises:
            CTReadError: the volume can't be read, or changed meanwhile. No entry is written.
            OSError: the entry can't be written or read.
        """
        return self._get(VolumeRef.of(volume, rescale), partial(self.extract, searched=searched))

    def extract(self, volume: VolumeLike, *, searched: bool = False) -> Arrays:
        """Read a volume and return its slices, without using the cache.

        Args:
            volume: see `get`.
            searched: see `get`.

        Raises:
            CTReadError: the volume can't be read.
        """
        volume = VolumeRef.of(volume)
        with not_kept(volume.path):
            return self.image_processor.extract(self.read(volume, searched=searched))

    def read(self, volume: VolumeLike, *, searched: bool = False) -> CTVolume:
        """Read a volume as its entry requires.

        Args:
            volume: see `get`.
            searched: see `get`.

        Raises:
            CTReadError: the volume can't be read, or covers less than `min_coverage`.
            NotCTError: a searched volume may be a mask.
        """
        ct = read_ct(VolumeRef.of(volume), min_coverage=self.min_coverage)
        if searched:
            refuse_mask(ct)
        return ct
