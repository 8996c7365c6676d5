"""One model in several forms (base, adapter, merged, quantised): a repository each, and a collection that lists them.

Users of the Hub load a model by one id. Code for `trust_remote_code` must be in the root of a repository, and the Hub's model
tree, its filters, download counts and gates belong to repositories: so each form is one, not a branch or a folder. Metadata
in the cards (`base_model`, `base_model_relation`) connects them, and a collection is the page that shows all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors import safe_open

from samf.model.adapters_samf import adapter_base
from samf.sharing.errors import ShareError
from samf.sharing.hub import Pushed, hub_errors
from samf.sharing.saved_models import CONFIG, SavedModel, read_saved_model

_ENDINGS = {"base": "-base", "adapter": "-lora", "model": "", "quantized": "-int4"}
_ORDER = ("base", "adapter", "model", "quantized")  # bases first, so that others can name their commits
_PARTS = ("base", "merged", "int4", "int8", "quantized")  # folders within a run's
_NOTES = {
    "base": "base model of the adapter",
    "adapter": "adapter (peft); loads with its base model",
    "model": "whole model",
    "quantized": "quantised weights, for CPUs",
}
_LONGEST_TITLE = 59  # of a collection on the Hub
_COMPARED = 3  # tensors that show that two folders share their unchanged parts


@dataclass(frozen=True)
class Member:
    """A form of a model.

    Attributes:
        role: "base", "adapter", "model" or "quantized".
        saved: its folder.
        ending: what its repository's name has in addition to the model's.
        kind: its relation to what it was made from, by the Hub's terms.
        made_from: roles of those.
    """

    role: str
    saved: SavedModel
    ending: str
    kind: str | None = None
    made_from: Sequence[str] = ()


def plan_collection(folders: Sequence[Path]) -> list[Member]:
    """Return the members of a collection in the order in which they are pushed.

    Args:
        folders: several models, or one run's folder, whose subfolders base, merged, int4 and int8 are members too.

    Raises:
        ShareError: there is only one, or two of the same role.
    """
    if len(folders) == 1:
        folders = [*folders, *(folders[0] / name for name in _PARTS if (folders[0] / name / CONFIG).is_file())]
    saved = _with_local_base([read_saved_model(folder) for folder in folders])
    if len(saved) < 2:
        raise ShareError(
            f"{folders[0]}: one model only; a collection has several. Leave out --collection, or name more folders."
        )
    roles: dict[str, SavedModel] = {}
    for each in saved:
        role = _role(each, saved)
        if role in roles:
            raise ShareError(
                f"{each.folder} and {roles[role].folder} are both the {role} of this collection. Push one of them by itself."
            )
        roles[role] = each
    return [_member(role, roles) for role in _ORDER if role in roles]


def _with_local_base(saved: list[SavedModel]) -> list[SavedModel]:
    """Add the folder of an adapter's base, where it is on this machine and isn't among the folders."""
    adapters = [each for each in saved if each.kind == "adapter"]
    if not adapters:
        return saved
    try:
        base = adapter_base(adapters[0].folder)
    except (ImportError, ValueError, OSError) as error:
        raise ShareError(str(error)) from error
    folder = Path(base or "")
    if not folder.is_dir() or folder.resolve() in {each.folder.resolve() for each in saved}:
        return saved
    return [read_saved_model(folder), *saved]


def _role(each: SavedModel, saved: Sequence[SavedModel]) -> str:
    if each.kind != "model":
        return each.kind
    bases = [adapter_base(other.folder) for other in saved if other.kind == "adapter"]
    is_base = any(base and Path(base).is_dir() and Path(base).resolve() == each.folder.resolve() for base in bases)
    return "base" if is_base else "model"


def _member(role: str, roles: Mapping[str, SavedModel]) -> Member:
    saved, ending = roles[role], _ENDINGS[role]
    if role == "adapter":
        return Member(role, saved, ending, "adapter", ["base"] if "base" in roles else [])
    if role == "model" and "adapter" in roles and _has_parts_of(saved, roles["adapter"]):
        return Member(role, saved, ending, "merge", [name for name in ("base", "adapter") if name in roles])
    if role == "quantized":
        bits = getattr(saved.config.quantization_config, "bits", None) or saved.config.quantization_config.get(
            "bits", 4
        )
        whole = [name for name in ("model", "base") if name in roles and _shares_tensors(saved, roles[name])]
        return Member(role, saved, f"-int{bits}", "quantized", whole[:1])
    return Member(role, saved, ending)


def _has_parts_of(model: SavedModel, adapter: SavedModel) -> bool:
    """Return whether a whole model has an adapter merged into it: it is where merging writes it, or has its full parts."""
    if model.folder.resolve().parent == adapter.folder.resolve():
        return True
    prefix = "base_model.model."
    return _equal_tensors(adapter, model, lambda name: name.removeprefix(prefix))


def _shares_tensors(quantized: SavedModel, model: SavedModel) -> bool:
    """Return whether quantised weights come from a model: the parts that weren't rounded are equal, the trained ones first."""
    return _equal_tensors(quantized, model, lambda name: name)


def _equal_tensors(first: SavedModel, second: SavedModel, name_in_second: Callable[[str], str]) -> bool:
    """Return whether the smallest tensors of the fusion, which every training changes, are equal in two folders."""
    ours, theirs = first.tensors(), second.tensors()
    names = [name for name in ours if ".fusion." in name and name_in_second(name) in theirs]
    names = [name for name in names if list(ours[name][1]) == list(theirs[name_in_second(name)][1])]
    names.sort(key=lambda name: (torch.Size(ours[name][1]).numel(), name))
    chosen = names[-_COMPARED:]
    return bool(chosen) and all(
        torch.equal(_read(ours[name][0], name), _read(theirs[name_in_second(name)][0], name_in_second(name)))
        for name in chosen
    )


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def add_to_collection(
    api: HfApi, name: str, members: Sequence[Member], pushed: Mapping[str, Pushed], *, private: bool
) -> str:
    """Create the collection where there is none, add what it lacks, and return its address.

    Args:
        api: the client.
        name: the model's name, the collection's title.
        members: what was pushed.
        pushed: role → where to.
        private: whether a new collection is private.
    """
    owner = next(iter(pushed.values())).repo_id.partition("/")[0]
    with hub_errors(f"collection {name}"):
        collection = api.create_collection(name[:_LONGEST_TITLE], namespace=owner, private=private, exists_ok=True)
        there = {item.item_id for item in collection.items}
        for member in sorted(members, key=lambda member: member.role != "model"):
            if pushed[member.role].repo_id not in there:
                note = _NOTES[member.role]
                api.add_collection_item(
                    collection.slug, pushed[member.role].repo_id, "model", note=note, exists_ok=True
                )
    return str(collection.url)
