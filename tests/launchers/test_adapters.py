"""An adapter in bfloat16 under each launcher's recipe: float32 losses and saved weights, merging, batches of text only."""

from functools import cache

import pytest
import torch
from launch import run_script
from launchers.harness import RECIPES, Run, accelerate, need, succeed
from small_run import options_of

from samf import SamfForConditionalGeneration
from samf.training.adapter import merge_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LORA = {
    "dtype": "bfloat16",
    "trained_dtype": "float32",
    "bf16": True,
    "lora_rank": 2,
    "lora_dropout": 0.0,
    "aggregator_dropout": 0.0,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
}


@pytest.fixture(scope="module")
def plain(work) -> Run:
    """Two processes of torchrun."""
    run_script("train.py", 2, options_of(work, "", **LORA, output_dir=work / "lora_plain"))
    return Run(work / "lora_plain")


@pytest.fixture(scope="module")
def adapted(work):
    """Return a function that trains, once, an adapter under a recipe."""

    @cache
    def run(recipe: str) -> Run:
        need(recipe)
        options = options_of(work, "", **LORA, merge=recipe != "deepspeed_zero3", output_dir=work / f"lora_{recipe}")
        del options["use_cpu"]
        succeed(accelerate(recipe, bf16=True), "train.py", options)
        return Run(work / f"lora_{recipe}")

    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_adapter_trains_as_under_torchrun(adapted, plain, recipe):
    names = ("loss", "eval_own_loss", "eval_shuffled_loss")
    wanted, found = (sum((run.logged(name) for name in names), []) for run in (plain, adapted(recipe)))
    assert found == pytest.approx(wanted, rel=2e-3)
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in found)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_adapter_is_saved_in_the_precision_it_is_trained_in(adapted, recipe):
    saved = adapted(recipe).weights("adapter_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in saved.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_adapter_is_merged_during_the_run_or_after_it(adapted, recipe, tmp_path):
    folder = adapted(recipe).folder
    merge_adapter(folder, tmp_path / "merged")
    wanted = SamfForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    base = SamfForConditionalGeneration.from_pretrained(folder / "base").state_dict()
    assert any(not torch.equal(base[name], wanted[name]) for name in wanted)
    if recipe != "deepspeed_zero3":
        found = SamfForConditionalGeneration.from_pretrained(folder / "merged").state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_zero2_trains_on_batches_without_a_volume(work, tmp_path):
    need("deepspeed_zero2")
    questions = [work / f"phantoms/dataset/vqa/{name}_vqa.json" for name in ("train_text", "train")]
    options = {"max_steps": 6, "logging_steps": 1, "per_device_train_batch_size": 1, "vqa_files": questions}
    settings = options_of(work, "", **options, tasks=["multiple_choice"], output_dir=tmp_path / "out")
    del settings["use_cpu"]
    succeed(accelerate("deepspeed_zero2"), "train.py", settings)
    assert len(Run(tmp_path / "out").logged()) == 6
