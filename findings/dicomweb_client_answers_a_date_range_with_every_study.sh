#!/usr/bin/env bash
# dicomweb-client's client for folders answers a range of dates with every study that it has.
#
# Guessed: DICOMfileClient offers the search of DICOMwebClient over files, with QIDO's matching (PS3.18, 8.3.4; PS3.4, C.2.2.2):
# a single date, a range, a list of UIDs, wildcards, and ModalitiesInStudy, which its own answers hold. What it can't do raises.
# Seen: a filter that it can't use is left out, and what is left decides: "20260101-20260131" and ModalitiesInStudy=MR return all
# studies, of which none has to match; one line goes to a logger. A list of UIDs is compared as one UID and returns nothing. A
# script that was tried on this client selects other patients than the same script on a server.
# Here: the project doesn't search; it reads the folder that it is given.
#
# Versions: dicomweb-client 0.61.2, pydicom 3.0.2, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "dicomweb-client==0.61.2" "pydicom==3.0.2" "numpy==2.4.6"
cd "$folder"

cat > search.py <<'PYTHON'
import os

from dicomweb_client import DICOMfileClient
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian, generate_uid

os.mkdir("archive")
uids = []
for name, date in (("January", "20260110"), ("February", "20260210"), ("March", "20260310")):
    item = Dataset()
    item.SOPClassUID, item.SOPInstanceUID = BasicTextSRStorage, generate_uid(entropy_srcs=[name, "instance"])
    item.StudyInstanceUID = generate_uid(entropy_srcs=[name, "study"])
    item.SeriesInstanceUID = generate_uid(entropy_srcs=[name, "series"])
    item.StudyDate, item.StudyTime, item.StudyID, item.AccessionNumber = date, "120000", "1", "1"
    item.PatientName, item.PatientID, item.PatientBirthDate, item.PatientSex = f"Phantom^{name}", name, "", ""
    item.ReferringPhysicianName, item.Modality, item.SeriesNumber, item.InstanceNumber = "", "SR", 1, 1
    item.file_meta = FileMetaDataset()
    item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item.save_as(f"archive/{name}.dcm", enforce_file_format=True)
    uids.append(item.StudyInstanceUID)

client = DICOMfileClient(url="file://" + os.path.abspath("archive"), in_memory=True)
for named, key, value in (
    ("one day", "StudyDate", "20260110"),
    ("January", "StudyDate", "20260101-20260131"),
    ("from March on", "StudyDate", "20260301-"),
    ("a wildcard", "PatientName", "Phantom^M*"),
    ("studies with MR", "ModalitiesInStudy", "MR"),
    ("two UIDs", "StudyInstanceUID", ",".join(uids[:2])),
):
    studies = client.search_for_studies(search_filters={key: value})
    months = sorted(study["00100020"]["Value"][0] for study in studies)
    modalities = sorted({study["00080061"]["Value"][0] for study in studies})
    print(f"{named}, {key}: {', '.join(months) or 'none'}; modalities {', '.join(modalities) or 'none'}")
PYTHON
"$folder/venv/bin/python" search.py 2> log.txt | tee seen.txt || { cat log.txt; exit 1; }
diff seen.txt - <<'SEEN'
one day, StudyDate: January; modalities SR
January, StudyDate: February, January, March; modalities SR
from March on, StudyDate: February, January, March; modalities SR
a wildcard, PatientName: March; modalities SR
studies with MR, ModalitiesInStudy: February, January, March; modalities SR
two UIDs, StudyInstanceUID: none; modalities none
SEEN
echo "as seen"
