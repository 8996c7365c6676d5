"""Verification of the entries of a cache by their checksums."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from tqdm import tqdm

from samf.cache.entries import check_entry
from samf.cache.fill_options import FillOptions
from samf.cache.manifest import Manifest
from samf.cache.volume_list import Volume
from samf.cache.worker_pool import WorkerDied, WorkerPool

EntryState: TypeAlias = Literal["intact", "missing", "damaged", "unreadable"]


@dataclass
class Verification:
    """Result of a verification.

    Attributes:
        intact: number of intact entries.
        missing: number of volumes without an entry.
        damaged: what is wrong with each damaged entry.
        unreadable: why each of these entries can't be read; nothing is known about them, as the disk may be at fault.
    """

    intact: int = 0
    missing: int = 0
    damaged: dict[Path, str] = field(default_factory=dict)
    unreadable: dict[Path, str] = field(default_factory=dict)


def verify(volumes: Sequence[Volume], manifest: Manifest, options: FillOptions, remove: bool) -> Verification:
    """Read this shard's entries and compare them with their checksums.

    Args:
        volumes: the list.
        manifest: the manifest of the stage.
        options: shard, workers and progress bar.
        remove: whether to delete damaged entries; the next run makes them again.
    """
    passed_over = manifest.passed_over(volumes, manifest.keys().failed)
    listed = [volume for volume in options.shard.of(volumes) if volume.key not in {None, *passed_over}]
    result = Verification()
    with WorkerPool(partial(_check, manifest=manifest), max(1, min(options.workers, len(listed)))) as pool:
        checked = pool.map(listed)
        for volume, found in tqdm(checked, total=len(listed), desc="verifying", disable=not options.show_progress):
            _add(result, manifest.entry(volume.name), found)
    if remove:
        for entry in result.damaged:
            entry.unlink(missing_ok=True)
    return result


def _check(volume: Volume, *, manifest: Manifest) -> tuple[EntryState, str]:
    """Return the state of a volume's entry, and the reason."""
    try:
        damage = check_entry(manifest.entry(volume.name))
    except FileNotFoundError:
        return "missing", ""
    except OSError as error:
        return "unreadable", str(error)
    return ("intact", "") if damage is None else ("damaged", damage)


def _add(result: Verification, entry: Path, found: tuple[EntryState, str] | WorkerDied) -> None:
    state, reason = ("unreadable", found.message) if isinstance(found, WorkerDied) else found
    if state == "intact":
        result.intact += 1
    elif state == "missing":
        result.missing += 1
    elif state == "damaged":
        result.damaged[entry] = reason
    else:
        result.unreadable[entry] = reason
