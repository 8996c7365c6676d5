"""A saved model's folder: whether it holds a whole model, an adapter or quantised weights, and in which files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from samf.model.configuration_samf import SamfConfig
from samf.sharing.errors import ShareError
from samf.training.repository import check_whole

Kind = Literal["model", "adapter", "quantized"]

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
_MODEL_WEIGHTS, _ADAPTER_WEIGHTS = "model*.safetensors", "adapter_model*.safetensors"
_INDEX = "model.safetensors.index.json"
_REMEDY = "Name the output folder of a training, or one that save_pretrained wrote."


@dataclass(frozen=True)
class SavedModel:
    """A folder with a model.

    Attributes:
        folder: the folder.
        kind: a whole model, an adapter, or a whole model with quantised weights.
        weights: its safetensors files, with the index of shards.
        config: its configuration.
        adapter: content of adapter_config.json; empty for a whole model.
    """

    folder: Path
    kind: Kind
    weights: Sequence[Path]
    config: SamfConfig
    adapter: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """An adapter's base model, a Hub id or a folder."""
        return self.adapter.get("base_model_name_or_path") or None

    def tensors(self) -> dict[str, tuple[Path, Sequence[int]]]:
        """Return name → (file, shape) of the stored tensors, from the files' headers."""
        found: dict[str, tuple[Path, Sequence[int]]] = {}
        for path in self.weights:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    found |= {name: (path, file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it isn't a dict
        return found


def read_saved_model(folder: Path) -> SavedModel:
    """Return what a folder holds.

    Raises:
        ShareError: it holds no model of this kind, or its weights are incomplete.
    """
    if not folder.is_dir():
        raise ShareError(f"{folder}: no such folder. {_REMEDY}")
    if not (folder / CONFIG).is_file():
        raise ShareError(f"{folder}: holds no model (no {CONFIG}).{_models_below(folder)} {_REMEDY}")
    kind_of_model = _read_json(folder / CONFIG).get("model_type")
    if kind_of_model != SamfConfig.model_type:
        raise ShareError(
            f"{folder}: a model of type {kind_of_model!r}, not {SamfConfig.model_type!r}.{_models_below(folder)} {_REMEDY}"
        )
    config = SamfConfig.from_pretrained(folder)
    weights = _find_weights(folder, _MODEL_WEIGHTS)
    if weights:
        kind: Kind = "model" if getattr(config, "quantization_config", None) is None else "quantized"
        return SavedModel(folder, kind, weights, config, {})
    adapter = _find_weights(folder, _ADAPTER_WEIGHTS) if (folder / ADAPTER_CONFIG).is_file() else []
    if not adapter:
        raise ShareError(f"{folder}: no weights ({_MODEL_WEIGHTS}).{_models_below(folder)} {_REMEDY}")
    return SavedModel(folder, "adapter", adapter, config, _read_json(folder / ADAPTER_CONFIG))


def _find_weights(folder: Path, pattern: str) -> list[Path]:
    """Return the weights of a folder, complete and readable."""
    files = sorted(folder.glob(pattern))
    if not files:
        return []
    if (folder / _INDEX).is_file() and pattern == _MODEL_WEIGHTS:
        named = set(_read_json(folder / _INDEX).get("weight_map", {}).values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise ShareError(f"{folder}: {_INDEX} names {missing[0]}, which isn't there. Save the model again.")
        files = [folder / _INDEX, *(file for file in files if file.name in named)]
    try:
        check_whole(folder)
    except SafetensorError as error:
        raise ShareError(f"{folder}: weights can't be read ({error}). Save the model again.") from error
    except RuntimeError as error:
        raise ShareError(str(error)) from error
    return files


def _models_below(folder: Path) -> str:
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    names = ", ".join(str(path) for path in found[:4])
    return f" There are models in {names}." if found else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShareError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ShareError(f"{path}: a JSON {type(content).__name__}; expected an object.")
    return content
