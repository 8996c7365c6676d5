"""The check of all files of a data set: by processes that a damaged file can't take down, with progress, resumed."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from samf.cache.worker_pool import WorkerDied, WorkerPool
from samf.checking.volumes import VolumeFacts, check_volume, equal_files, file_state, is_local
from samf.model.ct_common import VolumeRef
from samf.utils.files import atomic_write

logger = logging.getLogger(__name__)

RESULTS = "volumes.jsonl"  # one line per volume, which a resumed check reads


@dataclass(frozen=True)
class FileOptions:
    """How files are checked.

    Attributes:
        read: whole files, not only their headers.
        workers: processes.
        timeout: seconds for one volume; None = no limit.
        folder: of RESULTS; None keeps nothing.
    """

    read: bool = False
    workers: int = 1
    timeout: float | None = 600.0
    folder: Path | None = None


@dataclass
class CheckedFiles:
    """What became of the volumes.

    Attributes:
        facts: {path: what was found}.
        resumed: how many of them are results of an earlier run.
        remote: number of volumes at addresses, which are not checked.
    """

    facts: dict[str, VolumeFacts] = field(default_factory=dict)
    resumed: int = 0
    remote: int = 0

    def broken(self) -> dict[str, str]:
        """Return {path: why it can't be used}."""
        return {path: facts.problem for path, facts in self.facts.items() if facts.problem is not None}

    def copies(self) -> list[list[str]]:
        """Return groups of paths that hold the same volume."""
        by_digest: dict[str, list[str]] = defaultdict(list)
        for path, facts in self.facts.items():
            if facts.problem is None and facts.digest:
                by_digest[facts.digest].append(path)
        groups = [sorted(paths) for paths in by_digest.values() if len(paths) > 1]
        certain = [group for group in groups if self.facts[group[0]].is_read]
        return sorted(certain + [copy for group in groups if group not in certain for copy in equal_files(group)])


def check_files(volumes: Iterable[VolumeRef], options: FileOptions) -> CheckedFiles:
    """Check volumes, each once, in the order of their paths.

    Args:
        volumes: of all splits.
        options: how they are checked.
    """
    distinct = {volume.path: volume for volume in volumes}
    local = [distinct[path] for path in sorted(distinct) if is_local(distinct[path])]
    done = _resumed(options)
    found = CheckedFiles(remote=len(distinct) - len(local))
    todo = []
    for volume in local:
        known = done.get(volume.path)
        if known is not None and known.state and known.state == file_state(volume.path, options.read):
            found.facts[volume.path] = known
        else:
            todo.append(volume)
    found.resumed = len(found.facts)
    for facts in _checked(todo, options):
        found.facts[facts.path] = facts
    if options.folder is not None:
        lines = "".join(json.dumps(found.facts[volume.path].to_json()) + "\n" for volume in local)
        atomic_write(options.folder / RESULTS, lines)
    return found


def _checked(volumes: Sequence[VolumeRef], options: FileOptions) -> Iterator[VolumeFacts]:
    """Yield the facts of volumes as they come, and append each to RESULTS before."""
    if not volumes:
        return
    work = partial(check_volume, read=options.read)
    workers = max(1, min(options.workers, len(volumes)))
    log = None if options.folder is None else (options.folder / RESULTS).open("a", encoding="utf-8", buffering=1)
    try:
        with (
            WorkerPool(work, workers, options.timeout) as pool,
            tqdm(total=len(volumes), desc="files", unit=" volumes", disable=None) as progress,
        ):
            for volume, result in pool.map(volumes):
                facts = VolumeFacts(volume.path, result.message) if isinstance(result, WorkerDied) else result
                if log is not None:
                    log.write(json.dumps(facts.to_json()) + "\n")
                progress.update()
                yield facts
    finally:
        if log is not None:
            log.close()


def _resumed(options: FileOptions) -> dict[str, VolumeFacts]:
    """Return the results of an earlier run; a line that was cut off is left out."""
    if options.folder is None or not (options.folder / RESULTS).is_file():
        return {}
    found = {}
    for line in (options.folder / RESULTS).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            facts = VolumeFacts.from_json(json.loads(line))
        except (ValueError, TypeError, KeyError):
            continue
        found[facts.path] = facts
    return found
