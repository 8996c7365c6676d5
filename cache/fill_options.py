"""Options and errors of filling a cache."""

from collections.abc import Callable
from dataclasses import dataclass

from samf.cache.cluster_settings import ClusterSettings
from samf.cache.volume_list import Shard
from samf.data.options import check_on_error
from samf.data.schema import OnError
from samf.model.ct_volume import CTReadError


class PreprocessError(RuntimeError):
    """The cache can't be filled; the message says what to do."""


class UnreadableVolumeError(PreprocessError, CTReadError):
    """A volume can't be read, and `on_error` is "raise"."""


class StoppedError(PreprocessError):
    """Another process of the run has stopped."""


class AllFailedError(PreprocessError):
    """So many volumes failed, without any success, that the cause can't be the volumes."""


@dataclass(frozen=True)
class FillOptions:
    """How a cache is filled.

    Attributes:
        shard: this process's part of the list.
        workers: number of processes that read volumes.
        timeout: seconds that one volume may take; None = no limit.
        on_error: for a volume that can't be read: "raise", or "skip" and list it.
        retry_failed: retry volumes that failed in an earlier run; "raise" always does.
        force: start although the disk seems too small.
        show_progress: show a progress bar.
        cluster: read the volumes on the machines of this cluster; None = in `workers` processes of this one.
        should_stop: called after each volume; True ends the work with a StoppedError.
    """

    shard: Shard = Shard()
    workers: int = 1
    timeout: float | None = 600
    on_error: OnError = "raise"
    retry_failed: bool = False
    force: bool = False
    show_progress: bool = True
    cluster: ClusterSettings | None = None
    should_stop: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "on_error", check_on_error(self.on_error))
