"""Volumes for evaluation: read once, ahead of the model, and encoded once however many questions there are about them.

Each class has the collator's `get(path, rescale=…)`, and they stack: `EncodedVolumes(model, ReadAhead(SliceCache(…)))`.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from samf.data.schema import VolumeStore
from samf.model.ct_volume import read_ct

Key = tuple[str, tuple[float, ...]]


def _key(path: str, rescale: Sequence[float] | None) -> Key:
    return path, tuple(rescale or ())


class _Memo:
    """The last `capacity` values by key."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.values: OrderedDict[Key, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Any:
        with self._lock:
            if key in self.values:
                self.values.move_to_end(key)
            return self.values.get(key)

    def put(self, key: Key, value: Any) -> None:
        with self._lock:
            self.values[key] = value
            self.values.move_to_end(key)
            while len(self.values) > self.capacity:
                self.values.popitem(last=False)


class VolumeMemo:
    """The last few volumes' slices in memory: the questions about one volume follow each other and read it once."""

    def __init__(self, image_processor: Any, capacity: int = 2):
        self.image_processor = image_processor
        self._memo = _Memo(capacity)

    def get(self, path: str, *, rescale: Sequence[float] | None = None) -> Mapping[str, Any]:
        """What `image_processor.extract` gives for the volume; `rescale` as for `read_ct`."""
        key = _key(path, rescale)
        slices = self._memo.get(key)
        if slices is None:
            slices = self.image_processor.extract(read_ct(path, rescale=rescale))
            self._memo.put(key, slices)
        return slices


class ReadAhead:
    """Reads the next batch's volumes in threads while the model works on this one.

    What reading raises is raised by `get`, for the volume that it belongs to.
    """

    def __init__(self, store: VolumeStore, threads: int = 2):
        self.store = store
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")
        self._pending: dict[Key, Future] = {}

    def start(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Begin to read these records' volumes; what was begun before and not asked for is forgotten."""
        wanted = {_key(r["volume"], r.get("rescale")): r.get("rescale") for r in records if r["volume"] is not None}
        for key in self._pending.keys() - wanted.keys():
            self._pending.pop(key).cancel()
        for key, rescale in wanted.items():
            if key not in self._pending:
                self._pending[key] = self._threads.submit(self.store.get, key[0], rescale=rescale)

    def get(self, path: str, *, rescale: Sequence[float] | None = None) -> Mapping[str, Any]:
        """What the store gives for the volume at `path`."""
        future = self._pending.pop(_key(path, rescale), None)
        return self.store.get(path, rescale=rescale) if future is None else future.result()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


class EncodedVolumes:
    """Slice embeddings of the last `capacity` volumes, each encoded by itself.

    By itself, so that a volume's embeddings don't depend on what else is in the batch; once, so that neither ten
    questions about it nor four options of each cost ten or forty passes through the slice encoder. A store that gives
    embeddings already is passed through.

    Args:
        model: a SAMF model; used on its own device and in its own dtype.
        image_processor: makes pixels of slices.
        store: gives slices, or embeddings.
    """

    def __init__(self, model: nn.Module, image_processor: Any, store: VolumeStore, capacity: int):
        self.model = model
        self.image_processor = image_processor
        self.store = store
        self._memo = _Memo(capacity)

    def get(self, path: str, *, rescale: Sequence[float] | None = None) -> Mapping[str, Any]:
        """`slice_embeddings` (S, D) float32, `slice_planes` and `slice_positions` (S,)."""
        key = _key(path, rescale)
        encoded = self._memo.get(key)
        if encoded is None:
            slices = self.store.get(path, rescale=rescale)
            encoded = slices if "slice_embeddings" in slices else self._encode(slices)
            self._memo.put(key, encoded)
        return encoded

    @torch.no_grad()
    def _encode(self, slices: Mapping[str, Any]) -> dict[str, Any]:
        pixels = self.image_processor([slices], return_tensors="pt")
        names = ("pixel_values", "slice_mask", "slice_planes", "slice_positions")
        inputs = {name: pixels[name].to(self.model.device) for name in names}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        embeddings = self.model.get_image_features(**inputs, return_dict=True).last_hidden_state[0]  # (S, D)
        return {
            "slice_embeddings": embeddings.float().cpu().numpy(),
            "slice_planes": slices["slice_planes"],
            "slice_positions": slices["slice_positions"],
        }
