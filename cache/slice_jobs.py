"""Jobs of the worker processes that fill a slice cache: one volume each."""

import platform
import time
from dataclasses import dataclass
from typing import Literal

from samf.cache.entries import read_entry
from samf.cache.manifest import Manifest
from samf.cache.slice_cache import SliceCache
from samf.cache.volume_list import Volume
from samf.cache.worker_pool import WorkerDied
from samf.model.ct_common import DownloadError
from samf.model.ct_download import is_address
from samf.model.ct_volume import CTReadError


@dataclass(frozen=True)
class Job:
    """Work on one volume.

    Attributes:
        volume: the volume whose entry is to be made.
        is_control: read the volume only. It is known to be readable, and is read together with volumes that timed out to test
            whether the disk responds.
    """

    volume: Volume
    is_control: bool = False


@dataclass(frozen=True)
class Outcome:
    """Result of a job for one volume.

    Attributes:
        status: "done", "found" (the entry exists), "locked" (by another process), "failed", or "aborted" (the cache can't be
            read or written).
        bytes: size of the entry.
        seconds: how long it took.
        error: name of the exception or signal.
        message: why it failed.
        host: the machine that made the entry.
    """

    status: Literal["done", "found", "locked", "failed", "aborted"]
    bytes: int = 0
    seconds: float = 0.0
    error: str = ""
    message: str = ""
    host: str = ""

    @classmethod
    def of(cls, result: "Outcome | WorkerDied") -> "Outcome":
        """Return a worker's result, or the failure of a worker that died."""
        if isinstance(result, WorkerDied):
            return cls("failed", error=result.error, message=result.message)
        return result


def run_job(job: Job, *, cache: SliceCache, manifest: Manifest) -> Outcome:
    """Make a volume's entry, or read a control without writing anything.

    Args:
        job: the volume.
        cache: the slice cache.
        manifest: its manifest.
    """
    if job.is_control:
        return measure_extraction(job.volume, cache=cache)
    with manifest.locks.hold(job.volume.name) as is_held:
        if not is_held:
            return Outcome("locked")
        return _find(job.volume, manifest) or _make(job.volume, cache, manifest)


def measure_extraction(volume: Volume, *, cache: SliceCache) -> Outcome:
    """Extract a volume's slices without writing anything; return how long it took."""
    start = time.perf_counter()
    try:
        cache.extract(volume.ref, searched=volume.searched)
    except (CTReadError, MemoryError, ImportError) as error:
        return Outcome("failed", error=type(error).__name__, message=str(error))
    return Outcome("done", seconds=time.perf_counter() - start)


def _find(volume: Volume, manifest: Manifest) -> Outcome | None:
    """Return the outcome if the entry exists, failed before, or can't be read; None if it is to be made."""
    entry = manifest.entry(volume.name)
    try:
        if read_entry(entry) is not None:
            return Outcome("found")
    except OSError as error:
        return Outcome("aborted", error=type(error).__name__, message=f"{entry}: {error}")
    if failure := manifest.failure(volume.name):
        return Outcome("failed", error=failure["error"], message=failure["message"])
    return None


def _make(volume: Volume, cache: SliceCache, manifest: Manifest) -> Outcome:
    entry = manifest.entry(volume.name)
    start = time.perf_counter()
    try:
        cache.get(volume.ref, searched=volume.searched)
    except (CTReadError, MemoryError, ImportError) as error:
        failed = Outcome("failed", error=type(error).__name__, message=str(error))
        if _is_permanent(volume, error):
            manifest.note_failure(volume, failed.error, failed.message)
        return failed
    except OSError as error:  # of the cache: reading volumes raises CTReadError
        return Outcome("aborted", error=type(error).__name__, message=f"{entry}: {error}")
    if not entry.is_file():  # the file was changed after the list was made, and its entry has another name
        return Outcome("failed", error="Changed", message=f"{volume.label}: changed meanwhile. Run again.")
    seconds = time.perf_counter() - start
    return Outcome("done", entry.stat().st_size, seconds, host=platform.node().partition(".")[0])


def _is_permanent(volume: Volume, error: BaseException) -> bool:
    """Return whether the volume itself is at fault: not lack of memory or of a library, nor its disk or network."""
    if isinstance(error, MemoryError | ImportError) or "pip install" in str(error):  # how readers ask for a library
        return False
    if isinstance(error, DownloadError):
        return not error.is_temporary
    cause = error.__cause__
    while cause is not None:
        # Without an error number it is a reader's error for damaged contents (gzip's), or a server's answer.
        is_system = isinstance(cause, OSError) and (cause.errno is not None or is_address(volume.path))
        if is_system or isinstance(cause, MemoryError | ImportError):
            return False
        cause = cause.__cause__
    return True
