"""Stage 3's source of volumes: their files, prepared slices, or a frozen encoder's embeddings."""

import logging
import os
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from samf.cache.embedding_cache import EmbeddingCache, encoder_fingerprint
from samf.cache.fill import describe_bytes, entry_bytes, free_bytes
from samf.cache.manifest import Manifest, inspect_volumes
from samf.cache.slice_cache import SliceCache, read_entry
from samf.data.schema import VolumeLike, VolumeStore
from samf.data.shards.index import ShardIndex, ShardsError
from samf.data.shards.storage import Storage
from samf.data.shards.store import ShardStore
from samf.model.ct_object_store import known_states, remember_states
from samf.model.ct_volume import VolumeRef
from samf.model.image_processing_samf import SamfImageProcessor
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.processing_samf import SamfProcessor
from samf.training.arguments import DataArguments
from samf.training.slice_filling import fill_slice_cache
from samf.utils.distributed import Processes

logger = logging.getLogger(__name__)

_EMBEDDING_BYTES = 4  # per number


class OptionalSliceCache(SliceCache):
    """A slice cache that training can do without: what can't be kept is extracted again whenever it is needed.

    Args:
        folder: See SliceCache.
        image_processor: See SliceCache.
        min_coverage: See SliceCache.
        is_writable: False = use the existing entries and add none. It becomes False at the first entry that can't be
            written, which each process warns of once.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        image_processor: SamfImageProcessor,
        min_coverage: float = 0.0,
        is_writable: bool = True,
    ):
        super().__init__(folder, image_processor, min_coverage)
        self.is_writable = is_writable

    def get(
        self, volume: VolumeLike, *, rescale: Sequence[float] | None = None, searched: bool = False
    ) -> dict[str, np.ndarray]:
        """Return what `SliceCache.get` returns, without errors of the cache itself.

        Args:
            volume: Path or address of a volume, or a `VolumeRef`.
            rescale: Of a path: see `SliceCache.get`.
            searched: Whether the volume was found by a search rather than named; what is no CT is then refused.

        Raises:
            CTReadError: The volume can't be read.
        """
        volume = VolumeRef.of(volume, rescale)
        if self.is_writable:
            try:
                return super().get(volume, searched=searched)
            except OSError as error:
                self.is_writable = False
                logger.warning("%s: %s. Training continues without adding to the cache.", self.folder, error)
        try:
            entry = read_entry(self.entry_path(volume))
        except OSError as error:
            logger.debug("%s: %s", self.folder, error)
            entry = None
        if entry is not None:
            return entry
        return self.extract(volume, searched=searched)


def why_not_write(folder: Path, missing: int, bytes_each: int) -> str | None:
    """Return why entries can't be added to a cache; None if they can.

    Args:
        folder: Of the cache; created if it doesn't exist.
        missing: Number of entries to add.
        bytes_each: Size of one entry.
    """
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"can't be written ({error.strerror})"
    free = free_bytes(folder)
    if missing * bytes_each > free:
        needed = describe_bytes(missing * bytes_each)
        return f"lacks {missing} entries of {needed} together, and {describe_bytes(free)} are free"
    return None


def _check(
    folder: Path, stage: str, store: SliceCache | EmbeddingCache, volumes: Sequence[VolumeRef], size: int
) -> str:
    """Return why not all of `volumes` can be added to a cache, "" if they can; the same on all processes."""

    def look() -> str:
        done, _ = Manifest(folder, stage).keys()
        listed = inspect_volumes(volumes, store)
        missing = sum(volume.key is not None and volume.key not in done for volume in listed)
        problem = (why_not_write(folder, missing, size) or "") if missing else ""
        if problem:
            logger.warning("%s %s: its %s are used, and nothing is added.", folder, problem, stage)
        return problem

    # Another process may see the disk differently.
    problem, states = Processes().from_first(lambda: (look(), known_states()))
    remember_states(states)
    return problem


def build_volume_store(
    args: DataArguments,
    model: SamfForConditionalGeneration,
    processor: SamfProcessor,
    trained: list[str],
    volumes: list[VolumeRef],
    device: torch.device,
) -> VolumeStore | None:
    """Return the store that the collator reads volumes from; None = it reads the files.

    Missing embeddings are computed on `device`, by all processes together. A cache that can't be written, or whose disk is
    too small, is used as it is, with a warning.

    Args:
        args: Name the cache, and say whether it keeps embeddings.
        model: Its slice encoder computes embeddings.
        processor: Its image processor extracts slices.
        trained: The parts that are trained.
        volumes: All volumes that training and evaluation will read.
        device: Where embeddings are computed.

    Raises:
        ValueError: Embeddings of a slice encoder that is trained can't be cached.
    """
    if args.slice_cache is None:
        return None
    folder, image_processor = Path(args.slice_cache), processor.image_processor
    slices = OptionalSliceCache(folder, image_processor, args.min_coverage)
    slices.is_writable = not _check(folder, "slices", slices, volumes, entry_bytes(image_processor))
    if not args.cache_embeddings:
        return slices
    if "slice_encoder" in trained:
        raise ValueError("cache_embeddings needs a frozen slice encoder: leave slice_encoder out of train_parts.")
    model.model.slice_encoder.to(device)
    embeddings = EmbeddingCache(folder, slices, model.model)
    size = image_processor.num_slices * (model.config.vision_config.hidden_size * _EMBEDDING_BYTES + 24) + 600
    if _check(folder, "embeddings", embeddings, volumes, size):
        return slices
    if args.on_error == "skip":
        volumes = fill_slice_cache(slices, volumes, "skip")
    embeddings.fill_together(volumes)
    return embeddings


def open_shards(
    args: DataArguments, model: SamfForConditionalGeneration, processor: SamfProcessor, trained: list[str]
) -> ShardStore | None:
    """Return the shards that the arguments name; None without them.

    Args:
        args: Name the shards and the folder for those that are fetched.
        model: Its slice encoder must be the one of packed embeddings.
        processor: Its image processor must have the settings of the packed slices.
        trained: The parts that are trained.

    Raises:
        ShardsError: The shards don't fit the model; names both sides.
        FileNotFoundError: There are no shards.
    """
    if args.data_shards is None:
        return None
    storage = Storage(args.data_shards)
    index = ShardIndex.read(storage)
    index.check_settings(processor.image_processor, storage.shown)
    if args.min_coverage not in (0, packed := index.settings["min_coverage"]):
        raise ShardsError(
            f"{storage.shown}: packed with min_coverage={packed}, and min_coverage is {args.min_coverage}."
        )
    if index.kind == "embeddings":
        if "slice_encoder" in trained:
            raise ShardsError(
                f"{storage.shown}: packed embeddings need a frozen slice encoder: leave slice_encoder out of train_parts."
            )
        if index.encoder != (found := encoder_fingerprint(model.model)):
            raise ShardsError(
                f"{storage.shown}: embeddings of the slice encoder {index.encoder}, and the model's is {found} (a hash of "
                "weights, settings and dtype). Pack embeddings of this model, or its slices."
            )
    folder = Path(args.shard_cache or Path(tempfile.gettempdir(), "samf-shards")).expanduser().absolute()
    return ShardStore(storage, index, folder, round(args.shard_cache_gb * 1e9))
