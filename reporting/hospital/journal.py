"""The journal: which series were reported or failed, and which files still have to reach their destination.

SQLite, because a transaction is what is needed: "reported" and "to be sent" become true together or not at all. With
`synchronous=FULL` and a write-ahead log a commit is on the disk when it returns, other processes read without waiting, and an
update needs no compaction, which a journal of lines would.

The images themselves are not in it. Their folders say which series are being gathered, so that no step lies between an
acknowledged image and its entry.
"""

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from samf.reporting.hospital.inbox import Fingerprint

State = Literal["started", "reported", "failed", "retry"]
JOURNAL = "journal.sqlite3"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS series (
    key TEXT PRIMARY KEY, name TEXT NOT NULL, state TEXT NOT NULL, digest TEXT NOT NULL, files INTEGER NOT NULL,
    starts INTEGER NOT NULL DEFAULT 0, version INTEGER NOT NULL DEFAULT 0, reported_files INTEGER NOT NULL DEFAULT 0,
    discarded INTEGER NOT NULL DEFAULT 0, reason TEXT, origin TEXT, updated REAL NOT NULL);
CREATE TABLE IF NOT EXISTS deliveries (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, version INTEGER NOT NULL, file TEXT NOT NULL, object TEXT NOT NULL,
    destination TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'waiting', tries INTEGER NOT NULL DEFAULT 0,
    due REAL NOT NULL DEFAULT 0, error TEXT, updated REAL NOT NULL, UNIQUE (object, destination));
CREATE INDEX IF NOT EXISTS waiting ON deliveries (destination, state, due);
CREATE INDEX IF NOT EXISTS of_series ON deliveries (key, state);
CREATE TABLE IF NOT EXISTS refused (
    sender TEXT NOT NULL, reason TEXT NOT NULL, images INTEGER NOT NULL, updated REAL NOT NULL,
    PRIMARY KEY (sender, reason));
PRAGMA user_version = 1;
"""


@dataclass(frozen=True)
class Entry:
    """What the journal knows of a series.

    Attributes:
        key: of the series.
        name: its SeriesInstanceUID, or the name of its file or folder.
        state: of the files that `digest` stands for: "started", "reported", "failed", or "retry" until a failed one is
            gathered again.
        digest, files: their fingerprint.
        starts: how often a report of these files was begun.
        version: number of the last report, from 1; 0 without one.
        reported_files: files of the last report.
        reason: why there is no report.
    """

    key: str
    name: str
    state: State
    digest: str
    files: int
    starts: int
    version: int
    reported_files: int
    reason: str | None

    def is_settled(self, state: Fingerprint) -> bool:
        """Return whether the report of these very files is written, or known to be impossible."""
        return self.state in ("reported", "failed") and self.digest == state.digest


@dataclass(frozen=True)
class Outgoing:
    """A file of a report for the far end.

    Attributes:
        file: its path below the folder of the journal.
        object: its SOPInstanceUID.
    """

    file: str
    object: str


@dataclass(frozen=True)
class Delivery:
    """A file that waits to be sent."""

    id: int
    key: str
    file: str
    object: str
    tries: int


class Journal:
    """The journal of one folder. Methods may be called from several threads.

    Args:
        folder: which holds the journal; made when missing.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._database = sqlite3.connect(folder / JOURNAL, isolation_level=None, check_same_thread=False, timeout=30)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    # --- Series -------------------------------------------------------------------------------------------------------

    def find(self, key: str) -> Entry | None:
        """Return what is known of a series."""
        columns = "key, name, state, digest, files, starts, version, reported_files, reason"
        rows = self._rows(f"SELECT {columns} FROM series WHERE key = ?", key)
        return Entry(*rows[0]) if rows else None

    def start(self, key: str, name: str, state: Fingerprint) -> int:
        """Note that a report is begun, and return how often it has been for the same files."""
        with self._transaction() as database:
            before = self.find(key)
            again = before is not None and before.state == "started" and before.digest == state.digest
            starts = before.starts + 1 if before is not None and again else 1
            database.execute(
                "INSERT INTO series (key, name, state, digest, files, starts, updated) VALUES (?, ?, 'started', ?, ?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET name = excluded.name, state = 'started', digest = excluded.digest, "
                "files = excluded.files, starts = excluded.starts, reason = NULL, updated = excluded.updated",
                (key, name, state.digest, state.files, starts, time.time()),
            )
        return starts

    def release(self, key: str) -> None:
        """Note that a report was begun and given up without anything being wrong with it."""
        with self._transaction() as database:
            database.execute(
                "UPDATE series SET starts = MAX(starts - 1, 0) WHERE key = ? AND state = 'started'", (key,)
            )

    def report(
        self, key: str, version: int, state: Fingerprint, files: Sequence[Outgoing], destinations: Sequence[str]
    ) -> None:
        """Note that a report is stored, and that its files are to be sent: both or neither.

        A file whose SOPInstanceUID is on its way to a destination already, or has arrived, is not sent again. What waits of
        an earlier version, other than these objects, is no longer sent.

        Args:
            key: of the series.
            version: number of the report.
            state: of the images that it was made from.
            files: those to send.
            destinations: where to.
        """
        now = time.time()
        with self._transaction() as database:
            database.execute(
                "UPDATE series SET state = 'reported', digest = ?, files = ?, reported_files = ?, version = ?, starts = 0, "
                "discarded = 0, reason = NULL, updated = ? WHERE key = ?",
                (state.digest, state.files, state.files, version, now, key),
            )
            objects = [item.object for item in files]
            database.execute(
                "UPDATE deliveries SET state = 'replaced', updated = ? WHERE key = ? AND version < ? AND state = 'waiting' "
                f"AND object NOT IN ({', '.join('?' * len(objects))})",
                (now, key, version, *objects),
            )
            database.executemany(
                "INSERT OR IGNORE INTO deliveries (key, version, file, object, destination, updated) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                [(key, version, item.file, item.object, place, now) for item in files for place in destinations],
            )

    def fail(self, key: str, reason: str, origin: str) -> None:
        """Note why a series that was started has no report, and where its images are kept for people."""
        with self._transaction() as database:
            database.execute(
                "UPDATE series SET state = 'failed', starts = 0, reason = ?, origin = ?, updated = ? WHERE key = ?",
                (reason, origin, time.time(), key),
            )

    def retry(self) -> int:
        """Let all series without a report be tried again, and return how many they are."""
        with self._transaction() as database:
            changed = database.execute("UPDATE series SET state = 'retry' WHERE state = 'failed'")
            return changed.rowcount

    def to_retry(self) -> list[str]:
        """Return the keys of series that are to be tried again."""
        return [key for (key,) in self._rows("SELECT key FROM series WHERE state = 'retry'")]

    def retried(self, key: str) -> None:
        """Note that a series is gathered again."""
        with self._transaction() as database:
            database.execute(
                "UPDATE series SET state = 'started', starts = 0 WHERE key = ? AND state = 'retry'", (key,)
            )

    def discardable(self, before: float) -> list[tuple[str, str]]:
        """Return key and digest of series that were reported before a time, arrived everywhere and still have images."""
        return self._rows(
            "SELECT key, digest FROM series WHERE state = 'reported' AND discarded = 0 AND updated <= ? AND NOT EXISTS "
            "(SELECT 1 FROM deliveries WHERE deliveries.key = series.key AND deliveries.state = 'waiting')",
            before,
        )

    def discarded(self, key: str) -> None:
        """Note that the images of a series are gone."""
        with self._transaction() as database:
            database.execute("UPDATE series SET discarded = 1 WHERE key = ? AND state = 'reported'", (key,))

    def refuse(self, sender: str, reason: str) -> None:
        """Count an image that was refused.

        Args:
            sender: its AE title.
            reason: why.
        """
        with self._transaction() as database:
            database.execute(
                "INSERT INTO refused VALUES (?, ?, 1, ?) ON CONFLICT (sender, reason) "
                "DO UPDATE SET images = images + 1, updated = excluded.updated",
                (sender, reason, time.time()),
            )

    # --- Deliveries ---------------------------------------------------------------------------------------------------

    def due(self, destination: str, now: float, limit: int = 50) -> list[Delivery]:
        """Return files that a destination should get now, the longest waiting first."""
        rows = self._rows(
            "SELECT id, key, file, object, tries FROM deliveries WHERE destination = ? AND state = 'waiting' AND due <= ? "
            "ORDER BY due, id LIMIT ?",
            destination,
            now,
            limit,
        )
        return [Delivery(*row) for row in rows]

    def delivered(self, delivery: int) -> None:
        """Note that a file has arrived."""
        with self._transaction() as database:
            database.execute(
                "UPDATE deliveries SET state = 'sent', tries = tries + 1, error = NULL, updated = ? WHERE id = ?",
                (time.time(), delivery),
            )

    def postpone(self, delivery: int, due: float, error: str) -> None:
        """Note that a file did not arrive.

        Args:
            delivery: its number.
            due: when to try again, in seconds since 1970.
            error: why, without patient data.
        """
        with self._transaction() as database:
            database.execute(
                "UPDATE deliveries SET tries = tries + 1, due = ?, error = ?, updated = ? WHERE id = ?",
                (due, error, time.time(), delivery),
            )

    def unreachable(self, destination: str, error: str) -> None:
        """Note why nothing can be sent to a destination now."""
        with self._transaction() as database:
            database.execute(
                "UPDATE deliveries SET error = ?, updated = ? WHERE destination = ? AND state = 'waiting'",
                (error, time.time(), destination),
            )
