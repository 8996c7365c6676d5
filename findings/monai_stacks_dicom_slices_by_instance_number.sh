#!/usr/bin/env bash
# MONAI's LoadImage stacks the slices of a DICOM folder by Instance Number, wherever they lie in the patient.
#
# Guessed: slices are sorted by their positions, as by SimpleITK; the Instance Number, which the standard gives no spatial
# meaning, doesn't matter. An order that contradicts the positions is at least warned of.
# Seen: with pydicom installed and itk not, LoadImage() takes PydicomReader, which sorts by Instance Number alone. A series of
# two interleaved passes (numbers 1 to 4 in every other place, 5 to 8 between them) is stacked pass after pass: the anatomy runs
# through the chest twice. The affine is computed from the first and the last slice and the mean step, so that it looks like one
# of an ordinary scan: all lies elsewhere than it says, and there is no warning. Numbers that run against the positions are
# fine.
# Here: the project sorts by position along the slices' normal (model/ct_dicom_geometry.py).
#
# Versions: MONAI 1.6.1, pydicom 3.0.2, SimpleITK 2.5.7, torch 2.13.0+cpu, numpy 2.4.6, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet "$@"; }
pip "torch==2.13.0+cpu" 2> /dev/null || pip --index-url https://download.pytorch.org/whl/cpu "torch==2.13.0"
pip "monai==1.6.1" "pydicom==3.0.2" "SimpleITK==2.5.7" "numpy==2.4.6"
cd "$folder"

cat > order.py <<'PYTHON'
import os
import warnings

import numpy as np
import SimpleITK as sitk
from monai.transforms import LoadImage
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write(series, place, instance):
    ct = Dataset()
    ct.SOPClassUID, ct.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=[series, str(place)])
    ct.StudyInstanceUID, ct.SeriesInstanceUID = generate_uid(entropy_srcs=["study"]), generate_uid(entropy_srcs=[series])
    ct.PatientName, ct.PatientID, ct.Modality, ct.InstanceNumber = "Phantom", "1", "CT", instance
    ct.ImagePositionPatient, ct.ImageOrientationPatient = [0, 0, 1.5 * place], [1, 0, 0, 0, 1, 0]
    ct.PixelSpacing, ct.SliceThickness, ct.Rows, ct.Columns = [0.7, 0.7], 1.5, 16, 16
    ct.SamplesPerPixel, ct.PhotometricInterpretation, ct.PixelRepresentation = 1, "MONOCHROME2", 0
    ct.BitsAllocated, ct.BitsStored, ct.HighBit = 16, 16, 15
    ct.RescaleSlope, ct.RescaleIntercept, ct.RescaleType = 1, -1024, "HU"
    ct.PixelData = np.full((16, 16), 1024 + place, np.uint16).tobytes()  # HU = the number of the place
    ct.file_meta = FileMetaDataset()
    ct.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ct.save_as(f"{series}/{place}.dcm", enforce_file_format=True)


for series, numbers in (
    ("along", [1, 2, 3, 4, 5, 6, 7, 8]),
    ("against", [8, 7, 6, 5, 4, 3, 2, 1]),
    ("interleaved", [1, 5, 2, 6, 3, 7, 4, 8]),
):
    os.mkdir(series)
    for place, instance in enumerate(numbers):
        write(series, place, instance)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        volume = LoadImage()(series)
    said = [warning for warning in said if "nvImageCodec" not in str(warning.message)]  # a decoder for GPUs
    places = volume[0, 0].int().tolist()
    step, start = float(volume.affine[2, 2]), float(volume.affine[2, 3])
    off = max(abs(start + step * index - 1.5 * place) for index, place in enumerate(places))
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(series))
    print(f"{series}: MONAI places {places}, step {step:.2f} mm, farthest from its own place {off:.1f} mm, warnings {len(said)};"
          f" SimpleITK {sitk.GetArrayFromImage(image)[:, 0, 0].tolist()}, {image.GetSpacing()[2]} mm")
PYTHON
"$folder/venv/bin/python" order.py 2> errors.txt | tee seen.txt || { cat errors.txt; exit 1; }
diff seen.txt - <<'SEEN'
along: MONAI places [0, 1, 2, 3, 4, 5, 6, 7], step 1.50 mm, farthest from its own place 0.0 mm, warnings 0; SimpleITK [0, 1, 2, 3, 4, 5, 6, 7], 1.5 mm
against: MONAI places [7, 6, 5, 4, 3, 2, 1, 0], step -1.50 mm, farthest from its own place 0.0 mm, warnings 0; SimpleITK [0, 1, 2, 3, 4, 5, 6, 7], 1.5 mm
interleaved: MONAI places [0, 2, 4, 6, 1, 3, 5, 7], step 1.50 mm, farthest from its own place 4.5 mm, warnings 0; SimpleITK [0, 1, 2, 3, 4, 5, 6, 7], 1.5 mm
SEEN
echo "as seen"
