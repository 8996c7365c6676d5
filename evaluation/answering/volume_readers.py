"""Volumes for evaluation: read once, ahead of the model, and encoded once however many questions there are about them.

Each class is a `VolumeStore`, and they stack: `EncodedVolumes(model, image_processor, ReadAhead(SliceCache(…)), 9)`.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeAlias, TypeVar

import numpy as np

from samf.cache.embedding_cache import encode_slices
from samf.data.schema import Record, VolumeLike, VolumeStore, volume_of
from samf.model.ct_volume import VolumeRef, read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.model.modeling_samf import SamfForConditionalGeneration

__all__ = ["EncodedVolumes", "ReadAhead", "VolumeMemo"]

# Slices or embeddings of a volume by name.
VolumeArrays: TypeAlias = Mapping[str, np.ndarray]
T = TypeVar("T")


class _Memo(Generic[T]):
    """The last `capacity` values by volume."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.values: OrderedDict[VolumeRef, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, volume: VolumeRef) -> T | None:
        with self._lock:
            if volume in self.values:
                self.values.move_to_end(volume)
            return self.values.get(volume)

    def put(self, volume: VolumeRef, value: T) -> None:
        with self._lock:
            self.values[volume] = value
            self.values.move_to_end(volume)
            while len(self.values) > self.capacity:
                self.values.popitem(last=False)


class VolumeMemo:
    """The slices of the last few volumes in memory: consecutive questions about one volume read it once.

    Args:
        image_processor: extracts the slices.
        capacity: the number of volumes kept.
    """

    def __init__(self, image_processor: SamfImageProcessor, capacity: int = 2):
        self.image_processor = image_processor
        self._memo: _Memo[VolumeArrays] = _Memo(capacity)

    def get(self, volume: VolumeLike) -> VolumeArrays:
        """Return what `image_processor.extract` returns for the volume."""
        volume = VolumeRef.of(volume)
        slices = self._memo.get(volume)
        if slices is None:
            slices = self.image_processor.extract(read_ct(volume))
            self._memo.put(volume, slices)
        return slices


class ReadAhead:
    """A store that reads the volumes of the next batch in threads while the model works on this one.

    An error while reading is raised by `get`, for the volume that it belongs to.

    Args:
        store: the store that reads.
        threads: the number of reading threads.
    """

    def __init__(self, store: VolumeStore, threads: int = 2):
        self.store = store
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
        self._pending: dict[VolumeRef, Future[VolumeArrays]] = {}

    def start(self, records: Iterable[Record]) -> None:
        """Begin to read the volumes of these records; earlier ones that nothing has asked for are dropped."""
        wanted = dict.fromkeys(volume for record in records if (volume := volume_of(record)) is not None)  # in order
        for volume in self._pending.keys() - wanted.keys():
            self._pending.pop(volume).cancel()
        for volume in wanted:
            if volume not in self._pending:
                self._pending[volume] = self._threads.submit(self.store.get, volume)

    def get(self, volume: VolumeLike) -> VolumeArrays:
        """Return what the store returns for the volume."""
        volume = VolumeRef.of(volume)
        future = self._pending.pop(volume, None)
        return self.store.get(volume) if future is None else future.result()

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(cancel_futures=True)


class EncodedVolumes:
    """The slice embeddings of the last few volumes, each volume encoded once and by itself.

    By itself, so that a volume's embeddings don't depend on the rest of the batch; once, so that neither ten questions about
    it nor four options of each cost ten or forty passes through the slice encoder. A store that already gives embeddings is
    passed through.

    Args:
        model: a SAMF model; used on its own device and in its own dtype.
        image_processor: turns slices into pixel values.
        store: gives slices, or embeddings.
        capacity: the number of volumes kept.
    """

    def __init__(
        self,
        model: SamfForConditionalGeneration,
        image_processor: SamfImageProcessor,
        store: VolumeStore,
        capacity: int,
    ):
        self.model = model
        self.image_processor = image_processor
        self.store = store
        self._memo: _Memo[VolumeArrays] = _Memo(capacity)

    def holds(self, volume: VolumeRef | None) -> bool:
        """Return whether the volume's embeddings are in memory; False for None."""
        return volume is not None and self._memo.get(volume) is not None

    def get(self, volume: VolumeLike) -> VolumeArrays:
        """Return `slice_embeddings` (S, D) float32, `slice_planes` and `slice_positions` (S,)."""
        volume = VolumeRef.of(volume)
        encoded = self._memo.get(volume)
        if encoded is None:
            slices = self.store.get(volume)
            if "slice_embeddings" not in slices:
                unwrap = getattr(self.model, "get_base_model", None)  # of a model in training that peft has wrapped
                model = self.model if unwrap is None else unwrap()
                slices = encode_slices(model.model, self.image_processor, slices)
            # A cache's arrays are maps, of which each holds its file open.
            encoded = {name: np.array(array) for name, array in slices.items()}
            self._memo.put(volume, encoded)
        return encoded
