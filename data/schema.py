"""Types of what flows through the system: records, predictions, and the values that options may take."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, Protocol, TypeAlias, TypedDict, get_args

import numpy as np

from samf.model.configuration_samf import IGNORE_INDEX

__all__ = [
    "FAILURES_FILE",
    "IGNORE_INDEX",
    "TASKS",
    "JsonObject",
    "OnError",
    "Prediction",
    "Record",
    "Task",
    "VolumeStore",
]

Task = Literal["report", "multiple_choice", "short_answer", "long_answer"]
TASKS: tuple[Task, ...] = get_args(Task)

# What to do about a volume or a record that can't be read: stop with its error, or leave it out and go on.
OnError = Literal["raise", "skip"]

# One JSON object a line for each record that has no answer, in the folder of the answers.
FAILURES_FILE = "failures.jsonl"

# A parsed JSON object whose keys are not known in advance (settings of other libraries, files of users).
JsonObject: TypeAlias = dict[str, Any]


class Record(TypedDict):
    """One question and answer about one volume: a row of the `datasets.Dataset`s that training and evaluation read."""

    volume: str | None  # absolute path or address; None for text alone
    task: Task
    question: str
    choices: list[str] | None  # option texts of a multiple-choice question
    answer: str  # of multiple choice: "(b) text of option b"
    id: str  # unique
    scan_id: str
    patient_id: str | None
    finding_labels: list[int]  # 1, 0 or IGNORE_INDEX, in the order of `finding_names`; empty without a label file
    rescale: NotRequired[Sequence[float] | None]  # slope and intercept for `read_ct`


class Prediction(TypedDict):
    """One line of predictions.jsonl."""

    id: str
    scan_id: str
    task: Task
    question: str
    choices: list[str] | None
    reference: str
    prediction: str
    patient_id: NotRequired[str | None]
    volume: NotRequired[str | None]  # the one that was read, where it isn't the record's own
    tokens: NotRequired[int]
    truncated: NotRequired[bool]


class VolumeStore(Protocol):
    """Prepared volumes: a slice cache, an embedding cache, or volumes kept in memory."""

    def get(self, path: str, *, rescale: Sequence[float] | None = None) -> Mapping[str, np.ndarray]:
        """Return the slices or the embeddings of a volume."""
        ...
