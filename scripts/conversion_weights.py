"""Weights of a checkpoint under our names: adapters merged, wrappers removed, loaded into a model."""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from samf.scripts.conversion_arguments import Branch, Precision
from samf.scripts.conversion_checks import ConversionError, Entries, UniqueNames, check_adapter, check_tensors
from samf.scripts.conversion_names import Names
from samf.scripts.conversion_sources import RECORDED

logger = logging.getLogger("samf.convert")

_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "vit.")
_NOT_BACKBONE = re.compile(
    r"((projection_|prediction_)?heads?|classifier|pooler|fc|criterion|dino_loss)\..*|(embeddings\.)?mask_token"
)


Entry = TypeVar("Entry")
Model = TypeVar("Model", bound=PreTrainedModel)


def plain_names(weights: Mapping[str, Entry], source: str) -> dict[str, Entry]:
    """Return `weights` without the prefixes of parallel training, and without recorded inputs and outputs."""
    if any(name.startswith("weights/") for name in weights):
        weights = {name.removeprefix("weights/"): v for name, v in weights.items() if not RECORDED.fullmatch(name)}
    plain: UniqueNames[Entry] = UniqueNames(source)
    for name, value in weights.items():
        plain.add(_strip(name, ("module.", "_orig_mod.")), value, name)
    return plain


def merge_lora(weights: Entries, alpha: float, source: str, dtype: Precision = "auto") -> UniqueNames[Any]:
    """Merge peft's LoRA adapters: W + (alpha / r) B A replaces each W that has an adapter (A, B).

    For a module that was trained in full (`modules_to_save`), the trained copy is kept and the original left out.

    Args:
        weights: under peft's names.
        alpha: of the adapters.
        source: name of the checkpoint, for messages.
        dtype: of the sums, which are computed in float32; "auto" is that of W.

    Returns:
        Weights under the wrapped model's names.

    Raises:
        ConversionError: an adapter lacks a half or its weight, or doesn't fit it.
    """
    merged, down, up = _split_adapters(weights, source)
    halves = sorted((down.keys() ^ up.keys()) | (down.keys() - merged.keys()))
    if halves:
        raise ConversionError(f"{source}: LoRA adapters without their other half or weight: {', '.join(halves)}.")
    for name in down:
        check_adapter(name, merged[name], down[name], up[name], source)
    if down:
        ranks = sorted({value.shape[0] for value in down.values()})
        logger.info("%s: merging %d LoRA adapters of rank %s, alpha %g", source, len(down), ranks, alpha)
    for name in tqdm(down, desc="Merging adapters", disable=not down):
        weight, scale = merged[name], alpha / down[name].shape[0]
        whole = torch.addmm(weight.float(), up[name].float(), down[name].float(), alpha=scale)
        merged[name] = whole.to(weight.dtype if dtype == "auto" else getattr(torch, dtype))
        check_tensors({name: merged[name]}, f"{source}, with its adapters merged")
    return merged


def _split_adapters(weights: Entries, source: str) -> tuple[UniqueNames[Any], UniqueNames[Any], UniqueNames[Any]]:
    """Return the weights under the wrapped model's names, and the adapters' A and B by the name of their weight."""
    plain: UniqueNames[Any] = UniqueNames(source)
    adapters: dict[str, UniqueNames[Any]] = {"A": UniqueNames(source), "B": UniqueNames(source)}
    for full_name, value in weights.items():
        name = full_name.removeprefix("base_model.model.")
        adapter = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", name)
        if adapter:
            adapters[adapter[2]].add(f"{adapter[1]}.weight", value, full_name)
        elif ".original_module." in name:
            logger.info("%s: left out %s, which has a trained copy", source, name)
        else:
            short = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            plain.add(short, value, full_name)
    return plain, adapters["A"], adapters["B"]


def backbone_weights(loaded: Entries, branch: Branch | None, source: str) -> Entries:
    """Return the backbone's weights of a DINO checkpoint: one branch of it, without wrappers and heads.

    Args:
        loaded: a state dict, or one that holds it as `teacher`, `student`, `state_dict` or `model`.
        branch: None is the teacher if there is one, as DINO uses it.
        source: name of the checkpoint, for messages.

    Raises:
        ConversionError: there is no such branch, or two entries have the same name without their wrappers.
    """
    left_out: list[str] = []
    branches: tuple[str, ...] = (branch,) if branch else ("teacher", "student")
    while inner := next((k for k in (*branches, "state_dict", "model") if isinstance(loaded.get(k), Mapping)), None):
        left_out += [name for name in loaded if name != inner]
        branches = () if inner in branches else branches
        loaded = cast(Entries, loaded[inner])
    names = {name: _strip(name, _WRAPPERS) for name in loaded}
    found = {match[1] for name in names.values() if (match := re.match(r"(teacher|student)[._]", name))}
    chosen = next((name for name in branches if name in found), None)
    if branch and branches and not chosen:
        raise ConversionError(f"{source}: has no {branch}; leave --branch out to take the weights that it has.")
    weights: dict[str, object] = {}
    for name, short in names.items():
        if chosen:
            own = re.sub(rf"^{chosen}[._]", "", short)
            short = short if own == short and re.match(r"(teacher|student)[._]", short) else _strip(own, _WRAPPERS)
        if _NOT_BACKBONE.fullmatch(short) or (chosen and re.match(r"(teacher|student)[._]", short)):
            left_out.append(name)
        elif short in weights:
            raise ConversionError(f"{source}: holds {short} more than once, the last time as {name}.")
        else:
            weights[short] = loaded[name]
    if left_out:
        logger.info("%s: left out, not the backbone's: %s", source, ", ".join(left_out))
    return weights


def _strip(name: str, prefixes: tuple[str, ...]) -> str:
    while prefix := next((prefix for prefix in prefixes if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def rename(weights: Entries, names: Names, source: str) -> dict[str, torch.Tensor]:
    """Return weights under our names; stacked queries, keys and values become three tensors.

    Args:
        weights: under the checkpoint's names.
        names: table of names.
        source: name of the checkpoint, for messages.

    Raises:
        ConversionError: an entry is unknown; the message lists all of them.
    """
    ours: UniqueNames[torch.Tensor] = UniqueNames(source)
    unknown = []
    for name, value in weights.items():
        target = names.ours(name)
        if target is None or not isinstance(value, torch.Tensor):
            unknown.append(name)
        elif "{qkv}" in target:
            if value.ndim == 0 or len(value) % 3:
                raise ConversionError(
                    f"{source}: {name} has shape {list(value.shape)}; expected queries, keys and values."
                )
            for letter, third in zip("qkv", value.tensor_split(3), strict=True):
                # Cloned, since a file can't hold three views of one tensor; they are small.
                ours.add(target.format(qkv=letter), third.clone(), name)
        else:
            ours.add(target, value, name)
    if unknown:
        raise ConversionError(f"{source}: holds unknown entries: {', '.join(sorted(unknown))}.")
    return ours


def empty_model(build: Callable[[], Model]) -> Model:
    """Build a model without memory for its weights."""
    with torch.device("meta"):
        return build()


def fill(model: PreTrainedModel, weights: dict[str, torch.Tensor], names: Names, source: str, dtype: Precision) -> None:
    """Load weights into a model of `empty_model`, without copying them.

    Args:
        model: gets the weights.
        weights: under our names; cast in place.
        names: table of names, for messages.
        source: name of the checkpoint, for messages.
        dtype: of the weights; "auto" keeps theirs.

    Raises:
        ConversionError: weights are missing, unknown, of another shape, or too large for `dtype`; lists all of them.
    """
    expected = model.state_dict()
    lists = {
        "lacks": sorted({names.theirs(name) for name in expected.keys() - weights.keys()}),
        "holds unknown entries": sorted(names.theirs(name) for name in weights.keys() - expected.keys()),
        "has unexpected shapes": [
            f"{names.theirs(name)} {list(weights[name].shape)}, expected {list(expected[name].shape)}"
            for name in sorted(expected.keys() & weights.keys())
            if weights[name].shape != expected[name].shape
        ],
    }
    wrong = "; ".join(f"{what}: {', '.join(found)}" for what, found in lists.items() if found)
    if wrong:
        raise ConversionError(f"{source}: {wrong}. Is it a complete checkpoint of this kind?")
    if dtype != "auto":
        for name in weights:
            weights[name] = weights[name].to(getattr(torch, dtype))  # one by one, so that few are in memory twice
            if not weights[name].isfinite().all():
                raise ConversionError(
                    f"{source}: {names.theirs(name)} is too large for {dtype}. Give --dtype bfloat16 or float32."
                )
    model.load_state_dict(weights, strict=True, assign=True)
