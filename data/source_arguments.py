"""Arguments that all scripts share: data in other layouts than CT-RATE's, and the patients of volumes."""

from dataclasses import dataclass, field
from typing import TypedDict

from samf.data.options import check_on_missing
from samf.data.patients import PatientRule
from samf.data.table_columns import TableColumns, parse_splits
from samf.data.volume_discovery import SPLITS, SourceOptions


class RecordOptions(TypedDict, total=False):
    """Options of `load_records`."""

    columns: TableColumns
    patient_rule: PatientRule
    patient_column: str


@dataclass(kw_only=True)
class SourceArguments:
    """Arguments for data in another layout than CT-RATE's."""

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
        metadata={"help": "its splits, e.g. train=train[:90%%] valid=test; a single name is for either"},
    )
    patient_rule: str | None = field(
        default=None,
        metadata={
            "help": "patients by path: folder (the first below the data's), folder:2, parent, file, or a regular expression "
            "with one group; takes precedence over those of tables, CT-RATE's names and DICOM"
        },
    )
    min_coverage: float = field(
        default=0.0,
        metadata={"help": "mm of the body that a volume must cover along each axis; smaller ones are refused"},
    )

    def check_source(self) -> None:
        """Raise ValueError for invalid arguments, or ones that exclude each other."""
        self.table_columns()
        PatientRule.parse(self.patient_rule)
        if not self.min_coverage >= 0:
            raise ValueError(f"min_coverage is {self.min_coverage}; expected mm, or 0.")

    def table_columns(self) -> TableColumns | None:
        """Return the named columns, None without any. Raises ValueError for columns without `volume_column`."""
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

    def record_options(self) -> RecordOptions:
        """Return the options of `load_records` that were given."""
        options: RecordOptions = {}
        if (columns := self.table_columns()) is not None:
            options["columns"] = columns
        if (rule := PatientRule.parse(self.patient_rule)) is not None:
            options["patient_rule"] = rule
        if self.patient_column is not None:
            options["patient_column"] = self.patient_column
        return options

    def source_options(
        self, on_missing: str = "raise", patterns: list[str] | None = None, splits: tuple[str, ...] = SPLITS
    ) -> SourceOptions:
        """Return the options of `search_volumes`.

        Args:
            on_missing: see `SourceOptions`.
            patterns: see `SourceOptions`; None uses all files.
            splits: see `SourceOptions`.
        """
        rule, columns = PatientRule.parse(self.patient_rule), self.table_columns()
        return SourceOptions(
            splits, check_on_missing(on_missing), tuple(patterns or ()), columns, rule, self.patient_column
        )
