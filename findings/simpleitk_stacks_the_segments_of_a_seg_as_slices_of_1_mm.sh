#!/usr/bin/env bash
# SimpleITK reads a DICOM SEG of two segments as one volume of twice the slices, with voxels of 1 mm.
#
# Guessed: a SEG is refused, or read with the geometry of its frames (their functional groups name spacing and position), the
# segments told apart.
# Seen: one segment is read in place. With two, the frames of both are stacked along z, no longer told apart (both 255), and the
# pixel spacing is lost, too: 1 mm instead of 0.7, in all directions. Size, type and values look like those of a mask, and nothing
# warns. highdicom, of which the file is, reads labels and spacing.
# Here: the project writes one segment with all its frames (reporting/exports/dicom_seg.py), which SimpleITK reads in place.
#
# Versions: SimpleITK 2.5.7, highdicom 0.28.2, pydicom 3.0.2, numpy 2.4.6, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "SimpleITK==2.5.7" "highdicom==0.28.2" "pydicom==3.0.2" "numpy==2.4.6"
cd "$folder"

cat > segments.py <<'PYTHON'
import highdicom as hd
import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SLICES, ROWS, COLUMNS = 8, 12, 16
STUDY, SERIES, FRAME = (generate_uid(entropy_srcs=[name]) for name in ("study", "series", "frame"))


def ct_slice(number):
    ct = Dataset()
    ct.file_meta = FileMetaDataset()
    ct.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ct.SOPClassUID, ct.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=[str(number)])
    ct.StudyInstanceUID, ct.SeriesInstanceUID, ct.FrameOfReferenceUID = STUDY, SERIES, FRAME
    ct.PatientName, ct.PatientID, ct.PatientBirthDate, ct.PatientSex = "Phantom^One", "1", "", ""
    ct.StudyDate, ct.StudyTime, ct.StudyID, ct.AccessionNumber, ct.ReferringPhysicianName = "20260101", "120000", "1", "", ""
    ct.Modality, ct.InstanceNumber, ct.PositionReferenceIndicator = "CT", number + 1, ""
    ct.ImagePositionPatient, ct.ImageOrientationPatient = [0, 0, 1.5 * number], [1, 0, 0, 0, 1, 0]
    ct.PixelSpacing, ct.SliceThickness, ct.Rows, ct.Columns = [0.7, 0.7], 1.5, ROWS, COLUMNS
    return ct


def description(number, label):
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=codes.SCT.Lung,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
    )


mask = np.zeros((SLICES, ROWS, COLUMNS), np.uint8)
mask[2:5, 3:6, 4:9] = 1
for segments in (1, 2):
    if segments == 2:
        mask[3:6, 8:10, 4:9] = 2
    seg = hd.seg.Segmentation(
        source_images=[ct_slice(number) for number in range(SLICES)],
        pixel_array=mask,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[description(number + 1, f"part {number + 1}") for number in range(segments)],
        omit_empty_frames=False,
        series_instance_uid=hd.UID(),
        series_number=2,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="none",
        manufacturer_model_name="none",
        software_versions="1",
        device_serial_number="1",
    )
    seg.save_as("seg.dcm")
    image = sitk.ReadImage("seg.dcm")
    voxels = sitk.GetArrayFromImage(image)
    print(f"{segments} segments, SimpleITK: size {image.GetSize()}, spacing {image.GetSpacing()}, values {np.unique(voxels).tolist()},"
          f" marked in slices {np.unique(np.nonzero(voxels)[0]).tolist()}")
    volume = hd.seg.segread("seg.dcm").get_volume(combine_segments=True)
    print(f"{segments} segments, highdicom: size {volume.array.shape[::-1]}, spacing {tuple(map(float, volume.spacing[::-1]))},"
          f" values {np.unique(volume.array).tolist()}")
PYTHON
"$folder/venv/bin/python" -W ignore segments.py | tee seen.txt
diff seen.txt - <<'SEEN'
1 segments, SimpleITK: size (16, 12, 8), spacing (0.7, 0.7, 1.5), values [0, 255], marked in slices [3, 4, 5]
1 segments, highdicom: size (16, 12, 8), spacing (0.7, 0.7, 1.5), values [0, 1]
2 segments, SimpleITK: size (16, 12, 16), spacing (1.0, 1.0, 1.0), values [0, 255], marked in slices [3, 4, 5, 10, 11, 12]
2 segments, highdicom: size (16, 12, 8), spacing (0.7, 0.7, 1.5), values [0, 1, 2]
SEEN
echo "as seen"
