"""Checks of the values that options of the loaders may take."""

import warnings
from collections.abc import Collection
from typing import get_args

from samf.data.schema import OnError, OnMissing


def check_choice(name: str, values: Collection[str], allowed: Collection[str]) -> None:
    """Raise ValueError unless there is at least one value, and all are allowed.

    Args:
        name: the option, for the message.
        values: what was given.
        allowed: the valid values.
    """
    if not values or (unknown := set(values) - set(allowed)):
        raise ValueError(f"{name}={sorted(unknown) if values else values}; expected some of {', '.join(allowed)}.")


def check_on_missing(value: str) -> OnMissing:
    """Return a valid `on_missing`; the former "error" becomes "raise", with a warning. Raises ValueError for others."""
    if value == "error":
        warnings.warn("on_missing='error' is now 'raise'; the old value will go.", FutureWarning, stacklevel=3)
        return "raise"
    for allowed in get_args(OnMissing):
        if value == allowed:
            return allowed
    raise ValueError(f"on_missing={value!r}; expected one of {', '.join(get_args(OnMissing))}.")


def check_on_error(value: str) -> OnError:
    """Return a valid `on_error`; the former "stop" and "error" become "raise", with a warning. Raises ValueError for others."""
    if value in ("stop", "error"):
        warnings.warn(f"on_error={value!r} is now 'raise'; the old value will go.", FutureWarning, stacklevel=3)
        return "raise"
    for allowed in get_args(OnError):
        if value == allowed:
            return allowed
    raise ValueError(f"on_error={value!r}; expected one of {', '.join(get_args(OnError))}.")
