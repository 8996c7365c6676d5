"""Stage 3 under each launcher's recipe, with all features in one run, against one process.

Each launcher trains once in full and once an adapter; the tests look at these two folders.
"""

import json
import subprocess
import sys

import pytest
import torch
from launch import environment
from launchers.harness import RECIPES, STEPS, assert_same_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_processes_hold_what_the_launcher_promises(full, recipe):
    ranks = full(recipe).facts()
    assert len(ranks) == 2
    for fact in ranks:
        whole = fact["whole"]
        if recipe in ("ddp", "deepspeed_zero2"):
            assert (fact["local"], fact["placements"]) == (whole, [])
        else:
            assert fact["unsharded"] == 0 and fact["local"] < 0.6 * whole
            assert fact["placements"] == (["Shard"] if recipe == "fsdp2" else [])
        share = 1 if recipe == "ddp" else 0.5
        assert fact["moments"] == pytest.approx(share * whole, rel=0.05)
    if recipe == "ddp":
        return
    assert sum(fact["moments"] for fact in ranks) >= ranks[0]["whole"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_full_run_trains_as_one_process(full, one, recipe):
    """Accumulation, mixture, findings, rates by part, and both validation losses."""
    run = full(recipe)
    losses = one.logged()
    assert len(losses) == STEPS and max(losses) - min(losses) > 0.2
    for name in ("loss", "eval_own_loss", "eval_shuffled_loss", "learning_rate_fusion", "learning_rate_aggregator"):
        assert run.logged(name) == pytest.approx(one.logged(name), abs=1e-4), name
    last = f"checkpoint-{STEPS}/model.safetensors"
    assert_same_weights(run.weights(last), one.weights(last), atol=2e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_best_checkpoint_is_what_is_saved_at_the_end(full, recipe):
    run = full(recipe)
    losses = run.logged("eval_own_loss")
    assert losses[0] == max(losses)
    best, last = (run.weights(f"checkpoint-{step}/model.safetensors") for step in (2, STEPS))
    saved = run.weights()
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert all(torch.equal(saved[name], best[name]) for name in best)


@pytest.mark.parametrize("recipe", ["ddp", "deepspeed_zero2"])
def test_sample_answers_are_those_of_one_process(full, one, recipe):
    for step in (2, STEPS):
        found, wanted = (
            sorted(json.loads(line)["prediction"] for line in text.splitlines())
            for text in (
                (run.folder / f"_samples/step_{step:07d}/predictions.jsonl").read_text(encoding="utf-8")
                for run in (full(recipe), one)
            )
        )
        assert len(found) == 2 and found == wanted


LOADER = """
import sys
import tempfile
sys.modules["samf"] = None  # only the repository's own code
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "SamfForConditionalGeneration", type(model)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        found, wanted = (load_file(name + "/model.safetensors") for name in (again, folder))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], weight) for name, weight in wanted.items())
"""


def test_the_saved_repositories_load_by_their_own_code(full, tmp_path):
    folders = [full(recipe).folder for recipe in RECIPES]
    environ = {**environment(), "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", LOADER, *map(str, folders)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    files = [{file.name for file in folder.iterdir() if file.name != "_samples"} for folder in folders]
    assert {"README.md", "requirements.txt", "config.json", "model.safetensors"} < files[0]
    assert all(found == files[0] for found in files[1:])
