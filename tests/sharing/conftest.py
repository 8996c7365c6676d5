"""Tiny models in all forms that are shared, and a run's records, in folders; and a stand-in of the Hub."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_stand_in import HubStandIn
from huggingface_hub import constants
from huggingface_hub.utils import _http
from peft import LoraConfig, get_peft_model
from tiny import model_for, tiny_processor

from samf import SamfForConditionalGeneration, SamfQuantizationConfig
from samf.evaluation.scoring import score_predictions, write_results
from samf.scripts import push_model
from samf.training.adapter import merge_adapter

TARGETS = r".*language_model.*\.(qkv_proj|o_proj|gate_up_proj|down_proj)"
PATIENT = "patient_0815"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    with HubStandIn() as server:
        yield server


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def corrupt(hub, monkeypatch):
    """Return a function that changes what the Hub has of a file after each upload: change(files of the commit, path)."""

    def after_upload(path, change) -> None:
        real = push_model.upload

        def upload(*arguments):
            pushed = real(*arguments)
            change(hub.repositories[pushed.repo_id].commits[pushed.revision], path)
            return pushed

        monkeypatch.setattr(push_model, "upload", upload)

    return after_upload


_STAGED: dict[object, tuple[Path, object]] = {}


@pytest.fixture(autouse=True)
def staged_once(monkeypatch, tmp_path_factory):
    """Stage the same files for the same repository only once, since each of the pushes would take a second for it."""
    stage = push_model.stage_model

    def stage_once(saved, target, base, *, with_handler):
        state = tuple((path.name, path.stat().st_mtime_ns) for path in sorted(saved.folder.iterdir()))
        key = (saved.folder, state, base, with_handler)
        if key not in _STAGED:
            folder = tmp_path_factory.mktemp("staged") / "whole"
            folder.mkdir()
            _STAGED[key] = folder, stage(saved, folder, base, with_handler=with_handler)
        shutil.copytree(_STAGED[key][0], target, symlinks=True, dirs_exist_ok=True)
        return _STAGED[key][1]

    monkeypatch.setattr(push_model, "stage_model", stage_once)


@pytest.fixture(scope="session")
def model(run) -> Path:
    """The run's model without its records."""
    folder = run.parent / "model"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("eval", "*_state.json", "_run.json", "*.bin"))
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run's folder: a whole model in shards, what its training logged, and its evaluation."""
    folder = tmp_path_factory.mktemp("work") / "whole"
    processor = tiny_processor()
    model_for(processor).save_pretrained(folder, max_shard_size="150KB")
    processor.save_pretrained(folder)
    log = [{"step": step, "loss": 6.0 - step, "epoch": step / 9} for step in range(1, 5)]
    log.append({"step": 4, "eval_own_loss": 2.5, "eval_shuffled_loss": 2.75})
    callbacks = {"RunShape": {"args": {"records_per_step": 8, "processes": 2}, "attributes": {}}}
    state = {"global_step": 4, "epoch": 4 / 9, "log_history": log, "stateful_callbacks": callbacks}
    state["best_model_checkpoint"] = str(folder / "checkpoint-4")
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "training_args.bin").write_bytes(b"a pickle")
    record = {"recipes": ["ct_rate_ao2d"], "data": "CT-RATE", "learning_rate": 5e-5, "versions": {"samf": "0.1.0"}}
    (folder / "_run.json").write_text(json.dumps(record))
    evaluate(folder)
    return folder


def evaluate(folder: Path) -> None:
    """Write the results of three answers into a run's folder."""
    rows = []
    for number, (reference, prediction) in enumerate(
        [
            ("There is emphysema.", "There is emphysema."),
            ("A lung nodule.", "There is emphysema."),
            ("Clear.", "Clear."),
        ]
    ):
        row = {"id": f"report_{number}_1", "scan_id": f"scan_{number}_a", "patient_id": f"{PATIENT}_{number}"}
        row |= {"task": "report", "question": "Write the report.", "choices": None}
        rows.append({**row, "reference": reference, "prediction": prediction})
    (folder / "eval").mkdir(exist_ok=True)
    path = folder / "eval" / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = score_predictions(path, resamples=0)
    results["model"] = {"model": str(folder), "data": "/data/CT-RATE", "split": "valid", "shuffle_volumes": False}
    write_results(results, folder / "eval" / "results.json")


@pytest.fixture(scope="session")
def adapter(run) -> Path:
    """An adapter's folder, trained on `run`'s, with the merged model and its int4 form in it."""
    folder = run.parent / "lora"
    lora = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["fusion"])
    model = get_peft_model(SamfForConditionalGeneration.from_pretrained(run), lora)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.get_base_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    merge_adapter(folder, folder / "merged")
    small = SamfForConditionalGeneration.from_pretrained(
        folder / "merged", quantization_config=SamfQuantizationConfig()
    )
    small.save_pretrained(folder / "int4")
    tiny_processor().save_pretrained(folder / "int4")
    return folder
