"""Whether a machine sees the cache and the volumes as the machine does that starts a run."""

import os
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from samf.cache.pool_process import PoolRefusedError
from samf.cache.slice_cache import SliceCache
from samf.cache.volume_identity import volume_identity
from samf.cache.volume_list import Volume
from samf.model.ct_download import is_address
from samf.model.ct_volume import CTReadError, VolumeRef

_SAMPLE = 5  # volumes that are looked up


@dataclass(frozen=True)
class MachineCheck(AbstractContextManager):
    """Check to be called on a machine before it gets work. Can be pickled.

    As a context manager it keeps a file in the cache directory, by which other machines recognise the directory.

    Attributes:
        cache: the cache.
        mark: name of the file.
        sample: volumes of the list, with the names of their entries.
        settings_hash: of the slice settings.
    """

    cache: SliceCache
    mark: str
    sample: tuple[tuple[VolumeRef, str], ...]
    settings_hash: str

    @classmethod
    def of(cls, cache: SliceCache, volumes: Sequence[Volume]) -> "MachineCheck":
        """Return the check for a list of volumes.

        Args:
            cache: the cache that is filled.
            volumes: the list.
        """
        local = [volume for volume in volumes if volume.key is not None and not is_address(volume.path)]
        chosen = local[:: max(1, len(local) // _SAMPLE)][:_SAMPLE]
        sample = tuple((volume.ref, volume.name) for volume in chosen)
        return cls(cache, f".{uuid.uuid4().hex}.cluster", sample, cache.image_processor.settings_hash())

    def __enter__(self) -> "MachineCheck":
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        (self.cache.folder / self.mark).touch()
        return self

    def __exit__(self, *_: object) -> None:
        (self.cache.folder / self.mark).unlink(missing_ok=True)

    def __call__(self) -> None:
        """Raise PoolRefusedError if this machine would make other entries, or make them elsewhere."""
        found = self.cache.image_processor.settings_hash()
        if found != self.settings_hash:
            raise PoolRefusedError(
                f"the slice settings are {found} here and {self.settings_hash} where preprocess.py was started; install the "
                "same samf"
            )
        folder = self.cache.folder
        if not (folder / self.mark).is_file():
            raise PoolRefusedError(f"{folder} is not the cache directory here; mount it at this path")
        if not os.access(folder, os.W_OK):
            raise PoolRefusedError(f"{folder} can't be written here")
        problems = [problem for volume, key in self.sample if (problem := self._problem(volume, key))]
        if problems and len(problems) == len(self.sample):  # one may have been removed meanwhile
            raise PoolRefusedError(f"{problems[0]} All machines must see the volumes under the same path")

    def _problem(self, volume: VolumeRef, key: str) -> str:
        """Return how a volume differs here, or nothing."""
        try:
            identity = volume_identity(volume.path)
        except CTReadError as error:
            return str(error)
        if self.cache.key(volume, identity) != key:
            return f"{volume.path}: another size or time of modification than where preprocess.py was started."
        return ""
