"""Checks of `samf listen` that take minutes: kills, memory over many series, malformed input.

    python -m samf.benchmarks.hospital kills --out /tmp/kills
    python -m samf.benchmarks.hospital memory --out /tmp/memory --series 500
    python -m samf.benchmarks.hospital fuzz --out /tmp/fuzz --messages 700

Each starts the command as a process of its own with the demo model, on 127.0.0.1, and prints one JSON object. The exit code
is 1 if something is not as it should be. dcmtk's storescu must be installed for `kills`.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samf.benchmarks.hospital_fuzz import send_malformed
from samf.benchmarks.hospital_scene import (
    FAR,
    HOST,
    FarEnd,
    Listener,
    Senders,
    chest,
    send_phantom,
    wait_for,
    write_broken,
)
from samf.phantoms.dicom import slice_dataset, write_series
from samf.reporting.hospital.status import read_failures, read_status

Figures = dict[str, Any]


def kills(out: Path, series: int = 50, count: int = 3) -> tuple[Figures, bool]:
    """Send series and broken ones from four senders at once, kill the listener on the way, and count at the far end.

    Args:
        out: empty folder.
        series: number of good ones.
        count: of kills.

    Returns:
        The figures, and whether each good series has one report and each broken one its reason.
    """
    good = [write_series(chest(seed), out / "sent" / f"good{seed}", f"good{seed}") for seed in range(series)]
    broken = write_broken(out / "sent")
    folders = [*good, *broken.values()]
    order = sorted(folders, key=lambda folder: folder.name[::-1])  # mixed, and the same every time
    far = FarEnd()
    listener = Listener(out / "hospital", "--send-to", f"{FAR}@{HOST}:{far.port}", "--quiet-time", "6")
    began = time.monotonic()
    listener.start()
    senders = Senders(order, listener.port, count=4)
    at = []
    for number in range(count):
        wait_for(lambda goal=(number * series) // (count + 1) + 2: len(far.objects) >= goal, 1800)
        listener.kill()
        at.append(len(far.objects))
        listener.start()
    sent = senders.wait(1800)
    settled = wait_for(lambda: _is_settled(out / "hospital", series, len(broken) - 1), 1800)
    time.sleep(8)  # longer than the quiet time: nothing more may come
    code = listener.stop()
    failures = read_failures(out / "hospital")
    reported = far.reported()
    figures = {
        "series": series,
        "objects at the far end": len(far.objects),
        "objects that came more than once": sum(times > 1 for times in far.objects.values()),
        "series with exactly one report": sum(times == 1 for times in reported.values()),
        "killed when so many reports had arrived": at,
        "storescu runs": senders.tries,
        "seconds": round(time.monotonic() - began),
        "exit code after SIGTERM": code,
        "failures": {item["series"][-12:]: item["reason"] for item in failures["series"]},
        "refused": {item["reason"]: item["images"] for item in failures["refused"]},
        "tracebacks": listener.log.read_text().count("Traceback"),
    }
    expected = {str(slice_dataset(chest(seed), 0, f"good{seed}").SeriesInstanceUID) for seed in range(series)}
    right = sent and settled and code == 0 and reported == dict.fromkeys(expected, 1) and len(far.objects) == series
    right &= len(failures["series"]) == len(broken) - 1 and len(failures["refused"]) == 1 and not figures["tracebacks"]
    far.close()
    return figures, right


def _is_settled(out: Path, reported: int, failed: int) -> bool:
    status = read_status(out)
    return status.reported >= reported and status.failed >= failed and not any(status.waiting.values())


def memory(out: Path, series: int = 500) -> tuple[Figures, bool]:
    """Send many small series one after the other and note the listener's memory.

    Args:
        out: empty folder.
        series: how many.

    Returns:
        The figures, and whether each series has one report, and memory after the last tenth is within 5 % of that after
        the second.
    """
    far = FarEnd()
    options = ["--send-to", f"{FAR}@{HOST}:{far.port}", "--quiet-time", "1", "--keep-images", "0"]
    listener = Listener(out / "hospital", *options, "--max-new-tokens", "40")
    listener.start()
    scans = [chest(seed) for seed in range(5)]
    samples: dict[int, tuple[float, int, int]] = {}
    began = time.monotonic()
    for number in range(series):
        scan = scans[number % len(scans)]
        send_phantom(scan, f"series {number}", listener.port)
        wait_for(lambda goal=number - 4: len(far.objects) >= goal, 600)  # a queue that grows is no leak
        if (number + 1) % max(1, series // 10) == 0:
            samples[number + 1] = listener.resources()
            sys.stderr.write(f"{number + 1} series: {samples[number + 1][0]:.0f} MB\n")
    arrived = wait_for(lambda: len(far.objects) >= series, 600)
    seconds = time.monotonic() - began
    time.sleep(35)  # until it has tidied up
    images = len(list((out / "hospital" / "series").rglob("*.dcm")))
    code = listener.stop()
    used = [sample[0] for sample in samples.values()]
    figures = {
        "series": series,
        "reports at the far end": len(far.objects),
        "MB of memory, threads, open files after so many series": {
            number: [round(sample[0]), *sample[1:]] for number, sample in samples.items()
        },
        "seconds per series": round(seconds / series, 2),
        "images left": images,
        "exit code after SIGTERM": code,
    }
    far.close()
    once = arrived and len(far.objects) == series  # more: a sender paused, and a part was reported first
    return figures, once and code == 0 and images == 0 and used[-1] <= 1.05 * used[1]


def fuzz(out: Path, messages: int = 700) -> tuple[Figures, bool]:
    """Send malformed associations and messages, and see what they leave.

    Args:
        out: empty folder.
        messages: how many.

    Returns:
        The figures, and whether the listener still works and nothing is left.
    """
    far = FarEnd()
    listener = Listener(out / "hospital", "--send-to", f"{FAR}@{HOST}:{far.port}", "--quiet-time", "2")
    listener.start()
    before, outside = listener.resources(), _files(out)
    sent = send_malformed(listener.port, messages)
    answers = listener.answers()
    send_phantom(chest(0), "good", listener.port)
    arrived = wait_for(lambda: len(far.objects) == 1, 300)
    calm = wait_for(lambda: listener.resources()[1] <= before[1] + 2 and listener.resources()[2] <= before[2] + 4, 120)
    after = listener.resources()
    code = listener.stop()
    log = listener.log.read_text()
    left = {path.relative_to(out).parts[1] for path in _files(out) - outside}
    failures = read_failures(out / "hospital")
    figures = {
        "sent": sent,
        "answers C-ECHO": answers,
        "reports a good series": arrived,
        "MB, threads, open files before": before,
        "after": after,
        "tracebacks": log.count("Traceback"),
        "new files below": sorted(left),
        "incoming": len(list((out / "hospital" / "incoming").iterdir())),
        "refused": {item["reason"]: item["images"] for item in failures["refused"]},
        "series without a report": len(failures["series"]),
        "exit code after SIGTERM": code,
    }
    right = answers and arrived and calm and code == 0 and not figures["tracebacks"] and not figures["incoming"]
    far.close()
    return figures, right and left <= {"failed", "series", "reports", "failures.json", "journal.sqlite3-wal"}


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one check and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="hospital", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("check", choices=["kills", "memory", "fuzz"])
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--series", type=int, help="how many, of kills and memory")
    parser.add_argument("--messages", type=int, default=700, help="how many, of fuzz")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty")
    if options.check == "fuzz":
        figures, right = fuzz(options.out, options.messages)
    elif options.check == "kills":
        figures, right = kills(options.out, options.series or 50)
    else:
        figures, right = memory(options.out, options.series or 500)
    sys.stdout.write(json.dumps({"check": options.check, "right": right, **figures}, indent=2) + "\n")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
