"""Compare an earlier build of this package with this one: seconds, memory, and whether the results are still equal.

    SAMF_TEST_DATA=FOLDER python -m samf.benchmarks.builds --before COMMIT --json builds.json --markdown builds.md
    python -m samf.benchmarks.builds --before main --lines start,answers --rounds 3
    python -m samf.benchmarks.builds --before PATH/samf --size tiny          # seconds: does every line run?

The earlier commit is checked out into a temporary folder. Both builds run the same small programs and commands in processes of
their own, in turns (before, now, now, before, …), with this Python and its packages. A workload that fails in one build, and a
line for which something is missing, are reported with their reasons. The exit status is 1 when something failed or results
differ. FOLDER has real scans in ct/ and reports in reports/; phantoms replace what is missing.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from samf.benchmarks.build_lines.builds import Build, BuildError, open_builds
from samf.benchmarks.build_lines.lines import LINES
from samf.benchmarks.build_lines.plan import Inputs, Line, Workload
from samf.benchmarks.build_lines.processes import Outcome, WorkloadError, prepare_workload, run_workload
from samf.benchmarks.build_lines.results import LineResult, WorkloadResult, compare_rounds
from samf.benchmarks.build_lines.table import markdown
from samf.benchmarks.measuring import describe_machine, describe_versions
from samf.benchmarks.workloads import LineSkipped
from samf.utils.files import atomic_write, write_json

_ROUNDS = 5


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="commit of this repository, or folder of a package: PATH/samf")
    parser.add_argument("--lines", default=",".join(LINES), help=f"some of {','.join(LINES)}")
    parser.add_argument(
        "--rounds",
        type=int,
        default=_ROUNDS,
        help="in each build, at most; workloads that take minutes run 1 to 3 times",
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny shows that everything runs")
    parser.add_argument("--folder", type=Path, help="for temporary files, 2 GB; default: the system's")
    parser.add_argument("--json", type=Path, help="also write the figures here, after each line")
    parser.add_argument("--markdown", type=Path, help="also write the table here, after each line")
    args = parser.parse_args(argv)
    args.lines = [line for line in args.lines.split(",") if line]
    unknown = sorted(set(args.lines) - set(LINES))
    if unknown or not args.lines:
        parser.error(f"--lines names {unknown}; the lines are {', '.join(LINES)}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    return args


def run_line(name: str, line: Line, builds: Sequence[Build], inputs: Inputs, rounds: int) -> LineResult:
    """Write the inputs of a line and run its workloads.

    Args:
        name: of the line.
        line: returns the workloads.
        builds: "before" and "now".
        inputs: where and at which size.
        rounds: of each workload, at most.
    """
    started = time.monotonic()
    try:
        workloads = line(inputs)
    except LineSkipped as reason:
        return LineResult(name, [], time.monotonic() - started, skipped=str(reason))
    except Exception as error:  # noqa: BLE001  whatever it is, it must not cost the other lines
        return LineResult(name, [], time.monotonic() - started, error=f"{type(error).__name__}: {error}")
    results = [
        run_rounds(workload, builds, inputs.folder / f"workload_{number}", rounds)
        for number, workload in enumerate(tqdm(workloads, desc=name, leave=False))
    ]
    return LineResult(name, results, time.monotonic() - started)


def run_rounds(workload: Workload, builds: Sequence[Build], folder: Path, rounds: int) -> WorkloadResult:
    """Run a workload in both builds in turns; every other round turns the order.

    Args:
        workload: what runs.
        builds: "before" and "now".
        folder: for the files of the builds; created.
        rounds: at most.
    """
    started, pairs = time.monotonic(), []
    kept = {build.name: folder / f"{build.name}_kept" for build in builds}
    try:
        for build in builds:
            kept[build.name].mkdir(parents=True)
            with tempfile.TemporaryDirectory(dir=folder) as out:
                prepare_workload(workload, build, kept[build.name], Path(out))
        for number in tqdm(range(min(rounds, workload.rounds)), desc=workload.name, leave=False):
            pair: dict[str, Outcome] = {}
            for build in builds if number % 2 == 0 else builds[::-1]:
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    pair[build.name] = run_workload(workload, build, kept[build.name], Path(out))
            pairs.append(pair)
    except (WorkloadError, BuildError) as error:
        return WorkloadResult(workload.name, [], None, time.monotonic() - started, workload.note, error=str(error))
    return compare_rounds(workload, pairs, time.monotonic() - started)


def run(args: argparse.Namespace, lines: Mapping[str, Line] = LINES) -> list[LineResult]:
    """Run the lines of the command line; write the files after each of them, and print the table at the end.

    Args:
        args: of `parse_args`.
        lines: name → line.

    Raises:
        BuildError: one of the builds can't be used.
    """
    results: list[LineResult] = []
    with tempfile.TemporaryDirectory(prefix="samf_builds_", dir=args.folder) as temporary:
        root = Path(temporary)
        (root / "shared").mkdir()
        with open_builds(args.before, root) as builds:
            facts = _facts(builds, args.size)
            for name in tqdm(args.lines, desc="lines"):
                with tempfile.TemporaryDirectory(dir=root) as folder:
                    inputs = Inputs(Path(folder), root / "shared", args.size == "tiny")
                    results.append(run_line(name, lines[name], builds, inputs, args.rounds))
                tqdm.write(f"{name}: {results[-1].seconds:.0f} s", file=sys.stderr)
                _write(args, results, facts)
    sys.stdout.write(markdown(results, facts))
    return results


def _facts(builds: Sequence[Build], size: str) -> dict[str, Any]:
    commits = {build.name: build.commit for build in builds}
    return {**commits, "size": size, **describe_machine(torch.device("cpu")), **describe_versions()}


def _write(args: argparse.Namespace, results: Sequence[LineResult], facts: Mapping[str, Any]) -> None:
    if args.json:
        write_json(args.json, {**facts, "lines": list(map(asdict, results))})
    if args.markdown:
        atomic_write(args.markdown, markdown(results, facts))


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """End the process as an interrupt does, so that the checkout and temporary files are removed."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the builds; return the exit status."""
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)
    try:
        results = run(args)
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    workloads = [workload for line in results for workload in line.workloads]
    failed = any(line.error for line in results) or any(one.error or one.difference for one in workloads)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
