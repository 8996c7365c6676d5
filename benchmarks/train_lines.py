"""Benchmarks of stage 3 as in the paper: LoRA and fully trained parts, with and without checkpointing, Liger and compile."""

import math
from dataclasses import fields

import torch
from torch import nn

from samf.benchmarks.measuring import Measurement
from samf.benchmarks.workloads import SAVED_DTYPE, LineSkipped, Settings, random_model
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.training.adapter import add_lora, cast_trained
from samf.training.arguments import TuningArguments
from samf.training.factory import apply_liger
from samf.training.flops import StepFlops, Work, known_peak
from samf.training.param_groups import PARTS, train_parts
from samf.training.throughput import batch_work

# Rows, slices per volume, and tokens of question and answer: with 256 image tokens the paper's 512.
SHAPES = {"full": (4, 72, 32, 224), "tiny": (2, 6, 8, 4)}
WARM_UP, MOST_STEPS = 2, 20
BYTES_A_WEIGHT = 4.5  # bfloat16; trained parts in float32 with gradients and AdamW's two moments
CT_RATE_RECORDS = 2 * 47_149  # reports, and as many multiple-choice questions
PAPER_HOURS = 16  # one A100 with 80 GB


def time_training(settings: Settings) -> list[Measurement]:
    """Time training steps."""
    return _time_steps(settings)


def time_checkpointing(settings: Settings) -> list[Measurement]:
    """Time training steps with gradient checkpointing."""
    return _time_steps(settings, checkpointing=True)


def time_liger(settings: Settings) -> list[Measurement]:
    """Time training steps with Liger's kernels in the language model."""
    if settings.device.type != "cuda":
        raise LineSkipped("Liger's kernels need a GPU")
    return _time_steps(settings, liger=True)


def time_compiled(settings: Settings) -> list[Measurement]:
    """Time training steps of a compiled model."""
    return _time_steps(settings, compiled=True)


def _time_steps(
    settings: Settings, checkpointing: bool = False, liger: bool = False, compiled: bool = False
) -> list[Measurement]:
    settings.require_memory(BYTES_A_WEIGHT)
    model = build_trained_model(settings, checkpointing, liger)
    flops = StepFlops(model)
    batch = training_batch(settings)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-5)
    called = torch.compile(model) if compiled else model
    losses: list[float] = []

    def step() -> None:
        with torch.autocast(settings.device.type, dtype=torch.bfloat16):
            loss = called(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    seconds = [settings.stopwatch.seconds(step) for _ in range(WARM_UP)]
    while len(seconds) < WARM_UP + 3 or (sum(seconds) < settings.budget and len(seconds) < WARM_UP + MOST_STEPS):
        seconds.append(settings.stopwatch.seconds(step))
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"The losses are {losses}; expected finite values.")
    work = Work(**dict(zip([field.name for field in fields(Work)], batch_work(batch).tolist(), strict=True)))
    return describe_steps(settings, seconds[WARM_UP:], work, flops(work))


def build_trained_model(settings: Settings, checkpointing: bool, liger: bool) -> nn.Module:
    """Return a model of random weights whose parts are trained as in recipes/ct_rate.yaml.

    Args:
        settings: size, device and precision.
        checkpointing: whether to use gradient checkpointing.
        liger: whether to use Liger's kernels.

    Raises:
        LineSkipped: Liger isn't installed.
    """
    model = random_model(SamfForConditionalGeneration, settings.config(), settings.device, SAVED_DTYPE)
    if liger:
        try:
            apply_liger(model)
        except ImportError as error:
            raise LineSkipped(str(error)) from error
    if checkpointing:
        model.gradient_checkpointing_enable()
    train_parts(model, list(PARTS))
    tuning = TuningArguments(lora_rank=16, lora_alpha=32, lora_dropout=0.05, lora_embeddings=True)
    wrapped = add_lora(model, tuning, list(PARTS), base="")
    cast_trained(wrapped, "float32")
    return wrapped.train()


def training_batch(settings: Settings) -> dict[str, torch.Tensor]:
    """Return volumes with questions and answers: pixel_values (B, S, C, H, W), everything else (B, T)."""
    rows, slices, prompt, answer = SHAPES[settings.size]
    config, generator = settings.config(), torch.Generator().manual_seed(3)
    vision = config.vision_config
    images = torch.full((rows, config.num_image_tokens), config.image_token_id)
    text = torch.randint(3, config.image_token_id, (rows, prompt + answer), generator=generator)
    input_ids = torch.cat([images, text], dim=1)
    before_answer = torch.arange(input_ids.shape[1]) < input_ids.shape[1] - answer  # (T,)
    pixels = torch.randn(rows, slices, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "prompt_mask": before_answer & (input_ids != config.image_token_id),
        "labels": input_ids.masked_fill(before_answer, -100),
        "pixel_values": pixels,
    }
    return {name: value.to(settings.device) for name, value in batch.items()}


def describe_steps(settings: Settings, seconds: list[float], work: Work, flops: float) -> list[Measurement]:
    """Return the measurements of training steps.

    Args:
        settings: size and device.
        seconds: of each step.
        work: of one step.
        flops: of one step.
    """
    rows, slices, _, _ = SHAPES[settings.size]
    note = f"{rows} volumes of {slices} slices, {work.tokens / rows:.0f} tokens each, bfloat16 autocast, AdamW"
    figures = [
        Measurement("training step", "s", seconds, note=note),
        Measurement("volumes", "1/s", [work.volumes / value for value in seconds]),
        Measurement("tokens", "1/s", [work.tokens / value for value in seconds]),
        Measurement("model operations", "TFLOP/s", [flops / value / 1e12 for value in seconds]),
    ]
    peak = known_peak(torch.cuda.get_device_name(settings.device)) if settings.device.type == "cuda" else None
    if peak is not None:
        shares = [flops / value / (peak * 1e12) for value in seconds]
        figures.append(Measurement("MFU", "", shares, note=f"of {peak:g} TFLOP/s, dense bfloat16"))
    if settings.size == "full":
        hours = [CT_RATE_RECORDS / rows * value / 3600 for value in seconds]
        note = f"{CT_RATE_RECORDS:,} records of this length; the paper: {PAPER_HOURS} h on an A100"
        figures.append(Measurement("an epoch of CT-RATE", "h", hours, note=note))
    return figures


STAGES = {
    "train": time_training,
    "train_checkpointing": time_checkpointing,
    "train_liger": time_liger,
    "train_compiled": time_compiled,
}
