#!/usr/bin/env bash
# s3fs downloads a large file as parts of two versions when it is overwritten meanwhile, and says nothing.
#
# Guessed: S3 replaces an object as a whole, so a download is the old file, the new one, or an error, as with boto3.
# Seen: a file larger than a part (50 MiB by default) is fetched by one request per part, none of which names the version (If-Match).
# Parts fetched after an overwrite are the new file's. get_file returns without an error, and the file has the right size: half a scan
# of one patient and half of another's, where a job rewrites its outputs. boto3 sends If-Match and raises S3DownloadFailedError.
# Here: the object's ETag and size are compared before and after a download, and a changed one is refused (model/ct_object_store.py).
#
# Versions: s3fs 2026.9.0, fsspec 2026.9.0, moto 5.2.5 (as the store), boto3 1.43.117, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "s3fs==2026.9.0" "fsspec==2026.9.0" "moto[server]==5.2.5" "boto3==1.43.117"
cd "$folder"

cat > download.py <<'PYTHON'
import os

os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
import boto3
import fsspec
import s3fs
from boto3.s3.transfer import TransferConfig
from moto.server import ThreadedMotoServer

MEBIBYTE = 2**20
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
address = "http://{}:{}".format(*server.get_host_and_port())
client = boto3.client("s3", endpoint_url=address)
client.create_bucket(Bucket="scans")


class Overwrite(fsspec.Callback):
    """Overwrites the object as a whole when the first bytes have come."""

    done = False

    def relative_update(self, inc=1):
        if not self.done:
            self.done = True
            client.put_object(Bucket="scans", Key="scan", Body=b"n" * (100 * MEBIBYTE))


def by_s3fs(path):
    s3fs.S3FileSystem(endpoint_url=address).get_file(
        "scans/scan", path, callback=Overwrite(), chunksize=5 * MEBIBYTE, max_concurrency=2
    )


def by_boto3(path):
    config = TransferConfig(multipart_chunksize=5 * MEBIBYTE, max_concurrency=2)
    client.download_file("scans", "scan", path, Callback=Overwrite().relative_update, Config=config)


for download in (by_s3fs, by_boto3):
    client.put_object(Bucket="scans", Key="scan", Body=b"o" * (100 * MEBIBYTE))
    try:
        download("copy")
    except Exception as error:
        print(f"{download.__name__}: {type(error).__name__}")
        continue
    with open("copy", "rb") as file:
        copy = file.read()
    versions = [name for name, byte in (("old", b"o"), ("new", b"n")) if byte in copy]
    print(f"{download.__name__}: no error, {len(copy) // MEBIBYTE} MiB, bytes of the versions: {' and '.join(versions)}")
server.stop()
PYTHON
"$folder/venv/bin/python" download.py 2> errors.txt | tee seen.txt || { cat errors.txt; exit 1; }
diff seen.txt - <<'SEEN'
by_s3fs: no error, 100 MiB, bytes of the versions: old and new
by_boto3: S3DownloadFailedError
SEEN
echo "as seen"
