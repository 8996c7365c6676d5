"""LIDC-IDRI: chest CTs of 1,010 patients with readers' annotations of nodules, and without reports.

Layout: The Cancer Imaging Archive's, `LIDC-IDRI-0001/STUDY/SERIES/*.dcm` with one XML of the readers' annotations next to
the images (see github.com/pylidc/pylidc). 290 patients have chest radiographs (CR, DX) as studies of their own, which are left
out by their modality. Annotations are counted, and not read. The patient is PatientID, LIDC-IDRI-0001.
"""

from pathlib import Path

import datasets

from samf.data.sets.named import NamedSet
from samf.data.sets.tcia import Series, series_table
from samf.data.table_columns import TableColumns

_FEWEST = 10  # images of a CT that can be a chest


def join(root: Path) -> datasets.Dataset:
    """Return the largest CT series of each study. Raises FileNotFoundError without one."""
    return series_table(root, rank)


def rank(series: Series) -> tuple[int] | None:
    """Return the number of images; None for a localizer."""
    if series.images < _FEWEST or "LOCALIZER" in series.image_type.upper():
        return None
    return (series.images,)


SET = NamedSet(
    name="lidc_idri",
    join=join,
    columns=TableColumns(volume="volume", patient="patient", scan="series"),
    home="The Cancer Imaging Archive (doi.org/10.7937/K9/TCIA.2015.LO9QL9SX)",
    layout="LIDC-IDRI-*/STUDY/SERIES/*.dcm",
)
