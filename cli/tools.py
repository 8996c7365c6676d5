"""`samf recipe` and `samf push`: small commands of their own."""

from pathlib import Path

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


def push(folder: Path, repo_id: str, private: bool | None, revision: str | None, with_handler: bool = False) -> str:
    """Upload a saved model with its processor, code and card, after checking that it loads; return its address.

    Args:
        folder: of the model.
        repo_id: repository on the Hub, OWNER/NAME; created where there is none.
        private: whether a new repository is private; None = the owner's default.
        revision: branch, created where there is none; None = main.
        with_handler: add handler.py for Inference Endpoints.

    Raises:
        UsageError: the folder doesn't load, is an adapter whose base others can't load, or the Hub refuses.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder. Name the output folder of a training.")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from samf.scripts.push_model import push_folder

    try:
        return push_folder(folder, repo_id, private=private, revision=revision, with_handler=with_handler)
    except (HfHubHTTPError, HFValidationError) as error:
        raise UsageError(
            f"{repo_id}: not uploaded: {error} Is the name right, and are you logged in (hf auth login)?"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: not uploaded: {error}") from error
