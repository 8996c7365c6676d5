"""What a finished run's folder says about the run, and whether its weights are complete."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from safetensors import safe_open
from transformers import TrainerState

from samf.training.arguments import DataArguments, ModelArguments


class CardSettings(TypedDict, total=False):
    """Arguments of `make_card` that a model doesn't know."""

    base_models: list[str]
    facts: Mapping[str, str | int]
    data: str


def card_settings(model_args: ModelArguments, data_args: DataArguments) -> CardSettings:
    """Return what the model card says about a run."""
    if model_args.model is not None:
        sources = {"Continues": model_args.model}
    else:
        sources = {"Slice encoder": model_args.slice_encoder, "Language model": model_args.text_model}
    facts = {**sources, "Trained parts": ", ".join(model_args.train_parts), "Tasks": ", ".join(data_args.tasks)}
    return {"base_models": list(sources.values()), "facts": facts, "data": data_args.data_shards or data_args.data}


def validation_losses(state: TrainerState) -> dict[str, float]:
    """Return the last validation losses with each patient's own volume and with another's, where they were measured."""
    names = {"eval_own_loss": "loss, own volumes", "eval_shuffled_loss": "loss, other patients' volumes"}
    found = {names[key]: value for row in state.log_history for key, value in row.items() if key in names}
    return {name: found[name] for name in names.values() if name in found}


def check_whole(folder: str | Path) -> None:
    """Raise RuntimeError where a folder's weights have no tensor, or an empty one, the placeholder of a shard."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
            empty = [name for name in names if 0 in weights.get_slice(name).get_shape()]
        if empty or not names:
            found = f"{len(empty)} tensors are empty ({empty[0]} first)" if empty else "there are no tensors"
            raise RuntimeError(
                f"{file}: {found}. The weights were saved from shards that weren't "
                "gathered; with ZeRO-3, set zero3_save_16bit_model as recipes/accelerate/deepspeed_zero3.yaml does."
            )
