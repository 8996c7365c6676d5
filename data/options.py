"""Checks of the values that options of the loaders may take."""

import warnings
from collections.abc import Collection
from typing import TypeVar, get_args

from samf.data.schema import OnError, OnMissing

Choice = TypeVar("Choice", bound=str)
# Values of options that have a new name, and still work with a warning.
FORMER_VALUES = {name: {"stop": "raise", "error": "raise"} for name in ("on_error", "on_missing")}


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
    return _current("on_missing", value, get_args(OnMissing))


def check_on_error(value: str) -> OnError:
    """Return a valid `on_error`; the former "stop" and "error" become "raise", with a warning. Raises ValueError for others."""
    return _current("on_error", value, get_args(OnError))


def _current(name: str, value: str, allowed: tuple[Choice, ...]) -> Choice:
    new = FORMER_VALUES[name].get(value, value)
    if new != value:
        warnings.warn(f"{name}={value!r} is now {new!r}; the old value will go.", FutureWarning, stacklevel=4)
    for choice in allowed:
        if new == choice:
            return choice
    raise ValueError(f"{name}={value!r}; expected one of {', '.join(allowed)}.")
