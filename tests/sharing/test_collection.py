"""Collections of one model's forms, against a stand-in of the Hub."""

import json
import shutil

import pytest
import torch
from hub_stand_in import USER
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from samf.scripts.push_model import PushOptions, push_collection
from samf.sharing.collection import plan_collection
from samf.sharing.errors import ShareError
from samf.sharing.hub import Target

FILES = PushOptions("files")


def relation(hub, name: str):
    data = ModelCard(hub.files(name)["README.md"].decode()).data
    return data.to_dict().get("base_model_relation"), data.base_model


def test_one_run_becomes_a_repository_per_form_and_a_collection(run, adapter, hub):
    lines = []
    pushed = push_collection([adapter], Target(f"{USER}/samf"), PushOptions("files", say=lines.append), hub.api())
    names = {
        form: f"{USER}/samf{ending}"
        for form, ending in (("base", "-base"), ("lora", "-lora"), ("whole", ""), ("int4", "-int4"))
    }
    assert [each.repo_id for each in pushed] == [names["base"], names["lora"], names["whole"], names["int4"]]
    assert relation(hub, names["base"]) == (None, None)
    assert relation(hub, names["lora"]) == ("adapter", names["base"])
    assert relation(hub, names["whole"]) == ("merge", [names["base"], names["lora"]])
    assert relation(hub, names["int4"]) == ("quantized", names["whole"])
    config = json.loads(hub.files(names["lora"])["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (names["base"], pushed[0].revision)
    assert "samf int4" in hub.files(names["int4"])["README.md"].decode()
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]][0] == names["whole"]
    assert {item["id"] for item in collection["items"]} == set(names.values())
    assert lines[-1] == f"collection: {hub.url}/collections/{collection['slug']}"


@pytest.mark.slow
def test_a_second_push_of_a_collection_changes_nothing(adapter, hub):
    first = push_collection([adapter], Target("lab/samf", private=True), FILES, hub.api())
    items = [dict(item) for item in next(iter(hub.collections.values()))["items"]]
    assert push_collection([adapter], Target("lab/samf", private=True), FILES, hub.api()) == first
    (collection,) = hub.collections.values()
    assert collection["items"] == items and collection["private"] and collection["owner"] == "lab"
    assert all(hub.repositories[each.repo_id].private for each in first)


@pytest.mark.slow
def test_relations_are_read_from_the_weights(run, adapter, tmp_path):
    """What was merged or rounded elsewhere has the parts of the model that it was made from; another model hasn't."""
    shutil.copytree(adapter / "int4", tmp_path / "small")
    shutil.copytree(adapter / "merged", tmp_path / "joined")
    members = plan_collection([adapter, tmp_path / "joined", tmp_path / "small"])
    found = {member.role: (member.kind, list(member.made_from)) for member in members}
    assert found == {
        "base": (None, []),
        "adapter": ("adapter", ["base"]),
        "model": ("merge", ["base", "adapter"]),
        "quantized": ("quantized", ["model"]),
    }
    of_base = plan_collection([run, tmp_path / "small"])
    assert [(member.role, member.kind, list(member.made_from)) for member in of_base] == [
        ("model", None, []),
        ("quantized", "quantized", []),
    ]
    weights = load_file(tmp_path / "joined" / "model.safetensors")
    changed = {name: weight + 1 if ".fusion." in name else weight for name, weight in weights.items()}
    save_file(
        {name: torch.clone(weight) for name, weight in changed.items()}, tmp_path / "joined" / "model.safetensors"
    )
    other = plan_collection([adapter, tmp_path / "joined"])
    assert {member.role: member.kind for member in other}["model"] is None


def test_collections_that_can_t_be_are_refused(run, adapter, hub, tmp_path):
    shutil.copytree(run, tmp_path / "second")
    for folders, message in (([run], "one model only"), ([run, tmp_path / "second"], "are both the model")):
        with pytest.raises(ShareError, match=message):
            push_collection(folders, Target(f"{USER}/samf"), FILES, hub.api())
    with pytest.raises(ShareError, match="--pr proposes a change of one repository"):
        push_collection([adapter], Target(f"{USER}/samf", create_pr=True), FILES, hub.api())
    assert not hub.requests
