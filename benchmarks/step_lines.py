"""Benchmarks of a training step against its published form: LoRA on the language model, gradient checkpointing.

The language model has four layers of Phi-3-mini's width. The slice encoder is frozen in whole steps; what training it adds is
measured on a few slices, since it grows with their number in both forms. Peaks of memory need a fresh process for each form.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from samf.benchmarks.measuring import Measurement, ratios
from samf.benchmarks.published_step import Batch, TextShape, published_loss, published_slices, text_batch
from samf.benchmarks.workloads import Settings, random_model, slice_stack
from samf.model.configuration_samf import SamfConfig
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.training.adapter import add_lora
from samf.training.arguments import TuningArguments
from samf.training.memory import peak_bytes
from samf.training.param_groups import PARTS, train_parts

_LAYERS = 4
_SLICES = {"full": 72, "medium": 12, "tiny": 3}
_TRAINED_SLICES = {"full": 3, "medium": 3, "tiny": 2}  # per volume, in a step that trains the encoder
# Two answers to multiple-choice questions and two reports.
_TEXTS = TextShape((90, 110, 250, 350), 60, 512)
_TINY_TEXTS = TextShape((6, 9), 3, 16)
_FEW_TOKENS = {"full": 32, "medium": 32, "tiny": 2}
_CHUNK = 8  # slices per call: their activations fit blocks of memory that the C library keeps
_PEAKS = "step_peaks.json"
PUBLISHED, PIXELS, CACHED, FEW = "published", "ours", "ours, cached embeddings", "ours, cached, fewer image tokens"


def step_config(settings: Settings, **options: Any) -> SamfConfig:
    """Return the configuration: SAMF + Ao2D, at full size with a ViT-B/16 and four layers of Phi-3-mini."""
    options = {"vision_chunk_size": _CHUNK, **options}
    if settings.size == "full":
        options["text_config"] = {"model_type": "phi3", "num_hidden_layers": _LAYERS}
    return settings.config(fusion_type="ao2d", **options)


def step_model(settings: Settings, trains_encoder: bool) -> Any:
    """Return a model with LoRA and gradient checkpointing; without dropout, so that both forms have one loss.

    Args:
        settings: size, device and precision.
        trains_encoder: whether the slice encoder is trained.
    """
    config = step_config(settings, aggregator_dropout=0.0)
    model = random_model(SamfForConditionalGeneration, config, settings.device, settings.dtype)
    parts = [part for part in PARTS if trains_encoder or part != "slice_encoder"]
    train_parts(model, parts)
    tuning = TuningArguments(lora_rank=16, lora_alpha=32, lora_dropout=0.0)
    wrapped = add_lora(model, tuning, parts, base="")
    wrapped.get_base_model().gradient_checkpointing_enable()
    return wrapped.train().get_base_model()


def step_batch(settings: Settings, form: str) -> Batch:
    """Return the batch of a form, the same volumes and texts for all of them."""
    texts = _TINY_TEXTS if settings.size == "tiny" else _TEXTS
    options = {"num_image_tokens": _FEW_TOKENS[settings.size]} if form == FEW else {}
    config, slices = step_config(settings, **options), _SLICES[settings.size]
    batch = text_batch(config, texts, texts.padded if form == PUBLISHED else max(texts.lengths))
    if form in (CACHED, FEW):
        embeddings = torch.randn(
            len(texts.lengths), slices, config.slice_dim, generator=torch.Generator().manual_seed(1)
        )
        batch["slice_embeddings"] = embeddings.to(settings.dtype)
    else:
        batch["pixel_values"] = slice_stack(settings, len(texts.lengths), slices)
    return {name: value.to(settings.device) for name, value in batch.items()}


class PartTimer:
    """Seconds of a step by part. On a GPU, where calls return before they are done, only the whole is meaningful.

    Args:
        model: not wrapped by peft.
    """

    def __init__(self, model: Any):
        self.seconds: dict[str, float] = defaultdict(float)
        inner = model.model
        parts = {"slice encoder": inner.slice_encoder, "language model": inner.language_model, "head": model.lm_head}
        for name, module in parts.items():
            self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        started: list[float] = []
        module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))

        def add(*_: object) -> None:
            self.seconds[name] += time.perf_counter() - started.pop()

        module.register_forward_hook(add)

    def take(self, name: str, task: Callable[[], Any]) -> Any:
        """Run a task; count its seconds under `name`."""
        started = time.perf_counter()
        result = task()
        self.seconds[name] += time.perf_counter() - started
        return result


class Steps:
    """Training steps of every form on one model.

    Args:
        settings: size, device and precision.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.model = step_model(settings, trains_encoder=False)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        self.timer = PartTimer(self.model)
        self.parts: dict[str, dict[str, float]] = {}
        self.processor_seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self, form: str) -> float:
        """Take a step; return its seconds, and keep those of its parts."""
        batch, timer = step_batch(self.settings, form), self.timer
        timer.seconds.clear()
        config = self.model.config
        config.num_image_tokens = step_config(self.settings).num_image_tokens
        if form == FEW:
            config.num_image_tokens = _FEW_TOKENS[self.settings.size]
        started, busy = time.perf_counter(), time.process_time()
        loss = timer.take("forward", lambda: self._loss(form, batch))
        timer.take("backward", loss.backward)
        timer.take("optimizer", self._update)
        loss.item()
        seconds = time.perf_counter() - started
        self.processor_seconds[form].append(time.process_time() - busy)
        known = timer.seconds["slice encoder"] + timer.seconds["language model"] + timer.seconds["head"]
        timer.seconds["fusion, loss, rest"] = timer.seconds.pop("forward") - known
        self.parts[form] = dict(timer.seconds)
        return seconds

    def _loss(self, form: str, batch: Batch) -> torch.Tensor:
        if form == PUBLISHED:
            return published_loss(self.model, batch)
        loss: torch.Tensor = self.model(**batch, skip_logits=True).loss
        return loss

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def time_step(settings: Settings) -> list[Measurement]:
    """Time whole steps with a frozen encoder in turns, without a warm-up: the first round is a small part of a step's time."""
    settings.require_memory(0)
    steps, times = Steps(settings), defaultdict(list)
    forms = [PUBLISHED, PIXELS, CACHED, FEW]
    started, longest = time.monotonic(), 0.0
    while not longest or time.monotonic() - started + longest < settings.budget:
        before = time.monotonic()
        for form in forms if len(times[PUBLISHED]) % 2 == 0 else forms[::-1]:
            times[form].append(steps(form))
        longest = max(longest, time.monotonic() - before)
    note = f"{_SLICES[settings.size]} slices, frozen encoder, {str(settings.dtype).removeprefix('torch.')}"
    limits = {PIXELS: None, CACHED: settings.limit(6), FEW: None}
    return [
        *(Measurement(form, "s", values, note=note if form == PUBLISHED else "") for form, values in times.items()),
        *(
            Measurement(f"{form}, processor", "s", values, note="of all threads; for a busy machine")
            for form, values in steps.processor_seconds.items()
        ),
        *(_describe_parts(form, parts) for form, parts in steps.parts.items()),
        *(
            Measurement(f"published / {form}", "x", ratios(times[PUBLISHED], times[form]), limit)
            for form, limit in limits.items()
        ),
        *_time_trained_encoder(settings, steps, times),
    ]


def _describe_parts(form: str, parts: Mapping[str, float]) -> Measurement:
    note = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items() if seconds >= 0.005)
    return Measurement(f"{form}: where the time goes", "s", [sum(parts.values())], note=note)


def _time_trained_encoder(settings: Settings, steps: Steps, times: Mapping[str, list[float]]) -> list[Measurement]:
    """Time the encoder's share of a step that trains it, on a few slices, and add it to the rest of the step."""
    model, parts = steps.model, steps.parts
    model.model.slice_encoder.requires_grad_(True)
    rows, slices = step_batch(settings, CACHED)["slice_embeddings"].shape[:2]
    few = _TRAINED_SLICES[settings.size]
    pixels = slice_stack(settings, rows, few)

    def published() -> None:
        published_slices(model, pixels).float().square().sum().backward()

    def ours() -> None:
        model.model.encode_slices(pixels).last_hidden_state.float().square().sum().backward()

    found = settings.stopwatch.in_turns({PUBLISHED: published, PIXELS: ours}, "encoder", fewest=2)
    each = {form: [seconds / (rows * few) for seconds in values] for form, values in found.items()}
    whole = {}
    for form, rest in (
        (PUBLISHED, times[PUBLISHED][-1] - parts[PUBLISHED]["slice encoder"]),
        (PIXELS, times[CACHED][-1]),
    ):
        whole[form] = [rest + rows * slices * seconds for seconds in each[form]]
    note = f"forward and backward of {rows * few} slices, per slice"
    derived = f"the rest of the step, and {rows * slices} slices at that speed"
    return [
        *(Measurement(f"trained encoder, {form}", "ms", [1e3 * s for s in each[form]], note=note) for form in each),
        *(Measurement(f"step with trained encoder, {form}", "s", whole[form], note=derived) for form in whole),
        Measurement(
            "published / ours, trained encoder",
            "x",
            ratios(whole[PUBLISHED], whole[PIXELS]),
            settings.limit(3),
            derived,
        ),
    ]


def _measure_peak(settings: Settings, form: str) -> list[Measurement]:
    """Take a step; return this process's peak, and with the last form its ratios."""
    seconds = Steps(settings)(form)
    file = settings.folder / _PEAKS
    peaks = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    peaks[form] = peak_bytes(settings.device) / 1e9
    file.write_text(json.dumps(peaks), encoding="utf-8")
    measured = [Measurement(f"peak memory, {form}", "GB", [peaks[form]], note=f"one step of {seconds:.1f} s")]
    if form != PUBLISHED and PUBLISHED in peaks:
        share = peaks[form] / peaks[PUBLISHED]
        measured.append(Measurement(f"peak, {form} / published", "x", [share], at_most=settings.limit(0.6)))
    return measured


def measure_published(settings: Settings) -> list[Measurement]:
    """Measure the peak memory of a step in the published form."""
    return _measure_peak(settings, PUBLISHED)


def measure_pixels(settings: Settings) -> list[Measurement]:
    """Measure the peak memory of our step from pixels."""
    return _measure_peak(settings, PIXELS)


def measure_cached(settings: Settings) -> list[Measurement]:
    """Measure the peak memory of our step from cached embeddings."""
    return _measure_peak(settings, CACHED)


STAGES = {
    "step": {"step": time_step},
    "step_memory": {"published": measure_published, "ours": measure_pixels, "cached": measure_cached},
}
