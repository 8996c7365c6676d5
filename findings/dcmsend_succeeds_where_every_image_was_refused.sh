#!/usr/bin/env bash
# DCMTK's dcmsend ends with exit code 0 when the archive has refused every image, and when it takes none of their kind.
#
# Guessed: a sender's exit code is not 0 unless all was stored. Its manual lists codes for networks ("cannot negotiate
# association", 61) and says of --no-halt that without it the first unsuccessful store ends the transfer.
# Seen: with statuses A700 (out of resources), C000 and 0122 (class not supported) for each image, it asks for all of them,
# prints nothing and returns 0; where no presentation context is accepted nothing is asked for, an error is printed, and it is
# 0, too. storescu stops at the first and returns the status' high byte (167 is A7) or 1, but with --no-halt 0 in all these
# cases. What arrived is known only from the receiver, or from dcmsend's own report (--create-report-file).
# Here: the project sends by pynetdicom and looks at each status (reporting/hospital/destinations.py).
#
# Versions: DCMTK 3.6.7 (Debian 12), pynetdicom 3.0.4, pydicom 3.0.2, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

for tool in dcmsend storescu; do
    command -v "$tool" > /dev/null || { echo "needs DCMTK's $tool (apt-get install dcmtk): not run"; exit 0; }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "pynetdicom==3.0.4" "pydicom==3.0.2"
cd "$folder"

cat > send.py <<'PYTHON'
import logging
import subprocess

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pynetdicom import AE, evt

logging.disable(logging.CRITICAL)
FILES = [f"{number}.dcm" for number in range(4)]
for file in FILES:
    item = Dataset()
    item.SOPClassUID, item.SOPInstanceUID = BasicTextSRStorage, generate_uid(entropy_srcs=[file])
    item.StudyInstanceUID, item.SeriesInstanceUID = generate_uid(entropy_srcs=["1"]), generate_uid(entropy_srcs=["2"])
    item.PatientName, item.PatientID, item.Modality = "Phantom^One", "1", "SR"
    item.file_meta = FileMetaDataset()
    item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item.save_as(file, enforce_file_format=True)

for name, kind, status in (
    ("all stored", BasicTextSRStorage, 0x0000),
    ("out of resources (A700)", BasicTextSRStorage, 0xA700),
    ("cannot understand (C000)", BasicTextSRStorage, 0xC000),
    ("class not supported (0122)", BasicTextSRStorage, 0x0122),
    ("takes MR only", MRImageStorage, 0x0000),
):
    asked = []

    def answer(event, status=status, asked=asked):
        asked.append(event.request.AffectedSOPInstanceUID)
        return status

    archive = AE()
    archive.add_supported_context(kind)
    server = archive.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, answer)])
    found = []
    for command in (["dcmsend"], ["storescu"], ["storescu", "--no-halt"]):
        asked.clear()
        done = subprocess.run([*command, "127.0.0.1", str(server.server_address[1]), *FILES], capture_output=True)
        found.append(f"{' '.join(command)} exit {done.returncode}, asked {len(asked)} of {len(FILES)}")
    server.shutdown()
    print(f"{name}: {'; '.join(found)}")
PYTHON
"$folder/venv/bin/python" send.py | tee seen.txt
diff seen.txt - <<'SEEN'
all stored: dcmsend exit 0, asked 4 of 4; storescu exit 0, asked 4 of 4; storescu --no-halt exit 0, asked 4 of 4
out of resources (A700): dcmsend exit 0, asked 4 of 4; storescu exit 167, asked 1 of 4; storescu --no-halt exit 0, asked 4 of 4
cannot understand (C000): dcmsend exit 0, asked 4 of 4; storescu exit 192, asked 1 of 4; storescu --no-halt exit 0, asked 4 of 4
class not supported (0122): dcmsend exit 0, asked 4 of 4; storescu exit 1, asked 1 of 4; storescu --no-halt exit 0, asked 4 of 4
takes MR only: dcmsend exit 0, asked 0 of 4; storescu exit 1, asked 0 of 4; storescu --no-halt exit 0, asked 0 of 4
SEEN
echo "as seen"
