"""Products with 4-bit and 8-bit weights by ONNX Runtime, where it is installed.

Its operator `MatMulNBits` rounds each block of the activations to 8 bits and multiplies integers, which processors do
several times faster than what torch's products do. It is a library's kernel for one product: the model stays torch's.

Shapes: N channels, K inputs (a multiple of the block), G = K / block.
"""

import contextlib
import functools
import importlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version
from torch.nn import functional as F

_OLDEST = {"onnx": "1.23", "onnxruntime": "1.32"}  # as in the extra `cpu`; older ones have not been tried
BLOCKS = (128, 64, 32)  # inputs that share a scale; the operator knows no others that weights here have
_INTEGER_ACTIVATIONS = 4  # the operator's accuracy_level for activations in 8 bits
_IR_VERSION = 10  # of the model file; any that has operator set 21
_OPERATOR_SET = 21


@functools.cache
def is_available() -> bool:
    """Return whether the packages are installed, and recent enough."""
    try:
        return all(Version(metadata.version(name)) >= Version(oldest) for name, oldest in _OLDEST.items())
    except metadata.PackageNotFoundError:
        return False


class OnnxProduct:
    """A product with one weight, weight = (code - zero) * scale, which it copies.

    Args:
        codes: (N, K * bits / 8) uint8; of 4 bits, neighbours share a byte, the first in its low half.
        scales: (N, G) float32.
        zeros: (N, G) uint8, the codes of a weight of 0.
        bits: 4 or 8.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int):
        runtime = importlib.import_module("onnxruntime")
        _share_threads(torch.get_num_threads())
        channels, groups = scales.shape
        if bits == 4:
            zeros = F.pad(zeros, (0, groups % 2))
            zeros = zeros[:, 0::2] | (zeros[:, 1::2] << 4)
        constants = {"weight": codes.view(channels, groups, -1), "scales": scales.flatten(), "zeros": zeros.flatten()}
        options = runtime.SessionOptions()
        options.use_per_session_threads = False
        options.enable_cpu_mem_arena = False  # keeps what a long prompt needed
        options.log_severity_level = 3  # errors
        model = _model_bytes(bits, codes.shape[1] * 8 // bits, constants)
        self.session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.session._model_bytes = None  # the wrapper would keep a second copy of the weight

    @torch.compiler.disable
    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product of rows (M, K) float32, (M, N) float32."""
        (output,) = self.session.run(None, {"rows": rows.detach().contiguous().numpy()})
        return torch.from_numpy(output)


@functools.cache
def _share_threads(threads: int) -> None:
    """Let all sessions share one pool of threads: a hundred layers would have a hundred."""
    runtime = importlib.import_module("onnxruntime")
    # The process has one already where something else made it, such as a copy of this code from a repository.
    with contextlib.suppress(runtime.capi.onnxruntime_pybind11_state.Fail):
        runtime.set_global_thread_pool_sizes(threads, 1)


def _model_bytes(bits: int, inputs: int, constants: Mapping[str, torch.Tensor]) -> bytes:
    """Return an ONNX model of the one operator.

    Constants are part of it: those that are handed over apart from it belong to the caller, who would have to keep them in
    memory beside ONNX Runtime's rearranged copy.
    """
    onnx: Any = importlib.import_module("onnx")
    make, types = onnx.helper, onnx.TensorProto
    channels, groups, _ = constants["weight"].shape
    node = make.make_node(
        "MatMulNBits",
        ["rows", *constants],
        ["output"],
        domain="com.microsoft",
        K=inputs,
        N=channels,
        bits=bits,
        block_size=inputs // groups,
        accuracy_level=_INTEGER_ACTIVATIONS,
    )
    graph = make.make_graph(
        [node],
        "product",
        [make.make_tensor_value_info("rows", types.FLOAT, ["M", inputs])],
        [make.make_tensor_value_info("output", types.FLOAT, ["M", channels])],
    )
    for name, constant in constants.items():
        kind = types.FLOAT if constant.is_floating_point() else types.UINT8
        graph.initializer.add(
            name=name, data_type=kind, dims=constant.shape, raw_data=constant.contiguous().numpy().tobytes()
        )
    sets = [make.make_opsetid("", _OPERATOR_SET), make.make_opsetid("com.microsoft", 1)]
    return make.make_model(graph, opset_imports=sets, ir_version=_IR_VERSION).SerializeToString()
