"""Report generation of the VLM3D challenge: the scans of a folder into one JSON file.

The layouts are those of the organisers' example containers, github.com/forithmus/VLM3D-Dockers:

- `results`: /output/results.json of 2025 (`reportgen_example_docker` at commit 2fd55f1).
- `predictions`: /output/predictions.json of the platform that followed (`ct_challenges/reportgen_example_docker` at a945900).
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from samf.utils.files import write_json

if TYPE_CHECKING:
    from samf.model.pipeline_samf import SamfReportPipeline

Layout = Literal["results", "predictions"]
SUFFIXES = (".nii.gz", ".nii", ".mha")
SOME_FAILED, ALL_FAILED = 1, 2
_FILES = {"results": "results.json", "predictions": "predictions.json"}
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


class Challenge:
    """One run over a folder.

    Args:
        source: folder of the scans; those of folders in it count, too.
        target: folder of the results.
        layout: of the results.
        resume: keep the reports that are there already.

    Raises:
        ValueError: no scan, two of one name, or results that can't be resumed.
    """

    def __init__(self, source: Path, target: Path, layout: Layout = "results", resume: bool = False) -> None:
        if not source.is_dir():
            raise ValueError(f"{source}: no such folder. Mount the scans there, or name it by --input.")
        self._layout = layout
        self._file = target / _FILES[layout]
        self._scans: dict[str, Path] = {}
        for path in sorted(source.rglob("*")):
            if path.name.lower().endswith(SUFFIXES) and path.is_file() and not path.name.startswith("."):
                name = image_name(path, layout)
                if name in self._scans:
                    raise ValueError(f"{path}: its name in the results, {name}, is also that of {self._scans[name]}.")
                self._scans[name] = path
        if not self._scans:
            raise ValueError(f"{source}: no scan in it; expected files that end in {', '.join(SUFFIXES)}.")
        self._reports = self._earlier() if resume and self._file.exists() else {}

    def run(self, reporter: "SamfReportPipeline", generation: Mapping[str, Any]) -> int:
        """Write the reports and return the exit code: 0, 1 where some scans failed, 2 where all did.

        The file is written again after each scan, so that a run that is stopped has all up to then. A scan that fails
        has no entry: the evaluation leaves it out of the text metrics, where an invented text would count.

        Args:
            reporter: the pipeline.
            generation: options of `generate`.
        """
        failed = 0
        self._write()
        for name, path in tqdm(self._scans.items(), desc="scans", unit="scan"):
            if name in self._reports:
                continue
            try:
                self._reports[name] = reporter(path, **generation).text
            except Exception as error:  # noqa: BLE001 - whatever it is, the other scans must not be lost
                failed += 1
                # A type only for what no reader foresaw: readers' messages hold no patient data, others may.
                known = isinstance(error, (OSError, ValueError))
                reason = " ".join(str(error).split()) if known else type(error).__name__
                sys.stderr.write(f"samf: {path.name}: no report: {reason}\n")
            else:
                self._write()
        if not failed:
            return 0
        sys.stderr.write(f"samf: {failed} of {len(self._scans)} scans have no report.\n")
        return ALL_FAILED if not self._reports else SOME_FAILED

    def _write(self) -> None:
        write_json(self._file, wrapped(self._reports, self._layout))

    def _earlier(self) -> dict[str, str]:
        """Return the reports in the file, of scans that are still there."""
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            value = found if self._layout == "results" else found[0]["outputs"][0]["value"]
            reports = {str(entry["input_image_name"]): str(entry["report"]) for entry in value["generated_reports"]}
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self._file}: no results that could be resumed. Leave out --resume.") from error
        return {name: report for name, report in reports.items() if name in self._scans}


def image_name(path: Path, layout: Layout) -> str:
    """Return the name of a scan in the results.

    It is the file's name without its ending; in the layout `predictions` the last UUID in it, as organisers' files are
    named {batch}_{patient}_{series}.nii.gz.

    Args:
        path: of the file.
        layout: of the results.
    """
    ending = next(end for end in SUFFIXES if path.name.lower().endswith(end))
    stem = path.name[: len(path.name) - len(ending)]
    uuids = [part for part in stem.split("_") if _UUID.fullmatch(part)] if layout == "predictions" else []
    return uuids[-1] if uuids else stem


def wrapped(reports: Mapping[str, str], layout: Layout) -> Any:
    """Return the JSON of reports by the names of their scans.

    Args:
        reports: the texts.
        layout: of the results.
    """
    entries = [{"input_image_name": name, "report": text} for name, text in reports.items()]
    value: dict[str, Any] = {"name": "Generated reports", "type": "Report generation", "generated_reports": entries}
    if layout == "results":
        return {**value, "version": {"major": 1, "minor": 0}}
    return [{"outputs": [{"value": {**value, "version": "1.0"}}]}]
