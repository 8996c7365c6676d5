"""Choose what computes a product with quantised weights on this processor: measured once, and kept.

Direct products read the small weights: torch's own, and ONNX Runtime's where it is installed. For one row they are several
times faster than float32; for many rows torch's are slower than the processor's matrix product with weights that are
dequantised first. Where the one overtakes the other, and whether that matrix product is faster in bfloat16 or in float32,
depends on the processor. The choice changes the last digits of results, so it is kept under `$HF_HOME/samf` and the same
in every process.
"""

import functools
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import constants
from transformers.utils import logging

from .files_samf import atomic_path
from .onnx_product_samf import is_available

logger = logging.get_logger(__name__)

_PLANS = "quantized_products.json"
_PROBED = (1, 4, 8, 16, 32, 64, 128, 256)  # numbers of rows
_REPEATS = 3
_METHOD = 2  # counts the ways of measuring, whose plans differ
TORCH, ONNX_RUNTIME = "torch", "onnxruntime"
_NAMES = {TORCH: "torch", ONNX_RUNTIME: "ONNX Runtime"}


class Products(Protocol):
    """A layer whose products are compared."""

    bits: int
    in_features: int

    @property
    def libraries(self) -> Sequence[str]:
        """Return which libraries have a direct product on this processor: `TORCH`, `ONNX_RUNTIME`."""

    def direct(self, rows: torch.Tensor, library: str) -> torch.Tensor:
        """Return the product of rows (M, inputs) by a library's product with quantised weights."""

    def dequantized(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product of rows (M, inputs) with dequantised weights of their type."""


@dataclass(frozen=True)
class KernelPlan:
    """What computes a product with quantised weights on this processor.

    Attributes:
        bits: of the weights.
        compute: precision of the products of dequantised weights and of the hidden states, "bfloat16" or "float32".
        most_rows: the largest number of rows for which the direct product is used; 0 = never, None = always.
        library: whose direct product it is, `TORCH` or `ONNX_RUNTIME`.
    """

    bits: int
    compute: str
    most_rows: int | None
    library: str = TORCH

    @property
    def dtype(self) -> torch.dtype:
        """Return `compute` as a type of torch."""
        return torch.bfloat16 if self.compute == "bfloat16" else torch.float32

    def is_direct(self, rows: int) -> bool:
        """Return whether the direct product is used for a number of rows."""
        return rows > 0 and (self.most_rows is None or rows <= self.most_rows)

    def __str__(self) -> str:
        """Describe the plan in one line."""
        weights = f"int{self.bits} weights, {self.compute} activations"
        product = f"{_NAMES[self.library]}'s int{self.bits} product"
        if self.most_rows is None:
            return f"{weights}; {product}"
        direct = f"{product} up to {self.most_rows} rows, else " if self.most_rows else ""
        return f"{weights}; {direct}dequantised to {self.compute}"


def find_plan(bits: int, sample: Callable[[], Products]) -> KernelPlan:
    """Return the plan that an earlier process measured on such a processor, or measure it.

    Args:
        bits: of the weights, 4 or 8.
        sample: returns the layer to measure.
    """
    file = Path(constants.HF_HOME, "samf", _PLANS)
    key = ", ".join(
        (
            f"method {_METHOD}, {bits} bits",
            _processor_name(),
            torch.backends.cpu.get_cpu_capability(),
            f"torch {torch.__version__}",
            f"onnxruntime {metadata.version(ONNX_RUNTIME)}" if is_available() else "no onnxruntime",
            f"{torch.get_num_threads()} threads",
        )
    )
    try:
        return KernelPlan(**_kept(file)[key])
    except (KeyError, TypeError):
        plan = measure_plan(sample())
    try:
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps({**_kept(file), key: asdict(plan)}, indent=2), encoding="utf-8")
    except OSError as error:
        logger.info(f"{file}: can't be written ({error}); the next process measures again.")
    return plan


def _kept(file: Path) -> dict[str, dict]:
    try:
        plans = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plans if isinstance(plans, dict) else {}


def _processor_name() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def shortest(task: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few calls."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        task()
        times.append(time.perf_counter() - started)
    return min(times)


@torch.no_grad()
def measure_plan(layer: Products, seconds: Callable[[Callable[[], object]], float] = shortest) -> KernelPlan:
    """Time a layer's products for some numbers of rows and return the plan of the fastest.

    The library of the direct product is the one that is faster for one row, as in decoding.

    Args:
        layer: the layer.
        seconds: returns the time of a call.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBED[-1], layer.in_features, dtype=torch.float32, generator=generator)

    def dequantized(count: int, dtype: torch.dtype) -> float:
        return seconds(lambda: layer.dequantized(rows[:count].to(dtype)))

    def direct(count: int, library: str) -> float:
        return seconds(lambda: layer.direct(rows[:count], library))

    dtype = min((torch.bfloat16, torch.float32), key=lambda dtype: dequantized(_PROBED[-1], dtype))
    compute = str(dtype).removeprefix("torch.")
    if not layer.libraries:
        return KernelPlan(layer.bits, compute, 0)
    library = min(layer.libraries, key=functools.partial(direct, 1))
    most_rows = 0
    for count in _PROBED:
        if direct(count, library) > dequantized(count, dtype):
            return KernelPlan(layer.bits, compute, most_rows, library)
        most_rows = count
    if library == ONNX_RUNTIME:
        return KernelPlan(layer.bits, "float32", None, library)
    return KernelPlan(layer.bits, compute, most_rows, library)
