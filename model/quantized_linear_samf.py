"""Linear layers with weights in 4 or 8 bits, for a language model on a CPU.

They answer and pass gradients on to their input; their weights can't be trained. On another device than the CPU they
work too, by dequantised weights, but aren't fast.
"""

import functools
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .file_memory_samf import fetch_pages, in_file, release_memory, release_pages
from .onnx_product_samf import BLOCKS, OnnxProduct, is_available
from .quantized_plan_samf import ONNX_RUNTIME, TORCH, KernelPlan, find_plan
from .quantized_weights_samf import (
    BLOCK,
    SAVED_LAYOUT,
    WORKSPACE,
    NibbleLayout,
    dequantize_4_bits,
    pack,
    padded,
    pair_inputs,
    processor_layout,
    quantize_4_bits,
    quantize_8_bits,
    unpack,
    zero_codes,
)

_CHUNK = 1 << 23  # weights that are dequantised at once: 16 MB in bfloat16
_STEP_8_BIT = 32  # torch's 8-bit product crashes on other numbers of inputs than multiples of 16
_ZERO_8_BIT = 128  # the code without a sign of a weight of 0
_SAMPLE = (4096, 3072)  # channels and inputs of the layer that is measured: large, as those that decoding waits for


class QuantizedLinear(nn.Linear):
    """A linear layer that keeps its weight in few bits; `for_bits` returns the class of 4 or of 8.

    Args:
        in_features: inputs.
        out_features: channels.
        bias: whether it adds a bias.
        group_size: inputs that share a scale; 8 bits have one scale for all.
        device: where its tensors are made.
    """

    bits: int
    scales: torch.Tensor
    step: int  # the number of inputs is padded to a multiple of it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        group_size: int = 64,
        device: torch.device | str | None = None,
    ):
        nn.Module.__init__(self)
        self._onnx: OnnxProduct | None = None
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        bias_value = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self.register_parameter("bias", bias_value)

    @staticmethod
    def for_bits(bits: int) -> "type[QuantizedLinear]":
        """Return the class of 4 or 8 bits."""
        return Int4Linear if bits == 4 else Int8Linear

    @classmethod
    def from_linear(cls, linear: nn.Linear, group_size: int = 64) -> "QuantizedLinear":
        """Return a layer with a linear layer's weight, rounded.

        Args:
            linear: it isn't changed; the bias is shared.
            group_size: inputs that share a scale.
        """
        layer = cls(linear.in_features, linear.out_features, False, group_size, device="meta")
        layer.bias = linear.bias
        layer.fill(linear.weight.detach())
        return layer.arrange()

    def quantized(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a weight (channels, inputs) as this layer saves it, and its scales."""
        raise NotImplementedError

    def fill(self, weight: torch.Tensor) -> None:
        """Set the layer's weight to a weight (channels, inputs), rounded."""
        packed, self.scales = self.quantized(weight)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def arrange(self) -> "QuantizedLinear":
        """Bring the weight from the saved layout to the one that this processor's product reads; return the layer."""
        plan = kernel_plan(self.bits)
        if plan.library == TORCH:
            self.arrange_for_torch()
        elif plan.most_rows != 0 and self._onnx is None:
            self._onnx = self.make_onnx_product()
            # What it has copied is needed again for long prompts, saving and gradients only.
            self.weight.data, self.scales = in_file(self.weight.data), in_file(self.scales)
            release_memory()
        return self

    def arrange_for_torch(self) -> None:
        """Bring the weight from the saved layout to that of torch's product."""

    @property
    def libraries(self) -> list[str]:
        """Return which libraries have a direct product with such weights on this processor."""
        return [TORCH] * self.has_torch_product + [ONNX_RUNTIME] * is_available()

    def direct(self, rows: torch.Tensor, library: str) -> torch.Tensor:
        """Return the product of rows (M, padded inputs) by a library's product with quantised weights.

        Args:
            rows: of any type.
            library: `TORCH`, or `ONNX_RUNTIME`.
        """
        if library == TORCH:
            return self.torch_product(rows.bfloat16())
        if self._onnx is None:
            self._onnx = self.make_onnx_product()
        return self._onnx(rows.float())

    @property
    def has_torch_product(self) -> bool:
        """Return whether torch has a product with such weights on this processor."""
        raise NotImplementedError

    def torch_product(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product of rows (M, padded inputs) bfloat16 by torch's own product with quantised weights."""
        raise NotImplementedError

    def make_onnx_product(self) -> OnnxProduct:
        """Return ONNX Runtime's product with this weight."""
        raise NotImplementedError

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the channels of each chunk, and their weights (padded inputs, n) without `row_scales`.

        A chunk is valid until the next one.
        """
        fetch_pages(self.weight)
        yield from self.read_chunks(dtype)
        release_pages(self.weight)
        release_pages(self.scales)

    def read_chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield what `chunks` yields."""
        raise NotImplementedError

    @property
    def row_scales(self) -> torch.Tensor | None:
        """Return the factor of each channel (N,) that `chunks` leaves out; None = none."""
        return None

    def dequantized(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product of rows (M, padded inputs) with dequantised weights of the same type."""
        output = rows.new_empty(rows.shape[0], self.channels)
        for channels, weight in self.chunks(rows.dtype):
            torch.mm(rows, weight, out=output[:, channels])
        scales = self.row_scales
        return output if scales is None else output.mul_(scales.to(output.dtype))

    @property
    def channels(self) -> int:
        """Return the number of channels with those that fill the last block."""
        return self.out_features

    def full_weight(self) -> torch.Tensor:
        """Return the dequantised weight (channels, inputs) in float32."""
        weight = torch.cat([chunk.clone() for _, chunk in self.chunks(torch.float32)], dim=1).mT
        if self.row_scales is not None:
            weight = weight * self.row_scales.float().unsqueeze(-1)
        return weight[: self.out_features, : self.in_features]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input (…, inputs) times the weight plus the bias, (…, channels)."""
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        output = _Product.apply(input, self) if needs_gradient else self.product(input)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def product(self, input: torch.Tensor) -> torch.Tensor:
        """Return input (…, inputs) times the weight, in the input's type."""
        rows = input.reshape(-1, self.in_features)
        rows = _padded(rows, padded(self.in_features, self.step))
        if input.device.type != "cpu":
            output = self.dequantized(rows)
        elif (plan := kernel_plan(self.bits)).is_direct(rows.shape[0]):
            output = self.direct(rows, plan.library)
        else:
            output = self.dequantized(rows.to(plan.dtype))
        return output[:, : self.out_features].reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the input (…, inputs) for that of the output (…, channels)."""
        rows = gradient.reshape(-1, self.out_features)
        rows = _padded(rows, self.channels)
        if self.row_scales is not None:
            rows = rows * self.row_scales.to(rows.dtype)
        if gradient.device.type == "cpu":
            rows = rows.to(kernel_plan(self.bits).dtype)
        total = torch.zeros(rows.shape[0], padded(self.in_features, self.step), device=rows.device)
        for channels, weight in self.chunks(rows.dtype):
            total += rows[:, channels] @ weight.mT
        return total[:, : self.in_features].reshape(*gradient.shape[:-1], self.in_features).to(gradient.dtype)

    def extra_repr(self) -> str:
        """Return what is printed of the layer."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.bits}"

    def _apply(self, *args: Any, **kwargs: Any) -> "QuantizedLinear":
        """Keep the scales in bfloat16, as the products take them, when a model's type is changed."""
        super()._apply(*args, **kwargs)
        self.scales = self.scales.bfloat16()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can't be copied or pickled; it is made again when it is needed."""
        return {**self.__dict__, "_onnx": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._onnx = None


class Int4Linear(QuantizedLinear):
    """A linear layer with 4-bit weights in groups."""

    bits = 4

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        group_size: int = 64,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, bias, group_size, device)
        self.step, self.layout = group_size, SAVED_LAYOUT
        inputs = padded(in_features, group_size)
        weight = torch.zeros(self.channels // BLOCK, inputs, BLOCK // 2, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scales = torch.zeros(inputs // group_size, self.channels, 2, dtype=torch.bfloat16, device=device)
        self.register_buffer("scales", scales)

    @property
    def channels(self) -> int:
        """Return the number of channels with those that fill the last block."""
        return padded(self.out_features, BLOCK)

    def quantized(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a weight (channels, inputs) as bytes in the saved layout, and its scales."""
        return quantize_4_bits(weight, self.group_size)

    def arrange_for_torch(self) -> None:
        """Bring the weight from the saved layout to that of torch's product."""
        self.weight.data = _rearranged(self.weight.data, self.layout, processor_layout() or SAVED_LAYOUT)
        self.layout = processor_layout() or SAVED_LAYOUT

    @property
    def has_torch_product(self) -> bool:
        """Return whether torch has a product with 4-bit weights on this processor."""
        return self.layout == processor_layout()

    def torch_product(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product of rows (M, padded inputs) bfloat16 by torch's own product with 4-bit weights."""
        packed = self.weight.view(self.channels, -1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, self.group_size, self.scales)

    def make_onnx_product(self) -> OnnxProduct:
        """Return ONNX Runtime's product with this weight."""
        scales, zeros = self.scales.float().transpose(0, 1).unbind(-1)  # (N, G)
        codes = pair_inputs(_rearranged(self.weight.data, self.layout, SAVED_LAYOUT))
        return OnnxProduct(codes, scales, zero_codes(scales, zeros), self.bits)

    def read_chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the channels of each chunk, and their weights (padded inputs, n)."""
        step = max(_CHUNK // self.weight.shape[1] // BLOCK, 1)
        for start in range(0, self.weight.shape[0], step):
            packed = self.weight[start : start + step]
            channels = slice(start * BLOCK, (start + len(packed)) * BLOCK)
            yield channels, dequantize_4_bits(packed, self.scales[:, channels], self.layout, dtype)

    def extra_repr(self) -> str:
        """Return what is printed of the layer."""
        return f"{super().extra_repr()}, group_size={self.group_size}"

    def _save_to_state_dict(self, destination: MutableMapping[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != SAVED_LAYOUT:
            destination[f"{prefix}weight"] = _rearranged(self.weight.data, self.layout, SAVED_LAYOUT)

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        if key in state_dict and self.layout != SAVED_LAYOUT:
            state_dict = {**state_dict, key: _rearranged(state_dict[key], SAVED_LAYOUT, self.layout)}
        super()._load_from_state_dict(state_dict, prefix, *args)


class Int8Linear(QuantizedLinear):
    """A linear layer with 8-bit weights and one scale for each channel."""

    bits = 8
    step = _STEP_8_BIT

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        group_size: int = 64,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, bias, group_size, device)
        weight = torch.zeros(out_features, padded(in_features, self.step), dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scales", torch.zeros(out_features, dtype=torch.bfloat16, device=device))

    def quantized(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a weight (channels, inputs) as int8, padded, and its scales."""
        rounded, scales = quantize_8_bits(weight)
        return F.pad(rounded, (0, padded(self.in_features, self.step) - self.in_features)), scales

    @property
    def has_torch_product(self) -> bool:
        """Return whether torch has a product with 8-bit weights."""
        return hasattr(torch.ops.aten, "_weight_int8pack_mm")

    def torch_product(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product of rows (M, padded inputs) bfloat16 by torch's own product with 8-bit weights."""
        return torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales)

    def make_onnx_product(self) -> OnnxProduct:
        """Return ONNX Runtime's product with this weight, whose codes have no sign."""
        channels, inputs = self.weight.shape
        block = next(block for block in BLOCKS if inputs % block == 0)
        scales = self.scales.float().unsqueeze(1).expand(channels, inputs // block)
        zeros = torch.full(scales.shape, _ZERO_8_BIT, dtype=torch.uint8)
        return OnnxProduct(self.weight.data.view(torch.uint8) ^ _ZERO_8_BIT, scales, zeros, self.bits)

    @property
    def row_scales(self) -> torch.Tensor:
        """Return the scale of each channel."""
        return self.scales

    def read_chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the channels of each chunk, and their weights (padded inputs, n) without the scales."""
        step = max(_CHUNK // self.weight.shape[1], 1)
        for start in range(0, self.out_features, step):
            chunk = slice(start, min(start + step, self.out_features))
            codes = self.weight[chunk]
            yield chunk, WORKSPACE.tensor("weight", codes.shape, dtype, codes.device).copy_(codes).mT


class _Product(torch.autograd.Function):
    """A layer's product for inputs that need a gradient."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(input)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.input_gradient(gradient), None


def _padded(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return rows (M, n) as (M, size), with zeros; without a copy where they have the size."""
    return rows if rows.shape[1] == size else F.pad(rows, (0, size - rows.shape[1]))


def _rearranged(packed: torch.Tensor, layout: NibbleLayout, wanted: NibbleLayout) -> torch.Tensor:
    return packed if layout == wanted else pack(unpack(packed, layout), wanted)


@functools.cache
def kernel_plan(bits: int) -> KernelPlan:
    """Return what computes products with weights of `bits` bits on this processor."""
    with torch.device("cpu"):  # the library builds models within another
        return find_plan(bits, lambda: _sample(bits))


def _sample(bits: int) -> QuantizedLinear:
    channels, inputs = _SAMPLE
    layer = QuantizedLinear.for_bits(bits)(inputs, channels, device="meta")
    layer.fill(torch.randn(channels, inputs, dtype=torch.float32, generator=torch.Generator().manual_seed(0)))
    layer.arrange_for_torch()
    return layer
