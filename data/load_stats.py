"""Counts of the records that were read, and of what was left out for which reasons."""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from samf.utils.files import atomic_write

logger = logging.getLogger(__name__)


class LeftOut(TypedDict):
    """What was left out for one reason."""

    reason: str
    count: int
    first: str  # an example


class LoadSummary(TypedDict):
    """The counts as JSON has them."""

    records: dict[str, int]  # by task
    left_out: list[LeftOut]


@dataclass
class LoadStats:
    """Counts of records and of what was left out.

    Attributes:
        kept: {task: number of records}.
        dropped: {reason: number of rows or volumes left out}.
        examples: {reason: the first that was left out}.
    """

    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, what: str, count: int = 1) -> None:
        """Count something that is left out.

        Args:
            reason: why.
            what: its name; the first of each reason is kept as an example.
            count: how many.
        """
        self.dropped[reason] += count
        self.examples.setdefault(reason, what)

    def log(self, source: str) -> None:
        """Log the counts of a source."""
        logger.info("%s: %d records (%s)", source, sum(self.kept.values()), dict(self.kept))
        for reason, count in self.dropped.most_common():
            logger.warning("%s: %d left out: %s (first: %s)", source, count, reason, self.examples[reason])

    def summary(self) -> LoadSummary:
        """Return the counts as JSON has them; `from_summary` reads them."""
        dropped: list[LeftOut] = [
            {"reason": reason, "count": count, "first": self.examples[reason]}
            for reason, count in self.dropped.most_common()
        ]
        return {"records": dict(self.kept), "left_out": dropped}

    @classmethod
    def from_summary(cls, summary: LoadSummary) -> "LoadStats":
        """Return the counts of a summary."""
        load_stats = cls(Counter(summary["records"]))
        for entry in summary["left_out"]:
            load_stats.drop(entry["reason"], entry["first"], entry["count"])
        return load_stats

    def save(self, path: str | Path, **facts: Any) -> None:
        """Write the counts to a JSON file, preceded by `facts` about their source."""
        content = json.dumps({**facts, **self.summary()}, indent=2)  # ASCII, since file names need not be UTF-8
        atomic_write(Path(path), f"{content}\n".encode())
