"""Files that come with the package beside its code: recipes, the demo model, the list of requirements, the handler."""

import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent  # the clone, or a folder of site-packages
RECIPES = PACKAGE / "recipes"
REQUIREMENTS = PACKAGE / "requirements.txt"
DEMO_MODEL = PACKAGE / "demo_model"
HANDLER = PACKAGE / "serving" / "handler.py"

_RECIPE_SUFFIX = ".yaml"


def package_version() -> str:
    """Return the version of this package: as installed, else that of the clone."""
    import tomllib  # here: `samf --help` imports this module, and would take a twentieth longer
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("samf")
    except PackageNotFoundError:
        settings = PACKAGE / "pyproject.toml"
        found = tomllib.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        return str(found.get("project", {}).get("version", "unknown"))


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes, such as "ct_rate_ao2d" and "demo/3_report"."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob(f"*{_RECIPE_SUFFIX}"))


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: the path itself where there is one, else the packaged recipe of that name.

    Args:
        name: path of a YAML file, or the name of a packaged recipe, with or without `recipes/` and `.yaml`.

    Raises:
        FileNotFoundError: neither; the message lists the names.
    """
    path = Path(name)
    if path.is_file():
        return path
    wanted = path.as_posix().removeprefix("recipes/").removesuffix(_RECIPE_SUFFIX)
    names = recipe_names()
    if wanted in names:
        return RECIPES / f"{wanted}{_RECIPE_SUFFIX}"
    import difflib

    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
    guess = f" Did you mean {' or '.join(near)}?" if near else ""
    raise FileNotFoundError(
        f"{name}: no such file, and no recipe of this name comes with the package.{guess} Recipes: {', '.join(names)}."
    )


def recipe_text(name: str) -> str:
    """Return a packaged recipe's text, ready to be saved anywhere: the recipes that it extends are given by name.

    Raises:
        FileNotFoundError: no recipe of this name.
    """
    path = find_recipe(name)

    def base_name(match: re.Match[str]) -> str:
        base = (path.parent / match[1]).resolve()
        return f"base: {base.relative_to(RECIPES).with_suffix('').as_posix()}" if base.is_file() else match[0]

    return re.sub(r"^base: *(\S+)$", base_name, path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def packaged_path(value: str) -> str:
    """Return the packaged file or folder that a relative path `recipes/…` names, unless the working folder has it.

    Recipes name their data by paths that are relative to a clone. Any other value is returned as it is.
    """
    if not value.startswith("recipes/") or Path(value).exists() or not (PACKAGE / value).exists():
        return value
    return str(PACKAGE / value)
