"""Filling a slice cache ahead of training, by any number of processes on any number of machines.

Shards divide the list by position (`Shard`), which needs no communication between machines and works on every file
system; a cluster (`samf.cache.cluster`) has one queue instead. Within a shard, and between runs over the same list, each
volume is locked before its entry is made (`samf.cache.locks`). A volume is done when its entry exists, so a killed run is
resumed by starting it again, with any shards. A volume that can't be read, crashes its process or takes too long is noted as
failed (`samf.cache.manifest`), and the run continues; a failure for lack of memory or of a library, or because of the disk
or network, is left to the next run.

Volumes on the Hub, in object stores or on the web are downloaded first. Those from the Hub and from stores go to $TMPDIR and
are deleted after their slices were extracted, except for files that were in $HF_HOME before; those from the web are kept.
None of them is included in the estimate of disk space.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from tqdm import tqdm

from samf.cache.cluster import ClusterPool
from samf.cache.estimate import Estimate, describe_bytes, entry_bytes, free_bytes, split_sample
from samf.cache.fill_options import (
    AllFailedError,
    FillOptions,
    PreprocessError,
    StoppedError,
    UnreadableVolumeError,
)
from samf.cache.manifest import Manifest, ManifestSummary, Origin, WorkLog
from samf.cache.slice_cache import SliceCache
from samf.cache.slice_jobs import Job, Outcome, measure_extraction, run_job
from samf.cache.volume_list import Shard, Volume
from samf.cache.worker_pool import WorkerDied, WorkerPool
from samf.model.ct_download import is_address

__all__ = [
    "Estimate",
    "FillOptions",
    "PreprocessError",
    "StoppedError",
    "UnreadableVolumeError",
    "describe_bytes",
    "dry_run",
    "entry_bytes",
    "fill_slices",
    "free_bytes",
    "unsettled",
]

logger = logging.getLogger(__name__)

Pool: TypeAlias = WorkerPool[Job, Outcome] | ClusterPool[Job, Outcome]

_POLL = 2.0  # seconds between two attempts at volumes that other processes have locked
_MAX_FAILURES = 20  # failures in a row without any success after which the cause can't be the volumes
# Signals that a volume causes. Others, such as SIGKILL for lack of memory, may not recur.
_CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")
_TIMEOUT = "Timeout"  # may also be caused by the disk: see `_FillRun.retry_timed_out`


def dry_run(volumes: Sequence[Volume], cache: SliceCache, manifest: Manifest, options: FillOptions) -> Estimate:
    """Return what `fill_slices` would take. A few volumes are read for it; nothing is written.

    Args:
        volumes: the list.
        cache: the slice cache.
        manifest: its manifest.
        options: how it would be filled.
    """
    estimate, here = _estimate_slices(volumes, cache, manifest, options)
    sample, _ = split_sample(here, estimate.workers)
    workers = min(estimate.workers, len(sample))
    with WorkerPool(partial(measure_extraction, cache=cache), workers, options.timeout) as pool:
        return estimate.with_time(here, _times((volume, Outcome.of(result)) for volume, result in pool.map(sample)))


def fill_slices(
    volumes: Sequence[Volume], cache: SliceCache, manifest: Manifest, options: FillOptions, origin: Origin
) -> ManifestSummary:
    """Make the missing entries of this shard; write and return the manifest, also if the work is interrupted.

    Args:
        volumes: the list, the same for all shards.
        cache: the slice cache.
        manifest: its manifest.
        options: how it is filled.
        origin: data and settings, for the manifest.

    Raises:
        UnreadableVolumeError: a volume can't be read, and `on_error` is "raise".
        PreprocessError: the disk is too small, the cache can't be written, or none of the volumes found is a CT.
    """
    estimate, here = _estimate_slices(volumes, cache, manifest, options)
    estimate.check_space(manifest.folder, options.force)
    _forget_failures(here, manifest)
    inaccessible = [volume for volume in options.shard.of(volumes) if volume.key is None]
    if inaccessible and options.on_error == "raise":
        raise UnreadableVolumeError(_with_remedy(inaccessible[0].problem))
    try:
        if here:
            with _open_pool(volumes, estimate.workers, cache, manifest, options) as pool:
                _make_all(here, _known_readable(volumes, manifest), estimate, pool, manifest, options)
    except AllFailedError:  # the workers have ended: no process notes further failures
        for volume in here:
            manifest.forget_failure(volume.name)
        raise
    finally:
        summary = manifest.write_manifest(volumes, origin)
    if summary["passed_over"]:
        _report_passed_over(summary, manifest, options)
    return summary


def unsettled(volumes: Sequence[Volume], manifest: Manifest, shard: Shard) -> list[Volume]:
    """Return the volumes of a shard that have neither an entry nor a failure that lasts.

    Args:
        volumes: the list.
        manifest: the manifest of the cache.
        shard: the part of the list.
    """
    done, failed = manifest.keys()
    settled = done | failed  # once, not for each volume
    return [
        volume
        for volume in shard.of(volumes)
        if volume.is_unreached or (volume.key is not None and volume.key not in settled)
    ]


def _estimate_slices(
    volumes: Sequence[Volume], cache: SliceCache, manifest: Manifest, options: FillOptions
) -> tuple[Estimate, list[Volume]]:
    """Return the size without the time, and this shard's volumes that need an entry."""
    done, failed = manifest.keys()
    if options.retry_failed:
        failed = set()
    elif options.on_error == "raise":  # failures are retried, except for files that are no CT
        failed = manifest.passed_over(volumes, failed)
    skipped = done | failed
    pending = [volume for volume in volumes if volume.key is not None and volume.key not in skipped]
    here = [volume for volume in options.shard.of(volumes) if volume.key is not None and volume.key not in skipped]
    estimate = Estimate(
        volumes=len(volumes),
        pending=len(pending),
        here=len(here),
        entry_bytes=entry_bytes(cache.image_processor),
        free_bytes=free_bytes(manifest.folder),
        workers=max(1, min(options.workers, len(here))),
        fetched=sum(is_address(volume.path) for volume in pending),
    )
    return estimate, here


def _forget_failures(volumes: Sequence[Volume], manifest: Manifest) -> None:
    """Remove the markers of volumes that failed in an earlier run and are retried now."""
    failed = manifest.keys().failed
    for volume in volumes:
        if volume.key in failed:
            manifest.forget_failure(volume.name)


def _known_readable(volumes: Sequence[Volume], manifest: Manifest) -> Volume | None:
    """Return a volume on a disk that was read in an earlier run, if there is one."""
    done = manifest.keys().done
    return next((volume for volume in volumes if volume.key in done and not is_address(volume.path)), None)


def _report_passed_over(summary: ManifestSummary, manifest: Manifest, options: FillOptions) -> None:
    """Log how many files found are no CT; raise PreprocessError if nothing else was found."""
    file, count = manifest.path("passed_over.jsonl"), summary["passed_over"]
    reason = json.loads(file.read_text(encoding="utf-8").partition("\n")[0])["message"]
    if not summary["volumes"]:
        raise PreprocessError(f"None of the {count} volumes found is a CT; the first: {reason} All of them: {file}")
    if options.show_progress:
        logger.warning(
            "%d volumes found are no CT and are passed over; the first: %s All of them: %s", count, reason, file
        )


def _open_pool(
    volumes: Sequence[Volume], workers: int, cache: SliceCache, manifest: Manifest, options: FillOptions
) -> Pool:
    """Return the processes that read volumes: of this machine, or of a cluster's."""
    work = partial(run_job, cache=cache, manifest=manifest)
    if options.cluster is None:
        return WorkerPool(work, workers, options.timeout)
    return ClusterPool(options.cluster, work, options.timeout, cache, volumes)


def _make_all(
    here: Sequence[Volume],
    readable: Volume | None,
    estimate: Estimate,
    pool: Pool,
    manifest: Manifest,
    options: FillOptions,
) -> None:
    sample, rest = split_sample(here, pool.size)
    with (
        WorkLog(manifest, options.shard) as log,
        tqdm(total=len(here), desc="slices", unit="volume", disable=not options.show_progress) as progress,
    ):
        run = _FillRun(pool, manifest, log, options, progress, readable)
        measured = []
        for volume, outcome in run.make(
            [*sample, *rest]
        ):  # at once: a volume that hangs is no reason for others to wait
            measured.append((volume, outcome))
            if len(measured) == len(sample) and options.show_progress:
                timed = replace(estimate, workers=pool.size).with_time(here, _times(measured))
                logger.info("%s", timed)
        run.make_released()
        run.retry_timed_out()


class _FillRun:
    """Work of one process: gives volumes to a pool and records what becomes of them.

    Args:
        pool: runs the jobs.
        manifest: gets the failures.
        log: gets the entries that are made.
        options: see `FillOptions`.
        progress: counts the volumes.
        readable: a volume that was read in an earlier run, if there is one.
    """

    def __init__(
        self,
        pool: Pool,
        manifest: Manifest,
        log: WorkLog,
        options: FillOptions,
        progress: tqdm,
        readable: Volume | None = None,
    ):
        self.pool, self.manifest, self.log, self.options, self.progress = pool, manifest, log, options, progress
        self.readable = readable
        self.locked: list[Volume] = []
        self.timed_out: list[Volume] = []
        self.failures = 0
        self.timeouts_in_a_row = 0
        self.has_success = False

    def make(self, volumes: Sequence[Volume]) -> Iterator[tuple[Volume, Outcome]]:
        """Make the entries of these volumes; yield the outcomes."""
        for job, result in self.pool.map([Job(volume) for volume in volumes]):
            if self.options.should_stop is not None and self.options.should_stop():
                raise StoppedError("another process has stopped")
            if _is_timeout(result) and self.options.on_error == "skip":
                self._postpone(job.volume, Outcome.of(result))
            else:
                self.timeouts_in_a_row = 0
                self._record(job.volume, result)
            yield job.volume, Outcome.of(result)

    def make_released(self) -> None:
        """Wait for volumes that other processes had locked, and make those that they left; not forever."""
        progressed = time.monotonic()
        while self.locked:
            locked, self.locked = self.locked, []
            deque(self.make(locked), maxlen=0)
            if len(self.locked) < len(locked):
                progressed = time.monotonic()
            elif time.monotonic() - progressed > (self.options.timeout or 3600):
                logger.warning(
                    "%d volumes are still locked by other processes; they are left to them", len(self.locked)
                )
                return
            if self.locked:
                time.sleep(_POLL)

    def retry_timed_out(self) -> None:
        """Retry volumes that timed out, together with a volume that is known to be readable.

        A volume that hangs its reader can't be distinguished from one on a disk that stalls, as file servers do when they
        restart. It is noted as failed if it times out again while the same machine reads the readable one. Otherwise it is
        left to the next run.
        """
        waiting, self.timed_out = self.timed_out, []
        control = [] if self.readable is None else [Job(self.readable, is_control=True)]
        for results in self.pool.map_beside([Job(volume) for volume in waiting], control):
            disk_responds = any(job.is_control and Outcome.of(result).status == "done" for job, result in results)
            for job, result in results:
                if job.is_control:
                    continue
                if _is_timeout(result) and disk_responds:
                    outcome = Outcome.of(result)
                    self.manifest.note_failure(job.volume, outcome.error, outcome.message)
                self._record(job.volume, result)

    def _postpone(self, volume: Volume, outcome: Outcome) -> None:
        """Retry a volume that timed out at the end; after too many in a row, end the run: the disk stalls."""
        self.timed_out.append(volume)
        self.timeouts_in_a_row += 1
        logger.warning("%s: %s; it is retried at the end", volume.label, outcome.message)
        if self.timeouts_in_a_row == _MAX_FAILURES:
            raise PreprocessError(
                f"{volume.label}: {outcome.message}, as did the {self.timeouts_in_a_row - 1} volumes before it. Does the "
                "volumes' disk stall? None of them is noted as failed: run again when the disk responds, or with a longer "
                "--timeout."
            )

    def _record(self, volume: Volume, result: Outcome | WorkerDied) -> None:
        outcome = Outcome.of(result)
        if isinstance(result, WorkerDied) and result.error in _CRASHES:
            self.manifest.note_failure(volume, outcome.error, outcome.message)
        if outcome.status == "locked":
            self.locked.append(volume)
            return
        self.progress.update()
        if outcome.status in ("done", "found"):
            self.has_success = True
            self.readable = self.readable if is_address(volume.path) else volume
        if outcome.status == "done":
            self.log.append(volume, outcome.bytes, outcome.seconds, outcome.host)
        elif outcome.status == "aborted":
            raise PreprocessError(f"{outcome.message}. Is the disk full or faulty, or the folder write-protected?")
        elif outcome.status == "failed" and volume.is_passed_over(outcome.error):
            logger.info("passed over: %s", outcome.message)
        elif outcome.status == "failed":
            self._record_failure(volume, outcome)

    def _record_failure(self, volume: Volume, outcome: Outcome) -> None:
        self.failures += 1
        self.progress.set_postfix(failed=self.failures)
        message = outcome.message if volume.label in outcome.message else f"{volume.label}: {outcome.message}"
        if self.options.on_error == "raise":
            raise UnreadableVolumeError(_with_remedy(f"{message} ({outcome.error})"))
        logger.warning("skipped: %s (%s)", message, outcome.error)
        if self.failures == _MAX_FAILURES and not self.has_success and not self.options.retry_failed:
            raise AllFailedError(
                f"the first {_MAX_FAILURES} volumes all failed: {message} ({outcome.error}). Check the data and the settings; "
                f"none of these is noted as failed. If they are known to be unreadable, --retry_failed continues."
            )


def _times(outcomes: Iterable[tuple[Volume, Outcome]]) -> Iterator[tuple[Volume, float]]:
    """Yield the seconds that each volume took which was done."""
    return ((volume, outcome.seconds) for volume, outcome in outcomes if outcome.status == "done")


def _is_timeout(result: Outcome | WorkerDied) -> bool:
    return isinstance(result, WorkerDied) and result.error == _TIMEOUT


def _with_remedy(message: str) -> str:
    return f"{message}\n--on_error skip lists such volumes in failures.jsonl and continues."
