"""Filling a cache on several machines by dask: one queue, workers that come and go, a dashboard.

Dask spreads the volumes over its workers, one task each or, if they are small, one for several of them. In each dask worker a
`WorkerPool` reads them (`samf.cache.cluster_worker`): dask itself knows no time limits, and takes a file that crashes a reader
for one of several that the worker had (`findings/dask_blames_tasks_that_it_never_started.sh`). What becomes of a volume is
recorded by the process that started the run, as without a cluster.
"""

import importlib
import logging
import pickle
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import ModuleType
from typing import Any, Generic, TypeVar

from samf.cache.cluster_check import MachineCheck
from samf.cache.cluster_settings import STARTED_HERE, ClusterSettings
from samf.cache.fill_options import PreprocessError
from samf.cache.pool_process import versions
from samf.cache.slice_cache import SliceCache
from samf.cache.volume_list import Volume
from samf.cache.worker_pool import WorkerDied

logger = logging.getLogger(__name__)

_QUIET = 60.0  # seconds without a result after which it is said if there are no workers
_POLL = 0.1
# At most so many volumes in one task, if they are no larger together: about half a second's reading. By their bytes, because
# measuring it first would keep the other volumes waiting for one that hangs.
_BATCH, _BATCH_BYTES = 32, 16_000_000
_SHARES = 2  # tasks of each process into which what is left would be divided: tasks get smaller towards the end
_TRIES = 3  # times that jobs are given out whose worker or pool died
_GONE = "The cluster's scheduler is gone, or has dropped the work. Start it if it is, and run the same command again."

Job = TypeVar("Job")
Result = TypeVar("Result")


class ClusterPool(Generic[Job, Result]):
    """Does what a WorkerPool does, on the workers of a cluster.

    Args:
        settings: the cluster.
        work: a function of one job; picklable, and so are jobs and results.
        timeout: seconds that a job may take; None = no limit.
        cache: the cache that is filled.
        volumes: the list, by which each machine checks that it sees the same files.

    Raises:
        PreprocessError: the cluster can't be reached, or some of its workers can't do the work.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        work: Callable[[Job], Result],
        timeout: float | None,
        cache: SliceCache,
        volumes: Sequence[Volume],
    ):
        self._distributed = _import_dask("distributed")
        for name in ("distributed", *logging.root.manager.loggerDict):
            if name.partition(".")[0] == "distributed":  # each has a level of its own
                logging.getLogger(name).setLevel(logging.WARNING)
        self._name = f"samf-{uuid.uuid4().hex[:12]}"
        self._batch = _batch_size(volumes)
        self._submitted = 0
        self._running: dict[Any, tuple[Sequence[Job], int]] = {}  # future → jobs, and how often they were given out
        with ExitStack() as stack:
            self._client = _connect(self._distributed, settings, stack)
            check = stack.enter_context(MachineCheck.of(cache, volumes))
            self._start_pools(pickle.dumps((check, work, timeout)))
            stack.callback(self._stop_pools)
            self._stack = stack.pop_all()

    def __enter__(self) -> "ClusterPool[Job, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Return the number of processes that read volumes now."""
        return max(1, sum(self._client.nthreads().values()))

    def map(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Result | WorkerDied]]:
        """Yield (job, its result or WorkerDied), in the order of completion."""
        for outcomes in self._run(list(_split(list(jobs), self._batch, self.size))):
            yield from outcomes

    def map_beside(
        self, jobs: Sequence[Job], control: Sequence[Job]
    ) -> Iterator[list[tuple[Job, Result | WorkerDied]]]:
        """Yield each job's outcome together with that of `control`, which the same machine has run with it or after it.

        Args:
            jobs: the jobs.
            control: at most one job.
        """
        yield from self._run([[job, *control] for job in jobs])

    def close(self) -> None:
        """Drop what is left to do, end the pools, and the cluster if it was started here."""
        self._stack.close()

    def _start_pools(self, work: bytes) -> None:
        module = _worker_module()
        if not self._client.nthreads():
            logger.info("waiting for the first worker")
            self._client.wait_for_workers(1)
        probe = _make_probe()
        _refuse({"the scheduler": self._client.run_on_scheduler(probe)})
        _refuse(self._client.run(probe, on_error="return"))
        self._client.register_plugin(module.PoolPlugin(self._name, work, versions()), name=self._name)
        try:
            _refuse(self._client.run(module.refusal, self._name, on_error="return"))
        except BaseException:
            self._stop_pools()
            raise

    def _stop_pools(self) -> None:
        try:
            self._client.cancel(list(self._running))
            self._client.unregister_worker_plugin(self._name)
        except (OSError, ValueError, RuntimeError) as error:  # the scheduler is gone
            logger.debug("the pools couldn't be ended: %s", error)

    def _run(self, groups: Sequence[Sequence[Job]]) -> Iterator[list[tuple[Job, Result | WorkerDied]]]:
        """Yield the outcomes of groups of jobs, each of which is one task."""
        running = self._running = {
            future: (group, 1) for future, group in zip(self._submit(groups), groups, strict=True)
        }
        completed = self._distributed.as_completed(list(running), with_results=True, raise_errors=False)
        for future, result in self._wait(completed):
            group, tries = running.pop(future)
            if not (died := self._find_death(future, result)):
                yield list(zip(group, map(pickle.loads, result), strict=True))
            elif tries == _TRIES:
                yield [(job, died) for job in group]
            else:
                (again,) = self._submit([group])
                running[again] = group, tries + 1
                completed.add(again)

    def _submit(self, groups: Sequence[Sequence[Job]]) -> list[Any]:
        """Return a future for each group."""
        jobs = [[pickle.dumps(job) for job in group] for group in groups]
        # The first part of a key names the tasks on the dashboard.
        keys = [(f"slices-{self._name}", number) for number in range(self._submitted, self._submitted + len(groups))]
        self._submitted += len(groups)
        return self._client.map(partial(_worker_module().run_jobs, self._name), jobs, key=keys, pure=False)

    def _wait(self, completed: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the futures and their results as they come; tell the user when there are no workers left."""
        last = time.monotonic()
        while not completed.is_empty():
            if batch := completed.next_batch(block=False):
                yield from batch
                last = time.monotonic()
                continue
            if self._client.status not in ("running", "connecting"):
                raise PreprocessError(_GONE)
            if time.monotonic() - last > _QUIET:
                last = time.monotonic()
                if not self._client.nthreads():
                    logger.warning("the cluster has no workers; waiting for one")
            time.sleep(_POLL)

    def _find_death(self, future: Any, result: Any) -> WorkerDied | None:
        """Return what kept a task from being run, or None if it was.

        Raises:
            PreprocessError: it would be the same for every task.
        """
        if isinstance(result, _worker_module().Undone):
            if result.reason:
                self._dismiss(result.worker, result.reason)
            return WorkerDied("WorkerLost", f"{result.worker}: its worker pool ended")
        if future.status == "finished":
            return None
        error = result[1] if isinstance(result, tuple) else result
        if isinstance(error, self._distributed.KilledWorker):
            return WorkerDied("WorkerLost", "several workers of the cluster ended while they had it")
        if future.status in ("cancelled", "lost"):
            raise PreprocessError(_GONE)
        raise PreprocessError(f"The cluster can't run the work: {type(error).__name__}: {error}")

    def _dismiss(self, worker: str, reason: str) -> None:
        """Let a worker leave that joined on the way and can't do the work."""
        if worker in self._client.nthreads():
            logger.warning("worker %s is dismissed: %s", worker, reason)
            self._client.retire_workers([worker], close_workers=True)


def _split(jobs: Sequence[Job], most: int, processes: int) -> Iterator[Sequence[Job]]:
    """Yield groups of jobs, one per task: large ones first, so that no process waits long for another's last one.

    Args:
        jobs: the jobs.
        most: jobs of a group at most.
        processes: that run the jobs.
    """
    start = 0
    while start < len(jobs):
        size = max(1, min(most, (len(jobs) - start) // (_SHARES * processes)))
        yield jobs[start : start + size]
        start += size


def _batch_size(volumes: Sequence[Volume]) -> int:
    """Return how many volumes share a task: dask takes milliseconds for each task, which small volumes take, too."""
    mean = sum(volume.bytes for volume in volumes) / max(1, len(volumes))
    return max(1, min(_BATCH, int(_BATCH_BYTES / mean))) if mean else 1


def _worker_module() -> ModuleType:
    """Return the module of dask's workers, which can be imported where dask is installed."""
    return _import_dask("samf.cache.cluster_worker")


def _import_dask(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).replace("_", "-")
        raise PreprocessError(f"--cluster needs {package}: pip install 'samf[cluster]'") from error


def _connect(distributed: ModuleType, settings: ClusterSettings, stack: ExitStack) -> Any:
    """Return a client of the cluster; `stack` ends what is started here."""
    try:
        if settings.target in STARTED_HERE:
            cluster = stack.enter_context(_start(distributed, settings))
            client = distributed.Client(cluster)
        elif settings.target.endswith(".json"):
            client = distributed.Client(scheduler_file=settings.target, **settings.options)
        else:
            client = distributed.Client(settings.target, **settings.options)
    except (OSError, ValueError, TypeError) as error:
        hint = "" if settings.target in STARTED_HERE else ". Start `dask scheduler` there, or correct the address."
        raise PreprocessError(f"--cluster {settings.target}: {error}{hint}") from error
    stack.enter_context(client)
    logger.info("cluster %s, dashboard %s", client.scheduler.address, client.dashboard_link)
    return client


def _start(distributed: ModuleType, settings: ClusterSettings) -> Any:
    """Return a cluster that is started here."""
    options = dict(settings.options)
    adapt = options.pop("adapt", None)
    if adapt and not (adapt.get("minimum") or adapt.get("minimum_jobs")):
        raise ValueError("adapt needs a minimum of at least 1: the first worker is checked before there is work")
    if settings.target == "local":
        # One worker for the machine: each process of its pool is isolated as it is.
        options = {"n_workers": 1, "threads_per_worker": settings.workers} | options
        cluster = distributed.LocalCluster(**options)
    else:
        if not (options.get("n_workers") or adapt):
            raise ValueError("--cluster_options needs n_workers, or adapt with minimum and maximum")
        cluster = _import_dask("dask_jobqueue").SLURMCluster(**options)
    if adapt:
        cluster.adapt(**adapt)
    return cluster


def _make_probe() -> Callable[[], str]:
    """Return a function that says why a process can't import what it needs, or nothing.

    A function within a function goes to the other process by value, which needs no samf there.
    """

    def probe() -> str:
        try:
            importlib.import_module("samf.cache.cluster_worker")
        except ImportError as error:
            return f"samf can't be imported there ({error}); install the same samf"
        return ""

    return probe


def _refuse(answers: Mapping[str, Any]) -> None:
    """Raise PreprocessError if machines can't do the work.

    Args:
        answers: address → why not, or nothing.
    """
    refusals = {address: answer for address, answer in answers.items() if answer}
    if refusals:
        address, reason = next(iter(refusals.items()))
        raise PreprocessError(
            f"{len(refusals)} of {len(answers)} workers of the cluster can't do this work; {address}: {reason}."
        )
