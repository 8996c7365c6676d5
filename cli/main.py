"""The `samf` command."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from samf.cli.data import add_data
from samf.cli.doors import add_doors
from samf.cli.errors import UsageError, exit_with, log_errors_only
from samf.cli.hospital import add_hospital
from samf.cli.options import Device, Model, Quantize, Revision
from samf.cli.serving import add_serving
from samf.cli.sharing import add_sharing
from samf.cli.web import add_web

app = typer.Typer(
    name="samf",
    help="Write radiology reports of chest CT scans. For research only, not for diagnosis.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Scans = Annotated[list[str], typer.Argument(help="Files, folders, globs or addresses of scans.", metavar="PATH…")]
Out = Annotated[Path | None, typer.Option(help="Folder for the files of each scan; what is there is left out.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Files to write into --out: txt, json, pdf, sr, dicom-pdf, seg, fhir; several with commas. Default: txt,json.",
    ),
]
AnyRegion = Annotated[bool, typer.Option("--any-region", help="Also take scans that show no chest.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line on standard output.")]
Tokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens. Default: the model's.")]
Evidence = Annotated[
    bool,
    typer.Option("--evidence", help="Also write what of the scan each sentence rests on (PNG, NIfTI); needs --out."),
]
Beams = Annotated[int, typer.Option(help="Beams of the search; 1 = greedy.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            sys.stdout.write(f"samf {version('samf')}\n")
        except PackageNotFoundError:
            sys.stdout.write("samf, not installed\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def _run(
    paths: list[str],
    model: str | None,
    revision: str | None,
    device: str,
    quantize: str | None,
    formats: str | None,
    **request: Any,
) -> None:
    """Answer a request; `request` are the fields of `Request` except for `formats`."""
    from samf.cli.exporting import check_formats, check_scans
    from samf.cli.reporting import Request, load_reporter, parse_formats, prepare_process, write_reports
    from samf.cli.scans import find_scans

    prepare_process(model, revision, quantize)
    log_errors_only()
    try:
        if request["evidence"] and request["out"] is None:
            raise UsageError("--evidence writes files: say where they go, by --out FOLDER.")
        asked = Request(formats=parse_formats(formats, request["out"]), **request)
        check_formats(asked.formats, asked.evidence)
        scans = find_scans(paths)
        check_scans(scans, asked.formats)
        code = write_reports(load_reporter(model, device, revision, quantize), scans, asked)
    except UsageError as error:
        raise exit_with(error) from error
    if code:
        raise typer.Exit(code)


def _generation(max_new_tokens: int | None, num_beams: int) -> dict[str, Any]:
    longest = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    return {"num_beams": num_beams, "do_sample": False, **longest}


@app.command()
def report(
    paths: Scans,
    model: Model = None,
    revision: Revision = None,
    device: Device = "auto",
    quantize: Quantize = None,
    out: Out = None,
    formats: Format = None,
    any_region: AnyRegion = False,
    as_json: Json = False,
    max_new_tokens: Tokens = None,
    num_beams: Beams = 1,
    evidence: Evidence = False,
) -> None:
    """Write the report of each scan."""
    generation = _generation(max_new_tokens, num_beams)
    asked = {"out": out, "as_json": as_json, "any_region": any_region, "generation": generation, "evidence": evidence}
    _run(paths, model, revision, device, quantize, formats, **asked)


@app.command()
def ask(
    paths: Scans,
    question: Annotated[list[str], typer.Option(help="What to ask; may be given several times.")],
    model: Model = None,
    revision: Revision = None,
    device: Device = "auto",
    quantize: Quantize = None,
    out: Out = None,
    formats: Format = None,
    any_region: AnyRegion = False,
    as_json: Json = False,
    max_new_tokens: Tokens = None,
    num_beams: Beams = 1,
    evidence: Evidence = False,
) -> None:
    """Answer questions about each scan, which is encoded once for all of them."""
    generation = _generation(max_new_tokens, num_beams)
    asked = {"out": out, "as_json": as_json, "any_region": any_region, "generation": generation, "evidence": evidence}
    _run(paths, model, revision, device, quantize, formats, questions=question, **asked)


@app.command()
def info(
    path: Annotated[str, typer.Argument(help="File, folder or address of a scan.")], as_json: Json = False
) -> None:
    """Say what a file is: geometry, HU, region, and what was repaired."""
    from samf.cli.facts import facts_text, scan_facts

    log_errors_only()
    try:
        facts = scan_facts(path)
    except UsageError as error:
        raise exit_with(error) from error
    sys.stdout.write(json.dumps(dataclasses.asdict(facts)) + "\n" if as_json else facts_text(facts))


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="The .nii.gz file to write.")],
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    finding: Annotated[
        list[str] | None, typer.Option(help="What it shows, such as 'Lung nodule'; may be given several times.")
    ] = None,
    normal: Annotated[bool, typer.Option("--normal", help="A chest without findings.")] = False,
    voxel_mm: Annotated[float, typer.Option(min=0.5, help="Mean voxel edge in mm.")] = 5.0,
) -> None:
    """Write one synthetic chest CT, and say what it shows; `samf phantoms` writes a data set of them."""
    from samf.phantoms.single import write_phantom

    try:
        shown = write_phantom(out, seed, finding or ([] if normal else None), voxel_mm)
    except (ValueError, OSError) as error:
        raise exit_with(error) from error
    sys.stdout.write(f"{out}: {shown}\n")


@app.command()
def recipe(
    name: Annotated[
        str | None, typer.Argument(help="Such as ct_rate_ao2d or demo/3_report; without one: a list.")
    ] = None,
) -> None:
    """Print a recipe, to be saved and changed; or list those that `--config NAME` finds."""
    from samf.cli.tools import recipe as recipe_or_list

    try:
        sys.stdout.write(recipe_or_list(name))
    except UsageError as error:
        raise exit_with(error) from error


add_web(app)
add_serving(app)
add_hospital(app)
add_data(app)
add_sharing(app)
add_doors(app)

if __name__ == "__main__":
    app()
