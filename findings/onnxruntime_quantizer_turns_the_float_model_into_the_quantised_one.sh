#!/usr/bin/env bash
# onnxruntime's MatMulNBits quantiser changes the model that it is given, and a second one then leaves it as it is.
#
# Guessed: MatMulNBitsQuantizer(model, …).process() makes a quantised copy, `.model`; the float model stays, to be compared with
# or quantised in another way.
# Seen: the model that was handed over is quantised. "Float against 4 bits" shows a difference of 0, and a series of settings in
# a loop measures the first one several times: the other quantisers find no MatMul and return without an error (at INFO it is
# logged). A copy.deepcopy of the model for each gives what was meant.
# Here: the project writes its own MatMulNBits (model/onnx_product_samf.py) and doesn't use the quantiser.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2, onnx-ir 1.1.0, numpy 2.4.6, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "onnxruntime==1.32.0" "onnx==1.23.2" "onnx-ir==1.1.0" "numpy==2.4.6"
cd "$folder"

cat > quantise.py <<'PYTHON'
import copy
import logging

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

logging.disable(logging.CRITICAL)
random = np.random.default_rng(0)
weight = random.standard_normal((256, 64)).astype(np.float32)
rows = random.standard_normal((100, 256)).astype(np.float32)


def float_model():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 64])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def output(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": rows})[0]


def compare(name, prepare):
    model = float_model()
    for block in (16, 128):
        quantizer = MatMulNBitsQuantizer(prepare(model), block_size=block, is_symmetric=True)
        quantizer.process()
        node = quantizer.model.model.graph.node[0]
        used = next(attribute.i for attribute in node.attribute if attribute.name == "block_size")
        error = np.abs(output(quantizer.model.model) - output(model)).max()
        print(f"{name}, blocks of {block} asked for: blocks of {used}; the float model is {model.graph.node[0].op_type},"
              f" largest difference from it {error:.1f}")


compare("as it is", lambda model: model)
compare("deepcopy", copy.deepcopy)
PYTHON
"$folder/venv/bin/python" quantise.py | tee seen.txt
diff seen.txt - <<'SEEN'
as it is, blocks of 16 asked for: blocks of 16; the float model is MatMulNBits, largest difference from it 0.0
as it is, blocks of 128 asked for: blocks of 16; the float model is MatMulNBits, largest difference from it 0.0
deepcopy, blocks of 16 asked for: blocks of 16; the float model is MatMul, largest difference from it 4.5
deepcopy, blocks of 128 asked for: blocks of 128; the float model is MatMul, largest difference from it 6.8
SEEN
echo "as seen"
