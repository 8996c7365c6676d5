"""Commands that hand all their arguments to the `main` of a script or module."""

import importlib
import sys

import typer

from samf.utils.auto_classes import register_classes

# Command → module, summary.
DOORS = {
    "view": ("samf.reporting.slice_view", "Draw the slices that a model reads as a PNG."),
    "train": ("samf.train", "Train a model (train.py)."),
    "evaluate": ("samf.eval", "Answer and score a data set (eval.py)."),
    "preprocess": ("samf.preprocess", "Fill the slice cache ahead of training (preprocess.py)."),
    "pretrain": ("samf.pretrain_encoder", "Pretrain the slice encoder (pretrain_encoder.py)."),
    "warmup": ("samf.warmup_aggregator", "Warm up the aggregator (warmup_aggregator.py)."),
    "calibrate": ("samf.scripts.calibrate_findings", "Calibrate the findings of a model on held-out patients."),
    "convert": ("samf.scripts.convert_published_checkpoint", "Convert the authors' checkpoints."),
    "benchmark": ("samf.benchmarks.runner", "Measure speed and memory."),
    "phantoms": ("samf.phantoms.dataset", "Write a data set of phantoms."),
    "demo": ("samf.experiments.demo", "Report on a phantom, then train and evaluate a tiny model on phantoms."),
}
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def add_doors(app: typer.Typer) -> None:
    """Add one command per door."""
    for name, (module, summary) in DOORS.items():
        _add_door(app, name, module, summary)


def _add_door(app: typer.Typer, name: str, module: str, summary: str) -> None:
    def door(context: typer.Context) -> None:
        sys.argv = [f"samf {name}", *context.args]
        register_classes()
        raise typer.Exit(importlib.import_module(module).main(context.args) or 0)

    app.command(name, help=summary, context_settings=_PASS_ON, rich_help_panel="Scripts")(door)
