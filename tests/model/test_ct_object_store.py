"""Files and folders in an object store: what is fetched, once, and what errors say. The store is in memory."""

import logging
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from dicom_series import stack_positions, write_series
from store_stand_ins import BUCKET, nifti_bytes, use_memory_store

from samf.model import ct_download, ct_object_store
from samf.model.ct_common import DownloadError
from samf.model.ct_object_store import stored_state
from samf.model.ct_volume import CTReadError, read_ct


@pytest.fixture
def store(tmp_path, monkeypatch):
    return use_memory_store(tmp_path, monkeypatch)


def test_an_object_is_fetched_once_and_again_when_it_changed(store):
    address = store.put("a/scan.nii.gz", nifti_bytes())
    first = read_ct(address)
    assert first.shape == (5, 4, 3) and first.source == address
    np.testing.assert_array_equal(read_ct(address.replace("memory", "MEMORY")).hu, first.hu)
    assert store.fetched == [address]
    store.put("a/scan.nii.gz", nifti_bytes(100))
    np.testing.assert_array_equal(read_ct(address).hu, first.hu + 100)
    assert store.fetched == [address] * 2


def test_a_folder_of_slices_and_a_zip_of_them_are_the_series(store, tmp_path):
    folder = write_series(tmp_path / "series", stack_positions(6))
    expected = read_ct(folder)
    address = store.put_folder("study/ct", folder)
    store.put("study/ct/.hidden", b"no slice")
    with zipfile.ZipFile(tmp_path / "study.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    zipped = store.put("study.zip", (tmp_path / "study.zip").read_bytes())
    for name in (address, f"{address}/", zipped):
        found = read_ct(name)
        np.testing.assert_array_equal(found.hu, expected.hu)
        np.testing.assert_array_equal(found.affine, expected.affine)
    assert store.fetched == [address, zipped]
    moved = sorted(folder.iterdir())[-1]
    store.system.rm(f"/bucket/study/ct/{moved.name}")  # one slice fewer: another volume
    assert read_ct(address).shape[2] == 5
    assert store.fetched == [address, zipped, address]


def test_of_several_readers_one_fetches_and_the_others_wait(store):
    address, together = store.put("scan.nii.gz", nifti_bytes()), threading.Barrier(4)

    def read(_):
        together.wait()
        return read_ct(address).shape

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, range(4))) == [(5, 4, 3)] * 4
    assert store.fetched == [address]


def test_what_is_fetched_for_a_moment_is_deleted_unless_it_was_there(store, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, second = (store.put(f"{name}.nii.gz", nifti_bytes()) for name in "ab")
    read_ct(first)  # and kept
    for address in (first, second):
        with ct_download.not_kept(address):
            assert read_ct(address).shape == (5, 4, 3)
    assert store.fetched == [first, second]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert len(list(tmp_path.rglob("volume"))) == 1


def test_an_object_that_changes_while_it_is_fetched_is_refused_and_not_kept(store, monkeypatch):
    address = store.put("scan.nii.gz", nifti_bytes())
    system = ct_object_store._file_system

    class Changing:
        def __getattr__(self, name):
            return getattr(system(address), name)

        def get(self, *args):
            system(address).get(*args)
            store.put("scan.nii.gz", nifti_bytes(1))  # of the same size

    monkeypatch.setattr(ct_object_store, "_file_system", lambda _: Changing())
    with pytest.raises(DownloadError, match="scan.nii.gz: changed while it was fetched") as error:
        read_ct(address)
    assert error.value.is_temporary
    monkeypatch.setattr(ct_object_store, "_file_system", system)
    np.testing.assert_array_equal(read_ct(address).hu - 1, read_ct(address).hu - 1)
    assert len(store.fetched) == 2


def test_too_much_is_not_fetched(store, monkeypatch):
    address = store.put("scan.nii.gz", nifti_bytes())
    monkeypatch.setenv("SAMF_MAX_DOWNLOAD_BYTES", "100")
    with pytest.raises(CTReadError, match=r"scan\.nii\.gz: \d+ bytes; at most 100 are fetched"):
        read_ct(address)
    assert store.fetched == []


def test_what_is_not_there_stays_away(store):
    for address in (f"{BUCKET}/absent.nii.gz", "memory://nowhere/scan.nii.gz"):
        with pytest.raises(DownloadError, match=f"{address}: there is no such file or folder") as error:
            read_ct(address)
        assert not error.value.is_temporary
    for address in ("memory://", "memory:///scan.nii.gz"):
        with pytest.raises(CTReadError, match="names no bucket; expected memory://bucket/path"):
            read_ct(address)


class NoCredentialsError(Exception):
    """As botocore has it."""


class HttpError(Exception):
    """As gcsfs has it."""

    code = 403


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (PermissionError("SignatureDoesNotMatch: X-Amz-Signature=HUSH"), "no access .PermissionError.*credentials"),
        (NoCredentialsError("HUSH"), "no access .NoCredentialsError"),
        (HttpError("token HUSH"), "no access .HttpError"),
        (ConnectionRefusedError(111, "Connection refused"), "cannot be fetched .ConnectionRefusedError: Conn.*network"),
        (RuntimeError("https://host/?X-Amz-Signature=HUSH"), "cannot be fetched .RuntimeError"),
    ],
)
def test_errors_say_what_to_do_and_quote_no_request(store, monkeypatch, caplog, raised, words):
    caplog.set_level(logging.DEBUG)
    address = store.put("scan.nii.gz", nifti_bytes())

    def fail(_):
        raise raised

    monkeypatch.setattr(ct_object_store, "_file_system", fail)
    with pytest.raises(DownloadError, match=f"{address}: {words}") as error:
        read_ct(address)
    assert error.value.is_temporary and "\n" not in str(error.value)
    assert "HUSH" not in str(error.value) + caplog.text


def test_without_the_store_the_kept_copy_serves(store, monkeypatch, caplog):
    address = store.put("scan.nii.gz", nifti_bytes())
    first = read_ct(address)

    def fail(_):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(ct_object_store, "_file_system", fail)
    np.testing.assert_array_equal(read_ct(address).hu, first.hu)
    assert "reads the copy in the cache" in caplog.text
    monkeypatch.setattr(ct_download.constants, "HF_HUB_OFFLINE", True)
    np.testing.assert_array_equal(read_ct(address).hu, first.hu)
    with pytest.raises(CTReadError, match="HF_HUB_OFFLINE is set"):
        read_ct(f"{BUCKET}/other.nii.gz")


@pytest.mark.parametrize(("address", "package"), [("s3://bucket/a.nii", "s3fs"), ("gs://bucket/a.nii", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch, tmp_path, address, package):
    monkeypatch.setattr(ct_download.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    with pytest.raises(CTReadError, match=f"^{address}: .*pip install {package}$"):
        read_ct(address)


def test_names_that_lead_out_of_the_folder_are_refused(store, tmp_path):
    store.put("study/ct/1", b"a slice")
    state = stored_state(f"{BUCKET}/study/ct")
    (file,) = state.files
    for name in ("../../evil", "a/../b", "a\\b"):
        evil = type(state)((file._replace(name=name),), is_folder=True)
        with pytest.raises(CTReadError, match="an object's name holds"):
            ct_object_store.download_stored(f"{BUCKET}/study/ct", evil, tmp_path / name.replace("/", "_") / "volume")
