"""Adapters of peft on SAMF's models: find them, save them, and find their base models."""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils.import_utils import is_peft_available

from .model_card import hub_id

_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")
_DOWNLOAD_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


class AdapterConfig(Protocol):
    """The part of peft's `PeftConfig` that is used here; remote code must not import peft where it isn't needed."""

    base_model_name_or_path: str | None
    inference_mode: bool

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write adapter_config.json."""


def active_adapter(model: nn.Module) -> AdapterConfig | None:
    """Return the peft configuration of a model's active adapter, or None; from `add_adapter` or `get_peft_model`."""
    configs: Mapping[str, AdapterConfig] = getattr(model, "peft_config", None) or {}
    # A merged adapter can leave its configuration behind, but no wrapped layer.
    layers = (module for module in model.modules() if hasattr(module, "base_layer")) if configs else ()
    for layer in layers:
        name = cast(str | list[str], layer.active_adapter)
        return configs[name if isinstance(name, str) else name[0]]
    return None


def save_wrapped_adapter(model: nn.Module, folder: Path, state_dict: Mapping[str, torch.Tensor] | None) -> None:
    """Write what peft's `PeftModel.save_pretrained` writes, except its model card.

    Args:
        model: a model that peft has wrapped, without the wrapper.
        folder: created if it doesn't exist.
        state_dict: the weights to save; None = the model's.

    Raises:
        ImportError: peft is missing.
        ValueError: the model has no active adapter.
    """
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise ImportError("This model has an adapter: pip install peft") from error
    adapter = active_adapter(model)
    if adapter is None:
        raise ValueError(f"{type(model).__name__} has no active adapter to save.")
    folder.mkdir(parents=True, exist_ok=True)
    configs: Mapping[str, AdapterConfig] = model.peft_config  # type: ignore[assignment]
    name = next(name for name, found in configs.items() if found is adapter)
    weights = get_peft_model_state_dict(model, state_dict, adapter_name=name)
    # Cloned, since peft may return views of shared memory, which safetensors refuses.
    weights = {f"base_model.model.{key}": value.detach().clone().contiguous() for key, value in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(adapter)
    config.inference_mode = True
    config.save_pretrained(folder)


def load_full_parts(
    model: nn.Module,
    adapter: str | os.PathLike | None,
    name: str,
    weights: Mapping[str, torch.Tensor] | None,
    options: Mapping[str, Any],
) -> set[str]:
    """Load an adapter's weights again by peft, including the parts trained in full (`modules_to_save`).

    Args:
        model: the model that has the adapter.
        adapter: Hub id or folder.
        name: the adapter's name in the model.
        weights: the adapter's weights; None = read them from `adapter`.
        options: `adapter_kwargs` of the library's `load_adapter`; those of a download are used.

    Returns:
        The names of weights that the adapter lacks.

    Raises:
        ImportError: peft is missing.
    """
    try:
        from peft import load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise ImportError(f"{adapter} is an adapter: pip install peft") from error
    if weights is None:
        download = {option: value for option, value in options.items() if option in _DOWNLOAD_OPTIONS}
        weights = load_peft_weights(str(adapter), device="cpu", **download)
    prefix, base = "base_model.model.", str(model.base_model_prefix)
    if not hasattr(model, base):  # the adapter of a model with its head, on one without
        prefix += f"{base}."
    own = {key.removeprefix(prefix): value for key, value in weights.items()}
    found: Any = set_peft_model_state_dict(model, own, name)
    return set(found.missing_keys)


def base_problem(adapter: AdapterConfig) -> str:
    """Return why others can't load an adapter whose base model isn't on the Hub, and what to do."""
    base = adapter.base_model_name_or_path
    found = f"the folder {base} of this machine" if base else "not known by any name"
    return (
        f"its base model is {found}. Push the base model first, load it by its Hub id and train the adapter on that, or set "
        "peft_config[...].base_model_name_or_path to that id."
    )


def adapter_base(folder: str | os.PathLike | None) -> str | None:
    """Return the base model of a local folder that holds an adapter and no model; None for any other folder.

    A base model's folder inside the adapter's, or for a run's checkpoint next to it, is preferred to the path in the
    adapter's configuration, since both may have been moved or copied.

    Args:
        folder: the adapter's folder; a Hub id or None is accepted.

    Raises:
        ImportError: the folder holds an adapter, and peft is missing.
        ValueError: the adapter names no base model.
        FileNotFoundError: its base model was a folder that no longer exists.
    """
    config = Path(folder or "") / "adapter_config.json"
    if folder is None or not config.is_file() or any(any(Path(folder).glob(pattern)) for pattern in _WEIGHTS):
        return None
    if not is_peft_available():
        raise ImportError(f"{folder} holds an adapter: pip install peft")
    base: str | None = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{config}: base_model_name_or_path is missing; set it to the base model's Hub id or folder.")
    own = Path(folder).resolve()
    name = PureWindowsPath(base).name  # the last part of either kind of path
    places = [own, own.parent] if own.name.startswith("checkpoint-") else [own]
    moved = next((place / name for place in places if (place / name / "config.json").is_file()), None)
    if moved is not None and hub_id(base) is None:
        return str(moved)
    if hub_id(base) is None and not Path(base).is_dir():
        raise FileNotFoundError(
            f"{config}: its base model is {base}, which isn't there, and neither is {own / name}. Put the base model's "
            "folder there, or set base_model_name_or_path to its new place or Hub id."
        )
    return base


def base_revision(folder: str | os.PathLike | None, base: str) -> str | None:
    """Return the commit of the base model that a local adapter's configuration names; None for a base that is a folder.

    Args:
        folder: the adapter's folder.
        base: its base model, as `adapter_base` returns it.
    """
    if folder is None or hub_id(base) is None:
        return None
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    revision: str | None = config.get("revision")
    return revision
