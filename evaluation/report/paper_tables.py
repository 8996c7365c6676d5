"""Tables 1, 2 and 3 of the paper, for comparison with our results.

Source: A. Hosseini, A. Ibrahim, A. Serag, "From Slices to Volumes: Multi-Scale Fusion of 2D and 3D Features for CT Scan
Report Generation", MICCAI 2025, open-access version, section 3. Values that the paper doesn't give are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

SOURCE = "Hosseini, Ibrahim, Serag, MICCAI 2025 (open-access version)"

# Metric in our results → column name as printed.
COLUMNS = {
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "bertscore_f1": "BERT F1",
    "judge": "Llama score",
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
}


@dataclass(frozen=True)
class PaperRow:
    """A row of a table.

    Attributes:
        name: as printed.
        values: by the names of `COLUMNS`.
        suspect: columns whose values can't be right as printed.
    """

    name: str
    values: Mapping[str, float]
    suspect: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        number: of the table.
        title: of the table.
        task: the task in our results that its values belong to.
        columns: names of `COLUMNS`.
        rows: its rows.
        notes: how to read it.
    """

    number: int
    title: str
    task: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    notes: tuple[str, ...] = field(default=())


def _row(name: str, columns: tuple[str, ...], *values: float | None, suspect: tuple[str, ...] = ()) -> PaperRow:
    given = {column: value for column, value in zip(columns, values, strict=True) if value is not None}
    return PaperRow(name, given, suspect)


_REPORTS = ("bleu_1", "bleu_4", "rouge_l", "meteor", "bertscore_f1", "judge")
_CHOICES = ("bleu_1", "rouge_l", "meteor", "judge", "accuracy", "precision", "recall", "f1")
_ABLATIONS = ("bleu_1", "bleu_4", "rouge_l", "meteor")

TABLE_1 = PaperTable(
    1,
    "Report generation",
    "report",
    _REPORTS,
    (
        _row("E3D-GPT", _REPORTS, 0.412, None, None, 0.418, 0.880, None),
        _row("MS-VLM", _REPORTS, None, 0.232, 0.438, 0.396, None, None),
        _row("CT-AGRG", _REPORTS, None, 0.172, 0.280, 0.196, 0.867, None),
        _row("CT2Rep", _REPORTS, 0.309, 0.172, 0.243, 0.173, 0.865, 6.35),
        _row("CT-CHAT", _REPORTS, 0.395, None, 0.321, 0.219, None, 5.664),
        _row("SAMF", _REPORTS, 0.423, 0.203, 0.338, 0.356, 0.879, 6.792),
        _row("SAMF + Ao2D", _REPORTS, 0.440, 0.261, 0.417, 0.417, 0.889, 7.165),
    ),
    (
        "The paper took the values of E3D-GPT, MS-VLM, CT-AGRG and CT-CHAT from their papers, each with its own data and "
        "metrics, and retrained CT2Rep.",
    ),
)

TABLE_2 = PaperTable(
    2,
    "Multiple choice",
    "multiple_choice",
    _CHOICES,
    (
        _row("CT-CHAT", _CHOICES, 0.838, 0.895, 0.577, 0.901, None, None, None, None),
        _row("SAMF", _CHOICES, 0.940, 0.925, 0.926, 0.939, 0.915, 0.898, 0.893, 0.895),
        _row("SAMF + Ao2D", _CHOICES, 0.942, 0.929, 0.930, 0.942, 0.920, 0.902, 0.900, 0.901),
    ),
)

TABLE_3 = PaperTable(
    3,
    "Report generation with parts frozen, and the aggregator warmed up",
    "report",
    _ABLATIONS,
    (
        _row("SAMF baseline, one tick", _ABLATIONS, 0.426, 0.209, 0.345, 0.366),
        _row("+ SSL warm-up, no tick", _ABLATIONS, 0.442, 0.184, 0.377, 0.412),
        _row("+ SSL warm-up, one tick", _ABLATIONS, 0.447, 0.186, 0.300, 0.375),
        _row("+ SSL warm-up, both ticks", _ABLATIONS, 0.339, 0.128, 0.282, 0.308),
        _row("+ Ao2D, one tick", _ABLATIONS, 0.257, 0.089, 0.260, 0.263),
        _row("+ Ao2D, SSL warm-up, no tick", _ABLATIONS, 0.445, 0.204, 0.338, 0.365),
        _row("+ Ao2D, SSL warm-up, both ticks", _ABLATIONS, 0.223, 0.419, 0.091, 0.255, suspect=_ABLATIONS),
    ),
    (
        "A tick is in the column ViT or Aggregator. The text that these values were taken from lost the column: in rows with "
        "one tick it may be either. Rows without a name in the paper belong to the one above.",
        "The last row can't be right as printed: BLEU-4 (.419) above BLEU-1 (.223). Its values seem to be in the wrong "
        "columns; don't compare anything with them.",
    ),
)

PAPER_TABLES = (TABLE_1, TABLE_2, TABLE_3)
