"""`samf report`, `samf ask` and `samf info`: scans to reports, answers, and facts about their files."""

import dataclasses
import functools
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from tqdm import tqdm

from samf.utils.files import write_json

if TYPE_CHECKING:
    from samf.model.pipeline_samf import SamfReportPipeline
    from samf.model.report_samf import Report

SOME_FAILED, ALL_FAILED = 1, 2


class UsageError(Exception):
    """An input that nothing can be done with; the message goes to the user as one line."""


def find_scans(paths: Sequence[str]) -> list[str]:
    """Return the scans that paths, globs, folders and addresses name, each once and in order.

    Args:
        paths: files, DICOM folders, folders with volumes or DICOM folders below them, addresses, or patterns with `*`.

    Raises:
        UsageError: a path that isn't there, or a folder or pattern without a scan.
    """
    from samf.data.volume_discovery import search_volumes
    from samf.model.ct_download import is_address

    found: dict[str, None] = {}
    for path in paths:
        names = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not Path(path).exists() else [path]
        if not names:
            raise UsageError(f"{path}: no file fits this pattern.")
        for name in names:
            if is_address(name) or Path(name).is_file():
                found[name] = None
            elif not Path(name).is_dir():
                raise UsageError(f"{name}: no such file or folder.")
            else:
                try:
                    found |= dict.fromkeys(volume.path for volume in search_volumes([name]).volumes)
                except FileNotFoundError as error:
                    raise UsageError(f"{name}: no scan in it or below it: {error}") from error
    return list(found)


def load_reporter(model: str, device: str, revision: str | None) -> "SamfReportPipeline":
    """Return the pipeline of a model.

    Args:
        model: folder or Hub id.
        device: "auto" takes the accelerator where there is one; else a name such as "cpu" or "cuda:0".
        revision: branch, tag or commit on the Hub.

    Raises:
        UsageError: the model can't be loaded.
    """
    import torch

    from samf import SamfForConditionalGeneration, SamfProcessor
    from samf.model.pipeline_samf import SamfReportPipeline
    from samf.utils.distributed import default_device

    place = default_device() if device == "auto" else torch.device(device)
    dtype = torch.float32 if place.type == "cpu" else "auto"
    at = {} if revision is None else {"revision": revision}
    loaded: Any
    try:
        loaded = SamfForConditionalGeneration.from_pretrained(model, dtype=dtype, **at)
        processor = SamfProcessor.from_pretrained(model, **at)
    except (OSError, ValueError) as error:
        raise UsageError(f"{model}: can't be loaded as a SAMF model: {error}") from error
    return SamfReportPipeline(model=loaded, processor=processor, device=place)


def answer_scans(
    reporter: "SamfReportPipeline", scans: Sequence[str], questions: Sequence[str], **generation: Any
) -> Iterator[tuple[str, "list[Report] | str"]]:
    """Yield each scan with its reports, or with the reason why it has none.

    Args:
        reporter: the pipeline.
        scans: paths and addresses.
        questions: what is asked of each; none = the report.
        generation: options of `generate`.
    """
    from samf.model.ct_volume import CTReadError

    for scan in tqdm(scans, desc="scans", unit="scan", disable=len(scans) < 2):
        try:
            reports = reporter(scan, question=list(questions) or None, **generation)
        except (CTReadError, OSError, ValueError) as error:
            yield scan, str(error)
        else:
            yield scan, reports if isinstance(reports, list) else [reports]


def report_names(scans: Sequence[str]) -> dict[str, str]:
    """Return a file name without an ending for each scan; scans of one name in different folders get numbers."""
    from samf.data.volume_discovery import VOLUME_SUFFIXES

    names: dict[str, str] = {}
    taken: set[str] = set()
    for scan in scans:
        stem = Path(scan.rstrip("/")).name
        ending = max((end for end in VOLUME_SUFFIXES if stem.lower().endswith(end)), key=len, default="")
        stem = stem[: len(stem) - len(ending)] or "scan"
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name)
        names[scan] = name
    return names


def write_reports(
    reporter: "SamfReportPipeline",
    scans: Sequence[str],
    questions: Sequence[str],
    out: Path | None,
    as_json: bool,
    **generation: Any,
) -> int:
    """Write the reports of scans to standard output, and into `out` if it is given; return the exit code.

    Args:
        reporter: the pipeline.
        scans: paths and addresses.
        questions: what is asked of each; none = the report.
        out: folder of a .txt and a .json for each scan. Scans whose .json is there already are left out; failures.json
            lists those that couldn't be read in the last run.
        as_json: one JSON object per line on standard output, in place of text.
        generation: options of `generate`; and `evidence`, which needs `out`.

    Raises:
        UsageError: `out` holds reports of other scans, questions or models under the names of these.
    """
    names, failures, left = report_names(scans), {}, list(scans)
    if out is not None:
        asked = functools.partial(is_answered, reporter, questions=questions, evidence=bool(generation.get("evidence")))
        left = [scan for scan in scans if not asked(scan, file=out / f"{names[scan]}.json")]
        if len(left) < len(scans):
            sys.stderr.write(f"{len(scans) - len(left)} of {len(scans)} scans have their report in {out} already.\n")
    for scan, outcome in answer_scans(reporter, left, questions, **generation):
        if isinstance(outcome, str):
            failures[scan] = outcome
            sys.stderr.write(f"{outcome}\n")
            continue
        if out is not None:
            save_reports(outcome, out, names[scan], reporter.processor.image_processor.preset != "published")
        sys.stdout.write(json_lines(outcome) if as_json else plain_text(scan, outcome, len(scans) > 1))
        sys.stdout.flush()
    if out is not None and failures:
        write_json(out / "failures.json", failures)
    elif out is not None:
        (out / "failures.json").unlink(missing_ok=True)  # an earlier run's: all scans have been read now
    if failures:
        return ALL_FAILED if len(failures) == len(scans) else SOME_FAILED
    return 0


def is_answered(
    reporter: "SamfReportPipeline", scan: str, questions: Sequence[str], file: Path, evidence: bool = False
) -> bool:
    """Return whether a file holds this model's answers to these questions about a scan.

    Args:
        reporter: the pipeline.
        scan: path or address.
        questions: what is asked; none = the report.
        file: where the answers are written.
        evidence: whether the answers must come with evidence.

    Raises:
        UsageError: the file holds something else, which would be overwritten.
    """
    from samf.model.report_samf import REPORT_QUESTION, Report

    if not file.exists():
        return False
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = [Report.from_dict(values) for values in (content if isinstance(content, list) else [content])]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file}: not a report ({error}). Choose another --out, or move the file away.") from error
    config = reporter.model.config
    model = (config._name_or_path, getattr(config, "_commit_hash", None))
    asked = list(questions) or [REPORT_QUESTION]
    if [report.question for report in found] != asked:
        problem = "answers other questions"
    elif any(report.provenance.source != scan for report in found):
        problem = f"is about {found[0].provenance.source}, not {scan}"
    elif any((report.provenance.model, report.provenance.revision) != model for report in found):
        problem = f"was written by {found[0].provenance.model}, not {model[0]}"
    else:
        return not evidence or all(report.evidence is not None for report in found if report.sentences)
    raise UsageError(f"{file} {problem}. Choose another --out, or move the file away.")


def save_reports(reports: "Sequence[Report]", folder: Path, name: str, orientation: bool = True) -> None:
    """Write one report as `name`.txt and .json; several answers about one scan as one .json.

    The evidence of a report is written next to it as `name`.evidence.nii.gz and .evidence.png; that of several answers with
    their numbers, `name`.1.evidence.nii.gz and so on.

    Args:
        reports: about one scan.
        folder: where to write.
        name: of the files, without an ending.
        orientation: whether the slices are in the patient's orientation, and get its letters.
    """
    if len(reports) == 1:
        save_sheet(reports[0], folder, name, orientation).save(folder, name)
        return
    saved = []
    for number, report in enumerate(reports, start=1):
        own = f"{name}.{number}"
        saved.append(save_sheet(report, folder, own, orientation).save_maps(folder, own)[0].to_dict())
    write_json(folder / f"{name}.json", saved)


def save_sheet(report: "Report", folder: Path, name: str, orientation: bool) -> "Report":
    """Write a report's evidence as `name`.evidence.png, if it has any; return the report with the file's name in it.

    Args:
        report: the report.
        folder: where to write.
        name: of the file, without its ending.
        orientation: see `save_reports`.
    """
    if report.evidence is None:
        return report
    from samf.reporting.evidence_sheet import save_evidence_sheet

    folder.mkdir(parents=True, exist_ok=True)
    sheet = save_evidence_sheet(report, folder / f"{name}.evidence.png", orientation=orientation)
    return dataclasses.replace(report, evidence=dataclasses.replace(report.evidence, files=(sheet.name,)))


def json_lines(reports: "Sequence[Report]") -> str:
    """Return one JSON object per line."""
    return "".join(json.dumps(report.to_dict(), ensure_ascii=False) + "\n" for report in reports)


def plain_text(scan: str, reports: "Sequence[Report]", with_name: bool) -> str:
    """Return reports as text for a terminal."""
    from samf.model.report_samf import DISCLAIMER

    parts = [f"{scan}\n"] if with_name else []
    for report in reports:
        asked = f"{report.question}\n" if len(reports) > 1 else ""
        parts.append(f"{asked}{report.text}\n")
    return "\n".join([*parts, f"{DISCLAIMER}\n\n"])


@dataclasses.dataclass(frozen=True)
class ScanFacts:
    """What a file holds as a CT volume.

    Attributes:
        source: path or address.
        shape: voxels along X, Y, Z (right, front, top).
        spacing_mm: voxel size along the same axes.
        coverage_mm: extent of the volume along the same axes.
        stored_orientation: directions of the axes as stored.
        tilt_degrees: largest angle between an axis of the volume and the patient's.
        hu: minimum, median and maximum, in HU.
        warnings: what was repaired or found unusual.
    """

    source: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    coverage_mm: tuple[float, ...]
    stored_orientation: str
    tilt_degrees: float
    hu: tuple[float, float, float]
    warnings: tuple[str, ...]


def scan_facts(path: str) -> ScanFacts:
    """Read a scan and return what it is.

    Raises:
        UsageError: it can't be read as a CT volume.
    """
    import numpy as np

    from samf.model.ct_volume import CTReadError, read_ct
    from samf.model.pipeline_samf import collected_warnings

    try:
        with collected_warnings("samf.model") as warnings:
            volume = read_ct(path)
    except (CTReadError, OSError) as error:
        raise UsageError(str(error)) from error
    directions = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    tilt = float(np.degrees(np.arccos(np.clip(np.diag(directions), -1, 1))).max())
    values = volume.hu[::4, ::4, ::4]
    hu = (float(volume.hu.min()), float(np.median(values)), float(volume.hu.max()))
    return ScanFacts(
        source=path,
        shape=tuple(volume.shape),
        spacing_mm=tuple(round(float(value), 4) for value in volume.spacing),
        coverage_mm=tuple(round(float(value), 4) for value in volume.coverage_mm),
        stored_orientation=volume.stored_orientation,
        tilt_degrees=round(tilt, 2),
        hu=hu,
        warnings=tuple(warnings),
    )


def facts_text(facts: ScanFacts) -> str:
    """Return the facts as aligned lines."""
    shown = {
        "scan": facts.source,
        "voxels (right, front, top)": " x ".join(map(str, facts.shape)),
        "voxel size": " x ".join(f"{value:g}" for value in facts.spacing_mm) + " mm",
        "coverage": " x ".join(f"{value:.0f}" for value in facts.coverage_mm) + " mm",
        "stored axes": facts.stored_orientation,
        "tilt": f"{facts.tilt_degrees:g} degrees",
        "HU (minimum, median, maximum)": ", ".join(f"{value:g}" for value in facts.hu),
        **{f"warning {number}": text for number, text in enumerate(facts.warnings, start=1)},
    }
    width = max(map(len, shown))
    return "".join(f"{name:<{width}}  {value}\n" for name, value in shown.items())


def exit_with(error: Exception) -> typer.Exit:
    """Write an error as one line and return what ends the command with exit code 2."""
    sys.stderr.write(f"samf: {' '.join(str(error).split())}\n")
    return typer.Exit(ALL_FAILED)
