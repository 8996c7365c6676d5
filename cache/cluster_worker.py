"""What runs in dask's workers: a worker pool each, and the tasks that hand jobs to it.

Imported by dask's workers and by `samf.cache.cluster`, where dask is installed. It imports nothing heavy: volumes are read in
the pool's processes (`samf.cache.pool_process`). A worker takes up more tasks than its pool has processes, so that the pool has
the next job while a task's result travels to the scheduler. The tasks are coroutines: they only wait.
"""

import asyncio
import logging
import os
import threading
from dataclasses import dataclass
from typing import Any

import dask
from distributed import WorkerPlugin, get_worker

from samf.cache.pool_process import PoolEndedError, PoolProcess, PoolRefusedError

logger = logging.getLogger(__name__)

# Set by dask's nannies. A fixed threshold keeps malloc from raising it and the one for mmap (mallopt(3)): each array of a
# volume is then mapped anew, page fault by page fault, which takes half as long again as reading it.
_MALLOC = "MALLOC_TRIM_THRESHOLD_"


@dataclass(frozen=True)
class Undone:
    """Result of a task whose jobs were not run.

    Attributes:
        worker: address of dask's worker.
        reason: why it can't do such jobs; empty if its pool ended, as it does with its machine.
    """

    worker: str
    reason: str


class PoolPlugin(WorkerPlugin):
    """Gives a dask worker a pool with as many processes as the worker has threads, also if it joins later.

    Args:
        name: of the plugin.
        work: what the pool does; see `PoolProcess`.
        versions: see `PoolProcess`.
    """

    def __init__(self, name: str, work: bytes, versions: dict[str, str]):
        self.name, self.work, self.versions = name, work, versions
        self.refusal = ""
        self.size = 0
        self._pool: PoolProcess | None = None
        self._lock: Any = None

    async def setup(self, worker: Any) -> None:
        """Start the pool; a worker that can't do the work keeps the reason in `refusal`."""
        others = [plugin for plugin in worker.plugins.values() if isinstance(plugin, PoolPlugin) and plugin is not self]
        self._lock, self.size = threading.Lock(), worker.state.nthreads - sum(plugin.size for plugin in others)
        # Only this worker knows: the scheduler still sends a worker of N threads 1.1 N tasks, rounded up.
        worker.state.nthreads += self.size
        try:
            await asyncio.to_thread(self._open_pool)
        except PoolRefusedError as error:
            self.refusal = str(error)
            logger.error("no work for this worker: %s", error)

    async def teardown(self, worker: Any) -> None:
        """End the pool, whatever it is doing."""
        worker.state.nthreads -= self.size
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        with self._lock:
            self.refusal = self.refusal or "the run has ended"
            if self._pool is not None:
                self._pool.close()

    async def pool(self) -> PoolProcess:
        """Return the pool; start it if it has ended, as it does after some time without jobs.

        Raises:
            PoolRefusedError: this worker can't do the work.
        """
        pool = self._pool
        return await asyncio.to_thread(self._open_pool) if pool is None or pool.is_closed else pool

    def _open_pool(self) -> PoolProcess:
        with self._lock:
            if self.refusal:
                raise PoolRefusedError(self.refusal)
            if self._pool is None or self._pool.is_closed:
                self._pool = PoolProcess(self.work, self.versions, self.size, _environment())
            return self._pool


def _environment() -> dict[str, str]:
    """Return this process's environment without what dask has set against large arrays; what a user has set stays."""
    by_dask = dask.config.get("distributed.nanny.pre-spawn-environ", {})
    environment = dict(os.environ)
    if environment.get(_MALLOC) == str(by_dask.get(_MALLOC)):
        del environment[_MALLOC]
    return environment


async def run_jobs(plugin: str, jobs: list[bytes]) -> list[bytes] | Undone:
    """Run pickled jobs at the same time in this worker's pool; return their pickled results. A task of dask's.

    Args:
        plugin: name of the plugin that has the pool.
        jobs: the jobs.
    """
    worker = get_worker()
    try:
        pool = await worker.plugins[plugin].pool()
        return await asyncio.gather(*[asyncio.wrap_future(pool.submit(job)) for job in jobs])
    except PoolRefusedError as error:
        return Undone(worker.address, str(error))
    except (KeyError, PoolEndedError):
        return Undone(worker.address, "")


def refusal(plugin: str, dask_worker: Any) -> str:
    """Return why a worker can't do the work, or nothing; to be called by `Client.run`, which fills in the worker.

    Args:
        plugin: name of the plugin that has the pool.
        dask_worker: the worker.
    """
    found = dask_worker.plugins.get(plugin)
    return "" if found is None else found.refusal
