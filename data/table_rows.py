"""The rows of an opened table as records: one of a row's report, one of its question, or one of its volume only."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import datasets
from tqdm import tqdm

from samf.data.labels import LabelReader
from samf.data.load_stats import LoadStats
from samf.data.prompts import REPORT_QUESTION
from samf.data.record_cache import default_cache
from samf.data.records import RecordBuilder
from samf.data.schema import Exchange, Record
from samf.data.table_volumes import volume_name
from samf.data.texts import NO_OPTION, given, settle_answer, split_options, squeeze

if TYPE_CHECKING:
    from samf.data.table_columns import TableColumns

Row: TypeAlias = Mapping[str, object]

_ROWS = 1000  # of a table that are read at once


class _Facts(TypedDict):
    """What a record has in addition to its volume, its texts and its patient."""

    scan: str | None
    labels: list[int] | None


class TableRows:
    """Reader of a table's rows.

    Args:
        columns: what the columns hold.
        table: with these columns.
        labels: reads the finding labels of a row.
        source: the table's name, for messages.
    """

    def __init__(self, columns: "TableColumns", table: datasets.Dataset, labels: LabelReader, source: str | Path):
        self.columns, self.table, self.labels, self.source = columns, table, labels, source

    def records(self, builder: RecordBuilder, tasks: Collection[str]) -> Iterator[Record]:
        """Yield the records of all rows.

        Args:
            builder: makes them, and counts what is left out.
            tasks: those to make records of.
        """
        for count, (number, name, row) in enumerate(self._named_rows(builder.load_stats)):
            patient, facts = self._text_of(row, self.columns.patient), self._facts(row, number)
            if self.columns.report and "report" in tasks:
                text = given(_text(row[self.columns.report]))
                if report := builder.report(name, REPORT_QUESTION, text, patient, **facts):
                    yield report
            if exchange := self._exchange(row, builder.load_stats, count):
                record = builder.record(name, f"{exchange['task']}_{count}", exchange, patient, **facts)
                if record:
                    yield record

    def volumes(self, builder: RecordBuilder) -> Iterator[Record]:
        """Yield a record per volume, without texts; `builder` makes them."""
        empty: Exchange = {"task": "report", "question": "", "choices": None, "answer": ""}
        for number, name, row in self._named_rows(builder.load_stats):
            facts = self._facts(row, number)
            patient = self._text_of(row, self.columns.patient)
            if record := builder.record(name, facts["scan"] or name, empty, patient, **facts):
                yield record

    def _named_rows(self, load_stats: LoadStats) -> Iterator[tuple[int, str, Row]]:
        """Yield each row that has a volume, with its number and the volume's name."""
        folder = default_cache() / "volumes" / self.table._fingerprint
        total = len(self.table)
        rows = tqdm(self._each(), f"reading {self.source}", total, unit=" rows", disable=None, delay=5)
        for number, row in enumerate(rows):
            name = volume_name(row[self.columns.volume], folder, number)
            if name is None:
                load_stats.drop("row without a volume", f"row {number}")
                continue
            yield number, name, row

    def _each(self) -> Iterator[Row]:
        """Yield the rows: by the thousand, unless they may hold whole volumes."""
        if not isinstance(self.table.features[self.columns.volume], datasets.Value):
            yield from self.table
            return
        for batch in self.table.iter(_ROWS):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(names, values, strict=True))

    def _facts(self, row: Row, number: int) -> _Facts:
        return {"scan": self._text_of(row, self.columns.scan), "labels": self.labels(row, number)}

    def _exchange(self, row: Row, load_stats: LoadStats, number: int) -> Exchange | None:
        """Return the question of a row; None where it has none, or an unusable one, which is counted."""
        if self.columns.question is None or self.columns.answer is None:
            return None
        question, answer = given(_text(row[self.columns.question])), given(_text(row[self.columns.answer]))
        if not question or not answer:
            load_stats.drop("no question or no answer", f"row {number}")
            return None
        question, choices = self._choices(row, question)
        if not choices:
            return {"task": "short_answer", "question": question, "choices": None, "answer": answer}
        settled = settle_answer(answer, choices)
        if settled is None:
            load_stats.drop(NO_OPTION, f"row {number}")
            return None
        return {"task": "multiple_choice", "question": question, "choices": choices, "answer": settled}

    def _choices(self, row: Row, question: str) -> tuple[str, list[str]]:
        """Return the question without its options, and the options."""
        if self.columns.choices is None:
            question, choices = split_options(question)
        elif isinstance(found := row[self.columns.choices], str):
            choices = split_options(found)[1]
        else:
            choices = list(found) if isinstance(found, Sequence) else []
        return question, [squeeze(_text(choice)) for choice in choices]

    @staticmethod
    def _text_of(row: Row, column: str | None) -> str | None:
        """Return the text of a column, None for an empty one and without a column."""
        return None if column is None else _text(row[column]).strip() or None


def _text(value: object) -> str:
    return "" if value is None else str(value)
