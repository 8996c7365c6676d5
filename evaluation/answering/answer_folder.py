"""The folder that a run of answers fills: predictions, failures, times, and the settings that they are tied to.

While it runs, every process appends to files of its own (`predictions.part0.jsonl`, …), line by line. At the end, or at
the beginning of the next run after a kill, they are merged into `predictions.jsonl` in the order of the records, so that
the file doesn't depend on how many processes wrote it, or how often they were cut off.
"""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from samf.data.prompts import record_prompt
from samf.data.schema import FAILURES_FILE
from samf.utils.files import atomic_write, write_json

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.jsonl"
SETTINGS = "predictions.settings.json"
TIMES = "times.jsonl"

Record = Mapping[str, Any]


class ResumeError(ValueError):
    """An output folder whose predictions were made with other settings."""


def json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; none where there is no file.

    A last line that a kill cut off, or one that a full disk left as garbage, is left out with a warning: what it held
    is made again.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            logger.warning("%s, line %d: incomplete; it is left out and made again.", path, number)
    return rows


def check_ids(records: Sequence[Record]) -> None:
    """Raise ValueError for no records, and for an id that is missing or occurs twice."""
    seen: set[str] = set()
    for number, record in enumerate(records):
        if record.get("id") in (None, ""):
            raise ValueError(f"Record {number} has no id; predictions are told apart by their records' ids.")
        if record["id"] in seen:
            raise ValueError(f"The id {record['id']!r} occurs twice; predictions are told apart by their records' ids.")
        seen.add(record["id"])
    if not seen:
        raise ValueError("There are no records to answer; check the data source, the split and the tasks.")


class AnswerFolder:
    """The output folder of one process.

    Args:
        folder: made if it is missing.
        records: what is answered there, in the order that the merged file has.
        rank: this process's number; names its part files.
    """

    def __init__(self, folder: str | Path, records: Sequence[Record], rank: int = 0):
        check_ids(records)
        self.folder = Path(folder)
        self.places = {record["id"]: place for place, record in enumerate(records)}
        self.records = _digest(records)
        self.rank = rank
        self._open: dict[str, IO[str]] = {}

    def prepare(self, settings: Mapping[str, Any]) -> None:
        """For one process alone, before the others write: tie the folder to `settings`, tidy up after a killed run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _tie_to_settings(self.folder, {**settings, "records": self.records})
        self.merge()
        for name in (FAILURES_FILE, *self._parts(FAILURES_FILE)):
            (self.folder / name).unlink(missing_ok=True)  # what failed before is tried again

    def check_volumes(self, records: Sequence[Record]) -> None:
        """Raise ResumeError where a record was answered from another volume than it has now.

        Records without an answer don't count: a volume that couldn't be read may have been repaired since.
        """
        by_id = {record["id"]: record for record in records}
        digests: dict[tuple, str | None] = {}
        for row in read_lines(self.folder / PREDICTIONS):
            record = by_id.get(row["id"])
            if record is None:
                continue
            key = record["volume"], tuple(record.get("rescale") or ())
            if key not in digests:
                digests[key] = volume_digest(record)
            if row.get("volume_digest") != digests[key]:
                raise ResumeError(
                    f"{self.folder / PREDICTIONS}: record {row['id']} was answered from another volume than "
                    f"{record['volume']} is now: its name or its content has changed. Choose another output folder, or delete "
                    "this one to start anew."
                )

    def answered(self) -> set[str]:
        """Ids in the merged predictions."""
        return {row["id"] for row in read_lines(self.folder / PREDICTIONS)}

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Lines for this process's part of PREDICTIONS, FAILURES_FILE or TIMES; with the operating system on return."""
        if name not in self._open:
            self._open[name] = (self.folder / _part(name, self.rank)).open("a", encoding="utf-8")
        self._open[name].write("".join(map(json_line, rows)))
        self._open[name].flush()

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def merge(self) -> None:
        """For one process alone: what all parts hold goes into one file each, and the parts go away.

        Safe against a kill at any point: a part is deleted once what it held is in the merged file.
        """
        for name in (PREDICTIONS, FAILURES_FILE, TIMES):
            parts = [self.folder / part for part in self._parts(name)]
            merged = self.folder / name
            if not parts and name != FAILURES_FILE and _is_whole(merged):
                continue  # an empty list of failures is written too: it says that there were none
            rows = [row for path in (merged, *parts) for row in read_lines(path)]
            atomic_write(merged, "".join(map(json_line, self._in_order(name, rows))))
            for part in parts:
                part.unlink()

    def _in_order(self, name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if name == TIMES:
            return list({json_line(row): row for row in rows}.values())
        by_id = {row["id"]: row for row in reversed(rows) if row.get("id") in self.places}
        return sorted(by_id.values(), key=lambda row: self.places[row["id"]])

    def _parts(self, name: str) -> list[str]:
        return sorted(path.name for path in self.folder.glob(_part(name, "*")))


def _part(name: str, rank: int | str) -> str:
    stem, _, ending = name.rpartition(".")
    return f"{stem}.part{rank}.{ending}"


def _is_whole(path: Path) -> bool:
    """Whether a file is absent or ends with a whole line."""
    content = path.read_bytes() if path.is_file() else b""
    return not content or content.endswith(b"\n")


def _digest(records: Sequence[Record]) -> str:
    """How many records, and a hash of their ids and prompts."""
    prompts = sorted((record["id"], record_prompt(record)) for record in records)
    return f"{len(prompts)}, {digest_of(prompts)}"


def digest_of(value: Any) -> str:
    """A short hash of a value that is fit for JSON."""
    return f"sha256 {hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]}"


def references_digest(records: Sequence[Record]) -> str:
    """A hash of what answers are compared with."""
    return digest_of(sorted((record["id"], record["answer"], list(record.get("choices") or [])) for record in records))


_SAMPLED_BYTES = 1 << 12  # of a volume's beginning, middle and end; the end of a .gz holds a checksum of all of it
_MOST_FILES = 5000  # of a folder


def volume_digest(record: Record) -> str | None:
    """A hash of a record's volume: of its name, its content as far as that is cheap to see, and its rescale.

    Of a file its size and some of its bytes count, of a folder its files' names and sizes, of an address, or of what isn't
    there, the name. So a data set may move, but not change.
    """
    if record["volume"] is None:
        return None
    place, content = Path(record["volume"]), None
    try:
        if place.is_file():
            content = _sampled(place)
        elif place.is_dir():
            files = sorted(file for file in place.rglob("*") if file.is_file())[:_MOST_FILES]
            content = [[str(file.relative_to(place)), file.stat().st_size] for file in files]
    except OSError as error:  # reading the volume says more
        logger.debug("%s: not looked into: %s", place, error)
    return digest_of([place.name, content, list(record.get("rescale") or [])])


def _sampled(path: Path) -> list[Any]:
    """A file's size and a hash of some of its bytes."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - _SAMPLED_BYTES)):
            file.seek(start)
            digest.update(file.read(_SAMPLED_BYTES))
    return [size, digest.hexdigest()]


def _tie_to_settings(output_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write what the predictions depend on beside them, or compare it with what is written there."""
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
    if differing := _differences(before, settings):
        raise ResumeError(
            f"{output_dir / PREDICTIONS} was made with other settings: {'; '.join(differing)}. "
            "Choose another output folder, or delete this one to start anew."
        )


_LONGEST_VALUE = 200  # characters of a setting in a message


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs in two settings, down to the innermost names: "processor.hu_windows was … and is now …"."""
    if isinstance(before, dict) and isinstance(now, dict):
        prefix = f"{name}." if name else ""
        keys = sorted(before.keys() | now.keys())
        return [found for key in keys for found in _differences(before.get(key), now.get(key), f"{prefix}{key}")]
    if before == now:
        return []
    shown = (text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} …" for text in map(repr, (before, now)))
    return [f"{name} was {' and is now '.join(shown)}"]


def answer_statistics(
    rows: Iterable[Mapping[str, Any]], times: Iterable[Mapping[str, Any]] = ()
) -> dict[str, dict[str, Any]]:
    """By task: answers, empty and truncated ones, tokens, and the time that a volume and an answer took.

    `rows` are of predictions.jsonl, `times` of times.jsonl: one line a batch, over all sessions of a run that was
    resumed. Times are None where none were taken, tokens where no row has them. Reading runs ahead of generation in
    other threads: `read_seconds` is what had to be waited for.
    """
    groups, clocks = defaultdict(list), defaultdict(Counter)
    for row in rows:
        groups[row["task"]].append(row)
    for line in times:
        clocks[line["task"]].update({name: value for name, value in line.items() if name in _SUMMED})
    return {task: _task_statistics(group, clocks[task]) for task, group in groups.items()}


_SUMMED = ("answers", "volumes", "read_seconds", "generate_seconds", "tokens")


def _task_statistics(rows: Sequence[Mapping[str, Any]], clock: Mapping[str, float]) -> dict[str, Any]:
    tokens = [row["tokens"] for row in rows if row.get("tokens") is not None]
    seconds = clock.get("read_seconds", 0) + clock.get("generate_seconds", 0)

    def share(total: float, name: str) -> float | None:
        return total / clock[name] if clock.get(name) else None

    return {
        "answers": len(rows),
        "empty": sum(not str(row["prediction"]).strip() for row in rows),
        "truncated": sum(bool(row.get("truncated")) for row in rows),
        "tokens": sum(tokens) if tokens else None,
        "tokens_mean": sum(tokens) / len(tokens) if tokens else None,
        "tokens_longest": max(tokens, default=None),
        "seconds_per_volume": share(seconds, "volumes"),
        "seconds_per_answer": share(seconds, "answers"),
        "read_seconds_per_volume": share(clock.get("read_seconds", 0), "volumes"),
        "tokens_per_second": share(clock.get("tokens", 0), "generate_seconds"),
    }
