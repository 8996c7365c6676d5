"""Benchmarks of memory at full size: save, reload, 8 bits, a LoRA step."""

import importlib.util
import json
import math
import time
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig

from samf.benchmarks.measuring import Measurement
from samf.benchmarks.workloads import (
    SAVED_DTYPE,
    LineSkipped,
    Settings,
    checksums,
    conversation_batch,
    generate,
    random_model,
)
from samf.model.modeling_samf import SamfForConditionalGeneration

LORA_TARGETS = r".*language_model.*\.(qkv_proj|o_proj|gate_up_proj|down_proj)"
TRAINED_PARTS = ("slice_encoder", "slice_position", "aggregator", "fusion")
BYTES_IN_8_BITS = 1.5  # per weight, on average with the parts that aren't quantised


def save_model(settings: Settings) -> list[Measurement]:
    """Save shards in bfloat16, and the checksums that the reloaded weights must have."""
    settings.require_memory(SAVED_DTYPE.itemsize)
    started = time.monotonic()
    model = random_model(SamfForConditionalGeneration, settings.config(), torch.device("cpu"), SAVED_DTYPE)
    built = time.monotonic()
    model.save_pretrained(settings.folder / "saved", max_shard_size=settings.sizes.shard_size)
    saved = time.monotonic()
    (settings.folder / "checksums.json").write_text(json.dumps(checksums(model)), encoding="utf-8")
    return [
        Measurement("build random weights", "s", [built - started]),
        Measurement("save_pretrained", "s", [saved - built], note=f"bfloat16, {settings.sizes.shard_size} shards"),
        *_describe_shards(settings.folder / "saved"),
    ]


def _describe_shards(folder: Path) -> list[Measurement]:
    shards = list(folder.glob("*.safetensors"))
    return [
        Measurement("shards", "files", [len(shards)]),
        Measurement("size on disk", "GB", [sum(shard.stat().st_size for shard in shards) / 1e9]),
    ]


def reload_model(settings: Settings) -> list[Measurement]:
    """Load the saved model, compare every weight, and answer one left-padded batch from pixels.

    Raises:
        RuntimeError: a weight differs.
    """
    settings.require_memory(settings.dtype.itemsize)
    started = time.monotonic()
    model = SamfForConditionalGeneration.from_pretrained(
        settings.folder / "saved", dtype=settings.dtype, device_map=settings.device
    ).eval()
    loaded = time.monotonic()
    expected = json.loads((settings.folder / "checksums.json").read_text(encoding="utf-8"))
    found = checksums(model)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise RuntimeError(f"{len(wrong)} weights differ from those saved, the first of them {wrong[0]}.")
    return [
        Measurement("from_pretrained", "s", [loaded - started], note="every weight as saved"),
        *_answer_batch(settings, model)[1],
    ]


def _answer_batch(settings: Settings, model: PreTrainedModel) -> tuple[torch.Tensor, list[Measurement]]:
    sizes = settings.sizes
    batch = conversation_batch(settings, sizes.saved_volumes, sizes.prompt)
    tokens, clock = generate(model, batch, sizes.new_tokens)
    note = f"{sizes.saved_volumes} volumes of up to {sizes.slices} slices, left-padded to {batch['input_ids'].shape[1]}"
    return tokens, [
        Measurement("pixels to first token", "s", [clock.prefill], note=note),
        Measurement("a further token", "s", clock.steps, note="of each row"),
        Measurement(f"{sizes.new_tokens} tokens", "s", [clock.prefill + sum(clock.steps)]),
    ]


def quantise_model(settings: Settings) -> list[Measurement]:
    """Load the saved model with its language model in 8 bits, answer the same batch, and save it in 8 bits."""
    settings.require_memory(BYTES_IN_8_BITS)
    started = time.monotonic()
    model = SamfForConditionalGeneration.from_pretrained(
        settings.folder / "saved",
        dtype=settings.dtype,
        device_map=settings.device,
        quantization_config=eight_bit_config(),
    ).eval()
    loaded = time.monotonic()
    quantised = quantised_weights(model)
    tokens, answered = _answer_batch(settings, model)
    torch.save(tokens.cpu(), settings.folder / "tokens.pt")
    saving = time.monotonic()
    model.save_pretrained(settings.folder / "saved_8bit", max_shard_size=settings.sizes.shard_size)
    saved = time.monotonic()
    return [
        Measurement(
            "from_pretrained", "s", [loaded - started], note=f"8 bits: {quantised} layers of the language model"
        ),
        *answered,
        Measurement("save_pretrained", "s", [saved - saving]),
        *_describe_shards(settings.folder / "saved_8bit"),
    ]


def reload_quantised(settings: Settings) -> list[Measurement]:
    """Load the 8-bit folder; the model must answer as before it was saved.

    Raises:
        RuntimeError: it doesn't.
    """
    _require_torchao()
    settings.require_memory(BYTES_IN_8_BITS)
    started = time.monotonic()
    model = SamfForConditionalGeneration.from_pretrained(
        settings.folder / "saved_8bit", dtype=settings.dtype, device_map=settings.device
    ).eval()
    loaded = time.monotonic()
    quantised = quantised_weights(model)
    tokens, answered = _answer_batch(settings, model)
    if not torch.equal(tokens.cpu(), torch.load(settings.folder / "tokens.pt", weights_only=True)):
        raise RuntimeError("The reloaded 8-bit model gives other answers than before it was saved.")
    return [
        Measurement("from_pretrained", "s", [loaded - started], note=f"{quantised} layers; the same answers"),
        *answered,
    ]


def _require_torchao() -> None:
    if importlib.util.find_spec("torchao") is None:
        raise LineSkipped("needs torchao: pip install torchao")


def eight_bit_config() -> TorchAoConfig:
    """Return the configuration of 8-bit weights; `from_pretrained` quantises only the language model."""
    _require_torchao()
    from torchao.quantization import Int8WeightOnlyConfig  # optional library

    return TorchAoConfig(Int8WeightOnlyConfig())


def quantised_weights(model: PreTrainedModel) -> int:
    """Count the quantised weights.

    Raises:
        RuntimeError: a weight outside the language model is quantised, or a linear layer of the language model isn't.
    """
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        quantised = type(module.weight).__module__.startswith("torchao")
        if quantised != name.startswith("model.language_model."):
            raise RuntimeError(f"{name} is {'' if quantised else 'not '}quantised; only the language model should be.")
        count += quantised
    return count


def train_lora(settings: Settings) -> list[Measurement]:
    """Train for two steps: from the second on, the backward pass shares memory with the optimizer's state."""
    from peft import LoraConfig, get_peft_model  # imports much that the other lines don't need

    sizes = settings.sizes
    settings.require_memory(settings.dtype.itemsize)
    model = random_model(SamfForConditionalGeneration, settings.config(), settings.device, settings.dtype)
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules=LORA_TARGETS, modules_to_save=list(TRAINED_PARTS)
    )
    model.gradient_checkpointing_enable()
    model = get_peft_model(model, lora).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5)
    batch = conversation_batch(settings, sizes.lora_batch, sizes.lora_prompt + sizes.lora_answer)
    batch["pixel_values"] = batch["pixel_values"].to(settings.dtype)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, : -sizes.lora_answer] = -100
    losses, passes, updates = [], [], []

    def forward_backward() -> None:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())

    for _ in range(2):
        passes.append(settings.stopwatch.seconds(forward_backward))
        updates.append(settings.stopwatch.seconds(optimizer.step))
        optimizer.zero_grad()
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"The losses are {losses}.")
    note = (
        f"{sizes.lora_batch} x {batch['input_ids'].shape[1]} tokens, {sizes.slices} slices each, gradient checkpointing"
    )
    whole = [seconds + update for seconds, update in zip(passes, updates, strict=True)]
    return [
        Measurement(
            "trained weights", "million", [sum(weight.numel() for weight in trained) / 1e6], note="LoRA and parts"
        ),
        Measurement("forward and backward", "s", passes, note=note),
        Measurement("optimizer step", "s", updates, note="AdamW"),
        Measurement("whole step", "s", whole),
    ]
