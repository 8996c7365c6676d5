#!/usr/bin/env bash
# SimpleITK reads air as +64536 HU where the first slice of a series has another intercept than the rest.
#
# Guessed: RescaleIntercept is an attribute of each slice, so each is scaled by its own, and the volume has a type that holds them
# all; or such a series is refused.
# Seen: each slice is scaled by its own, but into the voxel type that the first slice needs. Stored values without sign and an
# intercept of 0 fit into unsigned 16 bits, and there -1000 HU of the other slices becomes 64536. No error and no warning. In
# the other order, with the intercept of -1024 first, all is right. dcm2niix has -1000 in both.
# Here: the project scales each slice by itself into signed HU (model/ct_dicom_pixels.py).
#
# Versions: SimpleITK 2.5.7, dcm2niix 1.0.20260724, pydicom 3.0.2, nibabel 5.4.2, numpy 2.4.6, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "SimpleITK==2.5.7" "dcm2niix==1.0.20260724" "pydicom==3.0.2" "nibabel==5.4.2" "numpy==2.4.6"
cd "$folder"

cat > series.py <<'PYTHON'
import os

import nibabel
import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write(folder, number, stored, intercept):
    ct = Dataset()
    ct.SOPClassUID, ct.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=[folder, str(number)])
    ct.StudyInstanceUID, ct.SeriesInstanceUID = generate_uid(entropy_srcs=["study"]), generate_uid(entropy_srcs=[folder])
    ct.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame"])
    ct.PatientName, ct.PatientID, ct.PatientBirthDate, ct.PatientSex = "Phantom", "1", "", ""
    ct.StudyDate, ct.StudyTime, ct.StudyID, ct.AccessionNumber, ct.ReferringPhysicianName = "20260101", "120000", "1", "", ""
    ct.Modality, ct.SeriesNumber, ct.InstanceNumber, ct.KVP = "CT", 1, number + 1, 120
    ct.ImageType, ct.PatientPosition = ["ORIGINAL", "PRIMARY", "AXIAL"], "HFS"
    ct.ImagePositionPatient, ct.ImageOrientationPatient = [0, 0, 1.5 * number], [1, 0, 0, 0, 1, 0]
    ct.PixelSpacing, ct.SliceThickness, ct.Rows, ct.Columns = [0.7, 0.7], 1.5, 16, 16
    ct.SamplesPerPixel, ct.PhotometricInterpretation, ct.PixelRepresentation = 1, "MONOCHROME2", 0
    ct.BitsAllocated, ct.BitsStored, ct.HighBit = 16, 16, 15
    ct.RescaleSlope, ct.RescaleIntercept, ct.RescaleType = 1, intercept, "HU"
    ct.PixelData = np.full((16, 16), stored, np.uint16).tobytes()
    ct.file_meta = FileMetaDataset()
    ct.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ct.save_as(f"{folder}/{number}.dcm", enforce_file_format=True)


WATER, AIR = (0, 0), (24, -1024)  # stored value, intercept: 0 HU and -1000 HU
for folder, slices in (("water_first", [WATER, AIR, AIR, AIR]), ("water_last", [AIR, AIR, AIR, WATER])):
    os.mkdir(folder)
    for number, (stored, intercept) in enumerate(slices):
        write(folder, number, stored, intercept)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder))
    found = sitk.GetArrayFromImage(image)[:, 0, 0].tolist()
    os.system(f"'{os.environ['DCM2NIIX']}' -f {folder} -o . {folder} > converter.txt")
    converted = nibabel.load(f"{folder}.nii").get_fdata()[0, 0].astype(int).tolist()
    print(f"{folder}: true {[stored + intercept for stored, intercept in slices]}; SimpleITK {found}, "
          f"{image.GetPixelIDTypeAsString()}; dcm2niix {converted}")
PYTHON
DCM2NIIX="$folder/venv/bin/dcm2niix" "$folder/venv/bin/python" series.py | tee seen.txt
diff seen.txt - <<'SEEN'
water_first: true [0, -1000, -1000, -1000]; SimpleITK [0, 64536, 64536, 64536], 16-bit unsigned integer; dcm2niix [0, -1000, -1000, -1000]
water_last: true [-1000, -1000, -1000, 0]; SimpleITK [-1000, -1000, -1000, 0], 32-bit signed integer; dcm2niix [-1000, -1000, -1000, 0]
SEEN
echo "as seen"
