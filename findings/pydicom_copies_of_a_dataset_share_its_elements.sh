#!/usr/bin/env bash
# pydicom's Dataset(other) and other.copy() are the original under another name; only deepcopy is a copy.
#
# Guessed: copy() is a shallow copy, as of a dict: an attribute that is set on the copy leaves the original as it was, and only
# nested sequences are shared. Dataset(other) is one, too.
# Seen: both hold the original's own table of elements. An attribute that is set, added or deleted on the "copy" is set, added
# or deleted on the original: who anonymises the copy has anonymised the original, and who gives the copy a new UID has changed
# what it was copied from. A Dataset of the same elements has a table of its own, but setting an attribute that it has changes
# the element, which is still the original's. deepcopy is independent.
#
# Versions: pydicom 3.0.2, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "pydicom==3.0.2"
cd "$folder"

cat > share.py <<'PYTHON'
from copy import deepcopy

from pydicom.dataset import Dataset


def made_by(how):
    first = Dataset()
    first.PatientName = "First^Name"
    first.StudyID = "1"
    second = how(first)
    second.PatientName = "Second^Name"
    second.AccessionNumber = "2"
    del second.StudyID
    return str(first.PatientName), "AccessionNumber" in first, "StudyID" in first


for name, how in (
    ("Dataset(other)", Dataset),
    ("other.copy()", lambda first: first.copy()),
    ("deepcopy(other)", deepcopy),
    ("Dataset of its elements", lambda first: Dataset({element.tag: element for element in first})),
):
    print(f"{name}: the original's name, has the new attribute, has the deleted one: {made_by(how)}")
PYTHON
"$folder/venv/bin/python" share.py | tee seen.txt
diff seen.txt - <<'SEEN'
Dataset(other): the original's name, has the new attribute, has the deleted one: ('Second^Name', True, False)
other.copy(): the original's name, has the new attribute, has the deleted one: ('Second^Name', True, False)
deepcopy(other): the original's name, has the new attribute, has the deleted one: ('First^Name', False, True)
Dataset of its elements: the original's name, has the new attribute, has the deleted one: ('Second^Name', False, True)
SEEN
echo "as seen"
