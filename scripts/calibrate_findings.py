"""Calibrate the findings of a model on held-out patients: fit temperatures, and measure what they change.

    python -m samf.scripts.calibrate_findings runs/ao2d/model --data /data/CT-RATE --slice_cache cache
    samf calibrate runs/ao2d/model --data /data/CT-RATE --output runs/ao2d/calibrated    # leaves the model as it is

The patients of `--split` must not have been trained on. They are divided into folds: the scaling is fitted on all folds but
one and measured on that one, in turn, so that every reported figure is of patients that it wasn't fitted on. The scaling that
is saved is then fitted on all of them. The model's folder gets finding_temperature (and finding_bias) in its config.json,
calibration.json and calibration.png (the reliability diagram). A model without a findings head is calibrated by the
likelihoods of its statements, `finding_statements` in its configuration or `--statements FILE`.
"""

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from samf.cache.embedding_cache import EmbeddingCache
from samf.cache.slice_cache import SliceCache
from samf.data.loading import load_records
from samf.data.options import check_on_error
from samf.data.schema import JsonObject, Record, VolumeStore, volume_of
from samf.data.source_arguments import SourceArguments
from samf.evaluation.answering.volume_readers import EncodedVolumes, ReadAhead, VolumeMemo
from samf.evaluation.finding_scaling import (
    SCALINGS,
    Calibration,
    HeldOut,
    Scaling,
    cross_fitted,
    finding_scores,
    fit_scaling,
    pooled_scores,
)
from samf.evaluation.markdown import format_value, markdown_table
from samf.evaluation.metrics.calibration import BINS, reliability
from samf.evaluation.report.plots import reliability_diagram, to_png
from samf.evaluation.schema import CalibrationReport, CalibrationScores
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.pipeline_samf import EncodedScan, SamfReportPipeline
from samf.model.processing_samf import SamfProcessor
from samf.model.report_samf import DISCLAIMER
from samf.training.arguments import DataArguments
from samf.training.datasets import label_findings
from samf.utils.distributed import default_device
from samf.utils.files import atomic_write, write_json
from samf.utils.recipe import parse_recipe

logger = logging.getLogger("samf.calibrate")

REPORT, DIAGRAM = "calibration.json", "calibration.png"
_CODE = "calibration_samf.py"  # of a model's folder: what applies a calibration
_RECORD_ERRORS = (OSError, ValueError)  # of a volume that can't be read


@dataclass
class CalibrateArguments(SourceArguments):
    """Arguments of calibrate_findings.py."""

    model: str = field(metadata={"help": "folder or Hub id of a SAMF model; may be given first, without its flag"})
    data: str = field(metadata={"help": "folder in CT-RATE's layout, or another source; with volume_column any"})
    split: str = field(default="valid", metadata={"help": "held-out split: valid, or train of a set of its own"})
    output: str | None = field(
        default=None, metadata={"help": "folder for a calibrated copy of the model; default: the model's folder itself"}
    )
    scaling: Scaling = field(
        default="platt",
        metadata={"help": "temperature: one for all findings; platt: a temperature and a bias for each"},
    )
    statements: str | None = field(
        default=None, metadata={"help": "JSON file of statements, for a model without a findings head"}
    )
    finding_labels: str = field(
        default="auto",
        metadata={"help": "auto: the data's labels, or rules where it has none; rules: from the reports"},
    )
    folds: int = field(default=5, metadata={"help": "parts of the patients: each is measured by a fit on the others"})
    bins: int = field(default=BINS, metadata={"help": "of the calibration error, with equal numbers of predictions"})
    seed: int = field(default=0, metadata={"help": "of the folds and the intervals"})
    limit: int | None = field(default=None, metadata={"help": "scans, the first ones; default: all"})
    slice_cache: str | None = field(
        default=None, metadata={"help": "folder that keeps slices and embeddings: an interrupted run resumes"}
    )
    on_error: str = field(
        default="raise", metadata={"help": "a volume that can't be read: raise, or skip and count it"}
    )
    device: str | None = field(default=None, metadata={"help": "e.g. cuda:1; default: an accelerator if there is one"})

    def __post_init__(self) -> None:
        self.check_source()
        self.on_error = check_on_error(self.on_error)
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling is {self.scaling!r}; expected {' or '.join(SCALINGS)}.")
        if self.folds < 2 or self.bins < 2:
            raise ValueError(f"folds is {self.folds} and bins {self.bins}; both must be at least 2.")
        if self.output is None and not Path(self.model, "config.json").is_file():
            raise ValueError(f"{self.model} is no folder of a model: name a folder for its calibrated copy, --output.")
        if Path(self.model, "adapter_config.json").is_file():
            raise ValueError(
                f"{self.model} is an adapter, which is loaded with its base model's configuration. Merge it first: "
                "train.py --merge, or peft's merge_and_unload, and save the whole model."
            )

    def data_arguments(self) -> DataArguments:
        """Return where labels come from, as training takes it."""
        given = {name: getattr(self, name) for name in vars(SourceArguments())}
        return DataArguments(data=self.data, on_error=self.on_error, finding_labels=self.finding_labels, **given)


def read_statements(path: str) -> JsonObject:
    """Return the statements of a JSON file, by finding.

    Raises:
        ValueError: it isn't a JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f'{path}: expected an object, {{"Lung nodule": ["A nodule is seen.", "No nodule is seen."]}}.')
    return content


def load_model(args: CalibrateArguments) -> SamfReportPipeline:
    """Return the model without an earlier calibration, as a pipeline.

    Raises:
        ValueError: it has neither a findings head nor statements, or both.
    """
    unscaled: JsonObject = {"finding_temperature": None, "finding_bias": None}
    if args.statements is not None:
        unscaled["finding_statements"] = read_statements(args.statements)
    device = torch.device(args.device or default_device())
    model = SamfForConditionalGeneration.from_pretrained(args.model, **unscaled).to(device)
    processor = SamfProcessor.from_pretrained(args.model)
    if not model.config.scored_findings:
        raise ValueError(
            f"{args.model} has no findings head (finding_names in its config.json) and no statements: give --statements."
        )
    if args.statements is not None and model.config.finding_names:
        raise ValueError(f"{args.model} has a findings head, which is used; leave out --statements.")
    return SamfReportPipeline(model=model, processor=processor, device=device)


def choose_records(args: CalibrateArguments, names: list[str]) -> list[Record]:
    """Return one record for each volume of the split, with finding labels.

    Args:
        args: name the data.
        names: of the findings.

    Raises:
        ValueError: no volume has a label.
    """
    options: JsonObject = {"on_missing": "skip"} if args.on_error == "skip" else {}
    options |= {"tasks": ("report",), "finding_names": names, "needs_text": False}
    records = load_records(args.data, args.split, **options, **args.record_options())
    records = label_findings(records, args.data_arguments(), args.split, names)
    first = {volume: row for row, volume in reversed(list(enumerate(records["volume"][:]))) if volume is not None}
    chosen = cast(list[Record], list(records.select(sorted(first.values())[: args.limit])))
    if not any(label >= 0 for record in chosen for label in record["finding_labels"]):
        raise ValueError(f"{args.data}, {args.split}: no volume has a label of {', '.join(names)}.")
    return chosen


def score_volumes(
    args: CalibrateArguments, reporter: SamfReportPipeline, records: Sequence[Record]
) -> Iterator[tuple[Record, list[float]]]:
    """Yield each record with the unscaled logits of its volume's findings, (L,).

    Args:
        args: name the cache, and say what to do about a volume that can't be read.
        reporter: the model.
        records: one for each volume.
    """
    model, reader = reporter.model, reporter.processor.image_processor
    ahead = None
    if args.slice_cache is not None:
        slices = SliceCache(args.slice_cache, reader, args.min_coverage)
        store: VolumeStore = EmbeddingCache(args.slice_cache, slices, model.model)
    else:
        ahead = ReadAhead(VolumeMemo(reader))
        store = EncodedVolumes(model, reader, ahead, 1)
    try:
        for place, record in enumerate(tqdm(records, desc="scans", unit="scan")):
            if ahead is not None:
                ahead.start(records[place : place + 2])
            try:
                features = store.get(volume_of(record))  # type: ignore[arg-type]  # every record has a volume
            except _RECORD_ERRORS as error:
                if args.on_error == "raise":
                    raise
                logger.warning("%s is skipped: %s", record["volume"], error)
                continue
            scan = EncodedScan(record["id"], (0, 0, 0), (0.0, 0.0, 0.0), "", features, {}, ())
            yield record, reporter.finding_logits(scan)
    finally:
        if ahead is not None:
            ahead.close()


def gather(args: CalibrateArguments, reporter: SamfReportPipeline) -> HeldOut:
    """Return the logits and labels of the held-out scans.

    Raises:
        ValueError: no volume could be read.
    """
    names = reporter.model.config.scored_findings
    scored = list(score_volumes(args, reporter, choose_records(args, names)))
    if not scored:
        raise ValueError(f"{args.data}, {args.split}: no volume could be read.")
    records, logits = zip(*scored, strict=True)
    patients = tuple(str(record["patient_id"] or record["scan_id"]) for record in records)
    targets = np.array([record["finding_labels"] for record in records])
    return HeldOut(tuple(names), np.array(logits, dtype=np.float64), targets, patients)


def measure(
    args: CalibrateArguments, held_out: HeldOut, source: str
) -> tuple[Calibration, CalibrationReport, dict[str, np.ndarray]]:
    """Return the calibration fitted on all scans, its report, and the probabilities before and after by cross-fitting.

    Args:
        args: how to fit and to measure.
        held_out: logits and labels.
        source: what the logits are of.
    """
    before = Calibration((1.0,) * len(held_out.names)).probabilities(held_out.logits)
    by_scaling = {scaling: cross_fitted(held_out, scaling, args.folds, args.seed) for scaling in SCALINGS}
    scores = {name: pooled_scores(held_out, found, args.bins, args.seed) for name, found in by_scaling.items()}
    after, calibration = by_scaling[args.scaling], fit_scaling(held_out, args.scaling)
    model, data = (os.path.basename(os.path.normpath(name)) for name in (args.model, args.data))
    report: CalibrationReport = {
        "disclaimer": DISCLAIMER,
        "model": model,
        "data": data,
        "split": args.split,
        "source": source,
        "scaling": args.scaling,
        "folds": args.folds,
        "seed": args.seed,
        "patients": len(set(held_out.patients)),
        "scans": len(held_out.patients),
        "before": pooled_scores(held_out, before, args.bins, args.seed),
        "after": scores[args.scaling],
        "other_scalings": {name: found for name, found in scores.items() if name != args.scaling},
        "findings": dict(finding_scores(held_out, calibration, before, after, args.bins, args.seed)),
    }
    return calibration, report, {"before": before, "after": after}


def table(report: CalibrationReport) -> str:
    """Return the report as a Markdown table."""

    def row(name: str, scores: CalibrationScores) -> list[object]:
        errors = [format_value(scores["ece"], scores["intervals"]["ece"]), format_value(scores["ece_if_perfect"])]
        return [name, scores["n"], *errors, format_value(scores["brier"]), format_value(scores["nll"])]

    rows = [row("all findings, unscaled", report["before"]), row(f"all findings, {report['scaling']}", report["after"])]
    rows += [row(f"all findings, {name}", scores) for name, scores in report["other_scalings"].items()]
    for name, scores in report["findings"].items():
        rows += [row(f"{name}, unscaled", scores["before"]), row(f"{name}, {report['scaling']}", scores["after"])]
    return markdown_table(["", "n", "ECE", "of perfect calibration", "Brier", "log loss"], rows) + "\n"


def save(
    args: CalibrateArguments,
    reporter: SamfReportPipeline,
    calibration: Calibration,
    report: CalibrationReport,
    diagram: bytes,
) -> Path:
    """Write the calibration into the model's folder, or into a calibrated copy of the model; return the folder.

    Args:
        args: name the folders.
        reporter: the model and its processor.
        calibration: what config.json gets.
        report: content of calibration.json.
        diagram: content of calibration.png.
    """
    config = reporter.model.config
    values = {
        "finding_temperature": list(calibration.temperature),
        "finding_bias": None if calibration.bias is None else list(calibration.bias),
        "finding_statements": config.finding_statements,
    }
    folder = Path(args.output or args.model)
    if args.output is not None:
        if not Path(args.model).is_dir():
            reporter.save_pretrained(folder)
        elif folder.resolve() != Path(args.model).resolve():
            shutil.copytree(args.model, folder, dirs_exist_ok=True)
    if not (folder / _CODE).exists() and (folder / "modeling_samf.py").exists():
        reporter.model.save_config_and_code(folder)  # saved by code that would ignore the calibration
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **values})
    write_json(folder / REPORT, report)
    atomic_write(folder / DIAGRAM, diagram)
    return folder


def run(args: CalibrateArguments) -> CalibrationReport:
    """Calibrate a model and write its calibration; return the report."""
    reporter = load_model(args)
    source = "findings head" if reporter.model.config.finding_names else "statements"
    held_out = gather(args, reporter)
    calibration, report, probabilities = measure(args, held_out, source)
    diagram = draw(held_out, probabilities, report)
    folder = save(args, reporter, calibration, report, diagram)
    sys.stdout.write(f"{table(report)}\nWritten to {folder}: config.json, {REPORT}, {DIAGRAM}. {DISCLAIMER}\n")
    return report


def draw(held_out: HeldOut, probabilities: Mapping[str, np.ndarray], report: CalibrationReport) -> bytes:
    """Return the reliability diagram before and after as a PNG.

    Args:
        held_out: has the labels.
        probabilities: "before" and "after" → (N, L).
        report: their calibration errors.
    """
    known = held_out.targets >= 0
    curves = {}
    for name, title, scores in (
        ("before", "unscaled", report["before"]),
        ("after", report["scaling"], report["after"]),
    ):
        points = reliability(probabilities[name][known], held_out.targets[known], scores["bins"])
        curves[f"{title}, ECE {format_value(scores['ece'])}"] = points
    return to_png(reliability_diagram(curves, f"{report['scans']} scans, {len(held_out.names)} findings"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    given = list(sys.argv[1:] if argv is None else argv)
    if given and not given[0].startswith("-"):
        given.insert(0, "--model")
    try:
        (args,) = parse_recipe(CalibrateArguments, given)
        with logging_redirect_tqdm():
            run(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"calibrate_findings: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
