#!/usr/bin/env bash
# Under dask's nannies, as `dask worker` and LocalCluster start them, each large array costs page faults again.
#
# Guessed: a worker process, and what it starts, runs numerical code as fast as any other process.
# Seen: nannies set MALLOC_TRIM_THRESHOLD_=65536, so that freed memory goes back to the system (distributed.nanny.pre-spawn-environ).
# But once that is set, glibc's malloc no longer adapts its other threshold either (mallopt(3), M_MMAP_THRESHOLD): arrays above
# 128 KiB are mapped anew each time, and the kernel clears every page of them. Arrays of 2 MiB, as slices of a CT are, cost over
# 500 page faults each instead of none. Processes that a task starts inherit it, and those that a program starts after it had a
# LocalCluster. This project took 207 instead of 138 ms of the processor for the slices of a chest CT of 233 x 167 x 191 voxels
# (not by this script; a core of an Intel Xeon, a guest).
# Here: the process that reads volumes is started without the variable, unless the user has set it to another value.
#
# Versions: distributed 2026.8.0, dask 2026.8.0, numpy 2.4.6, Python 3.11, glibc.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "distributed==2026.8.0" "dask==2026.8.0" "numpy==2.4.6"
cd "$folder"
unset MALLOC_TRIM_THRESHOLD_

cat > faults.py <<'PYTHON'
import os
import resource

import numpy as np
from distributed import Client, LocalCluster


def faults_per_array():
    for _ in range(10):
        np.ones((512, 512))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(200):
        np.ones((512, 512))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 200


def describe(number):
    return "over 500" if number > 500 else "under 10" if number < 10 else f"{number:.0f}"


if __name__ == "__main__":
    before = os.environ.get("MALLOC_TRIM_THRESHOLD_")
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        (variable,) = client.run(os.environ.get, "MALLOC_TRIM_THRESHOLD_").values()
        (found,) = client.run(faults_per_array).values()
    print(f"page faults per array of 2 MiB: here {describe(faults_per_array())}, in the worker {describe(found)}")
    after = os.environ.get("MALLOC_TRIM_THRESHOLD_")
    print(f"MALLOC_TRIM_THRESHOLD_: here {before}, in the worker {variable}, here afterwards {after}")
PYTHON
"$folder/venv/bin/python" faults.py 2> errors.txt | tee seen.txt || { cat errors.txt; exit 1; }
diff seen.txt - <<'SEEN'
page faults per array of 2 MiB: here under 10, in the worker over 500
MALLOC_TRIM_THRESHOLD_: here None, in the worker 65536, here afterwards 65536
SEEN
echo "as seen"
