"""List a folder of volumes all of whose cache entries exist, and resume filling the cache."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from samf.cache.entries import write_entry
from samf.cache.fill import fill_slices, unsettled
from samf.cache.fill_options import FillOptions
from samf.cache.manifest import Manifest, WorkLog
from samf.cache.slice_cache import SliceCache
from samf.cache.volume_list import Shard, inspect_volumes
from samf.data.volume_discovery import search_volumes
from samf.model.image_processing_samf import EXTRACT_VERSION, SamfImageProcessor


def run(task: dict[str, Any], recorder: Any) -> dict[str, int]:
    """Write the entries (`write`), or list and resume; return the numbers of volumes, entries and what is left.

    Args:
        task: `data` (the folder of volumes), `folder` (where this build keeps its cache), `write`.
        recorder: takes the figures.
    """
    cache = SliceCache(Path(task["folder"]) / "cache", SamfImageProcessor())
    manifest = Manifest(cache.folder, "slices")
    if task["write"]:
        _write_entries(task["data"], cache, manifest)
        return {}
    origin = {"settings_hash": cache.image_processor.settings_hash(), "extract_version": EXTRACT_VERSION}
    options = FillOptions(show_progress=False, force=True)
    with recorder.measure("list and resume", memory=True):
        found = search_volumes([task["data"]])
        volumes = inspect_volumes(found.volumes, cache, found.searched)
        fill_slices(volumes, cache, manifest, options, origin)
        left = unsettled(volumes, manifest, Shard())
    done, failed = manifest.keys()
    return {"volumes": len(volumes), "entries": len(done), "failed": len(failed), "left": len(left)}


def _write_entries(data: str, cache: SliceCache, manifest: Manifest) -> None:
    """Link an entry for each volume, since names of entries are a build's own."""
    entry = Path(manifest.folder) / "entry"
    entry.parent.mkdir(parents=True, exist_ok=True)
    write_entry(entry, {"slices": np.zeros((1, 8, 8), np.uint8)})
    with WorkLog(manifest, Shard()) as log:
        for volume in inspect_volumes(search_volumes([data]).volumes, cache):
            target = manifest.entry(volume.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            entry = _link(entry, target)
            log.append(volume, entry.stat().st_size, 0.5)


def _link(source: Path, target: Path) -> Path:
    """Link a file, and return the file to link next: file systems limit the links to one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return target
    return source
