"""One start of a run that reads a table at an address: `python -m samf.benchmarks.remote_process ADDRESS [--classes]`."""

import argparse
import json
import sys
import time
from pathlib import Path


def _peak() -> int:
    """Return the most bytes of memory that this process has held; `ru_maxrss` would include its parent's on Linux."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Load the records of a table and print what it took as JSON, imports included."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--classes", action="store_true", help="import torch and the model first, as train.py does")
    args = parser.parse_args()
    if args.classes:
        from samf.utils.auto_classes import register_classes

        register_classes()
    from samf.data.loading import load_records
    from samf.data.table_columns import TableColumns

    imported, before = time.process_time(), _peak()
    started = time.monotonic()
    records = load_records(args.address, "train", columns=TableColumns("volume", report="findings"))
    found = {
        "records": len(records),
        "seconds": time.monotonic() - started,
        "processor_seconds": time.process_time() - imported,
        "imports_bytes": before,
        "bytes": _peak(),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
