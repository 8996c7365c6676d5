"""Benchmark of filling a cache by a dask cluster, next to the pool of one machine: speed, memory, and what a kill costs.

Scheduler and workers are processes of their own on this machine, one reading process each. Among the phantoms are files that
crash their reader, hang it, or hold something else than their name says.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from samf.benchmarks.measuring import Measurement
from samf.benchmarks.workloads import LineSkipped, Settings
from samf.cache.cluster_settings import ClusterSettings
from samf.cache.fill import fill_slices
from samf.cache.fill_options import FillOptions
from samf.cache.manifest import Manifest, ManifestSummary
from samf.cache.slice_cache import SliceCache
from samf.cache.volume_list import inspect_volumes
from samf.data.schema import VolumeLike
from samf.data.volume_discovery import search_volumes
from samf.model.ct_volume import CTVolume, VolumeRef
from samf.model.image_processing_samf import EXTRACT_VERSION, SamfImageProcessor
from samf.phantoms.dataset import make_phantom, write_nifti

_VOLUMES = {"full": 1000, "medium": 200, "tiny": 24}
_BAD = {"full": 10, "medium": 4, "tiny": 1}  # of each kind
_VOXEL_MM = {"full": 4.0, "medium": 4.0, "tiny": 14.0}
_WORKERS = {"full": (1, 2, 4), "medium": (1, 2, 4), "tiny": (1, 2)}
_TIMEOUT = {"full": 5.0, "medium": 5.0, "tiny": 2.0}
_HANG = 600  # seconds
_ERRORS = {"crash": "SIGSEGV", "hang": "Timeout", "lie": "CTReadError"}
_LIES = (b"\x89PNG\r\n\x1a\n" + bytes(4000), b"no gzip" * 500)
_POLL = 0.25  # seconds between two looks at the cluster
_TOGETHER = 0.001  # seconds between results that came as one
_SMALL = SamfImageProcessor(slices_per_plane=4, size=64)


class TroubledCache(SliceCache):
    """A cache whose reader crashes or hangs by a volume's name, as libraries do by a damaged file's content."""

    def read(self, volume: VolumeLike, *, searched: bool = False) -> CTVolume:
        """Read a volume, if its name lets it."""
        kind = Path(VolumeRef.of(volume).path).name.partition("_")[0]
        if kind == "crash":
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "hang":
            time.sleep(_HANG)
        return super().read(volume, searched=searched)


@dataclass
class Run:
    """What became of one run.

    Attributes:
        summary: content of manifest.json.
        failures: number of failures by kind of file and error.
        entries: digest of each entry's bytes.
        rate: volumes per second between the first volumes and the last one.
        busy: share of that time in which a process was reading a volume, on average; of runs without failures.
        peaks: highest numbers seen of the cluster.
    """

    summary: ManifestSummary
    failures: Counter[tuple[str, str]]
    entries: dict[str, str]
    rate: float
    busy: float
    peaks: dict[str, float] = field(default_factory=dict)


class LocalMachines:
    """A dask scheduler and workers, a process each.

    Args:
        folder: for logs and the scheduler's file.
        nanny: start each worker under a nanny, as `dask worker` does by default.
    """

    def __init__(self, folder: Path, nanny: bool = False):
        folder.mkdir(parents=True)
        self.folder, self.file, self.nanny = folder, folder / "scheduler.json", nanny
        self.workers: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start(
            "dask_scheduler", "--port=0", "--dashboard-address=:0", f"--scheduler-file={self.file}"
        )

    def __enter__(self) -> "LocalMachines":
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.workers, self.scheduler):
            process.terminate()
        for process in (*self.workers, self.scheduler):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()

    def add(self, count: int = 1) -> None:
        """Start workers of one thread each; without a nanny, nobody starts them again when they die."""
        nanny = "--nanny" if self.nanny else "--no-nanny"
        for _ in range(count):
            options = ("--nthreads=1", nanny, "--no-dashboard", f"--local-directory={self.folder}")
            name = f"--name={len(self.workers)}"
            self.workers.append(self._start("dask_worker", f"--scheduler-file={self.file}", name, *options))

    def wait(self) -> None:
        """Wait until the scheduler knows the workers."""
        import distributed

        with distributed.Client(scheduler_file=str(self.file)) as client:
            client.wait_for_workers(len(self.workers), timeout=120)

    def _start(self, module: str, *options: str) -> "subprocess.Popen[bytes]":
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{module}", *options],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )


def write_phantoms(settings: Settings) -> list[Measurement]:
    """Write phantoms, each with noise of its own, and the bad files."""
    count, bad = _VOLUMES[settings.size], _BAD[settings.size]
    phantom = make_phantom(np.random.default_rng(0), voxel_mm=_VOXEL_MM[settings.size])
    good, troubled = settings.folder / "good", settings.folder / "all"
    good.mkdir()
    troubled.mkdir()
    kinds = [kind for kind in _ERRORS for _ in range(bad)]
    places = set(np.random.default_rng(1).choice(np.arange(count // 10, count), len(kinds), replace=False).tolist())
    for number in range(count):
        kind = kinds.pop() if number in places else "scan"
        name = f"{kind}_{number:04}.nii.gz"
        if kind == "lie":
            (troubled / name).write_bytes(_LIES[number % len(_LIES)])
            continue
        noise = np.random.default_rng(number).integers(-20, 20, phantom.hu.shape, dtype=np.int16)
        write_nifti(replace(phantom, hu=phantom.hu + noise), troubled / name)
        if kind == "scan":
            os.link(troubled / name, good / name)
    return [Measurement("files", "", [count], note=f"{bad} each that crash, hang, or hold something else")]


def compare(settings: Settings) -> list[Measurement]:
    """Fill by the pool and by clusters of several sizes, then by one with a worker that is killed and one that joins."""
    if find_spec("distributed") is None:
        raise LineSkipped("needs distributed: pip install 'samf[cluster]'")
    # Both kinds, in the list's order: the same bytes of the same volumes.
    pools = {count: fill(settings, "good", FillOptions(workers=count), _SMALL) for count in (1, 2)}
    clusters = {count: _fill_by_cluster(settings, "good", count) for count in _WORKERS[settings.size]}
    reference = fill(settings, "all", _skip(settings, workers=2), _SMALL)
    killed = _fill_by_cluster(settings, "all", 2, _kill_and_add)
    cores = len(os.sched_getaffinity(0))
    rows = [describe_rate(f"pool, {count} processes", run) for count, run in pools.items()]
    for count, run in clusters.items():
        ideal = min(count, cores) * clusters[1].rate
        rows += [
            describe_rate(f"cluster, {count} workers", run, _describe(run.peaks)),
            Measurement(f"cluster, {count} workers / ideal", "x", [run.rate / ideal], settings.limit(0.9)),
        ]
        if count in pools:
            rows.append(Measurement(f"cluster / pool, {count} workers", "x", [run.rate / pools[count].rate]))
    rows.append(count_different(settings, "entries that differ from the pool's", pools[2], *clusters.values()))
    return [*rows, *_judge(settings, reference, killed)]


def _judge(settings: Settings, reference: Run, killed: Run) -> list[Measurement]:
    """Return what was lost and who was blamed, by the pool and by the cluster whose worker was killed."""
    expected = dict.fromkeys(_ERRORS.items(), _BAD[settings.size])
    rows = []
    for name, run in (("pool", reference), ("cluster, one killed, one added", killed)):
        wrong = sum((Counter(expected) - run.failures).values()) + sum((run.failures - Counter(expected)).values())
        innocent = sum(count for (kind, _), count in run.failures.items() if kind == "scan")
        rows += [
            Measurement(f"{name}: lost", "", [run.summary["pending"]], at_most=settings.limit(0)),
            Measurement(f"{name}: innocents noted as failed", "", [innocent], at_most=settings.limit(0)),
            Measurement(f"{name}: bad files noted otherwise than expected", "", [wrong], at_most=settings.limit(0)),
        ]
    added = [
        Measurement(
            "seconds that the killed worker's pool lived on", "s", [killed.peaks["orphans"]], at_most=settings.limit(2)
        ),
        Measurement("most volumes that the added worker had at once", "", [killed.peaks["added"]], settings.limit(1)),
    ]
    different = count_different(settings, "entries that differ from the pool's, with a kill", reference, killed)
    return [*rows, *added, different]


def describe_rate(name: str, run: Run, note: str = "") -> Measurement:
    """Return a run's volumes per second, and how busy its reading processes were.

    Args:
        name: of the run.
        run: the run.
        note: what else is to be said of it.
    """
    busy = f"reading {run.busy:.1%} of the time"
    return Measurement(name, "volumes/s", [run.rate], note=f"{busy}, {note}" if note else busy)


def count_different(settings: Settings, name: str, first: Run, *others: Run) -> Measurement:
    """Return how many entries some runs have made otherwise than a first one.

    Args:
        settings: of the stage.
        name: of the measurement.
        first: the run to compare with.
        *others: the other runs.
    """
    differ = sum(len(set(first.entries.items()) ^ set(other.entries.items())) for other in others)
    return Measurement(name, "", [differ], at_most=settings.limit(0), note=f"{len(first.entries)} entries, all bytes")


def _describe(peaks: Mapping[str, float]) -> str:
    names = ("tasks", "workers", "scheduler MB", "a dask worker MB", "its pool MB", "dask's ms a volume")
    return ", ".join(f"{name} {peaks[name]:.1f}".removesuffix(".0") for name in names if name in peaks)


def _skip(settings: Settings, workers: int = 1) -> FillOptions:
    return FillOptions(workers=workers, on_error="skip", timeout=_TIMEOUT[settings.size])


def fill(settings: Settings, folder: str, options: FillOptions, image_processor: SamfImageProcessor) -> Run:
    """Fill a new cache, and remove it.

    Args:
        settings: of the stage.
        folder: of the volumes, below the stage's.
        options: how it is filled; `workers` is the number of reading processes, also those of a cluster.
        image_processor: extracts the slices.
    """
    cache = TroubledCache(settings.folder / "cache", image_processor)
    found = search_volumes([str(settings.folder / folder)])
    volumes = inspect_volumes(found.volumes, cache, found.searched)
    manifest, times = Manifest(cache.folder, "slices"), []
    options = replace(options, should_stop=lambda: times.append(time.perf_counter()))  # type: ignore[arg-type, func-returns-value]
    origin = {"settings_hash": cache.image_processor.settings_hash(), "extract_version": EXTRACT_VERSION}
    summary = fill_slices(volumes, cache, manifest, options, origin)  # type: ignore[arg-type]
    rows = _read_lines(manifest.path("failures.jsonl"))
    failures = Counter((Path(row["volume"]).name.partition("_")[0], row["error"]) for row in rows)
    files = sorted(cache.folder.glob("??/*.safetensors"))
    entries = {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    made = [row for file in (cache.folder / "log").iterdir() for row in _read_lines(file)]
    shutil.rmtree(cache.folder)
    start = len(times) // 10  # by then all processes are at work
    while start + 2 < len(times) and times[start + 1] - times[start] < _TOGETHER:  # results of one task
        start += 1
    seconds = times[-1] - times[start]
    busy = sum(row["seconds"] for row in made[start + 1 :]) / seconds / options.workers
    return Run(summary, failures, entries, (len(times) - 1 - start) / seconds, busy)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _fill_by_cluster(
    settings: Settings, folder: str, workers: int, meddle: "Callable[[_Watch], None] | None" = None
) -> Run:
    machines_folder = settings.folder / f"machines_{time.monotonic_ns()}"
    with LocalMachines(machines_folder) as machines:
        machines.add(workers)
        machines.wait()
        options = replace(_skip(settings, workers), cluster=ClusterSettings(str(machines.file)))
        with _Watch(machines, settings.folder / "cache", _VOLUMES[settings.size], meddle) as watch:
            run = fill(settings, folder, options, _SMALL)
    return replace(run, peaks=watch.peaks)


class _Watch:
    """Looks at a cluster while it works, and may meddle with it.

    Args:
        machines: the cluster.
        cache: the cache directory that it fills.
        volumes: number of volumes of the list.
        meddle: called once a fifth of the entries is made.
    """

    def __init__(self, machines: LocalMachines, cache: Path, volumes: int, meddle: "Callable[[_Watch], None] | None"):
        self.machines, self.cache, self.volumes, self.meddle = machines, cache, volumes, meddle
        self.peaks: dict[str, float] = {}
        self._count = _make_count()
        self._seconds = self._dask_seconds()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def entries(self) -> int:
        """Return the number of entries made so far."""
        return sum(1 for _ in self.cache.glob("??/*.safetensors"))

    def note(self, name: str, value: float) -> None:
        """Keep the highest value of a number."""
        self.peaks[name] = max(value, self.peaks.get(name, 0.0))

    def _dask_seconds(self) -> float:
        """Return the processor time of scheduler and workers so far, without their pools."""
        return sum(_processor_seconds(process.pid) for process in (self.machines.scheduler, *self.machines.workers))

    def _look(self) -> None:
        import distributed

        with distributed.Client(scheduler_file=str(self.machines.file), set_as_default=False) as client:
            while not self._ended.wait(_POLL):
                self._look_once(client)
                if self.meddle is not None and self.entries() > self.volumes // 5:
                    self.meddle(self)
                    self.meddle = None

    def _look_once(self, client: Any) -> None:
        tasks, workers = client.run_on_scheduler(self._count)
        self.note("tasks", tasks)
        self.note("workers", len(workers))
        self.note("scheduler MB", _megabytes(self.machines.scheduler.pid))
        self.note("dask's ms a volume", (self._dask_seconds() - self._seconds) / self.volumes * 1e3)
        for number, busy in workers.items():
            pid = self.machines.workers[number].pid
            self.note("a dask worker MB", _megabytes(pid))
            self.note("its pool MB", sum(_megabytes(child.pid) for child in _children(pid)))
            self.note("added", busy if number == len(self.machines.workers) - 1 else 0)


def _make_count() -> Callable[..., tuple[int, dict[int, int]]]:
    """Return a function within a function, which goes to the scheduler by value: this module would take memory there."""

    def count(dask_scheduler: Any) -> tuple[int, dict[int, int]]:
        """Return the number of tasks, and each worker's name and number of tasks, as the dashboard shows them."""
        workers = dask_scheduler.workers.values()
        return len(dask_scheduler.tasks), {int(worker.name): len(worker.processing) for worker in workers}

    return count


def _kill_and_add(watch: _Watch) -> None:
    """Kill the first worker while its pool is at work, and start another one; note how long its processes live on."""
    victim = watch.machines.workers[0]
    orphans = list(_children(victim.pid))
    started = time.monotonic()
    victim.kill()
    victim.wait()
    psutil.wait_procs(orphans, timeout=60)
    watch.note("orphans", time.monotonic() - started)
    watch.machines.add()


def _children(pid: int) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        yield from psutil.Process(pid).children(recursive=True)


def _processor_seconds(pid: int) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
    return 0.0


def _megabytes(pid: int) -> float:
    """Return a process's share of memory: pages that it shares with others count in part."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return psutil.Process(pid).memory_full_info().pss / 1e6
    return 0.0


STAGES = {"cluster": {"phantoms": write_phantoms, "compare": compare}}
