"""preprocess.py --cluster with schedulers and workers in processes of their own, which are killed, join and lack things."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from cluster_runs import SMALL, entries, failures, logged, manifest, run, save_phantoms
from launch import REPOSITORY, environment

from samf import preprocess
from samf.benchmarks.cluster_lines import LocalMachines, TroubledCache

pytest.importorskip("distributed", reason="distributed, which spreads the work, is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SKIP = ("--on_error=skip", "--timeout=10")


@pytest.fixture
def machines(tmp_path) -> Iterator[LocalMachines]:
    with LocalMachines(tmp_path / "machines") as machines:
        yield machines


@pytest.fixture
def data(tmp_path) -> Path:
    """Thirty good volumes; one that crashes and two that hang keep the workers busy for a while."""
    save_phantoms(tmp_path / "volumes", ["crash_1", "hang_1", *map(str, range(30)), "hang_2"])
    return tmp_path / "volumes"


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_killed_worker_blames_no_volume_and_a_new_one_gets_work(machines, data, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, "SliceCache", TroubledCache)
    cache, seen = tmp_path / "cache", {}
    machines.add()

    def kill_and_add() -> None:
        wait_for(lambda: entries(cache))
        pool = psutil.Process(machines.workers[0].pid).children(recursive=True)
        machines.workers[0].kill()
        seen["orphans"] = psutil.wait_procs(pool, timeout=20)[1]
        machines.add()

    meddler = in_background(kill_and_add)
    assert run(data, cache, *SKIP, f"--cluster={machines.file}") == 0
    meddler.join()
    assert seen["orphans"] == []
    assert failures(cache) == {"crash_1": "SIGSEGV", "hang_1": "Timeout", "hang_2": "Timeout"}
    assert manifest(cache)["complete"] and manifest(cache)["done"] == 30
    assert set(logged(cache).values()) == {1} and len(logged(cache)) >= 26  # the kill may fall between entry and line
    assert run(data, tmp_path / "pool", *SKIP, "--num_workers=1") == 0
    assert entries(cache) == entries(tmp_path / "pool")


def without_samf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that are started from now on fail to import samf, also where it is installed."""
    (tmp_path / "other/samf").mkdir(parents=True)
    (tmp_path / "other/samf/__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'samf'\", name='samf')"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'other'}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.chdir(tmp_path / "other")


def test_a_worker_without_samf_is_refused_at_the_start(machines, data, tmp_path, monkeypatch, capsys):
    without_samf(tmp_path, monkeypatch)
    machines.add()
    assert run(data, tmp_path / "cache", f"--cluster={machines.file}") == 1
    assert "samf can't be imported there (No module named 'samf')" in capsys.readouterr().err


@pytest.mark.parametrize("lacks", ["samf", "the cache directory"])
def test_a_worker_that_joins_and_lacks_something_gets_no_work(machines, data, tmp_path, monkeypatch, lacks):
    monkeypatch.setattr(preprocess, "SliceCache", TroubledCache)
    cache = tmp_path / "cache"
    machines.add()

    def add() -> None:
        wait_for(lambda: entries(cache))
        if lacks == "samf":
            without_samf(tmp_path, monkeypatch)
        else:
            next(cache.glob(".*.cluster")).unlink()
        machines.add()
        wait_for(lambda: machines.workers[1].poll() is not None)

    meddler = in_background(add)
    assert run(data, cache, *SKIP, f"--cluster={machines.file}") == 0
    assert failures(cache) == {"crash_1": "SIGSEGV", "hang_1": "Timeout", "hang_2": "Timeout"}
    assert manifest(cache)["done"] == 30
    meddler.join()


def preprocess_command(data: Path, cache: Path, *options: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "preprocess.py"), str(data), f"--cache={cache}", *SMALL, *options]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_leaves_a_manifest_and_idle_workers(machines, tmp_path, number):
    data, cache = tmp_path / "volumes", tmp_path / "cache"
    save_phantoms(data, [str(number) for number in range(400)])
    machines.add()
    line = preprocess_command(data, cache, f"--cluster={machines.file}")
    process = subprocess.Popen(
        line,
        env=environment(),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in background jobs
    )
    wait_for(lambda: entries(cache))
    os.killpg(process.pid, number)
    assert process.wait(60) in {signal.SIGTERM: (128 + signal.SIGTERM,), signal.SIGINT: (1, -signal.SIGINT)}[number]
    assert machines.workers[0].poll() is None
    wait_for(lambda: not psutil.Process(machines.workers[0].pid).children(), 10)
    summary = manifest(cache)
    assert 0 < summary["done"] < 400 and summary["failed"] == 0 and not summary["complete"]
    before = Counter(entries(cache).keys())
    assert run(data, cache, f"--cluster={machines.file}") == 0
    assert manifest(cache)["complete"] and set(before) < set(entries(cache))


STAND_INS = {
    "sbatch": """
import os, subprocess, sys
job = subprocess.Popen(["bash", "-c", open(sys.argv[-1]).read()], start_new_session=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
open(os.environ["STAND_IN_JOBS"], "a").write(f"{job.pid}\\n")
print(f"Submitted batch job {job.pid}")
""",
    "scancel": "import os, signal, sys\nfor job in sys.argv[1:]: os.killpg(int(job), signal.SIGTERM)\n",
}


def test_jobs_of_slurm_fill_the_cache_and_are_cancelled(tmp_path, monkeypatch):
    """By stand-ins for sbatch and scancel that run the job's script on this machine; no Slurm was at hand."""
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue, which starts jobs, is not installed")
    commands, jobs = tmp_path / "bin", tmp_path / "jobs"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_JOBS", str(jobs))
    save_phantoms(tmp_path / "volumes", ["a", "b", "c", "d"])
    options = "{n_workers: 2, cores: 1, processes: 1, memory: 2GB, scheduler_options: {dashboard_address: ':0'}}"
    line = ("--cluster=slurm", f"--cluster_options={options}")
    assert run(tmp_path / "volumes", tmp_path / "cache", *line) == 0
    assert manifest(tmp_path / "cache")["complete"] and len(entries(tmp_path / "cache")) == 4
    started = [int(line) for line in jobs.read_text(encoding="utf-8").splitlines()]
    assert len(started) == 2
    wait_for(
        lambda: not any(psutil.pid_exists(job) and psutil.Process(job).status() != "zombie" for job in started), 60
    )
