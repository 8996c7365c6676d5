"""A warmed-up aggregator on disk: its weights, its position embeddings, and the settings that they depend on."""

import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from samf.model.configuration_samf import SamfConfig
from samf.model.hub_samf import publish_weights
from samf.model.modeling_samf import SamfPreTrainedModel
from samf.utils.files import atomic_update

_WEIGHTS_FILE = "aggregator.safetensors"
_SETTINGS_FILE = "aggregator_config.json"
_MODULES = ("aggregator", "slice_position")
# With equal weights but another value of one of these, the aggregator would compute something else.
_SETTINGS = (
    "aggregator_num_layers",
    "aggregator_num_heads",
    "aggregator_ffn_dim",
    "aggregator_activation",
    "aggregator_layer_norm_eps",
    "aggregator_norm",
    "aggregator_pooling",
    "volume_dim",
    "slice_pooling",
)


def _aggregator_settings(config: SamfConfig) -> dict[str, int | float | str]:
    """Return the values of a configuration that the meaning of the aggregator's weights depends on."""
    settings = {name: getattr(config, name) for name in _SETTINGS}
    # "aggregator" and "all" give the aggregator the same input.
    positions = config.slice_position_scope != "none"
    return settings | {"slice_positions": positions, "slice_dim": config.slice_dim}


def save_aggregator(model: SamfPreTrainedModel, folder: str | os.PathLike) -> None:
    """Save the aggregator and slice positions of a model, for `load_aggregator`.

    Args:
        model: SamfModel or SamfForConditionalGeneration.
        folder: Gets the two files; created if it doesn't exist.
    """
    base = model.base_model
    weights = {
        f"{module}.{name}": tensor.detach().contiguous().cpu()
        for module in _MODULES
        if getattr(base, module) is not None
        for name, tensor in getattr(base, module).state_dict().items()
    }
    settings = json.dumps(_aggregator_settings(model.config), indent=2) + "\n"
    with atomic_update(folder) as temporary:
        save_file(weights, temporary / _WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / _SETTINGS_FILE).write_text(settings, encoding="utf-8")
        publish_weights(temporary)


def load_aggregator(model: SamfPreTrainedModel, folder: str | os.PathLike) -> None:
    """Load a warmed-up aggregator and its slice positions into a model, in the model's own precision.

    Args:
        model: SamfModel or SamfForConditionalGeneration.
        folder: Output folder of `warmup_aggregator.py`.

    Raises:
        FileNotFoundError: The folder lacks one of the two files.
        ValueError: The model's aggregator has other settings; names each of them.
    """
    folder = Path(folder)
    for name in (_SETTINGS_FILE, _WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; expected the output folder of warmup_aggregator.py.")
    # Files from before this setting existed are of the paper's pooling.
    stored = {"aggregator_pooling": "cls", **json.loads((folder / _SETTINGS_FILE).read_text(encoding="utf-8"))}
    differing = [
        f"{name}: {stored.get(name)!r} there, {value!r} here"
        for name, value in _aggregator_settings(model.config).items()
        if stored.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder}: the warmed-up aggregator doesn't fit this model ({'; '.join(differing)}). Use the same settings in "
            f"warmup_aggregator.py and here."
        )
    weights = load_file(folder / _WEIGHTS_FILE)
    for name in _MODULES:
        module, prefix = getattr(model.base_model, name), f"{name}."
        if module is not None:
            module.load_state_dict(
                {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
            )
