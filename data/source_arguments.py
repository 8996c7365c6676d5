"""Arguments of all scripts about data in other layouts than CT-RATE's, and about whose volume is whose."""

from dataclasses import dataclass, field
from typing import Any

from samf.data.patients import PatientRule
from samf.data.table_columns import TableColumns, parse_splits
from samf.data.volume_discovery import SPLITS, SourceOptions


@dataclass(kw_only=True)
class SourceArguments:
    """How data is read that isn't in CT-RATE's layout."""

    volume_column: str | None = field(
        default=None,
        metadata={
            "help": "column of the volumes (a path, an address or a Nifti) of a data set on the Hub, a folder or a table"
        },
    )
    report_column: str | None = field(default=None, metadata={"help": "its column of reports"})
    question_column: str | None = field(default=None, metadata={"help": "its column of questions"})
    answer_column: str | None = field(default=None, metadata={"help": "its column of answers"})
    choices_column: str | None = field(
        default=None, metadata={"help": "its column of options; default: those in the question, (a) … (b) …"}
    )
    patient_column: str | None = field(default=None, metadata={"help": "a table's column of patients"})
    dataset_split: list[str] = field(
        default_factory=list,
        metadata={"help": "its splits, e.g. train=train[:90%%] valid=test; one alone is for whichever is asked for"},
    )
    patient_rule: str | None = field(
        default=None,
        metadata={
            "help": "patients by place: folder (the first below the data's), folder:2, parent, file, or a regular expression "
            "with one group; before a table's, CT-RATE's and DICOM's own"
        },
    )
    min_coverage: float = field(
        default=0.0, metadata={"help": "mm of the body that a volume must cover along each axis; less is refused"}
    )

    def check_source(self) -> None:
        """Raise ValueError for arguments that don't go together."""
        self.table_columns()
        PatientRule.parse(self.patient_rule)
        if not self.min_coverage >= 0:
            raise ValueError(f"min_coverage is {self.min_coverage}; expected mm, or 0.")

    def table_columns(self) -> TableColumns | None:
        """Return the columns that are named, None where none is."""
        texts = {name: getattr(self, f"{name}_column") for name in ("report", "question", "answer", "choices")}
        if self.volume_column is None:
            if named := [f"{name}_column" for name, value in texts.items() if value] + ["dataset_split"] * bool(
                self.dataset_split
            ):
                raise ValueError(f"{', '.join(named)} needs volume_column: which column holds the volumes?")
            return None
        return TableColumns(
            self.volume_column, **texts, patient=self.patient_column, splits=parse_splits(self.dataset_split)
        )

    def record_options(self) -> dict[str, Any]:
        """Return what `load_records` takes of these; only what was given."""
        options = {
            "columns": self.table_columns(),
            "patient_rule": PatientRule.parse(self.patient_rule),
            "patient_column": self.patient_column,
        }
        return {name: value for name, value in options.items() if value is not None}

    def source_options(
        self, on_missing: str = "error", patterns: list[str] | None = None, splits: tuple[str, ...] = SPLITS
    ) -> SourceOptions:
        """Return what `search_volumes` takes."""
        rule, columns = PatientRule.parse(self.patient_rule), self.table_columns()
        return SourceOptions(splits, on_missing, tuple(patterns or ()), columns, rule, self.patient_column)
