"""Benchmark of a start from a table on the Hub: 47,149 reports in a Parquet file, by hf://, each time in a new process.

The Hub is a server on this machine that knows this one file, so that nothing but the reading is measured.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from samf.benchmarks.data_lines import VOLUMES, find_templates, renamed
from samf.benchmarks.measuring import Measurement
from samf.benchmarks.workloads import LineSkipped, Settings

_TABLE = "table.parquet"
_NAME = "datasets/owner/reports"
_REPEATS = 3
LONGEST, MOST_MEMORY = 20.0, 1.0  # seconds and GB


class Start(TypedDict):
    """What `samf.benchmarks.remote_process` measures, and the seconds of the whole process."""

    records: int
    seconds: float
    processor_seconds: float
    imports_bytes: int
    bytes: int
    process: float


class _Hub(BaseHTTPRequestHandler):
    """The part of the Hub that fetching one file needs."""

    content: bytes

    def do_GET(self) -> None:
        if not self.path.startswith(f"/{_NAME}/resolve/"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(self.content).hexdigest()}"')
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def _served(content: bytes) -> Iterator[str]:
    """Serve a file as the Hub does, and yield the server's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Hub,), {"content": content}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def write_table(settings: Settings) -> list[Measurement]:
    """Write the table: the names of CT-RATE's training volumes, a report for each, and the scanners' metadata."""
    templates, count = find_templates(), VOLUMES if settings.size == "full" else 200
    rows = list(islice(renamed(templates.metadata), count))
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "VolumeName"}
    columns["volume"] = [row["VolumeName"] for row in rows]
    columns["findings"] = [templates.reports[k % len(templates.reports)][0] for k in range(len(rows))]
    pq.write_table(pa.table(columns), settings.folder / _TABLE)
    size = (settings.folder / _TABLE).stat().st_size / 1e6
    return [Measurement("size of the table", "MB", [size], note=f"{len(rows)} rows, {len(columns)} columns")]


def time_starts(settings: Settings) -> list[Measurement]:
    """Load the records in new processes: with an empty cache, from a filled one, and with torch and the model imported.

    Raises:
        LineSkipped: a system without /proc, which tells a process's own peak of memory.
    """
    if not Path("/proc/self/status").is_file():
        raise LineSkipped("needs /proc/self/status")
    with _served((settings.folder / _TABLE).read_bytes()) as hub:
        first = [_start(hub, settings.folder / f"home{k}") for k in range(_REPEATS)]
        second = [_start(hub, settings.folder / "home0") for _ in range(_REPEATS)]
        training = [_start(hub, settings.folder / "home0", "--classes") for _ in range(_REPEATS)]
    return [
        *_described(settings, "first start", first, "an empty cache"),
        *_described(settings, "second start", second, "fetched and converted before"),
        *_described(settings, "start of a training", training, "torch, transformers and the model imported too"),
    ]


def _start(hub: str, home: Path, *options: str) -> Start:
    address = f"hf://{_NAME}/{_TABLE}"
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}
    command = ["-m", "samf.benchmarks.remote_process", address, *options]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    found: Start = {**json.loads(done.stdout), "process": time.monotonic() - started}
    return found


def _described(settings: Settings, name: str, starts: list[Start], note: str) -> list[Measurement]:
    """Return the figures of one kind of start; the memory above the imports has the limit where they exceed it."""
    imports = statistics.median(start["imports_bytes"] for start in starts) / 1e9
    above = [(start["bytes"] - start["imports_bytes"]) / 1e9 for start in starts]
    whole = [start["bytes"] / 1e9 for start in starts]
    note = f"{starts[0]['records']} records; {note}"
    longest, most = settings.limit(LONGEST), settings.limit(MOST_MEMORY)
    is_light = imports < MOST_MEMORY / 2
    return [
        Measurement(f"{name}, whole process", "s", [start["process"] for start in starts], note=note, at_most=longest),
        Measurement(f"{name}, records", "s", [start["seconds"] for start in starts]),
        Measurement(f"{name}, records", "processor s", [start["processor_seconds"] for start in starts]),
        Measurement(f"{name}, memory", "GB", whole, note="with imports", at_most=most if is_light else None),
        Measurement(f"{name}, memory above imports", "GB", above, note=f"{imports:.2f} GB", at_most=most),
    ]


STAGES = {"table": write_table, "starts": time_starts}
