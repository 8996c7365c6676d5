"""What a finished run's folder says about the run, and whether its weights are complete."""

from collections.abc import Mapping, Sequence, Sized
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

from safetensors import safe_open
from transformers import TrainerState, TrainingArguments

from samf.model.model_card import public_name
from samf.training.arguments import DataArguments, ModelArguments, TuningArguments
from samf.utils.files import write_json
from samf.utils.packaged import package_version

RUN_RECORD = "_run.json"  # the underscore keeps Trainer from pushing it
_LIBRARIES = ("torch", "transformers", "peft", "accelerate")


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


def write_run_record(
    training: TrainingArguments,
    data: DataArguments,
    tuning: TuningArguments,
    recipes: Sequence[Path],
    records: Mapping[str, Any],
) -> None:
    """Write what `samf push` says about a run that isn't in trainer_state.json: recipe, data, settings, versions.

    Of folders only the names are written, and of records only their number.

    Args:
        training: arguments of the run; the record goes into its output folder.
        data: names the data set.
        tuning: settings of the adapter.
        recipes: the recipes given on the command line.
        records: the train_dataset and, per kind of volumes, the eval_dataset.
    """
    valid = (records.get("eval_dataset") or {}).get("own")
    content = {
        "recipes": [path.stem for path in recipes],
        "data": public_name(data.data) if data.data else None,
        "tasks": data.tasks,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type),
        "num_train_epochs": training.num_train_epochs if training.max_steps <= 0 else None,
        "seed": training.seed,
        "bf16": training.bf16,
        "lora_rank": tuning.lora_rank or None,
        "train_records": _length(records.get("train_dataset")),
        "valid_records": _length(valid),
        "versions": {"samf": package_version(), **{name: found for name in _LIBRARIES if (found := _version(name))}},
    }
    Path(training.output_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(training.output_dir) / RUN_RECORD, content)


def _length(records: Any) -> int | None:
    return len(records) if isinstance(records, Sized) else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
