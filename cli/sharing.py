"""`samf push`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from samf.cli.errors import SOME_FAILED, UsageError, exit_with, log_errors_only, one_line

Check = Annotated[
    Literal["none", "files", "load", "full"],
    typer.Option(
        help="What is checked at the pushed commit: checksums (files), also loading in a fresh process without the "
        "weights (load), or with them and a forward pass (full: downloads everything)."
    ),
]


def add_sharing(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(push)


def push(
    folders: Annotated[list[Path], typer.Argument(help="Folder of a saved model; several with --collection.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub, OWNER/NAME; created if it doesn't exist.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository. Default: the owner's setting."),
    ] = None,
    gated: Annotated[
        Literal["auto", "manual", "off"] | None,
        typer.Option(help="Who downloads must ask: granted at once (auto) or by you (manual)."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, created if it doesn't exist, or refs/pr/N.")] = None,
    pr: Annotated[bool, typer.Option("--pr", "--create-pr", help="Open a pull request instead of a commit.")] = False,
    tag: Annotated[str | None, typer.Option(help="Name for the pushed commit, such as v1.0.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="An adapter's base model on the Hub, ID or ID@REVISION, where it was trained on a folder."),
    ] = None,
    collection: Annotated[
        bool,
        typer.Option(
            "--collection",
            help="Push base, adapter, merged and int4 models to a repository each (NAME-base, NAME-lora, NAME, NAME-int4), "
            "listed as a collection. Of one folder also base, merged and int4 in it.",
        ),
    ] = False,
    check: Check = "load",
    with_handler: Annotated[
        bool, typer.Option("--with-handler", help="Add handler.py, by which Inference Endpoints serve the model.")
    ] = False,
) -> None:
    """Upload a saved model with code, processor and card, and check it by loading it back from the Hub.

    A second push continues one that broke. A card that somebody changed is kept.
    """
    log_errors_only()
    from samf.scripts.push_model import PushOptions, push_collection, push_folder
    from samf.sharing.errors import CheckError, ShareError, UploadError
    from samf.sharing.hub import Target

    options = PushOptions(check, base, with_handler, say=_write_line)
    target = Target(repo_id, private, gated, revision, pr, tag, message)
    try:
        if collection:
            push_collection(folders, target, options)
        elif len(folders) > 1:
            raise UsageError(f"{len(folders)} folders and one repository: add --collection, or push them one by one.")
        else:
            push_folder(folders[0], target, options)
    except (UsageError, ShareError) as error:
        raise exit_with(error) from error
    except (UploadError, CheckError) as error:
        sys.stderr.write(f"samf: {one_line(error)}\n")
        raise typer.Exit(SOME_FAILED) from error


def _write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
