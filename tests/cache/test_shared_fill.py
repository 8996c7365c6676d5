"""Several processes fill one slice cache: what one of them sees late is not lost, and none is left waiting."""

import faulthandler
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from samf.cache import slice_cache, volume_list
from samf.cache.manifest import Manifest, inspect_volumes
from samf.cache.slice_cache import SliceCache, entry_file
from samf.data.volume_discovery import SourceOptions
from samf.model.ct_volume import CTReadError, VolumeRef, read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.phantoms.dataset import make_phantom, write_nifti
from samf.pretraining.scans import readable_scans
from samf.training import slice_filling
from samf.training.slice_filling import fill_slice_cache
from samf.utils.distributed import Processes

LATE = 0.3  # seconds from its first look on after which the second process sees what the first has written


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    """Seven scans by CT-RATE's names, three of which are held-out patients'."""
    folder = tmp_path_factory.mktemp("volumes")
    write_nifti(make_phantom(np.random.default_rng(0), voxel_mm=20), folder / "train_0_a_1.nii.gz")
    for number in range(1, 7):
        shutil.copy(folder / "train_0_a_1.nii.gz", folder / f"train_{number}_a_1.nii.gz")
    return folder


def cache_at(folder: Path) -> SliceCache:
    return SliceCache(folder, SamfImageProcessor(size=16, slices_per_plane=2))


def keys_below(folder: Path) -> list:
    return [VolumeRef(str(file)) for file in sorted(folder.glob("*.nii.gz"))]


def _two_processes(rank: int, work: Callable, arguments: tuple, store: str, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        if rank == 1:
            _see_late()
        answers.put((rank, work(*arguments)))
    except Exception as error:  # noqa: BLE001 - the test looks at it
        answers.put((rank, error))
    finally:
        dist.destroy_process_group()


def _see_late() -> None:
    """As on a network file system: looking takes longer, and new files are seen late."""
    identity, has_file = volume_list.volume_identity, slice_filling._has_file
    first_look: dict[Path, float] = {}

    def slow(path):
        time.sleep(0.02)
        return identity(path)

    def late(cache, volume):
        place = entry_file(cache.folder, str(volume.key))
        is_seen = time.monotonic() - first_look.setdefault(place, time.monotonic()) > LATE
        return has_file(cache, volume) and (is_seen or _makes(place))

    volume_list.volume_identity, slice_filling._has_file = slow, late


def _makes(entry: Path) -> bool:
    """Whether a log of this process mentions the entry: a process sees its own files at once."""
    logs = (entry.parent.parent / "log").glob(f"slices-2of2-*-{os.getpid()}-*.jsonl")
    return any(entry.stem in log.read_text(encoding="utf-8") for log in logs)


def in_two_processes(work: Callable, *arguments: Any, folder: Path) -> list:
    """What `work` gives or raises on each of two processes."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    store = str(folder / f"store-{time.time_ns()}")
    started = [context.Process(target=_two_processes, args=(rank, work, arguments, store, answers)) for rank in (0, 1)]
    for process in started:
        process.start()
    found = dict(answers.get(timeout=120) for _ in started)
    for process in started:
        process.join()
    return [found[0], found[1]]


def test_no_process_takes_what_it_sees_late_for_missing(volumes, tmp_path):
    keys = keys_below(volumes)
    kept = in_two_processes(fill_slice_cache, cache_at(tmp_path / "cache"), keys, folder=tmp_path)
    assert kept == [keys, keys]


def _scans(volumes: Path, cache: SliceCache) -> dict:
    scans = readable_scans([str(volumes)], cache, on_error="skip", valid_share=0.4, options=SourceOptions())
    return {split: [scan.scan_id for scan in own] for split, own in scans.items()}


def test_both_processes_have_the_same_scans_though_one_finds_fewer_files(volumes, tmp_path):
    """A file that can't be read is left out on both; the patients held out are the same."""
    folder = tmp_path / "volumes"
    shutil.copytree(volumes, folder)
    (folder / "train_3_a_1.nii.gz").write_bytes(b"no volume")
    first, second = in_two_processes(_scans, folder, cache_at(tmp_path / "cache"), folder=tmp_path)
    assert first == second and (len(first["train"]), len(first["valid"])) == (4, 2)
    assert "train_3_a" not in first["train"] + first["valid"]


def test_what_one_process_cannot_read_stops_both(volumes, tmp_path):
    folder = tmp_path / "volumes"
    shutil.copytree(volumes, folder)
    (folder / "train_5_a_1.nii.gz").write_bytes(b"no volume")  # in the second one's share
    errors = in_two_processes(fill_slice_cache, cache_at(tmp_path / "cache"), keys_below(folder), folder=tmp_path)
    for error in errors:
        assert isinstance(error, CTReadError) and "train_5_a_1" in str(error)
    assert not list((tmp_path / "cache/log").glob(".*"))


def _fill_slowly(cache: SliceCache, keys: list) -> int:
    """The first process reads nothing until the second one has failed; how many entries there are then."""

    def read(volume, **options):
        given_up = time.monotonic() + 60
        while Processes().is_first and not list((cache.folder / "log").glob(".*.stopped")):
            assert time.monotonic() < given_up
            time.sleep(0.02)
        return read_ct(volume, **options)

    slice_cache.read_ct = read
    try:
        fill_slice_cache(cache, keys)
    except CTReadError:
        return len(list(cache.folder.glob("??/*.safetensors")))
    return -1


def test_a_process_does_not_finish_its_share_when_another_has_failed(volumes, tmp_path, monkeypatch):
    monkeypatch.setattr(slice_filling, "usable_cores", lambda: 1)
    keys = [VolumeRef(str(tmp_path / f"{number}.nii.gz")) for number in range(8)]
    for number, path in enumerate(key.path for key in keys):
        Path(path).write_bytes(b"no volume") if number % 2 else shutil.copy(keys_below(volumes)[0].path, path)
    made = in_two_processes(_fill_slowly, cache_at(tmp_path / "cache"), keys, folder=tmp_path)
    assert 0 <= min(made) <= max(made) <= 2  # of four: the one that was being read, and the next


def _unequal() -> None:
    processes = Processes()
    assert processes.from_first(lambda: (Processes().count, os.getpid())) == (1, processes.gather(os.getpid())[0])
    processes.check_equal("records", 7)
    processes.check_equal("records", 7 + processes.rank)


def test_different_numbers_of_records_stop_both(tmp_path):
    for error in in_two_processes(_unequal, folder=tmp_path):
        assert isinstance(error, ValueError) and "different numbers of records: 7, 8" in str(error)


class PrivateError(Exception):
    """One that can't be sent to another process, as those of web clients can't."""

    def __init__(self, response: Any):
        super().__init__("the server says no")
        self.response = lambda: response


def _fail_on_the_first() -> None:
    def look():
        raise PrivateError("403")

    Processes().from_first(look)


def test_what_fails_on_the_first_process_fails_on_both(tmp_path):
    for error in in_two_processes(_fail_on_the_first, folder=tmp_path):
        assert isinstance(error, RuntimeError) and "PrivateError: the server says no" in str(error)


def test_what_was_noted_as_deadly_is_not_read_again(volumes, tmp_path, monkeypatch):
    """Preprocessing saw it crash its reader or hang; a stage without guard would crash or hang with it."""
    keys, cache = keys_below(volumes), cache_at(tmp_path)
    manifest = Manifest(tmp_path, "slices")
    listed = inspect_volumes(keys, cache)
    for volume, reason in zip(listed[:2], ("SIGSEGV", "Timeout"), strict=True):
        manifest.note_failure(volume, reason, "noted before")

    def read(volume, **options):
        assert volume not in keys[:2]
        return read_ct(volume, **options)

    monkeypatch.setattr(slice_cache, "read_ct", read)
    assert fill_slice_cache(cache, keys, on_error="skip") == keys[2:]


def test_a_volume_that_crashes_or_hangs_its_reader_costs_only_itself(volumes, tmp_path, monkeypatch):
    keys = keys_below(volumes)

    def read(volume, **options):
        if volume == keys[0]:
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        if volume == keys[1]:
            time.sleep(60)
        return read_ct(volume, **options)

    monkeypatch.setattr(slice_cache, "read_ct", read)
    assert fill_slice_cache(cache_at(tmp_path), keys, on_error="skip", timeout=1) == keys[2:]
    with pytest.raises(CTReadError, match="train_[01]_a_1"):
        fill_slice_cache(cache_at(tmp_path), keys[:2], timeout=1)
