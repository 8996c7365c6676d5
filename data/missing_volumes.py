"""Records whose volumes are not there: an error, or left out."""

import os
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from samf.data.load_stats import LoadStats
from samf.data.options import check_on_missing
from samf.model.ct_download import is_address
from samf.utils.distributed import Processes

_LISTED = 10


def check_volumes(dataset: datasets.Dataset, on_missing: str, load_stats: LoadStats) -> datasets.Dataset:
    """Return the records whose volumes exist. Addresses are not checked.

    Args:
        dataset: records with the columns `volume` and `task`.
        on_missing: "raise" lists the missing volumes in an error, "skip" leaves their records out, "keep" checks nothing.
        load_stats: the counts of these records; "skip" updates them.

    Raises:
        FileNotFoundError: volumes are missing and `on_missing` is "raise".
    """
    on_missing = check_on_missing(on_missing)
    if on_missing == "keep":
        return dataset
    paths = [path for path in dataset.unique("volume") if path is not None and not is_address(path)]
    # Files or DICOM folders. One process looks for all of them, since all must have the same records.
    missing = Processes().from_first(lambda: [path for path in paths if not os.path.exists(path)])
    if not missing:
        return dataset
    if on_missing == "raise":
        listed = "\n  ".join(missing[:_LISTED])
        more = f"\n  and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} volumes that the records name are missing:\n  {listed}{more}\n"
            f"Complete the download, or leave their records out: on_missing='skip' (--on_missing skip of preprocess.py, "
            f"pretrain_encoder.py and warmup_aggregator.py; --on_error skip of train.py and eval.py)."
        )
    is_missing = pc.is_in(dataset.data.column("volume"), value_set=pa.array(missing)).to_numpy()
    load_stats.drop("volume file missing", missing[0], int(is_missing.sum()))
    load_stats.kept.subtract(Counter(dataset.data.column("task").filter(pa.array(is_missing)).to_pylist()))
    return dataset.select(np.flatnonzero(~is_missing))
