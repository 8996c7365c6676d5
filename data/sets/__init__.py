"""Data sets that are known by name: `--dataset rad_chest_ct --data FOLDER`.

Each module of this package has one `SET`, a `samf.data.sets.named.NamedSet`: it joins the files of a data set into one
table, and says which of its columns is what. All else is `samf.data.table_columns`. Their folder layouts and column names
follow public documentation and code, which each module names; none of the data sets is part of this repository's tests,
which use stand-ins in the same layouts.
"""

import difflib
import importlib

from samf.data.sets.named import NamedSet

# Name of a data set → its module; "inspect" is a module of the standard library.
_MODULES = {
    "abdomen_atlas": "abdomen_atlas",
    "inspect": "inspect_pe",
    "lidc_idri": "lidc_idri",
    "merlin": "merlin",
    "nlst": "nlst",
    "rad_chest_ct": "rad_chest_ct",
}
NAMES = tuple(_MODULES)


def named_set(name: str) -> NamedSet:
    """Return a data set by its name. Raises ValueError, which lists the names, for any other."""
    plain = name.strip().lower().replace("-", "_")
    if plain not in NAMES:
        near = difflib.get_close_matches(plain, NAMES, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"dataset {name!r} is not known. {hint}Expected one of {', '.join(NAMES)}; CT-RATE needs no name, and any other "
            f"table has its columns named by --volume_column and so on."
        )
    found: NamedSet = importlib.import_module(f"samf.data.sets.{_MODULES[plain]}").SET
    return found
