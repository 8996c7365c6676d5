#!/usr/bin/env bash
# dask's KilledWorker strikes tasks that were never started, with one thread a worker and with retries, too.
#
# Guessed: KilledWorker names a task whose workers died while they ran it. Workers with one thread run one task at a time, so
# that only the file that crashes a reader is lost; and `retries` gives an innocent neighbour further tries.
# Seen: what counts is what a worker had been sent when it died, and each gets one task more than it has threads, to keep it
# busy. That task comes back at the head of the queue and stands behind the crashing one again. After four deaths both fail with
# "Attempted to run task 'read-...' on 4 different workers, but all those workers died while running it", said of a task that was
# never started. With two threads two innocents are lost. `retries` changes nothing: KilledWorker isn't retried.
# distributed.scheduler.worker-saturation = 1.0 (default 1.1) sends no task ahead: with one thread only the culprit is lost.
# Here: the project's own pool runs a file in a process of its own, so that a crash takes that file only.
#
# Versions: distributed 2026.8.0, dask 2026.8.0, Python 3.11.
# Seen: as printed below. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "distributed==2026.8.0" "dask==2026.8.0"
cd "$folder"

cat > blame.py <<'PYTHON'
import contextlib
import logging
import os
import tempfile
import time
from pathlib import Path

import dask
from distributed import Client, LocalCluster, wait

CRASHES = 5


def read(number, folder):
    with open(Path(folder, str(number)), "a") as starts:
        starts.write(".")
    time.sleep(0.3)
    if number == CRASHES:
        os._exit(1)  # as a reader in C that is killed by a damaged file
    return number


def lost_and_started(threads, retries, saturation):
    """Return the kinds of error, and for each task that was lost its number and how often it was started."""
    folder = tempfile.mkdtemp(dir=".")
    with (
        dask.config.set({"distributed.scheduler.worker-saturation": saturation}),
        LocalCluster(n_workers=1, threads_per_worker=threads, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        futures = client.map(read, range(12), folder=folder, retries=retries)
        wait(futures, timeout=60)
        lost = [number for number, future in enumerate(futures) if future.status == "error"]
        kinds = {type(futures[number].exception()).__name__ for number in lost}
    files = {number: Path(folder, str(number)) for number in lost}
    return kinds, {number: file.stat().st_size if file.exists() else 0 for number, file in files.items()}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    for threads, retries, saturation in ((1, 0, 1.1), (1, 5, 1.1), (2, 0, 1.1), (1, 0, 1.0)):
        for attempt in range(3):  # on a busy machine a worker that died isn't always replaced in time
            with contextlib.suppress(TimeoutError):
                kinds, starts = lost_and_started(threads, retries, saturation)
                break
        innocent = [count for number, count in starts.items() if number != CRASHES]
        print(
            f"threads {threads}, retries {retries}, saturation {saturation}: {len(starts)} lost, {' '.join(kinds)};"
            f" {len(innocent)} innocent, {innocent.count(0)} of them never started",
            flush=True,
        )
PYTHON
"$folder/venv/bin/python" blame.py 2> errors.txt | tee seen.txt || { cat errors.txt; exit 1; }
diff seen.txt - <<'SEEN'
threads 1, retries 0, saturation 1.1: 2 lost, KilledWorker; 1 innocent, 1 of them never started
threads 1, retries 5, saturation 1.1: 2 lost, KilledWorker; 1 innocent, 1 of them never started
threads 2, retries 0, saturation 1.1: 3 lost, KilledWorker; 2 innocent, 1 of them never started
threads 1, retries 0, saturation 1.0: 1 lost, KilledWorker; 0 innocent, 0 of them never started
SEEN
echo "as seen"
