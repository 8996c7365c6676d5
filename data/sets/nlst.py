"""NLST: low-dose screening CTs of 26,254 participants, up to three a year apart, and without reports.

Layout: The Cancer Imaging Archive's, `100002/01-02-1999-NLST-LSS-16408/SERIES/*.dcm`. A study has a localizer and, on average,
two or three axial reconstructions of one scan (cdas.cancer.gov/learn/nlst/images). Its series descriptions were coded by the
trial (wiki.cancerimagingarchive.net, "NLST CT Images - General Details"): eleven values with commas, such as
"0,OPA,GE,LSPLUS,STANDARD,360,2.5,120,80,0.1,1.5": year, OPA (axial) or OPL (localizer), manufacturer, model, kernel, field of
view in mm, slice thickness in mm, kV, and so on. PatientID is a number of six digits; the years share it.

Of each study one series is used, by these rules in order: slices of at most 2.5 mm; a soft-tissue kernel, whose noise is
least, rather than one for lung or bone; the thinner slices; more images.
"""

from pathlib import Path

import datasets

from samf.data.sets.named import NamedSet
from samf.data.sets.tcia import Series, series_table
from samf.data.table_columns import TableColumns

_FEWEST = 10  # images of a CT that can be a chest
_THIN_MM = 2.5  # the trial's protocol
# Kernels for soft tissue: GE, Siemens, Philips, Toshiba. All others are taken as sharper.
_SOFT = {
    *("standard", "soft"),
    *("b20f", "b20s", "b25f", "b30f", "b30s", "b31f", "b31s", "b35f", "b40f", "b41f"),
    *("a", "b", "c"),
    *("fc01", "fc02", "fc03", "fc10", "fc11", "fc12", "fc13"),
}


def join(root: Path) -> datasets.Dataset:
    """Return the best series of each study. Raises FileNotFoundError without one."""
    return series_table(root, rank)


def rank(series: Series) -> tuple[bool, bool, float, int] | None:
    """Return the rank of a series by this module's rules; None for a localizer."""
    coded = [part.strip() for part in series.description.split(",")]
    coded = coded if len(coded) >= 7 else []
    if series.images < _FEWEST or "LOCALIZER" in series.image_type.upper() or (coded and coded[1].upper() == "OPL"):
        return None
    kernel = (series.kernel or (coded[4] if coded else "")).strip().lower()
    thickness = _number(series.thickness) or (_number(coded[6]) if coded else 0.0) or 100.0  # unknown: last
    return thickness <= _THIN_MM, kernel in _SOFT, -thickness, series.images


def _number(text: str) -> float:
    """Return a positive number, 0 for anything else."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0


SET = NamedSet(
    name="nlst",
    join=join,
    columns=TableColumns(volume="volume", patient="patient", scan="series"),
    home="The Cancer Imaging Archive (doi.org/10.7937/TCIA.HMQ8-J677)",
    layout="PARTICIPANT/STUDY/SERIES/*.dcm",
)
