"""The libraries of the `hospital` extra."""

import importlib
import logging
import warnings
from types import ModuleType

# Their warnings and errors quote data sets.
_TALKATIVE = ("pynetdicom", "pydicom", "highdicom", "dicomweb_client", "urllib3")


class MissingLibraryError(ImportError):
    """A library of the `hospital` extra that isn't installed."""


def require(name: str, purpose: str) -> ModuleType:
    """Return a library of the `hospital` extra.

    Args:
        name: of the module.
        purpose: completes "… needs NAME".

    Raises:
        MissingLibraryError: it isn't installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise MissingLibraryError(f"{purpose} needs {package}: pip install 'samf[hospital]'") from error


def silence_libraries() -> None:
    """Let libraries log and warn nothing, for the whole process: what they say of a data set may name the patient."""
    for name in _TALKATIVE:
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL + 1)
        logger.propagate = False
    warnings.simplefilter("ignore")
