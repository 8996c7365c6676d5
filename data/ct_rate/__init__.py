"""CT-RATE: file names, tables, questions, and the loader of its splits."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Return what the module `samf.data.ct_rate` had before it became a package; for one release."""
    return getattr(importlib.import_module("samf.data.ct_rate.loader"), name)
