"""preprocess.py --cluster: a dask cluster makes what one machine makes, and a machine that dies blames no volume."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar

import psutil
import pytest
from cluster_runs import SMALL, entries, failures, logged, manifest, run, save_phantoms

from samf import preprocess
from samf.benchmarks.cluster_lines import TroubledCache
from samf.cache import cluster as cluster_module
from samf.cache.cluster_check import MachineCheck
from samf.cache.cluster_settings import ClusterSettings
from samf.cache.pool_process import JobConnection, PoolEndedError, PoolProcess, PoolRefusedError, versions
from samf.cache.slice_cache import SliceCache
from samf.cache.volume_list import inspect_volumes
from samf.cache.worker_pool import WorkerDied, WorkerPool
from samf.data.volume_discovery import search_volumes
from samf.model.image_processing_samf import SamfImageProcessor

# ---- command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster=host"], "--cluster host: expected local, slurm, a scheduler's address"),
        (["--cluster=local", "--dry_run"], "omit --cluster"),
        (["--cluster=local", "--verify"], "omit --cluster"),
        (["--cluster=local", "--embeddings=encoder"], "fill the slices with --cluster first"),
        (["--cluster=local", "--shard=1/2"], "divides the list itself"),
        (["--cluster=slurm", "--num_workers=2"], "a volume per thread"),
        (["--cluster=local", "--cluster_options=[1]"], "expected a mapping"),
        (["--cluster=local", "--cluster_options={a: ["], "--cluster_options {a: [:"),
        (["--cluster_options={n_workers: 2}"], "goes with --cluster"),
    ],
)
def test_options_that_do_not_go_together_say_so(options, message, capsys):
    with pytest.raises(SystemExit):
        preprocess.parse_args(["data", "--cache=cache", *options])
    assert message in capsys.readouterr().err


def test_options_of_a_cluster_are_yaml_json_or_a_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("queue: cpu\nn_workers: 3\n", encoding="utf-8")
    for text in ("{queue: cpu, n_workers: 3}", '{"queue": "cpu", "n_workers": 3}', str(file)):
        assert ClusterSettings.parse("slurm", text, 1).options == {"queue": "cpu", "n_workers": 3}
    args = preprocess.parse_args(["data", "--cache=cache", "--cluster=local", "--num_workers=3"])
    assert args.cluster == ClusterSettings("local", {}, 3)


def test_without_dask_the_error_names_the_extra(tmp_path, monkeypatch, capsys):
    save_phantoms(tmp_path / "volumes", ["a"])
    monkeypatch.setitem(sys.modules, "distributed", None)
    line = [str(tmp_path / "volumes"), f"--cache={tmp_path / 'cache'}", *SMALL, "--cluster=local"]
    assert preprocess.main(line) == 1
    assert "pip install 'samf[cluster]'" in capsys.readouterr().err


# ---- a pool that gets its jobs one by one --------------------------------------------------------------------------


def _square(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_jobs_may_arrive_while_others_run():
    ours, theirs = multiprocessing.Pipe()

    def give() -> None:
        for number in range(6):
            ours.send(number)
            time.sleep(0.01)

    threading.Thread(target=give).start()
    answers = {}
    with WorkerPool(_square, 2) as pool:
        for number, answer in pool.map((), more=JobConnection(theirs)):
            answers[number] = answer
            if len(answers) == 6:
                ours.send(None)
        assert list(pool.map((), more=theirs, idle=0.01)) == []
    assert {number: answer for number, answer in answers.items() if number != 3} == {0: 0, 1: 1, 2: 4, 4: 16, 5: 25}
    assert isinstance(answers[3], WorkerDied)


def test_jobs_beside_a_control_leave_it_a_process():
    with WorkerPool(_square, 3) as pool:
        groups = [dict(group) for group in pool.map_beside([1, 2, 4, 5, 6], [9])]
    assert groups == [{1: 1, 2: 4, 9: 81}, {4: 16, 5: 25, 9: 81}, {6: 36, 9: 81}]


@pytest.mark.parametrize("count", [1, 7, 33, 970])
@pytest.mark.parametrize("processes", [1, 4, 100])
def test_tasks_get_smaller_towards_the_end(count, processes):
    groups = list(cluster_module._split(range(count), 32, processes))
    assert [job for group in groups for job in group] == list(range(count))
    sizes = [len(group) for group in groups]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1 and max(sizes) <= 32
    for number, size in enumerate(sizes):
        assert size == 1 or size * 2 * processes <= sum(sizes[number:])  # no process gets more than half of its share


@pytest.mark.parametrize(("value", "kept"), [("65536", None), ("1000000", "1000000"), (None, None)])
def test_reading_processes_do_not_inherit_dasks_setting_of_malloc(value, kept, monkeypatch):
    pytest.importorskip("distributed", reason="distributed, which spreads the work, is not installed")
    from samf.cache import cluster_worker

    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    if value is not None:
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", value)
    found = cluster_worker._environment()
    assert found.get("MALLOC_TRIM_THRESHOLD_") == kept
    assert found.items() <= os.environ.items()


# ---- what machines must have in common -----------------------------------------------------------------------------


def test_a_machine_that_would_make_other_entries_is_refused(tmp_path):
    volumes = save_phantoms(tmp_path / "volumes", ["a", "b"])
    cache = SliceCache(tmp_path / "cache", SamfImageProcessor(slices_per_plane=2, size=16))
    with MachineCheck.of(cache, inspect_volumes(search_volumes([str(tmp_path / "volumes")]).volumes, cache)) as check:
        pickle.loads(pickle.dumps(check))()
        elsewhere = SliceCache(tmp_path / "other", cache.image_processor)
        with pytest.raises(PoolRefusedError, match="other is not the cache directory here"):
            MachineCheck(elsewhere, check.mark, check.sample, check.settings_hash)()
        with pytest.raises(PoolRefusedError, match="the slice settings are .* here and 123 where"):
            MachineCheck(cache, check.mark, check.sample, "123")()
        volumes[0].unlink()
        check()  # a single one may have been removed
        os.utime(volumes[1], ns=(0, 1))
        with pytest.raises(PoolRefusedError, match="a.nii.gz: cannot be accessed .* All machines must see"):
            check()
    assert list(cache.folder.iterdir()) == []


@pytest.mark.slow
def test_a_pool_process_answers_is_killed_and_ends_with_its_caller(tmp_path):
    work = pickle.dumps((os.getcwd, time.sleep, None))
    with pytest.raises(PoolRefusedError, match="EXTRACT_VERSION is .* here and 0 where"):
        PoolProcess(work, versions() | {"EXTRACT_VERSION": "0"}, 1)
    pool = PoolProcess(work, versions(), 2)
    assert pickle.loads(pool.submit(pickle.dumps(0)).result(30)) is None
    assert pickle.loads(pool.submit(pickle.dumps("no number")).result(30)).error == "TypeError"
    hanging = pool.submit(pickle.dumps(60))
    time.sleep(0.3)
    processes = psutil.Process().children(recursive=True)
    os.kill(pool._process.pid, signal.SIGKILL)
    with pytest.raises(PoolEndedError):
        hanging.result(30)
    assert psutil.wait_procs(processes, timeout=5)[1] == []  # a process that is killed takes its workers along
    with pytest.raises(PoolEndedError):
        pool.submit(pickle.dumps(0)).result(30)
    pool.close()
    assert pool.is_closed


# ---- one worker, in this process -----------------------------------------------------------------------------------


class PoolOfThreads:
    """Stand-in for a PoolProcess, which takes seconds to start: threads, which keep each job until they have two tasks'."""

    in_hand: ClassVar[list[bytes]] = []
    enough = threading.Event()

    def __init__(self, work: bytes, versions: dict[str, str], size: int, environment: dict[str, str]):
        check, self._work, _ = pickle.loads(work)
        check()
        self._threads = ThreadPoolExecutor(size)
        self.is_closed = False

    def submit(self, job: bytes) -> Future:
        self.in_hand.append(job)
        if len(self.in_hand) == 2:
            self.enough.set()
        return self._threads.submit(self._run, job)

    def _run(self, job: bytes) -> bytes:
        assert self.enough.wait(30), "the worker took one task at a time"
        return pickle.dumps(self._work(pickle.loads(job)))

    def close(self) -> None:
        self._threads.shutdown()


def test_a_cluster_fills_a_cache_and_has_the_next_task_before_it_needs_it(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="distributed, which spreads the work, is not installed")
    from samf.cache import cluster_worker

    monkeypatch.setattr(cluster_worker, "PoolProcess", PoolOfThreads)
    folder, by_pool, by_cluster = tmp_path / "volumes", tmp_path / "pool", tmp_path / "cluster"
    files = save_phantoms(folder, list("abcdef"))
    files[3].write_bytes(b"no volume")
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options, silence_logs=50) as cluster:
        assert run(folder, by_cluster, "--on_error=skip", f"--cluster={cluster.scheduler_address}") == 0
        (worker,) = cluster.workers.values()
        assert worker.state.nthreads == 1 and not any(name.startswith("samf") for name in worker.plugins)
    assert run(folder, by_pool, "--on_error=skip", "--num_workers=1") == 0
    assert len(PoolOfThreads.in_hand) == 6
    assert failures(by_cluster) == failures(by_pool) == {"d": "CTReadError"}
    assert entries(by_cluster) == entries(by_pool) and len(entries(by_pool)) == 5
    assert manifest(by_cluster)["complete"] and set(logged(by_cluster).values()) == {1}
    assert not list(by_cluster.glob(".*.cluster"))


@pytest.fixture(scope="module")
def distributed():
    return pytest.importorskip("distributed", reason="distributed, which spreads the work, is not installed")


@pytest.fixture(scope="module")
def address(distributed):
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


@pytest.mark.slow  # 15 s, most of them the limit of the volume that hangs
def test_a_cluster_makes_the_entries_that_a_pool_makes_and_notes_the_same_failures(address, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "SliceCache", TroubledCache)
    folder, by_pool, by_cluster = tmp_path / "volumes", tmp_path / "pool", tmp_path / "cluster"
    files = save_phantoms(folder, ["crash_1", "a", "b", "hang_1", "c", "d", "lie_1", "e"])
    files[6].write_bytes(b"no volume")
    options = ("--on_error=skip", "--timeout=1.5")
    assert run(folder, by_pool, *options, "--num_workers=2") == 0
    assert run(folder, by_cluster, *options, f"--cluster={address}") == 0
    assert failures(by_cluster) == {"crash_1": "SIGSEGV", "hang_1": "Timeout", "lie_1": "CTReadError"}
    assert failures(by_cluster) == failures(by_pool)
    assert entries(by_cluster) == entries(by_pool) and len(entries(by_pool)) == 5
    assert set(logged(by_cluster).values()) == {1} and len(logged(by_cluster)) == 5
    ours, theirs = manifest(by_cluster), manifest(by_pool)
    changing = ("seconds", "written")
    assert {key: ours[key] for key in ours if key not in changing} == {
        key: theirs[key] for key in theirs if key not in changing
    }
    assert not list(by_cluster.glob(".*.cluster"))
    monkeypatch.setattr(cluster_module, "_import_dask", lambda _: pytest.fail("nothing is left to do"))
    assert run(folder, by_cluster, *options, f"--cluster={address}") == 0


@pytest.mark.slow
def test_a_worker_of_another_version_is_refused_before_the_work(address, tmp_path, monkeypatch, capsys):
    save_phantoms(tmp_path / "volumes", ["a"])
    monkeypatch.setattr(cluster_module, "versions", lambda: versions() | {"EXTRACT_VERSION": "0"})
    assert run(tmp_path / "volumes", tmp_path / "cache", f"--cluster={address}") == 1
    said = capsys.readouterr().err
    assert "1 of 1 workers of the cluster can't do this work" in said and "EXTRACT_VERSION is " in said
    assert not list((tmp_path / "cache").glob(".*.cluster")) and entries(tmp_path / "cache") == {}
