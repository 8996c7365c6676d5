"""`samf serve`: the web page."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samf.cli.errors import UsageError, exit_with, log_errors_only
from samf.cli.options import Device, Model, Quantize, Revision
from samf.utils.servers import is_loopback, open_port, parse_size
from samf.web.logins import VARIABLE, LoginError, Logins

if TYPE_CHECKING:
    from samf.web.server import ServeOptions

_EVIDENCE = ("fast", "full", "none")


def add_web(app: typer.Typer) -> None:
    """Add `samf serve`."""
    app.command("serve")(serve)


def serve(
    model: Model = None,
    revision: Revision = None,
    device: Device = "auto",
    quantize: Quantize = None,
    host: Annotated[
        str, typer.Option(help="Address to bind to; others than this machine's need --auth.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = a free one.")] = 7860,
    auth: Annotated[
        Path | None,
        typer.Option(help=f"File with USER:PASSWORD, one per line. Or set ${VARIABLE} to such lines."),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody in who reaches --host, as behind a proxy with log-in.")
    ] = False,
    max_upload: Annotated[str, typer.Option(help="Largest scan, such as 500mb or 2gb.")] = "1gb",
    evidence: Annotated[
        str, typer.Option(help="How what a sentence rests on is found: fast, full (slower), or none.")
    ] = "fast",
) -> None:
    """Serve the web page: drop a scan, read its report, see what each sentence rests on."""
    from samf.cli.reporting import prepare_process

    prepare_process(model, revision, quantize)
    log_errors_only()
    try:
        options = _options(host, port, auth, no_auth, max_upload, evidence)
        _run(options, model, device, revision, quantize)
    except UsageError as error:
        raise exit_with(error) from error


def _options(host: str, port: int, auth: Path | None, no_auth: bool, max_upload: str, evidence: str) -> "ServeOptions":
    """Return the options, checked.

    Args:
        host: address to bind to.
        port: of the page.
        auth: file with log-ins.
        no_auth: whether other machines may come in without.
        max_upload: largest upload.
        evidence: how it is found.

    Raises:
        UsageError: an option that can't be used, or a page that other machines would reach without log-in.
    """
    from samf.web.server import ServeOptions

    given = os.environ.get(VARIABLE)
    try:
        logins = (
            Logins.read(auth) if auth is not None else None if given is None else Logins.parse(given, f"${VARIABLE}")
        )
    except LoginError as error:
        raise UsageError(str(error)) from error
    if logins is not None and no_auth:
        raise UsageError("--no-auth next to log-ins; expected one of them.")
    if logins is None and not no_auth and not is_loopback(host):
        raise UsageError(
            f"--host {host}: other machines would reach the page, and its scans, without a log-in. Add --auth FILE "
            f"(USER:PASSWORD, one per line), or --no-auth if something in front of it asks for one."
        )
    if evidence not in _EVIDENCE:
        raise UsageError(f"--evidence {evidence}: expected one of {', '.join(_EVIDENCE)}.")
    try:
        size = parse_size(max_upload)
    except ValueError as error:
        raise UsageError(f"--max-upload {error}") from error
    return ServeOptions(host, port, logins, size, evidence)  # type: ignore[arg-type]


def _run(options: "ServeOptions", model: str | None, device: str, revision: str | None, quantize: str | None) -> None:
    """Load the model, serve the page and end when the process is asked to.

    Args:
        options: of the page.
        model: folder or Hub id; None = the demo model.
        device: where it runs.
        revision: on the Hub.
        quantize: type of the language model's weights.

    Raises:
        UsageError: the model can't be loaded, gradio is missing, or the port is taken.
    """
    from samf.web.server import RunningPage, require_gradio

    try:
        require_gradio()
        open_port(options.host, options.port).close()  # before the model is loaded, which may take minutes
    except (ImportError, ValueError) as error:
        raise UsageError(str(error)) from error
    from samf.cli.reporting import load_reporter

    reporter = load_reporter(model, device, revision, quantize)
    try:
        page = RunningPage(reporter, options)
    except OSError as error:
        raise UsageError(
            f"Port {options.port} of {options.host} can't be used: {error} Choose another --port."
        ) from error
    sys.stderr.write(f"{page.address} (for research only, not for diagnosis; Ctrl+C ends it)\n")
    try:
        page.wait()
    finally:
        page.close()
