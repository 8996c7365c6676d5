"""`samf recipe`."""

from samf.cli.errors import UsageError


def recipe(name: str | None) -> str:
    """Return a packaged recipe's text; without a name, one line per recipe.

    Raises:
        UsageError: no recipe of this name.
    """
    from samf.utils.packaged import RECIPES, recipe_names, recipe_text

    if name is not None:
        try:
            return recipe_text(name)
        except FileNotFoundError as error:
            raise UsageError(str(error)) from error
    names = recipe_names()
    width = max(map(len, names))
    lines = []
    for each in names:
        first = (RECIPES / f"{each}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        lines.append(f"{each:<{width}}  {first.removeprefix('# ')}\n")
    return "".join(lines)
