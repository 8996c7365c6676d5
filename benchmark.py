"""Measure the model: parameters, speed, memory, each with its spread and, where there is one, its limit.

    python benchmark.py model                                   # every line at full size: about 20 GB of memory
    python benchmark.py model --lines vit,fusion --device cuda --json figures.json

Each stage of a line runs in a process of its own. The exit status is 1 when a limit is missed or a stage failed.
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
from typing import Any

import torch
from tqdm import tqdm

from samf.benchmarks.measuring import Figure, describe_machine, describe_versions, peak_memory
from samf.benchmarks.memory_lines import quantise_model, reload_model, reload_quantised, save_model, train_lora
from samf.benchmarks.speed_lines import count_parameters, time_decoding, time_fusion, time_vit
from samf.benchmarks.workloads import SIZES, LineSkipped, Settings

Stage = Callable[[Settings], list[Figure]]
LINES: dict[str, dict[str, Stage]] = {
    "parameters": {"parameters": count_parameters},
    "vit": {"vit": time_vit},
    "fusion": {"fusion": time_fusion},
    "decode": {"decode": time_decoding},
    "save": {"save": save_model, "reload": reload_model, "8bit": quantise_model, "8bit_reload": reload_quantised},
    "lora": {"lora": train_lora},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADER = ["stage", "figure", "median", "quartiles", "repeats", "limit", "", "note"]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_subparsers(dest="command", required=True).add_parser("model", help="parameters, speed, memory")
    model.add_argument("--lines", default=",".join(LINES), help=f"some of {','.join(LINES)}")
    model.add_argument("--device", default="cpu", help="cpu, or cuda")
    model.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on a GPU")
    model.add_argument("--size", choices=SIZES, default="full", help="tiny shows that everything runs")
    model.add_argument("--budget", type=float, default=60, help="seconds that a line's repeats may take, about")
    model.add_argument("--threads", type=int, help="CPU threads; default: as torch chooses")
    model.add_argument("--folder", type=Path, help="where 12 GB may lie for a while; default: the system's own")
    model.add_argument("--json", type=Path, help="write the figures here too")
    model.add_argument("--stage", help=argparse.SUPPRESS)  # a child's: LINE/STAGE, its figures to --json
    args = parser.parse_args(argv)
    args.lines = [line for line in args.lines.split(",") if line]
    unknown = sorted(set(args.lines) - set(LINES))
    if unknown or not args.lines:
        parser.error(f"--lines names {unknown}; the lines are {', '.join(LINES)}")
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave --device away for the CPU")
    args.dtype = DTYPES[args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16")]
    return args


# One stage, in this process -------------------------------------------------------------------------------------------


def run_stage(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of `args.stage` as JSON has them, with this process's peak memory."""
    line, _, stage = args.stage.partition("/")
    settings = Settings(args.size, args.device, args.dtype, args.budget, args.folder)
    try:
        figures = LINES[line][stage](settings)
    except LineSkipped as reason:
        return {"figures": [], "skipped": str(reason)}
    return {
        "figures": [figure.summary() for figure in figures + peak_memory(args.device)],
        "machine": describe_machine(args.device),
    }


# All stages, each in a process of its own -------------------------------------------------------------------------------


def run_model(args: argparse.Namespace) -> dict[str, Any]:
    """Run the lines' stages one after the other; returns what --json gets."""
    stages = [(line, stage) for line in args.lines for stage in LINES[line]]
    results, progress = [], tqdm(stages)
    for line, stage in progress:
        progress.set_description(stage)
        if stage == next(iter(LINES[line])):
            folder = tempfile.TemporaryDirectory(prefix="samf_benchmark_", dir=args.folder)
        results.append({"line": line, "stage": stage, **run_child(args, f"{line}/{stage}", Path(folder.name))})
        if stage == list(LINES[line])[-1]:
            folder.cleanup()
    verdicts = [figure["passed"] for result in results for figure in result["figures"]]
    return {
        "command": "model",
        "size": args.size,
        "device": str(args.device),
        "dtype": str(args.dtype).removeprefix("torch."),
        "machine": describe_machine(args.device) | {"threads": args.threads or torch.get_num_threads()},
        "versions": describe_versions(),
        "stages": results,
        "passed": False not in verdicts and not any("error" in result for result in results),
    }


def run_child(args: argparse.Namespace, stage: str, folder: Path) -> dict[str, Any]:
    """A stage's figures, its seconds as a whole, and an `error` where it failed."""
    output = folder / "figures.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "model", f"--stage={stage}", f"--json={output}"]
    command += [f"--folder={folder}", f"--size={args.size}", f"--device={args.device}", f"--budget={args.budget}"]
    command += [f"--dtype={next(name for name, dtype in DTYPES.items() if dtype == args.dtype)}"]
    command += [f"--threads={args.threads}"] if args.threads else []
    started = time.monotonic()
    child = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    result: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    if child.returncode == 0:
        return result | json.loads(output.read_text(encoding="utf-8"))
    reason = "was killed, often for want of memory" if child.returncode == -9 else "failed; its message is above"
    return result | {"figures": [], "error": f"{stage} {reason} (exit status {child.returncode})"}


def table(results: dict[str, Any]) -> str:
    """The results for a reader: a line a figure, in aligned columns that markdown reads too."""
    rows = [HEADER, *(row for result in results["stages"] for row in _stage_rows(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    facts = {"device": results["device"], "dtype": results["dtype"], **results["machine"], **results["versions"]}
    return "\n".join([*lines, "", ", ".join(f"{name} {fact}" for name, fact in facts.items() if fact is not None), ""])


def _stage_rows(result: dict[str, Any]) -> list[list[str]]:
    missing = result.get("error") or result.get("skipped")
    if missing:
        return [[result["stage"], "FAILED" if "error" in result else "skipped", *[""] * 5, missing]]
    rows = []
    for figure in result["figures"]:
        limit = "" if figure["at_least"] is None else f">= {figure['at_least']:g}"
        verdict = {None: "", True: "pass", False: "MISSED"}[figure["passed"]]
        spread = f"{figure['first_quartile']:.4g} to {figure['third_quartile']:.4g}" if figure["repeats"] > 1 else ""
        median = f"{figure['median']:.4g} {figure['unit']}"
        name = [result["stage"], figure["name"]]
        rows.append([*name, median, spread, str(figure["repeats"]), limit, verdict, figure["note"]])
    return rows


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.stage:
        write_json(args.json, run_stage(args))
        return 0
    results = run_model(args)
    if args.json:
        write_json(args.json, results)
    sys.stdout.write(table(results))
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
