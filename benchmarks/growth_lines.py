"""How time and memory grow: with a volume's slices, with records, with the batch and with image tokens.

Each quantity is measured at several sizes, in seconds of the processor, which other work on the machine disturbs less, and the
exponent of a power law is fitted. 1 is linear; constant costs make it smaller, so that of the two largest sizes is given too.
"""

import contextlib
import ctypes
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

from samf.benchmarks.data_lines import find_templates, write_ct_rate_copy
from samf.benchmarks.measuring import Measurement, resident
from samf.benchmarks.published_step import TextShape, text_batch
from samf.benchmarks.workloads import Settings, random_model
from samf.data.ct_rate.loader import load_ct_rate
from samf.data.ct_rate.tables import CT_RATE_LABELS
from samf.data.mixture import TaskMixture
from samf.model.ct_volume import read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.training.memory import peak_resident
from samf.training.sampling import RecordOrder

_SIZES = {
    "slices": {"full": (100, 200, 400, 800, 1600), "tiny": (4, 8, 16)},
    "records": {"full": (1000, 3000, 10_000, 47_000), "tiny": (20, 40, 80)},
    "batch": {"full": (1, 2, 4, 8, 16), "tiny": (1, 2, 4)},
    "image tokens": {"full": (1, 4, 16, 64, 256), "tiny": (1, 2, 4)},
}
_PIXELS = {"full": 512, "tiny": 32}  # per side
_VQA_BYTES = 2000  # per volume
_MOST, _MOST_LAST = 1.1, 1.25  # linear, with noise; two sizes alone have more of it
_ROUNDS = 3
_SMALL_VISION = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
_SMALL_TEXT = {
    "model_type": "phi3",
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1408,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_STEP_SLICES, _TEXT = 12, TextShape((120,), 40, 120)


class Cost(NamedTuple):
    """What one size costs."""

    seconds: float
    megabytes: float


def fitted_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return k of the least-squares fit of log(cost) = k log(size) + c; 0 where a cost isn't positive."""
    if min(costs) <= 0:
        return 0.0
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def last_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent between the two largest sizes, where constant costs weigh least; 0 where a cost isn't positive."""
    if min(costs[-2:]) <= 0:
        return 0.0
    return math.log(costs[-1] / costs[-2]) / math.log(sizes[-1] / sizes[-2])


def _measure(task: Callable[[], object]) -> Cost:
    """Return the least seconds of the processor of some calls, and the megabytes that the first adds to the process's peak."""
    reset_peak()
    before = resident()
    started = time.process_time()
    task()
    seconds = [time.process_time() - started]
    added = (peak_since_reset() - before) / 1e6
    for _ in range(_ROUNDS - 1):
        started = time.process_time()
        task()
        seconds.append(time.process_time() - started)
    return Cost(min(seconds), max(added, 0.0))


def reset_peak() -> None:
    """Make Linux forget this process's peak of memory; elsewhere the peak stays that of the whole process.

    Freed memory that the C library still holds is given back first: what reuses it would add nothing.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5", encoding="ascii")


def peak_since_reset() -> int:
    """Return the most bytes that this process has held since `reset_peak`."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return peak_resident()
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _describe(settings: Settings, name: str, costs: Mapping[int, Cost], note: str) -> list[Measurement]:
    """Return the costs of each size, and their exponents."""
    sizes = list(costs)
    measured = [Measurement(f"{size} {name}", "s", [cost.seconds], note=note) for size, cost in costs.items()]
    measured += [Measurement(f"{size} {name}", "MB", [cost.megabytes]) for size, cost in costs.items()]
    for unit, values in (
        ("time", [c.seconds for c in costs.values()]),
        ("memory", [c.megabytes for c in costs.values()]),
    ):
        fitted, last = fitted_exponent(sizes, values), last_exponent(sizes, values)
        detail = f"{sizes[-2]} to {sizes[-1]}"
        measured.append(Measurement(f"exponent of {unit}, fitted", "", [fitted], at_most=settings.limit(_MOST)))
        measured.append(
            Measurement(f"exponent of {unit}, last", "", [last], note=detail, at_most=settings.limit(_MOST_LAST))
        )
    return measured


def _sizes(settings: Settings, name: str) -> tuple[int, ...]:
    return _SIZES[name]["tiny" if settings.size == "tiny" else "full"]


# --- Slices of a volume -----------------------------------------------------------------------------------------------


def grow_slices(settings: Settings) -> list[Measurement]:
    """Read volumes of more and more slices, and extract slices of three planes."""
    processor, side, costs = SamfImageProcessor(), _PIXELS["tiny" if settings.size == "tiny" else "full"], {}
    noise = np.random.default_rng(0).integers(-1000, 400, (side, side, 16), dtype=np.int16)
    for count in tqdm(_sizes(settings, "slices"), desc="slices"):
        with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
            path = Path(folder, "scan.nii")
            hu = np.empty((side, side, count), np.int16, order="F")
            for index in range(count):
                hu[..., index] = noise[..., index % noise.shape[2]]
            nib.save(nib.Nifti1Image(hu, np.diag([0.7, 0.7, 300 / count, 1.0])), path)
            del hu
            processor.extract(read_ct(path))  # the file is in the system's cache
            costs[count] = _measure(lambda path=path: processor.extract(read_ct(path)))
    note = f"{side} x {side} voxels each, .nii; {processor.num_slices} slices extracted"
    return _describe(settings, "slices", costs, note)


# --- Records ----------------------------------------------------------------------------------------------------------


def grow_records(settings: Settings) -> list[Measurement]:
    """Read CT-RATE's tables of more and more volumes into records, and order an epoch of them."""
    costs, templates = {}, find_templates()
    for volumes in tqdm(_sizes(settings, "records"), desc="records"):
        with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
            write_ct_rate_copy(Path(folder, "CT-RATE"), volumes, _VQA_BYTES * volumes, templates)
            costs[volumes] = _measure(lambda folder=folder: _read_records(Path(folder)))
    note = f"volumes with a report, {_VQA_BYTES} bytes of questions each; the order of an epoch"
    return _describe(settings, "records", costs, note)


def _read_records(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        options: dict[str, Any] = {"finding_names": CT_RATE_LABELS, "on_missing": "keep", "cache_dir": Path(cache)}
        records = load_ct_rate(folder / "CT-RATE", "train", **options)
        mixture = TaskMixture(records, {"report": 1, "multiple_choice": 1})
        for _ in RecordOrder(len(records), 0, mixture=mixture):
            pass


# --- A training step --------------------------------------------------------------------------------------------------


def grow_batch(settings: Settings) -> list[Measurement]:
    """Take training steps of more and more records."""
    costs = {rows: _measure_step(settings, rows, 32) for rows in tqdm(_sizes(settings, "batch"), desc="batch")}
    return _describe(settings, "records in a batch", costs, f"{_STEP_SLICES} slices, 32 image and 120 text tokens each")


def grow_image_tokens(settings: Settings) -> list[Measurement]:
    """Take training steps with more and more image tokens."""
    sizes = tqdm(_sizes(settings, "image tokens"), desc="image tokens")
    costs = {tokens: _measure_step(settings, 4, tokens) for tokens in sizes}
    return _describe(settings, "image tokens", costs, "batch of 4, 120 text tokens each, from cached embeddings")


def _measure_step(settings: Settings, rows: int, tokens: int) -> Cost:
    small = {
        "vision_config": {"model_type": "vit", **_SMALL_VISION},
        "text_config": _SMALL_TEXT,
        "image_token_id": 8000,
    }
    config = settings.config(fusion_type="ao2d", num_image_tokens=tokens, **(small if settings.size != "tiny" else {}))
    model: Any = random_model(SamfForConditionalGeneration, config, settings.device, torch.float32).train()
    texts = TextShape(_TEXT.lengths * rows, _TEXT.prompt, _TEXT.padded)
    batch = text_batch(config, texts, texts.padded)
    batch["slice_embeddings"] = torch.randn(rows, _STEP_SLICES, config.slice_dim)

    def step() -> None:
        model(**batch, skip_logits=True).loss.backward()

    step()  # gradients are there
    return _measure(step)


STAGES = {
    "slices": {"slices": grow_slices},
    "records": {"records": grow_records},
    "batch": {"batch": grow_batch},
    "image_tokens": {"image_tokens": grow_image_tokens},
}
