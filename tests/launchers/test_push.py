"""Runs that push to a stand-in of the Hub: what a stranger's process, without this package, then loads by its id."""

import json
import subprocess
import sys

import pytest
from hub_stand_in import USER, HubStandIn
from launch import environment
from launchers.harness import RECIPES, accelerate, need, succeed
from small_run import options_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STRANGER = """
import sys
import tempfile
sys.modules["samf"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
with tempfile.TemporaryDirectory() as again:
    model.save_pretrained(again)
    found, wanted = load_file(again + "/model.safetensors"), load_file(sys.argv[2])
assert found.keys() == wanted.keys() and all(torch.equal(found[name], weight) for name, weight in wanted.items())
"""


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_pushes_what_strangers_load(work, tmp_path, recipe):
    need(recipe)
    name = f"{USER}/{recipe}"
    options = options_of(work, "", max_steps=1, push_to_hub=True, hub_model_id=name, output_dir=tmp_path / "out")
    del options["use_cpu"]
    with HubStandIn() as hub:
        succeed(accelerate(recipe), "train.py", options, **hub.environment(tmp_path / "trainer"))
        files = hub.files(name)
        weights = tmp_path / "out/model.safetensors"
        environ = {**environment(), **hub.environment(tmp_path / "stranger")}
        command = [sys.executable, "-c", STRANGER, name, str(weights)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert files["model.safetensors"] == weights.read_bytes()
    assert json.loads(files["config.json"])["auto_map"]["AutoModel"] == "modeling_samf.SamfForConditionalGeneration"
    assert not [file for file in files if file.startswith(("_fsdp", "global_step"))]
