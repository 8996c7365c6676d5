"""The output folder of a run of answering: predictions, failures, times, and the settings that they are tied to.

During a run every process appends lines to files of its own (`predictions.part0.jsonl`, …). At the end, or at the beginning
of the next run after a kill, they are merged into `predictions.jsonl` in the order of the records, so that the file depends
neither on how many processes wrote it nor on how often they were interrupted.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

from samf.data.schema import FAILURES_FILE, JsonObject, Record
from samf.evaluation.answering.digests import VolumeDigests, records_digest
from samf.evaluation.json_lines import json_line, read_complete_lines
from samf.evaluation.schema import AnswerStatistics, Failure, PredictionRow, TimesLine
from samf.utils.files import atomic_write, write_json

__all__ = ["PREDICTIONS", "SETTINGS", "TIMES", "AnswerFolder", "ResumeError", "answer_statistics"]

# A line of predictions.jsonl, failures.jsonl or times.jsonl.
AnswerLine: TypeAlias = PredictionRow | Failure | TimesLine

PREDICTIONS = "predictions.jsonl"
SETTINGS = "predictions.settings.json"
TIMES = "times.jsonl"


class ResumeError(ValueError):
    """An output folder whose predictions were made with other settings."""


def _check_ids(records: Sequence[Record]) -> None:
    """Raise ValueError for no records, and for an id that is missing or repeated."""
    seen: set[str] = set()
    for number, record in enumerate(records):
        if record.get("id") in (None, ""):
            raise ValueError(f"Record {number} has no id; predictions are identified by the ids of their records.")
        if record["id"] in seen:
            raise ValueError(
                f"The id {record['id']!r} occurs twice; predictions are identified by the ids of their records."
            )
        seen.add(record["id"])
    if not seen:
        raise ValueError("There are no records to answer; check the data source, the split and the tasks.")


class AnswerFolder:
    """The output folder, as one process uses it.

    Args:
        folder: created if it is missing.
        records: what is answered, in the order of the merged file.
        rank: this process's number; names its part files.

    Raises:
        ValueError: no records, or an id that is missing or repeated.
    """

    def __init__(self, folder: str | os.PathLike[str], records: Sequence[Record], rank: int = 0):
        _check_ids(records)
        self.folder = Path(folder)
        self.rank = rank
        self._order = {record["id"]: position for position, record in enumerate(records)}
        self._records_digest = records_digest(records)
        self._open: dict[str, IO[str]] = {}

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """Tie the folder to `settings` and merge what a killed run left; one process calls this before any writes.

        Raises:
            ResumeError: the folder is tied to other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        _tie_to_settings(self.folder, {**settings, "records": self._records_digest})
        self.merge()
        for name in (FAILURES_FILE, *self._parts(FAILURES_FILE)):
            (self.folder / name).unlink(missing_ok=True)  # failed records are retried

    def check_volumes(self, records: Sequence[Record]) -> None:
        """Raise ResumeError where a record was answered from another volume than it has now.

        Records without an answer don't count: an unreadable volume may have been repaired since.
        """
        by_id = {record["id"]: record for record in records}
        digests = VolumeDigests()
        for row in read_complete_lines(self.folder / PREDICTIONS):
            record = by_id.get(row["id"])
            if record is not None and row.get("volume_digest") != digests.of(record):
                raise ResumeError(
                    f"{self.folder / PREDICTIONS}: record {row['id']} was answered from another volume than "
                    f"{record['volume']} is now: its name or its content has changed. Choose another output folder, or "
                    "delete this one to start again."
                )

    def answered(self) -> set[str]:
        """Return the ids in the merged predictions."""
        return {row["id"] for row in read_complete_lines(self.folder / PREDICTIONS)}

    def append(self, name: str, rows: Iterable[AnswerLine]) -> None:
        """Append rows to this process's part of PREDICTIONS, FAILURES_FILE or TIMES, and flush them."""
        if name not in self._open:
            self._open[name] = (self.folder / _part(name, self.rank)).open("a", encoding="utf-8")
        self._open[name].write("".join(map(json_line, rows)))
        self._open[name].flush()

    def close(self) -> None:
        """Close the part files of this process."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def merge(self) -> None:
        """Merge the parts of all processes into one file each, and delete them; one process calls this.

        Safe against a kill at any point: a part is deleted when its content is in the merged file.
        """
        for name in (PREDICTIONS, FAILURES_FILE, TIMES):
            parts = [self.folder / part for part in self._parts(name)]
            merged = self.folder / name
            if not parts and name != FAILURES_FILE and _ends_with_whole_line(merged):
                continue  # an empty list of failures is written too: it states that there were none
            rows = [row for path in (merged, *parts) for row in read_complete_lines(path)]
            atomic_write(merged, "".join(map(json_line, self._in_order(name, rows))))
            for part in parts:
                part.unlink()

    def _in_order(self, name: str, rows: list[AnswerLine]) -> list[AnswerLine]:
        if name == TIMES:
            return list({json_line(row): row for row in rows}.values())
        by_id = {row["id"]: row for row in reversed(rows) if row.get("id") in self._order}
        return sorted(by_id.values(), key=lambda row: self._order[row["id"]])

    def _parts(self, name: str) -> list[str]:
        return sorted(path.name for path in self.folder.glob(_part(name, "*")))


def _part(name: str, rank: int | str) -> str:
    stem, _, ending = name.rpartition(".")
    return f"{stem}.part{rank}.{ending}"


def _ends_with_whole_line(path: Path) -> bool:
    """Return whether a file is absent, empty or ends with a line feed."""
    content = path.read_bytes() if path.is_file() else b""
    return not content or content.endswith(b"\n")


# --- Settings ---------------------------------------------------------------------------------------------------


def _tie_to_settings(output_dir: Path, settings: JsonObject) -> None:
    """Write what the predictions depend on next to them, or compare it with what is written there."""
    path = output_dir / SETTINGS
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        if (output_dir / PREDICTIONS).is_file():
            raise ResumeError(f"{output_dir / PREDICTIONS} exists without {path.name}; choose another output folder.")
        write_json(path, settings)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResumeError(f"{path}: not JSON ({error}); choose another output folder, or delete this one.") from error
    if differences := _differences(before, settings):
        raise ResumeError(
            f"{output_dir / PREDICTIONS} was made with other settings: {'; '.join(differences)}. "
            "Choose another output folder, or delete this one to start again."
        )


_LONGEST_VALUE = 200  # characters of a setting in a message


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return how two settings differ, by their innermost names: "processor.hu_windows was … and is now …"."""
    if isinstance(before, dict) and isinstance(now, dict):
        prefix = f"{name}." if name else ""
        keys = sorted(before.keys() | now.keys())
        return [found for key in keys for found in _differences(before.get(key), now.get(key), f"{prefix}{key}")]
    if before == now:
        return []
    shown = (text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} …" for text in map(repr, (before, now)))
    return [f"{name} was {' and is now '.join(shown)}"]


# --- Statistics -------------------------------------------------------------------------------------------------


def answer_statistics(rows: Iterable[PredictionRow], times: Iterable[TimesLine] = ()) -> dict[str, AnswerStatistics]:
    """Return by task the number of answers, their tokens, and the time that a volume and an answer took.

    Times are None where none were measured, tokens where no row has them. Reading runs ahead of generation in other threads:
    `read_seconds_per_volume` is the time spent waiting for it.

    Args:
        rows: of predictions.jsonl.
        times: of times.jsonl: one line per batch, over all sessions of a resumed run.
    """
    groups: dict[str, list[PredictionRow]] = defaultdict(list)
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        groups[row["task"]].append(row)
    for line in times:
        totals[line["task"]].update({name: value for name, value in line.items() if name in _SUMMED})
    return {task: _task_statistics(group, totals[task]) for task, group in groups.items()}


_SUMMED = ("answers", "volumes", "read_seconds", "generate_seconds", "tokens")


def _task_statistics(rows: Sequence[PredictionRow], totals: Mapping[str, float]) -> AnswerStatistics:
    tokens = [row["tokens"] for row in rows if row.get("tokens") is not None]
    seconds = totals.get("read_seconds", 0) + totals.get("generate_seconds", 0)

    def per(total: float, name: str) -> float | None:
        return total / totals[name] if totals.get(name) else None

    return {
        "answers": len(rows),
        "empty": sum(not str(row["prediction"]).strip() for row in rows),
        "truncated": sum(bool(row.get("truncated")) for row in rows),
        "tokens": sum(tokens) if tokens else None,
        "tokens_mean": sum(tokens) / len(tokens) if tokens else None,
        "tokens_longest": max(tokens, default=None),
        "seconds_per_volume": per(seconds, "volumes"),
        "seconds_per_answer": per(seconds, "answers"),
        "read_seconds_per_volume": per(totals.get("read_seconds", 0), "volumes"),
        "tokens_per_second": per(totals.get("tokens", 0), "generate_seconds"),
    }
