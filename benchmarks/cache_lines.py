"""Benchmarks of filling a slice cache: volumes per second by workers, what pool and locks cost, and a large folder's resume."""

import os
import shutil
import time
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from samf.benchmarks.measuring import Measurement, ratios, resident
from samf.benchmarks.volume_lines import scan_file
from samf.benchmarks.workloads import Settings
from samf.cache.entries import Arrays, write_entry
from samf.cache.fill import fill_slices, unsettled
from samf.cache.fill_options import FillOptions
from samf.cache.manifest import Manifest, WorkLog
from samf.cache.slice_cache import SliceCache
from samf.cache.slice_jobs import Job, Outcome, run_job
from samf.cache.volume_list import Shard, Volume, inspect_volumes
from samf.cache.worker_pool import WorkerPool
from samf.data.schema import VolumeLike
from samf.data.volume_discovery import search_volumes
from samf.model.image_processing_samf import EXTRACT_VERSION, SamfImageProcessor
from samf.training.memory import peak_resident

LISTED = {"full": 47_000, "medium": 4_700, "tiny": 40}
_FILLED = {"full": 24, "medium": 24, "tiny": 4}
_EMPTY = {"full": 800, "medium": 800, "tiny": 8}
_ROUNDS = {"full": 3, "medium": 3, "tiny": 1}
_WORKERS = 2


class _NoWork(SliceCache):
    """A cache whose slices cost nothing: what is left is naming, locking, handing over, writing and logging."""

    def extract(self, volume: VolumeLike, *, searched: bool = False) -> Arrays:
        """Return slices without reading the volume."""
        return {"slices": np.zeros((1, 8, 8), np.uint8)}


def time_fill(settings: Settings) -> list[Measurement]:
    """Time a volume by the number of workers, and what pool, locks and log add to it; starts of workers don't count."""
    rows, empty = _FILLED[settings.size], _EMPTY[settings.size]
    paths = _links(settings, max(rows, empty))
    caches = (settings.folder / f"filled_{number}" for number in count())
    one, several, plain, pooled = [], [], [], []
    for _ in range(_ROUNDS[settings.size]):
        one.append(_pool_seconds(SliceCache(next(caches), SamfImageProcessor()), paths[:rows], 1))
        several.append(_pool_seconds(SliceCache(next(caches), SamfImageProcessor()), paths[:rows], _WORKERS))
        plain.append(_loop_seconds(_NoWork(next(caches), SamfImageProcessor()), paths[:empty]))
        pooled.append(_pool_seconds(_NoWork(next(caches), SamfImageProcessor()), paths[:empty], 1))
    added = [more - less for more, less in zip(pooled, plain, strict=True)]
    return [
        Measurement("a volume, one worker", "s", one, note=f"{rows} links to a scan"),
        Measurement(f"a volume, {_WORKERS} workers", "s", several),
        Measurement(
            f"{_WORKERS} workers / {_WORKERS} x one",
            "x",
            [ratio / _WORKERS for ratio in ratios(one, several)],
            settings.limit(0.9),
        ),
        Measurement("pool, locks and log", "ms", [1e3 * seconds for seconds in added], note=f"of {empty} volumes"),
        Measurement(
            "pool, locks and log / a volume", "%", [100 * x for x in ratios(added, one)], at_most=settings.limit(2)
        ),
    ]


def _links(settings: Settings, number: int) -> list[str]:
    """Return paths of a scan under as many names."""
    folder = settings.folder / "scans"
    folder.mkdir()
    paths = [folder / f"scan_{index:04}.nii.gz" for index in range(number)]
    for path in paths:
        os.link(scan_file(settings), path)
    return list(map(str, paths))


def _pool_seconds(cache: SliceCache, paths: list[str], workers: int) -> float:
    """Return the seconds per volume between the workers' first results and the last one."""
    manifest = Manifest(cache.folder, "slices")
    jobs = [Job(volume) for volume in inspect_volumes(search_volumes(paths).volumes, cache)]
    ends = []
    work = partial(run_job, cache=cache, manifest=manifest)
    with WorkLog(manifest, Shard()) as log, WorkerPool(work, workers, None) as pool:
        for job, result in pool.map(jobs):
            log.append(job.volume, Outcome.of(result).bytes, Outcome.of(result).seconds)
            ends.append(time.perf_counter())
    shutil.rmtree(cache.folder)
    return (ends[-1] - ends[workers - 1]) / (len(ends) - workers)


def _loop_seconds(cache: SliceCache, paths: list[str]) -> float:
    """Return the seconds per volume of a loop in this process."""
    started = time.perf_counter()
    for path in paths:
        cache.get(path)
    seconds = (time.perf_counter() - started) / len(paths)
    shutil.rmtree(cache.folder)
    return seconds


def _fill(volumes: list[Volume], cache: SliceCache, options: FillOptions) -> None:
    origin = {"settings_hash": cache.image_processor.settings_hash(), "extract_version": EXTRACT_VERSION}
    manifest = Manifest(cache.folder, "slices")
    fill_slices(volumes, cache, manifest, options, origin)  # type: ignore[arg-type]
    unsettled(volumes, manifest, Shard())


def write_volumes(root: Path, volumes: int, scan: Path) -> None:
    """Write a folder in CT-RATE's layout, of links to a scan.

    Args:
        root: the folder; created.
        volumes: number of links.
        scan: what they are links to.
    """
    root.mkdir()
    for number in range(volumes):
        name = f"train_{number // 4 + 1}_{'ab'[number // 2 % 2]}"
        folder = root / "train_fixed" / name.rpartition("_")[0] / name
        folder.mkdir(parents=True, exist_ok=True)
        scan = _link(scan, folder / f"{name}_{number % 2 + 1}.nii.gz")


def write_listed(settings: Settings) -> list[Measurement]:
    """Write a folder in CT-RATE's layout, and a cache with an entry and a log line for each volume; links to a few files."""
    root, volumes = settings.folder / "many", LISTED[settings.size]
    write_volumes(root, volumes, scan_file(settings))
    cache = SliceCache(settings.folder / "many_cache", SamfImageProcessor())
    manifest = Manifest(cache.folder, "slices")
    entry = settings.folder / "entry"
    write_entry(entry, {"slices": np.zeros((1, 8, 8), np.uint8)})
    with WorkLog(manifest, Shard()) as log:
        for volume in inspect_volumes(search_volumes([str(root)]).volumes, cache):
            manifest.entry(volume.name).parent.mkdir(parents=True, exist_ok=True)
            entry = _link(entry, manifest.entry(volume.name))
            log.append(volume, entry.stat().st_size, 0.5)
    return [Measurement("files", "", [volumes], note="a folder of two volumes each, and their entries")]


def _link(source: Path, target: Path) -> Path:
    """Link a file, and return the file to link next: file systems limit the links to one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return target
    return source


def time_resume(settings: Settings) -> list[Measurement]:
    """Time what `preprocess.py` does before and after its work, where all entries exist."""
    cache = SliceCache(settings.folder / "many_cache", SamfImageProcessor())
    before, steps = resident(), []
    started = time.perf_counter()
    found = search_volumes([str(settings.folder / "many")])
    steps.append(("search the folder", time.perf_counter()))
    volumes = inspect_volumes(found.volumes, cache, found.searched)
    steps.append(("name the entries", time.perf_counter()))
    _fill(volumes, cache, FillOptions(show_progress=False, force=True))
    steps.append(("find that nothing is left, and write the manifest", time.perf_counter()))
    took = [end - begin for (_, end), begin in zip(steps, [started, *(end for _, end in steps)], strict=False)]
    added = (max(peak_resident(), resident()) - before) / 1e6
    return [
        *(Measurement(name, "s", [seconds]) for (name, _), seconds in zip(steps, took, strict=True)),
        Measurement("list and resume", "s", [sum(took)], at_most=settings.limit(5), note=f"{len(volumes)} volumes"),
        Measurement("memory added", "MB", [added], at_most=settings.limit(200)),
    ]


STAGES = {"fill": {"fill": time_fill}, "resume": {"write": write_listed, "resume": time_resume}}
