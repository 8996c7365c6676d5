#!/usr/bin/env bash
# A MetaImage's TransformMatrix is the transpose of the direction matrix that ITK returns for it.
#
# Guessed: TransformMatrix holds GetDirection()'s nine numbers in the same order.
# Seen: the file lists them axis by axis (row i is where axis i points), GetDirection() row by row of a matrix whose columns are
# the axes. For axial scans both are the same nine numbers, so that a header written by hand from GetDirection() passes all its
# tests. A scan that is tilted by 20 degrees comes back tilted by -20, and one whose axes run a, b, c as c, a, b. Nothing warns:
# the transpose of a rotation is a rotation.
# Here: the project reads the rows as axes (model/ct_metaimage.py) and tests files with turned axes against SimpleITK
# (tests/model/test_reader_disagreements.py).
#
# Versions: SimpleITK 2.5.7, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "SimpleITK==2.5.7"
cd "$folder"

cat > matrix.py <<'PYTHON'
import math

import SimpleITK as sitk

cosine, sine = math.cos(math.radians(20)), math.sin(math.radians(20))
DIRECTIONS = {
    "axial": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "feet first": (-1, 0, 0, 0, 1, 0, 0, 0, -1),
    "tilted by 20 degrees": (1, 0, 0, 0, cosine, -sine, 0, sine, cosine),
    "sagittal": (0, 0, 1, 1, 0, 0, 0, 1, 0),
}
for name, direction in DIRECTIONS.items():
    image = sitk.Image([4, 5, 6], sitk.sitkInt16)
    image.SetDirection(direction)
    sitk.WriteImage(image, "scan.mha")
    with open("scan.mha", "rb") as file:
        lines = file.read().split(b"\n")
    written = next(line for line in lines if line.startswith(b"TransformMatrix")).decode().split("=")[1].split()
    same = all(abs(float(text) - number) < 1e-6 for text, number in zip(written, image.GetDirection(), strict=True))

    by_hand = b"TransformMatrix = " + " ".join(map(str, image.GetDirection())).encode()
    with open("hand.mha", "wb") as file:
        file.write(b"\n".join(by_hand if line.startswith(b"TransformMatrix") else line for line in lines))
    read = sitk.ReadImage("hand.mha").GetDirection()
    print(f"{name}: same order {same}; written in GetDirection's order and read: {[round(number, 2) + 0.0 for number in read]}")
PYTHON
"$folder/venv/bin/python" matrix.py | tee seen.txt
diff seen.txt - <<'SEEN'
axial: same order True; written in GetDirection's order and read: [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
feet first: same order True; written in GetDirection's order and read: [-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0]
tilted by 20 degrees: same order False; written in GetDirection's order and read: [1.0, 0.0, 0.0, 0.0, 0.94, 0.34, 0.0, -0.34, 0.94]
sagittal: same order False; written in GetDirection's order and read: [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
SEEN
echo "as seen"
