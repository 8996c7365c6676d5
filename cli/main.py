"""The `samf` command."""

import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from samf.cli.reporting import (
    UsageError,
    exit_with,
    facts_text,
    find_scans,
    load_reporter,
    scan_facts,
    write_reports,
)

app = typer.Typer(
    name="samf",
    help="Write radiology reports of chest CT scans. For research only, not for diagnosis.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Scans = Annotated[list[str], typer.Argument(help="Files, folders, globs or addresses of scans.", metavar="PATH…")]
Model = Annotated[str, typer.Option(envvar="SAMF_MODEL", help="Folder or Hub id of the model.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
Out = Annotated[Path | None, typer.Option(help="Folder for a .txt and a .json per scan; what is there is left out.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line on standard output.")]
Tokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens; default: the model's.")]
Evidence = Annotated[
    bool,
    typer.Option("--evidence", help="Also write what of the scan each sentence rests on (PNG, NIfTI); needs --out."),
]
Beams = Annotated[int, typer.Option(help="Beams of the search; 1 = greedy.")]


def _run(
    paths: list[str],
    questions: list[str],
    model: str,
    revision: str | None,
    device: str,
    out: Path | None,
    as_json: bool,
    max_new_tokens: int | None,
    num_beams: int,
    evidence: bool,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    options = {"num_beams": num_beams, "do_sample": False}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    if evidence:
        options["evidence"] = True
    try:
        if evidence and out is None:
            raise UsageError("--evidence writes files: name a folder for them with --out.")
        scans = find_scans(paths)
        reporter = load_reporter(model, device, revision)
        code = write_reports(reporter, scans, questions, out, as_json, **options)
    except UsageError as error:
        raise exit_with(error) from error
    if code:
        raise typer.Exit(code)


@app.command()
def report(
    paths: Scans,
    model: Model,
    revision: Revision = None,
    device: Device = "auto",
    out: Out = None,
    as_json: Json = False,
    max_new_tokens: Tokens = None,
    num_beams: Beams = 1,
    evidence: Evidence = False,
) -> None:
    """Write the report of each scan."""
    _run(paths, [], model, revision, device, out, as_json, max_new_tokens, num_beams, evidence)


@app.command()
def ask(
    paths: Scans,
    model: Model,
    question: Annotated[list[str], typer.Option(help="What to ask; may be given several times.")],
    revision: Revision = None,
    device: Device = "auto",
    out: Out = None,
    as_json: Json = False,
    max_new_tokens: Tokens = None,
    num_beams: Beams = 1,
    evidence: Evidence = False,
) -> None:
    """Answer questions about each scan, which is encoded once for all of them."""
    _run(paths, question, model, revision, device, out, as_json, max_new_tokens, num_beams, evidence)


@app.command()
def info(
    path: Annotated[str, typer.Argument(help="File, folder or address of a scan.")], as_json: Json = False
) -> None:
    """Say what a file is: geometry, HU, and what was repaired."""
    import dataclasses

    logging.basicConfig(level=logging.ERROR)
    try:
        facts = scan_facts(path)
    except UsageError as error:
        raise exit_with(error) from error
    sys.stdout.write(json.dumps(dataclasses.asdict(facts)) + "\n" if as_json else facts_text(facts))


_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
# Commands that hand all their arguments to the `main` of a module.
DOORS = {
    "view": ("samf.reporting.slice_view", "Draw the slices that a model reads as a PNG."),
    "train": ("samf.train", "Train a model (train.py)."),
    "evaluate": ("samf.eval", "Answer and score a data set (eval.py)."),
    "preprocess": ("samf.preprocess", "Fill the slice cache ahead of training (preprocess.py)."),
    "pretrain": ("samf.pretrain_encoder", "Pretrain the slice encoder (pretrain_encoder.py)."),
    "warmup": ("samf.warmup_aggregator", "Warm up the aggregator (warmup_aggregator.py)."),
    "convert": ("samf.scripts.convert_published_checkpoint", "Convert the authors' checkpoints."),
    "benchmark": ("samf.benchmarks.runner", "Measure speed and memory."),
    "phantoms": ("samf.phantoms.dataset", "Write a data set of phantoms."),
}


def _add_door(name: str, module: str, summary: str) -> None:
    def door(context: typer.Context) -> None:
        sys.argv = [f"samf {name}", *context.args]
        raise typer.Exit(importlib.import_module(module).main(context.args) or 0)

    app.command(name, help=summary, context_settings=_PASS_ON)(door)


for _name, (_module, _summary) in DOORS.items():
    _add_door(_name, _module, _summary)

if __name__ == "__main__":
    app()
