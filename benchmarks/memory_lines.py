"""Lines about memory at full size: save, reload, 8 bits, a LoRA step."""

import importlib.util
import json
import math
import time
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig

from samf.benchmarks.measuring import Figure
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
BYTES_IN_8_BITS = 1.5  # a weight, the parts that stay whole shared out


def save_model(settings: Settings) -> list[Figure]:
    """Shards in bfloat16, and the sums that the reloaded weights must have."""
    settings.require_memory(SAVED_DTYPE.itemsize)
    started = time.monotonic()
    model = random_model(SamfForConditionalGeneration, settings.config(), torch.device("cpu"), SAVED_DTYPE)
    built = time.monotonic()
    model.save_pretrained(settings.folder / "saved", max_shard_size=settings.sizes.shard_size)
    saved = time.monotonic()
    (settings.folder / "checksums.json").write_text(json.dumps(checksums(model)), encoding="utf-8")
    return [
        Figure("build random weights", "s", [built - started]),
        Figure("save_pretrained", "s", [saved - built], note=f"bfloat16, {settings.sizes.shard_size} shards"),
        *_describe_shards(settings.folder / "saved"),
    ]


def _describe_shards(folder: Path) -> list[Figure]:
    shards = list(folder.glob("*.safetensors"))
    return [
        Figure("shards", "files", [len(shards)]),
        Figure("size on disk", "GB", [sum(shard.stat().st_size for shard in shards) / 1e9]),
    ]


def reload_model(settings: Settings) -> list[Figure]:
    """from_pretrained, every weight as saved, and one left-padded batch answered from pixels."""
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
        raise RuntimeError(f"{len(wrong)} weights differ from those saved, {wrong[0]} first.")
    return [
        Figure("from_pretrained", "s", [loaded - started], note="every weight as saved"),
        *_answer_batch(settings, model)[1],
    ]


def _answer_batch(settings: Settings, model: PreTrainedModel) -> tuple[torch.Tensor, list[Figure]]:
    sizes = settings.sizes
    batch = conversation_batch(settings, sizes.saved_volumes, sizes.prompt)
    tokens, clock = generate(model, batch, sizes.new_tokens)
    note = f"{sizes.saved_volumes} volumes of up to {sizes.slices} slices, left-padded to {batch['input_ids'].shape[1]}"
    return tokens, [
        Figure("pixels to first token", "s", [clock.prefill], note=note),
        Figure("a further token", "s", clock.steps, note="of each row"),
        Figure(f"{sizes.new_tokens} tokens", "s", [clock.prefill + sum(clock.steps)]),
    ]


def quantise_model(settings: Settings) -> list[Figure]:
    """The language model alone in 8 bits while it loads; the same batch; saved in 8 bits."""
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
        Figure("from_pretrained", "s", [loaded - started], note=f"8 bits: {quantised} layers of the language model"),
        *answered,
        Figure("save_pretrained", "s", [saved - saving]),
        *_describe_shards(settings.folder / "saved_8bit"),
    ]


def reload_quantised(settings: Settings) -> list[Figure]:
    """from_pretrained of the 8-bit folder, which must answer as before it was saved."""
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
        raise RuntimeError("The reloaded 8-bit model answers otherwise than before it was saved.")
    return [
        Figure("from_pretrained", "s", [loaded - started], note=f"{quantised} layers; the same answers"),
        *answered,
    ]


def _require_torchao() -> None:
    if importlib.util.find_spec("torchao") is None:
        raise LineSkipped("needs torchao: pip install torchao")


def eight_bit_config() -> TorchAoConfig:
    """8-bit weights; from_pretrained leaves all but the language model as it is."""
    _require_torchao()
    from torchao.quantization import Int8WeightOnlyConfig  # optional library

    return TorchAoConfig(Int8WeightOnlyConfig())


def quantised_weights(model: PreTrainedModel) -> int:
    """How many weights are quantised.

    Raises:
        RuntimeError: one outside the language model is, or a linear layer of the language model isn't.
    """
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        quantised = type(module.weight).__module__.startswith("torchao")
        if quantised != name.startswith("model.language_model."):
            raise RuntimeError(f"{name} is {'' if quantised else 'not '}quantised; the language model alone should be.")
        count += quantised
    return count


def train_lora(settings: Settings) -> list[Figure]:
    """Two steps: the second's backward holds the optimizer's state, as every later one does."""
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

    def passing() -> None:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())

    for _ in range(2):
        passes.append(settings.stopwatch.seconds(passing))
        updates.append(settings.stopwatch.seconds(optimizer.step))
        optimizer.zero_grad()
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"The losses are {losses}.")
    note = f"{sizes.lora_batch} x {batch['input_ids'].shape[1]} tokens, {sizes.slices} slices a volume, gradient checkpointing"
    whole = [seconds + update for seconds, update in zip(passes, updates, strict=True)]
    return [
        Figure("trained weights", "million", [sum(weight.numel() for weight in trained) / 1e6], note="LoRA and parts"),
        Figure("forward and backward", "s", passes, note=note),
        Figure("optimizer step", "s", updates, note="AdamW"),
        Figure("whole step", "s", whole),
    ]
