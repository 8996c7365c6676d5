"""CT-RATE as a Dataset of records (see `samf.data.records`).

CT-RATE: https://huggingface.co/datasets/ibrahimhamamci/CT-RATE
"""

import importlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import datasets

from samf.data.ct_rate.names import VolumeName, volume_path
from samf.data.ct_rate.rows import SECTIONS, report_records, vqa_records
from samf.data.ct_rate.sources import CtRateFolder, CtRateHub, CtRateSource, CtRateStore, is_hub_name
from samf.data.ct_rate.tables import (
    CT_RATE_LABELS,
    choose_reconstructions,
    read_json_array,
    read_labels,
    read_no_chest,
    read_rescale,
    volume_list,
)
from samf.data.load_stats import LoadStats
from samf.data.missing_volumes import check_volumes
from samf.data.options import check_choice, check_on_missing
from samf.data.patient_splits import check_patient_overlap, refuse_common_patients
from samf.data.patients import patient_of, patients_of
from samf.data.record_cache import load_or_make
from samf.data.records import FEATURES, RESCALED_FEATURES, RecordBuilder, VolumeChoice
from samf.data.schema import IGNORE_INDEX, TASKS, JsonObject, Record, Task
from samf.data.texts import settle_answer, split_options
from samf.model.ct_object_store import is_store_address

logger = logging.getLogger(__name__)

__all__ = [
    "CT_RATE_LABELS",
    "FEATURES",
    "TASKS",
    "CtRateFolder",
    "VolumeName",
    "check_patient_overlap",
    "load_ct_rate",
    "patient_of",
    "patients_of",
    "read_json_array",
    "refuse_common_patients",
    "settle_answer",
    "split_options",
    "volume_path",
]

Reconstructions = Literal["all", "first", "sample"]
_MOVED = {"load_records": "samf.data.loading", "load_samf_csv": "samf.data.samf_csv"}


def __getattr__(name: str) -> Any:
    """Return a function that has moved to another module; for one release."""
    if name in _MOVED:
        return getattr(importlib.import_module(_MOVED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class ContentOptions(TypedDict):
    """Options of `load_ct_rate` that decide what records contain; the counts file has them too."""

    report_sections: list[str]
    reconstructions: str
    reconstruction_seed: int
    finding_names: list[str]


def load_ct_rate(
    root: str | Path,
    split: str,
    *,
    tasks: Sequence[str] | None = None,
    report_sections: Sequence[str] = ("findings",),
    reconstructions: str = "all",
    reconstruction_seed: int = 0,
    vqa_files: Sequence[str | Path] | None = None,
    finding_names: Sequence[str] = (),
    on_missing: str = "raise",
    layout: str | None = None,
    cache_dir: str | Path | None = None,
    counts_file: str | Path | None = None,
) -> datasets.Dataset:
    """Load CT-RATE (v1 or v2) as a Dataset of records, from a folder or from the Hub.

    Reports are read from the reports CSV; those of the VQA file, which repeat them, only without a CSV. A conversation of
    several turns gives one record per exchange. The log counts by reason what is left out: volumes listed in no_chest_*.txt,
    reports without text, unusable questions. Large tables become a memory-mapped Arrow file (`samf.data.record_cache`).

    Records of v1 volumes, which hold raw values under blank headers, have the metadata's `rescale` for `read_ct`; prefer v2.

    Args:
        root: CT-RATE's folder, or the one that holds its `dataset` folder; its address in an object store; or a data set
            of its layout on the Hub, owner/name or owner/name@revision. From stores and the Hub, tables are fetched now,
            each volume when it is read.
        split: "train" or "valid" (or "validation").
        tasks: some of TASKS; None takes those that have a file.
        report_sections: some of SECTIONS. Several are joined under their names; a report without the first is left out.
            "clinical_information" becomes part of the question.
        reconstructions: of each scan "all", "first" (the lowest numbered), or "sample" (a random one).
        reconstruction_seed: for "sample".
        vqa_files: VQA JSON files, by path or by name below the data set; None takes vqa/{split}_vqa.json.
        finding_names: columns of the label CSV that become `finding_labels`, in this order.
        on_missing: for absent volumes: "raise" lists them in an error, "skip" leaves their records out and counts them,
            "keep" doesn't check. Volumes on the Hub and in stores are not checked before they are read.
        layout: "v1" or "v2" where a folder holds both; None takes v2.
        cache_dir: folder for the Arrow files; default: one in the cache of `datasets`.
        counts_file: JSON file for the counts by task and by reason.

    Raises:
        FileNotFoundError: the layout, a file that a task needs, or volumes are missing.
        PermissionError: the data set on the Hub is gated; says how to get access.
        ValueError: an unknown option, a table without a column that it needs, or a broken VQA file.
    """
    on_missing = check_on_missing(on_missing)
    content: ContentOptions = {
        "report_sections": list(report_sections),
        "reconstructions": reconstructions,
        "reconstruction_seed": reconstruction_seed,
        "finding_names": list(finding_names),
    }
    reader = _open_split(root, split, layout, tasks, vqa_files, content)
    options = reader.described()
    records, load_stats = load_or_make(reader.read, reader.features, reader.tables(), options, cache_dir)
    records = check_volumes(records, on_missing, load_stats)
    load_stats.log(f"{options['source']} {options['split']} ({options['layout']})")
    if counts_file is not None:
        load_stats.save(counts_file, **options)
    return records


def _open_split(
    root: str | Path,
    split: str,
    layout: str | None,
    tasks: Sequence[str] | None,
    vqa_files: Sequence[str | Path] | None,
    content: ContentOptions,
) -> "_SplitReader":
    """Check the options and find the files of a split."""
    sections = content["report_sections"]
    check_choice("report_sections", sections, SECTIONS)
    check_choice("report_sections", set(sections) - {"clinical_information"}, SECTIONS)
    check_choice("reconstructions", [content["reconstructions"]], get_args(Reconstructions))
    if tasks is not None:
        check_choice("tasks", tasks, TASKS)
    source = _open_source(root, split, layout)
    questions = _question_files(source, tasks, vqa_files)
    return _SplitReader(source, questions, _choose_tasks(tasks, source, questions), content)


def _open_source(root: str | Path, split: str, layout: str | None) -> CtRateSource:
    """Open a folder; a store; or a data set on the Hub, if there is no such folder and the name can be one of a data set."""
    if is_store_address(str(root)):
        return CtRateStore(str(root), split, layout)
    if is_hub_name(str(root)) and not Path(root).expanduser().exists():
        return CtRateHub(str(root), split, layout)
    return CtRateFolder(root, split, layout)


def _question_files(
    source: CtRateSource, tasks: Sequence[str] | None, vqa_files: Sequence[str | Path] | None
) -> list[Path]:
    if vqa_files is not None:
        return [source.find_vqa(name) for name in vqa_files]
    if tasks is not None and set(tasks) == {"report"} and source.reports is not None:
        return []  # a gigabyte that need not be fetched
    return [path for path in [source.vqa] if path is not None]


def _choose_tasks(tasks: Sequence[str] | None, source: CtRateSource, questions: Sequence[Path]) -> tuple[Task, ...]:
    """Return the tasks to read. Raises FileNotFoundError if one that was asked for has no file."""
    wanted = TASKS if tasks is None else tuple(known for task in tasks for known in TASKS if known == task)
    possible = tuple(task for task in wanted if questions or (task == "report" and source.reports))
    if not possible or (tasks is not None and len(possible) < len(wanted)):
        absent = ", ".join(task for task in wanted if task not in possible)
        raise FileNotFoundError(
            f"{source.root}: nothing to read {absent} from; expected radiology_text_reports/*_reports.csv for reports "
            f"and vqa/{source.split}_vqa.json (or vqa_files=...) for questions. For a data set in another layout, name its "
            f"columns: --volume_column, and --report_column or --question_column with --answer_column."
        )
    return possible


@dataclass(frozen=True)
class _SplitReader:
    """Reads the records of a split from its files."""

    source: CtRateSource
    questions: list[Path]  # VQA files, in the order in which they are read
    tasks: tuple[Task, ...]
    content: ContentOptions

    @property
    def features(self) -> datasets.Features:
        return RESCALED_FEATURES if self.source.layout == "v1" else FEATURES

    def described(self) -> JsonObject:
        """Return the options that decide which records there are, as JSON has them."""
        source = self.source
        where = {"source": str(source.root), "split": source.split, "layout": source.layout, "tasks": list(self.tasks)}
        return {**where, **self.content}

    def tables(self) -> list[Path]:
        """Return all files that the records depend on."""
        source = self.source
        needed = [source.no_chest, *self.questions]
        if "report" in self.tasks:
            needed.append(source.reports)
        if self.content["reconstructions"] != "all":
            needed.append(volume_list(source))
        if source.layout == "v1":
            needed.append(source.metadata)
        if self.content["finding_names"]:
            needed.append(source.labels)
        return [path for path in needed if path is not None]

    def read(self, load_stats: LoadStats) -> Iterator[Record]:
        """Yield all records: those of reports, then those of the VQA files."""
        source, tasks, builder = self.source, self.tasks, self._builder(load_stats)
        reports = source.reports if "report" in tasks else None
        if reports is not None:
            yield from report_records(builder, reports, self.content["report_sections"])
        if reports is None or set(tasks) != {"report"}:
            for path in self.questions:
                yield from vqa_records(builder, path, skip_reports=reports is not None)

    def _builder(self, load_stats: LoadStats) -> RecordBuilder:
        source, content = self.source, self.content
        excluded = read_no_chest(source.no_chest)
        reconstructions = choose_reconstructions(
            source, excluded, content["reconstructions"], content["reconstruction_seed"]
        )
        rescale = None
        if source.layout == "v1":
            rescale = read_rescale(source.metadata)
            logger.warning("%s: v1 volumes; HU and voxel sizes are taken from the metadata.", source.root)
        names = content["finding_names"]
        return RecordBuilder(
            VolumeChoice(source.locate, load_stats, excluded=excluded, reconstructions=reconstructions),
            load_stats,
            self.tasks,
            labels=read_labels(source.labels if names else None, names),
            rescale=rescale,
            unknown=[IGNORE_INDEX] * len(names),
        )
