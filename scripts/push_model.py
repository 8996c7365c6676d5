"""Share saved models on the Hub: whole repositories with code, processor and card, checked by loading them back.

samf push runs/ao2d owner/my-samf --private
samf push runs/lora owner/my-samf --collection
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import HfApi

from samf.model.hub_samf import HubModel
from samf.model.model_card import README, hub_id, is_generated
from samf.model.quantization_samf import describe_quantization, quantization_name
from samf.sharing.card import Relation, complete_card
from samf.sharing.collection import Member, add_to_collection, plan_collection
from samf.sharing.errors import ShareError
from samf.sharing.facts import read_facts
from samf.sharing.figures import write_figures
from samf.sharing.hub import (
    Pushed,
    Target,
    check_target,
    hub_api,
    hub_card,
    hub_errors,
    open_repository,
    tag_commit,
    upload,
)
from samf.sharing.private_data import check_private_data
from samf.sharing.saved_models import SavedModel, read_saved_model
from samf.sharing.staging import HubBase, stage_model
from samf.sharing.verify import Check, check_files, check_loading

__all__ = ["PushOptions", "push_collection", "push_folder"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class PushOptions:
    """How to push.

    Attributes:
        check: what is checked afterwards: "none", "files" (checksums), "load" (also loading in a fresh process, without
            the weights) or "full" (with them).
        base: an adapter's base model on the Hub, ID or ID@REVISION, where the adapter names a local folder.
        with_handler: add handler.py, by which Inference Endpoints serve the model.
        say: gets each line about what was done.
    """

    check: Check = "load"
    base: str | None = None
    with_handler: bool = False
    say: Say = field(default=lambda line: None)


def push_folder(folder: Path, target: Target, options: PushOptions | None = None, api: HfApi | None = None) -> Pushed:
    """Upload a saved model and check the pushed commit.

    Neither the weights nor anything else that a training left in the folder is changed or copied; configuration, code and
    processor are written again by this version of the package. A card that a person wrote or changed, here or on the Hub,
    is kept.

    Args:
        folder: of the model and its processor.
        target: where to push to.
        options: how to push; None = the defaults.
        api: client of the Hub; None = that of the environment.

    Raises:
        ShareError: the folder or the options can't be pushed, or the Hub refuses.
        UploadError: the upload broke.
        CheckError: the Hub has something else than what was pushed, or it doesn't load.
    """
    options, api = options or PushOptions(), api or hub_api()
    check_target(target)
    saved = read_saved_model(folder)
    base = _hub_base(saved, options.base, api)
    relation = Relation("adapter", [base.repo_id], _revisions(base)) if base is not None else Relation()
    return _push(saved, target, base, relation, options, api)


def push_collection(
    folders: Sequence[Path], target: Target, options: PushOptions | None = None, api: HfApi | None = None
) -> list[Pushed]:
    """Upload the checkpoints of one model, each to a repository of its own, and list them as a collection on the Hub.

    Args:
        folders: several models; of a single run also those in its folder: base, merged, int4.
        target: its repository is the whole model's; the others' names get an ending, such as -lora.
        options: how to push; None = the defaults.
        api: client of the Hub; None = that of the environment.

    Raises:
        ShareError: see `push_folder`; or a member's place in the collection isn't clear.
        UploadError: an upload broke.
        CheckError: a check failed.
    """
    options, api = options or PushOptions(), api or hub_api()
    check_target(target)
    if target.create_pr:
        raise ShareError(
            "--pr proposes a change of one repository, and a collection has several: push them one by one."
        )
    members = plan_collection(folders)
    pushed: dict[str, Pushed] = {}
    owner, _, name = target.repo_id.rpartition("/")
    for member in members:
        repo_id = f"{owner}/{name}{member.ending}" if owner else f"{name}{member.ending}"
        relation, base = _relation(member, pushed), None
        if member.saved.kind == "adapter":
            base = _base_in(member, pushed) or _hub_base(member.saved, options.base, api)
            relation = Relation("adapter", [base.repo_id], _revisions(base)) if base else relation
        pushed[member.role] = _push(member.saved, replace(target, repo_id=repo_id), base, relation, options, api)
    url = add_to_collection(api, name, members, pushed, private=bool(target.private))
    options.say(f"collection: {url}")
    return list(pushed.values())


def _push(
    saved: SavedModel, target: Target, base: HubBase | None, relation: Relation, options: PushOptions, api: HfApi
) -> Pushed:
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        model = stage_model(saved, staged, base, with_handler=options.with_handler)
        relation = replace(relation, quantization=_quantization(model, saved))
        facts = read_facts(saved)
        for note in facts.notes:
            options.say(f"not used: {note}")
        figures = write_figures(facts, staged)
        written = _local_card(saved, model)
        _write_card(staged, written)
        check_private_data(staged, saved.folder)  # with the lines of a person's card as they are in the folder
        _write_card(staged, complete_card(written, target.repo_id, facts, figures, relation))
        check_private_data(staged, saved.folder, README)
        repo_id = open_repository(api, target, saved.kind)
        there = hub_card(api, repo_id, target.revision)
        if there is not None and not is_generated(there):
            _write_card(staged, complete_card(there, repo_id, facts, figures, relation))
        elif repo_id != target.repo_id:
            _write_card(staged, complete_card(written, repo_id, facts, figures, relation))
        pushed = upload(api, repo_id, staged, target, saved.kind, f"Upload {type(model).__name__}")
        options.say(pushed.url)
        if target.tag:
            tag_commit(api, pushed, target.tag)
        _check(api, pushed, saved, staged, options)
    return pushed


def _check(api: HfApi, pushed: Pushed, saved: SavedModel, staged: Path, options: PushOptions) -> None:
    where = f"{pushed.repo_id} at {pushed.revision}"
    if options.check == "none":
        options.say(f"{where}: not checked")
        return
    files = check_files(api, pushed, staged)
    said = [f"{files} files have the checksums of those here"]
    if options.check != "files":
        found = check_loading(api, pushed, saved, staged, full=options.check == "full")
        size = f" of {found['parameters']:,} parameters" if found.get("parameters") else ""
        result = ", with the same logits as here" if options.check == "full" else ""
        said.append(f"{found['model']}{size} and {found['processor']} load in a fresh process{result}")
    options.say(f"{where}: {'; '.join(said)}")


# --- Bases and cards --------------------------------------------------------------------------------------------------


def _hub_base(saved: SavedModel, given: str | None, api: HfApi) -> HubBase | None:
    """Return an adapter's base model on the Hub, with the commit that is there now if none is named.

    Raises:
        ShareError: it is a local folder, or isn't on the Hub.
    """
    if saved.kind != "adapter":
        if given is not None:
            raise ShareError(f"--base: {saved.folder} is a whole model, and has no base to be loaded with.")
        return None
    name, _, revision = (given or saved.base or "").partition("@")
    if hub_id(name) is None:
        if given is not None:
            raise ShareError(f"--base {given}: not a Hub id; expected OWNER/NAME or OWNER/NAME@REVISION.")
        found = f"the folder {saved.base}" if saved.base else "not known by any name"
        raise ShareError(
            f"{saved.folder}: an adapter that others can't load: its base model is {found}. Push both with --collection; or, "
            "if the base model is on the Hub already, name it by --base OWNER/NAME."
        )
    wanted = revision or (None if given else saved.adapter.get("revision"))
    try:
        with hub_errors(name):
            info = api.model_info(name, revision=wanted)
    except ShareError as error:
        raise ShareError(f"{saved.folder}: its base model isn't on the Hub: {error}") from error
    return HubBase(name, info.sha)


def _revisions(base: HubBase) -> dict[str, str]:
    return {base.repo_id: base.revision} if base.revision else {}


def _base_in(member: Member, pushed: dict[str, Pushed]) -> HubBase | None:
    found = pushed.get("base")
    return HubBase(found.repo_id, found.revision) if found is not None and "base" in member.made_from else None


def _relation(member: Member, pushed: dict[str, Pushed]) -> Relation:
    sources = [pushed[role] for role in member.made_from if role in pushed]
    if member.kind is None or not sources:
        return Relation()
    return Relation(member.kind, [each.repo_id for each in sources], {each.repo_id: each.revision for each in sources})


def _quantization(model: HubModel, saved: SavedModel) -> str | None:
    if saved.kind != "quantized":
        return None
    described = describe_quantization(model)
    layers = described.partition(":")[0] if described else None  # without what computes with them on this machine
    return ", ".join(part for part in (quantization_name(model), layers) if part)


def _write_card(folder: Path, card: str) -> None:
    """Write README.md with the line ends that it has."""
    (folder / README).write_text(card, encoding="utf-8", newline="")


def _local_card(saved: SavedModel, model: HubModel) -> str:
    """Return the folder's card, or a new one."""
    path = saved.folder / README
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    return str(model.model_card(adapter=saved.kind == "adapter"))
