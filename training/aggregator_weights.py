"""A warmed-up aggregator on disk: its weights, its position embeddings, and the settings that give them their meaning."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from samf.model.configuration_samf import SamfConfig
from samf.training.trainer_base import written_whole

WEIGHTS_FILE = "aggregator.safetensors"
SETTINGS_FILE = "aggregator_config.json"
PARTS = ("aggregator", "slice_position")
# With equal weights but another of these, the aggregator would compute something else.
SETTINGS = (
    "aggregator_num_layers",
    "aggregator_num_heads",
    "aggregator_ffn_dim",
    "aggregator_activation",
    "aggregator_layer_norm_eps",
    "aggregator_norm",
    "volume_dim",
    "slice_pooling",
)


def aggregator_settings(config: SamfConfig) -> dict[str, Any]:
    """What of a configuration decides how the aggregator's weights are read."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    # "aggregator" and "all" give the aggregator the same input.
    positions = config.slice_position_scope != "none"
    return settings | {"slice_positions": positions, "slice_dim": config.slice_dim}


def save_aggregator(model: nn.Module, folder: str | os.PathLike) -> None:
    """The aggregator and slice positions of a SamfModel or SamfForConditionalGeneration, as `load_aggregator` reads them."""
    base = model.base_model
    weights = {
        f"{part}.{name}": tensor.detach().contiguous().cpu()
        for part in PARTS
        if getattr(base, part) is not None
        for name, tensor in getattr(base, part).state_dict().items()
    }
    settings = json.dumps(aggregator_settings(model.config), indent=2) + "\n"
    with written_whole(folder) as temporary:
        save_file(weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / SETTINGS_FILE).write_text(settings, encoding="utf-8")


def load_aggregator(model: nn.Module, folder: str | os.PathLike) -> None:
    """Put a warmed-up aggregator and its slice positions into a model, in the model's own precision.

    Args:
        model: SamfModel or SamfForConditionalGeneration.
        folder: what `warmup_aggregator.py` wrote.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: the model's aggregator is made otherwise; names every setting that differs.
    """
    folder = Path(folder)
    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; expected the output folder of warmup_aggregator.py.")
    stored = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    own = aggregator_settings(model.config)
    differing = [
        f"{name}: {stored.get(name)!r} there, {value!r} here"
        for name, value in own.items()
        if stored.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{folder}: the warmed-up aggregator doesn't fit this model ({'; '.join(differing)}). Use the same settings in "
            f"warmup_aggregator.py and here."
        )
    weights = load_file(folder / WEIGHTS_FILE)
    for part in PARTS:
        module = getattr(model.base_model, part)
        if module is not None:
            start = f"{part}."
            module.load_state_dict(
                {name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)}
            )
