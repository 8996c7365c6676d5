"""Run train.py and append the ids of every batch that a process makes to `$RECORD.{rank}`, one line per batch."""

import os
import sys

from samf import train
from samf.data.collator import SamfCollator

collate = SamfCollator.__call__


def recorded(self, records):
    with open(f"{os.environ['RECORD']}.{os.environ.get('RANK', '0')}", "a", encoding="utf-8") as file:
        file.write(" ".join(record["id"] for record in records) + "\n")
    return collate(self, records)


if __name__ == "__main__":
    SamfCollator.__call__ = recorded
    train.main(sys.argv[1:])
