"""Options with a fixed set of values: checked in `__post_init__`, and old values replaced with a warning."""

import warnings
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from samf.data.options import FORMER_VALUES

#: `OnError` as users may give it: "stop" and "error" are older names of "raise".
OnErrorOption = Literal["raise", "skip", "stop", "error"]


def check_choices(arguments: Any) -> None:
    """Check the `Literal` fields of a dataclass instance, and replace old values by their new names.

    Raises:
        ValueError: A value is none of its field's choices; names the field, the value and the choices.
    """
    for name, hint in get_type_hints(type(arguments)).items():
        choices = _choices(hint)
        if not choices:
            continue
        value = getattr(arguments, name)
        if value not in choices:
            shown = " or ".join(map(repr, _without_old(name, choices)))
            raise ValueError(f"{name} is {value!r}; it must be {shown}.")
        new = FORMER_VALUES.get(name, {}).get(value)
        if new is not None:
            warnings.warn(f"{name}={value} is now {name}={new}; the old value will go.", FutureWarning, stacklevel=2)
            setattr(arguments, name, new)


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the values of a `Literal` or an optional one; () for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        inner = [part for part in get_args(hint) if part is not NoneType]
        choices = _choices(inner[0]) if len(inner) == 1 else ()
        return (*choices, None) if choices else ()
    return ()


def _without_old(name: str, choices: tuple[Any, ...]) -> list[Any]:
    return [choice for choice in choices if choice is not None and choice not in FORMER_VALUES.get(name, {})]
