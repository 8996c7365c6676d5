"""Arguments of a script: a YAML recipe of flat keys, each of which the command line can override.

    python train.py --config recipes/ct_rate_ao2d.yaml --learning_rate 1e-4
    samf train --config ct_rate_ao2d                    # a recipe that comes with the package, by its name

A recipe can extend others: `base: ct_rate.yaml`, or a list of which later ones override earlier ones, names files relative
to its folder, or recipes of the package. `--config` takes several recipes in the same way. An unknown key is an error that
suggests the nearest valid names. Paths below `recipes/` that the working folder doesn't have are those of the package.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, cast

import yaml
from transformers import HfArgumentParser

from samf.utils.packaged import find_recipe, packaged_path
from samf.utils.text_files import TextEncodingError, read_text

RecipeValue: TypeAlias = str | bool | int | float | list[Any] | None

_BASE = "base"
_LISTS = ("report_to",)  # fields of TrainingArguments that take lists, which HfArgumentParser reads as single values


class RecipeError(ValueError):
    """A recipe or command line that can't be used; the message names the key and the valid values."""


class _Parser(HfArgumentParser):
    """A parser that raises RecipeError; argparse's own exit would print the usage of some two hundred options."""

    recipes: Sequence[Path] = ()

    def error(self, message: str) -> NoReturn:
        source = " ".join(["command line", *(["with"] if self.recipes else []), *map(str, self.recipes)])
        raise RecipeError(f"{source}: {message}. --help lists every key.")


def parse_recipe(dataclass_types: type | Iterable[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from `--config recipe.yaml …` and the command line, which takes precedence.

    A YAML value is read as if it had been typed on the command line, so `1e-4` is a number for a float field although YAML
    reads it as text.

    Args:
        dataclass_types: one dataclass or several, as for `HfArgumentParser`; no field name may be in two of them.
        argv: the command line without the program's name; None takes `sys.argv[1:]`.

    Returns:
        One instance per dataclass, in their order.

    Raises:
        RecipeError: an unreadable recipe, an unknown key, a missing required key, or a value of the wrong type.
    """
    recipes, typed = _take_config(sys.argv[1:] if argv is None else argv)
    description = "Every option can also be a key of a YAML file, --config RECIPE …; the command line takes precedence."
    parser = _Parser(cast(Any, dataclass_types), allow_abbrev=False, description=description)
    parser.recipes = recipes
    for name in _LISTS:
        if name in _actions(parser):
            _actions(parser)[name].nargs = "+"
    keys = {key: found for recipe in recipes for key, found in _read_with_bases(recipe).items()}
    tokens = _recipe_tokens(parser, keys)
    *instances, remaining = parser.parse_args_into_dataclasses(
        [*tokens, *typed], return_remaining_strings=True, look_for_args_file=False
    )
    if remaining:
        flags = [token[2:].split("=")[0] for token in remaining if token.startswith("--")]
        what = _describe_unknown(flags[0], _actions(parser)) if flags else f"unexpected value {remaining[0]!r}."
        raise RecipeError(f"command line: {what}")
    return tuple(instances)


def read_recipe(path: str | Path) -> dict[str, RecipeValue]:
    """Return the keys and values of a YAML recipe, with those of the recipes that it extends.

    Raises:
        RecipeError: a file can't be read, isn't a flat mapping, or extends itself.
    """
    return {key: value for key, (value, _) in _read_with_bases(Path(path)).items()}


def _read_with_bases(path: Path, above: Sequence[Path] = ()) -> dict[str, tuple[RecipeValue, Path]]:
    """Return {key: (value, the file that gives it)}; `above` are the recipes that extend this one."""
    if path.resolve() in above:
        raise RecipeError(f"{path}: a recipe can't extend itself; change its {_BASE!r} or that of {above[-1]}.")
    values = _read_yaml(path)
    bases = values.pop(_BASE, None) or []
    keys: dict[str, tuple[RecipeValue, Path]] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        keys |= _read_with_bases(_find_base(path, str(base)), [*above, path.resolve()])
    return keys | {key: (value, path) for key, value in values.items()}


def _find_base(path: Path, base: str) -> Path:
    """Return the recipe that `path` extends: beside it, or else the packaged one of that name."""
    beside = path.parent / base
    try:
        return beside if beside.is_file() else find_recipe(base)
    except FileNotFoundError:
        return beside  # whose reading fails with the path that was expected


def _read_yaml(path: Path) -> dict[str, RecipeValue]:
    try:
        values = yaml.safe_load(read_text(path))
    except TextEncodingError as error:
        raise RecipeError(str(error)) from error
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: can't be read as a YAML recipe: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{path}: a recipe is a YAML mapping of flat keys, e.g. 'learning_rate: 5.0e-5'.")
    return values


def recipes_of(argv: Sequence[str] | None = None) -> list[Path]:
    """Return the files that `--config` of a command line names; None takes `sys.argv[1:]`.

    Raises:
        RecipeError: there is no such file or recipe.
    """
    return _take_config(sys.argv[1:] if argv is None else argv)[0]


def _take_config(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, nargs="+", default=[])
    try:
        known, rest = parser.parse_known_args(list(argv))
        return [find_recipe(name) for name in known.config], rest
    except argparse.ArgumentError as error:
        raise RecipeError(f"command line: {error}; give the YAML file's path.") from error
    except FileNotFoundError as error:
        raise RecipeError(f"--config {error}") from error


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def _recipe_tokens(parser: _Parser, keys: Mapping[str, tuple[RecipeValue, Path]]) -> list[str]:
    """Return the recipes as command-line tokens, so that argparse converts and checks every value in one way."""
    actions, tokens = _actions(parser), []
    for key, (value, recipe) in keys.items():
        if key not in actions:
            raise RecipeError(f"{recipe}: {_describe_unknown(key, actions)}")
        takes_list = actions[key].nargs in ("+", "*")
        if isinstance(value, list) and not takes_list:
            raise RecipeError(f"{recipe}: {key} takes one value, found the list {value}.")
        if value is None or value == []:
            # No token expresses None or an empty list; as the field's default it can still be overridden.
            parser.set_defaults(**{key: value})
            actions[key].required = False
        elif isinstance(value, list):
            tokens += [f"--{key}", *(packaged_path(str(item)) for item in value)]
        else:
            tokens.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else packaged_path(str(value))}")
    return tokens


def _describe_unknown(key: str, actions: Mapping[str, argparse.Action]) -> str:
    wanted = key.replace("-", "_")
    nearest = difflib.get_close_matches(wanted, actions, n=3, cutoff=0.5)
    nearest += [name for name in actions if wanted in name and name not in nearest][: 3 - len(nearest)]
    if nearest:
        return f"unknown key {key!r}; did you mean {' or '.join(map(repr, nearest))}?"
    return f"unknown key {key!r}; valid keys are {', '.join(sorted(actions))}."
