"""Saved folders load where this package isn't: in a fresh process with `samf` blocked from import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from peft import __version__ as peft_version
from safetensors.torch import load_file
from tiny import FUSION_TYPES, model_for, tiny_batch, tiny_processor
from transformers import Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from samf import SamfForConditionalGeneration
from samf.train import SamfTrainer

CHAT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
GREEDY = {"max_new_tokens": 6, "do_sample": False}
LORA = {
    "r": 4,
    "target_modules": r".*language_model.*\.(qkv_proj|o_proj|gate_up_proj|down_proj)",
    "modules_to_save": ["aggregator", "fusion"],
}
# A script, not `python -c`: a spawned worker imports it anew, and is blocked like its parent.
SCRIPT = """
import json, multiprocessing, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "samf" or name.startswith("samf."):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())

def used_by_worker(processor, scan):
    from datasets.fingerprint import Hasher

    pixels = processor.image_processor(scan)["pixel_values"].sum().item()
    return type(processor).__module__, pixels, Hasher.hash(processor)

def load(folder, scan):
    import torch
    from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM,
                              AutoModelForImageTextToText, AutoProcessor)

    autos = [AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM, AutoProcessor, AutoImageProcessor]
    from datasets.fingerprint import Hasher

    loaded = {auto.__name__: auto.from_pretrained(folder, trust_remote_code=True) for auto in autos}
    model, processor = loaded["AutoModelForImageTextToText"], loaded["AutoProcessor"]
    content = [{"type": "volume", "path": scan}, {"type": "text", "text": "Which finding is present?"}]
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    unused = Hasher.hash(processor)
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    with torch.no_grad():
        states = [m.get_image_features(inputs["pixel_values"]).pooler_output for m in (loaded["AutoModel"], model.model)]
    return processor, {
        "classes": {name: [type(item).__module__, type(item).__name__] for name, item in loaded.items()},
        "tokens": [m.generate(**inputs, max_new_tokens=6, do_sample=False).tolist() for m in (model, loaded["AutoModel"])],
        "features_are_equal": torch.equal(*states),
        "hashes": [unused, Hasher.hash(processor), Hasher.hash(AutoProcessor.from_pretrained(folder, trust_remote_code=True))],
        "report": reported(folder, scan),
        "image_processor": loaded["AutoImageProcessor"].to_dict() == processor.image_processor.to_dict(),
    }

def reported(folder, scan):
    from transformers import pipeline

    report = pipeline(model=folder, trust_remote_code=True)(scan, max_new_tokens=6, do_sample=False)
    return [type(report).__module__, report.text, report.provenance.source]

if __name__ == "__main__":
    scan, *folders = sys.argv[1:]
    results = {}
    for folder in folders:
        processor, results[folder] = load(folder, scan)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        worker = pool.apply(used_by_worker, (processor, scan))
    print(json.dumps({"folders": results, "worker": worker, "here": used_by_worker(processor, scan)}))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("remote.code")
    voxels = np.random.default_rng(0).integers(-1000, 400, (12, 14, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / "scan.nii.gz")
    return folder


def train_one_step(trainer: type[Trainer], model, processor, folder: Path) -> Path:
    """The folder of a checkpoint that Trainer writes after one step."""
    rows = tiny_batch("ao2d", rows=2)
    rows["input_ids"][:, :4] = processor.image_token_id
    rows["input_ids"][:, 4:] %= processor.image_token_id  # other tokens only
    data = [{key: value[row] for key, value in rows.items()} for row in range(2)]
    arguments = {"max_steps": 1, "save_steps": 1, "learning_rate": 0.0, "report_to": "none", "use_cpu": True}
    args = TrainingArguments(folder, per_device_train_batch_size=2, disable_tqdm=True, **arguments)
    trainer(model=model, args=args, train_dataset=data, processing_class=processor).train()
    return folder / "checkpoint-1"


def moved(model):
    """A model whose every trained weight differs from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def saved(work) -> dict[str, tuple[Path, torch.Tensor]]:
    """Name → a saved folder and the tokens that its model generates here."""
    found = {}

    def keep(name: str, folder: Path, model, processor) -> None:
        content = [{"type": "volume", "path": str(work / "scan.nii.gz")}]
        content.append({"type": "text", "text": "Which finding is present?"})
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **CHAT)
        found[name] = folder, model.eval().generate(**inputs, **GREEDY)

    for fusion_type in FUSION_TYPES:
        processor = tiny_processor(None if fusion_type == "slice_tokens" else 4)
        model, folder = model_for(processor, fusion_type=fusion_type), work / f"{fusion_type}.v1"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        keep(fusion_type, folder, model, processor)

    processor, base = tiny_processor(), work / "ao2d.v1"
    model = SamfForConditionalGeneration.from_pretrained(base)
    keep("checkpoint", train_one_step(Trainer, model, processor, work / "trained"), model, processor)

    wrapped = moved(get_peft_model(SamfForConditionalGeneration.from_pretrained(base), LoraConfig(**LORA)))
    wrapped.get_base_model().save_pretrained(work / "adapter")
    processor.save_pretrained(work / "adapter")
    keep("adapter", work / "adapter", wrapped, processor)
    keep("wrapped", train_one_step(SamfTrainer, wrapped, processor, work / "wrapped"), wrapped, processor)
    if Version(peft_version) >= Version(MIN_PEFT_VERSION):
        model = SamfForConditionalGeneration.from_pretrained(base)
        model.add_adapter(LoraConfig(**LORA))
        moved(model).save_pretrained(work / "added")
        processor.save_pretrained(work / "added")
        keep("added", work / "added", model, processor)
    return found


@pytest.fixture(scope="module")
def loaded(work, saved) -> dict:
    """What a fresh process without this package finds in the saved folders, and in its spawned worker."""
    (work / "script.py").write_text(SCRIPT, encoding="utf-8")
    folders = [str(folder) for folder, _ in saved.values()]
    environment = {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(work / "script.py"), str(work / "scan.nii.gz"), *folders],
        capture_output=True,
        encoding="utf-8",
        cwd=work,
        env={"PATH": os.environ["PATH"], **environment},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {**json.loads(run.stdout.splitlines()[-1]), "stderr": run.stderr}


@pytest.mark.parametrize("name", [*FUSION_TYPES, "checkpoint", "adapter", "wrapped", "added"])
def test_every_auto_class_loads_a_saved_folder(name, saved, loaded):
    if name not in saved:
        pytest.skip(f"transformers asks for peft >= {MIN_PEFT_VERSION}, found {peft_version}: no model.add_adapter")
    folder, tokens = saved[name]
    result = loaded["folders"][str(folder)]
    whole = "SamfForConditionalGeneration"
    assert {auto: class_name for auto, (_, class_name) in result["classes"].items()} == {
        "AutoConfig": "SamfConfig",
        "AutoModel": whole,
        "AutoModelForImageTextToText": whole,
        "AutoModelForCausalLM": whole,
        "AutoProcessor": "SamfProcessor",
        "AutoImageProcessor": "SamfImageProcessor",
    }
    assert all(module.startswith("transformers_modules.") for module, _ in result["classes"].values())
    assert result["tokens"] == [tokens.tolist()] * 2
    assert result["features_are_equal"] and result["image_processor"]
    module, text, source = result["report"]  # by `pipeline(model=folder, trust_remote_code=True)`
    assert module.startswith("transformers_modules.") and module.endswith("report_samf")
    assert isinstance(text, str) and source.endswith("scan.nii.gz")


def test_the_file_of_a_checkpoint_fills_a_model(saved):
    """Trainer resumes, and fetches its best model, by load_state_dict; the file names ViT's weights otherwise."""
    weights = load_file(saved["checkpoint"][0] / "model.safetensors")
    model = model_for(tiny_processor(), seed=1)
    assert not set(weights) <= set(model.state_dict())
    model.load_state_dict(weights)
    whole = SamfForConditionalGeneration.from_pretrained(saved["checkpoint"][0]).state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_changes_what_its_base_model_writes(saved):
    """Or the tests above would hold for adapters that weren't loaded."""
    assert saved["adapter"][1].tolist() != saved["ao2d"][1].tolist()


def test_a_spawned_worker_gets_the_processor(loaded):
    assert loaded["worker"][0].startswith("transformers_modules.")
    assert loaded["worker"] == loaded["here"]


def test_datasets_gives_the_processor_one_hash(loaded):
    """Unused and used, loaded twice, and in another process: else `map` would never find its cache."""
    results = list(loaded["folders"].values())
    assert all(len(set(result["hashes"])) == 1 for result in results)
    assert loaded["worker"][2] == results[-1]["hashes"][0]
    by_slices = {results[index]["hashes"][0] for index in (0, FUSION_TYPES.index("slice_tokens"))}
    assert len(by_slices) == 2  # another setting, another hash


def test_loading_says_nothing_of_missing_backends(loaded):
    assert "backend is not available" not in loaded["stderr"]


def test_cards_and_configurations_name_no_folder_of_this_machine(work, saved):
    """adapter_config.json alone must: it is how an adapter finds its base model."""
    for folder, _ in saved.values():
        for file in folder.iterdir():
            if file.suffix in (".md", ".json", ".jinja") and file.name != "adapter_config.json":
                assert str(work) not in file.read_text(encoding="utf-8"), file
