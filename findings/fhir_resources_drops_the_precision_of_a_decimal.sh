#!/usr/bin/env bash
# fhir.resources returns 0.70 as 0.7 and 4.000 as 4.0, and an integer part of 17 digits as another number.
#
# Guessed: a FHIR decimal keeps its digits: the standard counts precision as a part of the value (0.010 differs from 0.01) and
# has implementations preserve it (R4, Datatypes, decimal), and the library declares the field as a Decimal.
# Seen: model_validate_json() has lost the zeros before there is a Decimal. A Decimal("0.70") that is given from Python is kept
# as such in the model and written as the float 0.7. A nodule that was measured as 4.00 mm is one of 4.0 mm to the next reader,
# and a resource's text is another after it was only read and written.
# Here: the project's Observations hold probabilities, which are rounded to six digits on purpose (reporting/exports/fhir.py).
#
# Versions: fhir.resources 8.3.0, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "fhir.resources==8.3.0"
cd "$folder"

cat > decimal_digits.py <<'PYTHON'
import json
from decimal import Decimal

from fhir.resources.R4B.observation import Observation

for digits in ("0.70", "4.000", "0.010", "12345678901234567.25"):
    text = (
        '{"resourceType": "Observation", "status": "final", "code": {"text": "diameter"},'
        f' "valueQuantity": {{"value": {digits}, "unit": "mm"}}}}'
    )
    read = Observation.model_validate_json(text)
    made = Observation(status="final", code={"text": "diameter"}, valueQuantity={"value": Decimal(digits), "unit": "mm"})
    written = [
        json.loads(item.model_dump_json(), parse_float=str, parse_int=str)["valueQuantity"]["value"] for item in (read, made)
    ]
    print(f"{digits}: read as {read.valueQuantity.value}, written as {written[0]};"
          f" set as {made.valueQuantity.value}, written as {written[1]}")
PYTHON
"$folder/venv/bin/python" decimal_digits.py | tee seen.txt
diff seen.txt - <<'SEEN'
0.70: read as 0.7, written as 0.7; set as 0.70, written as 0.7
4.000: read as 4.0, written as 4.0; set as 4.000, written as 4.0
0.010: read as 0.01, written as 0.01; set as 0.010, written as 0.01
12345678901234567.25: read as 12345678901234568, written as 12345678901234568; set as 12345678901234567.25, written as 1.2345678901234568e+16
SEEN
echo "as seen"
