#!/usr/bin/env bash
# s3fs uploads half a file, and over a good one, when the block that writes it raises.
#
# Guessed: an object comes to be when its upload is completed; a `with fs.open(path, "wb")` block that is left by an exception
# aborts the upload, as smart_open does, so that the store holds the old object or none.
# Seen: leaving the block closes the file, and closing completes the upload: what had been written becomes the object, for small
# files by one PUT and for large ones as a completed multipart upload. The old, whole object is replaced. The exception goes on,
# and the next run finds a file that exists. `with fs.transaction:` around it leaves the old one.
# Here: the project writes under a temporary name on a local disk and renames (utils/files.py).
#
# Versions: s3fs 2026.9.0, fsspec 2026.9.0, smart-open 9.0.2, moto 5.2.5 (as the store), Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "s3fs==2026.9.0" "fsspec==2026.9.0" "moto[server]==5.2.5" "smart-open[s3]==9.0.2"
cd "$folder"

cat > write.py <<'PYTHON'
import contextlib
import os

os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
import boto3
import s3fs
import smart_open
from moto.server import ThreadedMotoServer

MEBIBYTE = 2**20
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
address = "http://{}:{}".format(*server.get_host_and_port())
client = boto3.client("s3", endpoint_url=address)
client.create_bucket(Bucket="scans")
store = s3fs.S3FileSystem(endpoint_url=address)


@contextlib.contextmanager
def transaction(key):
    with store.transaction, store.open(f"scans/{key}", "wb", block_size=5 * MEBIBYTE) as file:
        yield file


for name, opened in (
    ("s3fs", lambda key: store.open(f"scans/{key}", "wb", block_size=5 * MEBIBYTE)),
    ("s3fs in a transaction", transaction),
    ("smart_open", lambda key: smart_open.open(f"s3://scans/{key}", "wb", transport_params={"client": client})),
):
    for whole in (2 * MEBIBYTE, 40 * MEBIBYTE):
        key = f"{name}/{whole}"
        client.put_object(Bucket="scans", Key=key, Body=bytes(whole))
        with contextlib.suppress(ValueError), opened(key) as file:
            file.write(bytes(whole // 2))
            raise ValueError("the second half can't be made")
        left = client.head_object(Bucket="scans", Key=key)["ContentLength"]
        print(f"{name}: {whole // MEBIBYTE} MiB stood there, the writer of another raised half way, {left // MEBIBYTE} MiB are left")
server.stop()
PYTHON
"$folder/venv/bin/python" write.py 2> errors.txt | tee seen.txt || { cat errors.txt; exit 1; }
diff seen.txt - <<'SEEN'
s3fs: 2 MiB stood there, the writer of another raised half way, 1 MiB are left
s3fs: 40 MiB stood there, the writer of another raised half way, 20 MiB are left
s3fs in a transaction: 2 MiB stood there, the writer of another raised half way, 2 MiB are left
s3fs in a transaction: 40 MiB stood there, the writer of another raised half way, 40 MiB are left
smart_open: 2 MiB stood there, the writer of another raised half way, 2 MiB are left
smart_open: 40 MiB stood there, the writer of another raised half way, 40 MiB are left
SEEN
echo "as seen"
