"""Labels of findings in tables: their values, and the columns that hold them."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence

from samf.data.schema import IGNORE_INDEX
from samf.data.texts import given

logger = logging.getLogger(__name__)

UNCERTAIN = -1  # in label tables written by CheXpert's labeller and similar ones
_WORDS = {"true": 1.0, "false": 0.0}


def read_label(value: object, where: str) -> int:
    """Return 1, 0, UNCERTAIN or IGNORE_INDEX (nothing, nan).

    Args:
        value: a text, number or truth value of a table.
        where: file, row and column, for the message.

    Raises:
        ValueError: any other value.
    """
    text = given(None if value is None else str(value))
    if not text:
        return IGNORE_INDEX
    try:
        number = _WORDS.get(text.lower(), math.nan) if text.isalpha() else float(text)
    except ValueError:
        number = math.nan
    if number in (0, 1, UNCERTAIN):
        return int(number)
    raise ValueError(
        f"{where}: {text!r} is not a label; expected 0, 1, or -1 or nothing for an unknown one. Turn probabilities into 0 "
        "and 1 by a threshold."
    )


def known_label(value: object, where: str) -> int:
    """Return a label as `read_label` does, with IGNORE_INDEX in place of UNCERTAIN.

    Args:
        value: as there.
        where: as there.
    """
    label = read_label(value, where)
    return IGNORE_INDEX if label == UNCERTAIN else label


def parse_label_columns(items: Sequence[str]) -> dict[str, str]:
    """Parse `--label_columns`: FINDING=COLUMN, or the name of a column that is the finding's. Raises ValueError."""
    columns: dict[str, str] = {}
    for item in items:
        finding, equals, column = item.partition("=")
        if not finding or (equals and not column) or finding in columns:
            raise ValueError(f"label_columns has {item!r}; expected FINDING=COLUMN or COLUMN, each finding once.")
        columns[finding] = column or finding
    return columns


def find_label_columns(
    names: Sequence[str], named: Mapping[str, str], columns: Collection[str], source: str
) -> dict[str, str | None]:
    """Return the column of each finding, None for one that the table doesn't have; {} if it has none of them.

    Args:
        names: the findings.
        named: {finding: column}; other findings have columns of their own names.
        columns: of the table.
        source: the table's name, for the log.
    """
    found = {name: column if (column := named.get(name, name)) in columns else None for name in names}
    missing = [name for name, column in found.items() if column is None]
    if len(missing) == len(found):
        return {}
    if missing:
        logger.warning("%s: no labels of %s; they count as unknown.", source, ", ".join(missing))
    return found


class LabelReader:
    """Labels of a table's rows.

    Args:
        columns: the column of each finding, None for one without.
        source: the table's name, for messages.
    """

    def __init__(self, columns: Mapping[str, str | None], source: str):
        self.columns = [name for name in columns.values() if name is not None]
        self._columns, self._source = list(columns.values()), source
        self._known: dict[object, int] = {None: IGNORE_INDEX}  # a table has few different values, in many rows

    def __bool__(self) -> bool:
        return bool(self._columns)

    def __call__(self, row: Mapping[str, object], number: int) -> list[int] | None:
        """Return the labels of row `number`, in the findings' order; None of a table without labels.

        Raises:
            ValueError: a value that is no label; names row and column.
        """
        if not self._columns:
            return None
        return [self._label(None if name is None else row[name], name, number) for name in self._columns]

    def _label(self, value: object, column: str | None, number: int) -> int:
        found = self._known.get(value)
        if found is None:
            found = known_label(value, f"{self._source}: row {number + 1}, column {column!r}")
            self._known[value] = found
        return found
