"""Manifest, failure markers and work logs of a cache directory.

In addition to the entries, the directory gets for each stage ("slices", "embeddings"):

- `log/<stage>-….jsonl`: an append-only log per process, with one line per entry that it made;
- `ab/<entry>.failed.json`, next to where the entry would be: a volume that can't be read, which is not retried unless
  `--retry_failed` is set;
- `manifest.json`, `volumes.jsonl`, `failures.jsonl` and `passed_over.jsonl` (embeddings.manifest.json and so on): the
  state of the last list that was processed. Each process writes them when it ends, so that the last one leaves them
  complete. Passed over are files that were found in a folder, not named, and are no CT: masks, other modalities.

A volume is done when its entry exists: the logs only add which machine made it and how long it took.
"""

import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, NotRequired, TypeAlias, TypedDict, cast

import numpy as np

from samf.cache.entries import entry_file
from samf.cache.locks import EntryLocks
from samf.cache.volume_list import NOT_CT, STAT_THREADS, Shard, Volume, inspect_volumes
from samf.model.ct_volume import CTReadError
from samf.utils.files import TEMPORARY_SUFFIX, atomic_write, write_json

__all__ = ["Manifest", "ManifestSummary", "Origin", "Shard", "Stage", "Volume", "WorkLog", "inspect_volumes"]

logger = logging.getLogger(__name__)

Stage: TypeAlias = Literal["slices", "embeddings"]

_ABANDONED = 3600  # seconds after which a temporary file belongs to no running process
_MANIFEST = "f" * 15  # name of the lock on writing the manifest


class LogLine(TypedDict):
    """Line of a work log: an entry that a process made."""

    volume: str
    record: str  # the entry's name
    bytes: int
    seconds: float
    host: str
    time: str


class Failure(TypedDict):
    """Failure marker, and line of failures.jsonl and passed_over.jsonl."""

    volume: str
    rescale: Sequence[float] | None
    error: str  # name of an exception or signal
    message: str


class MadeEntry(TypedDict):
    """Line of volumes.jsonl; `seconds` and `host` are None if no log mentions the entry."""

    volume: str
    rescale: Sequence[float] | None
    record: str  # the entry's name
    bytes: int
    seconds: float | None
    host: str | None


class Seconds(TypedDict):
    """Statistics of the time per entry."""

    sum: float
    median: float | None
    longest: float | None


class Origin(TypedDict):
    """Data and settings that the entries were made of; `encoder` and `fingerprint` of embeddings only."""

    settings_hash: str
    extract_version: int
    data: NotRequired[list[str]]
    record_version: NotRequired[int]
    image_processor: NotRequired[dict[str, object]]
    min_coverage: NotRequired[float]
    encoder: NotRequired[str]
    fingerprint: NotRequired[str]


class ManifestSummary(Origin):
    """Content of manifest.json.

    `volumes` is the number of volumes of the list without those passed over; `failures` counts the failed ones by error,
    and `hosts` the done ones by machine.
    """

    complete: bool
    volumes: int
    done: int
    failed: int
    pending: int
    passed_over: int
    failures: dict[str, int]
    bytes: int
    seconds: Seconds
    hosts: dict[str, int]
    written: str


class EntryNames(NamedTuple):
    """Names of the entries in a cache directory, and of those whose volume failed."""

    done: set[str]
    failed: set[str]


class Manifest:
    """State of one stage of a cache directory: entries, failures, logs and manifest. Can be pickled, for workers.

    Args:
        folder: the cache directory.
        stage: "slices" or "embeddings".
    """

    def __init__(self, folder: str | os.PathLike, stage: Stage):
        self.folder, self.stage = Path(folder), stage
        self.locks = EntryLocks(self.folder / "claims.lock")

    def path(self, name: str) -> Path:
        """Return the file of manifest.json, volumes.jsonl, failures.jsonl or passed_over.jsonl."""
        return self.folder / (name if self.stage == "slices" else f"{self.stage}.{name}")

    def entry(self, key: str) -> Path:
        """Return the file of an entry."""
        return entry_file(self.folder, key)

    def marker(self, key: str) -> Path:
        """Return the file that marks an entry's volume as failed."""
        return self.folder / key[:2] / f"{key}.failed.json"

    def keys(self) -> EntryNames:
        """Return the names of all entries and of all failures, by listing 256 directories instead of looking up each.

        Removes temporary files that killed runs left behind.
        """
        done, failed = set(), set()
        for folder in self.folder.glob("??"):
            for file in os.scandir(folder):
                name, _, suffix = file.name.partition(".")
                if suffix == "safetensors":
                    done.add(name)
                elif suffix == "failed.json":
                    failed.add(name)
                elif suffix.endswith(TEMPORARY_SUFFIX):
                    _remove_if_abandoned(Path(file.path))
        return EntryNames(done, failed - done)

    def failure(self, key: str) -> Failure | None:
        """Return the failure marker of an entry, if there is one."""
        marker = self.marker(key)
        try:
            return cast(Failure, json.loads(marker.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except ValueError:
            return {"volume": "", "rescale": None, "error": "unknown", "message": f"{marker} is damaged"}

    def passed_over(self, volumes: Sequence[Volume], failed: Collection[str]) -> set[str]:
        """Return the names of those failures that are files found by searching and no CT.

        Args:
            volumes: the list.
            failed: names of all failures.
        """
        searched = [volume for volume in volumes if volume.searched and volume.key in failed]
        with ThreadPoolExecutor(STAT_THREADS) as threads:
            failures = threads.map(self.failure, [volume.name for volume in searched])
            return {
                volume.name
                for volume, failure in zip(searched, failures, strict=True)
                if failure and failure["error"] == NOT_CT
            }

    def note_failure(self, volume: Volume, error: str, message: str) -> None:
        """Write a volume's failure marker.

        Args:
            volume: the volume.
            error: name of the exception or signal.
            message: why it failed.
        """
        atomic_write(self.marker(volume.name), _json_line(_failure(volume, error, message)))

    def forget_failure(self, key: str) -> None:
        """Remove a failure marker, if there is one."""
        self.marker(key).unlink(missing_ok=True)

    def log_lines(self) -> Iterator[LogLine]:
        """Yield the complete lines of all processes' logs."""
        for file in sorted((self.folder / "log").glob(f"{self.stage}-*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError:  # the empty end of the file, or a line cut off by a kill
                    continue

    def write_manifest(self, volumes: Sequence[Volume], origin: Origin) -> ManifestSummary:
        """Collect the state of the list, write it and return the content of manifest.json.

        One process at a time: the last one sees what all others did before.

        Args:
            volumes: the list.
            origin: data and settings that the entries are made of.
        """
        with self.locks.hold(_MANIFEST, wait=True):
            done, failed = self.keys()
            logged = {line["record"]: line for line in self.log_lines()}
            made = [self._made(volume, logged) for volume in volumes if volume.key in done]
            unmade = [
                (volume, self._failure(volume))
                for volume in volumes
                if volume.key in failed or (volume.key is None and not volume.is_unreached)
            ]
            passed_over = [row for volume, row in unmade if volume.is_passed_over(row["error"])]
            failures = [row for volume, row in unmade if not volume.is_passed_over(row["error"])]
            summary = _summarize(made, failures, len(passed_over), len(volumes), origin)
            files: dict[str, Sequence[MadeEntry | Failure]] = {
                "volumes.jsonl": made,
                "failures.jsonl": failures,
                "passed_over.jsonl": passed_over,
            }
            for name, rows in files.items():
                atomic_write(self.path(name), "".join(map(_json_line, rows)))
            write_json(self.path("manifest.json"), summary)
        return summary

    def _made(self, volume: Volume, logged: Mapping[str, LogLine]) -> MadeEntry:
        """Return a line of volumes.jsonl; entries without a log line are another script's, or from just before a kill."""
        line = logged.get(volume.name)
        return {
            "volume": volume.label,
            "rescale": volume.ref.rescale,
            "record": volume.name,
            "bytes": line["bytes"] if line else self.entry(volume.name).stat().st_size,
            "seconds": line["seconds"] if line else None,
            "host": line["host"] if line else None,
        }

    def _failure(self, volume: Volume) -> Failure:
        if volume.key is None:
            return _failure(volume, CTReadError.__name__, volume.problem)
        noted = self.failure(volume.key)
        return _failure(volume, noted["error"] if noted else "unknown", noted["message"] if noted else "")


class WorkLog:
    """Log of this process, with one line per entry that it made, flushed to the operating system at once.

    Args:
        manifest: the stage.
        shard: the process's part of the list, for the file's name.
    """

    def __init__(self, manifest: Manifest, shard: Shard):
        folder = manifest.folder / "log"
        folder.mkdir(parents=True, exist_ok=True)
        self.host = platform.node().partition(".")[0]
        name = f"{manifest.stage}-{shard}-{self.host}-{os.getpid()}-{time.time_ns()}.jsonl"
        self._file = (folder / name).open("a", encoding="utf-8")

    def __enter__(self) -> "WorkLog":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def append(self, volume: Volume, size: int, seconds: float, host: str = "") -> None:
        """Add an entry.

        Args:
            volume: the entry's volume.
            size: bytes of the entry.
            seconds: how long it took.
            host: the machine that made it; default: this one.
        """
        line: LogLine = {
            "volume": volume.label,
            "record": volume.name,
            "bytes": size,
            "seconds": round(seconds, 4),
            "host": host or self.host,
            "time": _now(),
        }
        self._file.write(_json_line(line))
        self._file.flush()


def _json_line(row: LogLine | MadeEntry | Failure) -> str:
    return json.dumps(row) + "\n"  # in ASCII: file names may be bytes that are no UTF-8


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _failure(volume: Volume, error: str, message: str) -> Failure:
    return {"volume": volume.label, "rescale": volume.ref.rescale, "error": error, "message": message}


def _summarize(
    made: Sequence[MadeEntry], failures: Sequence[Failure], passed_over: int, listed: int, origin: Origin
) -> ManifestSummary:
    """Return the content of manifest.json for a list of `listed` volumes."""
    seconds = [row["seconds"] for row in made if row["seconds"] is not None]
    pending = listed - passed_over - len(made) - len(failures)
    return {
        **origin,
        "complete": pending == 0,
        "volumes": listed - passed_over,
        "done": len(made),
        "failed": len(failures),
        "pending": pending,
        "failures": dict(Counter(row["error"] for row in failures)),
        "bytes": sum(row["bytes"] for row in made),
        "seconds": {
            "sum": round(sum(seconds), 1),
            "median": float(np.median(seconds)) if seconds else None,
            "longest": max(seconds, default=None),
        },
        "hosts": dict(Counter(row["host"] for row in made if row["host"])),
        "written": _now(),
        "passed_over": passed_over,
    }


def _remove_if_abandoned(file: Path) -> None:
    try:
        if time.time() - file.stat().st_mtime > _ABANDONED:
            file.unlink()
    except FileNotFoundError:  # renamed meanwhile
        return
    except OSError as error:  # a read-only folder, or another user's
        logger.debug("%s: a temporary file that can't be removed (%s)", file, error.strerror)
