"""The library's other ways to split a model: tensor parallelism works for loading and answering; the rest is refused."""

import json

import pytest
import torch
from launch import REPOSITORY
from launchers.harness import accelerate, full_options, launch, start, torchrun, without_cpu

from samf import SamfForConditionalGeneration

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_language_model_split_by_the_librarys_plan_is_the_whole_one(tmp_path):
    done = launch([*torchrun(2), str(REPOSITORY / "tests/launchers/tensor_parallel.py"), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    for found in ranks:
        assert found["split"] >= 9 and found["share"] == pytest.approx(0.5)
        assert found["logits"] < 1e-4 and found["gradients"] < 1e-4
        assert found["losses"][0] == pytest.approx(found["losses"][1], abs=1e-5)
        assert found["tokens"][0] == found["tokens"][1]
    saved, wanted = (SamfForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("saved", "whole"))
    assert all(torch.equal(saved.state_dict()[name], weight) for name, weight in wanted.state_dict().items())


def test_training_with_context_parallelism_is_refused(work, tmp_path):
    """Without the refusal it fails in the fusion, whose prompts' masks cover more tokens than a process has."""
    mesh = ("--use_fsdp", "--fsdp_version=2", "--use_parallelism_config", "--parallelism_config_cp_size=2")
    options = without_cpu(full_options(work, tmp_path / "out", 2))
    done = start(accelerate("fsdp2", more=mesh), "train.py", options)
    assert done.returncode != 0 and "ValueError: The launcher asks for cp_size 2: the fusion reads each" in done.stderr


@pytest.mark.parametrize(("recipe", "words"), [("fsdp2", "asks for FSDP"), ("ddp", "doesn't connect them")])
def test_what_accelerate_would_leave_out_without_a_gpu_is_refused(work, tmp_path, monkeypatch, recipe, words):
    """The recipes as they are on a machine without a GPU, without the shim of these tests."""
    if torch.cuda.is_available():
        pytest.skip("accelerate would use the GPU")
    options = without_cpu(full_options(work, tmp_path / "out", 2))
    done = start(accelerate(recipe)[:-1], "train.py", options)
    assert done.returncode != 0 and words in done.stderr, done.stderr[-3000:]
