"""`samf api` and `samf challenge`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from samf.cli.errors import UsageError, exit_with, log_errors_only
from samf.cli.options import Device, Model, Quantize, Revision
from samf.utils.packaged import DEMO_MODEL
from samf.utils.servers import is_loopback, open_port, parse_size

if TYPE_CHECKING:
    from samf.serving.settings import ApiSettings


def add_serving(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(api)
    app.command()(challenge)


def api(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 = all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 = any that is free.", min=0, max=65535)] = 8000,
    model: Model = None,
    revision: Revision = None,
    device: Device = "auto",
    quantize: Quantize = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with API keys, one per line.")] = None,
    max_upload: Annotated[str, typer.Option(help="Largest volume, as a file.")] = "1gb",
    scan_folder: Annotated[Path | None, typer.Option(help="Clients may name scans below this folder.")] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are told to come back.", min=1)] = 32,
    batch: Annotated[int, typer.Option(help="Requests that are answered together.", min=1)] = 8,
    cache_scans: Annotated[int, typer.Option(help="Encoded scans kept for further questions.", min=0)] = 16,
) -> None:
    """Serve reports and answers by an OpenAI-compatible API."""
    from samf.cli.reporting import load_reporter, prepare_process

    prepare_process(model, revision, quantize)
    log_errors_only()
    try:
        settings = _api_settings(model, api_key_file, max_upload, scan_folder, queue, batch, cache_scans)
        try:
            from samf.serving.server import serve
        except ImportError as error:
            raise UsageError(f"samf api needs {error.name}: pip install 'samf[api]'") from error
        try:
            listening = open_port(host, port)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not is_loopback(host) and not settings.keys:
            sys.stderr.write(f"Warning: anyone who reaches {host} can use this API; add --api-key-file.\n")
        serve(load_reporter(model, device, revision, quantize), settings, listening)
    except UsageError as error:
        raise exit_with(error) from error


def _api_settings(
    model: str | None,
    api_key_file: Path | None,
    max_upload: str,
    scan_folder: Path | None,
    queue: int,
    batch: int,
    cache_scans: int,
) -> "ApiSettings":
    """Return the settings that the options name; raise UsageError for a bad one."""
    from samf.model.model_card import public_name
    from samf.serving.settings import ApiSettings, read_keys

    if scan_folder is not None and not scan_folder.is_dir():
        raise UsageError(f"--scan-folder {scan_folder}: no such folder.")
    try:
        size = parse_size(max_upload)
    except ValueError as error:
        raise UsageError(f"--max-upload {error}") from error
    try:
        return ApiSettings(
            model_id=public_name(str(model or DEMO_MODEL)),
            keys=frozenset() if api_key_file is None else read_keys(api_key_file),
            max_upload=size,
            scan_folder=scan_folder,
            queue=queue,
            batch=batch,
            cached_scans=cache_scans,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def challenge(
    input_folder: Annotated[Path, typer.Option("--input", help="Folder of .mha, .nii and .nii.gz files.")] = Path(
        "/input"
    ),
    output_folder: Annotated[Path, typer.Option("--output", help="Folder for the results.")] = Path("/output"),
    layout: Annotated[
        Literal["results", "predictions"],
        typer.Option(help="results: results.json of 2025; predictions: predictions.json of the present platform."),
    ] = "results",
    resume: Annotated[bool, typer.Option("--resume", help="Keep the reports that are in the output already.")] = False,
    model: Model = None,
    revision: Revision = None,
    device: Device = "auto",
    quantize: Quantize = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest report, in tokens. Default: the model's.")] = None,
) -> None:
    """Write the reports of the VLM3D challenge: all scans of a folder into one JSON file, without a network."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
    from samf.cli.reporting import load_reporter, prepare_process

    prepare_process(model, revision, quantize)
    log_errors_only()
    from samf.serving.challenge import Challenge

    try:
        task = Challenge(input_folder, output_folder, layout, resume)
        generation = {"do_sample": False, **({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})}
        code = task.run(load_reporter(model, device, revision, quantize), generation)
    except (OSError, ValueError) as error:
        raise exit_with(error) from error
    except UsageError as error:
        raise exit_with(error) from error
    if code:
        raise typer.Exit(code)
