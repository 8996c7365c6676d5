"""Damaged and missing files of checkpoints, found from sizes and headers.

A killed process, a full disk and a power failure leave files that are missing, empty or cut short. Sizes and headers show
all of these: the tensors' extents in a safetensors header, the directory at the end of a file of `torch.save`, the extents
in the metadata of sharded checkpoints. No tensor is read, so a check is quick at any size.
"""

import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader

_STATE = "trainer_state.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Files of FSDP: a folder of shards, or one file.
_FSDP_WEIGHTS, _FSDP_OPTIMIZER = ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"), ("optimizer_0", "optimizer.bin")
_SHARDS_METADATA = ".metadata"
# Files of DeepSpeed: one that names the folder `global_step…`, which holds the states of all processes.
_DEEPSPEED_TAG, _DEEPSPEED_FOLDERS = "latest", "global_step*"


def _safetensors_damage(file: Path) -> str | None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            if 8 + length > size:
                return f"cut short: {size} bytes, its header has {length}"
            header = json.loads(stream.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            end = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return f"not a safetensors file ({size} bytes)"
    return None if size == end else f"{size} bytes instead of {end}"


def _torch_damage(file: Path) -> str | None:
    """Check a file of `torch.save`: a zip archive, whose directory is written last."""
    with file.open("rb") as stream:
        start = stream.read(4)
    if start[:1] == b"\x80":  # the format before torch 1.6, which doesn't say its length
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            return None if archive.namelist() else "an empty archive"
    except zipfile.BadZipFile:
        return f"cut short or overwritten: {file.stat().st_size} bytes without the directory that torch.save ends with"


def _json_damage(file: Path) -> str | None:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"broken JSON ({error})"
    return None


def _state_damage(file: Path) -> str | None:
    """Check trainer_state.json, which Trainer writes last."""
    if (damage := _file_damage(file)) is not None:
        return damage
    state = json.loads(file.read_text(encoding="utf-8"))
    return None if isinstance(state, dict) and "global_step" in state else "holds no global_step"


_FILE_CHECKS: dict[str, Callable[[Path], str | None]] = {
    ".safetensors": _safetensors_damage,
    ".json": _json_damage,
    **dict.fromkeys((".pt", ".pth", ".bin"), _torch_damage),
}


def _file_damage(file: Path) -> str | None:
    """Return what is wrong with one file of a checkpoint; None for a whole file, and for files of other kinds.

    Raises:
        OSError: The file can't be read now, which says nothing about its content.
    """
    checked = file.suffix in (*_FILE_CHECKS, ".distcp") or file.name in (_SHARDS_METADATA, _DEEPSPEED_TAG)
    if checked and file.stat().st_size == 0:
        return "0 bytes"
    check = _FILE_CHECKS.get(file.suffix)
    return check(file) if check else None


def find_damage(checkpoint: str | os.PathLike, *, with_optimizer: bool = True) -> str | None:
    """Return what keeps a checkpoint from being resumed.

    Args:
        checkpoint: A folder that a Trainer wrote, on one process or several, under DDP, FSDP or DeepSpeed.
        with_optimizer: Whether the states of optimizer, scheduler and random generators must be there.

    Returns:
        The damaged or missing file's name and what is wrong with it; None for a whole checkpoint.

    Raises:
        OSError: A file can't be read now, which says nothing about its content.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "no such folder"
    if not (folder / _STATE).is_file():
        return f"{_STATE} is missing: the checkpoint was not finished"
    if (damage := _state_damage(folder / _STATE)) is not None:
        return f"{_STATE}: {damage}"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if (damage := _file_damage(file)) is not None:
            return f"{file.relative_to(folder)}: {damage}"
    missing = _missing_weights(folder) or (_missing_states(folder) if with_optimizer else None)
    return f"{missing} is missing" if missing else _shards_damage(folder)


def _any_exists(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).exists() for name in names)


def _deepspeed_folder(folder: Path) -> Path | None:
    """Return the folder that has, or should have, DeepSpeed's states; None for a checkpoint of another kind."""
    tag = folder / _DEEPSPEED_TAG
    if tag.is_file():
        return folder / tag.read_text(encoding="utf-8").strip()
    return next(folder.glob(_DEEPSPEED_FOLDERS), None)


def _missing_weights(folder: Path) -> str | None:
    for name in _INDEXES:
        if (folder / name).is_file():
            shards = json.loads((folder / name).read_text(encoding="utf-8")).get("weight_map", {}).values()
            return next((shard for shard in sorted(set(shards)) if not (folder / shard).is_file()), None)
    if _any_exists(folder, (*_WEIGHTS, *_FSDP_WEIGHTS)) or _deepspeed_folder(folder) is not None:
        return None
    if any((child / name).is_file() for child in folder.iterdir() if child.is_dir() for name in _WEIGHTS):
        return None  # named adapters, in a folder each
    return _INDEXES[0] if any(folder.glob("model-*-of-*.safetensors")) else _WEIGHTS[0]


def _missing_states(folder: Path) -> str | None:
    """Return the first missing file of the optimizer's, scheduler's and random generators' states."""
    deepspeed = _deepspeed_folder(folder)
    # One process writes rng_state.pth; several number theirs, so that there are at least two.
    generators = _numbers(folder, r"rng_state_(\d+)\.pth")
    processes = max(2, max(generators) + 1) if generators else 1
    if deepspeed is not None:
        if not (folder / _DEEPSPEED_TAG).is_file():
            return _DEEPSPEED_TAG
        if (missing := _missing_deepspeed(deepspeed, processes)) is not None:
            return f"{deepspeed.name}/{missing}"
    else:
        if not _any_exists(folder, ("optimizer.pt", *_FSDP_OPTIMIZER)):
            return _FSDP_OPTIMIZER[0] if _any_exists(folder, _FSDP_WEIGHTS) else "optimizer.pt"
        if not (folder / "scheduler.pt").is_file():
            return "scheduler.pt"
    if (folder / "rng_state.pth").is_file():
        return None
    return _first_missing("rng_state_{}.pth", generators, processes) if generators else "rng_state.pth"


def _missing_deepspeed(folder: Path, processes: int) -> str | None:
    if not folder.is_dir():
        return "*"
    names = [path.name for path in folder.iterdir()]
    if not any(name.endswith("model_states.pt") for name in names):
        return "mp_rank_00_model_states.pt"
    models = _numbers(folder, r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")  # one per process, only under ZeRO-3
    if models and (missing := _first_missing("zero_pp_rank_{}_mp_rank_00_model_states.pt", models, processes)):
        return missing
    states = _numbers(folder, r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
    return _first_missing("zero_pp_rank_{}_mp_rank_00_optim_states.pt", states, processes)


def _numbers(folder: Path, form: str) -> set[int]:
    """Return the numbers in the names of a folder's files that match a regular expression with one group."""
    return {int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(form, path.name))}


def _first_missing(name: str, found: set[int], count: int) -> str | None:
    """Return the first missing one of `count` numbered files, or of more where a higher number was found."""
    expected = range(max(count, max(found, default=-1) + 1))
    return next((name.format(number) for number in expected if number not in found), None)


def _shards_damage(folder: Path) -> str | None:
    """Check FSDP's folders of shards against their metadata."""
    for name in (_FSDP_WEIGHTS[0], _FSDP_OPTIMIZER[0]):
        shards = folder / name
        if not shards.is_dir():
            continue
        if not (shards / _SHARDS_METADATA).is_file():
            return f"{name}/{_SHARDS_METADATA} is missing"
        try:
            last = _last_extents(shards)
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, KeyError, TypeError) as error:
            return f"{name}/{_SHARDS_METADATA}: can't be read ({error})"
        for file, (start, length) in sorted(last.items()):
            if (damage := _shard_damage(shards / file, start, length)) is not None:
                return f"{name}/{file}{damage}"
    return None


def _last_extents(shards: Path) -> dict[str, tuple[int, int]]:
    """Return offset and length in bytes of the last tensor of each shard."""
    extents = FileSystemReader(shards).read_metadata().storage_data.values()
    ordered = sorted(extents, key=lambda extent: extent.offset)
    return {extent.relative_path: (extent.offset, extent.length) for extent in ordered}


def _shard_damage(path: Path, start: int, length: int) -> str | None:
    if not path.is_file():
        return " is missing"
    if path.stat().st_size < start + length:
        return f": cut short: {path.stat().st_size} of {start + length} bytes"
    with path.open("rb") as stream:
        stream.seek(start)
        if not any(stream.read(8)):
            return ": zeros instead of data"
    return None
