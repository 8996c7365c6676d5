"""`samf recipe`, `samf phantom` and `samf push`: small commands of their own."""

from collections.abc import Sequence
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


def phantom(out: Path, seed: int, findings: Sequence[str] | None, voxel_mm: float) -> str:
    """Write one phantom as a NIfTI file and return what it shows, in words.

    Args:
        out: the .nii.gz file.
        seed: of everything random.
        findings: names of what it shows; none = a normal chest, None = drawn.
        voxel_mm: mean voxel edge.

    Raises:
        UsageError: an unknown finding, or another ending.
    """
    import numpy as np

    from samf.phantoms.dataset import write_nifti
    from samf.phantoms.findings import FINDING_NAMES, sample_findings
    from samf.phantoms.text import write_impression
    from samf.phantoms.volume import make_phantom

    if not out.name.endswith(".nii.gz"):
        raise UsageError(f"{out}: phantoms are written as NIfTI; name a file that ends in .nii.gz.")
    by_name = {name.lower(): name for name in FINDING_NAMES}
    unknown = [name for name in findings or () if name.lower() not in by_name]
    if unknown:
        raise UsageError(f"--finding {unknown[0]!r}: no phantom shows it. There are {', '.join(FINDING_NAMES)}.")
    shown = None
    if findings is not None:
        drawn = sample_findings(np.random.default_rng([seed, 1]), prevalence=1.0)  # all, each with its place
        shown = [drawn[by_name[name.lower()]] for name in findings]
    made = make_phantom(np.random.default_rng(seed), voxel_mm=voxel_mm, findings=shown)
    write_nifti(made, out, "LPS")
    return write_impression(made.findings)


def push(folder: Path, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Upload a saved model with its processor, code and card, after checking that it loads; return its address.

    Args:
        folder: of the model.
        repo_id: repository on the Hub, OWNER/NAME; created where there is none.
        private: whether a new repository is private; None = the owner's default.
        revision: branch, created where there is none; None = main.

    Raises:
        UsageError: the folder doesn't load, is an adapter whose base others can't load, or the Hub refuses.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from samf.scripts.push_model import push_folder

    try:
        return push_folder(folder, repo_id, private=private, revision=revision)
    except (HfHubHTTPError, HFValidationError) as error:
        raise UsageError(
            f"{repo_id}: not uploaded: {error} Is the name right, and are you logged in (hf auth login)?"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: not uploaded: {error}") from error
