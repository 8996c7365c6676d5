"""Filling a slice cache on all processes of a run together."""

import logging
import time
import uuid
from collections.abc import Collection, Sequence
from itertools import chain
from typing import get_args

from samf.cache.fill import FillOptions, StoppedError, fill_slices
from samf.cache.manifest import Manifest, Shard, Volume, inspect_volumes
from samf.cache.slice_cache import SliceCache, entry_file
from samf.model.ct_object_store import known_states, remember_states
from samf.model.ct_volume import VolumeRef
from samf.model.image_processing_samf import EXTRACT_VERSION
from samf.training.choices import OnErrorOption
from samf.utils.distributed import Processes, processes_here
from samf.utils.parallel import usable_cores

logger = logging.getLogger(__name__)

_PATIENCE = 120  # seconds until a machine sees what another one has written


def fill_slice_cache(
    cache: SliceCache,
    volumes: Sequence[VolumeRef],
    on_error: OnErrorOption = "raise",
    *,
    searched: Collection[str] = (),
    timeout: float | None = FillOptions.timeout,
) -> list[VolumeRef]:
    """Add what the cache lacks as `preprocess.py` does, each process its share, and return the volumes that have an entry.

    All processes must call it with the same list. The first one inspects the volumes for all, shares are assigned by place
    in the list, and each process reports the entries of its own share: an entry that a process can't see yet isn't taken
    for missing.

    Args:
        cache: Gets the entries, and markers of volumes that can't be read, crash their reader or take too long. With "skip"
            a marked volume isn't tried again.
        volumes: The volumes that should have an entry.
        on_error: A volume that can't be read: "raise" its error, or "skip": log it, leave it out and count it.
        searched: Paths that were found by a search rather than named: those that are no CT are always left out.
        timeout: Seconds that one volume may take; None = no limit.

    Raises:
        UnreadableVolumeError: A CTReadError, on all processes, when one of them can't read a volume.
        PreprocessError: The cache can't be written, or none of the volumes is a CT.
    """
    if on_error not in get_args(OnErrorOption):
        raise ValueError(f"on_error={on_error!r}; expected 'raise' or 'skip'.")
    processes = Processes()
    listed, run, states = processes.from_first(
        lambda: (inspect_volumes(volumes, cache, searched), uuid.uuid4().hex, known_states())
    )
    remember_states(states)
    shard = Shard(processes.rank, processes.count)
    _fill_share(cache, listed, run, shard, "skip" if on_error == "skip" else FillOptions.on_error, timeout)
    own = {volume.key for volume in shard.of(listed) if _has_file(cache, volume)}
    filled: set[str | None] = set(chain.from_iterable(processes.gather(own)))
    present = [volume for volume in listed if volume.key in filled]
    _wait_for_files(cache, present)
    kept = [volume.ref for volume in present]
    _log_left_out(volumes, kept, searched)
    return kept


def _fill_share(
    cache: SliceCache, listed: Sequence[Volume], run: str, shard: Shard, on_error: str, timeout: float | None
) -> None:
    """Fill this process's share; an error on any process stops all and is raised on all."""
    processes = Processes()
    stopped = cache.folder / "log" / f".{run}.stopped"  # exists when a process of this run has failed
    options = FillOptions(
        shard=shard,
        workers=max(1, usable_cores() // processes_here()),
        timeout=timeout,
        on_error=on_error,
        show_progress=processes.is_first,
        should_stop=stopped.exists if processes.count > 1 else None,
    )
    about = {"settings_hash": cache.image_processor.settings_hash(), "extract_version": EXTRACT_VERSION}
    failure = None
    try:
        fill_slices(listed, cache, Manifest(cache.folder, "slices"), options, about)
    except StoppedError:
        logger.warning("another process has stopped, and so does this one")
    except Exception as error:  # noqa: BLE001 - raised on every process, or the others would wait for this one
        failure = error
        if processes.count > 1:
            stopped.parent.mkdir(parents=True, exist_ok=True)
            stopped.touch()
    try:
        processes.raise_together(failure)
    finally:
        stopped.unlink(missing_ok=True)


def _log_left_out(volumes: Sequence[VolumeRef], kept: Sequence[VolumeRef], searched: Collection[str]) -> None:
    named = [volume for volume in set(volumes) - set(kept) if volume.path not in searched]
    if len(kept) < len(volumes):
        logger.warning(
            "%d of %d volumes couldn't be read, or are no CT, and are left out (%d of them named)",
            len(volumes) - len(kept),
            len(volumes),
            len(named),
        )


def _wait_for_files(cache: SliceCache, filled: Sequence[Volume]) -> None:
    """Wait until this machine sees the entries that other machines have written; network file systems take a while.

    Raises FileNotFoundError on all processes when one of them doesn't see an entry after `_PATIENCE` seconds.
    """
    processes, unseen = Processes(), list(filled)
    deadline, error = time.monotonic() + _PATIENCE, None
    while unseen := [volume for volume in unseen if not _has_file(cache, volume)]:
        if time.monotonic() > deadline:
            error = FileNotFoundError(
                f"{cache.folder}: process {processes.rank} doesn't see {len(unseen)} entries that others have written "
                f"(first: {unseen[0].path}). All machines must share this folder and mount the volumes at the same paths."
            )
            break
        time.sleep(1)
    processes.raise_together(error)


def _has_file(cache: SliceCache, volume: Volume) -> bool:
    """Return whether a volume has an entry; a volume that doesn't exist, such as a dangling link, has none."""
    return volume.key is not None and entry_file(cache.folder, volume.key).is_file()
