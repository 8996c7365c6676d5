"""Measure speed and memory of the model, of training and of reading data, with spread and limits.

    python -m samf.benchmarks model                               # every line at full size: about 20 GB of memory
    python -m samf.benchmarks model --lines vit,fusion --device cuda --json figures.json
    python -m samf.benchmarks model --lines quantized             # 4 and 8 bits on a CPU: 17 GB of memory, 20 GB of disk
    python -m samf.benchmarks model --lines batches               # 4 bits, 1 to 16 volumes at once: 11 GB of disk
    SAMF_TEST_DATA=FOLDER python -m samf.benchmarks volumes       # a scan of 512 x 512 x 300: 2 GB, a quarter of an hour
    SAMF_TEST_DATA=FOLDER python -m samf.benchmarks data          # CT-RATE's tables, 47,149 reports: 2.3 GB of disk
    SAMF_TEST_DATA=FOLDER python -m samf.benchmarks data --lines scoring  # 3,039 predictions against rouge-score: 6 minutes
    python -m samf.benchmarks data --lines fill,resume            # filling a cache; a folder of 47,000 files
    python -m samf.benchmarks data --lines cluster                # by dask on this machine; pip install 'samf[cluster]'
    SAMF_TEST_DATA=FOLDER python -m samf.benchmarks data --lines remote  # 47,149 reports by hf:// from this machine
    python -m samf.benchmarks data --lines streaming              # shards from an S3 server on this machine: moto[server]
    python -m samf.benchmarks training --device cuda              # a step as in recipes/ct_rate.yaml
    python -m samf.benchmarks training --lines step --dtype bfloat16  # against the published form; step_memory, dino
    python -m samf.benchmarks growth --json growth.json           # fitted exponents; growth_plot draws them
    python -m samf.benchmarks report --model runs/demo/model      # a report's seconds, batches and shared scans
    python -m samf.benchmarks report --size medium                # the same with random weights
    python -m samf.benchmarks report --lines answers --threads 1  # evaluation of 64 scans against one volume at a time

FOLDER has real scans in ct/, reports in reports/ and Phi-3's tokenizer in tokenizers/phi3; phantoms replace what is missing.
Each stage of a line runs in its own process. The exit status is 1 when a limit is missed or a stage fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from tqdm import tqdm

from samf.benchmarks import (
    answer_lines,
    cache_lines,
    cluster_lines,
    cluster_scan_lines,
    dino_lines,
    growth_lines,
    quantized_lines,
    remote_lines,
    step_lines,
    stream_lines,
)
from samf.benchmarks.data_lines import count_padding, read_copy, write_copy
from samf.benchmarks.dicom_lines import STAGES as DICOM_STAGES
from samf.benchmarks.format_lines import STAGES as FORMAT_STAGES
from samf.benchmarks.measuring import Machine, Measurement, Summary, describe_machine, describe_versions, peak_memory
from samf.benchmarks.memory_lines import quantise_model, reload_model, reload_quantised, save_model, train_lora
from samf.benchmarks.report_lines import prepare_reports, time_questions, time_scans, time_start
from samf.benchmarks.scoring_lines import time_scoring, write_predictions
from samf.benchmarks.speed_lines import count_parameters, time_decoding, time_fusion, time_vit
from samf.benchmarks.train_lines import STAGES as TRAINING_STAGES
from samf.benchmarks.volume_lines import measure_memory, measure_slab_memory, time_cache, time_slices, write_scan
from samf.benchmarks.workloads import SIZES, LineSkipped, Settings
from samf.utils.files import write_json
from samf.utils.large_pages import ask_for_large_pages
from samf.utils.threads import let_idle_threads_sleep

Stage = Callable[[Settings], list[Measurement]]
# Command → line → its stages, which share a folder.
LINES: dict[str, dict[str, dict[str, Stage]]] = {
    "model": {
        "parameters": {"parameters": count_parameters},
        "vit": {"vit": time_vit},
        "fusion": {"fusion": time_fusion},
        "decode": {"decode": time_decoding},
        "save": {"save": save_model, "reload": reload_model, "8bit": quantise_model, "8bit_reload": reload_quantised},
        "lora": {"lora": train_lora},
        "quantized": quantized_lines.stages(),
        "batches": quantized_lines.batch_stages(),
    },
    "volumes": {
        "slices": {
            "scan": write_scan,
            "slices": time_slices,
            "cache": time_cache,
            "memory": measure_memory,
            "slab_memory": measure_slab_memory,
        },
        "dicom": {"scan": write_scan, **DICOM_STAGES},
        "formats": {"scan": write_scan, **FORMAT_STAGES},
    },
    "data": {
        "records": {"copy": write_copy, "first": read_copy, "second": read_copy},
        "padding": {"padding": count_padding},
        "scoring": {"predictions": write_predictions, "scoring": time_scoring},
        "remote": remote_lines.STAGES,
        **cache_lines.STAGES,
        "cluster": cluster_lines.STAGES["cluster"] | cluster_scan_lines.STAGES["cluster"],
        **stream_lines.STAGES,
    },
    "training": {
        **{name: {name: stage} for name, stage in TRAINING_STAGES.items()},
        **step_lines.STAGES,
        **dino_lines.STAGES,
    },
    "growth": growth_lines.STAGES,
    "report": {
        "start": {"prepare": prepare_reports, "start": time_start},
        "batches": {"prepare": prepare_reports, "scans": time_scans, "questions": time_questions},
        "answers": answer_lines.STAGES,
    },
}
_COMMANDS = {
    "model": "parameters, speed and memory of the model",
    "volumes": "from a scan's file to its slices",
    "data": "from CT-RATE's tables to records, and scoring of predictions",
    "training": "a training step, and steps against the published form and lightly's DINO",
    "growth": "time and memory by slices, records, batch and image tokens",
    "report": "a report from the command to its end, and what batches and shared scans save",
}
_ON_A_DEVICE = ("model", "training", "report")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEADER = ["stage", "quantity", "median", "quartiles", "repeats", "limit", "", "note"]


class StageOutcome(TypedDict):
    """What the process of a stage writes; `figures` are its measurements."""

    figures: list[Summary]
    skipped: NotRequired[str]  # the reason
    machine: NotRequired[Machine]
    seconds: NotRequired[float]  # of the whole process
    error: NotRequired[str]


class StageResult(StageOutcome):
    """The outcome of a stage of a line."""

    line: str
    stage: str


class BenchmarkResults(TypedDict):
    """The content of the file of --json."""

    command: str
    size: str
    device: str
    dtype: str
    machine: Machine
    versions: dict[str, str | None]
    stages: list[StageResult]
    passed: bool


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in _COMMANDS.items():
        command, lines = commands.add_parser(name, help=what), ",".join(LINES[name])
        command.add_argument("--lines", default=lines, help=f"some of {lines}")
        if name in _ON_A_DEVICE:
            command.add_argument("--device", default="cpu", help="cpu, or cuda")
            command.add_argument("--dtype", choices=_DTYPES, help="default: float32 on the CPU, bfloat16 on a GPU")
        else:
            command.set_defaults(device="cpu", dtype=None)
        if name == "report":
            command.add_argument("--model", help="folder of a model; default: random weights of --size")
        else:
            command.set_defaults(model=None)
        command.add_argument(
            "--size", choices=SIZES, default="full", help="medium is a tenth; tiny shows that everything runs"
        )
        command.add_argument("--budget", type=float, default=60, help="approximate seconds for a stage's repeats")
        command.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
        command.add_argument("--folder", type=Path, help="for large temporary files; default: the system's")
        command.add_argument("--json", type=Path, help="also write the measurements here")
        command.add_argument("--stage", help=argparse.SUPPRESS)  # a child process: LINE/STAGE, its outcome to --json
    args = parser.parse_args(argv)
    args.lines = [line for line in args.lines.split(",") if line]
    unknown = sorted(set(args.lines) - set(LINES[args.command]))
    if unknown or not args.lines:
        parser.error(f"--lines names {unknown}; the lines are {', '.join(LINES[args.command])}")
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; omit --device for the CPU")
    args.dtype = _DTYPES[args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16")]
    return args


# --- One stage, in this process ---------------------------------------------------------------------------------------


def run_stage(args: argparse.Namespace) -> StageOutcome:
    """Measure `args.stage` and this process's peak memory."""
    line, _, stage = args.stage.partition("/")
    settings = Settings(args.size, args.device, args.dtype, args.budget, args.folder, args.model)
    try:
        measurements = LINES[args.command][line][stage](settings)
    except LineSkipped as reason:
        return {"figures": [], "skipped": str(reason)}
    return {
        "figures": [measurement.summary() for measurement in measurements + peak_memory(args.device)],
        "machine": describe_machine(args.device),
    }


# --- All stages, each in its own process ------------------------------------------------------------------------------


def run_lines(args: argparse.Namespace) -> BenchmarkResults:
    """Run the stages of the lines one after the other."""
    lines = LINES[args.command]
    stages = [(line, stage) for line in args.lines for stage in lines[line]]
    results: list[StageResult] = []
    progress = tqdm(stages)
    for line, stage in progress:
        progress.set_description(stage)
        if stage == next(iter(lines[line])):
            folder = tempfile.TemporaryDirectory(prefix="samf_benchmark_", dir=args.folder)
        results.append({"line": line, "stage": stage, **run_child(args, f"{line}/{stage}", Path(folder.name))})
        if stage == list(lines[line])[-1]:
            folder.cleanup()
    verdicts = [summary["passed"] for result in results for summary in result["figures"]]
    return {
        "command": args.command,
        "size": args.size,
        "device": str(args.device),
        "dtype": str(args.dtype).removeprefix("torch."),
        "machine": describe_machine(args.device) | {"threads": args.threads or torch.get_num_threads()},
        "versions": describe_versions(),
        "stages": results,
        "passed": False not in verdicts and not any("error" in result for result in results),
    }


def run_child(args: argparse.Namespace, stage: str, folder: Path) -> StageOutcome:
    """Run a stage in its own process.

    Args:
        args: the command line.
        stage: LINE/STAGE.
        folder: shared by the stages of the line.

    Returns:
        The outcome with the process's seconds, and an `error` where it failed.
    """
    output = folder / "figures.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "samf.benchmarks", args.command, f"--stage={stage}", f"--json={output}"]
    command += [f"--folder={folder}", f"--size={args.size}", f"--budget={args.budget}"]
    if args.command in _ON_A_DEVICE:
        dtype = next(name for name, dtype in _DTYPES.items() if dtype == args.dtype)
        command += [f"--device={args.device}", f"--dtype={dtype}"]
    command += [f"--model={args.model}"] if args.model else []
    command += [f"--threads={args.threads}"] if args.threads else []
    environment = dict(os.environ)
    if stage.partition("/")[2].startswith("int"):
        let_idle_threads_sleep(environment)  # as the samf command does, and as it takes its memory
        ask_for_large_pages(environment)
    started = time.monotonic()
    child = subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False)
    seconds = round(time.monotonic() - started, 1)
    if child.returncode == 0:
        outcome: StageOutcome = json.loads(output.read_text(encoding="utf-8"))
        return {**outcome, "seconds": seconds}
    reason = "was killed, often for lack of memory" if child.returncode == -9 else "failed; its message is above"
    return {"seconds": seconds, "figures": [], "error": f"{stage} {reason} (exit status {child.returncode})"}


def table(results: BenchmarkResults) -> str:
    """Return the results as a Markdown table with aligned columns, one row per measurement."""
    rows = [_HEADER, *(row for result in results["stages"] for row in _stage_rows(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    facts = {"device": results["device"], "dtype": results["dtype"], **results["machine"], **results["versions"]}
    return "\n".join([*lines, "", ", ".join(f"{name} {fact}" for name, fact in facts.items() if fact is not None), ""])


def _stage_rows(result: StageResult) -> list[list[str]]:
    missing = result.get("error") or result.get("skipped")
    if missing:
        return [[result["stage"], "FAILED" if "error" in result else "skipped", *[""] * 5, missing]]
    rows = []
    for found in result["figures"]:
        limits = ((found["at_least"], ">="), (found["at_most"], "<="))
        limit = " ".join(f"{sign} {value:g}" for value, sign in limits if value is not None)
        verdict = {None: "", True: "pass", False: "MISSED"}[found["passed"]]
        spread = f"{found['first_quartile']:.4g} to {found['third_quartile']:.4g}" if found["repeats"] > 1 else ""
        median = f"{found['median']:.4g} {found['unit']}"
        name = [result["stage"], found["name"]]
        rows.append([*name, median, spread, str(found["repeats"]), limit, verdict, found["note"]])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for and print a table; return the exit status."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.stage:
        write_json(args.json, run_stage(args))
        return 0
    results = run_lines(args)
    if args.json:
        write_json(args.json, results)
    sys.stdout.write(table(results))
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
