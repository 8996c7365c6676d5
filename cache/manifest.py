"""What a cache folder knows of the volumes of a list: which are made, which failed and why, and who made them when.

Beside the records the folder gets, for each stage ("slices", "embeddings"):

- `log/<stage>-….jsonl`: each process's own, append-only: a line for each volume that it made;
- `ab/<record>.failed.json` where the record would lie, for a volume that can't be read: nobody tries it again unasked;
- `manifest.json`, `volumes.jsonl`, `failures.jsonl` and `passed_over.jsonl` (embeddings.manifest.json and so on): all of
  this put together for the last list that was run over, by each process when it ends. The last one to end leaves them
  complete. Passed over is what was found in a folder, named by nobody, and is no CT: a mask, another modality.

What is done is what has a record: the logs only add who made it and how long it took.
"""

import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from samf.cache.locks import EntryLocks
from samf.cache.slice_cache import Identity, entry_file, identity_bytes, volume_identity
from samf.data.volume_discovery import VolumeKey
from samf.model.ct_volume import CTReadError, NotCTError
from samf.utils.files import atomic_write, write_json

logger = logging.getLogger(__name__)

_LOOKERS = 16  # threads that look at files: on a network file system they wait, and do little else
_FORGOTTEN = 3600  # seconds after which a temporary file belongs to nobody any more
_MANIFEST = "f" * 15  # the claim on writing the manifest
NO_CT = NotCTError.__name__  # the error of what is whole, but no CT


class Store(Protocol):
    """`SliceCache` or `EmbeddingCache`: what names the records."""

    def key(self, identity: Identity, rescale: Sequence[float] | None = None) -> str: ...


@dataclass(frozen=True)
class Volume:
    """One volume of the list. `key` names its record, None if it can't be looked at (`problem` says why); `bytes` are
    its files'. `searched`: it was found in a folder, and nobody named it."""

    path: str
    rescale: tuple[float, ...] | None
    key: str | None
    bytes: int = 0
    problem: str = ""
    searched: bool = False

    def is_passed_over(self, error: str) -> bool:
        """Whether this error is none of a run's failures: what was found by searching is no CT."""
        return self.searched and error == NO_CT


@dataclass(frozen=True)
class Shard:
    """The part of the list that is this process's: every `count`-th volume, beginning with number `index` (from 0)."""

    index: int = 0
    count: int = 1

    @classmethod
    def choose(cls, text: str | None, environment: Mapping[str, str]) -> "Shard":
        """Of `--shard 3/16` (1/16 … 16/16), and of the rank that `torchrun` or `accelerate launch` give in it.

        Raises ValueError for anything else.
        """
        number, _, count = (text or "1/1").partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ValueError(f"--shard {text}: expected a number and how many there are, 1/16 to 16/16.")
        rank, ranks = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        return cls((int(number) - 1) * ranks + rank, int(count) * ranks)

    def of(self, volumes: Sequence[Volume]) -> list[Volume]:
        return list(volumes[self.index :: self.count])

    def __str__(self) -> str:
        return f"{self.index + 1}of{self.count}"


def inspect_volumes(volumes: Sequence[VolumeKey], store: Store, searched: Collection[str] = ()) -> list[Volume]:
    """The list with the names of the records, in its order; touches the volumes' directories, not their contents.

    Args:
        volumes: paths with their rescales.
        store: names the records.
        searched: those of the paths that nobody named.
    """

    def look(key: VolumeKey) -> Volume:
        try:
            identity = volume_identity(key[0])
        except CTReadError as error:
            return Volume(*key, None, problem=str(error), searched=key[0] in searched)
        name, size = store.key(identity, key[1]), identity_bytes(identity)
        return Volume(*key, name, size, searched=key[0] in searched)

    with ThreadPoolExecutor(_LOOKERS) as threads:
        return list(threads.map(look, volumes))


class Manifest:
    """What a cache folder knows of one stage: records, failures, logs, manifest. Picklable, for workers.

    Args:
        folder: the cache. stage: "slices" or "embeddings".
    """

    def __init__(self, folder: Path, stage: str):
        self.folder, self.stage = Path(folder), stage
        self.claims = EntryLocks(self.folder / "claims.lock")

    def path(self, name: str) -> Path:
        """Of manifest.json, volumes.jsonl, failures.jsonl and passed_over.jsonl."""
        return self.folder / (name if self.stage == "slices" else f"{self.stage}.{name}")

    def record(self, key: str) -> Path:
        return entry_file(self.folder, key)

    def marker(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.failed.json"

    def keys(self) -> tuple[set[str], set[str]]:
        """Names of all records, and of all that failed, by listing 256 folders instead of looking for each. Takes
        temporary files away that a killed run has left."""
        done, failed = set(), set()
        for folder in self.folder.glob("??"):
            for entry in os.scandir(folder):
                name, _, ending = entry.name.partition(".")
                if ending == "safetensors":
                    done.add(name)
                elif ending == "failed.json":
                    failed.add(name)
                elif ending.endswith(".tmp"):
                    _remove_if_old(Path(entry.path))
        return done, failed - done

    def failure(self, key: str) -> dict[str, Any] | None:
        """What is noted of a volume that failed."""
        try:
            return json.loads(self.marker(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:  # whoever damaged it
            return {"error": "unknown", "message": f"{self.marker(key)} is damaged"}

    def passed_over(self, volumes: Sequence[Volume], failed: Collection[str]) -> set[str]:
        """Return the names of those that failed as no CT and that nobody named."""
        asked = [volume for volume in volumes if volume.searched and volume.key in failed]
        with ThreadPoolExecutor(_LOOKERS) as threads:
            notes = threads.map(self.failure, [volume.key for volume in asked])
            return {volume.key for volume, note in zip(asked, notes, strict=True) if note and note["error"] == NO_CT}

    def note_failure(self, volume: Volume, error: str, message: str) -> None:
        atomic_write(self.marker(volume.key), _line(_failure(volume, error, message)).encode())

    def forget_failure(self, key: str) -> None:
        self.marker(key).unlink(missing_ok=True)

    def log_lines(self) -> Iterator[dict[str, Any]]:
        """The whole lines of all processes' logs."""
        for file in sorted((self.folder / "log").glob(f"{self.stage}-*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError:  # the end, or a line that a kill has cut off
                    continue

    def write_manifest(self, volumes: Sequence[Volume], about: Mapping[str, Any]) -> dict[str, Any]:
        """Put together what is known of the list, and write it. Returns the manifest.

        One process at a time: who comes last has seen what all others did before.
        """
        with self.claims.hold(_MANIFEST, wait=True):
            done, failed = self.keys()
            logged = {line["record"]: line for line in self.log_lines()}
            made = [
                _made(volume, logged.get(volume.key), self.record(volume.key))
                for volume in volumes
                if volume.key in done
            ]
            unmade = [
                (volume, self._failed(volume)) for volume in volumes if volume.key is None or volume.key in failed
            ]
            passed_over = [row for volume, row in unmade if volume.is_passed_over(row["error"])]
            failures = [row for volume, row in unmade if not volume.is_passed_over(row["error"])]
            manifest = _summary(made, failures, len(volumes) - len(passed_over), about)
            manifest["passed_over"] = len(passed_over)
            files = {"volumes.jsonl": made, "failures.jsonl": failures, "passed_over.jsonl": passed_over}
            for name, rows in files.items():
                atomic_write(self.path(name), "".join(map(_line, rows)).encode())
            write_json(self.path("manifest.json"), manifest)
        return manifest

    def _failed(self, volume: Volume) -> dict[str, Any]:
        if volume.key is None:
            return _failure(volume, "CTReadError", volume.problem)
        return _failure(volume, "unknown", "") | (self.failure(volume.key) or {})


class WorkLog:
    """This process's log: a line for each volume that it made, with the operating system on return."""

    def __init__(self, manifest: Manifest, shard: Shard):
        folder = manifest.folder / "log"
        folder.mkdir(parents=True, exist_ok=True)
        self.host = platform.node().partition(".")[0]
        name = f"{manifest.stage}-{shard}-{self.host}-{os.getpid()}-{time.time_ns()}.jsonl"
        self._file = (folder / name).open("a", encoding="utf-8")

    def __enter__(self) -> "WorkLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, volume: Volume, size: int, seconds: float) -> None:
        row = {"volume": volume.path, "record": volume.key, "bytes": size, "seconds": round(seconds, 4)}
        self._file.write(_line({**row, "host": self.host, "time": _now()}))
        self._file.flush()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"  # in ASCII: file names may be bytes that are no UTF-8


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _failure(volume: Volume, error: str, message: str) -> dict[str, Any]:
    return {"volume": volume.path, "rescale": volume.rescale, "error": error, "message": message}


def _made(volume: Volume, logged: Mapping[str, Any] | None, record: Path) -> dict[str, Any]:
    """A line of volumes.jsonl; what no log tells of was made by another script, or just before a kill."""
    logged = logged or {"bytes": record.stat().st_size, "seconds": None, "host": None}
    row = {"volume": volume.path, "rescale": volume.rescale, "record": volume.key}
    return {**row, "bytes": logged["bytes"], "seconds": logged["seconds"], "host": logged["host"]}


def _summary(
    made: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]], volumes: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    seconds = [row["seconds"] for row in made if row["seconds"] is not None]
    pending = volumes - len(made) - len(failures)
    return {
        **about,
        "complete": pending == 0,
        "volumes": volumes,
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
    }


def _remove_if_old(file: Path) -> None:
    try:
        if time.time() - file.stat().st_mtime > _FORGOTTEN:
            file.unlink()
    except FileNotFoundError:  # renamed meanwhile
        return
    except OSError as error:  # a folder that is read-only, or another's
        logger.debug("%s: a temporary file that stays (%s)", file, error.strerror)
