"""Caches of volumes in object stores: filled from a bucket, once per machine, and again for what changed.

Most tests use a store in memory, which forked workers share; those of S3's own protocol need a server.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import launch
import numpy as np
import pytest
from store_stand_ins import BUCKET, nifti_bytes, s3_server, use_memory_store

from samf import preprocess
from samf.cache import volume_list
from samf.cache.slice_cache import SliceCache
from samf.cli.scans import find_scans, report_names
from samf.model import ct_download, ct_object_store
from samf.model.ct_common import CTReadError
from samf.model.image_processing_samf import SamfImageProcessor
from samf.phantoms.dataset import make_phantom, write_nifti
from samf.training.arguments import DataArguments

_FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[bytes]:
    """Three small chests as NIfTI files."""
    folder = tmp_path_factory.mktemp("scans")
    phantom = make_phantom(np.random.default_rng(0), voxel_mm=14)
    files = [folder / f"{k}.nii.gz" for k in range(3)]
    for k, file in enumerate(files):
        write_nifti(type(phantom)(phantom.hu + np.int16(k), phantom.affine, {}, {}), file)
    return [file.read_bytes() for file in files]


@pytest.fixture
def store(tmp_path, monkeypatch):
    return use_memory_store(tmp_path, monkeypatch)


def run(cache: Path, *options: str) -> int:
    """Fill a cache in this process, as a new process would: without what is known of the store."""
    ct_object_store._states.clear()
    small = ["--slices_per_plane=2", "--image_size=16", "--num_workers=2"]
    return preprocess.main([*options, f"--cache={cache}", *small])


def summary(cache: Path) -> dict:
    return json.loads((cache / "manifest.json").read_text(encoding="utf-8"))


def failures(cache: Path) -> dict[str, str]:
    rows = map(json.loads, (cache / "failures.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["volume"]: row["message"] for row in rows}


def test_a_bucket_fills_a_cache_and_a_changed_object_gets_an_entry_of_its_own(store, scans, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for k, scan in enumerate(scans):
        store.put(f"scans/{k}.nii.gz", scan)
    cache = tmp_path / "cache"
    assert run(cache, f"{BUCKET}/scans") == 0
    assert (summary(cache)["done"], summary(cache)["complete"]) == (3, True)
    entries = set(cache.glob("??/*.safetensors"))
    assert run(cache, f"{BUCKET}/scans") == 0 and set(cache.glob("??/*.safetensors")) == entries
    store.put("scans/1.nii.gz", scans[2])
    assert run(cache, f"{BUCKET}/scans") == 0
    assert len(set(cache.glob("??/*.safetensors")) - entries) == 1 and summary(cache)["done"] == 3
    assert not list(tmp_path.rglob("volume"))  # nothing of the downloads is left


def test_what_is_absent_fails_and_what_is_out_of_reach_is_left_to_the_next_run(store, scans, tmp_path, monkeypatch):
    store.put("tables/scans/good.nii.gz", scans[0])
    store.put("tables/scans/torn.nii.gz", scans[1][:200])
    rows = "\n".join(f'{{"scan": "scans/{name}.nii.gz"}}' for name in ("good", "torn", "absent", "closed"))
    table = store.put("tables/all.jsonl", rows.encode())
    system, cache = ct_object_store._file_system, tmp_path / "cache"

    def guarded(address):
        if "closed" in address:
            raise PermissionError("ExpiredToken")
        return system(address)

    options = (table, "--volume_column=scan", "--on_error=skip")
    with monkeypatch.context() as patched:
        patched.setattr(ct_object_store, "_file_system", guarded)
        assert run(cache, *options) == preprocess.TRY_AGAIN
    assert (summary(cache)["done"], summary(cache)["failed"], summary(cache)["pending"]) == (1, 2, 1)
    found = failures(cache)
    assert "there is no such file" in found[f"{BUCKET}/tables/scans/absent.nii.gz"]
    assert f"{BUCKET}/tables/scans/torn.nii.gz" in found
    store.put("tables/scans/closed.nii.gz", scans[2])
    assert run(cache, *options) == 0
    assert (summary(cache)["done"], summary(cache)["failed"], summary(cache)["pending"]) == (2, 2, 0)


def test_a_store_that_gives_nothing_ends_the_run_in_one_line(store, tmp_path, monkeypatch, capsys):
    asked = []

    def refuse(address):
        asked.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(ct_object_store, "_file_system", refuse)
    (tmp_path / "list.txt").write_text("".join(f"{BUCKET}/{k}.nii.gz\n" for k in range(500)), encoding="utf-8")
    for source in (str(tmp_path / "list.txt"), f"{BUCKET}/folder", f"{BUCKET}/table.csv"):
        assert run(tmp_path / "cache", source, "--on_error=skip") == preprocess.TRY_AGAIN
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1 and told[0].startswith(BUCKET) and "Check the address, the endpoint" in told[0]
    assert len(asked) < 2 * volume_list._MOST_UNREACHED + volume_list.STAT_THREADS
    monkeypatch.undo()
    use_memory_store(tmp_path, monkeypatch)
    assert run(tmp_path / "cache", "memory://nowhere/folder") == 1
    assert "memory://nowhere/folder: there is no such file or folder" in capsys.readouterr().err


def test_processes_that_share_a_cache_fetch_a_volume_once(store, scans, tmp_path, monkeypatch):
    address, log = store.put("scan.nii.gz", scans[0]), tmp_path / "fetched.txt"
    download = ct_download.download_stored

    def noted(*args):
        with log.open("a", encoding="utf-8") as file:
            file.write("fetched\n")
        time.sleep(0.2)  # the others come meanwhile
        download(*args)

    monkeypatch.setattr(ct_download, "download_stored", noted)
    cache = SliceCache(tmp_path / "cache", SamfImageProcessor(slices_per_plane=2, size=16))
    together = _FORK.Barrier(3)

    def get() -> None:
        together.wait()
        cache.get(address)

    processes = [_FORK.Process(target=get) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text(encoding="utf-8") == "fetched\n"


def test_a_volume_that_changes_while_it_is_read_gets_no_entry(store, tmp_path, monkeypatch):
    address = store.put("scan.nii.gz", nifti_bytes())
    cache = SliceCache(tmp_path / "cache", SamfImageProcessor(slices_per_plane=2, size=16))
    entry = cache.entry_path(address)
    store.put("scan.nii.gz", nifti_bytes(1))
    with pytest.raises(CTReadError, match="scan.nii.gz: changed while it was read"):
        cache.get(address)
    assert cache.entry_path(address) != entry and not list(tmp_path.rglob("*.safetensors"))


def test_a_signed_address_is_told_without_its_signature(tmp_path, capsys, monkeypatch):
    """In messages, in the cache's lists, and in the names of reports."""
    monkeypatch.setattr(ct_download.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(ct_download.constants, "HF_HUB_OFFLINE", False)
    address, cache = "http://user:HUSH@127.0.0.1:9/scan.nii.gz?X-Amz-Signature=HUSH", tmp_path / "cache"
    (tmp_path / "list.txt").write_text(f"{address}\n", encoding="utf-8")
    assert run(cache, str(tmp_path / "list.txt"), "--on_error=skip") == preprocess.TRY_AGAIN
    told = "".join(capsys.readouterr()) + "".join(file.read_text(encoding="utf-8") for file in cache.rglob("*.json*"))
    assert "http://127.0.0.1:9/scan.nii.gz" in told and "HUSH" not in told.replace(str(tmp_path), "")
    assert report_names(find_scans([address])) == {address: "scan"}


def test_a_cache_is_a_folder_on_a_disk(tmp_path, capsys):
    words = "s3://bucket/slices: a cache is a folder on a disk"
    with pytest.raises(SystemExit):
        preprocess.main(["data", "--cache=s3://bucket/slices"])
    told = capsys.readouterr().err
    assert words in told and "Fill one on a local disk" in told
    with pytest.raises(ValueError, match=words):
        DataArguments(data="data", slice_cache="s3://bucket/slices")
    with pytest.raises(ValueError, match=words):
        SliceCache("s3://bucket/slices", SamfImageProcessor(slices_per_plane=2, size=16))


# ---- a server of S3 --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bucket_of_a_server_fills_a_cache(scans, tmp_path):
    """In processes of their own, with the server's address and keys from their environment; no key is written or told."""
    with s3_server(tmp_path / "home") as server:
        for k, scan in enumerate(scans):
            server.put(f"cohort/{k}.nii.gz", scan)
        cache = tmp_path / "cache"

        def call(*sources: str, expected: int = 0, **environment: str) -> str:
            command = [sys.executable, str(launch.REPOSITORY / "preprocess.py"), *sources, f"--cache={cache}"]
            command += ["--slices_per_plane=2", "--image_size=16", "--num_workers=2", "--on_error=skip"]
            done = subprocess.run(
                command,
                env={**launch.environment(), **server.environment, **environment},
                capture_output=True,
                text=True,
            )
            assert done.returncode == expected, done.stderr[-3000:]
            assert "of-tests" not in done.stdout + done.stderr
            return done.stderr

        call("s3://scans/cohort")
        assert summary(cache)["done"] == 3
        assert [server.fetched(f"cohort/{k}.nii.gz") for k in range(3)] == [1, 1, 1]
        server.put("cohort/1.nii.gz", scans[2])
        call("s3://scans/cohort")
        assert [server.fetched(f"cohort/{k}.nii.gz") for k in range(3)] == [1, 2, 1]
        assert "s3://nowhere/cohort: there is no bucket nowhere" in call("s3://nowhere/cohort", expected=1)
        gone = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
        told = call("s3://scans/cohort", expected=preprocess.TRY_AGAIN, **gone)
        assert "s3://scans/cohort: cannot be fetched (EndpointConnectionError)" in told
        keyless = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": str(tmp_path)}
        told = call("s3://scans/cohort", expected=preprocess.TRY_AGAIN, **keyless)
        assert "no access (NoCredentialsError)" in told and "AWS_PROFILE" in told
    assert not any("of-tests" in path.read_text(errors="replace") for path in cache.rglob("*.json*"))


@pytest.mark.slow
def test_workers_of_a_server_and_large_objects(scans, tmp_path, monkeypatch):
    """Forked from a process that has used s3fs; and an object that s3fs fetches in parts is the same."""
    with s3_server(tmp_path / "home") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(ct_download.constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(ct_download.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(ct_object_store, "_states", {})
        large = os.urandom(120 << 20)
        assert ct_download.local_copy(server.put("large.bin", large)).read_bytes() == large
        address = server.put("scan.nii.gz", scans[0])
        cache = SliceCache(tmp_path / "cache", SamfImageProcessor(slices_per_plane=2, size=16))
        cache.entry_path(address)
        processes = [_FORK.Process(target=cache.get, args=(address,)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert server.fetched("scan.nii.gz") == 1
