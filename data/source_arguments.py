"""Arguments that all scripts share: data in other layouts than CT-RATE's, and the patients of volumes."""

from dataclasses import dataclass, field, replace
from typing import TypedDict

from samf.data.labels import parse_label_columns
from samf.data.options import check_on_missing
from samf.data.patients import PatientRule
from samf.data.sets import NAMES, named_set
from samf.data.table_columns import TableColumns, parse_splits
from samf.data.volume_discovery import SPLITS, SourceOptions


class RecordOptions(TypedDict, total=False):
    """Options of `load_records`."""

    columns: TableColumns
    patient_rule: PatientRule
    patient_column: str
    image_root: str


_TEXTS = ("report", "question", "answer", "choices")  # columns of a table, in addition to those of every record
_OTHERS = ("split", "scan")


@dataclass(kw_only=True)
class SourceArguments:
    """Arguments for data in another layout than CT-RATE's."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": f"name of the data set in the data folder: {', '.join(NAMES)}; it says what its columns are, and "
            "columns that are given here take precedence"
        },
    )
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
    split_column: str | None = field(
        default=None, metadata={"help": "its column of splits: train, valid, …; default: the data set's own splits"}
    )
    scan_column: str | None = field(
        default=None, metadata={"help": "its column of scans, of which several volumes may be reconstructions"}
    )
    label_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "its columns of finding labels, FINDING=COLUMN; a column with the finding's own name need not be given"
        },
    )
    image_root: str | None = field(
        default=None,
        metadata={"help": "folder from which the volumes' relative paths start; default: the table's or CSV's"},
    )
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
        """Return the columns of the table or named data set, None for neither.

        Raises:
            ValueError: columns without `volume_column` or `dataset`, or an unknown data set.
        """
        texts = {name: getattr(self, f"{name}_column") for name in (*_TEXTS, *_OTHERS)}
        labels = parse_label_columns(self.label_columns)
        if self.dataset is None and self.volume_column is None:
            named = [f"{name}_column" for name, value in texts.items() if value]
            named += ["label_columns"] * bool(labels) + ["dataset_split"] * bool(self.dataset_split)
            if named:
                raise ValueError(f"{', '.join(named)} needs volume_column: which column holds the volumes?")
            return None
        known = TableColumns("") if self.dataset is None else named_set(self.dataset).table_columns()
        given = {**texts, "volume": self.volume_column, "patient": self.patient_column, "image_root": self.image_root}
        return replace(
            known,
            **{name: value for name, value in given.items() if value is not None},
            labels={**known.labels, **labels},
            splits=parse_splits(self.dataset_split),
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
        if self.image_root is not None:
            options["image_root"] = self.image_root
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
            splits,
            check_on_missing(on_missing),
            tuple(patterns or ()),
            columns,
            rule,
            self.patient_column,
            self.image_root,
        )
