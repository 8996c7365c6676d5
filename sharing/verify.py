"""Check a push by what the Hub has at the pushed commit: checksums of all files, and loading in a fresh process."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm

from samf.sharing import load_back
from samf.sharing.errors import CheckError
from samf.sharing.hub import Pushed, hub_errors
from samf.sharing.saved_models import SavedModel

Check = Literal["none", "files", "load", "full"]
CHECKS: tuple[Check, ...] = ("none", "files", "load", "full")
_BLOCK = 1 << 22
_TAIL = 600  # characters of a process's last words


def check_files(api: HfApi, pushed: Pushed, folder: Path) -> int:
    """Compare the files at the pushed commit with a folder, by checksums, without downloading any; return their number.

    Args:
        api: the client.
        pushed: the commit.
        folder: what was uploaded.

    Raises:
        CheckError: a file is missing or differs, or there are weights that weren't uploaded.
    """
    with hub_errors(pushed.repo_id):
        entries = api.list_repo_tree(pushed.repo_id, revision=pushed.revision, recursive=True)
        there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    missing = sorted(files.keys() - there.keys())
    if missing:
        raise _mismatch(pushed, f"{missing[0]} is missing", len(missing))
    extra = sorted(name for name in there.keys() - files.keys() if "/" not in name and name.endswith(".safetensors"))
    if extra:
        raise _mismatch(pushed, f"{extra[0]} is there, and wasn't pushed", len(extra))
    sizes = {name: path.stat().st_size for name, path in files.items()}
    differs = sorted(name for name, size in sizes.items() if there[name].size != size)
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="comparing checksums", disable=None) as bar:
        for name, path in files.items():
            if name not in differs and _checksum(path, there[name], bar) is False:
                differs.append(name)
    if differs:
        raise _mismatch(pushed, f"{differs[0]} differs", len(differs))
    return len(files)


def _checksum(path: Path, entry: RepoFile, bar: tqdm) -> bool:
    """Return whether a file has the checksum that the Hub lists: SHA-256 of large files, else that of a Git blob."""
    digest = hashlib.sha256() if entry.lfs else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest() == (entry.lfs.sha256 if entry.lfs else entry.blob_id)


def _mismatch(pushed: Pushed, what: str, number: int) -> CheckError:
    more = f" (and {number - 1} more)" if number > 1 else ""
    return CheckError(
        f"{pushed.repo_id} at {pushed.revision}: not what was pushed: {what}{more}. Push again, and check who else pushes."
    )


def check_loading(api: HfApi, pushed: Pushed, saved: SavedModel, folder: Path, *, full: bool) -> Mapping[str, Any]:
    """Load the pushed commit in a fresh process by remote code, and return what it says.

    The process has an empty cache, so that everything comes from the Hub, and can't import this package. Without `full` it
    loads configuration, processor and code, builds the model without memory for its weights, and compares the names and
    shapes of its tensors with the headers of the weights on the Hub.

    Args:
        api: the client.
        pushed: the commit.
        saved: the model that was pushed.
        folder: what was uploaded.
        full: also download the weights, and compare the result of a forward pass with that of `folder`, which is loaded
            in a process of its own, so that memory holds one model at a time.

    Raises:
        CheckError: it doesn't load, or gives another result.
    """
    found = _run(api, pushed, [pushed.repo_id, pushed.revision, saved.kind, "full" if full else "outline"])
    if full:
        here = _run(api, pushed, [str(folder), "", saved.kind, "full"])
        if found["output"] != here["output"]:
            raise CheckError(
                f"{pushed.repo_id} at {pushed.revision}: loads, but gives other results than {saved.folder}: a forward pass "
                f"has the digest {found['output']}, here {here['output']}."
            )
    return found


def _run(api: HfApi, pushed: Pushed, arguments: list[str]) -> dict[str, Any]:
    """Run `load_back.py` with a cache of its own and return the JSON that it prints."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "HF_HUB_CACHE": f"{cache}/hub",
            "HF_MODULES_CACHE": f"{cache}/modules",
            "HF_ENDPOINT": api.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONUTF8": "1",
        }
        if isinstance(api.token, str):
            environment["HF_TOKEN"] = api.token
        command = [sys.executable, str(Path(load_back.__file__)), *arguments]
        done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        last = " ".join(done.stderr.strip().rpartition("\n")[2].split())[:_TAIL]
        raise CheckError(f"{pushed.repo_id} at {pushed.revision}: pushed, but doesn't load in a fresh process: {last}")
    return dict(json.loads(done.stdout.strip().rpartition("\n")[2]))
