"""`samf listen`, `samf watch` and `samf inbox`: series in by DICOM or by a folder, reports out."""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samf.cli.errors import SOME_FAILED, UsageError, exit_with, log_errors_only, one_line
from samf.cli.options import Device, Model, Quantize, Revision
from samf.utils.servers import open_port

if TYPE_CHECKING:
    from samf.reporting.hospital.destinations import Destination
    from samf.reporting.hospital.service import Plan, Service
    from samf.reporting.hospital.worker import ReportMaker

_PANEL = "Hospital"
_GB = 1_000_000_000
_SECONDS_PER_HOUR = 3600.0

Out = Annotated[Path, typer.Option(help="Folder for reports, journal and failures.json; the listener's images too.")]
SendTo = Annotated[
    list[str] | None,
    typer.Option(
        "--send-to", metavar="AE@HOST:PORT", help="DICOM node that gets the reports; several times for several."
    ),
]
Stow = Annotated[
    list[str] | None,
    typer.Option(metavar="URL", help="DICOMweb service that gets the reports. $SAMF_STOW_AUTHORIZATION: its header."),
]
Title = Annotated[str, typer.Option("--aet", help="Own AE title.")]
Formats = Annotated[
    str, typer.Option("--format", help="Files of each report: sr, dicom-pdf and what samf report writes; by commas.")
]
Quiet = Annotated[float, typer.Option("--quiet-time", min=0.1, help="Seconds without a change that end a series.")]
AnyRegion = Annotated[bool, typer.Option("--any-region", help="Also report on series that show no chest.")]
Tokens = Annotated[int | None, typer.Option(help="Longest report, in tokens. Default: the model's.")]


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The options that both commands have."""

    out: Path
    send_to: list[str]
    stow: list[str]
    aet: str
    formats: str
    quiet_time: float
    model: str | None
    revision: str | None
    device: str
    quantize: str | None
    any_region: bool
    max_new_tokens: int | None
    keep_images: float = 0.0


def add_hospital(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(rich_help_panel=_PANEL)(listen)
    app.command(rich_help_panel=_PANEL)(watch)
    app.command(rich_help_panel=_PANEL)(inbox)


def listen(
    out: Out,
    port: Annotated[int, typer.Option(min=0, max=65535, help="To listen on; 0 = any that is free.")] = 11112,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 = all of this machine.")] = "127.0.0.1",
    aet: Title = "SAMF",
    send_to: SendTo = None,
    stow: Stow = None,
    formats: Formats = "sr",
    quiet_time: Quiet = 30.0,
    min_free: Annotated[
        float, typer.Option(min=0, help="GB that stay free on the disk; else images are refused.")
    ] = 2.0,
    keep_images: Annotated[
        float, typer.Option(min=0, help="Hours for which images outlive their report's sending.")
    ] = 24,
    allow: Annotated[
        list[str] | None, typer.Option(help="AE title that may call; several times. Default: all.")
    ] = None,
    commit_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AE@HOST:PORT", help="Where this AE title gets storage commitments; default: on its call."
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    device: Device = "auto",
    quantize: Quantize = None,
    any_region: AnyRegion = False,
    max_new_tokens: Tokens = None,
) -> None:
    """Receive CT series by DICOM, report on each when it is complete, send the reports on. No encryption, no logins."""
    asked = _Asked(
        out, send_to or [], stow or [], aet, formats, quiet_time, model, revision, device, quantize, any_region,
        max_new_tokens, keep_images,
    )  # fmt: skip
    _prepare(asked)

    def check() -> None:
        from samf.reporting.hospital.extra import require

        for title in allow or []:
            _check_title(title, "--allow")
        _peers(commit_to or [], "--commit-to")
        require("pynetdicom", "Listening for DICOM")
        open_port(host, port).close()

    def run(plan: "Plan") -> bool:
        from samf.reporting.hospital.receiver import Listening
        from samf.reporting.hospital.service import listen as run_listener

        nodes = {peer.title: peer for peer in _peers(commit_to or [], "--commit-to")}
        listening = Listening(host, port, aet, int(min_free * _GB), tuple(allow or []), nodes)

        def ready(service: "Service", bound: int) -> None:
            logging.getLogger(_LOGGER).info("listening as %s on %s:%d", aet, host, bound)

        return run_listener(plan, listening, ready)

    _serve(asked, check, run)


def watch(
    folder: Annotated[Path, typer.Argument(help="Series are dropped into it: files, zips, folders of DICOM slices.")],
    out: Out,
    aet: Title = "SAMF",
    send_to: SendTo = None,
    stow: Stow = None,
    formats: Formats = "sr",
    quiet_time: Quiet = 30.0,
    model: Model = None,
    revision: Revision = None,
    device: Device = "auto",
    quantize: Quantize = None,
    any_region: AnyRegion = False,
    max_new_tokens: Tokens = None,
) -> None:
    """Report on each series that is dropped into a folder, and send the reports on. The folder is only read."""
    asked = _Asked(
        out, send_to or [], stow or [], aet, formats, quiet_time, model, revision, device, quantize, any_region,
        max_new_tokens,
    )  # fmt: skip
    _prepare(asked)

    def check() -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; name the one that series are dropped into.")

    def run(plan: "Plan") -> bool:
        from samf.reporting.hospital.service import watch as run_watcher

        def ready(_: "Service") -> None:
            logging.getLogger(_LOGGER).info("watching the folder")

        return run_watcher(plan, folder, ready)

    _serve(asked, check, run)


def inbox(
    out: Annotated[Path, typer.Argument(help="The --out folder of samf listen or samf watch, running or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Let series without a report be tried again.")] = False,
) -> None:
    """Count what a listener or watcher has gathered, reported, refused and sent."""
    from samf.reporting.hospital.status import read_failures, read_status, retry_failures, status_text

    try:
        if retry:
            sys.stderr.write(f"{retry_failures(out)} series will be tried again.\n")
        status, failures = read_status(out), read_failures(out)
    except OSError as error:
        raise exit_with(error) from error
    if as_json:
        sys.stdout.write(json.dumps({**dataclasses.asdict(status), "failures": failures}, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(status_text(status))


_LOGGER = "samf.reporting.hospital"


def _serve(asked: _Asked, check: Callable[[], None], run: "Callable[[Plan], bool]") -> None:
    """Check the options, load the model and run until SIGTERM.

    Args:
        asked: the options that both commands have.
        check: raises UsageError or ValueError for the command's own.
        run: takes a `Plan`; returns whether the last report was finished.
    """
    _log_own_lines()
    try:
        finished = run(_plan(asked, check))
    except (UsageError, OSError, ValueError, ImportError, RuntimeError) as error:
        raise exit_with(error) from error
    if not finished:
        # A thread is still in the model. Nothing of it is in the journal: the next process takes the series up again.
        logging.getLogger(_LOGGER).warning("ended during a report, which the next start makes again")
        sys.stderr.flush()
        os._exit(SOME_FAILED)


def _log_own_lines() -> None:
    """Log this part's own lines, which never name a patient, and nothing of libraries, which might."""
    from samf.reporting.hospital.extra import silence_libraries

    log_errors_only()
    silence_libraries()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    own = logging.getLogger(_LOGGER)
    own.handlers[:] = [handler]
    own.setLevel(logging.INFO)
    own.propagate = False
    for name in ("samf.model", "samf.reporting.exports"):  # what they warn of is among a report's warnings
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _plan(asked: _Asked, check: Callable[[], None]) -> "Plan":
    """Return the plan of options; the model is loaded last.

    Args:
        asked: the options that both commands have.
        check: of the command's own options.

    Raises:
        UsageError: an option that can't be used.
    """
    from samf.reporting.exports import check_libraries, export
    from samf.reporting.hospital.service import Plan, locked

    _check_title(asked.aet, "--aet")
    if asked.out.exists() and not asked.out.is_dir():
        raise UsageError(f"--out {asked.out}: found a file; expected a folder, or a name that is free.")
    formats = _formats(asked.formats)
    check_libraries(formats)
    destinations = _destinations(asked)
    check()
    with locked(
        asked.out.absolute()
    ):  # the model takes long to load; that another process has the folder is said before
        pass
    return Plan(
        asked.out.absolute(),
        formats,
        destinations,
        asked.quiet_time,
        asked.keep_images * _SECONDS_PER_HOUR,
        _load(asked),
        export,
    )


def _formats(text: str) -> list[str]:
    from samf.cli.reporting import parse_formats
    from samf.reporting.exports import FORMATS

    formats = parse_formats(text, Path())
    for name in formats:
        if FORMATS[name].evidence:
            raise UsageError(
                f"--format {name}: needs evidence, which is not computed here; use samf report --evidence."
            )
    return formats


def _check_title(title: str, option: str) -> None:
    from samf.reporting.hospital.address import check_title

    if not check_title(title):
        raise UsageError(f"{option} {title}: expected an AE title of 1 to 16 ASCII characters without a backslash.")


def _peers(texts: list[str], option: str) -> list[Any]:
    from samf.reporting.hospital.address import PeerAddress

    try:
        return [PeerAddress.parse(text) for text in texts]
    except ValueError as error:
        raise UsageError(f"{option} {error}") from error


def _destinations(asked: _Asked) -> "list[Destination]":
    from samf.reporting.hospital.destinations import DicomDestination, StowDestination

    nodes = [DicomDestination(peer, asked.aet) for peer in dict.fromkeys(_peers(asked.send_to, "--send-to"))]
    try:
        return [*nodes, *(StowDestination(url) for url in dict.fromkeys(asked.stow))]
    except ValueError as error:
        raise UsageError(f"--stow {error}") from error


def _prepare(asked: _Asked) -> None:
    """Settle what the process needs for the model, before anything else."""
    from samf.cli.reporting import prepare_process

    prepare_process(asked.model, asked.revision, asked.quantize)


def _load(asked: _Asked) -> "ReportMaker":
    """Return what makes the report of a scan by the model, which is loaded once.

    Raises:
        UsageError: it can't be loaded.
    """
    from samf.cli.reporting import load_reporter
    from samf.model.report_samf import Report

    reporter = load_reporter(asked.model, asked.device, asked.revision, asked.quantize)
    if reporter.model.config.caution:
        sys.stderr.write(f"Warning: {one_line(reporter.model.config.caution)}\n")
    longest = {} if asked.max_new_tokens is None else {"max_new_tokens": asked.max_new_tokens}

    def make_report(scan: Path) -> Report:
        encoded = reporter.encode(str(scan), require_chest=not asked.any_region)
        report: Report = reporter(encoded, num_beams=1, do_sample=False, **longest)
        return report

    return make_report
