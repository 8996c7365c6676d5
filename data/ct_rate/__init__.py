"""CT-RATE: file names, tables, questions and the loader of its splits."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Return a name of the former module `samf.data.ct_rate`; for one release."""
    return getattr(importlib.import_module("samf.data.ct_rate.loader"), name)
