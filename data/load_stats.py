"""What became of the rows that were read: how many records, how many left out, for which reasons."""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samf.utils.files import atomic_write

logger = logging.getLogger(__name__)


@dataclass
class LoadStats:
    """How many records were made of each task, and how many were left out for which reason."""

    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, what: str, count: int = 1) -> None:
        """Count something that is left out; the first `what` of each reason is remembered."""
        self.dropped[reason] += count
        self.examples.setdefault(reason, what)

    def log(self, source: str) -> None:
        logger.info("%s: %d records (%s)", source, sum(self.kept.values()), dict(self.kept))
        for reason, count in self.dropped.most_common():
            logger.warning("%s: %d left out: %s (first: %s)", source, count, reason, self.examples[reason])

    def summary(self) -> dict[str, Any]:
        """The counts as JSON has them; `from_summary` reads them back."""
        dropped = [
            {"reason": reason, "count": count, "first": self.examples[reason]}
            for reason, count in self.dropped.most_common()
        ]
        return {"records": dict(self.kept), "left_out": dropped}

    @classmethod
    def from_summary(cls, summary: dict[str, Any]) -> "LoadStats":
        load_stats = cls(Counter(summary["records"]))
        for entry in summary["left_out"]:
            load_stats.drop(entry["reason"], entry["first"], entry["count"])
        return load_stats

    def save(self, path: str | Path, **facts: Any) -> None:
        """Write the counts as JSON, with `facts` about their source, whole or not at all."""
        content = json.dumps({**facts, **self.summary()}, indent=2)  # in ASCII: file names may be no UTF-8
        atomic_write(Path(path), f"{content}\n".encode())
