"""Records: one question and answer about one volume, made from the rows of tables.

A record is a row of a `datasets.Dataset` with the columns of `FEATURES`, described in `samf.data.schema.Record`. Records of
CT-RATE's v1 volumes also have `rescale`, for `read_ct`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import datasets

from samf.data.ct_rate.names import VolumeName, volume_stem
from samf.data.load_stats import LoadStats
from samf.data.schema import Exchange, Record

FEATURES = datasets.Features(
    {
        "volume": datasets.Value("string"),
        "task": datasets.Value("string"),
        "question": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("string"),
        "id": datasets.Value("string"),
        "scan_id": datasets.Value("string"),
        "patient_id": datasets.Value("string"),
        "finding_labels": datasets.List(datasets.Value("int8")),
    }
)
RESCALED_FEATURES = datasets.Features({**FEATURES, "rescale": datasets.List(datasets.Value("float64"))})


class _UniqueIds:
    """A function that makes repeated ids unique: x, x#2, x#3, … in order of appearance."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __call__(self, name: str) -> str:
        """Return `name`, with a number if it has been seen before."""
        name = name.replace("#", "_")
        self._counts[name] += 1
        return name if self._counts[name] == 1 else f"{name}#{self._counts[name]}"


class VolumeChoice:
    """The choice of the volumes to use, and their paths; whether a volume exists is not checked.

    Args:
        locate: returns the path or address of a volume by its name.
        load_stats: counts the volumes that are left out.
        excluded: {volume: why it is left out}.
        reconstructions: {scan_id: number of the reconstruction to use}; None uses all. Of a scan that is not in it, the
            first reconstruction seen is used.
    """

    def __init__(
        self,
        locate: Callable[[str], str],
        load_stats: LoadStats,
        *,
        excluded: Mapping[VolumeName, str] | None = None,
        reconstructions: dict[str, int] | None = None,
    ):
        self._locate, self._load_stats = locate, load_stats
        self._excluded, self._reconstructions = excluded or {}, reconstructions
        self._paths: dict[str, str] = {}  # by name

    def path(self, name: str, volume: VolumeName | None) -> str | None:
        """Return the path of a volume by its name; None, counted with the reason, if it is not to be used."""
        if volume is not None and (reason := self._reason_to_leave_out(volume)):
            self._load_stats.drop(reason, name)
            return None
        if name not in self._paths:
            self._paths[name] = self._locate(name)
        return self._paths[name]

    def _reason_to_leave_out(self, volume: VolumeName) -> str | None:
        if volume in self._excluded:
            return self._excluded[volume]
        if self._reconstructions is None:
            return None
        used = self._reconstructions.setdefault(volume.scan_id, volume.reconstruction)
        return None if used == volume.reconstruction else "another reconstruction of the scan is used"


class RecordBuilder:
    """A maker of records from rows of tables, which counts them.

    Args:
        volumes: which volumes are used, and their paths.
        load_stats: counts the records, and what is left out.
        tasks: some of TASKS; exchanges of other tasks are left out without being counted.
        labels: {volume: finding labels}; None gives records without labels.
        rescale: {volume: slope, intercept and voxel size for `read_ct`}; None where the volumes hold HU.
        unknown: the finding labels of a volume that `labels` lacks.
    """

    def __init__(
        self,
        volumes: VolumeChoice,
        load_stats: LoadStats,
        tasks: Collection[str],
        *,
        labels: Mapping[VolumeName, list[int]] | None = None,
        rescale: Mapping[VolumeName, list[float]] | None = None,
        unknown: Sequence[int] = (),
    ):
        self.load_stats = load_stats
        self._volumes, self._tasks = volumes, tasks
        self._labels, self._rescale, self._unknown = labels, rescale, list(unknown)
        self._unique = _UniqueIds()

    def record(
        self,
        name: str | None,
        record_id: str,
        exchange: Exchange,
        patient: str | None = None,
        *,
        scan: str | None = None,
        labels: list[int] | None = None,
    ) -> Record | None:
        """Return a complete record, or None where its task or its volume isn't used.

        Args:
            name: the volume's name or path in the table; None for text only.
            record_id: made unique by a number where it repeats.
            exchange: the question and its answer.
            patient: the table's; None takes the patient from CT-RATE's names.
            scan: the table's; None takes the scan from CT-RATE's names, else the volume is one.
            labels: the table's finding labels; None takes those of the volume's name.
        """
        record_id = self._unique(record_id)  # before anything is left out: ids must not depend on what is chosen
        if exchange["task"] not in self._tasks:
            return None
        volume = VolumeName.find(name) if name else None
        path = self._volumes.path(name, volume) if name else None
        if name and path is None:
            return None
        record: Record = {
            "volume": path,
            "id": record_id,
            "scan_id": scan or (volume.scan_id if volume else (name or record_id)),
            "patient_id": patient or (volume.patient_id if volume else None),
            "finding_labels": self._finding_labels(volume) if labels is None else labels,
            "task": exchange["task"],
            "question": exchange["question"],
            "choices": exchange["choices"],
            "answer": exchange["answer"],
        }
        if self._rescale is not None:
            record["rescale"] = self._rescale.get(volume) if volume else None
            if name and record["rescale"] is None:
                self.load_stats.drop("v1 volume without slope and intercept in the metadata", name)
                return None
        self.load_stats.kept[exchange["task"]] += 1
        return record

    def report(
        self,
        name: str,
        question: str,
        answer: str,
        patient: str | None = None,
        *,
        scan: str | None = None,
        labels: list[int] | None = None,
    ) -> Record | None:
        """Return the record of a report; None, counted, for an empty `answer`.

        Args:
            name: the volume's name or path in the table.
            question: the request for a report.
            answer: the report.
            patient: as for `record`.
            scan: as for `record`; the record's id has it.
            labels: as for `record`.
        """
        if not answer:
            self.load_stats.drop("report without text", name)
            return None
        exchange: Exchange = {"task": "report", "question": question, "choices": None, "answer": answer}
        return self.record(name, f"report_{scan or volume_stem(name)}", exchange, patient, scan=scan, labels=labels)

    def _finding_labels(self, volume: VolumeName | None) -> list[int]:
        if self._labels is None:
            return []
        return self._labels.get(volume, self._unknown) if volume else self._unknown
