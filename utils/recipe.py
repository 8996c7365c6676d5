"""A script's arguments: one YAML recipe of flat keys, every key of it overridable on the command line.

    python train.py --config recipes/ct_rate_ao2d.yaml --learning_rate 1e-4

A recipe may go on from others: `base: ct_rate.yaml` (or a list, the later over the earlier) names files beside it, whose
keys it has unless it gives them itself. `--config` takes several recipes in the same way. A key that no field bears is an
error, with the nearest names that would be valid.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from samf.utils.text_files import TextEncodingError, read_text

BASE = "base"
SEVERAL = ("report_to",)  # of TrainingArguments: lists to it, single values to HfArgumentParser


class RecipeError(ValueError):
    """A recipe or command line that can't be used; the message names the key and what would be valid."""


class _Parser(HfArgumentParser):
    """Raises instead of leaving the program under the usage of some two hundred options."""

    recipes: Sequence[Path] = ()

    def error(self, message: str) -> NoReturn:
        source = " ".join(["command line", *(["with"] if self.recipes else []), *map(str, self.recipes)])
        raise RecipeError(f"{source}: {message}. --help lists every key.")


def parse_recipe(dataclass_types: type | Iterable[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from `--config recipe.yaml …` and the command line, which wins.

    Args:
        dataclass_types: one dataclass or several, as for `HfArgumentParser`; no key may be in two of them.
        argv: the command line without the program's name; None = `sys.argv[1:]`.

    Returns one instance for each type. A YAML value is read as if it had been typed on the command line, so `1e-4` is a
    number for a float field although YAML calls it text. Raises RecipeError for an unreadable recipe, an unknown key, a
    missing required one or a value of the wrong type.
    """
    recipes, typed = _take_config(sys.argv[1:] if argv is None else argv)
    description = "Every key may also stand in a YAML file, given as --config RECIPE …; the command line wins."
    parser = _Parser(dataclass_types, allow_abbrev=False, description=description)
    parser.recipes = recipes
    for name in SEVERAL:
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


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML recipe and of those that it goes on from.

    Raises RecipeError when one can't be read, isn't a flat mapping, or goes on from itself.
    """
    return {key: value for key, (value, _) in _read_with_bases(Path(path)).items()}


def _read_with_bases(path: Path, above: Sequence[Path] = ()) -> dict[str, tuple[Any, Path]]:
    """Each key's value, and the file that gives it."""
    if path.resolve() in above:
        raise RecipeError(f"{path}: a recipe can't go on from itself; change its {BASE!r} or that of {above[-1]}.")
    values = _read_yaml(path)
    bases = values.pop(BASE, None) or []
    keys: dict[str, tuple[Any, Path]] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        keys |= _read_with_bases(path.parent / str(base), [*above, path.resolve()])
    return keys | {key: (value, path) for key, value in values.items()}


def _read_yaml(path: Path) -> dict[str, Any]:
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


def _take_config(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, nargs="+", default=[])
    try:
        known, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise RecipeError(f"command line: {error}; give the YAML file's path.") from error
    return known.config, rest


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def _recipe_tokens(parser: _Parser, keys: Mapping[str, tuple[Any, Path]]) -> list[str]:
    """The recipes as command-line tokens, so that argparse converts and checks every value in one way."""
    actions, tokens = _actions(parser), []
    for key, (value, recipe) in keys.items():
        if key not in actions:
            raise RecipeError(f"{recipe}: {_describe_unknown(key, actions)}")
        several = actions[key].nargs in ("+", "*")
        if isinstance(value, list) and not several:
            raise RecipeError(f"{recipe}: {key} takes one value, found the list {value}.")
        if value is None or value == []:
            # No token says None or "no items"; as the field's default it is still overridable.
            parser.set_defaults(**{key: value})
            actions[key].required = False
        elif isinstance(value, list):
            tokens += [f"--{key}", *map(str, value)]
        else:
            tokens.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return tokens


def _describe_unknown(key: str, actions: Mapping[str, argparse.Action]) -> str:
    wanted = key.replace("-", "_")
    nearest = difflib.get_close_matches(wanted, actions, n=3, cutoff=0.5)
    nearest += [name for name in actions if wanted in name and name not in nearest][: 3 - len(nearest)]
    if nearest:
        return f"unknown key {key!r}; did you mean {' or '.join(map(repr, nearest))}?"
    return f"unknown key {key!r}; valid keys are {', '.join(sorted(actions))}."
