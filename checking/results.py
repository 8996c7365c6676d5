"""The result of a check: its facts as JSON, as text, and what of it is a problem."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samf.checking.files import CheckedFiles
from samf.checking.splits import Overlap, Split
from samf.data.schema import IGNORE_INDEX, JsonObject

_LISTED = 10
_QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class CheckResult:
    """All that a check found.

    Attributes:
        source: the data.
        dataset: its name, if it was given.
        splits: by name.
        overlaps: between splits.
        files: what became of the volumes' files; None if they were not checked.
        tokens: {split: tokens of each report}; empty without a tokenizer.
    """

    source: str
    dataset: str | None
    splits: Mapping[str, Split]
    overlaps: Sequence[Overlap]
    files: CheckedFiles | None = None
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Return what makes training or scores invalid, one line each."""
        found = []
        for overlap in self.overlaps:
            pair = " and ".join(overlap.splits)
            if overlap.patients:
                found.append(f"{len(overlap.patients)} patients are in both {pair}")
            if overlap.volumes:
                found.append(f"{len(overlap.volumes)} volumes are in both {pair}, by name or as copies")
        if self.files is not None:
            for reason, paths in _by_kind(self.files.broken()).items():
                found.append(f"{len(paths)} volumes {reason} (first: {paths[0]})")
        if not any(split.volumes for split in self.splits.values()):
            found.append("no volumes")
        return found

    def to_json(self) -> JsonObject:
        """Return the facts as JSON has them; without texts of reports, and with pseudonyms of patients."""
        splits = {name: _split_json(split, self.tokens.get(name)) for name, split in self.splits.items()}
        return {
            "source": self.source,
            "dataset": self.dataset,
            "splits": splits,
            "overlaps": [overlap.to_json() for overlap in self.overlaps],
            "files": None if self.files is None else _files_json(self.files),
            "problems": self.problems(),
        }


def _by_kind(broken: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, reason in broken.items():
        found.setdefault("are missing" if reason == "missing" else "can't be used", []).append(path)
    return found


def _split_json(split: Split, tokens: Sequence[int] | None) -> JsonObject:
    per_patient = Counter(patient for patient in split.volumes.values() if patient is not None)
    return {
        "volumes": len(split.volumes),
        "patients": len(split.patients),
        "volumes_of_unknown_patients": split.unknown_patients,
        "most_volumes_of_a_patient": max(per_patient.values(), default=0),
        "records": dict(split.tasks),
        "left_out": split.left_out,
        "report_words": quantiles([len(text.split()) for text in split.reports.values()]),
        "report_tokens": None if tokens is None else quantiles(tokens),
        "distinct_reports": len({" ".join(text.lower().split()) for text in split.reports.values()}),
        "answer_words": quantiles(split.answers),
        "labels": {name: label_counts(labels) for name, labels in split.labels.items()},
    }


def label_counts(labels: Sequence[int]) -> dict[str, int]:
    """Return how many volumes a finding is present in, absent from, and unknown for."""
    counts = Counter(labels)
    return {"present": counts[1], "absent": counts[0], "unknown": counts[IGNORE_INDEX]}


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return mean and quantiles; None of nothing."""
    if not len(values):
        return None
    found = {name: float(np.quantile(values, share)) for name, share in _QUANTILES.items()}
    return {"mean": round(float(np.mean(values)), 1), **found}


def _files_json(files: CheckedFiles) -> JsonObject:
    good = [facts for facts in files.facts.values() if facts.problem is None]
    spacing = np.array([facts.spacing for facts in good if len(facts.spacing) == 3]).reshape(-1, 3)
    broken = files.broken()
    return {
        "checked": len(files.facts),
        "of_an_earlier_run": files.resumed,
        "read_whole": sum(facts.is_read for facts in files.facts.values()),
        "at_addresses": files.remote,
        "good": len(good),
        "missing": sum(reason == "missing" for reason in broken.values()),
        "broken": [{"path": path, "reason": reason} for path, reason in broken.items() if reason != "missing"],
        "missing_first": [path for path, reason in broken.items() if reason == "missing"][:_LISTED],
        "copies": len(copies := files.copies()),
        "copies_first": [group[:_LISTED] for group in copies[:_LISTED]],
        "with_warnings": sum(bool(facts.notes) for facts in good),
        "bytes": sum(facts.bytes for facts in good),
        "slice_spacing_mm": quantiles(spacing.max(axis=1)) if len(spacing) else None,
        "pixel_spacing_mm": quantiles(spacing.min(axis=1)) if len(spacing) else None,
    }


# --- As text ----------------------------------------------------------------------------------------------------------


def result_text(result: CheckResult, labels: int = 20) -> str:
    """Return the facts as lines for people.

    Args:
        result: of the check.
        labels: most findings that are listed per split.
    """
    facts = result.to_json()
    lines = [f"{result.source}{f' ({result.dataset})' if result.dataset else ''}"]
    for name, split in facts["splits"].items():
        lines += ["", *_split_lines(name, split, labels)]
    for overlap in facts["overlaps"]:
        lines += ["", *_overlap_lines(overlap)]
    if facts["files"] is not None:
        lines += ["", *_file_lines(facts["files"])]
    lines += ["", *(f"PROBLEM: {problem}" for problem in facts["problems"])]
    return "\n".join(lines + ["no problems found"] * (not facts["problems"])) + "\n"


def _split_lines(name: str, split: Mapping[str, Any], most: int) -> list[str]:
    unknown = split["volumes_of_unknown_patients"]
    lines = [
        f"{name}: {split['volumes']} volumes of {split['patients']} patients"
        + (f" and {unknown} volumes of unknown patients" if unknown else ""),
    ]
    lines += [f"  {task}: {count} records" for task, count in split["records"].items()]
    if words := split["report_words"]:
        lines.append(f"  report length in words: {_quantile_text(words)}; {split['distinct_reports']} distinct reports")
    if tokens := split["report_tokens"]:
        lines.append(f"  report length in tokens: {_quantile_text(tokens)}")
    lines += [f"  left out: {entry['count']}, {entry['reason']}" for entry in split["left_out"]]
    by_count = sorted(split["labels"].items(), key=lambda item: -item[1]["present"])
    for finding, counts in by_count[:most]:
        known = counts["present"] + counts["absent"]
        share = f"{100 * counts['present'] / known:.1f} %" if known else "no labels"
        lines.append(f"  {finding}: {share} of {known}" + (f", {counts['unknown']} unknown" * bool(counts["unknown"])))
    return lines + [f"  and {len(by_count) - most} more findings"] * (len(by_count) > most)


def _quantile_text(values: Mapping[str, float]) -> str:
    return f"median {values['median']:.0f}, 5 % to 95 % {values['p5']:.0f} to {values['p95']:.0f}, at most {values['max']:.0f}"


def _overlap_lines(overlap: Mapping[str, Any]) -> list[str]:
    lines = [f"in both {' and '.join(overlap['splits'])}:"]
    for what in ("patients", "volumes"):
        if overlap[what]["count"]:
            lines.append(f"  {overlap[what]['count']} {what}: {', '.join(overlap[what]['first'])}")
    if texts := overlap["reports"]["texts"]:
        records = ", ".join(f"{count} {split}" for split, count in overlap["reports"]["records"].items())
        lines.append(f"  {texts} report texts, of {records} records (equal reports of normal scans are no error)")
    return lines


def _file_lines(files: Mapping[str, Any]) -> list[str]:
    lines = [
        f"files: {files['good']} of {files['checked']} good, {files['missing']} missing, {len(files['broken'])} broken; "
        f"{files['read_whole']} read as a whole, {files['of_an_earlier_run']} results of an earlier run"
    ]
    lines += [f"  {files['at_addresses']} volumes at addresses, not checked"] * bool(files["at_addresses"])
    lines += [f"  missing: {path}" for path in files["missing_first"]]
    lines += [f"  broken: {entry['path']}: {entry['reason']}" for entry in files["broken"][:_LISTED]]
    lines += [f"  and {len(files['broken']) - _LISTED} more broken"] * (len(files["broken"]) > _LISTED)
    lines += [f"  copies of one volume: {', '.join(group)}" for group in files["copies_first"]]
    if files["slice_spacing_mm"]:
        lines.append(f"  largest voxel edge in mm: {_edge_text(files['slice_spacing_mm'])}")
    return lines


def _edge_text(values: Mapping[str, float]) -> str:
    return f"median {values['median']:g}, {values['min']:g} to {values['max']:g}"
