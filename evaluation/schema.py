"""Types of what evaluation reads and writes: predictions, results.json, comparisons, judge.json and answering statistics.

Everything here is a plain dictionary at run time, so that it is written to JSON as it is; the keys are those on disk.
"""

from typing import Literal, NotRequired, TypeAlias, TypedDict

from samf.data.schema import JsonObject, Task

Interval: TypeAlias = list[float] | None  # [low, high]
Intervals: TypeAlias = dict[str, Interval]  # by metric path, e.g. "text.bleu_4"
TextScores: TypeAlias = dict[str, float | None]  # by metric; None where it is undefined or not available


class PredictionRow(TypedDict):
    """One line of a predictions.jsonl of any system; only three fields are required."""

    task: Task
    reference: str
    prediction: str
    id: NotRequired[str | int | None]
    scan_id: NotRequired[str | int | None]
    patient_id: NotRequired[str | int | None]
    question: NotRequired[str | None]
    choices: NotRequired[list[str] | None]  # required for multiple choice
    volume: NotRequired[str | None]  # file name, without its folder
    volume_digest: NotRequired[str | None]
    tokens: NotRequired[int | None]
    truncated: NotRequired[bool | None]
    option_log_likelihoods: NotRequired[list[float]]
    option_tokens: NotRequired[list[int]]


class Failure(TypedDict):
    """One line of failures.jsonl: a record without an answer."""

    id: str
    scan_id: NotRequired[str | None]
    task: NotRequired[Task]
    volume: NotRequired[str | None]
    error: str  # "CTReadError: …"


class TimesLine(TypedDict):
    """One line of times.jsonl: what a batch took."""

    task: Task
    answers: int
    volumes: int  # that were in no batch of this task before
    tokens: int
    read_seconds: float
    generate_seconds: float


# --- Scores of one task -----------------------------------------------------------------------------------------


class TextSummary(TypedDict):
    """Text metrics of a corpus: what `text_metrics` returns."""

    count: int
    empty_predictions: int
    empty_references: int
    scores: TextScores
    not_available: dict[str, str]  # metric → reason and remedy
    notes: dict[str, str]  # metric → caveat


class PrecisionRecallF1(TypedDict):
    """Precision, recall and F1; None where the denominator is 0."""

    precision: float | None
    recall: float | None
    f1: float | None


class SupportedScores(PrecisionRecallF1):
    """Scores with the number of positives in the references."""

    support: int


class PerFinding(SupportedScores):
    """Scores of one finding, with the number of positives in the predictions."""

    predicted: int


class EffusionSide(TypedDict):
    """Laterality of pleural effusions: references that name a side, and the share of predictions that agree."""

    count: int
    accuracy: float | None


class FindingScores(TypedDict):
    """Finding scores of reports: what `score_findings` returns."""

    per_finding: dict[str, PerFinding]
    micro: PrecisionRecallF1
    macro: PrecisionRecallF1
    macro_findings: int  # findings that occur in the references
    crg: float | None
    sides: SupportedScores
    sizes: SupportedScores
    effusion_side: EffusionSide


class FindingValues(TypedDict):
    """The finding scores of a baseline."""

    macro: PrecisionRecallF1
    micro: PrecisionRecallF1
    crg: float | None
    sides: NotRequired[PrecisionRecallF1]
    sizes: NotRequired[PrecisionRecallF1]


class ChoiceScores(TypedDict):
    """Multiple-choice scores: what `score_multiple_choice` returns; None where no question can be scored."""

    count: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    chance: float | None
    unparsed: int
    without_reference: int


class BaselineScores(TypedDict):
    """Scores of a text baseline that reads no image."""

    text: TextScores
    findings: NotRequired[FindingValues]
    intervals: NotRequired[Intervals]


class ChoiceBaseline(TypedDict):
    """Scores of a multiple-choice baseline: the most frequent letter, or chance, which has an accuracy only."""

    letter: NotRequired[str]
    accuracy: float | None
    precision: NotRequired[float | None]
    recall: NotRequired[float | None]
    f1: NotRequired[float | None]
    intervals: NotRequired[Intervals]


class WordRun(TypedDict):
    """A run of words that texts share."""

    words: int
    text: str


class Loop(WordRun):
    """A run of words that one text contains twice."""

    index: int | None


class Collapse(TypedDict):
    """Signs of template collapse in a list of texts: what `template_collapse` returns."""

    distinct_ratio: float | None
    most_frequent: float | None
    template: WordRun
    loop: Loop


class CollapsePair(TypedDict):
    """Template collapse of the predictions, and of the references for comparison."""

    predictions: Collapse
    references: Collapse


class MetricWithInterval(TypedDict):
    """A metric in a subgroup."""

    value: float | None
    interval: Interval


SubgroupRow: TypeAlias = JsonObject  # "by", "group", "count", "patients", and metric path → MetricWithInterval


class TaskScores(TypedDict):
    """All scores of one task, an entry of `Results["tasks"]`."""

    count: int
    empty: int
    truncated: int
    patients: int
    text: TextScores
    findings: NotRequired[FindingScores]  # of reports
    radeval: NotRequired[dict[str, float | None]]  # of reports
    multiple_choice: NotRequired[ChoiceScores]
    intervals: Intervals
    n: dict[str, int]  # metric path → patients that the value depends on
    baselines: NotRequired[dict[str, BaselineScores | ChoiceBaseline]]
    collapse: NotRequired[CollapsePair]  # of reports
    subgroups: NotRequired[list[SubgroupRow]]


# --- Results ----------------------------------------------------------------------------------------------------


class Counts(TypedDict):
    """What a predictions file contains."""

    predictions: int
    scans: int
    patients: int
    duplicate_ids: int
    missing_ids: int


class Exclusion(TypedDict):
    """Records left out for one reason, with the first ids."""

    count: int
    ids: list[str]


class Cohort(TypedDict):
    """What was scored, and what was left out and why."""

    predictions: int
    volumes: int | None
    scans: int
    patients: int
    excluded: dict[str, Exclusion]  # by reason


class ScoringSettings(TypedDict):
    """What the scores depend on in addition to the predictions."""

    finding_names: list[str]
    labeller: str
    bertscore_model: str | None
    bertscore_layers: int | None
    radeval: list[str]
    seed: int
    baselines: bool
    metadata: str | None


class Statistics(TypedDict):
    """How the intervals were computed."""

    unit: str
    method: str
    level: float
    labeller: str
    intervals: bool
    unknown_patients: int  # answers that name no patient


class AnswerStatistics(TypedDict):
    """Tokens and times of the answers to one task; None where they are unknown."""

    answers: int
    empty: int
    truncated: int
    tokens: int | None
    tokens_mean: float | None
    tokens_longest: int | None
    seconds_per_volume: float | None
    seconds_per_answer: float | None
    read_seconds_per_volume: float | None
    tokens_per_second: float | None


class GenerationReport(TypedDict):
    """What a run of answering did, over all its processes."""

    written: int
    resumed: int
    seconds: float
    new_tokens: int
    processes: int
    failures: int
    failure_kinds: dict[str, int]
    tasks: dict[str, AnswerStatistics]


class PositionBias(TypedDict):
    """How far answers depend on the position of the options: what `position_bias` returns."""

    questions: int
    incomplete: int
    patients: int
    accuracy: float | None
    accuracy_lowest: float | None
    accuracy_highest: float | None
    consistency: float | None
    named_by_letter: dict[str, float]
    accuracy_by_letter: dict[str, float]
    unparsed: int
    intervals: Intervals
    left_out: NotRequired[dict[str, int]]  # by reason


class Results(TypedDict):
    """The content of results.json."""

    schema: int
    code: dict[str, str]  # package → version; "source" is a hash of the evaluation code
    settings: ScoringSettings
    predictions_digest: str
    counts: Counts
    cohort: Cohort
    tasks: dict[str, TaskScores]
    statistics: Statistics
    not_available: dict[str, str]  # metric → reason and remedy
    notes: dict[str, str]  # metric → caveat
    # Added by `evaluate`, eval.py and the scoreboard.
    generation: NotRequired[GenerationReport]
    model: NotRequired[JsonObject]  # what the predictions are tied to
    position_bias: NotRequired[PositionBias]
    answers: NotRequired[dict[str, AnswerStatistics]]


class Difference(TypedDict):
    """One metric of two systems and the test of their difference."""

    first: float | None
    second: float | None
    difference: float | None  # second - first
    interval: Interval
    n: int
    p_value: float | None


class Comparison(TypedDict):
    """What `compare_predictions` returns."""

    matched: int
    only_first: int
    only_second: int
    permutations: int
    unknown_patients: int
    tasks: dict[str, dict[str, Difference]]
    not_available: dict[str, str]


# --- Calibration ------------------------------------------------------------------------------------------------


class CalibrationScores(TypedDict):
    """Calibration of probabilities: what `calibration_scores` returns."""

    n: int  # pairs of a scan and a finding
    positives: int
    bins: int
    ece: float | None
    brier: float | None
    nll: float | None
    intervals: Intervals
    ece_if_perfect: float  # mean error of perfectly calibrated predictions of the same n
    ece_if_perfect_range: list[float]  # 95 % of them


class FindingCalibration(TypedDict):
    """One finding in calibration.json; AUROC depends only on the order, which scaling keeps."""

    temperature: float
    bias: float
    auroc: float | None
    before: CalibrationScores
    after: CalibrationScores


class CalibrationReport(TypedDict):
    """The content of calibration.json; every `after` is cross-fitted: no patient's labels scaled his own probabilities."""

    disclaimer: str
    model: str
    data: str
    split: str
    source: str  # "findings head" or "statements"
    scaling: str
    folds: int
    seed: int
    patients: int
    scans: int
    before: CalibrationScores
    after: CalibrationScores
    other_scalings: dict[str, CalibrationScores]
    findings: dict[str, FindingCalibration]


# --- Judge ------------------------------------------------------------------------------------------------------

JudgeStatus = Literal["scored", "unparsed", "failed", "empty", "without_reference"]


class JudgeIdentity(TypedDict):
    """What a judge's replies depend on in addition to the prompt."""

    model: str
    max_tokens: NotRequired[int]
    temperature: NotRequired[float]
    local: NotRequired[bool]


class JudgedAnswer(TypedDict):
    """The judge's score of one row of a predictions file."""

    id: str | int | None
    task: Task
    score: float | None
    status: JudgeStatus
    texts: NotRequired[str]  # hash of reference and prediction


class JudgeTaskScores(TypedDict):
    """The judge's scores of one task."""

    count: int
    patients: int
    mean: float | None
    interval: Interval
    lowest_mean: float | None  # with unparsed and failed replies as 0
    highest: float
    scored: int
    unparsed: int
    failed: int
    empty: int
    without_reference: int
    shortened: int
    of: NotRequired[int]  # rows with a reference, judged or not


class JudgeResults(TypedDict):
    """The content of judge.json."""

    prompt_version: str
    judge: JudgeIdentity
    ranges: int
    tasks: dict[str, JudgeTaskScores]
    scores: list[JudgedAnswer]
    foreign: NotRequired[int]  # scores of other answers
