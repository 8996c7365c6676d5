"""Hashes of what predictions depend on: records, references, volumes, weights, and settings of model and processor."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samf.data.prompts import record_prompt
from samf.data.schema import JsonObject, Record, volume_of
from samf.model.ct_volume import VolumeRef

__all__ = [
    "VolumeDigests",
    "describe_answering",
    "digest_of",
    "records_digest",
    "references_digest",
]

logger = logging.getLogger(__name__)


def digest_of(value: Any) -> str:
    """Return a short hash of a value that JSON can hold."""
    return f"sha256 {hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]}"


def records_digest(records: Sequence[Record]) -> str:
    """Return the number of records and a hash of their ids and prompts."""
    prompts = sorted((record["id"], record_prompt(record)) for record in records)
    return f"{len(prompts)}, {digest_of(prompts)}"


def references_digest(records: Sequence[Record]) -> str:
    """Return a hash of what answers are compared with."""
    return digest_of(sorted((record["id"], record["answer"], list(record.get("choices") or [])) for record in records))


# --- Volumes ----------------------------------------------------------------------------------------------------

_SAMPLED_BYTES = 1 << 12  # of a file's beginning, middle and end; the end of a .gz holds a checksum of the whole
_MOST_FILES = 5000  # of a folder


class VolumeDigests:
    """Hashes of the volumes of records, each computed once."""

    def __init__(self) -> None:
        self._known: dict[VolumeRef | None, str | None] = {}

    def of(self, record: Record) -> str | None:
        """Return the hash of a record's volume; None without a volume."""
        volume = volume_of(record)
        if volume not in self._known:
            self._known[volume] = _volume_digest(record)
        return self._known[volume]


def _volume_digest(record: Record) -> str | None:
    """Return a hash of a volume's name, rescale and, as far as it is cheap to read, content.

    Of a file, the size and some bytes count; of a folder, the names and sizes of its files; of an address or a missing file,
    the name only. So a data set may be moved, but not changed.
    """
    if record["volume"] is None:
        return None
    path = Path(record["volume"])
    content: list[Any] | None = None
    try:
        if path.is_file():
            content = _sampled(path)
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())[:_MOST_FILES]
            content = [[str(file.relative_to(path)), file.stat().st_size] for file in files]
    except OSError as error:  # reading the volume gives the better message
        logger.debug("%s: content not hashed: %s", path, error)
    return digest_of([path.name, content, list(record.get("rescale") or [])])


def _sampled(path: Path) -> list[int | str]:
    """Return a file's size and a hash of some of its bytes."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - _SAMPLED_BYTES)):
            file.seek(start)
            digest.update(file.read(_SAMPLED_BYTES))
    return [size, digest.hexdigest()]


# --- Model and processor ----------------------------------------------------------------------------------------


def describe_answering(model: nn.Module, processor: Any) -> JsonObject:
    """Return what shapes an answer in addition to the generation settings and the records.

    Args:
        model: its weights enter as a hash; its configuration and generation configuration as they are.
        processor: enters by its settings, image processor, chat template and a hash of its tokenizer.
    """
    return {
        "weights": _weights_digest(model),
        "config": _settings_of(getattr(model, "config", None)),
        "generation_config": _settings_of(getattr(model, "generation_config", None)),
        "processor": _processor_settings(processor),
    }


# What may differ between two loads of the same settings: where they were loaded from, and by which version.
_NOT_SETTINGS = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "auto_map", "processor_class")


def _settings_of(part: Any) -> JsonObject:
    """Return what a configuration or image processor would save, without where it came from."""
    settings = part.to_dict() if hasattr(part, "to_dict") else getattr(part, "__dict__", {})
    return _plain_settings(settings)


def _plain_settings(value: Any) -> Any:
    """Return a value as JSON can hold it; of what JSON can't hold, the name of its type."""
    if isinstance(value, Mapping):
        return {str(name): _plain_settings(v) for name, v in value.items() if name not in _NOT_SETTINGS}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_plain_settings(item) for item in items]
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value) if isinstance(value, torch.dtype | os.PathLike) else type(value).__name__


def _processor_settings(processor: Any) -> JsonObject:
    """Return the settings of a processor and its image processor, its chat template, and a hash of its tokenizer."""
    tokenizer = getattr(processor, "tokenizer", None)
    parts = ("image_processor", "tokenizer", "chat_template")
    own = _settings_of(processor) if hasattr(processor, "to_dict") else {}
    return {
        "own": {name: value for name, value in own.items() if name not in parts},
        "image_processor": _settings_of(getattr(processor, "image_processor", None)),
        "chat_template": getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None),
        "tokenizer": None if tokenizer is None else _tokenizer_digest(tokenizer),
    }


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest_of([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map])
    whole = json.loads(backend.to_str())  # its padding and truncation are those of the last call
    return digest_of({name: value for name, value in whole.items() if name not in ("padding", "truncation")})


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _weights_digest(model: nn.Module, values: int = 8) -> str:
    """Return a hash of the first `values` of every tensor and of the sum of its bits.

    It tells a model from one that was trained on in the same folder. Integer sums are the same on any device and with any
    number of threads.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            continue
        flat = tensor.detach().contiguous().flatten()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_sum_of_bits(flat)}".encode())
        digest.update(flat[:values].double().cpu().numpy().tobytes())
    return f"sha256 {digest.hexdigest()[:16]}"


def _sum_of_bits(flat: torch.Tensor) -> int:
    """Return the sum of a plain tensor's bits; 0 for a quantized tensor of another library, whose layout is unknown."""
    plain = type(flat) is torch.Tensor and flat.element_size() in _INTEGERS
    return int(flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)) if plain else 0
