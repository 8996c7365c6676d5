"""Benchmarks of 4-bit and 8-bit language models on a CPU, against float32 and bfloat16 and the speed of the memory.

Four full-size models don't fit into memory together, so each is loaded in a process of its own, and the processes take
turns: every format once, then every format again.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from samf.benchmarks import llama_cpp_lines
from samf.benchmarks.measuring import Measurement, ratios
from samf.benchmarks.memory_lines import save_model
from samf.benchmarks.workloads import LineSkipped, Settings, conversation_batch, generate
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.quantization_samf import SamfQuantizationConfig, describe_quantization
from samf.model.quantized_linear_samf import QuantizedLinear, kernel_plan
from samf.training.memory import peak_resident

ROUNDS = 2
FORMATS = ("float32", "bfloat16", "int8", "int4")
_LLAMA_CPP = {file: f"llama.cpp {file}" for file in llama_cpp_lines.FILES}
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.5, "int4": 1.0}  # per weight, with what isn't quantised
_BUFFER = {"full": 1 << 30, "tiny": 1 << 20}  # bytes that are read to measure the memory's speed
_READS = 5
_SPEEDS = "speeds.json"
_BATCHES = (1, 2, 4, 8, 16)
# With bfloat16 units: decode, prefill; without them.
_LIMITS = {"bfloat16": (8.0, 2.0), "float32": (3.0, 1.0)}


def quantise(settings: Settings, bits: int) -> list[Measurement]:
    """Load the saved model in few bits, answer from pixels, and save it.

    Args:
        settings: how the stage runs.
        bits: of the language model's weights.
    """
    settings.require_memory(_BYTES[f"int{bits}"])
    started = time.monotonic()
    config = SamfQuantizationConfig(bits=bits)
    model = SamfForConditionalGeneration.from_pretrained(
        settings.folder / "saved", quantization_config=config, dtype=settings.dtype
    )
    loaded = time.monotonic()
    tokens, seconds = _answer(settings, model)
    measured = _memory(settings, bits)
    torch.save(tokens, settings.folder / f"int{bits}.pt")
    model.save_pretrained(settings.folder / f"saved_int{bits}", max_shard_size=settings.sizes.shard_size)
    size = sum(file.stat().st_size for file in (settings.folder / f"saved_int{bits}").glob("*.safetensors"))
    return [
        Measurement("from_pretrained", "s", [loaded - started], note=describe_quantization(model) or ""),
        Measurement(f"{settings.sizes.new_tokens} tokens from pixels", "s", [seconds]),
        measured,
        Measurement("size on disk", "GB", [size / 1e9]),
    ]


def reload(settings: Settings, bits: int) -> list[Measurement]:
    """Load what `quantise` saved; the model must answer as before.

    Args:
        settings: how the stage runs.
        bits: of the language model's weights.

    Raises:
        RuntimeError: it gives other tokens.
    """
    settings.require_memory(_BYTES[f"int{bits}"])
    started = time.monotonic()
    model = SamfForConditionalGeneration.from_pretrained(settings.folder / f"saved_int{bits}", dtype=settings.dtype)
    loaded = time.monotonic()
    tokens, seconds = _answer(settings, model)
    if not torch.equal(tokens, torch.load(settings.folder / f"int{bits}.pt", weights_only=True)):
        raise RuntimeError(f"The reloaded {bits}-bit model gives other answers than before it was saved.")
    return [
        Measurement("from_pretrained", "s", [loaded - started], note="the same answer"),
        Measurement(f"{settings.sizes.new_tokens} tokens from pixels", "s", [seconds]),
        _memory(settings, bits),
    ]


def _answer(settings: Settings, model: PreTrainedModel) -> tuple[torch.Tensor, float]:
    """Return the answer about one volume, from its pixels, and its seconds."""
    batch = conversation_batch(settings, 1, settings.sizes.prompt)
    tokens, clock = generate(model, batch, settings.sizes.new_tokens)
    return tokens, clock.prefill + sum(clock.steps)


def _memory(settings: Settings, bits: int) -> Measurement:
    at_most = settings.limit(4) if bits == 4 else None
    return Measurement("peak until it has answered", "GB", [peak_resident() / 1e9], at_most=at_most)


def time_format(settings: Settings, name: str) -> list[Measurement]:
    """Load the saved model in one format, and time prefill, decoding and a read of the memory.

    Args:
        settings: how the stage runs.
        name: one of `FORMATS`.
    """
    settings.require_memory(_BYTES[name])
    folder = settings.folder / ("saved" if name not in ("int4", "int8") else f"saved_{name}")
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    model = SamfForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    batch = conversation_batch(settings, 1, settings.sizes.prompt)
    del batch["slice_mask"]
    pixels = batch.pop("pixel_values")
    with torch.inference_mode():
        batch["slice_embeddings"] = model.get_image_features(pixels).last_hidden_state
    generate(model, batch, 2)  # warm-up: the first call includes allocations and kernel choices
    _, clock = generate(model, batch, settings.sizes.new_tokens)
    length = batch["input_ids"].shape[1]
    speeds = {
        "prefill": length / clock.prefill,
        "decode": 1 / sorted(clock.steps)[len(clock.steps) // 2],
        "memory": read_speed(settings),
        "bytes": float(bytes_per_token(model, length)),
    }
    _keep(settings.folder / _SPEEDS, name, speeds)
    return [
        Measurement("prefill", "tokens/s", [speeds["prefill"]], note=f"{length} tokens, from slice embeddings"),
        Measurement("decode", "tokens/s", [1 / seconds for seconds in clock.steps], note="one volume, greedy"),
        Measurement("read of the memory", "GB/s", [speeds["memory"] / 1e9]),
    ]


def time_batches(settings: Settings) -> list[Measurement]:
    """Load the saved 4-bit model, and time decoding of 1 to 16 volumes at once.

    Prompts of one batch share a volume and are as long as each other: what is measured is the language model's step.
    """
    settings.require_memory(2 * _BYTES["int4"])  # and keys, values and products of 16 prompts
    model = SamfForConditionalGeneration.from_pretrained(settings.folder / "saved_int4", dtype=torch.float32)
    single = conversation_batch(settings, 1, settings.sizes.prompt)
    del single["slice_mask"]
    with torch.inference_mode():
        single["slice_embeddings"] = model.get_image_features(single.pop("pixel_values")).last_hidden_state
    found, first = [], 0.0
    for rows in tqdm(_BATCHES, desc="batches", leave=False):
        batch = {name: tensor.repeat_interleave(rows, dim=0) for name, tensor in single.items()}
        _, clock = generate(model, batch, settings.sizes.new_tokens)
        steps = clock.steps[1:]  # the first one includes allocations
        median = rows / sorted(steps)[len(steps) // 2]
        first = first or median
        note = f"{median / first:.2f} x one volume; prompts of {single['input_ids'].shape[1]} tokens in {clock.prefill:.1f} s"
        found.append(Measurement(f"decode, {rows} at once", "tokens/s", [rows / step for step in steps], note=note))
    return found


def time_llama_cpp(settings: Settings) -> list[Measurement]:
    """Time llama.cpp in its own formats, and a read of the memory."""
    found = []
    for file, name in _LLAMA_CPP.items():
        speeds, measured = llama_cpp_lines.time_file(settings, file)
        _keep(settings.folder / _SPEEDS, name, speeds | {"memory": read_speed(settings)})
        found += measured
    return found


def _keep(file: Path, name: str, speeds: dict[str, float]) -> None:
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kept.setdefault(name, []).append(speeds)
    file.write_text(json.dumps(kept), encoding="utf-8")


def read_speed(settings: Settings) -> float:
    """Return how many bytes per second a sum reads, with all threads, of a buffer larger than the caches."""
    buffer = torch.ones(_BUFFER[settings.size] // 4, dtype=torch.float32, device=settings.device)
    return buffer.nbytes / min(settings.stopwatch.seconds(buffer.sum) for _ in range(_READS))


def bytes_per_token(model: PreTrainedModel, length: int) -> int:
    """Return the bytes that a step reads: weights of the linear layers, and the cache of `length` tokens."""
    parts = [model.get_decoder(), model.get_output_embeddings()]
    linear = [module for part in parts for module in cast(nn.Module, part).modules() if isinstance(module, nn.Linear)]
    weights = sum(layer.weight.nbytes for layer in linear)
    weights += sum(layer.scales.nbytes for layer in linear if isinstance(layer, QuantizedLinear))
    text = model.config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * heads * width * length
    norm = next(parameter for name, parameter in model.get_decoder().named_parameters() if "norm" in name)
    return weights + cached * norm.element_size()  # the hidden states' type


def compare(settings: Settings) -> list[Measurement]:
    """Compare the formats round by round, and with llama.cpp where it was measured.

    Raises:
        LineSkipped: a format was not measured.
    """
    file = settings.folder / _SPEEDS
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [name for name in FORMATS if len(kept.get(name, [])) != ROUNDS]
    if missing:
        raise LineSkipped(f"no speed of {', '.join(missing)} to compare with")
    speeds = {
        name: {key: [turn[key] for turn in turns] for key in ("decode", "prefill", "memory", "bytes")}
        for name, turns in kept.items()
    }
    decode, prefill = _LIMITS[kernel_plan(4).compute]
    whole, found = speeds["float32"], []
    for name in FORMATS[1:]:
        limits = (settings.limit(decode), settings.limit(prefill)) if name == "int4" else (None, None)
        for key, limit in zip(("decode", "prefill"), limits, strict=True):
            found.append(Measurement(f"{key}, {name} / float32", "x", ratios(speeds[name][key], whole[key]), limit))
    others = [name for name in _LLAMA_CPP.values() if len(kept.get(name, [])) == ROUNDS]
    for name in others:
        for key in ("decode", "prefill"):
            found.append(Measurement(f"{key}, int4 / {name}", "x", ratios(speeds["int4"][key], speeds[name][key])))
    # The fastest read of all processes: what else runs can only slow it down.
    memory = max(speed for values in speeds.values() for speed in values["memory"])
    for name in (*FORMATS, *others):
        shares = [
            100 * rate * read / memory for rate, read in zip(*map(speeds[name].get, ("decode", "bytes")), strict=True)
        ]
        limit = settings.limit(60) if name == "int4" else None
        note = f"{memory / speeds[name]['bytes'][0]:.1f} tokens/s at most"
        found.append(Measurement(f"decode, {name}, of the memory's speed", "%", shares, limit, note))
    return found


def batch_stages() -> dict[str, Callable[[Settings], list[Measurement]]]:
    """Return the stages of the line of batches, in order."""
    return {"save": save_model, "int4": functools.partial(quantise, bits=4), "int4_batches": time_batches}


def stages() -> dict[str, Callable[[Settings], list[Measurement]]]:
    """Return the stages of the line, in order."""
    found: dict[str, Callable[[Settings], list[Measurement]]] = {"save": save_model}
    for bits in (4, 8):
        found[f"int{bits}"] = functools.partial(quantise, bits=bits)
        found[f"int{bits}_reload"] = functools.partial(reload, bits=bits)
    found["llama_cpp"] = llama_cpp_lines.write_files
    for turn in range(1, ROUNDS + 1):
        found |= {f"{name}_{turn}": functools.partial(time_format, name=name) for name in FORMATS}
        found[f"llama_cpp_{turn}"] = time_llama_cpp
    return found | {"compare": compare}
