"""Sizes, random models and inputs of the benchmarks.

Weights are random, since speed and memory don't depend on their values.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.generation.streamers import BaseStreamer

from samf.benchmarks.measuring import Stopwatch, free_memory
from samf.model.configuration_samf import SamfConfig
from samf.model.modeling_samf import SamfForConditionalGeneration

SAVED_DTYPE = torch.bfloat16  # as language models are published
_FILL_PERIOD = 1_000_003  # a prime, so that no two rows of a weight are equal
_TINY_VISION = {
    "model_type": "vit",
    "image_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
# A small ViT at 224 pixels and a language model of 170 million weights.
_MEDIUM_VISION = {
    "model_type": "vit",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
_MEDIUM_TEXT = {
    "model_type": "phi3",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 2816,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_MEDIUM_OPTIONS = {"image_token_id": 8000, "num_image_tokens": 256}
TINY_TEXT = {
    "model_type": "phi3",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_TINY_OPTIONS = {"image_token_id": 120, "num_image_tokens": 4, "volume_dim": 16}


class Placement(TypedDict):
    """Device and dtype of a tensor."""

    device: torch.device
    dtype: torch.dtype


class LineSkipped(RuntimeError):
    """A stage can't run here; the message says what is missing."""


@dataclass(frozen=True)
class Sizes:
    """Shapes of the inputs."""

    slices: int
    matmuls: tuple[int, ...]
    fusion_batch: int
    fusion_slices: int
    fusion_text: int
    prompt: int
    new_tokens: int
    saved_volumes: int
    shard_size: str
    lora_batch: int
    lora_prompt: int
    lora_answer: int


TINY = Sizes(
    slices=3,
    matmuls=(64, 128),
    fusion_batch=2,
    fusion_slices=6,
    fusion_text=5,
    prompt=8,
    new_tokens=3,
    saved_volumes=3,
    shard_size="50KB",
    lora_batch=2,
    lora_prompt=8,
    lora_answer=4,
)
FULL = Sizes(
    slices=24,
    matmuls=(1024, 2048, 4096),
    fusion_batch=4,
    fusion_slices=72,
    fusion_text=64,
    prompt=64,
    new_tokens=16,
    saved_volumes=3,
    shard_size="2GB",
    lora_batch=1,
    lora_prompt=32,
    lora_answer=32,
)
SIZES = {"full": FULL, "medium": FULL, "tiny": TINY}


@dataclass(frozen=True)
class Settings:
    """How a stage runs.

    Attributes:
        size: a key of `SIZES`.
        device: where the model is.
        dtype: of its weights.
        budget: approximate seconds for repeats.
        folder: shared by the stages of a line.
        model: folder of a trained model, where a line takes one in place of random weights.
    """

    size: str
    device: torch.device
    dtype: torch.dtype
    budget: float
    folder: Path
    model: str | None = None

    @property
    def sizes(self) -> Sizes:
        """Return the shapes of the inputs."""
        return SIZES[self.size]

    @property
    def stopwatch(self) -> Stopwatch:
        """Return a stopwatch for the device."""
        return Stopwatch(self.device, self.budget)

    @property
    def placement(self) -> Placement:
        """Return device and dtype as keywords of `Tensor.to`."""
        return {"device": self.device, "dtype": self.dtype}

    def limit(self, value: float, on: tuple[str, ...] = ("cpu", "cuda")) -> float | None:
        """Return a limit that applies at full size on the devices `on`; None elsewhere."""
        return value if self.size == "full" and self.device.type in on else None

    def require_memory(self, bytes_per_weight: float) -> None:
        """Check that the full model fits into memory, before the system would kill this process or others.

        Raises:
            LineSkipped: the weights need more than the free memory.
        """
        with torch.device("meta"):
            weights = SamfForConditionalGeneration(self.config()).num_parameters()
        needed, free = weights * bytes_per_weight / 1e9, free_memory(self.device) / 1e9
        if needed > free:
            raise LineSkipped(
                f"the weights need {needed:.1f} GB, {free:.1f} GB are free; bfloat16 takes half of float32"
            )

    def config(self, **options: Any) -> SamfConfig:
        """Return the model's configuration; `options` are arguments of `SamfConfig`."""
        if self.size == "full":
            return SamfConfig(**options)
        if self.size == "medium":
            return SamfConfig(
                **{"vision_config": _MEDIUM_VISION, "text_config": _MEDIUM_TEXT, **_MEDIUM_OPTIONS, **options}
            )
        return SamfConfig(**{"vision_config": _TINY_VISION, "text_config": TINY_TEXT, **_TINY_OPTIONS, **options})


def random_model(
    model_class: type[PreTrainedModel], config: SamfConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Build a model with cheap random weights: the library's initialisation of four billion takes minutes.

    Args:
        model_class: class of the model.
        config: its configuration.
        device: where it is built.
        dtype: of its weights.
    """
    with torch.device(device), init.no_init_weights():
        model = model_class._from_config(config, dtype=dtype)
    fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, std: float = 0.02) -> None:
    """Set norms to one, biases to zero, and every other weight to repeats of one block of normal values."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(_FILL_PERIOD, generator=generator) * std
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith("weight")))
            continue
        values = block.to(parameter.device, parameter.dtype)
        flat = parameter.view(-1)
        whole = len(flat) // _FILL_PERIOD
        flat[: whole * _FILL_PERIOD].view(whole, _FILL_PERIOD).copy_(values)
        flat[whole * _FILL_PERIOD :].copy_(values[: len(flat) - whole * _FILL_PERIOD])


def checksums(model: nn.Module) -> dict[str, int]:
    """Return an exact sum over the bits of each weight, as it would be saved."""
    sums = {}
    for name, parameter in model.named_parameters():
        chunks = parameter.detach().reshape(-1).split(2**22)
        sums[name] = sum(int(chunk.to(SAVED_DTYPE).view(torch.int16).sum(dtype=torch.int64)) for chunk in chunks)
    return sums


def slice_stack(settings: Settings, rows: int, slices: int) -> torch.Tensor:
    """Return pixel_values (rows, slices, C, H, W).

    Args:
        settings: size, device and precision.
        rows: number of volumes.
        slices: slices per volume.
    """
    vision = settings.config().vision_config
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(rows, slices, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    return pixels.to(**settings.placement)


def conversation_batch(settings: Settings, rows: int, prompt: int) -> dict[str, torch.Tensor]:
    """Return left-padded prompts of different lengths, each with a volume of a different number of slices.

    Args:
        settings: size, device and precision.
        rows: number of prompts.
        prompt: tokens of the longest prompt, without image tokens.
    """
    config, slices = settings.config(), settings.sizes.slices
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(3, config.image_token_id, (rows, prompt), generator=generator)
    images = torch.full((rows, config.num_image_tokens), config.image_token_id)
    input_ids = torch.cat([images, text], dim=1)  # (rows, image tokens + prompt)
    attention_mask, slice_mask = torch.ones_like(input_ids), torch.ones(rows, slices, dtype=torch.bool)
    for row in range(rows):
        padding = row * prompt // (2 * rows)
        input_ids[row] = input_ids[row].roll(
            padding
        )  # the end of the text moves to the front, where padding replaces it
        input_ids[row, :padding] = config.text_config.pad_token_id
        attention_mask[row, :padding] = 0
        slice_mask[row, slices - row * slices // (2 * rows) :] = False
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "slice_mask": slice_mask}
    batch = {name: tensor.to(settings.device) for name, tensor in batch.items()}
    return batch | {"pixel_values": slice_stack(settings, rows, slices)}


class TokenClock(BaseStreamer):
    """Record when `generate` receives the prompt and produces each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Record the time of a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing at the end."""

    @property
    def prefill(self) -> float:
        """Return the seconds from the prompt to the first token."""
        return self.times[1] - self.times[0]

    @property
    def steps(self) -> list[float]:
        """Return the seconds of each further token."""
        return [later - earlier for earlier, later in zip(self.times[1:], self.times[2:], strict=False)]


def generate(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], new_tokens: int
) -> tuple[torch.Tensor, TokenClock]:
    """Generate exactly `new_tokens` per row, greedily.

    Args:
        model: the model.
        batch: inputs of `generate`.
        new_tokens: tokens per row.

    Returns:
        Tokens (rows, new_tokens), and their times.
    """
    clock = TokenClock()
    tokens = model.generate(
        **batch,
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=model.config.text_config.pad_token_id,
        streamer=clock,
    )
    return tokens[:, batch["input_ids"].shape[1] :], clock
