"""Pushing to a stand-in for the Hub with a real client, and loading back by id, in processes of their own.

`huggingface_hub` reads its endpoint when it is imported, so one process with this package publishes everything, and a
fresh one, with `samf` blocked from import, loads what it finds. The tests look at what came of it.
"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from tiny import tiny_config

from samf.data.prompts import REPORT_QUESTION
from samf.model.model_card import is_generated, make_card, write_model_card

OWN_CARD = "---\nlicense: mit\ntags: [mine]\n---\n# Written by hand\n"
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
CODE = {"configuration_samf.py", "modeling_samf.py", "processing_samf.py", "image_processing_samf.py", "ct_volume.py"}
CODE |= {"hub_samf.py", "model_card.py", "chat_template_samf.py", "conversation_samf.py", "generation_samf.py"}
CODE |= {"components_samf.py", "ct_memory.py", "files_samf.py", "language_model_samf.py", "slice_encoder_samf.py"}
CODE |= {"modules_samf.py", "image_tokens_samf.py", "inputs_samf.py", "outputs_samf.py", "losses_samf.py"}
CODE |= {"adapters_samf.py", "checks_samf.py", "extra_sources_samf.py", "workarounds_samf.py"}
CODE |= {"cache_samf.py", "quantization_samf.py", "quantized_linear_samf.py", "quantized_plan_samf.py"}
CODE |= {"quantized_weights_samf.py"}

COMMON = """
import hashlib, json, sys
from pathlib import Path
import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import Trainer, TrainerCallback, TrainingArguments

work = Path(sys.argv[1])
OPTIONS = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")

def weights(model):
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in state)).hexdigest()

def tokens(model, processor):
    content = [{"type": "volume", "path": str(work / "scan.nii.gz")}, {"type": "text", "text": "Which finding is present?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **OPTIONS)
    return model.eval().generate(**inputs, max_new_tokens=6, do_sample=False).tolist()

class Slow(TrainerCallback):
    # Steps take longer than a push, as in life: Trainer writes anew the files that it may still be pushing.
    def on_save(self, args, state, control, **kwargs):
        if args.push_to_hub and self.trainer.push_in_progress is not None:
            self.trainer.push_in_progress.wait_until_done()

def trainer(model, processor, name, kind=Trainer, **options):
    args = TrainingArguments(
        work / name, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True,
        report_to="none", disable_tqdm=True, hub_model_id=name, hub_always_push=True, **options,
    )
    run = kind(model=model, args=args, train_dataset=torch.load(work / "rows.pt"), processing_class=processor)
    if kind is Trainer:
        slow = Slow()
        slow.trainer = run
        run.add_callback(slow)
    return run
"""

PUBLISHER = (
    COMMON
    + """
sys.path.insert(0, sys.argv[2])
from peft import LoraConfig, get_peft_model
from tiny import model_for, tiny_batch, tiny_processor
from samf import SamfForConditionalGeneration
from samf.train import DataArguments, ModelArguments, SamfTrainer, card_settings, save_repository

api, found = HfApi(), {}
processor = tiny_processor()
model = model_for(processor)
processor.push_to_hub("model")
found["first"] = [model.push_to_hub("model", commit_message="first").oid, weights(model)]
with torch.no_grad():
    model.lm_head.weight += 0.1 * torch.randn_like(model.lm_head.weight)
found["second"] = [model.push_to_hub("model", commit_message="second", tags=["extra"]).oid, weights(model)]
found["tokens"] = tokens(model, processor)
code = Path(sys.modules[type(model).__module__].__file__).read_text(encoding="utf-8")
newer = (code + "\\nNEWER = True\\n").encode()
api.upload_file(path_or_fileobj=newer, path_in_repo="modeling_samf.py", repo_id="someone/model")

model.push_to_hub("hidden", private=True)
model.push_to_hub("branches", revision="trial")
model.save_pretrained(work / "saved", push_to_hub=True)
(work / "written").mkdir()
(work / "written" / "README.md").write_text(sys.argv[3], encoding="utf-8")
(work / "written" / "notes.txt").write_text("not the model's", encoding="utf-8")
model.save_pretrained(work / "written", push_to_hub=True)
api.create_repo("own-card")
api.upload_file(path_or_fileobj=sys.argv[3].encode(), path_in_repo="README.md", repo_id="someone/own-card")
model.push_to_hub("own-card", tags=["extra"])

targets = r".*language_model.*\\.(qkv_proj|o_proj|gate_up_proj|down_proj)"
lora = dict(r=4, target_modules=targets, modules_to_save=["fusion"])
wrapped = get_peft_model(SamfForConditionalGeneration.from_pretrained("someone/model"), LoraConfig(**lora))
with torch.no_grad():
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
wrapped.get_base_model().push_to_hub("adapter")
processor.push_to_hub("adapter")
found["adapter"] = tokens(wrapped, processor)
local = get_peft_model(SamfForConditionalGeneration.from_pretrained(work / "saved"), LoraConfig(**lora))
try:
    local.get_base_model().push_to_hub("local-adapter")
except ValueError as error:
    found["refused"] = str(error)

rows = tiny_batch("ao2d", rows=8)
rows["input_ids"][:, :4] = processor.image_token_id
rows["input_ids"][:, 4:] %= processor.image_token_id
torch.save([{key: value[row] for key, value in rows.items()} for row in range(8)], work / "rows.pt")
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    model = SamfForConditionalGeneration.from_pretrained("someone/model")
    options = dict(push_to_hub=True, hub_strategy=strategy, hub_private_repo=strategy == "checkpoint")
    run = trainer(model, processor, f"run-{strategy}", **options)
    run.train()
    run.push_to_hub()
    found[strategy] = weights(model)

card = card_settings(ModelArguments(model="someone/model"), DataArguments(data=str(work / "CT-RATE")))
for name in ("trained", "own-card"):
    run = trainer(SamfForConditionalGeneration.from_pretrained("someone/model"), processor, name, SamfTrainer, push_to_hub=True)
    run.card = card
    run.train()
    run.state.log_history.append({"eval_own_loss": 2.5, "eval_shuffled_loss": 2.75})
    save_repository(run)
print(json.dumps(found))
"""
)

LOADER = (
    COMMON
    + """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "samf" or name.startswith("samf."):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

def load(name, **options):
    return AutoModelForImageTextToText.from_pretrained(f"someone/{name}", trust_remote_code=True, **options)

def describe(model):
    module = type(model).__module__
    return {"weights": weights(model), "module": module, "newer": hasattr(sys.modules[module], "NEWER")}

first, before_resume, in_training = sys.argv[2:]
found = {"main": describe(load("model")), "first": describe(load("model", revision=first))}
processor = AutoProcessor.from_pretrained("someone/model", trust_remote_code=True)
found["tokens"] = tokens(load("model"), processor)
found["processor"] = type(processor).__module__
try:
    load("hidden", token=False)
except OSError as error:
    found["without token"] = str(error)
found["hidden"] = weights(load("hidden"))
found["branch"] = weights(load("branches", revision="trial"))
adapter = load("adapter")
found["adapter"] = tokens(adapter, AutoProcessor.from_pretrained("someone/adapter", trust_remote_code=True))
found["adapter config"] = type(AutoConfig.from_pretrained("someone/adapter", trust_remote_code=True)).__name__
found["in training"] = describe(load("run-every_save", revision=in_training))
found["all checkpoints"] = [weights(load("run-all_checkpoints", subfolder=f"checkpoint-{step}")) for step in (2, 4)]

folder = snapshot_download("someone/run-checkpoint", revision=before_resume, allow_patterns="last-checkpoint/*")
model = load("model")
run = trainer(model, processor, "resumed")
run.train(resume_from_checkpoint=f"{folder}/last-checkpoint")
found["resumed"] = [weights(model), run.state.global_step, len(run.state.log_history)]

load("model", revision=first).push_to_hub("again")
processor.push_to_hub("again")
print(json.dumps(found))
"""
)


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as server:
        yield server


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    voxels = np.random.default_rng(0).integers(-1000, 400, (12, 14, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / "scan.nii.gz")
    (folder / "CT-RATE").mkdir()
    return folder


def run(script: str, hub: HubStandIn, work: Path, home: str, *arguments: str) -> dict:
    """What a fresh process prints last, with the stand-in as its Hub and an empty cache of its own."""
    environment = {"PATH": os.environ["PATH"], "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    if "PYTHONPATH" in os.environ:  # the checkout under test, where another one is installed
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, "-c", script, str(work), *arguments],
        capture_output=True,
        encoding="utf-8",
        cwd=work,
        env={**environment, **hub.environment(work / home)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


@pytest.fixture(scope="module")
def published(hub, work) -> dict:
    return run(PUBLISHER, hub, work, "publisher", str(Path(__file__).parents[1]), OWN_CARD)


def commit(hub: HubStandIn, name: str, message: str) -> str:
    return next(oid for oid, found in hub.history(f"someone/{name}") if found == message)


@pytest.fixture(scope="module")
def loaded(hub, work, published) -> dict:
    before_resume = commit(hub, "run-checkpoint", "Training in progress, step 2, checkpoint")
    in_training = commit(hub, "run-every_save", "Training in progress, step 2")
    return run(LOADER, hub, work, "loader", published["first"][0], before_resume, in_training)


def card_of(hub: HubStandIn, name: str, revision: str = "main") -> str:
    return hub.files(f"someone/{name}", revision)["README.md"].decode()


def test_a_pushed_model_loads_by_id(published, loaded):
    assert loaded["main"]["weights"] == published["second"][1]
    assert loaded["main"]["module"].startswith("transformers_modules.someone.model.")
    assert loaded["processor"].startswith("transformers_modules.someone.model.")
    assert loaded["tokens"] == published["tokens"]
    assert loaded["branch"] == published["second"][1]


def test_a_revision_gives_its_own_weights_and_code(published, loaded):
    assert loaded["first"]["weights"] == published["first"][1] != published["second"][1]
    assert published["first"][0] in loaded["first"]["module"]
    assert loaded["main"]["newer"] and not loaded["first"]["newer"]


def test_weights_go_by_lfs_and_code_as_it_is(hub, published):
    files = hub.files("someone/model")
    assert set(files) >= CODE | {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
    assert files["model.safetensors"] in hub.lfs_objects.values()
    assert files["modeling_samf.py"] not in hub.lfs_objects.values()


def test_a_private_repository_needs_the_token(hub, published, loaded):
    assert hub.repositories["someone/hidden"].private and not hub.repositories["someone/model"].private
    assert loaded["hidden"] == published["second"][1]
    assert "someone/hidden" in loaded["without token"]


def test_a_pushed_adapter_loads_with_its_base_model(hub, published, loaded):
    files = hub.files("someone/adapter")
    assert {"config.json", "adapter_config.json", "adapter_model.safetensors", *CODE} <= set(files)
    assert "model.safetensors" not in files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "someone/model"
    assert loaded["adapter"] == published["adapter"] != published["tokens"]
    assert loaded["adapter config"] == "SamfConfig"


def test_an_adapter_of_a_local_model_isn_t_pushed(hub, published):
    assert "Push the base model first" in published["refused"]
    assert "someone/local-adapter" not in hub.repositories


def test_saving_can_push_what_it_wrote(hub, published):
    assert {"config.json", "model.safetensors", "modeling_samf.py"} <= set(hub.files("someone/saved"))
    assert "notes.txt" not in hub.files("someone/written")


def test_a_model_of_remote_code_is_pushed_whole(hub, published, loaded):
    """Its code is that of the revision it came from, and nothing points back to the repository it came from."""
    files, source = hub.files("someone/again"), hub.files("someone/model", published["first"][0])
    assert {name: files[name] for name in CODE} == {name: source[name] for name in CODE}
    assert "--" not in json.dumps(json.loads(files["config.json"])["auto_map"])


# --- cards --------------------------------------------------------------------------------------------------------


def test_a_card_is_made_where_there_is_none(hub, published, loaded):
    card = ModelCard(card_of(hub, "model"))
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "apache-2.0"
    assert {"medical", "extra"} <= set(card.data.tags)
    for text in ("not for diagnosis", "`ao2d`", 'repository = "someone/model"', "## Limits", "## Intended use"):
        assert text in card.text
    adapter = ModelCard(card_of(hub, "adapter"))
    assert adapter.data.base_model == ["someone/model"]
    assert adapter.data.to_dict()["base_model_relation"] == "adapter"
    assert ModelCard(card_of(hub, "again")).data.base_model == ["someone/model"]


def test_a_card_that_somebody_wrote_stays(hub, work, published):
    assert card_of(hub, "own-card") == OWN_CARD
    assert card_of(hub, "written") == OWN_CARD
    assert (work / "written" / "README.md").read_text(encoding="utf-8") == OWN_CARD


def test_no_card_names_a_local_path(hub, work, published, loaded):
    for repository in hub.repositories.values():
        for files in repository.commits.values():
            for path, content in files.items():
                if path.endswith(("README.md", "config.json")):
                    assert str(work) not in content.decode(), (repository.name, path)


def test_a_card_is_its_maker_s_until_somebody_changes_it(tmp_path):
    config = tiny_config()
    card = make_card(config, repository="a/b")
    assert write_model_card(tmp_path, card)
    path = tmp_path / "README.md"
    rewritten = ModelCard.load(path)
    rewritten.save(path)  # as the library writes it: the same content in other YAML
    assert is_generated(path.read_text(encoding="utf-8"))
    assert write_model_card(tmp_path, make_card(config, repository="a/c"))
    made = path.read_text(encoding="utf-8")
    for changed in (
        made.replace("fluent", "long"),
        made.replace("- samf", "- mine"),
        made.replace("library_name:", ":-"),
    ):
        path.write_text(changed, encoding="utf-8")
        assert not write_model_card(tmp_path, card)
        assert path.read_text(encoding="utf-8") == changed


def test_a_card_tells_bases_data_and_metrics_but_no_folder(tmp_path):
    (tmp_path / "data").mkdir()
    bases = ["facebook/dino-vitb16", str(tmp_path), "microsoft/Phi-3-mini-4k-instruct"]
    card = make_card(
        tiny_config(fusion_type="slice_tokens", finding_names=["Emphysema"]),
        repository="a/b",
        base_models=bases,
        data=str(tmp_path / "data"),
        metrics={"BLEU-4": 0.25},
        facts={"Encoder": str(tmp_path)},
    )
    assert card.data.base_model == [bases[0], bases[2]]
    result = card.data.eval_results[0]
    assert (result.metric_name, result.metric_value, result.dataset_name) == ("BLEU-4", 0.25, "data, validation")
    for text in ("`slice_tokens`", "| BLEU-4 | 0.25 |", "Trained on data.", "Emphysema", REPORT_QUESTION):
        assert text in card.text
    assert str(tmp_path.parent) not in str(card)


# --- Trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trainer_pushes_by_its_strategy(strategy, hub, published):
    messages = [message for _, message in hub.history(f"someone/run-{strategy}")]
    steps = {
        "end": [],
        "every_save": ["Training in progress, step 2", "Training in progress, step 4"],
        "checkpoint": [f"Training in progress, step {step}{more}" for step in (2, 4) for more in ("", ", checkpoint")],
    }
    steps["all_checkpoints"] = steps["checkpoint"]
    assert messages[:-1] == ["initial commit", *steps[strategy]]
    assert messages[-1] == "End of training"
    files = hub.files(f"someone/run-{strategy}")
    assert {"config.json", "model.safetensors", "README.md", *CODE} <= set(files)
    folders = {path.split("/")[0] for path in files if "/" in path}
    kept = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert folders == kept.get(strategy, set())
    assert hub.repositories[f"someone/run-{strategy}"].private == (strategy == "checkpoint")


def test_what_trainer_pushes_during_training_loads(published, loaded):
    assert loaded["in training"]["module"].startswith("transformers_modules.someone.run_hyphen_every_save.")
    halfway, end = loaded["all checkpoints"]
    assert loaded["in training"]["weights"] == halfway != end == published["every_save"] == published["all_checkpoints"]


def test_training_resumes_from_the_hub(published, loaded):
    """Two steps here and two in another process are four steps here, to the bit."""
    weights, step, _ = loaded["resumed"]
    assert step == 4
    assert weights == published["checkpoint"]


def test_our_card_survives_trainer(hub, work, published):
    card = ModelCard(card_of(hub, "trained"))
    assert is_generated(str(card))
    assert card.data.base_model == ["someone/model"]
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures == {"loss, own volumes": 2.5, "loss, other patients' volumes": 2.75}
    for text in ("Trained on CT-RATE.", "| Steps | 4 |", "| Tasks | report, multiple_choice |"):
        assert text in card.text
    assert "requirements.txt" in hub.files("someone/trained")
    for oid, _ in hub.history("someone/trained")[1:]:  # each push waited for the one before
        files = hub.files("someone/trained", oid)
        assert all(files[name] == hub.files("someone/model", published["second"][0])[name] for name in CODE)
    during = commit(hub, "trained", "Training in progress, step 2")
    assert "not for diagnosis" in card_of(hub, "trained", during)


def test_loading_says_nothing_of_missing_backends(published, loaded):
    assert "backend is not available" not in published["stderr"] + loaded["stderr"]


def test_the_stand_in_behaves_as_the_hub_does(hub, published):
    """Strangers can't push; a part of a file can be had; weights lie on another host."""
    request = urllib.request.Request(f"{hub.url}/api/repos/create", data=b"{}", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request)
    url = f"{hub.url}/someone/model/resolve/main/model.safetensors"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=3-9"})) as answer:
        assert answer.read() == hub.files("someone/model")["model.safetensors"][3:10]
        assert answer.status == 206 and answer.url.startswith(hub.storage_url)
    assert any(line.startswith("PUT /lfs/") for line in hub.requests)
