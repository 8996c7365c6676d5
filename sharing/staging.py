"""Make the folder that is uploaded: links to the weights, and everything else written by this version of the package.

Weights are neither loaded nor copied, so that a push needs as little memory and disk for 8 GB as for 8 MB. That they belong
to the model is seen from their headers: names and shapes of all tensors.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers.utils import logging as transformers_logging

from samf.model.hub_samf import HubModel
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.processing_samf import SamfProcessor
from samf.sharing.errors import ShareError
from samf.sharing.private_data import scrub_json_files
from samf.sharing.saved_models import ADAPTER_CONFIG, SavedModel
from samf.utils.auto_classes import register_classes
from samf.utils.files import write_json
from samf.utils.packaged import HANDLER, REQUIREMENTS


@dataclass(frozen=True)
class HubBase:
    """The base model of an adapter: its repository, and the commit whose weights the adapter was trained on."""

    repo_id: str
    revision: str | None = None


def load_outline(saved: SavedModel) -> HubModel:
    """Return a folder's model without its weights, after comparing them with it: names and shapes of all tensors.

    Quantised weights are loaded, since only their layers know their shapes.

    Raises:
        ShareError: the weights aren't those of the configuration, or the folder doesn't load.
    """
    register_classes()  # so that saving copies the code
    options: dict[str, Any] = {} if saved.kind == "quantized" else {"device_map": "meta"}
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)  # the report of missing weights, which follows as an error
    transformers_logging.disable_progress_bar()
    try:
        if saved.kind == "adapter":  # the base model may be elsewhere
            return _adapter_outline(saved)
        model, info = cast(
            tuple[HubModel, Mapping[str, Any]],
            SamfForConditionalGeneration.from_pretrained(
                saved.folder, dtype="auto", output_loading_info=True, **options
            ),
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ShareError(f"{saved.folder}: doesn't load: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    for what, names in (("lack", info["missing_keys"]), ("have unknown", info["unexpected_keys"])):
        if names:
            raise ShareError(
                f"{saved.folder}: doesn't load: the weights {what} {len(names)} tensors, {sorted(names)[0]} first. They "
                "aren't those of its config.json; save the model again."
            )
    return model


def _adapter_outline(saved: SavedModel) -> HubModel:
    """Return the base model of an adapter's configuration, after comparing the adapter's full parts with it."""
    import torch

    with torch.device("meta"):
        model = SamfForConditionalGeneration(saved.config)
    own = {f"base_model.model.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, (path, shape) in saved.tensors().items():
        if name in own and own[name] != tuple(shape):
            raise ShareError(f"{path}: {name} has the shape {tuple(shape)}; the model's is {own[name]}.")
    return model


def stage_model(saved: SavedModel, target: Path, base: HubBase | None, *, with_handler: bool) -> HubModel:
    """Write a complete repository into `target`, except for its card, and return the model without its weights.

    Args:
        saved: the model to share.
        target: an empty folder.
        base: an adapter's base model on the Hub.
        with_handler: add handler.py, by which Inference Endpoints serve the model.

    Raises:
        ShareError: the folder doesn't load.
    """
    model = load_outline(saved)
    model.config._name_or_path = ""
    model.save_config_and_code(target)
    if model.can_generate() and saved.kind != "adapter":
        model.generation_config.save_pretrained(target)
    try:
        SamfProcessor.from_pretrained(saved.folder).save_pretrained(target)
    except (OSError, ValueError) as error:
        raise ShareError(f"{saved.folder}: its processor doesn't load: {error}") from error
    for path in saved.weights:
        _link(path, target / path.name)
    if saved.kind == "adapter":
        write_json(target / ADAPTER_CONFIG, _public_adapter(saved.adapter, base))
    shutil.copyfile(REQUIREMENTS, target / REQUIREMENTS.name)
    if with_handler:
        shutil.copyfile(HANDLER, target / HANDLER.name)
    scrub_json_files(target)
    return model


def _public_adapter(adapter: Mapping[str, Any], base: HubBase | None) -> dict[str, Any]:
    named = {} if base is None else {"base_model_name_or_path": base.repo_id, "revision": base.revision}
    return {**adapter, **named}


def _link(path: Path, target: Path) -> None:
    try:
        target.symlink_to(path.resolve())
    except OSError:  # a file system or a user without symbolic links
        shutil.copyfile(path, target)
