"""LoRA on the language model, with the model's other parts trained in full; saving the base model, and merging.

    python -m samf.training.adapter runs/lora runs/merged     # writes the merged model

An adapter's folder names its base model. A new model, built from its components, exists nowhere else: train.py saves it in
full as `base` within the output folder, before training.
"""

import argparse
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from samf.model.adapters_samf import adapter_base, base_revision
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.processing_samf import SamfProcessor
from samf.training.arguments import TuningArguments
from samf.training.param_groups import PARTS
from samf.utils.files import atomic_update

logger = logging.getLogger(__name__)

BASE, MERGED = "base", "merged"  # folders within the output folder
_LANGUAGE_MODEL = "model.language_model."


def save_base(model: SamfForConditionalGeneration, processor: SamfProcessor, folder: str | Path) -> None:
    """Save a new model and its processor, for adapters to name as their base.

    Args:
        model: The model before it gets an adapter.
        processor: Saved with it.
        folder: Where to save; created if it doesn't exist.
    """
    logger.info("the adapter's base model: %s", folder)
    with atomic_update(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def language_model_layers(model: SamfForConditionalGeneration) -> str:
    """Return a regular expression of the language model's linear layers, which get LoRA in the paper."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(_LANGUAGE_MODEL)
    }
    return rf".*language_model\..*\.({'|'.join(map(re.escape, sorted(names)))})"


def _fully_trained_modules(
    model: SamfForConditionalGeneration, args: TuningArguments, train_parts: Sequence[str]
) -> list[str]:
    """Return the modules that are trained in full in addition to the adapter, under the names by which peft finds them."""
    modules = [
        part
        for part in train_parts
        if part in PARTS and part != "language_model" and getattr(model.model, part) is not None
    ]
    if args.lora_embeddings:
        embeddings = model.get_input_embeddings()  # embed_tokens, in GPT-2 wte
        modules += [name.rpartition(".")[2] for name, module in model.named_modules() if module is embeddings]
        modules += [] if model.config.tie_word_embeddings else ["lm_head"]
    return modules


def add_lora(
    model: SamfForConditionalGeneration, args: TuningArguments, train_parts: Sequence[str], base: str | Path
) -> PreTrainedModel:
    """Wrap a model with peft: an adapter on the language model's layers, the other trained parts in full.

    Args:
        model: The model to wrap.
        args: Rank and other settings of the adapter.
        train_parts: The parts that are trained.
        base: Folder or Hub id of the model that the adapter will be loaded on.

    Raises:
        ImportError: peft is missing.
        ValueError: The model has an adapter already, the language model isn't among the trained parts, or `lora_targets`
            matches none of its layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError("lora_rank needs peft: pip install peft") from error
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"{base} has an adapter already, and lora_rank would put another on it. Merge it first, "
            f"`python -m samf.training.adapter {base} MERGED`, then --model MERGED."
        )
    if "language_model" not in train_parts:
        raise ValueError(
            "lora_rank is about the language model, which train_parts doesn't name: add it, or drop lora_rank."
        )
    targets = args.lora_targets or language_model_layers(model)
    if not any(re.fullmatch(targets, name) for name, _ in model.named_modules() if name.startswith(_LANGUAGE_MODEL)):
        raise ValueError(f"lora_targets={targets!r} matches no layer; the default is {language_model_layers(model)!r}.")
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_dora=args.use_dora,
        target_modules=targets,
        modules_to_save=_fully_trained_modules(model, args, train_parts) or None,
        ensure_weight_tying=args.lora_embeddings and model.config.tie_word_embeddings,
    )
    wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    return wrapped


def cast_trained(model: nn.Module, dtype: str) -> None:
    """Cast the trained weights. A step of 5e-5 is below bfloat16's resolution for most weights."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def merge_adapter(folder: str | Path, target: str | Path) -> None:
    """Write the model of an adapter's folder into `target`, with the adapter and the full parts merged into its weights.

    The merged weights are those that were saved, so the number of training processes makes no difference.

    Args:
        folder: An adapter's folder.
        target: The folder to write; created if it doesn't exist.

    Raises:
        ValueError: `folder` holds no adapter.
    """
    from peft import PeftModel  # optional, as in add_lora

    base = adapter_base(folder)
    if base is None:
        raise ValueError(
            f"{folder}: no adapter (adapter_config.json without model weights); expected what lora_rank made."
        )
    revision = base_revision(folder, base)
    model = SamfForConditionalGeneration.from_pretrained(
        base, dtype="auto", **({"revision": revision} if revision else {})
    )
    dtype = model.dtype
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().to(dtype)
    merged.config._name_or_path = ""  # a local folder means nothing on other machines
    with atomic_update(target) as temporary:
        merged.save_pretrained(temporary)
        SamfProcessor.from_pretrained(folder).save_pretrained(temporary)
        requirements = Path(folder) / "requirements.txt"
        if requirements.is_file():
            shutil.copyfile(requirements, temporary / requirements.name)
    logger.info("merged model: %s", target)


def main(argv: Sequence[str] | None = None) -> None:
    """Merge an adapter from the command line."""
    parser = argparse.ArgumentParser(prog="python -m samf.training.adapter", description="Merge an adapter.")
    parser.add_argument("adapter", type=Path, help="an adapter's folder")
    parser.add_argument("target", type=Path, help="the folder to write")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    merge_adapter(args.adapter, args.target)


if __name__ == "__main__":
    main()
