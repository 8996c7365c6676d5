#!/usr/bin/env bash
# OpenVINO turns a transposed array of float16 into a constant of int16 that holds its bit patterns.
#
# Guessed: opset.constant(array) has the array's type and values, in whatever order they lie in memory; or it refuses others.
# Seen: float32, float64 and int8 are right, transposed or not. A float16 array that is not contiguous, as scales or weights
# are after a transposition, becomes int16, and 1.0 is 15360. Nothing is said; a model that converts it to float32 computes on.
# numpy.ascontiguousarray() before it cures it.
# Here: the project doesn't use OpenVINO; it was tried for weights of 4 bits (docs/results/benchmarks.md).
#
# Versions: openvino 2026.4.1, numpy 2.4.6, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "openvino==2026.4.1" "numpy==2.4.6"
cd "$folder"

cat > constants.py <<'PYTHON'
import numpy as np
import openvino.opset13 as opset

for kind in ("float32", "float64", "int8", "float16"):
    array = np.arange(6).reshape(2, 3).astype(kind).T
    for name, given in (("transposed", array), ("contiguous", np.ascontiguousarray(array))):
        made = opset.constant(given)
        print(f"{kind}, {name}: {made.get_element_type().get_type_name()} {made.data.tolist()}")
PYTHON

cat > expected.txt <<'TEXT'
float32, transposed: f32 [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
float32, contiguous: f32 [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
float64, transposed: f64 [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
float64, contiguous: f64 [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
int8, transposed: i8 [[0, 3], [1, 4], [2, 5]]
int8, contiguous: i8 [[0, 3], [1, 4], [2, 5]]
float16, transposed: i16 [[0, 16896], [15360, 17408], [16384, 17664]]
float16, contiguous: f16 [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
TEXT

"$folder/venv/bin/python" constants.py | tee seen.txt
diff expected.txt seen.txt && echo "as seen"
