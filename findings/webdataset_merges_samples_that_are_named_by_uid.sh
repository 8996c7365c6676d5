#!/usr/bin/env bash
# webdataset reads a shard of samples that its own writer named by DICOM UID as one sample.
#
# Guessed: what TarWriter writes under a __key__, WebDataset returns under that __key__; a key that can't be told from its
# extension is refused by the writer.
# Seen: the reader splits a member's name at the first dot, and all UIDs of a root share what stands before it. Neighbouring
# members of one key are one sample, so that five samples of two files are one of ten, named "1", whose extensions are the rest
# of the UIDs. Neither side says a word: length, order and file contents are right, and `sample["npy"]` is a KeyError only later.
# With dots replaced the five come back.
# Here: entries of the project's own caches are named by a hash without dots (cache/entries.py).
#
# Versions: webdataset 1.0.2, numpy 2.4.6, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "webdataset==1.0.2" "numpy==2.4.6"
cd "$folder"

cat > keys.py <<'PYTHON'
import numpy as np
import webdataset as wds

UIDS = [f"1.2.826.0.1.3680043.8.498.{number}" for number in range(5)]
for shard, keys in (("uids", UIDS), ("dashes", [uid.replace(".", "-") for uid in UIDS])):
    with wds.TarWriter(f"{shard}.tar") as writer:
        for number, key in enumerate(keys):
            writer.write({"__key__": key, "npy": np.full(3, number), "txt": f"report {number}"})
    samples = list(wds.WebDataset(f"{shard}.tar", shardshuffle=False))
    files = [name for name in samples[0] if not name.startswith("__")]
    print(f"{shard}: {len(keys)} written, {len(samples)} read; the first is {samples[0]['__key__']} with {len(files)} files,", files[0])
PYTHON
"$folder/venv/bin/python" keys.py | tee seen.txt
diff seen.txt - <<'SEEN'
uids: 5 written, 1 read; the first is 1 with 10 files, 2.826.0.1.3680043.8.498.0.npy
dashes: 5 written, 5 read; the first is 1-2-826-0-1-3680043-8-498-0 with 2 files, npy
SEEN
echo "as seen"
