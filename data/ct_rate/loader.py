"""CT-RATE, and the SAMF paper's own CSVs, as Datasets of records (see `samf.data.records`).

CT-RATE: https://huggingface.co/datasets/ibrahimhamamci/CT-RATE
"""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samf.data.ct_rate.names import VolumeName, volume_path
from samf.data.ct_rate.questions import settle_answer, split_options
from samf.data.ct_rate.sources import CtRateFolder, CtRateHub, CtRateSource, is_hub_name
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
from samf.data.patient_splits import check_patient_overlap, refuse_common_patients
from samf.data.patients import PatientRule, patient_of, patients_of, settle_patients
from samf.data.record_cache import in_memory, load_or_make
from samf.data.records import FEATURES, RESCALED_FEATURES, SECTIONS, RecordReader, VolumeChoice
from samf.data.schema import IGNORE_INDEX, TASKS
from samf.model.ct_download import file_path, is_address
from samf.utils.distributed import Processes
from samf.utils.text_files import open_csv

logger = logging.getLogger(__name__)

__all__ = [
    "CT_RATE_LABELS",
    "FEATURES",
    "TASKS",
    "CtRateFolder",
    "VolumeName",
    "check_patient_overlap",
    "load_ct_rate",
    "load_records",
    "load_samf_csv",
    "patient_of",
    "patients_of",
    "read_json_array",
    "refuse_common_patients",
    "settle_answer",
    "split_options",
    "volume_path",
]

RECONSTRUCTIONS = ("all", "first", "sample")
ON_MISSING = ("error", "skip", "keep")
LISTED = 10


def check_choice(name: str, values: Collection[str], allowed: Collection[str]) -> None:
    """Raise ValueError for no value, or one that isn't allowed."""
    if not values or (unknown := set(values) - set(allowed)):
        raise ValueError(f"{name}={sorted(unknown) if values else values}; expected some of {', '.join(allowed)}.")


# ---- CT-RATE -------------------------------------------------------------------------------------------------------


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
    on_missing: str = "error",
    layout: str | None = None,
    cache_dir: str | Path | None = None,
    counts_file: str | Path | None = None,
) -> datasets.Dataset:
    """CT-RATE (v1 or v2) as a Dataset of records, from a folder or from the Hub.

    Reports come from the reports CSV; the VQA file's `report_generation` records are used only where there is no CSV,
    since they repeat it. A conversation of several turns becomes a record a turn. What is left out is counted by
    reason in the log: volumes that no_chest_*.txt lists, reports without text, unusable questions. Large tables are
    read once into an Arrow file in the cache (`samf.data.record_cache`), which needs no memory.

    Args:
        root: CT-RATE's folder, or the one that holds its `dataset` folder; or a data set of its layout on the Hub,
            owner/name or owner/name@revision. Then tables are fetched here, and each volume when it is read.
        split: "train" or "valid" (or "validation").
        tasks: of TASKS; None takes those whose files are there.
        report_sections: of SECTIONS. Several are joined under their names; a report lacking the first is left out.
            "clinical_information" becomes part of the question.
        reconstructions: of each scan: "all"; "first", the lowest numbered; "sample", one by `reconstruction_seed`.
        vqa_files: VQA JSON files by path, or by name below the data set; None takes vqa/{split}_vqa.json.
        finding_names: columns of the label CSV that become `finding_labels`, in this order.
        on_missing: volumes named but absent: "error" lists them, "skip" leaves their records out and counts them,
            "keep" doesn't look. On the Hub nobody looks before a volume is read.
        layout: "v1" or "v2" where a folder holds both; None takes v2 then.
        cache_dir: of the Arrow files; default: a folder in the cache of `datasets`.
        counts_file: JSON file that gets the counts, by task and by reason.

    Volumes of v1 hold raw stored values under blank headers. Their records carry `rescale`, for
    `read_ct(path, rescale=...)`: slope, intercept and the voxel's size by the metadata CSV. Prefer v2.

    Raises:
        FileNotFoundError: the layout, a file that a task needs, or volumes are missing.
        PermissionError: the data set on the Hub is gated; says how to get access.
        ValueError: an unknown option, a table without a column that it needs, a broken VQA file.
    """
    check_choice("report_sections", report_sections, SECTIONS)
    check_choice("report_sections", set(report_sections) - {"clinical_information"}, SECTIONS)
    check_choice("reconstructions", [reconstructions], RECONSTRUCTIONS)
    check_choice("on_missing", [on_missing], ON_MISSING)
    if tasks is not None:
        check_choice("tasks", tasks, TASKS)
    source = open_source(root, split, layout)
    questions = _question_files(source, tasks, vqa_files)
    tasks = choose_tasks(tasks, source, questions)
    chosen = {
        "report_sections": list(report_sections),
        "reconstructions": reconstructions,
        "reconstruction_seed": reconstruction_seed,
        "finding_names": list(finding_names),
    }
    described = {"source": str(source.root), "split": source.split, "layout": source.layout, "tasks": list(tasks)}
    options = {**described, **chosen}
    dataset, load_stats = load_or_make(
        partial(_read_split, source, questions, tasks, **chosen),
        RESCALED_FEATURES if source.layout == "v1" else FEATURES,
        _tables(source, questions, options),
        options,
        cache_dir,
    )
    dataset = check_volumes(dataset, on_missing, load_stats)
    load_stats.log(f"{source.root} {source.split} ({source.layout})")
    if counts_file is not None:
        load_stats.save(counts_file, **options)
    return dataset


def open_source(root: str | Path, split: str, layout: str | None = None) -> CtRateSource:
    """A folder, or where there is none and the name reads like one on the Hub, a data set there."""
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


def choose_tasks(tasks: Sequence[str] | None, source: CtRateSource, vqa_files: Sequence[Path]) -> tuple[str, ...]:
    """The tasks to read; an error where one that was asked for has no file."""
    wanted = TASKS if tasks is None else tuple(tasks)
    possible = [task for task in wanted if vqa_files or (task == "report" and source.reports)]
    if not possible or (tasks is not None and len(possible) < len(wanted)):
        absent = ", ".join(task for task in wanted if task not in possible)
        raise FileNotFoundError(
            f"{source.root}: nothing to read {absent} from; expected radiology_text_reports/*_reports.csv for reports "
            f"and vqa/{source.split}_vqa.json (or vqa_files=...) for questions. Of a data set in another layout name the "
            f"columns: --volume_column, and --report_column or --question_column with --answer_column."
        )
    return tuple(possible)


def _tables(source: CtRateSource, questions: Sequence[Path], options: dict[str, Any]) -> list[Path]:
    """All files that records of these options depend on."""
    needed = [source.no_chest, *questions]
    if "report" in options["tasks"]:
        needed.append(source.reports)
    if options["reconstructions"] != "all":
        needed.append(volume_list(source))
    if source.layout == "v1":
        needed.append(source.metadata)
    if options["finding_names"]:
        needed.append(source.labels)
    return [path for path in needed if path is not None]


def _read_split(
    source: CtRateSource,
    vqa_files: Sequence[Path],
    tasks: Collection[str],
    load_stats: LoadStats,
    *,
    report_sections: Sequence[str],
    reconstructions: str,
    reconstruction_seed: int,
    finding_names: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """All records of a split: reports, then the VQA files in the order given."""
    excluded = read_no_chest(source.no_chest)
    chosen = choose_reconstructions(source, excluded, reconstructions, reconstruction_seed)
    volumes = VolumeChoice(source.locate, load_stats, excluded=excluded, reconstructions=chosen)
    rescale = None
    if source.layout == "v1":
        rescale = read_rescale(source.metadata)
        logger.warning("%s: v1 volumes; HU and voxel sizes by the metadata.", source.root)
    labels = read_labels(source.labels if finding_names else None, finding_names)
    unknown = [IGNORE_INDEX] * len(finding_names)
    reader = RecordReader(volumes, load_stats, tasks, labels=labels, rescale=rescale, unknown=unknown)
    from_csv = "report" in tasks and source.reports is not None
    if from_csv:
        yield from reader.reports(source.reports, report_sections)
    if not from_csv or set(tasks) != {"report"}:
        for path in vqa_files:
            yield from reader.vqa(path, skip_reports=from_csv)


def check_volumes(dataset: datasets.Dataset, on_missing: str, load_stats: LoadStats) -> datasets.Dataset:
    """The records whose volumes are there. Addresses aren't looked at.

    Args:
        on_missing: "error" raises FileNotFoundError with a list, "skip" leaves records out, "keep" doesn't look.
        load_stats: of these records; brought up to date.
    """
    if on_missing == "keep":
        return dataset
    paths = [path for path in dataset.unique("volume") if path is not None and not is_address(path)]
    # A file or a DICOM folder. One process looks for all: they must have the same records.
    missing = Processes().from_first(lambda: [path for path in paths if not os.path.exists(path)])
    if not missing:
        return dataset
    if on_missing == "error":
        listed = "\n  ".join(missing[:LISTED])
        more = f"\n  and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} volumes that the records name are missing:\n  {listed}{more}\n"
            f"Complete the download, or go without them: on_missing='skip' (--on_missing skip of preprocess.py, "
            f"pretrain_encoder.py and warmup_aggregator.py; --on_error skip of train.py and eval.py)."
        )
    is_missing = pc.is_in(dataset.data.column("volume"), value_set=pa.array(missing)).to_numpy()
    load_stats.drop("volume file missing", missing[0], int(is_missing.sum()))
    load_stats.kept.subtract(Counter(dataset.data.column("task").filter(pa.array(is_missing)).to_pylist()))
    return dataset.select(np.flatnonzero(~is_missing))


# ---- the paper's CSVs ----------------------------------------------------------------------------------------------


def load_samf_csv(
    report_csv: str | Path | None,
    mcq_csv: str | Path | None,
    image_root: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    on_missing: str = "error",
    patient_column: str | None = None,
    counts_file: str | Path | None = None,
) -> datasets.Dataset:
    """The SAMF paper's own CSVs as a Dataset of records.

    Args:
        report_csv: columns image, caption; or None.
        mcq_csv: columns Question ID, Image, Question, Choice A to D, Answer Choice, Answer; or None.
        image_root: the folder that the images' paths start from. Where an image isn't there, CT-RATE's v2 and v1
            folders below it are tried.
        tasks: of ("report", "multiple_choice"); None takes both.
        on_missing, counts_file: as for `load_ct_rate`.
        patient_column: of the patients; default: `patient_id`, where there is one.
    """
    root, load_stats = Path(image_root).expanduser().absolute(), LoadStats()
    check_choice("on_missing", [on_missing], ON_MISSING)
    if tasks is not None:
        check_choice("tasks", tasks, TASKS)

    def locate(name: str) -> str:
        name = file_path(name)
        if is_address(name):
            return name
        places = [root / name]
        if VolumeName.find(name):
            places += [volume_path(root, name, "v2"), volume_path(root, name, "v1")]
        return str(next((path for path in places if path.exists()), places[0]))

    reader = RecordReader(VolumeChoice(locate, load_stats), load_stats, tasks or ("report", "multiple_choice"))

    def records() -> Iterator[dict[str, Any]]:
        if report_csv is not None:
            yield from reader.captions(Path(report_csv), patient_column)
        if mcq_csv is not None:
            yield from reader.choices(Path(mcq_csv), patient_column)

    dataset = check_volumes(in_memory(records(), FEATURES), on_missing, load_stats)
    source = " and ".join(str(path) for path in (report_csv, mcq_csv) if path is not None)
    load_stats.log(source)
    if counts_file is not None:
        load_stats.save(counts_file, source=source)
    return dataset


# ---- any source ----------------------------------------------------------------------------------------------------


class RecordLoader(Protocol):
    """What loads a layout of its own."""

    def load(self, source: str | Path, split: str, **options: Any) -> datasets.Dataset: ...


def load_records(
    source: str | Path,
    split: str,
    *,
    columns: RecordLoader | None = None,
    patient_rule: PatientRule | None = None,
    patient_column: str | None = None,
    **options: Any,
) -> datasets.Dataset:
    """Records from any source that is understood: the one function that scripts call.

    Args:
        source: CT-RATE's folder or its name on the Hub, such as ibrahimhamamci/CT-RATE (`load_ct_rate`); or one of the
            paper's CSVs, or two with a comma between them (`load_samf_csv`), in whose paths "{split}" stands for the
            split; then `image_root` is the images' folder, by default the CSV's.
        split: "train" or "valid".
        columns: of a data set in any other layout (`samf.data.table_columns.TableColumns`), which then loads it.
        patient_rule: whose volume is whose, by its place; see `samf.data.patients`.
        patient_column: of a CSV.
        options: the loader's own; a CSV has no use for `finding_names`, `vqa_files` and `cache_dir`.
    """
    if columns is not None:
        records = columns.load(source, split, **options)
    else:
        records = _load_known_layout(source, split, patient_column=patient_column, **options)
    root = options.get("image_root") or Path(source).expanduser().absolute()
    root = Path(root).expanduser().absolute()
    return settle_patients(records, str(source), patient_rule, str(root if root.is_dir() else root.parent))


def _load_known_layout(source: str | Path, split: str, **options: Any) -> datasets.Dataset:
    """CT-RATE's layout or the paper's CSVs."""
    named = str(source).replace("{split}", split)
    path = Path(named).expanduser()
    files = [path] if path.exists() else [Path(part.strip()).expanduser() for part in named.split(",")]
    if all(file.suffix == ".csv" and file.is_file() for file in files):
        return _load_csv_files(files, **options)
    if path.is_dir() or is_hub_name(named):
        if options.pop("patient_column", None) is not None:
            raise ValueError("patient_column is of a table; in CT-RATE's layout the names tell, or --patient_rule.")
        return load_ct_rate(named, split, **options)
    raise FileNotFoundError(
        f"{path}: no such folder or CSV. Give CT-RATE's folder, one or two of the paper's CSV files, the name of a data "
        f"set on the Hub (ibrahimhamamci/CT-RATE), or a table in another layout with --volume_column."
    )


def _load_csv_files(files: Sequence[Path], image_root: str | Path | None = None, **options: Any) -> datasets.Dataset:
    """One or both of the paper's CSVs, told apart by their columns."""
    by_kind: dict[bool, Path] = {}
    for file in files:
        with open_csv(file) as rows:
            is_report = "caption" in (rows.fieldnames or [])
        if is_report in by_kind:
            kind = "reports" if is_report else "multiple choice"
            raise ValueError(f"{by_kind[is_report]} and {file} both hold {kind}; give one of each.")
        by_kind[is_report] = file
    kept = {name: value for name, value in options.items() if name not in ("finding_names", "vqa_files", "cache_dir")}
    return load_samf_csv(by_kind.get(True), by_kind.get(False), image_root or files[0].parent, **kept)
