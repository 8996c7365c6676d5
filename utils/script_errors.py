"""Errors of scripts about their options or their data: one line instead of a traceback."""

import contextlib
import logging
import sys
from collections.abc import Iterator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def input_errors(script: str) -> Iterator[None]:
    """End the process with the line "script: message" where an option or the data can't be used.

    Put it around parsing and reading only, where these errors are about what the user gave. The traceback is logged as DEBUG.

    Args:
        script: name of the script, as users call it.

    Raises:
        SystemExit: for a ValueError, OSError or ImportError.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        logger.debug("%s: bad input", script, exc_info=True)
        sys.exit(f"{script}: {' '.join(str(error).split())}")
