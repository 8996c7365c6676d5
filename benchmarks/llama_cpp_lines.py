"""Benchmarks of llama.cpp on the CPU, with a language model of the same shapes in its own 4-bit formats.

The weights are random blocks of bytes with small scales: speed and memory don't depend on their values. llama.cpp runs
in a process without torch, so that its peak memory is its own.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from transformers import PreTrainedConfig

from samf.benchmarks.measuring import Measurement
from samf.benchmarks.workloads import LineSkipped, Settings

PACKAGES = ("xllamacpp", "gguf")
FILES = ("Q4_0", "Q4_K_M")
LARGEST_WEIGHT = 0.04
_BYTES = 0.7  # per weight of the whole model
_CACHED_BYTES = 2  # llama.cpp keeps keys and values in float16


class _Block(NamedTuple):
    """Weights that share one float16 scale or more, as llama.cpp stores them.

    Attributes:
        weights: in the block.
        nbytes: of the block.
        scales: offsets of its float16 scales.
        largest: magnitude of a weight whose scale is one.
    """

    weights: int
    nbytes: int
    scales: tuple[int, ...]
    largest: int


_BLOCKS = {
    "F32": _Block(1, 4, (), 1),
    "Q4_0": _Block(32, 18, (0,), 8),
    "Q5_0": _Block(32, 22, (0,), 16),
    "Q5_1": _Block(32, 24, (0, 2), 32),
    "Q8_0": _Block(32, 34, (0,), 128),
    "Q4_K": _Block(256, 144, (0, 2), 16 * 64),
    "Q5_K": _Block(256, 176, (0, 2), 32 * 64),
    "Q6_K": _Block(256, 210, (208,), 32 * 128),
}
# What llama.cpp takes where the inputs don't fill blocks of 256.
_SMALL_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


class Tensor(NamedTuple):
    """A tensor of a GGUF file; `shape` is (channels, inputs)."""

    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        """Return its bytes in the file."""
        block = _BLOCKS[self.kind]
        return prod(self.shape) // block.weights * block.nbytes


class Answer(TypedDict):
    """What `llama_cpp_process.py` prints: seconds, bytes, and how llama.cpp was built."""

    prefill: float
    steps: list[float]
    peak: int
    system: str


def gguf_tensors(text: PreTrainedConfig, file: str) -> dict[str, Tensor]:
    """Return the tensors of Phi-3, in the types that llama.cpp's own quantisation gives them.

    Args:
        text: configuration of the language model.
        file: one of `FILES`.
    """
    width, inner = text.hidden_size, text.intermediate_size
    head = width // text.num_attention_heads
    qkv = head * (text.num_attention_heads + 2 * text.num_key_value_heads)
    mixed, layers = file == "Q4_K_M", text.num_hidden_layers
    most, joint = ("Q4_K", "Q5_K") if mixed else ("Q4_0", "Q4_0")

    def linear(channels: int, inputs: int, kind: str) -> Tensor:
        whole = inputs % _BLOCKS[kind].weights == 0
        return Tensor((channels, inputs), kind if whole else _SMALL_BLOCKS[kind])

    tensors = {"token_embd.weight": linear(text.vocab_size, width, most)}
    for layer in range(layers):
        down = "Q6_K" if mixed and _has_more_bits(layer, layers) else most
        tensors |= {
            f"blk.{layer}.attn_norm.weight": Tensor((width,), "F32"),
            f"blk.{layer}.attn_qkv.weight": linear(qkv, width, joint),
            f"blk.{layer}.attn_output.weight": linear(width, width, most),
            f"blk.{layer}.ffn_norm.weight": Tensor((width,), "F32"),
            f"blk.{layer}.ffn_up.weight": linear(2 * inner, width, most),  # gate and up
            f"blk.{layer}.ffn_down.weight": linear(width, inner, down),
        }
    tensors["output_norm.weight"] = Tensor((width,), "F32")
    return tensors | {"output.weight": linear(text.vocab_size, width, "Q6_K")}


def _has_more_bits(layer: int, layers: int) -> bool:
    """Return whether Q4_K_M keeps six bits of a layer's `ffn_down`: the ends, and every third between."""
    end = layers // 8
    return layer < end or layer >= 7 * layers // 8 or (layer - end) % 3 == 2


def bytes_per_token(text: PreTrainedConfig, file: str, length: int) -> int:
    """Return the bytes that a step reads: all weights but the embeddings, and the cache of `length` tokens.

    Args:
        text: configuration of the language model.
        file: one of `FILES`.
        length: tokens in the cache.
    """
    weights = sum(tensor.nbytes for name, tensor in gguf_tensors(text, file).items() if name != "token_embd.weight")
    head = text.hidden_size // text.num_attention_heads
    return weights + 2 * text.num_hidden_layers * text.num_key_value_heads * head * length * _CACHED_BYTES


def write_model(path: Path, text: PreTrainedConfig, file: str) -> None:
    """Write a GGUF file with random weights, one tensor in memory at a time.

    Args:
        path: of the file.
        text: configuration of the language model.
        file: one of `FILES`.
    """
    import gguf  # optional library

    writer = gguf.GGUFWriter(path, "phi3")
    _describe(writer, text)
    tensors = gguf_tensors(text, file)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for tensor in tensors.values():
        writer.write_tensor_data(random_weights(tensor, generator))
    writer.close()


def _describe(writer: Any, text: PreTrainedConfig) -> None:
    """Write the sizes, and a vocabulary of invented words: prompts are tokens already."""
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(text.hidden_size // text.num_attention_heads)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"word{number}" for number in range(text.vocab_size)])
    writer.add_token_scores([0.0] * text.vocab_size)
    writer.add_token_types([1] * text.vocab_size)  # normal words, the end's too: each token gives text


def random_weights(tensor: Tensor, generator: np.random.Generator) -> np.ndarray:
    """Return a tensor's bytes; norms are one."""
    if tensor.kind == "F32":
        return np.ones(tensor.shape, dtype=np.float32)
    block = _BLOCKS[tensor.kind]
    blocks = np.frombuffer(bytearray(generator.bytes(tensor.nbytes)), dtype=np.uint8).reshape(-1, block.nbytes)
    for offset in block.scales:  # random bytes could be infinite
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(LARGEST_WEIGHT / block.largest).tobytes(), np.uint8)
    return blocks


def write_files(settings: Settings) -> list[Measurement]:
    """Write the language model in llama.cpp's formats."""
    _require_packages()
    text, found = settings.config().text_config, []
    for file in FILES:
        started = time.monotonic()
        path = _path(settings, file)
        write_model(path, text, file)
        with path.open("rb+") as written:  # later stages must not share the disk with this one
            os.fsync(written)
        found.append(Measurement(f"write {file}", "s", [time.monotonic() - started]))
        found.append(Measurement(f"size on disk, {file}", "GB", [path.stat().st_size / 1e9]))
    return found


def time_file(settings: Settings, file: str) -> tuple[dict[str, float], list[Measurement]]:
    """Time prefill and decoding with as many tokens as the other formats.

    Args:
        settings: how the stage runs.
        file: one of `FILES`.

    Returns:
        Tokens per second of `prefill` and `decode` and the `bytes` that a step reads, and the measurements.
    """
    _require_packages()
    settings.require_memory(_BYTES)
    config, sizes = settings.config(), settings.sizes
    length = config.num_image_tokens + sizes.prompt
    answer = _run(_path(settings, file), length, sizes.new_tokens)
    decode = [1 / seconds for seconds in answer["steps"]]
    speeds = {
        "prefill": length / answer["prefill"],
        "decode": 1 / sorted(answer["steps"])[len(decode) // 2],
        "bytes": float(bytes_per_token(config.text_config, file, length)),
    }
    built = " ".join(re.findall(r"(\w+) = 1", answer["system"]))
    return speeds, [
        Measurement(f"prefill, {file}", "tokens/s", [speeds["prefill"]], note=f"{length} tokens"),
        Measurement(f"decode, {file}", "tokens/s", decode, note=f"xllamacpp {metadata.version('xllamacpp')}: {built}"),
        Measurement(f"peak of llama.cpp, {file}", "GB", [answer["peak"] / 1e9], note="without torch and slice encoder"),
    ]


def _run(model: Path, prompt: int, tokens: int) -> Answer:
    """Run llama.cpp with as many threads as torch has here.

    Raises:
        RuntimeError: the process failed.
    """
    script = str(Path(__file__).with_name("llama_cpp_process.py"))
    arguments = [str(model), *map(str, (torch.get_num_threads(), prompt, tokens))]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} failed: {done.stderr[-2000:]}")
    answer: Answer = json.loads(done.stdout.splitlines()[-1])
    return answer


def _path(settings: Settings, file: str) -> Path:
    return settings.folder / f"{file}.gguf"


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise LineSkipped(f"needs {' and '.join(missing)}: pip install {' '.join(PACKAGES)}")
