"""Addresses and zips: what is fetched and kept, and what is refused. The only network is this machine's own."""

import gzip
import importlib
import logging
import os
import tempfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_series import stack_positions, write_series
from huggingface_hub.errors import HfHubHTTPError

from samf.model import ct_download, ct_zip
from samf.model.ct_dicom_files import walk_once
from samf.model.ct_volume import CTReadError, read_ct, to_ct_volume


def nifti_bytes(shift: int = 0) -> bytes:
    array = (np.arange(5 * 4 * 3).reshape(5, 4, 3) + shift).astype(np.int16)
    return gzip.compress(nib.Nifti1Image(array, np.diag([-1, -1, 2, 1])).to_bytes())


class Handler(BaseHTTPRequestHandler):
    """Serves `site.files`: path → bytes; keeps count; knows ETags."""

    def __init__(self, site, *args):
        self.site = site
        super().__init__(*args)

    def do_GET(self):
        self.site.requests.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/moved"))
            self.end_headers()
            return
        data = self.site.files.get(path)
        if data is None:
            self.send_error(404)
            return
        tag = f'"{hash(data)}"'
        if self.site.tags and self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            self.end_headers()
            return
        self.send_response(200)
        if self.site.tags:
            self.send_header("ETag", tag)
        if self.site.declare is not None:
            self.send_header("Content-Length", str(len(data) + self.site.declare))
        self.end_headers()
        self.site.fetched.append(path)
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Site:
    def __init__(self):
        self.files, self.requests, self.fetched, self.tags, self.declare = {}, [], [], True, 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        seconds = 0.02  # between looks for the end
        threading.Thread(target=self.server.serve_forever, args=(seconds,), daemon=True).start()


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(ct_download.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(ct_download.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("SAMF_MAX_DOWNLOAD_BYTES", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


def cached(tmp_path):
    """Names of the files kept, without those of locks."""
    kept = (path for path in (tmp_path / "hf").rglob("*") if path.is_file() and path.parent.name != "locks")
    return sorted(path.name for path in kept)


# -------------------------------------------------------------------------------------------------------------- the web


def test_an_address_is_fetched_once_and_again_when_it_changed(site, tmp_path):
    site.files["/scan.nii.gz"] = nifti_bytes()
    url = f"{site.url}/scan.nii.gz"
    first = read_ct(url)
    assert first.shape == (5, 4, 3) and first.source == url
    np.testing.assert_array_equal(to_ct_volume(url).hu, first.hu)
    assert len(site.requests) == 2 and cached(tmp_path) == ["record.json", "volume"]  # asked again, not fetched again
    site.files["/scan.nii.gz"] = nifti_bytes(100)
    np.testing.assert_array_equal(read_ct(url).hu, first.hu + 100)
    np.testing.assert_array_equal(read_ct(f"{site.url}/moved/scan.nii.gz").hu, first.hu + 100)


def test_without_network_the_kept_copy_serves(site, tmp_path, monkeypatch, caplog):
    site.files["/scan.nii.gz"] = nifti_bytes()
    url = f"{site.url}/scan.nii.gz"
    first = read_ct(url)
    site.server.shutdown()
    site.server.server_close()
    np.testing.assert_array_equal(read_ct(url).hu, first.hu)
    assert "reads the copy in the cache" in caplog.text
    with pytest.raises(CTReadError, match="other.nii.gz: cannot be fetched"):
        read_ct(f"{site.url}/other.nii.gz")
    monkeypatch.setattr(ct_download.constants, "HF_HUB_OFFLINE", True)
    np.testing.assert_array_equal(read_ct(url).hu, first.hu)
    with pytest.raises(CTReadError, match="HF_HUB_OFFLINE is set"):
        read_ct(f"{site.url}/other.nii.gz")


def test_a_server_without_tags_is_read_anew(site):
    site.tags = False
    site.files["/scan.nii.gz"] = nifti_bytes()
    first = read_ct(f"{site.url}/scan.nii.gz")
    site.files["/scan.nii.gz"] = nifti_bytes(7)
    np.testing.assert_array_equal(read_ct(f"{site.url}/scan.nii.gz").hu, first.hu + 7)


@pytest.mark.parametrize("declare", [0, None])
def test_too_much_is_not_fetched(site, tmp_path, monkeypatch, declare):
    site.declare = declare
    site.files["/scan.nii.gz"] = nifti_bytes()
    monkeypatch.setenv("SAMF_MAX_DOWNLOAD_BYTES", "100")
    with pytest.raises(
        CTReadError, match=r"scan\.nii\.gz: \d+ bytes; at most 100 are fetched.*SAMF_MAX_DOWNLOAD_BYTES"
    ):
        read_ct(f"{site.url}/scan.nii.gz")
    assert cached(tmp_path) == []
    monkeypatch.setenv("SAMF_MAX_DOWNLOAD_BYTES", "many")
    with pytest.raises(CTReadError, match="expected a whole number"):
        read_ct(f"{site.url}/scan.nii.gz")


def test_a_download_cut_short_is_not_kept(site, tmp_path):
    site.declare = 50
    site.files["/scan.nii.gz"] = nifti_bytes()
    with pytest.raises(CTReadError, match="received .* bytes|cannot be fetched"):
        read_ct(f"{site.url}/scan.nii.gz")
    assert cached(tmp_path) == []


def test_of_several_readers_one_fetches_and_the_others_wait(site):
    site.files["/scan.nii.gz"] = nifti_bytes()
    url, together = f"{site.url}/scan.nii.gz", threading.Barrier(4)

    def read(_):
        together.wait()
        return read_ct(url).shape

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, range(4))) == [(5, 4, 3)] * 4
    assert site.fetched == ["/scan.nii.gz"] and len(site.requests) == 4


def test_a_cache_that_can_not_be_written_is_read(site, tmp_path, monkeypatch):
    site.files["/scan.nii.gz"] = nifti_bytes()
    url = f"{site.url}/scan.nii.gz"
    first = read_ct(url)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(ct_download, "WeakFileLock", refuse)
    np.testing.assert_array_equal(read_ct(url).hu, first.hu)


def test_errors_name_the_address_and_hide_its_keys(site, caplog):
    caplog.set_level(logging.INFO)
    site.files["/text"] = b"<html>please log in</html>" * 30
    secret = site.url.replace("http://", "http://user:SECRET@") + "/{}?token=SECRET"
    for name, words in {"absent": "the server says 404", "text": "found a web page"}.items():
        with pytest.raises(CTReadError, match=f"{site.url}/{name}: .*{words}") as error:
            read_ct(secret.format(name).replace("user:SECRET@", ""))
        assert "SECRET" not in str(error.value) + caplog.text
    with pytest.raises(CTReadError) as error:
        read_ct(secret.format("absent"))
    assert "SECRET" not in str(error.value) + caplog.text
    for nonsense in ("http://", "http://[::1", "https://host:port/x", "http://127.0.0.1:1/x"):
        with pytest.raises(CTReadError):
            read_ct(nonsense)


# -------------------------------------------------------------------------------------------------------------- the Hub


class Metadata:
    size = 1000


def test_hub_addresses(tmp_path, monkeypatch):
    asked = []
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(nifti_bytes())
    monkeypatch.setattr(ct_download, "get_hf_file_metadata", lambda url: Metadata)
    monkeypatch.setattr(ct_download.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(ct_download, "hf_hub_download", lambda **where: asked.append(where) or str(path))
    for address in ("hf://datasets/me/scans@v1.2/a/b.nii.gz", "hf://me/model/c.nii.gz"):
        assert read_ct(address).source == address
    assert asked == [
        {"repo_id": "me/scans", "filename": "a/b.nii.gz", "repo_type": "dataset", "revision": "v1.2"},
        {"repo_id": "me/model", "filename": "c.nii.gz", "repo_type": "model", "revision": None},
    ]
    monkeypatch.setenv("SAMF_MAX_DOWNLOAD_BYTES", "999")
    with pytest.raises(CTReadError, match="1000 bytes; at most 999"):
        read_ct("hf://me/model/c.nii.gz")


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    """Then the copy in the cache serves, if there is one."""
    transport = importlib.import_module(
        next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError").__module__.partition(".")[0]
    )

    def silent(*_, **__):
        raise transport.ReadTimeout("timed out")

    path = tmp_path / "scan.nii.gz"
    path.write_bytes(nifti_bytes())
    monkeypatch.setattr(ct_download.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(ct_download, "get_hf_file_metadata", silent)
    monkeypatch.setattr(ct_download, "hf_hub_download", lambda **_: str(path))
    assert read_ct("hf://me/model/c.nii.gz").shape == (5, 4, 3)
    monkeypatch.setattr(ct_download, "hf_hub_download", silent)
    with pytest.raises(CTReadError, match=r"hf://me/model/c.nii.gz: cannot be fetched \(ReadTimeout\)"):
        read_ct("hf://me/model/c.nii.gz")


def test_what_is_fetched_for_a_moment_is_deleted_unless_it_was_there(tmp_path, monkeypatch):
    """The Hub's cache keeps a file as a blob that a snapshot's link names."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ct_download.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(ct_download.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(ct_download, "get_hf_file_metadata", lambda url: Metadata)
    repository = tmp_path / "hub" / "datasets--me--scans"

    def download(filename: str, local_dir: str | None = None, **_: object) -> str:
        blob, link = repository / "blobs" / filename, repository / "snapshots" / ("0" * 40) / filename
        if local_dir is not None:
            link = blob = Path(local_dir, filename)
        for file in (blob, link, repository / "refs" / "main"):
            file.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(nifti_bytes())
        (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
        if blob != link and not link.is_symlink():
            link.symlink_to(os.path.relpath(blob, link.parent))
        return str(link)

    monkeypatch.setattr(ct_download, "hf_hub_download", download)
    first, second = (f"hf://datasets/me/scans/{name}.nii.gz" for name in "ab")
    read_ct(first)  # and kept
    for address in (first, second):
        with ct_download.not_kept(address):
            volume = read_ct(address)
            assert volume.shape == (5, 4, 3) and volume.source == address
    assert [file.name for file in tmp_path.rglob("*.nii.gz")] == ["a.nii.gz"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_hub_addresses_that_lead_nowhere(monkeypatch):
    for address in ("hf://", "hf://datasets/me", "hf://me/model", "hf://me//c.nii.gz", "hf://datasets/me/x"):
        with pytest.raises(CTReadError, match="expected hf://"):
            read_ct(address)
    monkeypatch.setattr(ct_download.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CTReadError, match=r"hf://datasets/nobody/nothing/scan.nii.gz: cannot be fetched"):
        read_ct("hf://datasets/nobody/nothing/scan.nii.gz")


# ------------------------------------------------------------------------------------------------------------------ zip


def zip_of(path, files, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_a_zip_of_dicom_slices_is_the_series(tmp_path):
    folder = write_series(tmp_path / "series")
    files = {f"study/{path.name}": path.read_bytes() for path in sorted(folder.iterdir(), reverse=True)}
    zipped = read_ct(zip_of(tmp_path / "study.zip", {"study/": b"", "study/readme.txt": b"text", **files}))
    expected = read_ct(folder)
    np.testing.assert_array_equal(zipped.hu, expected.hu)
    np.testing.assert_array_equal(zipped.affine, expected.affine)
    assert zipped.source == str(tmp_path / "study.zip")
    cut = {name: data[:-100] if name.endswith("3.dcm") else data for name, data in files.items()}
    with pytest.raises(CTReadError, match="cut.zip: .*cut short"):
        read_ct(zip_of(tmp_path / "cut.zip", cut))


@pytest.mark.parametrize("header", ["scan.mhd", "scan.nhdr"])
def test_a_zip_of_a_header_and_its_voxels(tmp_path, header):
    image = sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    image.SetSpacing((0.7, 0.8, 2.5))
    folder = tmp_path / "pair"
    folder.mkdir()
    sitk.WriteImage(image, str(folder / header))
    assert len(list(folder.iterdir())) == 2
    zipped = read_ct(
        zip_of(tmp_path / "pair.zip", {f"a/b/{path.name}": path.read_bytes() for path in folder.iterdir()})
    )
    expected = read_ct(folder / header)
    np.testing.assert_array_equal(zipped.hu, expected.hu)
    np.testing.assert_array_equal(zipped.affine, expected.affine)


def test_no_name_in_a_zip_leads_out_of_it(tmp_path):
    names = ("../../evil.nii.gz", "/tmp/evil.nii.gz", "..\\evil.nii.gz", "C:\\evil.nii.gz", "a" * 300, "evil.raw/../..")
    before = sorted(tmp_path.parent.rglob("*evil*"))
    for name in names:
        volume = read_ct(zip_of(tmp_path / "slip.zip", {name: nifti_bytes()}))
        assert volume.shape == (5, 4, 3)
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(CTReadError, match="a zip with 0 volumes"):
        read_ct(tmp_path / "link.zip")
    assert sorted(tmp_path.parent.rglob("*evil*")) == before


def test_zips_that_are_refused(tmp_path, monkeypatch):
    good = nifti_bytes()
    zip_of(tmp_path / "two.zip", {"a.nii.gz": good, "b.nii.gz": good})
    zip_of(tmp_path / "none.zip", {"a.txt": b"text"})
    data = zip_of(tmp_path / "good.zip", {"a.nii.gz": good}).read_bytes()
    (tmp_path / "cut.zip").write_bytes(data[: len(data) // 2])
    (tmp_path / "flipped.zip").write_bytes(data[:80] + bytes([data[80] ^ 4]) + data[81:])
    secret = bytearray(data)
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        secret[data.index(signature) + place] |= 1
    (tmp_path / "secret.zip").write_bytes(secret)
    for name, words in {
        "two": "2 volumes",
        "none": "0 volumes",
        "cut": "damaged",
        "flipped": "damaged",
        "secret": "encrypted",
    }.items():
        with pytest.raises(CTReadError, match=f"{name}.zip: .*{words}"):
            read_ct(tmp_path / f"{name}.zip")
    monkeypatch.setattr(ct_zip, "_MAX_BYTES", 10_000)
    zip_of(tmp_path / "bomb.zip", {"a.nii": bytes(1 << 20)})
    with pytest.raises(CTReadError, match="bomb.zip: 1 files, 1048576 bytes unpacked"):
        read_ct(tmp_path / "bomb.zip")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, where every disk is full")
def test_a_zip_for_which_there_is_no_room_is_not_called_damaged(tmp_path):
    path = zip_of(tmp_path / "scan.zip", {"scan.nii": nifti_bytes()})
    folder = tmp_path / "room"
    folder.mkdir()
    (folder / "000000").symlink_to("/dev/full")
    with pytest.raises(CTReadError, match="scan.zip: cannot be unpacked into .*room .No space left.*TMPDIR"):
        ct_zip.unpack_zip(path, folder)


def test_a_zip_that_lies_about_its_size_gives_no_more_than_it_claims(tmp_path):
    data = bytearray(zip_of(tmp_path / "lie.zip", {"a.nii": bytes(1 << 20)}).read_bytes())
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.index(signature) + place
        data[start : start + 4] = (100).to_bytes(4, "little")
    (tmp_path / "lie.zip").write_bytes(data)
    with pytest.raises(CTReadError, match="lie.zip: "):
        read_ct(tmp_path / "lie.zip")


def test_a_list_of_files(tmp_path):
    folder = write_series(tmp_path / "series", stack_positions(8))
    files = sorted(folder.iterdir())
    assert read_ct(files[2:6]).shape[2] == 4
    with pytest.raises(CTReadError, match="absent: no such file"):
        read_ct([*files, folder / "absent"])
    with pytest.raises(CTReadError, match="an empty list of files"):
        read_ct([])
    np.testing.assert_array_equal(to_ct_volume([str(file) for file in files]).hu, read_ct(folder).hu)


def test_files_of_a_list_that_are_no_dicom_are_named_for_what_they_are(tmp_path, caplog):
    files = sorted(write_series(tmp_path / "series").iterdir())
    (tmp_path / "scan.nii.gz").write_bytes(nifti_bytes())
    (tmp_path / "empty").touch()
    assert read_ct([*files, tmp_path / "scan.nii.gz", tmp_path / "empty"]).shape[2] == len(files)
    assert "left out 2 that are not DICOM files" in caplog.text
    with pytest.raises(
        CTReadError, match="scan.nii.gz and 0 more files: no CT series here .found 1 that are not DICOM"
    ):
        read_ct([tmp_path / "scan.nii.gz"])


def test_links_are_followed_and_those_that_lead_back_are_not(tmp_path, caplog):
    folder = write_series(tmp_path / "store" / "series")
    study = tmp_path / "study"
    study.mkdir()
    (study / "linked").symlink_to(folder)
    (folder / "back").symlink_to(study)
    assert read_ct(study).shape == read_ct(folder).shape
    assert "copies" not in caplog.text  # each slice was met once


def test_folders_are_walked_once_each(tmp_path):
    root = tmp_path / ".hidden itself"
    for name in ("b/2", "b/1", "a/3", ".trash/4", "b/.5"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "a" / "back").symlink_to(root)
    (root / "c").symlink_to(root / "b")
    (tmp_path / "elsewhere").mkdir()
    (root / "d").symlink_to(tmp_path / "elsewhere")
    walked = [(os.path.relpath(folder, root), names) for folder, names in walk_once(root)]
    assert walked == [(".", []), ("a", ["3"]), ("b", [".5", "1", "2"]), ("d", [])]
    with pytest.raises(FileNotFoundError):
        list(walk_once(root / "nothing"))


def test_a_folder_that_can_not_be_listed_is_no_folder_without_slices(tmp_path, monkeypatch):
    folder = write_series(tmp_path / "series")
    (folder / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CTReadError, match="closed: cannot be read .Permission denied"):
        read_ct(folder)


def test_what_is_no_path_at_all():
    for address in ("az://container/scan.nii", "ftp://host/scan.nii.gz"):
        with pytest.raises(CTReadError, match=f"{address}: an address of scheme .*expected .*http.*hf://, s3://"):
            read_ct(address)
    with pytest.raises(CTReadError, match="an empty path"):
        read_ct("")
    for nothing in (None, 3, b"scan.nii"):
        with pytest.raises(TypeError, match="expected a path, an address or a list of DICOM files"):
            read_ct(nothing)
