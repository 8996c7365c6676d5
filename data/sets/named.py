"""What a named data set is: how its files become one table, and what the columns of that table hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import datasets

from samf.data.table_columns import TableColumns


@dataclass(frozen=True)
class NamedSet:
    """A data set whose layout is known.

    Attributes:
        name: as `--dataset` takes it.
        join: makes one table of the files below a folder. Its volumes are paths relative to the folder, or absolute.
        columns: the columns of that table; "split" and the finding labels are used where the table has them.
        home: where the data set is to be had, for messages.
        layout: what is expected below the folder, for messages.
        aliases: {a finding's name in CT-RATE: the label column of the same meaning}.
    """

    name: str
    join: Callable[[Path], datasets.Dataset]
    columns: TableColumns
    home: str
    layout: str
    aliases: Mapping[str, str] = field(default_factory=dict)

    def table_columns(self) -> TableColumns:
        """Return the columns, which open this data set in place of a table."""
        return replace(self.columns, opener=self.open, name=self.name, labels={**self.aliases, **self.columns.labels})

    def open(self, source: str | Path, split: str) -> datasets.Dataset:
        """Return the table of a folder; `split`, of which the table has all, is not used.

        Raises:
            FileNotFoundError: no such folder, or one of another layout; says what is expected.
            ValueError: a table without a column that it needs.
        """
        root = Path(source).expanduser().absolute()
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder. Expected {self.layout}, from {self.home}.")
        return _joined(self, root)

    def __hash__(self) -> int:
        return hash(self.name)


@lru_cache(maxsize=4)
def _joined(known: NamedSet, root: Path) -> datasets.Dataset:
    """Return the table of a folder, which is joined once for all splits of a process."""
    try:
        return known.join(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Expected {known.layout}, from {known.home}.") from error
