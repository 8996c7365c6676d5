#!/usr/bin/env bash
# webdataset's cache_dir gives the validation set the training set's shards.
#
# Guessed: a shard is cached under its address, so that one cache serves all data sets of a machine.
# Seen: it is cached under the last part of the address alone. Splits usually differ in the folder and number their shards alike
# (train/shard-000000.tar, val/shard-000000.tar): whichever is read second is served the other's file, without a request to
# the server. Validation then scores training samples, and `__url__` names the address that was asked for. A folder for each
# data set cures it.
# Here: entries of the project's own caches are named by a hash of what they were made from (cache/entries.py).
#
# Versions: webdataset 1.0.2, numpy 2.4.6, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "webdataset==1.0.2" "numpy==2.4.6"
cd "$folder"

cat > splits.py <<'PYTHON'
import functools
import http.server
import os
import threading

import webdataset as wds

asked = []


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        asked.append(self.path)


for split in ("train", "val"):
    os.makedirs(f"store/{split}")
    with wds.TarWriter(f"store/{split}/shard-000000.tar") as writer:
        for number in range(3):
            writer.write({"__key__": f"{split}-patient-{number}", "txt": "report"})
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory="store"))
threading.Thread(target=server.serve_forever, daemon=True).start()

for folders in (("cache", "cache"), ("cache-train", "cache-val")):
    for split, cache in zip(("train", "val"), folders, strict=True):
        os.makedirs(cache, exist_ok=True)
        asked.clear()
        address = f"http://127.0.0.1:{server.server_port}/{split}/shard-000000.tar"
        samples = list(wds.WebDataset(address, shardshuffle=False, cache_dir=cache))
        named = samples[0]["__url__"].rpartition("/")[0].rpartition("/")[2]
        print(f"{split} through {cache}: {samples[0]['__key__']} first, said to be of {named}; asked the server for {sorted(set(asked))}")
PYTHON
"$folder/venv/bin/python" splits.py | tee seen.txt
diff seen.txt - <<'SEEN'
train through cache: train-patient-0 first, said to be of train; asked the server for ['/train/shard-000000.tar']
val through cache: train-patient-0 first, said to be of val; asked the server for []
train through cache-train: train-patient-0 first, said to be of train; asked the server for ['/train/shard-000000.tar']
val through cache-val: val-patient-0 first, said to be of val; asked the server for ['/val/shard-000000.tar']
SEEN
echo "as seen"
