"""preprocess.py: a cache that several processes fill, that survives kills, and whose manifest tells all of it."""

import csv
import errno
import faulthandler
import importlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
import torch
from launch import command, environment
from tqdm import tqdm
from transformers import ViTConfig, ViTModel

from samf import SamfForConditionalGeneration, preprocess
from samf.cache import entries, fill, slice_cache
from samf.cache import settings as slice_settings
from samf.cache.embedding_cache import EmbeddingCache
from samf.cache.fill import Estimate, FillOptions, entry_bytes
from samf.cache.locks import EntryLocks
from samf.cache.manifest import Manifest, Shard, Volume
from samf.cache.slice_cache import SliceCache, check_entry, read_entry
from samf.cache.worker_pool import WorkerDied, WorkerPool
from samf.data.ct_rate.loader import load_ct_rate
from samf.data.load_stats import LoadStats
from samf.data.schema import volume_of
from samf.data.volume_discovery import find_volumes
from samf.model.ct_volume import CTReadError, VolumeRef, read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.phantoms.dataset import make_phantom, write_nifti
from samf.pretraining.contrastive import build_slices_model

SMALL = {"slices_per_plane": 2, "image_size": 16}
ON_ERROR_SKIP = {**SMALL, "on_error": "skip"}


def save_phantoms(folder: Path, count: int) -> list[Path]:
    """Small phantom chests, each with noise of its own."""
    folder.mkdir(parents=True)
    phantoms = [make_phantom(np.random.default_rng(seed), voxel_mm=14) for seed in range(2)]
    files = []
    for i in range(count):
        phantom = phantoms[i % len(phantoms)]
        noise = np.random.default_rng(i).integers(-20, 20, phantom.hu.shape, dtype=np.int16)
        files.append(folder / f"phantom_{i:04d}.nii.gz")
        write_nifti(type(phantom)(phantom.hu + noise, phantom.affine, {}, {}), files[-1])
    return files


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> list[Path]:
    return save_phantoms(tmp_path_factory.mktemp("phantoms") / "volumes", 8)


def arguments(data: Path | Sequence[Path], cache: Path, options: dict) -> list[str]:
    sources = [data] if isinstance(data, Path) else data
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    return [*map(str, sources), f"--cache={cache}", *flags]


def run(data: Path | Sequence[Path], cache: Path, **options) -> int:
    return preprocess.main(arguments(data, cache, {**SMALL, "num_workers": 2, **options}))


def manifest(cache: Path, stage: str = "") -> dict:
    return json.loads((cache / f"{stage}manifest.json").read_text(encoding="utf-8"))


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def work_log(cache: Path) -> Counter:
    """How often the logs of all processes say that an entry was made."""
    lines = itertools.chain.from_iterable(file.read_bytes().splitlines() for file in (cache / "log").iterdir())
    return Counter(json.loads(line)["record"] for line in lines if line.endswith(b"}"))


def entry_stats(cache: Path) -> dict[str, tuple[int, int]]:
    """Entries with what changes when one is written again."""
    stats = {path.stem: path.stat() for path in cache.glob("??/*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def assert_equals_extract(volumes: Sequence[Path], cache: Path) -> None:
    processor = SamfImageProcessor(slices_per_plane=2, size=16)
    store = SliceCache(cache, processor)
    for volume in volumes:
        entry, expected = read_entry(store.entry_path(volume)), processor.extract(read_ct(volume))
        for name, array in expected.items():
            np.testing.assert_array_equal(entry[name], array, err_msg=f"{volume} {name}")


# ---- killed and started again --------------------------------------------------------------------------------------


def kill_three_times(start: Callable[[], list[int]], cache: Path, thresholds: Sequence[int]) -> None:
    """Start processes, each leading a group; SIGKILL their groups when the cache has so many entries; again.

    After each kill no entry may be torn, and none of an earlier one written again.
    """
    before: dict[str, tuple[int, int]] = {}
    for threshold in thresholds:
        leaders = start()
        deadline = time.monotonic() + 200
        while len(entry_stats(cache)) < threshold and time.monotonic() < deadline:
            time.sleep(0.002)
        for leader in leaders:
            os.killpg(leader, signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1]) for leader in leaders]
        assert -signal.SIGKILL in statuses, f"{statuses}: none was killed"
        assert all(check_entry(path) is None for path in cache.glob("??/*.safetensors"))
        now = entry_stats(cache)
        assert len(now) >= threshold and all(now[name] == stat for name, stat in before.items())
        before = now


def assert_complete(volumes: Sequence[Path], cache: Path, kills: int, at_once: int) -> None:
    summary = manifest(cache)
    assert summary["complete"] and (summary["done"], summary["failed"]) == (len(volumes), 0)
    assert [row["volume"] for row in rows(cache / "volumes.jsonl")] == sorted(map(str, volumes))
    assert rows(cache / "failures.jsonl") == []
    assert len(entry_stats(cache)) == len(volumes)
    times = work_log(cache)
    assert set(times.values()) == {1}  # no process made an entry again
    assert len(volumes) - kills * at_once <= len(times) <= len(volumes)  # a kill may fall between an entry and its line


def in_a_fork(work: Callable[[], int]) -> int:
    """Starts `work` in a process that leads a group of its own; returns its id. Spares an import of all libraries."""
    process = os.fork()
    if process == 0:
        status = 99
        try:
            os.setsid()
            # The parent's monitor of progress bars may have held the old one in this moment, and isn't here to release it.
            tqdm.set_lock(threading.RLock())
            with open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            status = work()
        except SystemExit as leaving:
            status = leaving.code
        finally:
            os._exit(status)
    return process


def test_two_processes_over_one_list_killed_three_times_make_each_volume_once(tmp_path, monkeypatch):
    volumes, cache, seen = save_phantoms(tmp_path / "volumes", 40), tmp_path / "cache", tmp_path / "seen"

    def slow_read(volume, **options):
        with open(seen, "a", encoding="utf-8") as file:
            file.write(f"{volume.path}\n")
        time.sleep(0.04)
        return read_ct(volume, **options)

    monkeypatch.setattr(slice_cache, "read_ct", slow_read)

    def start() -> list[int]:
        return [in_a_fork(lambda: run(tmp_path / "volumes", cache, num_workers=1)) for _ in range(2)]

    thresholds = sorted(random.sample(range(2, 34), 3))
    kill_three_times(start, cache, thresholds)
    for process in start():
        assert os.waitpid(process, 0)[1] == 0
    assert_complete(volumes, cache, kills=3, at_once=2)
    assert_equals_extract(volumes, cache)
    reads = Counter(seen.read_text(encoding="utf-8").splitlines())
    assert set(reads) == set(map(str, volumes))
    assert reads.total() <= len(volumes) + 3 * 2, thresholds  # each kill cuts at most two volumes off


def test_a_scheduler_that_ends_the_job_leaves_a_manifest_and_no_process(phantoms, tmp_path, monkeypatch):
    cache, workers = tmp_path / "cache", tmp_path / "workers"

    def slow_read(volume, **options):
        with open(workers, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        return read_ct(volume, **options)

    monkeypatch.setattr(slice_cache, "read_ct", slow_read)
    process = in_a_fork(lambda: run(phantoms[0].parent, cache))
    while not entry_stats(cache):
        time.sleep(0.01)
    os.killpg(process, signal.SIGTERM)  # also to the workers, as schedulers do
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGTERM
    summary = manifest(cache)
    assert summary["pending"] > 0 and summary["done"] == len(entry_stats(cache)) and summary["failed"] == 0
    assert not any(lives(int(worker)) for worker in workers.read_text(encoding="utf-8").split())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_thousand_phantoms_by_two_processes_killed_three_times(tmp_path):
    volumes, cache = save_phantoms(tmp_path / "volumes", 1000), tmp_path / "cache"
    data = [str(tmp_path / "volumes")]
    options = {**SMALL, "cache": cache, "num_workers": 1}

    def start() -> list[int]:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment()}
        line = [*command("preprocess.py", 1, options), *data]
        return [subprocess.Popen(line, start_new_session=True, **quiet).pid for _ in range(2)]

    kill_three_times(start, cache, sorted(random.sample(range(20, 900), 3)))
    last = [*command("preprocess.py", 2, options), *data]  # by torchrun: what is done is done, whoever did it
    subprocess.run(last, env=environment(), check=True)
    assert_complete(volumes, cache, kills=3, at_once=2)
    assert_equals_extract(volumes[::50], cache)


# ---- shards --------------------------------------------------------------------------------------------------------


def test_shards_and_ranks_part_the_list():
    volumes = [Volume(VolumeRef(str(i)), str(i)) for i in range(101)]
    for text, ranks, count in (("3/16", 1, 16), (None, 4, 4), ("2/3", 5, 15)):
        shards = []
        for number in range(count // ranks):
            for rank in range(ranks):
                environment = {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
                shards.append(Shard.choose(text and f"{number + 1}/{count // ranks}", environment))
        assert len(set(shards)) == count
        assert (
            sorted(itertools.chain.from_iterable(shard.of(volumes) for shard in shards), key=volumes.index) == volumes
        )
        sizes = [len(shard.of(volumes)) for shard in shards]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "-1/4", "1/4/2"])
def test_a_shard_that_is_none_is_an_error(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "cache", shard=text)
    assert f"--shard {text}: expected a number" in capsys.readouterr().err


def test_an_array_job_fills_one_cache_and_the_last_task_completes_the_manifest(phantoms, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    for done, task in enumerate(("2/3", "1/3", "3/3"), start=1):
        assert run(phantoms[0].parent, cache, shard=task) == 0
        summary = manifest(cache)
        assert summary["complete"] == (done == 3) and summary["volumes"] == len(phantoms)
    monkeypatch.setattr(slice_cache, "read_ct", lambda *_, **__: pytest.fail("a volume was read again"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(phantoms[0].parent, cache) == 0
    assert set(work_log(cache).values()) == {1} and len(work_log(cache)) == len(phantoms)
    assert manifest(cache)["settings_hash"] == SamfImageProcessor(slices_per_plane=2, size=16).settings_hash()


# ---- volumes that can't be read ------------------------------------------------------------------------------------


@pytest.fixture
def troubled(tmp_path, monkeypatch) -> tuple[Path, Callable[[], Counter]]:
    """Five volumes, three of which can't be read, each in its own way; and how often each was tried."""
    folder, tries = tmp_path / "volumes", tmp_path / "tries"
    files = save_phantoms(folder, 5)
    for file, name in zip(files, ("crash", "fine", "hang", "other", "torn"), strict=True):
        file.rename(folder / f"{name}.nii.gz")
    (folder / "torn.nii.gz").write_bytes((folder / "torn.nii.gz").read_bytes()[:500])

    def read(volume, **options):
        name = Path(volume.path).name.partition(".")[0]
        with open(tries, "a", encoding="utf-8") as file:
            file.write(f"{name}\n")
        if "crash" in name:
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in name:
            time.sleep(60)
        return read_ct(volume, **options)

    monkeypatch.setattr(slice_cache, "read_ct", read)
    return folder, lambda: Counter(tries.read_text(encoding="utf-8").split())


def test_a_crash_a_hang_and_a_torn_file_cost_only_their_volumes(troubled, tmp_path):
    folder, tries = troubled
    cache = tmp_path / "cache"
    assert run(folder, cache, on_error="skip", timeout=1.5) == 0
    failures = {Path(row["volume"]).name: row for row in rows(cache / "failures.jsonl")}
    assert {name: row["error"] for name, row in failures.items()} == {
        "crash.nii.gz": "SIGSEGV",
        "hang.nii.gz": "Timeout",
        "torn.nii.gz": "CTReadError",
    }
    assert "took longer than 1.5 seconds" in failures["hang.nii.gz"]["message"]
    assert "torn.nii.gz" in failures["torn.nii.gz"]["message"]
    summary = manifest(cache)
    assert summary["complete"] and (summary["done"], summary["failed"]) == (2, 3)
    assert summary["failures"] == {"SIGSEGV": 1, "Timeout": 1, "CTReadError": 1}
    assert_equals_extract([folder / "fine.nii.gz", folder / "other.nii.gz"], cache)
    # What timed out was read once more together with a volume that can be read. What failed isn't tried again, unless that is
    # asked, or its file is another one.
    control = {"fine", "other"} & {name for name, times in tries().items() if times == 2}
    assert len(control) == 1
    expected = Counter(crash=1, fine=1, hang=2, other=1, torn=1) + Counter(control)
    assert tries() == expected
    assert run(folder, cache, on_error="skip", timeout=1.5) == 0
    assert tries() == expected and len(rows(cache / "failures.jsonl")) == 3
    write_nifti(make_phantom(np.random.default_rng(5), voxel_mm=14), folder / "torn.nii.gz")
    assert run(folder, cache, on_error="skip", timeout=1.5) == 0
    assert tries() == expected + Counter(torn=1) and manifest(cache)["done"] == 3
    assert run(folder, cache, on_error="skip", timeout=1.5, retry_failed=True) == 0
    again = tries() - expected
    assert (again["crash"], again["hang"], again["torn"]) == (1, 2, 1) and again["fine"] + again["other"] == 1
    assert len(rows(cache / "failures.jsonl")) == 2


@pytest.mark.parametrize("is_back", [True, False], ids=["until the second try", "for longer"])
def test_a_disk_that_stalls_costs_no_volume(tmp_path, monkeypatch, is_back):
    """A file server that restarts during the work: what it delays isn't noted, and the next run makes it."""
    folder, cache, back = tmp_path / "volumes", tmp_path / "cache", tmp_path / "back"
    files = save_phantoms(folder, 4)

    def read(volume, **options):
        while len(list(cache.glob("??/*.safetensors"))) >= 2 and not back.exists():
            time.sleep(0.02)
        return read_ct(volume, **options)

    settle = fill._FillRun.retry_timed_out
    monkeypatch.setattr(
        fill._FillRun, "retry_timed_out", lambda *args: (back.touch() if is_back else None, settle(*args))
    )
    monkeypatch.setattr(slice_cache, "read_ct", read)
    assert run(folder, cache, on_error="skip", timeout=1) == (0 if is_back else preprocess.TRY_AGAIN)
    assert manifest(cache)["failed"] == 0 and manifest(cache)["complete"] == is_back
    assert not list(cache.glob("??/*.failed.json"))
    back.touch()
    assert run(folder, cache, on_error="skip") == 0 and manifest(cache)["done"] == len(files)


def test_a_disk_that_stays_away_ends_the_run(tmp_path, monkeypatch, capfd):
    folder, cache = tmp_path / "volumes", tmp_path / "cache"
    save_phantoms(folder, 4)
    monkeypatch.setattr(slice_cache, "read_ct", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(fill, "_MAX_FAILURES", 4)
    assert run(folder, cache, on_error="skip", timeout=0.3) == 1
    assert "as did the 3 volumes before it. Does the volumes' disk stall?" in capfd.readouterr().err
    assert manifest(cache)["pending"] == 4 and not list(cache.glob("??/*.failed.json"))


NOT_NOTED = {
    "memory": lambda path: os.kill(os.getpid(), signal.SIGKILL),
    "library": lambda path: importlib.import_module("a_library_that_is_missing"),
    "disk": lambda path: raise_caused(path, OSError(errno.EIO, "Input/output error")),
    "optional": lambda path: raise_caused(path, None, "reading DICOM needs pydicom 3: pip install pydicom"),
}


def raise_caused(path: str, cause: OSError | None, message: str = "cannot be read") -> None:
    raise CTReadError(f"{path}: {message}") from cause


def test_what_is_not_the_volumes_fault_is_tried_again_unasked(tmp_path, monkeypatch):
    folder, cache = tmp_path / "volumes", tmp_path / "cache"
    files = save_phantoms(folder, 6)
    for file, name in zip(files, (*NOT_NOTED, "fine", "gzip"), strict=True):
        file.rename(folder / f"{name}.nii.gz")
    (folder / "gzip.nii.gz").write_bytes(b"\x1f\x8b" + bytes(400))  # an OSError of gzip's, which is the file's fault

    def read(volume, **options):
        NOT_NOTED.get(Path(volume.path).name.partition(".")[0], str)(volume.path)
        return read_ct(volume, **options)

    with monkeypatch.context() as patched:
        patched.setattr(slice_cache, "read_ct", read)
        assert run(folder, cache, on_error="skip") == preprocess.TRY_AGAIN
    summary = manifest(cache)
    assert (summary["done"], summary["failed"], summary["pending"]) == (1, 1, 4) and not summary["complete"]
    assert rows(cache / "failures.jsonl")[0]["volume"] == str(folder / "gzip.nii.gz")
    assert run(folder, cache, on_error="skip") == 0
    assert manifest(cache)["complete"] and manifest(cache)["done"] == 5


def test_skip_stops_when_nothing_can_be_read(tmp_path, capfd):
    folder, cache = tmp_path / "volumes", tmp_path / "cache"
    folder.mkdir()
    for i in range(21):
        (folder / f"{i:02d}.nii.gz").write_bytes(b"no volume")
    assert run(folder, cache, on_error="skip") == 1
    assert "the first 20 volumes all failed: " in capfd.readouterr().err
    assert manifest(cache)["failed"] == 0  # nothing is noted of them
    assert run(folder, cache, on_error="skip", retry_failed=True) == 0 and manifest(cache)["failed"] == 21
    assert "--retry_failed retries them" in capfd.readouterr().out


def test_a_file_name_that_is_no_utf8_is_a_name_as_any(phantoms, tmp_path):
    folder, cache = tmp_path / "volumes", tmp_path / "cache"
    folder.mkdir()
    good, torn = folder / os.fsdecode(b"M\xfc.nii.gz"), folder / os.fsdecode(b"\xfc torn.nii.gz")
    good.write_bytes(phantoms[0].read_bytes())
    torn.write_bytes(b"torn")
    assert run(folder, cache, on_error="skip") == 0
    assert [row["volume"] for row in rows(cache / "volumes.jsonl")] == [str(good)]
    assert [row["volume"] for row in rows(cache / "failures.jsonl")] == [str(torn)]
    load_stats = LoadStats()
    load_stats.drop("unreadable", str(torn))
    load_stats.save(tmp_path / "counts.json")
    assert LoadStats.from_summary(json.loads((tmp_path / "counts.json").read_text(encoding="utf-8"))) == load_stats


def test_stop_says_which_volume_and_why_and_leaves_the_manifest(troubled, tmp_path, capfd):
    folder, tries = troubled
    (folder / "crash.nii.gz").unlink()
    (folder / "hang.nii.gz").unlink()
    for _ in range(2):  # what failed is tried again
        assert run(folder, tmp_path / "cache") == 1
        message = capfd.readouterr().err
        assert "torn.nii.gz" in message and "--on_error skip" in message
    assert tries()["torn"] == 2 and manifest(tmp_path / "cache")["failed"] == 1


def test_a_missing_volume_is_listed_and_a_full_disk_stops(phantoms, tmp_path, monkeypatch, capfd):
    listed = tmp_path / "list.txt"
    listed.write_text(f"# two\n{phantoms[0]}\n\nmissing.nii.gz\n", encoding="utf-8")
    assert run(listed, tmp_path / "cache", on_error="skip") == 0
    (failure,) = rows(tmp_path / "cache/failures.jsonl")
    assert failure["volume"] == str(tmp_path / "missing.nii.gz") and "cannot be accessed" in failure["message"]
    assert run(listed, tmp_path / "cache") == 1 and "missing.nii.gz" in capfd.readouterr().err

    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(entries, "write_entry", full)
    assert run(phantoms[0].parent, tmp_path / "other", on_error="skip") == 1
    assert "No space left on device" in capfd.readouterr().err
    assert manifest(tmp_path / "other")["failed"] == 0  # no volume's fault


def test_a_volume_that_changes_while_it_is_read_gets_no_entry(phantoms, tmp_path, monkeypatch):
    volume = tmp_path / "volume.nii.gz"
    volume.write_bytes(phantoms[0].read_bytes())

    def read_and_change(volume, **options):
        os.utime(volume.path, ns=(0, 1))
        return read_ct(volume, **options)

    monkeypatch.setattr(slice_cache, "read_ct", read_and_change)
    with pytest.raises(CTReadError, match="changed while it was read"):
        SliceCache(tmp_path / "cache", SamfImageProcessor(slices_per_plane=2, size=16)).get(volume)
    assert entry_stats(tmp_path / "cache") == {}


# ---- size and time -------------------------------------------------------------------------------------------------


def test_an_entry_of_slices_has_the_estimated_size(phantoms, tmp_path):
    for settings in ({"slices_per_plane": 2, "size": 16}, {"planes": ("axial",), "size": 64}):
        processor = SamfImageProcessor(**settings)
        cache = SliceCache(tmp_path, processor)
        cache.get(phantoms[0])
        assert cache.entry_path(phantoms[0]).stat().st_size == pytest.approx(entry_bytes(processor), rel=0.1, abs=300)
    whole = entry_bytes(SamfImageProcessor())
    assert whole == pytest.approx(72 * 3 * 224 * 224, rel=1e-3)
    estimate = str(Estimate(47_000, 47_000, 2_938, whole, 10**12, 16, seconds=7 * 3600.0, sample=16))
    assert "$HF_HOME" not in estimate
    assert "5 volumes are fetched, which is not counted" in str(Estimate(9, 7, 7, whole, 10**12, 1, fetched=5))
    assert "47000 volumes" in estimate and "10.8 MB: 509.5 GB more" in estimate and "7.0 hours" in estimate


def test_a_disk_that_is_too_small_is_refused_with_the_numbers_unless_forced(phantoms, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fill, "free_bytes", lambda _: 30_000)
    assert run(phantoms[0].parent, tmp_path / "cache") == 1
    message = capfd.readouterr().err
    assert "don't fit" in message and "8 to make" in message and "30.0 kB are free" in message
    assert not (tmp_path / "cache").exists()
    assert run(phantoms[0].parent, tmp_path / "cache", force=True) == 0


def test_a_dry_run_writes_nothing(phantoms, tmp_path, capsys):
    assert run(phantoms[0].parent, tmp_path / "cache", dry_run=True) == 0
    said = capsys.readouterr().out
    assert "8 volumes, 0 done or failed, 8 to make" in said and "by 3 volumes measured now" in said
    assert not (tmp_path / "cache").exists()


# ---- verifying -----------------------------------------------------------------------------------------------------


def test_verify_finds_one_flipped_bit_and_a_cut_end(phantoms, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert run(phantoms[0].parent, cache) == 0 and run(phantoms[0].parent, cache, verify=True) == 0
    assert "8 entries intact, 0 damaged, 0 unreadable, 0 missing" in capsys.readouterr().out
    flipped, cut, gone, *_ = sorted(cache.glob("??/*.safetensors"))
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    assert run(phantoms[0].parent, cache, verify=True) == 1
    said = capsys.readouterr().out
    assert f"damaged: {flipped}: checksum" in said and f"damaged: {cut}" in said
    assert "5 entries intact, 2 damaged, 0 unreadable, 1 missing" in said
    assert run(phantoms[0].parent, cache, verify="remove") == 1 and run(phantoms[0].parent, cache) == 0
    assert run(phantoms[0].parent, cache, verify=True) == 0
    assert_equals_extract(phantoms, cache)


def test_verify_leaves_an_entry_that_cannot_be_read_at_the_moment(phantoms, tmp_path, monkeypatch, capsys):
    """I/O errors, no rights, no free file handles, a worker that dies: none is known to be the entry's fault."""
    cache = tmp_path / "cache"
    assert run(phantoms[0].parent, cache) == 0
    files = sorted(cache.glob("??/*.safetensors"))
    before, numbers = entry_stats(cache), [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE]
    troubles = dict(zip((file.stem for file in files), numbers, strict=False))

    def map_entry(path, original=entries._map_entry):
        if path == files[len(numbers)]:
            os.kill(os.getpid(), signal.SIGKILL)
        if number := troubles.get(path.stem):
            raise OSError(number, os.strerror(number), str(path))
        return original(path)

    monkeypatch.setattr(entries, "_map_entry", map_entry)
    assert run(phantoms[0].parent, cache, verify="remove") == 1
    said = capsys.readouterr().out
    assert "3 entries intact, 0 damaged, 5 unreadable, 0 missing" in said
    assert f"unreadable: {files[0]}: [Errno {errno.EIO}]" in said
    assert entry_stats(cache) == before


# ---- what training finds -------------------------------------------------------------------------------------------


def write_table(path: Path, columns: Sequence[str], *lines: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *lines])


def test_entries_of_a_v1_folder_are_those_that_training_asks_for(tmp_path):
    """CT-RATE v1: raw values under a blank header, rescale in the metadata; one volume is no chest."""
    root, names = tmp_path / "CT-RATE/dataset", ["train_1_a_1", "train_2_a_1", "train_2_a_2", "valid_1_a_1"]
    for i, name in enumerate(names):
        split, patient, scan, _ = name.split("_")
        path = root / split / f"{split}_{patient}" / f"{split}_{patient}_{scan}" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = make_phantom(np.random.default_rng(i), voxel_mm=14).hu + np.int16(1024)
        nib.save(nib.Nifti1Image(raw, np.eye(4)), path)
    metadata = ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"]
    for split, ending in (("train", "train"), ("valid", "validation")):
        mine = [f"{name}.nii.gz" for name in names if name.startswith(split)]
        reports = [(name, "", "", "Lungs are clear.", "Normal.") for name in mine]
        columns = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
        write_table(root / f"radiology_text_reports/{ending}_reports.csv", columns, *reports)
        rescales = [(name, 1, -1024, "[14.0, 14.0]", 14.0) for name in mine]
        write_table(root / f"metadata/{ending}_metadata.csv", metadata, *rescales)
    (root / "metadata/no_chest_train.txt").write_text("train_2_a_2.nii.gz\n", encoding="utf-8")

    cache = tmp_path / "cache"
    assert run(tmp_path / "CT-RATE", cache) == 0
    assert manifest(cache)["done"] == 3
    store = SliceCache(cache, SamfImageProcessor(slices_per_plane=2, size=16))
    for split, count in (("train", 2), ("valid", 1)):
        asked = load_ct_rate(tmp_path / "CT-RATE", split)
        assert len(asked) == count
        assert all(store.has(volume_of(record)) for record in asked)
    volume = volume_of(asked[0])
    hu = read_ct(asked[0]["volume"], rescale=asked[0]["rescale"])
    np.testing.assert_array_equal(store.get(volume)["slices"], store.image_processor.extract(hu)["slices"])
    assert not store.has(volume.path)  # without the rescale it would be another entry


def test_any_folder_is_searched(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/b/1.nii.gz", "a/2.mha", "3.npz", "notes.md", ".hidden.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "series").mkdir()
    (tmp_path / "series/slice").write_bytes(bytes(128) + b"DICM")
    expected = [str(tmp_path / name) for name in ("3.npz", "a/2.mha", "a/b/1.nii.gz", "series")]
    assert find_volumes([str(tmp_path)]) == [VolumeRef(path) for path in expected]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="0 volumes under .*empty"):
        find_volumes([str(tmp_path / "empty")])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_volumes([str(tmp_path / "nowhere")])


def test_links_pipes_and_directories_of_discs_are_no_volumes(tmp_path):
    """A dangling link (an annexed file that isn't fetched) and a pipe are passed over; each folder comes once."""
    slice_head = bytes(128) + b"DICM"
    for name in ("annexed", "cd/DICOM/SE0", "loop/x", "old"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "annexed/0.dcm").symlink_to("nowhere")
    os.mkfifo(tmp_path / "annexed/1.dcm")
    (tmp_path / "cd/DICOMDIR").write_bytes(slice_head)
    (tmp_path / "cd/DICOM/SE0/IM0").write_bytes(slice_head)
    (tmp_path / "loop/x/a.nii.gz").write_bytes(b"")
    (tmp_path / "loop/x/up").symlink_to("..")
    # Without a preamble: group 8, element 5, a value of CS.
    (tmp_path / "old/IM0").write_bytes(b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100" + bytes(200))
    expected = [str(tmp_path / name) for name in ("cd/DICOM/SE0", "loop/x/a.nii.gz", "old")]
    assert find_volumes([str(tmp_path)]) == [VolumeRef(path) for path in expected]


def test_a_folder_that_may_not_be_listed_is_left_out(tmp_path, monkeypatch, caplog):
    def scandir(path, original=os.scandir):  # root, whom tests may run as, could list it
        if str(path).endswith("lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a.nii.gz").write_bytes(b"")
    assert find_volumes([str(tmp_path)]) == [VolumeRef(str(tmp_path / "a.nii.gz"))]
    assert "lost+found: cannot be listed" in caplog.text


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    SamfImageProcessor(slices_per_plane=2, size=16).save_pretrained(folder)
    return folder


def test_embeddings_are_those_that_training_asks_for_and_made_once(phantoms, encoder, tmp_path, monkeypatch, capsys):
    cache, data = tmp_path / "cache", [*phantoms[:3], tmp_path / "torn.nii.gz"]
    data[3].write_bytes(phantoms[3].read_bytes()[:500])
    options = {"embeddings": encoder, "device": "cpu", "on_error": "skip", "num_workers": 1}
    assert run(data, cache, dry_run=True, **options) == 0 and not cache.exists()
    assert "embeddings: 4 volumes" in capsys.readouterr().out
    assert run(data, cache, **options) == 0
    summary = manifest(cache, "embeddings.")
    assert summary["complete"] and (summary["done"], summary["failed"]) == (3, 1)
    assert "see failures.jsonl" in rows(cache / "embeddings.failures.jsonl")[0]["message"]

    text = {"model_type": "phi3", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"intermediate_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = build_slices_model(str(encoder), "auto")
    model = SamfForConditionalGeneration.from_pretrained(save_with_text(model, text, tmp_path / "model"))
    slices = SliceCache(cache, SamfImageProcessor.from_pretrained(encoder))
    trained = EmbeddingCache(cache, slices, model.model)
    for volume in phantoms[:3]:
        assert trained.has(volume)
        pixels = slices.image_processor(volume)["pixel_values"]
        with torch.no_grad():
            expected = model.model.encode_slices(pixels).last_hidden_state[0].numpy()
        np.testing.assert_allclose(trained.get(volume)["slice_embeddings"], expected, atol=1e-5)
    monkeypatch.setattr(EmbeddingCache, "encode", lambda *_: pytest.fail("a volume was embedded again"))
    trained.fill(phantoms[:3])


def save_with_text(model, text: dict, folder: Path) -> Path:
    """A whole SAMF model with this slice encoder, as training makes one."""
    torch.manual_seed(1)
    config = model.config.__class__(vision_config=model.config.vision_config, text_config=text, image_token_id=3)
    whole = SamfForConditionalGeneration(config)
    whole.model.slice_encoder.load_state_dict(model.slice_encoder.state_dict())
    whole.save_pretrained(folder)
    return folder


def test_slice_settings_count_by_a_name_on_the_hub(monkeypatch, tmp_path):
    """Those of a SAMF model and of our slice encoder; those for photographs aren't ours, and some have none."""
    ours = SamfImageProcessor(slices_per_plane=3, size=32)
    saved = {
        "me/samf": ("processor_config.json", {"image_processor": ours.to_dict()}),
        "me/encoder": ("preprocessor_config.json", ours.to_dict()),
        "me/vit": ("preprocessor_config.json", {"image_processor_type": "ViTImageProcessor"}),
        "me/bare": ("config.json", {}),
    }

    def cached_file(source, name, **_):
        file, settings = saved[source]
        if name != file:
            return None
        path = tmp_path / source.replace("/", "_")
        path.write_text(json.dumps(settings), encoding="utf-8")
        return str(path)

    monkeypatch.setattr(slice_settings, "cached_file", cached_file)
    own = {"me/samf": ours, "me/encoder": ours}
    monkeypatch.setattr(SamfImageProcessor, "from_pretrained", lambda name, **_: own[name])
    for name in saved:
        args = preprocess.parse_args(["data", "--cache=cache", f"--embeddings={name}"])
        expected = own.get(name, SamfImageProcessor())
        assert preprocess.build_image_processor(args).settings_hash() == expected.settings_hash(), name


def test_a_models_folder_has_its_slice_settings_within_those_of_its_processor(tmp_path):
    ours = SamfImageProcessor(slices_per_plane=3, size=32)
    saved = json.dumps({"image_processor": ours.to_dict(), "processor_class": "SamfProcessor"})
    (tmp_path / "processor_config.json").write_text(saved, encoding="utf-8")
    args = preprocess.parse_args(["data", "--cache=cache", f"--embeddings={tmp_path}"])
    assert preprocess.build_image_processor(args).settings_hash() == ours.settings_hash()


@pytest.mark.parametrize("slices", [None, 5])
def test_an_encoders_settings_for_photographs_are_not_slice_settings(slices, tmp_path):
    """A downloaded ViT has a preprocessor_config.json of its own, for three colours and one image."""
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 2, "size": 224}),
        encoding="utf-8",
    )
    expected = SamfImageProcessor() if slices is None else SamfImageProcessor(slices_per_plane=slices)
    found = slice_settings.load_image_processor(str(tmp_path), slices_per_plane=slices)
    assert found.settings_hash() == expected.settings_hash()


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_a_lock_holds_between_processes_until_its_process_ends_however_it_ends(tmp_path):
    locks = EntryLocks(tmp_path / "claims.lock")

    def hold_and_sleep() -> int:
        with locks.hold("a1" * 20):
            (tmp_path / "held").touch()
            time.sleep(60)
        return 0

    process = in_a_fork(hold_and_sleep)
    while not (tmp_path / "held").exists():
        time.sleep(0.002)
    with locks.hold("a1" * 20) as ours, locks.hold("a2" * 20) as another:
        assert (ours, another) == (False, True)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with locks.hold("a1" * 20) as ours:
        assert ours


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("samf.cache.locks.fcntl.lockf", no_locks)
    for name in ("ab" * 20, "cd" * 20):
        with EntryLocks(tmp_path / "claims.lock").hold(name) as ours:
            assert ours
    assert caplog.text.count("has no locks") == 1


def _job(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        sys.exit(4)
    if number == 9:
        while True:
            pass
    return number * number


def test_a_pool_gives_every_job_one_answer(capfd):
    with WorkerPool(_job, 3, timeout=1.5) as pool:
        answers = dict(pool.map(range(30)))
        again = dict(pool.map([1, 3]))
    died = {number: answer.error for number, answer in answers.items() if isinstance(answer, WorkerDied)}
    assert died == {3: "ValueError", 5: "SIGKILL", 7: "WorkerExited", 9: "Timeout"}
    assert all(answers[number] == number * number for number in range(30) if number not in died)
    assert again[1] == 1 and again[3].message == "three"


def _leave_a_temporary_file(job: int) -> str:
    path = tempfile.mkstemp(prefix="samf-")[1]
    if job:
        os.kill(os.getpid(), signal.SIGKILL)
    return path


def test_temporary_files_of_workers_go_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with WorkerPool(_leave_a_temporary_file, 1) as pool:
        answers = dict(pool.map([1, 0]))
        (folder,) = tmp_path.iterdir()  # of the second worker: the first one's is gone
        assert answers[1].error == "SIGKILL" and list(folder.iterdir()) == [Path(answers[0])]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "busy",
    [0, pytest.param(60, marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a busy process"))],
)
def test_an_orphaned_worker_ends_by_itself(tmp_path, busy):
    """Only its parent is killed: it goes, with its lock, whether it has a volume or not."""

    def work(job: int) -> int:
        (tmp_path / "worker").write_text(str(os.getpid()), encoding="utf-8")
        time.sleep(busy)
        return job

    def parent() -> int:
        with WorkerPool(work, 1) as pool:
            list(pool.map([0]))
            time.sleep(60)
        return 0

    process = in_a_fork(parent)
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text(encoding="utf-8"):
        time.sleep(0.002)
    worker = int((tmp_path / "worker").read_text(encoding="utf-8"))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    deadline = time.monotonic() + 20
    while lives(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    if lives(worker):
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker lives on")


def lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_temporary_files_of_a_killed_run_go_when_they_are_old(tmp_path):
    folder = tmp_path / "ab"
    folder.mkdir()
    old, young = folder / ".x.safetensors.1.tmp", folder / ".y.safetensors.2.tmp"
    for file in (old, young):
        file.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    assert Manifest(tmp_path, "slices").keys() == (set(), set())
    assert not old.exists() and young.exists()


def test_a_temporary_file_in_a_cache_that_is_read_only_stays(tmp_path, monkeypatch):
    (tmp_path / "ab").mkdir()
    old = tmp_path / "ab" / ".x.safetensors.1.tmp"
    old.touch()
    os.utime(old, (time.time() - 7200,) * 2)

    def read_only(self, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", read_only)
    assert Manifest(tmp_path, "slices").keys() == (set(), set())


def test_options_that_make_no_sense_are_errors(tmp_path, capsys):
    for option, message in (({"num_workers": 0}, "at least 1"), ({"timeout": -1}, "expected seconds")):
        with pytest.raises(SystemExit):
            run(tmp_path, tmp_path / "cache", **option)
        assert message in capsys.readouterr().err
    assert FillOptions().on_error == "raise"


def test_older_values_of_on_error_are_accepted_with_a_warning_and_others_are_errors(capsys):
    line = ["data", "--cache=cache"]
    for old in ("stop", "error"):
        with pytest.warns(FutureWarning, match="now 'raise'"):
            assert FillOptions(on_error=old).on_error == "raise"
        with pytest.warns(FutureWarning, match="now 'raise'"):
            assert preprocess.parse_args([*line, f"--on_error={old}"]).on_error == "raise"
    with pytest.warns(FutureWarning, match="now 'raise'"):
        assert preprocess.parse_args([*line, "--on_missing=error"]).on_missing == "raise"
    with pytest.raises(ValueError, match="expected one of raise, skip"):
        FillOptions(on_error="ignore")
    with pytest.raises(SystemExit):
        preprocess.parse_args([*line, "--on_error=ignore"])
    assert "expected one of raise, skip" in capsys.readouterr().err
