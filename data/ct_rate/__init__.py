"""CT-RATE: file names, tables, questions and the loader of its splits."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Return a name of the former module `samf.data.ct_rate`; for one release."""
    for module in ("samf.data.ct_rate.loader", "samf.data.loading"):
        if hasattr(found := importlib.import_module(module), name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
