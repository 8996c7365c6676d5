"""`push_folder` against a stand-in of the Hub with a real client; checks by checksums, since processes take seconds."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hub_stand_in import READ_TOKEN, STRANGER_TOKEN, USER, HubStandIn
from huggingface_hub import HfApi, ModelCard, constants

from samf.model.model_card import is_generated
from samf.scripts.push_model import PushOptions, push_folder
from samf.sharing.errors import CheckError, ShareError, UploadError
from samf.sharing.hub import Pushed, Target
from samf.sharing.private_data import check_private_data, scrub_json_files

NAME = f"{USER}/samf"
PATIENT = "patient_0815"  # of the evaluation in the run's folder
OWN_CARD = "---\nlicense: mit  # ours\ntags: [mine]\n---\r\n# Written by hand\r\n"


def push(folder: Path, hub: HubStandIn, name: str = NAME, *, token: str | None = None, **settings) -> Pushed:
    options = {"check": "files"} | {key: settings.pop(key) for key in ("check", "base", "say") if key in settings}
    api = hub.api(token) if token else hub.api()
    return push_folder(folder, Target(name, **settings), PushOptions(**options), api)


def card_of(hub: HubStandIn, name: str = NAME, revision: str = "main") -> ModelCard:
    return ModelCard(hub.files(name, revision)["README.md"].decode())


# --- What is pushed ---------------------------------------------------------------------------------------------------


def test_a_push_is_a_whole_repository_at_the_revision_that_it_names(run, hub):
    lines = []
    pushed = push(run, hub, say=lines.append)
    files = hub.files(NAME, pushed.revision)
    assert {"config.json", "modeling_samf.py", "processing_samf.py", "tokenizer.json", "requirements.txt"} <= set(files)
    for shard in run.glob("model*"):
        assert files[shard.name] == shard.read_bytes()
    assert not {"trainer_state.json", "training_args.bin", "_run.json", "predictions.jsonl"} & set(files)
    assert any(f"{NAME} at {pushed.revision}: " in line and "checksums" in line for line in lines)


def test_the_card_says_what_the_run_recorded(run, hub):
    push(run, hub)
    card = card_of(hub)
    assert is_generated(str(card))
    for row in ("| Steps | 4 (0.444 epochs) |", "| Records per step | 8 on 2 processes |", "| Recipe | ct_rate_ao2d |"):
        assert row in card.text
    assert "| Last training loss | 2 |" in card.text and "Trained on CT-RATE." in card.text
    results = json.loads((run / "eval" / "results.json").read_text())["tasks"]["report"]
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures["BLEU-1"] == pytest.approx(results["text"]["bleu_1"], abs=1e-4)
    assert f"| Findings, macro-F1 | {results['findings']['macro']['f1']:.3f} |" in card.text
    shown = set(re.findall(r"!\[.*?\]\((.*?)\)", card.text))
    assert shown == {path for path in hub.files(NAME) if path.startswith("figures/")}
    assert "figures/loss.png" in shown and not any("reliability" in path for path in shown)


@pytest.mark.slow
def test_what_wasn_t_recorded_isn_t_said(adapter, hub):
    push(adapter / "merged", hub)
    card = card_of(hub)
    assert "## Training" not in card.text and card.data.eval_results is None
    assert "No metrics are recorded here." in card.text and "The training data are not recorded here." in card.text
    assert not any(path.startswith("figures/") for path in hub.files(NAME))


@pytest.mark.slow
def test_evaluations_of_other_weights_are_left_out(run, hub, tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(run, folder)
    for path in folder.glob("model*"):
        os.utime(path)
    os.utime(folder / "eval" / "results.json", (1e9, 1e9))
    lines = []
    push(folder, hub, say=lines.append)
    assert card_of(hub).data.eval_results is None
    assert any("older than the weights" in line for line in lines)
    other = tmp_path / "other"
    folder.rename(other)
    push(other, hub, say=lines.append)
    assert any("of another model" in line for line in lines)


@pytest.mark.slow
def test_a_calibrated_model_shows_its_reliability(run, hub, tmp_path):
    from PIL import Image, PngImagePlugin

    folder = tmp_path / "whole"
    shutil.copytree(run, folder)
    scores = {"ece": 0.25, "bins": 10}
    report = {"before": scores, "after": {**scores, "ece": 0.05}, "scaling": "platt", "scans": 12}
    (folder / "calibration.json").write_text(json.dumps(report))
    secret = PngImagePlugin.PngInfo()
    secret.add_text("Source", str(folder))
    Image.new("RGB", (4, 3), "red").save(folder / "calibration.png", pnginfo=secret)
    push(folder, hub)
    assert "0.250 before, 0.050 after scaling (platt)" in card_of(hub).text
    png = hub.files(NAME)["figures/reliability.png"]
    assert str(folder).encode() not in png and png.startswith(b"\x89PNG")


# --- What isn't -------------------------------------------------------------------------------------------------------


def test_no_byte_of_a_push_names_this_machine_or_a_patient(run, adapter, hub, tmp_path):
    """Also where the folder's own files do: its configuration, processor, card's facts, adapter, trainer's state."""
    folder = tmp_path / "whole"
    shutil.copytree(run, folder)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        content |= {"_name_or_path": str(run), "name_or_path": str(run), "source_folder": f"{Path.home()}/scans"}
        (folder / name).write_text(json.dumps(content))
    base = push(folder, hub)
    push(adapter, hub, f"{USER}/lora", base=f"{base.repo_id}@{base.revision}")
    secrets = {str(run), str(folder), str(tmp_path), str(Path.cwd()), f"{Path.home()}/", PATIENT, "scan_0_a"}
    secrets.add(f"{tempfile.gettempdir()}/")
    for repository in hub.repositories.values():
        for path, content in hub.files(repository.name).items():
            if path.endswith(".safetensors"):
                content = content[: 8 + int.from_bytes(content[:8], "little")]
            for secret in secrets:
                assert secret.encode() not in content, (path, secret)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        pytest.param("made in {home}/me/scans", "a folder of this machine", marks=pytest.mark.slow),
        pytest.param("see /home/ada/ct", "a home folder", marks=pytest.mark.slow),
        ("such as patient_0815_1", "a scan or patient"),
    ],
)
def test_a_card_that_gives_somebody_away_isn_t_pushed(run, hub, tmp_path, text, what):
    folder = tmp_path / "whole"
    shutil.copytree(run, folder)
    (folder / "README.md").write_text(f"# Mine\n\n{text.format(home=Path.home())}\n")
    with pytest.raises(ShareError, match=f"README.md, line 3: names {what}") as error:
        push(folder, hub)
    assert "patient_0815" not in str(error.value) and not hub.repositories


def test_what_only_looks_like_a_patient_or_path_is_pushed(tmp_path):
    """Examples in code, numbers, tokens; and files of a hundred thousand scans are searched at once."""
    staged, source = tmp_path / "staged", tmp_path / "run"
    for folder in (staged, source / "eval"):
        folder.mkdir(parents=True)
    rows = [{"scan_id": f"valid_{number}_a", "patient_id": f"{number + 32_000}"} for number in range(2000)]
    (source / "eval" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (staged / "ct_volume.py").write_text(f"# such as {Path.home()}/valid_53_a\n")
    (staged / "config.json").write_text('{"vocab_size": 32064}')
    (staged / "tokenizer.json").write_text('{"valid_1_a": 3}')
    (staged / "README.md").write_text("xvalid_53_a and valid_99999_a\n")
    check_private_data(staged, source)
    (staged / "README.md").write_text("one line\n(valid_53_a).\n")
    with pytest.raises(ShareError, match="README.md, line 2: names a scan or patient"):
        check_private_data(staged, source)


def test_scrubbing_keeps_what_only_looks_like_a_path(tmp_path):
    content = {
        "token": "/think",
        "slash": "/",
        "url": "https://example.org/a/b",
        "id": "owner/name",
        "pattern": "a/b.c",
    }
    paths = {"data": "/data/hospital/CT", "windows": "C:\\Users\\ada\\ct", "name_or_path": "/data/hospital/model"}
    (tmp_path / "config.json").write_text(json.dumps({**content, **paths, "nested": [paths]}))
    scrub_json_files(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    public = {"data": "CT", "windows": "ct"}
    assert found == {**content, **public, "nested": [public]}
    check_private_data(tmp_path, tmp_path / "nothing")


# --- Cards ------------------------------------------------------------------------------------------------------------


def test_a_card_on_the_hub_that_somebody_wrote_only_gains_metadata(run, hub):
    api = hub.api()
    api.create_repo(NAME)
    hub.repositories[NAME].commit("main", {"README.md": OWN_CARD.encode()}, "by hand")
    push(run, hub)
    card = hub.files(NAME)["README.md"].decode()
    body, before = OWN_CARD.split("---")[2], OWN_CARD.split("---")[1]
    assert card.endswith(body.removeprefix("\r\n")) and card.startswith(f"---{before}model-index:")
    push(run, hub)
    assert hub.files(NAME)["README.md"].decode() == card


@pytest.mark.slow
def test_a_card_in_the_folder_that_somebody_wrote_is_pushed_as_it_is(run, hub, tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(run, folder)
    (folder / "README.md").write_text("---\nlicense: mit\nmodel-index: []\n---\n# Mine\n")
    push(folder, hub)
    assert hub.files(NAME)["README.md"] == (folder / "README.md").read_bytes()


@pytest.mark.slow
def test_a_generated_card_on_the_hub_is_replaced(run, adapter, hub):
    push(adapter / "merged", hub)
    push(run, hub)
    assert "## Training" in card_of(hub).text and is_generated(str(card_of(hub)))


# --- Checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("config.json", lambda files, path: files.update({path: files[path][:-1] + b" "}), "config.json differs"),
        pytest.param(
            "modeling_samf.py",
            lambda files, path: files.update({path: b"x"}),
            "modeling_samf.py differs",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "tokenizer.json", lambda files, path: files.pop(path), "tokenizer.json is missing", marks=pytest.mark.slow
        ),
        pytest.param(
            "old.safetensors",
            lambda files, path: files.update({path: b"x"}),
            "old.safetensors is there",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_hub_with_other_bytes_fails_the_check(model, hub, corrupt, path, change, message):
    corrupt(path, change)
    with pytest.raises(CheckError, match=message) as error:
        push(model, hub)
    assert hub.repositories[NAME].oid("main") in str(error.value)


@pytest.mark.slow
def test_a_flipped_bit_of_the_weights_fails_the_check(model, hub, corrupt):
    shard = sorted(model.glob("model*.safetensors"))[-1].name
    flip = lambda files, path: files.update({path: files[path][:-1] + bytes([files[path][-1] ^ 1])})  # noqa: E731
    corrupt(shard, flip)
    with pytest.raises(CheckError, match=f"{shard} differs"):
        push(model, hub)


# --- Uploads that break -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part_size", "requests"), [(None, 3), pytest.param(50_000, 11, marks=pytest.mark.slow)])
def test_a_second_push_sends_only_what_is_missing(model, hub, part_size, requests):
    hub.part_size = part_size
    broken = hub.fail("PUT /(lfs|parts)/", after=requests)
    with pytest.raises(UploadError, match="Run the same command again"):
        push(model, hub)
    assert NAME in hub.repositories and "config.json" not in hub.files(NAME)
    sent = set(hub.lfs_objects)
    hub.faults.remove(broken)
    hub.requests.clear()
    push(model, hub)
    files = hub.files(NAME)
    shards = {path.name: path.read_bytes() for path in model.glob("model*.safetensors")}
    assert len(shards) > 4 and 0 < len(sent) < len(shards)
    oids = {hashlib.sha256(content).hexdigest() for content in shards.values()}
    addresses = "".join(line + "\n" for line in hub.requests if line.startswith("PUT"))
    assert {oid for oid in oids if oid in addresses} == oids - sent
    assert {name: files[name] for name in shards} == shards


@pytest.mark.slow
def test_weights_stay_on_the_hub_where_the_commit_never_came(model, hub):
    broken = hub.fail("POST .*/commit/", answer=503)
    with pytest.raises(UploadError, match="HTTP 503"):
        push(model, hub)
    hub.faults.remove(broken)
    hub.requests.clear()
    pushed = push(model, hub)
    assert hub.count("PUT /lfs/") == 0 and hub.repositories[NAME].oid("main") == pushed.revision


@pytest.mark.slow
def test_by_xet_too_a_second_push_sends_only_what_is_missing(model, adapter, hub, tmp_path, monkeypatch):
    """hf_xet stores chunks in a folder, by itself; the stand-in is given the files, and the client's commits name them."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet_storage = tmp_path / "chunks"
    hub.xet_storage.mkdir()
    for path in (*model.glob("model*.safetensors"), adapter / "merged" / "model.safetensors"):
        hub.lfs_objects[hashlib.sha256(path.read_bytes()).hexdigest()] = path.read_bytes()

    def stored() -> int:
        return sum(path.stat().st_size for path in hub.xet_storage.rglob("*") if path.parent.name == "xorbs")

    broken = hub.fail("POST .*/commit/", answer=400)
    with pytest.raises(ShareError, match="HTTP 400"):
        push(model, hub)
    before = stored()
    hub.faults.remove(broken)
    pushed = push(model, hub)
    assert before > 500_000 and stored() < 1.2 * before and hub.count("lfs/objects") == 0
    assert hub.files(NAME)["config.json"] and hub.repositories[NAME].oid("main") == pushed.revision
    proposed = push(adapter / "merged", hub, token=STRANGER_TOKEN, create_pr=True)
    assert proposed.branch == "refs/pr/1" and hub.repositories[NAME].oid("refs/pr/1") == proposed.revision
    assert hub.repositories[NAME].oid("main") == pushed.revision


@pytest.mark.slow
def test_an_unchanged_model_makes_no_commit(model, hub):
    first = push(model, hub)
    assert push(model, hub).revision == first.revision
    assert len(hub.history(NAME)) == 2  # with the initial one


@pytest.mark.slow
def test_shards_of_an_earlier_push_are_removed(model, adapter, hub):
    """Both would be loaded by some rule: a single file hides an index."""
    push(model, hub)
    pushed = push(adapter / "merged", hub)
    weights = {path for path in hub.files(NAME, pushed.revision) if path.startswith(("model.", "model-"))}
    assert weights == {"model.safetensors"}


# --- Repositories and rights ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_repository_of_an_organisation_needs_a_role_that_may_write(model, hub):
    assert push(model, hub, "lab/samf").repo_id == "lab/samf"
    for name in ("readers/samf", "others/samf"):
        with pytest.raises(ShareError, match="no right.*write or admin"):
            push(model, hub, name)
    assert set(hub.repositories) == {"lab/samf"}


@pytest.mark.slow
def test_a_name_without_an_owner_is_ones_own(model, hub):
    assert push(model, hub, "samf").repo_id == NAME
    assert f'repository = "{NAME}"' in card_of(hub).text


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (READ_TOKEN, "no right"),
        pytest.param(STRANGER_TOKEN, "no right", marks=pytest.mark.slow),
        pytest.param("hf_" + "0" * 34, "token isn't valid", marks=pytest.mark.slow),
    ],
)
def test_without_rights_nothing_is_uploaded(model, hub, token, message):
    push(model, hub)
    before = hub.history(NAME)
    hub.requests.clear()
    with pytest.raises(ShareError, match=message) as error:
        push(model, hub, token=token)
    assert "\n" not in str(error.value) and hub.history(NAME) == before and hub.count("PUT") == 0


def test_without_a_token_it_says_so(model, hub, monkeypatch):
    monkeypatch.setattr("samf.sharing.hub.get_token", lambda: None)
    with pytest.raises(ShareError, match="not logged in: run hf auth login"):
        push_folder(model, Target(NAME), PushOptions("files"), HfApi(endpoint=hub.url))
    assert not hub.requests


def test_private_weights_don_t_go_to_a_public_repository(model, hub):
    push(model, hub)
    with pytest.raises(ShareError, match="exists and is public, not private"):
        push(model, hub, private=True)
    push(model, hub, f"{USER}/hidden", private=True)
    assert hub.repositories[f"{USER}/hidden"].private


def test_a_gate_is_closed_before_the_weights_arrive(model, hub):
    push(model, hub, gated="manual")
    steps = [line.split(" ")[0] + " " + line.rpartition("/")[2] for line in hub.requests]
    assert steps.index("PUT settings") < next(n for n, line in enumerate(hub.requests) if line.startswith("PUT /lfs"))
    assert hub.repositories[NAME].gated == "manual"
    for token in (STRANGER_TOKEN, False):
        with pytest.raises(OSError, match="gated repo"):
            HfApi(endpoint=hub.url, token=token).hf_hub_download(NAME, "config.json")
    push(model, hub, gated="off")
    assert hub.repositories[NAME].gated is False


def test_a_pull_request_leaves_main_as_it_is(model, adapter, hub):
    push(model, hub)
    before = hub.repositories[NAME].oid("main")
    lines = []
    pushed = push(adapter / "merged", hub, token=STRANGER_TOKEN, create_pr=True, say=lines.append)
    assert pushed.branch == "refs/pr/1" and lines[0] == f"{hub.url}/{NAME}/discussions/1"
    assert hub.repositories[NAME].oid("main") == before
    assert hub.repositories[NAME].oid("refs/pr/1") == pushed.revision
    again = push(adapter / "merged", hub, token=STRANGER_TOKEN, revision="refs/pr/1", message="and more")
    assert again.revision == pushed.revision  # nothing had changed
    with pytest.raises(ShareError, match="no such repository"):
        push(model, hub, f"{USER}/nowhere", create_pr=True)


@pytest.mark.slow
def test_branches_and_tags(model, adapter, hub):
    first = push(model, hub, tag="v1", revision="trial")
    assert hub.repositories[NAME].tags == {"v1": first.revision} and first.branch == "trial"
    assert "config.json" not in hub.files(NAME)
    push(model, hub, tag="v1", revision="trial")  # the same commit
    with pytest.raises(ShareError, match=f"the tag v1 names {first.revision[:12]} already"):
        push(adapter / "merged", hub, tag="v1", revision="trial")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"create_pr": True, "revision": "trial"}, "leave out --revision"),
        ({"create_pr": True, "tag": "v1"}, "--pr makes none"),
        ({"create_pr": True, "gated": "auto"}, "--gated"),
        ({"revision": "0" * 40}, "is a commit"),
        ({"name": "a/b/c"}, "can't be a repository"),
        ({"name": "a b"}, "can't be a repository"),
        ({"base": "someone/base"}, "is a whole model"),
    ],
)
def test_options_that_can_t_be_are_refused_without_a_request(model, hub, settings, message):
    with pytest.raises(ShareError, match=message):
        push(model, hub, **settings)
    assert not hub.requests


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (429, "too many requests; wait 7 s"),
        pytest.param(500, "HTTP 500", marks=pytest.mark.slow),
        pytest.param(None, "can't be reached", marks=pytest.mark.slow),
    ],
)
def test_a_hub_in_trouble_can_be_asked_again(model, hub, status, message):
    hub.fail("POST /api/repos/create", answer=status, headers={"Retry-After": "7"})
    with pytest.raises(UploadError, match=message) as error:
        push(model, hub)
    assert "Run the same command again" in str(error.value) and "\n" not in str(error.value)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_folders_that_hold_no_model_are_named(model, hub, tmp_path):
    def refused(folder: Path) -> str:
        with pytest.raises(ShareError) as error:
            push(folder, hub)
        return str(error.value)

    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "parent").mkdir()
    shutil.copytree(model, tmp_path / "parent" / "model")
    assert f"There are models in {tmp_path / 'parent' / 'model'}." in refused(tmp_path / "parent")
    model = tmp_path / "parent" / "model"
    next(model.glob("model-*.safetensors")).unlink()
    assert "isn't there. Save the model again" in refused(model)
    for path in model.glob("model*"):
        path.unlink()
    assert "no weights" in refused(model)
    (model / "config.json").write_text('{"model_type": "bert"}')
    assert "a model of type 'bert', not 'samf'" in refused(model)
    (model / "config.json").write_text("{")
    assert "can't be read as JSON" in refused(model)
    assert not hub.requests


@pytest.mark.slow
def test_weights_of_another_configuration_aren_t_pushed(model, hub, tmp_path):
    folder = tmp_path / "whole"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShareError, match="doesn't load.*layers.2"):
        push(folder, hub)
    config["text_config"] |= {"num_hidden_layers": 2, "intermediate_size": 40}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShareError, match="doesn't load"):
        push(folder, hub)
    assert not hub.requests


# --- Adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_names_its_base_by_id_and_commit(model, adapter, hub):
    with pytest.raises(ShareError, match="others can't load.*--collection.*--base OWNER/NAME"):
        push(adapter, hub)
    with pytest.raises(ShareError, match="its base model isn't on the Hub"):
        push(adapter, hub, base=f"{USER}/base")
    base = push(model, hub, f"{USER}/base")
    push(adapter, hub, f"{USER}/lora", base=f"{USER}/base")
    config = json.loads(hub.files(f"{USER}/lora")["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (f"{USER}/base", base.revision)
    card = card_of(hub, f"{USER}/lora")
    assert card.data.base_model == f"{USER}/base" and card.data.to_dict()["base_model_relation"] == "adapter"
    assert f"| Made from | `{USER}/base` at `{base.revision[:12]}` |" in card.text
    assert "adapter_model.safetensors" in hub.files(f"{USER}/lora")


@pytest.mark.slow
def test_an_adapter_doesn_t_go_into_a_whole_models_repository(model, adapter, hub):
    push(model, hub)
    with pytest.raises(ShareError, match="holds a whole model, which adapter weights would hide"):
        push(adapter, hub, base=NAME)
    push(adapter, hub, f"{USER}/lora", base=NAME)
    with pytest.raises(ShareError, match="holds an adapter"):
        push(model, hub, f"{USER}/lora")
