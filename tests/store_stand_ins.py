"""Object stores for tests: one in memory, which needs fsspec only, and a server of S3 on this machine.

The store in memory has addresses memory://bucket/path; `use_memory_store` lets the project take them as s3://. The server is
moto's, which isn't among the requirements of the tests: `pip install s3fs 'moto[server]'`.
"""

import gzip
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from samf.model import ct_download, ct_object_store

BUCKET = "memory://bucket"


def nifti_bytes(shift: int = 0) -> bytes:
    """Return a small volume whose voxels differ by `shift`."""
    array = (np.arange(5 * 4 * 3).reshape(5, 4, 3) + shift).astype(np.int16)
    return gzip.compress(nib.Nifti1Image(array, np.diag([-1, -1, 2, 1])).to_bytes(), mtime=0)


class _Tagged(MemoryFileSystem):
    """fsspec's files in memory, with ETags as stores have them."""

    cachable = False

    def info(self, path: str, **options: object) -> dict:
        return self._tagged(super().info(path, **options))

    def ls(self, path: str, detail: bool = True, **options: object) -> list:
        found = super().ls(path, detail=detail, **options)
        return [self._tagged(info) for info in found] if detail else found

    def find(self, path: str, detail: bool = False, **options: object) -> list | dict:
        found = super().find(path, detail=True, **options)
        return {name: self._tagged(info) for name, info in found.items()} if detail else list(found)

    def _tagged(self, info: dict) -> dict:
        if info["type"] == "directory":
            return info
        return {**info, "ETag": f'"{hashlib.md5(self.store[info["name"]].getvalue()).hexdigest()}"'}


class MemoryStore:
    """Files in memory; counts those fetched."""

    def __init__(self) -> None:
        self.system = _Tagged()
        self.fetched: list[str] = []

    def put(self, key: str, data: bytes) -> str:
        """Store an object and return its address."""
        self.system.pipe_file(f"/bucket/{key}", data)
        return f"{BUCKET}/{key}"

    def put_folder(self, key: str, folder: Path) -> str:
        """Store the files of a folder and return their folder's address."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(f"{key}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return f"{BUCKET}/{key}"


def use_memory_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Return an empty store; downloads go below `tmp_path`."""
    monkeypatch.setitem(ct_object_store.STORES, "memory", "fsspec")
    monkeypatch.setattr(ct_object_store, "_file_system", lambda _: _Tagged())
    monkeypatch.setattr(ct_object_store, "_states", {})
    monkeypatch.setattr(ct_download.constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(ct_download.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("SAMF_MAX_DOWNLOAD_BYTES", raising=False)
    store = MemoryStore()
    store.system.store.clear()
    store.system.pseudo_dirs[:] = [""]
    download = ct_download.download_stored

    def counted(address: str, *args: object) -> None:
        store.fetched.append(address)
        download(address, *args)

    monkeypatch.setattr(ct_download, "download_stored", counted)
    return store


class S3Server:
    """moto's server of S3, its client, and the environment of processes that use it."""

    def __init__(self, url: str, client: object, environment: dict[str, str]):
        self.url, self.client, self.environment = url, client, environment
        self.requests: list[str] = []  # "METHOD /bucket/key", as they came

    def put(self, key: str, data: bytes) -> str:
        """Store an object of the bucket "scans" and return its address."""
        self.client.put_object(Bucket="scans", Key=key, Body=data)
        return f"s3://scans/{key}"

    def fetched(self, key: str) -> int:
        """Return how often an object was fetched."""
        return self.requests.count(f"GET /scans/{key}")


@contextmanager
def s3_server(home: Path) -> Iterator[S3Server]:
    """Start a server with an empty bucket "scans"; without its packages the test is skipped.

    Args:
        home: the folder of $HF_HOME of the processes that use it.
    """
    for package in ("s3fs", "boto3", "moto.server"):
        pytest.importorskip(package, reason="needs a server of S3: pip install s3fs 'moto[server]'")
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.INFO)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "key-of-tests", "AWS_SECRET_ACCESS_KEY": "secret-of-tests"}
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **{k.lower(): v for k, v in keys.items()})
    client.create_bucket(Bucket="scans")
    environment = {**keys, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": url, "HF_HOME": str(home)}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    found = S3Server(url, client, {**os.environ, **environment})
    counter = _Requests(found.requests)
    logging.getLogger("werkzeug").addHandler(counter)
    try:
        yield found
    finally:
        logging.getLogger("werkzeug").removeHandler(counter)
        server.stop()


class _Requests(logging.Handler):
    """Collects the requests that the server logs."""

    def __init__(self, requests: list[str]):
        super().__init__()
        self._requests = requests

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage().split('"')
        if len(words) > 1:
            self._requests.append(" ".join(words[1].split()[:2]).partition("?")[0])
