"""`samf report` and `samf ask`: scans to reports and answers, on the terminal and as files."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from samf.cli.errors import ALL_FAILED, SOME_FAILED, UsageError, one_line
from samf.cli.exporting import needs_series, refused_scans, write_formats
from samf.cli.scans import report_names
from samf.utils.files import write_json
from samf.utils.large_pages import restart_with_large_pages
from samf.utils.packaged import DEMO_MODEL
from samf.utils.threads import let_idle_threads_sleep

if TYPE_CHECKING:
    from samf.model.pipeline_samf import EncodedScan, SamfReportPipeline
    from samf.model.quantization_samf import SamfQuantizationConfig
    from samf.model.report_samf import Report

# Questions about a scan that are answered together. Each needs memory for its keys and values: 0.4 GB per 1,000 tokens of
# Phi-3-mini in bfloat16.
_QUESTIONS_AT_ONCE = 4


@dataclass(frozen=True)
class Request:
    """What is asked of each scan, and where the answers go.

    Attributes:
        questions: none = the report.
        out: folder of the files; None writes none.
        formats: of the files; the record, which resuming reads, is always among them.
        as_json: one JSON object per line on standard output, in place of text.
        any_region: also take scans that show no chest.
        generation: options of `generate`.
        evidence: also find what of the scan each sentence rests on, and write it into `out`.
    """

    questions: Sequence[str] = ()
    out: Path | None = None
    formats: Sequence[str] = ("txt", "json")
    as_json: bool = False
    any_region: bool = False
    generation: dict[str, Any] = field(default_factory=dict)
    evidence: bool = False


def parse_formats(text: str | None, out: Path | None) -> list[str]:
    """Return the formats of a comma-separated list, or the usual ones; JSON is always among them.

    Args:
        text: such as "txt,pdf".
        out: the folder that they go to.

    Raises:
        UsageError: an unknown format, or formats without a folder.
    """
    from samf.reporting.exports import FORMATS, RECORD

    if text is None:
        return ["txt", RECORD]
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise UsageError(f"--format {text}: no such format. There are {', '.join(FORMATS)}; several go with commas.")
    if out is None:
        raise UsageError(f"--format {text}: say where the files go, by --out FOLDER.")
    return list(dict.fromkeys([*names, RECORD]))


def prepare_process(model: str | None, revision: str | None, quantize: str | None) -> None:
    """Start this process anew with large pages if the model's weights have 4 or 8 bits: the first thing that a command does.

    Args:
        model: as `load_reporter` takes it.
        revision: likewise.
        quantize: likewise.
    """
    if _has_few_bits(model, revision, quantize):
        restart_with_large_pages()


def load_reporter(
    model: str | None, device: str, revision: str | None, quantize: str | None = None
) -> "SamfReportPipeline":
    """Return the pipeline of a model.

    Args:
        model: folder or Hub id; None takes the demo model that comes with the package.
        device: "auto" takes the accelerator where there is one; else a name such as "cpu" or "cuda:0".
        revision: branch, tag or commit on the Hub.
        quantize: "int4" or "int8" rounds the language model's weights; None leaves them as they are saved.

    Raises:
        UsageError: the model can't be loaded, or not with such weights.
    """
    if _has_few_bits(model, revision, quantize):
        let_idle_threads_sleep(os.environ)
    import torch
    from transformers.utils import logging as transformers_logging

    from samf import SamfForConditionalGeneration, SamfProcessor, SamfReportPipeline
    from samf.model.onnx_product_samf import is_available
    from samf.model.quantization_samf import describe_quantization
    from samf.utils.distributed import default_device

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if model is None and not DEMO_MODEL.is_dir():
        raise UsageError(f"{DEMO_MODEL}: the demo model isn't there. Name a model by --model FOLDER or --model HUB/ID.")
    source = str(DEMO_MODEL) if model is None else model
    place = default_device() if device == "auto" else torch.device(device)
    dtype = torch.float32 if place.type == "cpu" else "auto"
    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    rounded = {} if quantize is None else {"quantization_config": _quantization(quantize, place.type)}
    loaded: Any
    try:
        loaded = SamfForConditionalGeneration.from_pretrained(source, dtype=dtype, **rounded, **at)
        processor = SamfProcessor.from_pretrained(source, **at)
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: can't be loaded as a SAMF model: {error}") from error
    if (quantization := describe_quantization(loaded)) is not None:
        sys.stderr.write(f"{quantization}\n")
        if not is_available():
            sys.stderr.write("ONNX Runtime's products are faster on most processors: pip install onnx onnxruntime\n")
    return SamfReportPipeline(model=loaded, processor=processor, device=place)


def _has_few_bits(model: str | None, revision: str | None, quantize: str | None) -> bool:
    """Return whether `load_reporter` would load a language model with weights of 4 or 8 bits."""
    return quantize is not None or (model is not None and _is_quantised(model, revision))


def _is_quantised(model: str, revision: str | None) -> bool:
    """Return whether a model's weights were saved in 4 or 8 bits; False for one on the Hub that isn't in the cache yet.

    It imports no torch, whose threads are to be told before.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit on the Hub.
    """
    from huggingface_hub import try_to_load_from_cache

    file: Any = Path(model, "config.json")
    try:
        if not file.is_file():
            file = try_to_load_from_cache(model, "config.json", revision=revision)
        saved = json.loads(Path(file).read_text(encoding="utf-8")) if isinstance(file, (str, Path)) else {}
        return saved.get("quantization_config", {}).get("quant_method") == "samf"
    except (OSError, ValueError, AttributeError):  # loading it tells more
        return False


def _quantization(name: str, device: str) -> "SamfQuantizationConfig":
    """Return the configuration that `--quantize` names.

    Args:
        name: of the weights' type.
        device: type of the device.

    Raises:
        UsageError: another name than int4 and int8, or another device than the CPU.
    """
    from samf.model.quantization_samf import SamfQuantizationConfig

    if name not in ("int4", "int8"):
        raise UsageError(f"--quantize {name}: expected int4 or int8.")
    if device != "cpu":
        raise UsageError(
            f"--quantize {name} is for a CPU, and the device is {device}. Add --device cpu; on a GPU, from_pretrained takes "
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True) or TorchAoConfig(…)."
        )
    return SamfQuantizationConfig(bits=int(name.removeprefix("int")))


def answer_scans(
    reporter: "SamfReportPipeline", scans: Sequence[str], request: Request, stream: bool = False
) -> "Iterator[tuple[str, list[Report] | str]]":
    """Yield each scan with its reports, or with the reason why it has none.

    Before the first report, a model's caution, such as the demo model's, goes to standard error.

    Args:
        reporter: the pipeline.
        scans: paths and addresses.
        request: what is asked.
        stream: write the text to standard output as it comes; for one question.
    """
    caution = reporter.model.config.caution
    for scan in tqdm(scans, desc="scans", unit="scan", disable=len(scans) < 2):
        try:
            encoded = reporter.encode(scan, require_chest=not request.any_region, keep_images=request.evidence)
            if encoded.series is None:
                needs_series(scan, request.formats)
            if caution:
                sys.stderr.write(f"Warning: {one_line(caution)}\n")
                caution = None
            reports = _answer(reporter, encoded, request, stream)
        except (OSError, ValueError) as error:  # CTReadError is a ValueError
            yield scan, one_line(error)
        else:
            yield scan, reports


def _answer(reporter: "SamfReportPipeline", scan: "EncodedScan", request: Request, stream: bool) -> "list[Report]":
    """Return the answers to a request about one scan."""
    from transformers import TextStreamer

    options: dict[str, Any] = {**request.generation, "batch_size": _QUESTIONS_AT_ONCE}
    if stream:
        options["streamer"] = TextStreamer(reporter.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    reports = reporter(scan, question=list(request.questions) or None, evidence=request.evidence, **options)
    return reports if isinstance(reports, list) else [reports]


def write_reports(reporter: "SamfReportPipeline", scans: Sequence[str], request: Request) -> int:
    """Write the reports of scans to standard output and to files; return the exit code.

    Scans whose record in the folder answers the same request are not read again; formats that they lack are written from
    it. failures.json lists those that couldn't be read in the last run.

    Args:
        reporter: the pipeline.
        scans: paths and addresses.
        request: what is asked, and where the answers go.

    Raises:
        UsageError: the folder holds reports of other scans, questions or models under the names of these.
    """
    names = report_names(scans)
    failures = refused_scans(scans, request.formats)
    left = [scan for scan in scans if scan not in failures]
    if request.out is not None:
        left = _left_to_do(reporter, left, request, request.out, names, failures)
    sys.stderr.write("".join(f"samf: {reason}\n" for reason in failures.values()))
    stream = len(scans) == 1 and len(request.questions) < 2 and not request.as_json and _is_greedy(request)
    for scan, outcome in answer_scans(reporter, left, request, stream):
        if isinstance(outcome, str):
            failures[scan] = outcome
            sys.stderr.write(f"samf: {outcome}\n")
            continue
        saved, problem = _save(reporter, outcome, request, names[scan])
        sys.stdout.write(_shown(scan, saved, request, len(scans) > 1, stream))
        sys.stdout.flush()
        own = [text for text in outcome[0].warnings if text != reporter.model.config.caution]
        sys.stderr.write("".join(f"Warning: {one_line(text)}\n" for text in own))
        if problem is not None:
            failures[scan] = problem
            sys.stderr.write(f"samf: {problem}\n")
    if request.out is not None:
        _write_failures(request.out, failures)
    if failures:
        return ALL_FAILED if len(failures) == len(scans) else SOME_FAILED
    return 0


def _left_to_do(
    reporter: "SamfReportPipeline",
    scans: Sequence[str],
    request: Request,
    out: Path,
    names: dict[str, str],
    failures: dict[str, str],
) -> list[str]:
    """Return the scans that have no report in the folder yet, and say how many have one.

    Args:
        reporter: the pipeline.
        scans: paths and addresses.
        request: what is asked.
        out: the folder.
        names: of the scans' files.
        failures: gets the scans whose record can't be written in a format that they lack.
    """
    left: list[str] = []
    for scan in scans:
        done, problem = _is_done(reporter, scan, request, out, names[scan])
        if problem is not None:
            failures[scan] = problem
        elif not done:
            left.append(scan)
    if len(left) < len(scans):
        sys.stderr.write(f"{len(scans) - len(left)} of {len(scans)} scans have their report in {out} already.\n")
    return left


def _is_greedy(request: Request) -> bool:
    return request.generation.get("num_beams", 1) == 1


def _write_failures(out: Path, failures: dict[str, str]) -> None:
    """Write the reasons of this run, or remove an earlier run's where all scans have been read now."""
    if failures:
        write_json(out / "failures.json", failures)
    else:
        (out / "failures.json").unlink(missing_ok=True)


def _save(
    reporter: "SamfReportPipeline", reports: "Sequence[Report]", request: Request, name: str
) -> "tuple[Sequence[Report], str | None]":
    """Write the files of one scan; the record comes last, so that a scan that has one has all.

    Args:
        reporter: the pipeline.
        reports: about the scan.
        request: what was asked.
        name: of the files, without an ending.

    Returns:
        The reports, whose evidence names its files, and why formats are missing; None if none is.
    """
    if request.out is None:
        return reports, None
    from samf.reporting.exports import RECORD

    if request.evidence:
        from samf.reporting.evidence_files import save_evidence  # imports matplotlib

        reports = save_evidence(reports, request.out, name, reporter.processor.image_processor)
    problem = write_formats(reports, request.out, name, sorted(request.formats, key=lambda kind: kind == RECORD))
    return reports, problem


def _is_done(
    reporter: "SamfReportPipeline", scan: str, request: Request, out: Path, name: str
) -> tuple[bool, str | None]:
    """Return whether a scan's record answers this request; formats that are missing are then written from it.

    Args:
        reporter: the pipeline.
        scan: path or address.
        request: what is asked.
        out: folder of the files.
        name: of the scan's files.

    Returns:
        Whether there is such a record, and why formats can't be written from it; None if they can.

    Raises:
        UsageError: the record is of something else, which would be overwritten.
    """
    from samf.reporting.exports import RECORD, report_file
    from samf.reporting.exports.record import read_reports

    record = report_file(out, name, RECORD)
    if not record.exists():
        return False, None
    try:
        found = read_reports(record)
    except ValueError as error:
        raise UsageError(f"{error} Choose another --out, or move the file away.") from error
    if problem := _difference(reporter, scan, request, found):
        raise UsageError(f"{record} {problem}. Choose another --out, or move the file away.")
    if request.evidence and not all(_has_evidence(report, out) for report in found):
        return False, None
    missing = [kind for kind in request.formats if not report_file(out, name, kind).exists()]
    return True, write_formats(found, out, name, missing)


def _has_evidence(report: "Report", out: Path) -> bool:
    """Return whether a report that was read from a folder has its evidence there; one without text needs none."""
    if report.evidence is None:
        return not report.sentences
    return all((out / file).exists() for file in report.evidence.files)


def _difference(reporter: "SamfReportPipeline", scan: str, request: Request, found: "Sequence[Report]") -> str | None:
    """Return in what the reports of a record differ from those of a request; None = in nothing."""
    from samf.model.quantization_samf import quantization_name
    from samf.model.report_samf import REPORT_QUESTION

    config = reporter.model.config
    model = (config._name_or_path, getattr(config, "_commit_hash", None))
    if [report.question for report in found] != (list(request.questions) or [REPORT_QUESTION]):
        return "answers other questions"
    if any(report.provenance.source != scan for report in found):
        return f"is about {found[0].provenance.source}, not {scan}"
    if any((report.provenance.model, report.provenance.revision) != model for report in found):
        return f"was written by {found[0].provenance.model}, not {model[0]}"
    weights = quantization_name(reporter.model)
    if any(report.provenance.versions.get("quantization") != weights for report in found):
        written = found[0].provenance.versions.get("quantization")
        return f"was written with weights quantised by {written}, not by {weights}"
    return None


def _shown(scan: str, reports: "Sequence[Report]", request: Request, with_name: bool, streamed: bool) -> str:
    """Return what standard output gets of one scan's reports; of streamed ones, what comes after their text."""
    from samf.model.report_samf import DISCLAIMER

    if request.as_json:
        return "".join(json.dumps(report.to_dict(), ensure_ascii=False) + "\n" for report in reports)
    if streamed:
        return "\n".join(["", *reports[0].checks(), f"{DISCLAIMER}\n\n"])
    parts = [f"{scan}\n"] if with_name else []
    for report in reports:
        asked = f"{report.question}\n" if len(reports) > 1 else ""
        parts.append(f"{asked}{report.to_text()}\n")
    return "\n".join([*parts, f"{DISCLAIMER}\n\n"])
