#!/usr/bin/env bash
# SimpleITK places a NIfTI by its qform, not by its sform, as soon as the sform's code is 2, 3 or 4.
#
# Guessed: the sform, where it has a code, is taken before the qform, as by nibabel, FSL and the standard's method 3; or ITK
# prefers the qform throughout.
# Seen: the sform counts with code 1 (scanner) and with any code if the qform has none. With code 2 (aligned), which registration
# tools write and nibabel gives by default, a qform of any code wins. So a scan that was moved by set_sform() is where it was for
# SimpleITK, and nibabel shows it moved; image and mask that were saved by different libraries lie apart by the registration.
# Here: the project takes the sform, and warns where the two disagree (model/ct_nifti.py).
#
# Versions: SimpleITK 2.5.7, nibabel 5.4.2, numpy 2.4.6, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "SimpleITK==2.5.7" "nibabel==5.4.2" "numpy==2.4.6"
cd "$folder"

cat > forms.py <<'PYTHON'
import nibabel
import numpy as np
import SimpleITK as sitk

sitk.ProcessObject.SetGlobalWarningDisplay(False)
scanner = np.diag([0.7, 0.7, 1.5, 1.0])
moved = scanner.copy()
moved[0, 3] = 30.0
names = {0.0: "qform", 30.0: "sform"}


def placed(image):
    nibabel.save(image, "scan.nii")
    by_nibabel = nibabel.load("scan.nii").affine[0, 3]
    by_itk = -sitk.ReadImage("scan.nii").GetOrigin()[0]  # ITK's x points left
    return f"nibabel by the {names[float(by_nibabel)]}, SimpleITK by the {names[abs(by_itk)]}"


for sform_code in (1, 2, 3, 4):
    for qform_code in (0, 1, 2):
        image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), scanner)
        image.set_qform(scanner, qform_code)
        image.set_sform(moved, sform_code)
        print(f"sform {sform_code}, qform {qform_code}: {placed(image)}")

image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), None)
image.set_qform(scanner, "scanner")
image.set_sform(moved)
print(f"a scanner's qform and set_sform(affine), code {int(image.header['sform_code'])}: {placed(image)}")
PYTHON
"$folder/venv/bin/python" forms.py | tee seen.txt
diff seen.txt - <<'SEEN'
sform 1, qform 0: nibabel by the sform, SimpleITK by the sform
sform 1, qform 1: nibabel by the sform, SimpleITK by the sform
sform 1, qform 2: nibabel by the sform, SimpleITK by the sform
sform 2, qform 0: nibabel by the sform, SimpleITK by the sform
sform 2, qform 1: nibabel by the sform, SimpleITK by the qform
sform 2, qform 2: nibabel by the sform, SimpleITK by the qform
sform 3, qform 0: nibabel by the sform, SimpleITK by the sform
sform 3, qform 1: nibabel by the sform, SimpleITK by the qform
sform 3, qform 2: nibabel by the sform, SimpleITK by the qform
sform 4, qform 0: nibabel by the sform, SimpleITK by the sform
sform 4, qform 1: nibabel by the sform, SimpleITK by the qform
sform 4, qform 2: nibabel by the sform, SimpleITK by the qform
a scanner's qform and set_sform(affine), code 2: nibabel by the sform, SimpleITK by the qform
SEEN
echo "as seen"
