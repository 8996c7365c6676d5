"""Folders of DICOM series as the NBIA Data Retriever of The Cancer Imaging Archive leaves them: one folder per series.

Its metadata.csv, which lists all series, spares opening a file of each: "Series UID", "Study UID", "Subject ID", "Modality",
"Series Description", "Number of Images" and "File Location" (relative, with "/" or "\\\\"). Some releases of the retriever
write rows with fewer fields than the header has, so that columns read by pandas are shifted by one; such a file is not used.
Without it, one header of each folder is read, by 16 threads.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

import datasets
from tqdm import tqdm

from samf.data.file_kinds import is_dicom_file
from samf.data.sets.files import make_table
from samf.model.ct_dicom_files import walk_once
from samf.model.ct_dicom_storage import PARSE_ERRORS, pydicom
from samf.utils.text_files import open_csv

logger = logging.getLogger(__name__)

_THREADS = 16
_TRIED = 20  # files of a folder, of which at least one must be DICOM
_COLUMNS = ("Series UID", "Study UID", "Subject ID", "Modality", "Series Description", "File Location")
_TAGS = (
    *("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesDescription"),
    *("ImageType", "SliceThickness", "ConvolutionKernel"),
)


@dataclass(frozen=True)
class Series:
    """A folder with one series.

    Attributes:
        volume: the folder, below the data set's.
        patient: PatientID (0010,0020).
        study: StudyInstanceUID.
        series: SeriesInstanceUID.
        modality: such as CT.
        description: SeriesDescription.
        images: number of DICOM files.
        image_type: ImageType, its parts with spaces between them.
        thickness: SliceThickness in mm, as text; "" where unknown.
        kernel: ConvolutionKernel.
        annotations: number of XML files next to the images; LIDC-IDRI's readings.
    """

    volume: str
    patient: str
    study: str
    series: str
    modality: str
    description: str
    images: int
    image_type: str = ""
    thickness: str = ""
    kernel: str = ""
    annotations: int = 0


def series_table(root: Path, rank: Callable[[Series], tuple[object, ...] | None]) -> datasets.Dataset:
    """Return one CT series of each study.

    Args:
        root: the data set's folder.
        rank: the rank of a series, of which the highest in a study is used; None for a series that is no candidate.

    Raises:
        FileNotFoundError: there is no CT series.
    """
    best: dict[str, tuple[tuple[object, ...], str, Series]] = {}
    found, candidates = 0, 0
    for series in _listed(root) or list(_searched(root)):
        found += 1
        own = rank(series) if series.modality == "CT" else None
        if own is None:
            continue
        candidates += 1
        ranked = (own, series.series, series)  # equal ranks: by the UID, whatever the order of the folders
        known = best.get(series.study)
        if known is None or ranked[:2] > known[:2]:
            best[series.study] = ranked
    if not best:
        raise FileNotFoundError(f"{root}: no CT series that can be used among {found} folders of DICOM files.")
    logger.info("%s: %d series, %d usable, of %d studies", root, found, candidates, len(best))
    rows = [asdict(series) for _, _, series in best.values()]
    return make_table([{name: str(value) for name, value in row.items()} for row in rows])


def _listed(root: Path) -> list[Series]:
    """Return the series of metadata.csv; [] without one that is whole and names folders that are there."""
    path = next((path for path in (root / "metadata.csv", root.parent / "metadata.csv") if path.is_file()), None)
    if path is None:
        return []
    with open_csv(path) as reader:
        rows = list(reader)
    if not rows or any(row.get(name) is None for row in rows for name in _COLUMNS) or any(None in row for row in rows):
        logger.warning("%s: rows of other lengths than its header; DICOM headers are read instead.", path)
        return []
    found = [_listed_series(row, path.parent, root) for row in rows]
    missing = [series.volume for series in found if not (root / series.volume).is_dir()]
    if missing:
        logger.warning("%s: %d folders aren't there (first: %s); left out", path, len(missing), missing[0])
    gone = set(missing)
    return [series for series in found if series.volume not in gone]


def _listed_series(row: dict[str, str], base: Path, root: Path) -> Series:
    folder = base / PurePosixPath(row["File Location"].replace("\\", "/"))
    images = row.get("Number of Images") or ""
    return Series(
        volume=os.path.relpath(folder, root),
        patient=row["Subject ID"],
        study=row["Study UID"],
        series=row["Series UID"],
        modality=row["Modality"],
        description=row["Series Description"],
        images=int(images) if images.isdigit() else 0,
    )


def _searched(root: Path) -> Iterator[Series]:
    """Yield the series of all folders with DICOM files, by one header of each."""
    if pydicom is None:
        raise ImportError(f"{root}: reading DICOM needs pydicom 3: pip install pydicom")
    folders = ((Path(folder), names) for folder, names in walk_once(root) if names)
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda entry: _read_series(root, *entry), folders)
        yield from (series for series in tqdm(found, desc="series", unit=" folders", disable=None, delay=5) if series)


def _read_series(root: Path, folder: Path, names: Sequence[str]) -> Series | None:
    """Return the series of a folder; None where no file is DICOM."""
    annotations = sum(name.lower().endswith(".xml") for name in names)
    others = [name for name in names if not name.lower().endswith((".xml", ".csv", ".txt", ".json")) and name[0] != "."]
    try:
        file = next((folder / name for name in others[:_TRIED] if is_dicom_file(folder / name)), None)
        if file is None:
            return None
        header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(_TAGS))
        texts = {tag: _text(header.get(tag)) for tag in _TAGS}
    except PARSE_ERRORS as error:  # the check of the files reports it
        logger.warning("%s: no readable DICOM header (%s); left out", folder, type(error).__name__)
        return None
    return Series(
        volume=os.path.relpath(folder, root),
        patient=texts["PatientID"],
        study=texts["StudyInstanceUID"] or str(folder.parent),
        series=texts["SeriesInstanceUID"] or str(folder),
        modality=texts["Modality"],
        description=texts["SeriesDescription"],
        images=len(others),
        image_type=texts["ImageType"],
        thickness=texts["SliceThickness"],
        kernel=texts["ConvolutionKernel"],
        annotations=annotations,
    )


def _text(value: object) -> str:
    if value is None:
        return ""
    return str(value).strip() if isinstance(value, (str, int, float)) else " ".join(map(str, value)).strip()  # type: ignore[call-overload]
