"""Filling an embedding cache from a slice cache."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from samf.cache.embedding_cache import EmbeddingCache
from samf.cache.entries import read_entry, write_entry
from samf.cache.estimate import Estimate, free_bytes
from samf.cache.fill_options import FillOptions
from samf.cache.manifest import Manifest, ManifestSummary, Origin, WorkLog
from samf.cache.volume_list import Shard, Volume

logger = logging.getLogger(__name__)

_HEADER_BYTES = 400
_MAX_READERS = 8  # processes that read slices for one encoder


def estimate_embeddings(
    volumes: Sequence[Volume], embeddings: EmbeddingCache, manifest: Manifest, shard: Shard
) -> tuple[Estimate, list[Volume]]:
    """Return size and time, and this shard's volumes that need an entry.

    Args:
        volumes: the list, with the names of the embeddings' entries.
        embeddings: the embedding cache; its encoder is run to measure the time.
        manifest: the manifest of the embeddings.
        shard: this process's part of the list.
    """
    done = manifest.keys().done
    pending = [volume for volume in volumes if volume.key is not None and volume.key not in done]
    here = [volume for volume in shard.of(volumes) if volume.key is not None and volume.key not in done]
    seconds, entry_bytes = _measure_encoder(embeddings)
    estimate = Estimate(
        volumes=len(volumes),
        pending=len(pending),
        here=len(here),
        entry_bytes=entry_bytes,
        free_bytes=free_bytes(manifest.folder),
        workers=1,
        seconds=seconds * len(here),
        sample=1,
    )
    return estimate, here


def fill_embeddings(
    volumes: Sequence[Volume],
    embeddings: EmbeddingCache,
    slices: Sequence[Volume],
    manifest: Manifest,
    options: FillOptions,
    origin: Origin,
) -> ManifestSummary:
    """Encode this shard's volumes whose slices are cached; write and return the manifest.

    Args:
        volumes: the list, with the names of the embeddings' entries.
        embeddings: the embedding cache; its model's device does the work.
        slices: the same list, with the names of the slices' entries.
        manifest: the manifest of the embeddings.
        options: how the cache is filled.
        origin: data and settings, for the manifest.

    Raises:
        PreprocessError: the disk is too small.
    """
    estimate, here = estimate_embeddings(volumes, embeddings, manifest, options.shard)
    estimate.check_space(manifest.folder, options.force)
    if options.show_progress:
        logger.info("%s", estimate)
    slice_keys = {volume.path: volume.key for volume in slices}
    done = manifest.keys().done  # of both stages: they share the directory
    here = [volume for volume in here if slice_keys[volume.path] in done]
    ahead = embeddings.read_ahead([volume.ref for volume in here], min(options.workers, _MAX_READERS))
    try:
        with WorkLog(manifest, options.shard) as log:
            progress = tqdm(here, desc="embeddings", unit="volume", disable=not options.show_progress)
            for volume, (_, stack) in zip(progress, ahead, strict=True):
                _make_embeddings(volume, stack, embeddings, manifest, log)
    finally:
        summary = manifest.write_manifest(_with_slice_failures(volumes, slices, manifest), origin)
    return summary


def _with_slice_failures(volumes: Sequence[Volume], slices: Sequence[Volume], manifest: Manifest) -> list[Volume]:
    """Return the list without files that are no CT, and with volumes without slices marked as inaccessible."""
    slice_keys = {volume.path: volume.key for volume in slices}
    failed = manifest.keys().failed
    passed_over = manifest.passed_over(slices, failed)
    problem = "its slices can't be made: see failures.jsonl"
    return [
        replace(volume, key=None, problem=problem) if slice_keys[volume.path] in failed else volume
        for volume in volumes
        if slice_keys[volume.path] not in passed_over
    ]


def _make_embeddings(
    volume: Volume, stack: Mapping[str, np.ndarray], embeddings: EmbeddingCache, manifest: Manifest, log: WorkLog
) -> None:
    entry = manifest.entry(volume.name)
    with manifest.locks.hold(volume.name) as is_held:
        if not is_held or read_entry(entry) is not None:
            return
        start = time.perf_counter()
        write_entry(entry, embeddings.encode(stack))
        log.append(volume, entry.stat().st_size, time.perf_counter() - start)


def _measure_encoder(embeddings: EmbeddingCache) -> tuple[float, int]:
    """Return the seconds that the encoder takes for one volume and the bytes of an entry, measured on black slices."""
    processor = embeddings.slices.image_processor
    count = processor.num_slices
    slices: dict[str, np.ndarray] = {
        "slices": np.zeros((count, processor.num_channels, processor.size, processor.size), np.uint8),
        "slice_planes": np.zeros(count, np.int64),
        "slice_positions": np.zeros(count, np.float32),
        "slice_indices": np.zeros(count, np.int64),
        "slice_mm": np.zeros(count, np.float32),
    }
    embeddings.encode(slices)  # warm-up
    start = time.perf_counter()
    arrays = embeddings.encode(slices)
    seconds = time.perf_counter() - start
    return seconds, sum(array.nbytes for array in arrays.values()) + _HEADER_BYTES
