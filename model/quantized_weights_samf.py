"""Weights of linear layers in 4 or 8 bits: how they are rounded, and how they are laid out in memory.

4 bits: channels are the rows of a weight, groups are runs of inputs that share a scale and a zero point,
weight = (code - 8) * scale + zero with codes 0 to 15; a weight of 0 has a code of its own. 8 bits: one scale for each channel.

The saved layout is the same on every processor: blocks of 64 channels; byte j of an input holds channel j of the block
in its low half and channel 32 + j in its high half. It is the layout of torch's product on AVX-512, so there nothing is
rearranged; the product of other processors reads other layouts.

Shapes: N channels (a multiple of 64), K inputs (a multiple of the group size), G = K / group size.
"""

import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

BLOCK = 64
GROUP_SIZES = (32, 64, 128)
_CODES = 15  # the largest 4-bit code
_HIGH_HALF = 0xF0
_MIDDLE = 8  # the code of a weight that equals the zero point
_LARGEST_8_BIT = 127
_CHUNK = 1 << 20  # weights that are rounded at once: the intermediate results stay in the processor's caches


@dataclass(frozen=True)
class NibbleLayout:
    """Which channels of a block share a byte.

    Attributes:
        block: channels of a block.
        paired: neighbours share a byte; otherwise channel j and channel block / 2 + j.
    """

    block: int
    paired: bool = False

    @property
    def low(self) -> slice:
        """Return the channels in the low halves of a block's bytes."""
        return slice(0, None, 2) if self.paired else slice(0, self.block // 2)

    @property
    def high(self) -> slice:
        """Return the channels in the high halves."""
        return slice(1, None, 2) if self.paired else slice(self.block // 2, self.block)


SAVED_LAYOUT = NibbleLayout(BLOCK)
_LAYOUTS = tuple(NibbleLayout(block, paired) for paired in (False, True) for block in (64, 32, 16))


def padded(size: int, multiple: int) -> int:
    """Return the smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple


def pack(codes: torch.Tensor, layout: NibbleLayout) -> torch.Tensor:
    """Return 4-bit codes (N, K) uint8 as bytes (N / 64, K, 32) in a layout."""
    blocks = codes.reshape(-1, layout.block, codes.shape[1])  # (blocks, channels, K)
    packed = blocks[:, layout.low] | (blocks[:, layout.high] << 4)
    return packed.transpose(1, 2).contiguous().view(-1, codes.shape[1], BLOCK // 2)


def unpack(packed: torch.Tensor, layout: NibbleLayout) -> torch.Tensor:
    """Return the codes (N, K) uint8 of bytes (N / 64, K, 32) in a layout."""
    inputs = packed.shape[1]
    halves = packed.reshape(-1, inputs, layout.block // 2)
    codes = packed.new_empty(halves.shape[0], inputs, layout.block)
    codes[..., layout.low] = halves & _CODES
    codes[..., layout.high] = halves >> 4
    return codes.transpose(1, 2).reshape(-1, inputs)


def pair_inputs(packed: torch.Tensor) -> torch.Tensor:
    """Return bytes (N / 64, K, 32) in the saved layout as bytes (N, K / 2) of neighbouring inputs, the first low."""
    bytes_ = packed.numpy()  # numpy transposes bytes twice as fast as torch
    even, odd = bytes_[:, 0::2], bytes_[:, 1::2]  # (N / 64, K / 2, 32)
    paired = np.empty((len(bytes_), 2, BLOCK // 2, even.shape[1]), np.uint8)
    paired[:, 0] = ((even & _CODES) | (odd << 4)).transpose(0, 2, 1)  # channels 0 to 31
    paired[:, 1] = ((even >> 4) | (odd & _HIGH_HALF)).transpose(0, 2, 1)
    return torch.from_numpy(paired).view(-1, even.shape[1])


@functools.cache
def processor_layout() -> NibbleLayout | None:
    """Return the layout that torch's 4-bit product reads on this processor; None where there is no such product."""
    convert = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    if convert is None:
        return None
    codes = torch.randint(_CODES + 1, (BLOCK, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        expected = convert(codes.int(), 1).flatten()
    except RuntimeError:  # not built for this processor
        return None
    return next((layout for layout in _LAYOUTS if torch.equal(pack(codes, layout).flatten(), expected)), None)


def quantize_4_bits(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to 4 bits, between the smallest and the largest weight of each group, or 0.

    Args:
        weight: (channels, inputs), of any size; what is missing to whole blocks and groups is filled with zeros.
        group_size: inputs that share a scale.

    Returns:
        Bytes (N / 64, K, 32) in the saved layout, and scales and zero points (G, N, 2) bfloat16.
    """
    channels, inputs = (padded(size, step) for size, step in zip(weight.shape, (BLOCK, group_size), strict=True))
    packed = torch.empty(channels // BLOCK, inputs, BLOCK // 2, dtype=torch.uint8)
    scales = torch.empty(inputs // group_size, channels, 2, dtype=torch.bfloat16)
    step = max(_CHUNK // inputs // BLOCK, 1) * BLOCK
    for start in range(0, channels, step):
        rows = weight[start : start + step]
        size = min(step, channels - start)
        rows = F.pad(rows.float(), (0, inputs - rows.shape[1], 0, size - rows.shape[0]))
        groups = rows.view(size, -1, group_size)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        # Rounded before the codes are chosen, so that the codes fit the scales that are kept.
        scale = ((high - low) / _CODES).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        zero_code = (-low / scale.float()).round_()  # whole: integer products have no others
        zero = ((_MIDDLE - zero_code) * scale.float()).bfloat16()
        codes = (groups / scale.float().unsqueeze(-1)).add_(zero_code.unsqueeze(-1))
        codes = codes.round_().clamp_(0, _CODES).to(torch.uint8).view(size, inputs)
        packed[start // BLOCK : (start + size) // BLOCK] = pack(codes, SAVED_LAYOUT)
        scales[:, start : start + size] = torch.stack([scale, zero], dim=-1).transpose(0, 1)
    return packed, scales


def zero_codes(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Return the codes of weights of 0, uint8, for scales and zero points of one shape."""
    return (_MIDDLE - zeros / scales).round_().clamp_(0, _CODES).to(torch.uint8)


def quantize_8_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (channels, inputs) to 8 bits, symmetrically for each channel.

    Returns:
        int8 of the weight's shape, and scales (channels,) bfloat16.
    """
    rounded = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], dtype=torch.bfloat16)
    step = max(_CHUNK // weight.shape[1], 1)
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].float()
        scale = (rows.abs().amax(-1) / _LARGEST_8_BIT).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        codes = (rows / scale.float().unsqueeze(-1)).round_().clamp_(-_LARGEST_8_BIT, _LARGEST_8_BIT)
        rounded[start : start + step], scales[start : start + step] = codes.to(torch.int8), scale
    return rounded, scales


class Workspace(threading.local):
    """Memory of a thread for weights that are dequantised part by part.

    It is kept: for new memory the system has to fill page after page with zeros, which takes longer than to dequantise.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a tensor of any content, in the memory of the last one of this name.

        Args:
            name: what it is for.
            shape: its shape.
            dtype: its type.
            device: where it is; only the CPU's memory is kept.
        """
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        kept = self._buffers.get(name)
        if kept is None or kept.numel() < size:
            with torch.inference_mode(False):  # it is needed outside too
                kept = self._buffers[name] = torch.empty(size, dtype=torch.uint8)
        return kept[:size].view(dtype).view(shape)


WORKSPACE = Workspace()


def dequantize_4_bits(
    packed: torch.Tensor, scales: torch.Tensor, layout: NibbleLayout, dtype: torch.dtype
) -> torch.Tensor:
    """Return weights as a matrix of inputs by channels (K, n), as a product takes it, in `WORKSPACE`.

    Args:
        packed: bytes (n / 64, K, 32) of some blocks.
        scales: their scales and zero points (G, n, 2).
        layout: of the bytes.
        dtype: of the result.
    """
    inputs, groups = packed.shape[1], scales.shape[0]
    bytes_ = packed.view(-1, inputs, layout.block // 2)
    halves = WORKSPACE.tensor("halves", bytes_.shape, torch.uint8, packed.device)
    weight = WORKSPACE.tensor("weight", (inputs, scales.shape[1]), dtype, packed.device)
    blocks = weight.view(inputs, -1, layout.block).transpose(0, 1)  # (blocks, K, channels)
    blocks[..., layout.low] = torch.bitwise_and(bytes_, _CODES, out=halves)
    blocks[..., layout.high] = torch.bitwise_right_shift(bytes_, 4, out=halves)
    scale, zero = scales.float().unsqueeze(1).unbind(-1)  # (G, 1, n)
    grouped = weight.view(groups, -1, scales.shape[1])  # (G, group size, n)
    torch.addcmul((zero - _MIDDLE * scale).to(dtype), grouped, scale.to(dtype), out=grouped)
    return weight
