"""Filling a slice cache ahead of training, by any number of processes on any number of machines.

Who makes which volume: shards are dealt out by place in the list (`Shard`), which needs no word between machines and holds
on every file system; within that, and between runs over the same list, each volume is claimed before it is made
(`samf.cache.locks`). What has a record is done, so a killed run is simply started again, with any shards. A volume that
can't be read, that crashes its process or that takes too long is noted (`samf.cache.manifest`) and costs nothing else;
one that fails for want of memory or of a library, or because its disk or network does, is left to the next run.
Volumes on the Hub or the web are fetched first. Those from the Hub come into $TMPDIR and are deleted once their slices are
kept, but for what $HF_HOME had before; those from the web stay there. Neither is counted in the estimate.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from samf.cache.embedding_cache import EmbeddingCache
from samf.cache.manifest import Manifest, Shard, Volume, WorkLog
from samf.cache.slice_cache import SliceCache, check_entry, read_entry, write_entry
from samf.cache.worker_pool import WorkerDied, WorkerPool
from samf.model.ct_download import is_address, not_kept
from samf.model.ct_volume import CTReadError
from samf.model.image_processing_samf import SamfImageProcessor

logger = logging.getLogger(__name__)

_OTHERS = 2.0  # seconds between two looks at what others have claimed
_SAMPLE = 3  # volumes at least, on which the time is measured
_ALL_FAIL = 20  # volumes that fail one after the other, and none before: it isn't theirs
# What a volume does to its worker. Others, such as SIGKILL for lack of memory, may be gone the next time.
_DEADLY = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")
_TIMEOUT = "Timeout"  # may also be the disk's fault: see `_Run.settle_time_outs`


class PreprocessError(RuntimeError):
    """Why the cache is not filled; the message says what to do."""


class UnreadableVolumeError(PreprocessError, CTReadError):
    """A volume that can't be read, where that stops the run."""


class StoppedError(PreprocessError):
    """Another process has stopped, so this one does."""


class AllFailedError(PreprocessError):
    """So many volumes fail, and none does not, that it can't be theirs."""


@dataclass(frozen=True)
class FillOptions:
    """How a cache is filled.

    Attributes:
        shard: this process's part of the list.
        workers: processes that read volumes.
        timeout: seconds that one volume may take, None for any number.
        on_error: a volume that can't be read: "stop", or "skip" and list it.
        retry_failed: try what failed in an earlier run again; "stop" always does.
        force: start although the disk seems too small.
        show_progress: a bar in the terminal.
        should_stop: asked after each volume; True ends the work with a StoppedError.
    """

    shard: Shard = Shard()
    workers: int = 1
    timeout: float | None = 600
    on_error: str = "stop"
    retry_failed: bool = False
    force: bool = False
    show_progress: bool = True
    should_stop: Callable[[], bool] | None = None


# ---- size and time -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What filling will take. `here` are this shard's volumes, `pending` those of all; `seconds` None: not measured.

    `fetched`: how many of `pending` lie on the Hub or the web.
    """

    volumes: int
    pending: int
    here: int
    entry_bytes: int
    free_bytes: int
    workers: int
    seconds: float | None = None
    sample: int = 0
    fetched: int = 0

    @property
    def needed_bytes(self) -> int:
        return self.pending * self.entry_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes

    def __str__(self) -> str:
        size = (
            f"{self.volumes} volumes, {self.volumes - self.pending} done or failed, {self.pending} to make "
            f"({self.here} of them here). A record has {describe_bytes(self.entry_bytes)}: "
            f"{describe_bytes(self.needed_bytes)} more, {describe_bytes(self.volumes * self.entry_bytes)} in all; "
            f"{describe_bytes(self.free_bytes)} are free."
        )
        if self.fetched:
            size += f" {self.fetched} volumes are fetched, which is not counted: from the Hub to $TMPDIR."
        if self.seconds is None:
            return size
        return (
            f"{size} About {describe_seconds(self.seconds)} here with {self.workers} at once, "
            f"by {self.sample} volumes measured now."
        )


def entry_bytes(image_processor: SamfImageProcessor) -> int:
    """About as many as a record of slices has: the pixels, 24 bytes a slice for where it lies, and the header."""
    pixels = image_processor.num_channels * image_processor.size**2
    return image_processor.num_slices * (pixels + 24) + 600


def describe_bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def describe_seconds(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def free_bytes(folder: Path) -> int:
    """On the file system of a folder that may not be there yet. Quotas aren't seen."""
    folder = folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def spread_sample(volumes: Sequence[Volume], count: int) -> tuple[list[Volume], list[Volume]]:
    """`count` volumes from evenly over the list, and the others."""
    places = {int((i + 0.5) * len(volumes) / count) for i in range(count)} if volumes else set()
    return [volumes[i] for i in sorted(places)], [v for i, v in enumerate(volumes) if i not in places]


# ---- slices --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of a volume: "done", "found" (there already), "claimed" (by another process), "failed", or "stopped":
    the cache can't be written."""

    status: str
    bytes: int = 0
    seconds: float = 0.0
    error: str = ""
    message: str = ""


def is_volumes_fault(volume: Volume, error: BaseException) -> bool:
    """Whether a volume will fail for everybody: not for want of memory, of a library, or of its disk or network."""
    if isinstance(error, MemoryError | ImportError) or "pip install" in str(error):  # so readers ask for a library
        return False
    cause = error
    while (cause := cause.__cause__) is not None:
        # Without a number it is a reader's word for damaged contents (gzip's), or a server's answer.
        is_system = isinstance(cause, OSError) and (cause.errno is not None or is_address(volume.path))
        if is_system or isinstance(cause, MemoryError | ImportError):
            return False
    return True


@dataclass(frozen=True)
class Control:
    """A volume that is known to be readable, to be read beside others that timed out: is the disk there?"""

    volume: Volume


def make_or_read(job: Volume | Control, *, cache: SliceCache, manifest: Manifest) -> Outcome:
    """A worker's job: make a volume's record, or read a control's volume without writing anything."""
    if isinstance(job, Control):
        return measure_slices(job.volume, cache=cache)
    return make_slices(job, cache=cache, manifest=manifest)


def make_slices(volume: Volume, *, cache: SliceCache, manifest: Manifest) -> Outcome:
    """One volume's record, unless it is there, has failed, or is another process's just now."""
    record = manifest.record(volume.key)
    with manifest.claims.hold(volume.key) as is_ours:
        if not is_ours:
            return Outcome("claimed")
        try:
            if read_entry(record) is not None:
                return Outcome("found")
        except OSError as error:
            return Outcome("stopped", error=type(error).__name__, message=f"{record}: {error}")
        if failure := manifest.failure(volume.key):
            return Outcome("failed", error=failure["error"], message=failure["message"])
        start = time.perf_counter()
        try:
            cache.get(volume.path, rescale=volume.rescale, searched=volume.searched)
        except (CTReadError, MemoryError, ImportError) as error:
            failed = Outcome("failed", error=type(error).__name__, message=str(error))
            if is_volumes_fault(volume, error):
                manifest.note_failure(volume, failed.error, failed.message)
            return failed
        except OSError as error:  # of the cache: reading raises CTReadError
            return Outcome("stopped", error=type(error).__name__, message=f"{record}: {error}")
        if not record.is_file():  # the volume's file isn't the one any more that it was when the list was made
            return Outcome("failed", error="Changed", message=f"{volume.path}: changed meanwhile. Run again.")
        return Outcome("done", record.stat().st_size, time.perf_counter() - start)


def measure_slices(volume: Volume, *, cache: SliceCache) -> Outcome:
    """As long as making the record takes; nothing is written."""
    start = time.perf_counter()
    try:
        with not_kept(volume.path):
            cache.image_processor.extract(cache.read(volume.path, volume.rescale, volume.searched))
    except (CTReadError, MemoryError, ImportError) as error:
        return Outcome("failed", error=type(error).__name__, message=str(error))
    return Outcome("done", seconds=time.perf_counter() - start)


def estimate_slices(
    volumes: Sequence[Volume], cache: SliceCache, manifest: Manifest, options: FillOptions
) -> tuple[Estimate, list[Volume]]:
    """Size without time, and this shard's volumes that are to be made."""
    done, failed = manifest.keys()
    if options.retry_failed:
        failed = set()
    elif options.on_error == "stop":  # what fails is tried again; what is no CT stays none
        failed = manifest.passed_over(volumes, failed)
    skipped = done | failed
    pending = [volume for volume in volumes if volume.key is not None and volume.key not in skipped]
    here = [volume for volume in options.shard.of(volumes) if volume.key is not None and volume.key not in skipped]
    size, free = entry_bytes(cache.image_processor), free_bytes(manifest.folder)
    workers = max(1, min(options.workers, len(here)))
    fetched = sum(is_address(volume.path) for volume in pending)
    return Estimate(len(volumes), len(pending), len(here), size, free, workers, fetched=fetched), here


def dry_run(volumes: Sequence[Volume], cache: SliceCache, manifest: Manifest, options: FillOptions) -> Estimate:
    """What `fill_slices` would take. A few volumes are read for it; nothing is written."""
    estimate, here = estimate_slices(volumes, cache, manifest, options)
    sample, _ = spread_sample(here, _sample_size(here, estimate))
    with WorkerPool(partial(measure_slices, cache=cache), min(estimate.workers, len(sample)), options.timeout) as pool:
        return _with_time(estimate, here, [(volume, _outcome(result)) for volume, result in pool.map(sample)])


def fill_slices(
    volumes: Sequence[Volume],
    cache: SliceCache,
    manifest: Manifest,
    options: FillOptions,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Make this shard's records. Returns the manifest, which is also written when the work is cut short.

    Raises:
        PreprocessError: the disk is too small, the cache can't be written, or, by `on_error`, a volume can't be read.
    """
    estimate, here = estimate_slices(volumes, cache, manifest, options)
    _check_space(estimate, manifest.folder, options.force)
    _, failed = manifest.keys()
    for volume in here:
        if volume.key in failed:  # before, and is tried again
            manifest.forget_failure(volume.key)
    unseen = [volume for volume in options.shard.of(volumes) if volume.key is None]
    if unseen and options.on_error == "stop":
        raise UnreadableVolumeError(_stopped(unseen[0].problem))
    done, _ = manifest.keys()
    known = next((volume for volume in volumes if volume.key in done and not is_address(volume.path)), None)
    try:
        if here:
            _make_all(here, known, estimate, cache, manifest, options)
    except AllFailedError:  # the workers have ended: nobody notes anything more
        for volume in here:
            manifest.forget_failure(volume.key)
        raise
    finally:
        summary = manifest.write_manifest(volumes, about)
    if summary["passed_over"]:
        _tell_passed_over(summary, manifest, options)
    return summary


def _tell_passed_over(summary: Mapping[str, Any], manifest: Manifest, options: FillOptions) -> None:
    """Say what was found and is no CT. Raises PreprocessError where nothing else was found."""
    file, count = manifest.path("passed_over.jsonl"), summary["passed_over"]
    reason = json.loads(file.read_text(encoding="utf-8").partition("\n")[0])["message"]
    if not summary["volumes"]:
        raise PreprocessError(f"None of the {count} volumes found is a CT; the first: {reason} All of them: {file}")
    if options.show_progress:
        logger.warning(
            "%d volumes found are no CT and are passed over; the first: %s All of them: %s", count, reason, file
        )


def _make_all(
    here: Sequence[Volume],
    known: Volume | None,
    estimate: Estimate,
    cache: SliceCache,
    manifest: Manifest,
    options: FillOptions,
) -> None:
    sample, rest = spread_sample(here, _sample_size(here, estimate))
    work = partial(make_or_read, cache=cache, manifest=manifest)
    with (
        WorkLog(manifest, options.shard) as log,
        WorkerPool(work, estimate.workers, options.timeout) as pool,
        tqdm(total=len(here), desc="slices", unit="volume", disable=not options.show_progress) as progress,
    ):
        run = _Run(pool, manifest, log, options, progress, known)
        measured = run.make(sample)
        if options.show_progress:
            logger.info("%s", _with_time(estimate, here, measured))
        run.make(rest)
        run.make_what_others_left()
        run.settle_time_outs(max(1, estimate.workers - 1))


class _Run:
    """The work of one process: its pool, and what it writes down.

    `readable`: a volume that has been read, in this run or an earlier one.
    """

    def __init__(
        self,
        pool: WorkerPool,
        manifest: Manifest,
        log: WorkLog,
        options: FillOptions,
        progress: tqdm,
        readable: Volume | None = None,
    ):
        self.pool, self.manifest, self.log, self.options, self.progress = pool, manifest, log, options, progress
        self.readable = readable
        self.claimed: list[Volume] = []
        self.failed: list[Volume] = []
        self.timed_out: list[Volume] = []
        self.stalled = 0  # volumes in a row that timed out
        self.has_success = False

    def make(self, volumes: Sequence[Volume]) -> list[tuple[Volume, Outcome]]:
        outcomes = []
        for volume, result in self.pool.map(volumes):
            outcome = _outcome(result)
            outcomes.append((volume, outcome))
            if self.options.should_stop is not None and self.options.should_stop():
                raise StoppedError("another process has stopped")
            if _is_time_out(result) and self.options.on_error == "skip":
                self._put_off(volume, outcome)
                continue
            self.stalled = 0
            self._take(volume, result, outcome)
        return outcomes

    def settle_time_outs(self, at_once: int) -> None:
        """Read again what timed out, beside a volume that is known to be readable.

        A volume that hangs its reader looks like any volume on a disk that stalls, as file servers do when they start
        anew. It is noted as failed if it hangs a second time while the other one comes through. Otherwise it stays to be
        made by the next run.
        """
        waiting, self.timed_out = self.timed_out, []
        control = [] if self.readable is None else [Control(self.readable)]
        for start in range(0, len(waiting), at_once):
            results = list(self.pool.map([*waiting[start : start + at_once], *control]))
            is_disk_there = any(
                isinstance(job, Control) and _outcome(result).status == "done" for job, result in results
            )
            for volume, result in results:
                if isinstance(volume, Control):
                    continue
                if _is_time_out(result) and is_disk_there:
                    self.manifest.note_failure(volume, result.error, result.message)
                self._take(volume, result, _outcome(result))

    def _put_off(self, volume: Volume, outcome: Outcome) -> None:
        """Leave a volume that timed out to the end; after too many in a row, end the run: the disk stalls."""
        self.timed_out.append(volume)
        self.stalled += 1
        logger.warning("%s: %s; it is read again at the end", volume.path, outcome.message)
        if self.stalled == _ALL_FAIL:
            raise PreprocessError(
                f"{volume.path}: {outcome.message}, as did the {self.stalled - 1} volumes before it. Does the volumes' disk "
                "stall? None of them is noted as failed: run again when it is back, or with a longer --timeout."
            )

    def _take(self, volume: Volume, result: Outcome | WorkerDied, outcome: Outcome) -> None:
        if isinstance(result, WorkerDied) and result.error in _DEADLY:
            self.manifest.note_failure(volume, outcome.error, outcome.message)
        if outcome.status == "claimed":
            self.claimed.append(volume)
            return
        self.progress.update()
        if outcome.status in ("done", "found"):
            self.has_success = True
            self.readable = self.readable if is_address(volume.path) else volume
        if outcome.status == "done":
            self.log.append(volume, outcome.bytes, outcome.seconds)
        elif outcome.status == "stopped":
            raise PreprocessError(f"{outcome.message}. Is the disk full or faulty, or the folder write-protected?")
        elif outcome.status == "failed" and volume.is_passed_over(outcome.error):
            logger.info("passed over: %s", outcome.message)
        elif outcome.status == "failed":
            self._failed(volume, outcome)

    def make_what_others_left(self) -> None:
        """Wait for what other processes had claimed, and make what they gave up; not for ever."""
        patience = time.monotonic()
        while self.claimed:
            claimed, self.claimed = self.claimed, []
            self.make(claimed)
            if len(self.claimed) < len(claimed):
                patience = time.monotonic()
            elif time.monotonic() - patience > (self.options.timeout or 3600):
                logger.warning("%d volumes are still claimed by other processes; they are left", len(self.claimed))
                return
            if self.claimed:
                time.sleep(_OTHERS)

    def _failed(self, volume: Volume, outcome: Outcome) -> None:
        self.failed.append(volume)
        self.progress.set_postfix(failed=len(self.failed))
        message = outcome.message if volume.path in outcome.message else f"{volume.path}: {outcome.message}"
        if self.options.on_error == "stop":
            raise UnreadableVolumeError(_stopped(f"{message} ({outcome.error})"))
        logger.warning("skipped: %s (%s)", message, outcome.error)
        if len(self.failed) == _ALL_FAIL and not self.has_success and not self.options.retry_failed:
            raise AllFailedError(
                f"the first {_ALL_FAIL} volumes all failed: {message} ({outcome.error}). Check the data and the settings; "
                f"none of these is noted as failed. If they are known to be so, --retry_failed goes on."
            )


def _is_time_out(result: Outcome | WorkerDied) -> bool:
    return isinstance(result, WorkerDied) and result.error == _TIMEOUT


def unsettled(volumes: Sequence[Volume], manifest: Manifest, shard: Shard) -> list[Volume]:
    """This shard's volumes that have neither a record nor a noted failure."""
    done, failed = manifest.keys()
    return [volume for volume in shard.of(volumes) if volume.key is not None and volume.key not in done | failed]


def _stopped(message: str) -> str:
    return f"{message}\n--on_error skip lists such volumes in failures.jsonl and goes on."


def _outcome(result: Outcome | WorkerDied) -> Outcome:
    return Outcome("failed", error=result.error, message=result.message) if isinstance(result, WorkerDied) else result


def _sample_size(here: Sequence[Volume], estimate: Estimate) -> int:
    return min(len(here), max(_SAMPLE, estimate.workers))


def _with_time(estimate: Estimate, here: Sequence[Volume], measured: Iterable[tuple[Volume, Outcome]]) -> Estimate:
    """The time by the bytes of the volumes' files, as far as they are known: large ones take longer."""
    done = [(volume.bytes or 1, outcome.seconds) for volume, outcome in measured if outcome.status == "done"]
    if not done:
        return estimate
    seconds = sum(time for _, time in done) / sum(size for size, _ in done)
    total = seconds * sum(volume.bytes or 1 for volume in here) / estimate.workers
    return replace(estimate, seconds=total, sample=len(done))


def _check_space(estimate: Estimate, folder: Path, force: bool) -> None:
    if not estimate.fits and not force:
        raise PreprocessError(
            f"{folder}: the records don't fit. {estimate} Choose another disk, fewer or smaller slices, or --force."
        )


# ---- embeddings ----------------------------------------------------------------------------------------------------


def measure_embeddings(embeddings: EmbeddingCache) -> tuple[float, int]:
    """Seconds that one volume takes the encoder, and bytes of a record: by an empty stack of slices."""
    processor = embeddings.slices.image_processor
    count = processor.num_slices
    slices = {
        "slices": np.zeros((count, processor.num_channels, processor.size, processor.size), np.uint8),
        "slice_planes": np.zeros(count, np.int64),
        "slice_positions": np.zeros(count, np.float32),
        "slice_indices": np.zeros(count, np.int64),
        "slice_mm": np.zeros(count, np.float32),
    }
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        record = embeddings.encode(slices)
        seconds = time.perf_counter() - start
    return seconds, sum(array.nbytes for array in record.values()) + 400


def estimate_embeddings(
    volumes: Sequence[Volume], embeddings: EmbeddingCache, manifest: Manifest, shard: Shard
) -> tuple[Estimate, list[Volume]]:
    """Size and time, and this shard's volumes that are to be encoded; `volumes` by the embeddings' keys."""
    done, _ = manifest.keys()
    pending = [volume for volume in volumes if volume.key is not None and volume.key not in done]
    here = [volume for volume in shard.of(volumes) if volume.key is not None and volume.key not in done]
    seconds, size = measure_embeddings(embeddings)
    free = free_bytes(manifest.folder)
    return Estimate(len(volumes), len(pending), len(here), size, free, 1, seconds * len(here), 1), here


def fill_embeddings(
    volumes: Sequence[Volume],
    embeddings: EmbeddingCache,
    slices: Sequence[Volume],
    manifest: Manifest,
    options: FillOptions,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Encode this shard's volumes whose slices are there. Returns the manifest.

    Args:
        volumes, slices: the same list, by the keys of the embeddings and of the slices.
        embeddings: an `EmbeddingCache`; its model's device does the work.

    Raises:
        PreprocessError: the disk is too small.
    """
    estimate, here = estimate_embeddings(volumes, embeddings, manifest, options.shard)
    _check_space(estimate, manifest.folder, options.force)
    if options.show_progress:
        logger.info("%s", estimate)
    keys = {volume.path: volume.key for volume in slices}
    cut = manifest.keys()[0]
    here = [volume for volume in here if keys[volume.path] in cut]
    ahead = embeddings.slices_ahead([(volume.path, volume.rescale) for volume in here], min(options.workers, 8))
    try:
        with WorkLog(manifest, options.shard) as log:
            progress = tqdm(here, desc="embeddings", unit="volume", disable=not options.show_progress)
            for volume, (_, stack) in zip(progress, ahead, strict=True):
                _make_embeddings(volume, stack, embeddings, manifest, log)
    finally:
        failed = manifest.keys()[1]
        passed_over = manifest.passed_over(slices, failed)
        listed = [
            replace(volume, key=None, problem="its slices can't be made: see failures.jsonl")
            if keys[volume.path] in failed
            else volume
            for volume in volumes
            if keys[volume.path] not in passed_over
        ]
        summary = manifest.write_manifest(listed, about)
    return summary


def _make_embeddings(
    volume: Volume, stack: Mapping[str, np.ndarray], embeddings: EmbeddingCache, manifest: Manifest, log: WorkLog
) -> None:
    record = manifest.record(volume.key)
    with manifest.claims.hold(volume.key) as is_ours:
        if not is_ours or read_entry(record) is not None:
            return
        start = time.perf_counter()
        write_entry(record, embeddings.encode(stack))
        log.append(volume, record.stat().st_size, time.perf_counter() - start)


# ---- verifying -----------------------------------------------------------------------------------------------------


def check_volume(volume: Volume, *, manifest: Manifest) -> tuple[str, str]:
    """Of a volume's record: "whole", "missing", "damaged" or "unreadable", and why."""
    try:
        damage = check_entry(manifest.record(volume.key))
    except FileNotFoundError:
        return "missing", ""
    except OSError as error:
        return "unreadable", str(error)
    return ("whole", "") if damage is None else ("damaged", damage)


def verify(volumes: Sequence[Volume], manifest: Manifest, options: FillOptions, remove: bool) -> dict[str, Any]:
    """Read this shard's records again, and compare them with their checksums.

    Returns:
        `whole`, `missing`: how many; `damaged`, `unreadable`: {record's path: what is wrong}. With `remove` the damaged
        ones are deleted: the next run makes them anew. Of the unreadable ones nothing is known: their disk may be at fault.
    """
    passed_over = manifest.passed_over(volumes, manifest.keys()[1])
    listed = [volume for volume in options.shard.of(volumes) if volume.key not in {None, *passed_over}]
    report: dict[str, Any] = {"whole": 0, "missing": 0, "damaged": {}, "unreadable": {}}
    with WorkerPool(partial(check_volume, manifest=manifest), max(1, min(options.workers, len(listed)))) as pool:
        results = pool.map(listed)
        for volume, found in tqdm(results, total=len(listed), desc="verifying", disable=not options.show_progress):
            state, reason = ("unreadable", found.message) if isinstance(found, WorkerDied) else found
            if state in ("whole", "missing"):
                report[state] += 1
                continue
            record = manifest.record(volume.key)
            report[state][str(record)] = reason
            if state == "damaged" and remove:
                record.unlink(missing_ok=True)
    return report
