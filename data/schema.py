"""Types of what flows through the system: records, volumes, and the values that options may take."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, Protocol, TypeAlias, TypedDict, get_args

import numpy as np

from samf.model.constants_samf import IGNORE_INDEX
from samf.model.ct_common import VolumeRef

__all__ = [
    "FAILURES_FILE",
    "IGNORE_INDEX",
    "TASKS",
    "Exchange",
    "ChatMessage",
    "ContentBlock",
    "JsonObject",
    "OnError",
    "OnMissing",
    "Record",
    "Task",
    "VolumeLike",
    "VolumeStore",
    "VqaEntry",
    "VqaTurn",
    "volume_of",
]

Task = Literal["report", "multiple_choice", "short_answer", "long_answer"]
TASKS: tuple[Task, ...] = get_args(Task)

# What to do about a volume or a record that can't be read: raise its error, or leave it out and continue.
OnError = Literal["raise", "skip"]

# What to do about a volume that a table names but that isn't there: raise an error, leave its records out, or not check.
OnMissing = Literal["raise", "skip", "keep"]

# One JSON object per line for each record without an answer, in the folder of the answers.
FAILURES_FILE = "failures.jsonl"

# A parsed JSON object whose keys are not known in advance (settings of other libraries, files of users).
JsonObject: TypeAlias = dict[str, Any]

# A volume: its path or address, or that and its rescale.
VolumeLike: TypeAlias = str | os.PathLike[str] | VolumeRef


class Exchange(TypedDict):
    """A question and its answer, before they are joined with a volume."""

    task: Task
    question: str
    choices: list[str] | None  # option texts of a multiple-choice question
    answer: str  # of multiple choice: "(b) text of option b"


class Record(Exchange):
    """One question and answer about one volume: a row of the `datasets.Dataset`s that training and evaluation read."""

    volume: str | None  # absolute path or address; None for text only
    id: str  # unique
    scan_id: str
    patient_id: str | None  # None where it is unknown; see `samf.data.patients`
    finding_labels: list[int]  # 1, 0 or IGNORE_INDEX, in the order of `finding_names`; empty without a label file
    rescale: NotRequired[
        Sequence[float] | None
    ]  # slope, intercept and voxel size for `read_ct`; None = the file holds HU
    length: NotRequired[int]  # tokens of question, choices and answer, where `add_lengths` has counted them


class ContentBlock(TypedDict):
    """Content block of a chat message: a text, or a volume."""

    type: Literal["text", "volume"]
    text: NotRequired[str]
    volume: NotRequired[object]  # whatever the processor takes


class ChatMessage(TypedDict):
    """Chat message of a record, for `apply_chat_template`."""

    role: Literal["user", "assistant"]
    content: list[ContentBlock]


# One turn of a conversation in a VQA file; the values come from a file, so that their types are checked.
VqaTurn = TypedDict("VqaTurn", {"from": object, "value": object, "type": object}, total=False)


class VqaEntry(TypedDict, total=False):
    """One entry of a VQA file."""

    id: object
    image: object
    conversations: object


class VolumeStore(Protocol):
    """Prepared volumes: a slice cache, an embedding cache, or volumes kept in memory."""

    def get(self, volume: VolumeLike, /) -> Mapping[str, np.ndarray]:
        """Return the slices or the embeddings of a volume."""
        ...


def volume_of(record: Record) -> VolumeRef | None:
    """Return the volume of a record with its rescale; None for text only."""
    path = record["volume"]
    return None if path is None else VolumeRef.of(path, record.get("rescale") or None)
