#!/usr/bin/env bash
# dicomweb-client hides that a server did not store an instance, if the answer's media type names a character set.
#
# Guessed: store_instances() returns the server's answer (DICOM PS3.18, Store Transaction), whose Failed SOP Sequence names what
# was not stored; a server that stored only a part answers 202 with it.
# Seen: the body is read only if Content-Type is exactly "application/dicom+json" (or json, or the two of XML). With
# "application/dicom+json; charset=utf-8", or in other letters' case, the result is an empty Dataset, as of a store without
# anything to say, and no error: 202 is an HTTP success. Who counts on FailedSOPSequence loses instances without a word.
#
# Versions: dicomweb-client 0.61.2, pydicom 3.0.2, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "dicomweb-client==0.61.2" "pydicom==3.0.2"
cd "$folder"

cat > store.py <<'PYTHON'
import http.server
import json
import threading

from dicomweb_client.api import DICOMwebClient
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian, generate_uid

FAILED = {"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [0xA700]}}]}}  # out of resources


class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps(FAILED).encode()
        self.send_response(202)
        self.send_header("Content-Type", self.server.media)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


instance = Dataset()
instance.SOPClassUID, instance.SOPInstanceUID = BasicTextSRStorage, generate_uid(entropy_srcs=["finding"])
instance.StudyInstanceUID = instance.SeriesInstanceUID = instance.SOPInstanceUID
instance.file_meta = FileMetaDataset()
instance.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
instance.file_meta.MediaStorageSOPClassUID = instance.SOPClassUID
instance.file_meta.MediaStorageSOPInstanceUID = instance.SOPInstanceUID

server = http.server.HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = DICOMwebClient(f"http://127.0.0.1:{server.server_port}")
for media in ("application/dicom+json", "application/dicom+json; charset=utf-8", "application/DICOM+JSON"):
    server.media = media
    answer = client.store_instances([instance])
    print(f"202, {media}: failed {[hex(item.FailureReason) for item in answer.get('FailedSOPSequence', [])]}")
PYTHON
"$folder/venv/bin/python" store.py | tee seen.txt
diff seen.txt - <<'SEEN'
202, application/dicom+json: failed ['0xa700']
202, application/dicom+json; charset=utf-8: failed []
202, application/DICOM+JSON: failed []
SEEN
echo "as seen"
