"""Metrics by subgroup: sex, age, scanner and reconstruction kernel of CT-RATE's metadata."""

import os
import re
from collections import Counter
from collections.abc import Container, Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from samf.evaluation.metrics.bootstrap import patient_intervals
from samf.evaluation.metrics.sampled_metric import SampledMetric
from samf.evaluation.schema import PredictionRow, SubgroupRow
from samf.utils.text_files import open_csv

SUBGROUP_COLUMNS = ("sex", "age", "scanner", "kernel")
AGE_BANDS = ((0, 40, "under 40"), (40, 60, "40 to 59"), (60, 75, "60 to 74"), (75, 200, "75 and over"))
UNKNOWN = "unknown"
SMALL_GROUPS = "small groups together"
_VOLUME = re.compile(r"((?:train|valid)_\d+_[a-z]+)(?:_(\d+))?(?![\da-z])")


def read_subgroups(path: str | os.PathLike, rows: Sequence[PredictionRow]) -> dict[str, list[str]]:
    """Return the subgroup of each row according to CT-RATE's metadata CSV.

    A row's volume is read from its `volume` or `id`; where they name only a scan, its first reconstruction in the table
    counts. What the table lacks is "unknown".

    Args:
        path: CT-RATE's metadata CSV.
        rows: rows of a predictions file, (N,).

    Returns:
        "sex", "age", "scanner" and "kernel" → one value per row, (N,).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the table has no column VolumeName.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected CT-RATE's metadata, e.g. validation_metadata.csv.")
    with open_csv(path) as reader:
        if "VolumeName" not in (reader.fieldnames or ()):
            raise ValueError(f"{path}: no column VolumeName; its columns are {reader.fieldnames}.")
        volumes: dict[str, dict[str, str]] = {}
        for line in reader:
            name = _VOLUME.search(line["VolumeName"])
            if name:
                values = _subgroup_values(line)
                volumes.setdefault(name[1], values)
                volumes[name[0]] = values
    unknown = dict.fromkeys(SUBGROUP_COLUMNS, UNKNOWN)
    found = [volumes.get(_row_volume(row, volumes) or "", unknown) for row in rows]
    return {column: [values[column] for values in found] for column in SUBGROUP_COLUMNS}


def _row_volume(row: PredictionRow, volumes: Container[str]) -> str | None:
    """Return the first name in a row, of a volume before a scan, that the table knows."""
    names = [_VOLUME.search(str(name or "")) for name in (row.get("volume"), row.get("id"), row.get("scan_id"))]
    candidates = [name[0] for name in names if name] + [name[1] for name in names if name]
    return next((name for name in candidates if name in volumes), None)


def _subgroup_values(line: Mapping[str, str]) -> dict[str, str]:
    scanner = " ".join(filter(None, (line.get("Manufacturer", ""), line.get("ManufacturerModelName", ""))))
    return {
        "sex": (line.get("PatientSex") or "").strip() or UNKNOWN,
        "age": _age_band(line.get("PatientAge") or ""),
        "scanner": scanner.strip() or UNKNOWN,
        # Some are lists: "['Br40f', '3']".
        "kernel": " ".join(re.findall(r"[^\s,'\"\[\]]+", line.get("ConvolutionKernel") or "")) or UNKNOWN,
    }


def _age_band(age: str) -> str:
    """Return the band of a DICOM age ("036Y"; months, weeks and days are under 1)."""
    match = re.fullmatch(r"\s*(\d+)(?:\.\d+)?\s*([YMWD]?)\s*", age.upper())
    if match is None:
        return UNKNOWN
    years = int(match[1]) if match[2] in ("Y", "") else 0
    return next((name for low, high, name in AGE_BANDS if low <= years < high), UNKNOWN)


def subgroup_table(
    metrics: Mapping[str, SampledMetric],
    patients: Sequence[Hashable],
    groups: Mapping[str, Sequence[str]],
    *,
    smallest: int = 10,
    intervals: bool = True,
) -> list[SubgroupRow]:
    """Return the metrics and their intervals in every subgroup, largest first.

    Args:
        metrics: name → metric.
        patients: patient of each sample, (N,).
        groups: column → group of each sample, (N,), as `read_subgroups` returns it.
        smallest: samples that a subgroup needs. Smaller ones are joined as SMALL_GROUPS; a column with no other is left out.
        intervals: whether to compute intervals; otherwise they are None.

    Returns:
        Rows of `by` (the column), `group`, `count` (samples), `patients` (their number), and name → {value, interval}.
    """
    table = []
    for column, values in groups.items():
        sizes = Counter(values)
        names = np.array([value if sizes[value] >= smallest else SMALL_GROUPS for value in values], dtype=object)
        if set(names) == {SMALL_GROUPS}:
            continue
        for name, count in Counter(names.tolist()).most_common():
            index = np.flatnonzero(names == name)
            members = [patients[k] for k in index.tolist()]
            chosen = {key: metric.take(index) for key, metric in metrics.items()}
            bounds = patient_intervals(chosen, members) if intervals else dict.fromkeys(chosen)
            scores = {key: {"value": chosen[key].value(), "interval": bounds[key]} for key in chosen}
            table.append({"by": column, "group": name, "count": count, "patients": len(set(members)), **scores})
    return table
