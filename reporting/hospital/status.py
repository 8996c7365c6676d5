"""What a folder of the listener or watcher holds: counts for the terminal, failures.json for people."""

import datetime
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samf.reporting.hospital.journal import JOURNAL, Journal
from samf.utils.files import write_json

FAILURES = "failures.json"


@dataclass(frozen=True)
class Status:
    """Counts of a journal.

    Attributes:
        gathering: series that the listener gathers or that wait for their report; None where the folder is a watcher's.
        started: series whose report is being made.
        reported, failed: series.
        refused: images that were not accepted.
        reports: reports, all versions.
        waiting: files to be sent, by destination.
        sent: files that arrived, by destination.
        errors: the last error of each destination that has one.
    """

    gathering: int | None
    started: int
    reported: int
    failed: int
    refused: int
    reports: int
    waiting: dict[str, int]
    sent: dict[str, int]
    errors: dict[str, str]


def read_status(folder: Path) -> Status:
    """Return the counts of a folder, whether or not a listener is running.

    Raises:
        FileNotFoundError: no journal there.
    """
    with closing(_opened(folder)) as database:

        def pairs(query: str) -> dict[str, Any]:
            return dict(database.execute(query).fetchall())

        series = pairs("SELECT state, COUNT(*) FROM series GROUP BY state")
        settled = pairs("SELECT key, digest FROM series WHERE state = 'reported' AND discarded = 0")
        waiting = pairs("SELECT destination, COUNT(*) FROM deliveries WHERE state = 'waiting' GROUP BY destination")
        sent = pairs("SELECT destination, COUNT(*) FROM deliveries WHERE state = 'sent' GROUP BY destination")
        errors = pairs(
            "SELECT destination, error FROM deliveries WHERE state = 'waiting' AND error IS NOT NULL ORDER BY updated"
        )
        refused, reports = database.execute(
            "SELECT (SELECT TOTAL(images) FROM refused), (SELECT TOTAL(version) FROM series)"
        ).fetchone()
        held = folder / "series"
        present = {path.name for path in held.iterdir()} if held.is_dir() else None
    return Status(
        None if present is None else len(present - settled.keys()),
        series.get("started", 0) + series.get("retry", 0),
        series.get("reported", 0),
        series.get("failed", 0),
        int(refused),
        int(reports),
        waiting,
        sent,
        errors,
    )


def _opened(folder: Path) -> sqlite3.Connection:
    path = folder / JOURNAL
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {JOURNAL} there; expected the --out folder of samf listen or samf watch."
        )
    return sqlite3.connect(path, timeout=30)


def read_failures(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what needs a person: series without a report, images that were refused, files that don't arrive.

    Raises:
        FileNotFoundError: no journal there.
    """
    with closing(_opened(folder)) as database:
        database.row_factory = sqlite3.Row

        def listed(query: str) -> list[dict[str, Any]]:
            return [{**dict(row), "updated": _instant(row["updated"])} for row in database.execute(query)]

        return {
            "series": listed(
                "SELECT name AS series, reason, files, origin AS kept_in, updated FROM series WHERE state = 'failed' "
                "ORDER BY updated"
            ),
            "refused": listed("SELECT sender, reason, images, updated FROM refused ORDER BY updated"),
            "undelivered": listed(
                "SELECT destination, error AS reason, COUNT(*) AS files, MIN(file) AS first, MAX(tries) AS tries, "
                "MAX(updated) AS updated FROM deliveries WHERE state = 'waiting' AND error IS NOT NULL "
                "GROUP BY destination, error"
            ),
        }


def _instant(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def write_failures(folder: Path) -> None:
    """Write failures.json, or remove it where there is nothing to list."""
    found = read_failures(folder)
    if any(found.values()):
        write_json(folder / FAILURES, found)
    else:
        (folder / FAILURES).unlink(missing_ok=True)


def retry_failures(folder: Path) -> int:
    """Let series without a report be tried again, within half a minute or at the next start; return how many they are.

    Raises:
        FileNotFoundError: no journal there.
    """
    _opened(folder).close()
    with closing(Journal(folder)) as journal:
        return journal.retry()


def status_text(status: Status) -> str:
    """Return the counts as lines."""
    lines = [] if status.gathering is None else [f"series gathered or waiting for a report: {status.gathering}"]
    lines += [
        f"series being reported: {status.started}",
        f"series reported: {status.reported} ({status.reports} reports)",
        f"series without a report: {status.failed}",
        f"images refused: {status.refused}",
    ]
    for place in sorted(status.waiting.keys() | status.sent.keys()):
        error = f"; last error: {status.errors[place]}" if place in status.errors else ""
        lines.append(f"{place}: {status.sent.get(place, 0)} sent, {status.waiting.get(place, 0)} waiting{error}")
    return "\n".join(lines) + "\n"
