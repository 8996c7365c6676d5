"""Volumes for evaluation: read once, ahead of the model, and encoded once however many questions there are about them.

Each class is a `VolumeStore`, and they stack: `EncodedVolumes(model, image_processor, ReadAhead(SliceCache(…)), 9)`.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeAlias, TypeVar

import numpy as np

from samf.cache.embedding_cache import encode_slices
from samf.data.schema import Record, VolumeStore
from samf.model.ct_volume import read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.model.modeling_samf import SamfForConditionalGeneration

__all__ = ["EncodedVolumes", "ReadAhead", "VolumeMemo"]

# Slices or embeddings of a volume by name.
VolumeArrays: TypeAlias = Mapping[str, np.ndarray]
_Key: TypeAlias = tuple[str, tuple[float, ...]]
T = TypeVar("T")


def _key(path: str, rescale: Sequence[float] | None) -> _Key:
    return path, tuple(rescale or ())


class _Memo(Generic[T]):
    """The last `capacity` values by key."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.values: OrderedDict[_Key, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: _Key) -> T | None:
        with self._lock:
            if key in self.values:
                self.values.move_to_end(key)
            return self.values.get(key)

    def put(self, key: _Key, value: T) -> None:
        with self._lock:
            self.values[key] = value
            self.values.move_to_end(key)
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

    def get(self, path: str, *, rescale: Sequence[float] | None = None) -> VolumeArrays:
        """Return what `image_processor.extract` returns for the volume; `rescale` as for `read_ct`."""
        key = _key(path, rescale)
        slices = self._memo.get(key)
        if slices is None:
            slices = self.image_processor.extract(read_ct(path, rescale=rescale))
            self._memo.put(key, slices)
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
        self._pending: dict[_Key, Future[VolumeArrays]] = {}

    def start(self, records: Iterable[Record]) -> None:
        """Begin to read the volumes of these records; earlier ones that nothing has asked for are dropped."""
        wanted = {_key(r["volume"], r.get("rescale")): r.get("rescale") for r in records if r["volume"] is not None}
        for key in self._pending.keys() - wanted.keys():
            self._pending.pop(key).cancel()
        for key, rescale in wanted.items():
            if key not in self._pending:
                self._pending[key] = self._threads.submit(self.store.get, key[0], rescale=rescale)

    def get(self, path: str, *, rescale: Sequence[float] | None = None) -> VolumeArrays:
        """Return what the store returns for the volume at `path`."""
        future = self._pending.pop(_key(path, rescale), None)
        return self.store.get(path, rescale=rescale) if future is None else future.result()

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

    def get(self, path: str, *, rescale: Sequence[float] | None = None) -> VolumeArrays:
        """Return `slice_embeddings` (S, D) float32, `slice_planes` and `slice_positions` (S,)."""
        key = _key(path, rescale)
        encoded = self._memo.get(key)
        if encoded is None:
            slices = self.store.get(path, rescale=rescale)
            if "slice_embeddings" not in slices:
                unwrap = getattr(self.model, "get_base_model", None)  # of a model in training that peft has wrapped
                model = self.model if unwrap is None else unwrap()
                slices = encode_slices(model.model, self.image_processor, slices)
            encoded = slices
            self._memo.put(key, encoded)
        return encoded
