"""CT-RATE's files as Python values: rows of CSVs, entries of the VQA file, labels, rescales and exclusions."""

import logging
import math
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import ijson

from samf.data.ct_rate.names import VolumeName
from samf.data.ct_rate.sources import CtRateSource
from samf.data.labels import UNCERTAIN, read_label
from samf.data.schema import IGNORE_INDEX, JsonObject
from samf.data.texts import given
from samf.utils.text_files import open_csv, open_text, read_lines

logger = logging.getLogger(__name__)

#: The 18 label columns of CT-RATE's multi_abnormality_labels, in its order.
CT_RATE_LABELS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)

VOLUME_COLUMN = ("VolumeName", "AccessionNo")  # alternatives: the column has had two names


# --- Rows and entries -------------------------------------------------------------------------------------------------


def read_rows(path: Path, required: Iterable[str | tuple[str, ...]] = ()) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV.

    Args:
        path: the CSV.
        required: columns that must be there; a tuple lists alternatives of which one must be.

    Raises:
        ValueError: a required column is absent; names those found.
    """
    with open_csv(path) as reader:
        columns = reader.fieldnames or []
        for names in required:
            alternatives = (names,) if isinstance(names, str) else names
            if not set(alternatives) & set(columns):
                raise ValueError(f"{path}: no column {' or '.join(alternatives)}; its columns are {columns}.")
        yield from reader


def row_volume(row: dict[str, str], path: Path) -> VolumeName:
    """Return the volume of a row. Raises ValueError, which names the file, if there is none."""
    try:
        return VolumeName.parse(row.get("VolumeName") or row.get("AccessionNo") or "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json_array(path: Path, chunk: int = 1 << 20) -> Iterator[JsonObject]:
    """Yield the objects of a JSON file that holds one array, one at a time: CT-RATE's file has a gigabyte.

    Args:
        path: the file, in UTF-8 or as its byte order mark says.
        chunk: characters to read at a time.

    Raises:
        ValueError: the file is not an array of objects, or is broken; names the file and the record.
    """
    count = 0
    with open_text(path) as file:
        start = file.read(4096).lstrip()
        if not start.startswith("["):
            raise ValueError(f"{path}: starts with {start[:20]!r}; expected a JSON array of VQA records.")
        file.seek(0)
        try:
            for record in ijson.items(_Utf8Stream(file), "item", use_float=True, buf_size=chunk):
                if not isinstance(record, dict):
                    raise ValueError(f"{path}: record {count} is {type(record).__name__}; expected an object.")
                yield record
                count += 1
        except ijson.JSONError as error:
            what = str(error).split("\n", 1)[0]  # the lines below quote the file, and so a report
            raise ValueError(
                f"{path}: record {count} is broken or cut off ({what}). Check the file there, or download it again."
            ) from error


class _Utf8Stream:
    """A text file as the UTF-8 bytes that `ijson` reads, whatever the file's own encoding."""

    def __init__(self, file: TextIO):
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(size).encode()


# --- Facts about volumes ----------------------------------------------------------------------------------------------


def read_labels(path: Path | None, finding_names: Sequence[str]) -> dict[VolumeName, list[int]] | None:
    """Read the labels of findings: 1 = present, 0 = absent, IGNORE_INDEX = unknown.

    An empty field, "nan" and -1 (CheXpert's "uncertain") are unknown and don't train.

    Args:
        path: the label CSV; None where there is none.
        finding_names: the columns to read.

    Returns:
        {volume: labels in the order of `finding_names`}; None without a file or without names.

    Raises:
        ValueError: a name is not a column of the file, or a value is not a label; names row and column.
    """
    if not finding_names:
        return None
    if path is None:
        logger.warning("No label file: records carry no labels of %s.", ", ".join(finding_names))
        return None
    labels, uncertain = {}, 0
    for number, row in enumerate(read_rows(path, (VOLUME_COLUMN, *finding_names)), start=1):
        where = f"{path}: row {number} below the header, column"
        values = [read_label(row[name], f"{where} {name!r}") for name in finding_names]
        uncertain += values.count(UNCERTAIN)
        labels[row_volume(row, path)] = [IGNORE_INDEX if value == UNCERTAIN else value for value in values]
    if uncertain:
        logger.warning("%s: %d labels are -1 (uncertain) and count as unknown.", path, uncertain)
    return labels


def read_rescale(path: Path | None) -> dict[VolumeName, list[float]]:
    """Read the `rescale` that `read_ct` takes for each volume from a metadata CSV.

    Returns:
        {volume: [slope, intercept]}, followed by the voxel size in mm along the stored axes where the file has it:
        XYSpacing is "[row distance, column distance]". Volumes without a finite slope and intercept are left out.

    Raises:
        FileNotFoundError: there is no metadata CSV.
    """
    if path is None:
        raise FileNotFoundError(
            "Volumes of v1 hold raw stored values, and metadata/*_metadata.csv with their slope and intercept is missing. "
            "Download it, or use the v2 volumes (train_fixed, valid_fixed), which hold HU."
        )
    rescale, without_size = {}, []
    for row in read_rows(path, (VOLUME_COLUMN, "RescaleSlope", "RescaleIntercept")):
        pair = [_number(row[name]) for name in ("RescaleSlope", "RescaleIntercept")]
        if all(math.isfinite(value) for value in pair):
            volume, size = row_volume(row, path), _voxel_size(row)
            rescale[volume] = pair + size
            if not size:
                without_size.append(volume)
    if without_size:
        logger.warning(
            "%s: %d volumes without XYSpacing and ZSpacing; their voxel sizes are taken from the files' headers, which are "
            "blank in v1 (first: %s).",
            path,
            len(without_size),
            without_size[0],
        )
    return rescale


def _voxel_size(row: dict[str, str]) -> list[float]:
    """Return the voxel size in mm along x, y and z; empty where it isn't given in full."""
    in_plane = [_number(text) for text in (row.get("XYSpacing") or "").strip("[] ").split(",")]
    size = [*reversed(in_plane), _number(row.get("ZSpacing"))]
    return size if len(size) == 3 and all(0 < value < math.inf for value in size) else []


def _number(text: str | None) -> float:
    """Return the number of a field, NaN for anything else."""
    try:
        return float(given(text) or "nan")
    except ValueError:
        return math.nan


def read_no_chest(path: Path | None) -> dict[VolumeName, str]:
    """Return {volume: reason} for the scans that CT-RATE lists as not of the chest."""
    if path is None:
        return {}
    lines = [line.strip().strip(",") for line in read_lines(path)]
    volumes = {line: VolumeName.find(line) for line in lines if line}
    if unread := [line for line, volume in volumes.items() if volume is None]:
        logger.warning("%s: %d lines are not volume names (first: %r).", path, len(unread), unread[0])
    return {volume: f"listed in {path.name}" for volume in volumes.values() if volume is not None}


def volume_list(source: CtRateSource) -> Path | None:
    """Return the table that lists the reconstructions of each scan."""
    return source.reports or source.metadata or source.labels


def choose_reconstructions(
    source: CtRateSource, excluded: Collection[VolumeName], how: str, seed: int
) -> dict[str, int] | None:
    """Choose one reconstruction of each scan from those that the split's table lists.

    Args:
        source: the split.
        excluded: volumes that are never chosen.
        how: "all", "first" (the lowest number), or "sample" (a random one, which depends only on `seed` and the scan).
        seed: for "sample".

    Returns:
        {scan_id: number of the reconstruction}; None for "all".
    """
    if how == "all":
        return None
    table = volume_list(source)
    numbers: dict[str, set[int]] = {}
    if table is not None:
        for row in read_rows(table, [VOLUME_COLUMN]):
            volume = row_volume(row, table)
            if volume not in excluded:
                numbers.setdefault(volume.scan_id, set()).add(volume.reconstruction)
    if how == "first":
        return {scan: min(found) for scan, found in numbers.items()}
    return {scan: random.Random(f"{seed} {scan}").choice(sorted(found)) for scan, found in numbers.items()}
