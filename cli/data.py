"""`samf data`: commands about data sets."""

import importlib
import sys

import typer

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def add_data(app: typer.Typer) -> None:
    """Add the group `data` and its commands."""
    group = typer.Typer(help="Look at data sets before training.", no_args_is_help=True)

    @group.command(
        "check",
        help="Check a data set: counts, patients, what splits share, files, labels, report lengths.",
        context_settings=_PASS_ON,
    )
    def check(context: typer.Context) -> None:
        sys.argv = ["samf data check", *context.args]  # for its usage line
        raise typer.Exit(importlib.import_module("samf.checking.command").main(context.args))

    @group.command(
        "pack",
        help="Pack a filled cache and its records into shards, which training streams from an object store.",
        context_settings=_PASS_ON,
    )
    def pack(context: typer.Context) -> None:
        sys.argv = ["samf data pack", *context.args]
        raise typer.Exit(importlib.import_module("samf.data.shards.command").main(context.args))

    app.add_typer(group, name="data")
