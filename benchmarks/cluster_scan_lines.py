"""Benchmark of filling a cache by a dask cluster with scans of real size: does it keep the reading processes busy?

Workers are started as `docs/howto/preprocess.md` says, under nannies, with a reading process each. The scans are one file under
several names, which is in memory after the first one.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import psutil

from samf.benchmarks.cluster_lines import LocalMachines, Run, count_different, describe_rate, fill
from samf.benchmarks.measuring import Measurement
from samf.benchmarks.volume_lines import scan_file
from samf.benchmarks.workloads import LineSkipped, Settings
from samf.cache.cluster_settings import ClusterSettings
from samf.cache.fill_options import FillOptions
from samf.model.image_processing_samf import SamfImageProcessor

_SCANS = {"full": 40, "medium": 16, "tiny": 6}
_PROCESSES = (1, 2)


def write_scans(settings: Settings) -> list[Measurement]:
    """Write a scan of 512 x 512 x 300 voxels, or a tiny one, and link it under other names."""
    scan = scan_file(settings if settings.size == "tiny" else replace(settings, size="full"))
    folder, count = settings.folder / "scans", _SCANS[settings.size]
    folder.mkdir()
    for number in range(count):
        os.link(scan, folder / f"scan_{number:02}.nii.gz")
    return [Measurement("scans", "", [count], note=f"one file of {scan.stat().st_size / 1e6:.1f} MB")]


def time_scans(settings: Settings) -> list[Measurement]:
    """Fill a cache with the default slices by the pool and by clusters of one and two reading processes."""
    if find_spec("distributed") is None:
        raise LineSkipped("needs distributed: pip install 'samf[cluster]'")
    pools = {count: _fill(settings, FillOptions(workers=count)) for count in _PROCESSES}
    clusters = {count: _fill_by_cluster(settings, count) for count in _PROCESSES}
    rows = [describe_rate(f"pool, {count} processes", run) for count, run in pools.items()]
    for count, run in clusters.items():
        ideal = min(count, len(os.sched_getaffinity(0))) * clusters[1].rate
        note = f"scheduler, nannies and workers {run.peaks['ms']:.1f} ms of the processor a volume"
        rows += [
            describe_rate(f"cluster, {count} workers", run, note),
            Measurement(f"cluster, {count} workers / ideal", "x", [run.rate / ideal], settings.limit(0.9)),
            Measurement(f"cluster / pool, {count} workers", "x", [run.rate / pools[count].rate]),
        ]
    return [*rows, count_different(settings, "entries that differ from the pool's", pools[1], *clusters.values())]


def _fill(settings: Settings, options: FillOptions) -> Run:
    return fill(settings, "scans", options, SamfImageProcessor())


def _fill_by_cluster(settings: Settings, workers: int) -> Run:
    with LocalMachines(settings.folder / f"machines_{time.monotonic_ns()}", nanny=True) as machines:
        machines.add(workers)
        machines.wait()
        processes = [
            process
            for started in (machines.scheduler, *machines.workers)
            for process in (psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True))
        ]
        before = _processor_seconds(processes)
        run = _fill(settings, FillOptions(workers=workers, cluster=ClusterSettings(str(machines.file))))
        seconds = _processor_seconds(processes) - before
    return replace(run, peaks={"ms": seconds / _SCANS[settings.size] * 1e3})


def _processor_seconds(processes: Sequence[psutil.Process]) -> float:
    """Return the processor time of processes, without their children's: pools aren't among them."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


STAGES = {"cluster": {"scans": write_scans, "compare_scans": time_scans}}
