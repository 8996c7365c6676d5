"""What each launcher refuses, in its words: under the real launcher, one start for all cases of a recipe."""

import json
import shutil

import pytest
from launch import REPOSITORY, flags
from launchers.harness import RECIPES, Run, accelerate, full_options, launch, need, without_cpu

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def refusals(launcher: list[str], folder, cases: dict[str, list[str]]) -> dict[str, str]:
    """Return what scripts say under a launcher, by name of the case."""
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    arguments = [str(folder / "said.json"), str(folder / "cases.json")]
    done = launch([*launcher, str(REPOSITORY / "tests/launchers/refusals.py"), *arguments])
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "said.json").read_text(encoding="utf-8"))


def expected_refusals(recipe: str) -> dict[str, str]:
    """Return a part of the message of each case that a recipe refuses."""
    kind = {"fsdp2": "FSDP", "deepspeed_zero2": "ZeRO-2", "deepspeed_zero3": "ZeRO-3"}.get(recipe)
    written = f"under {kind}" if kind else "without shards"
    wanted = {"another launcher": f"this run trains {written}"}
    if recipe != "ddp":
        wanted |= dict.fromkeys(("stage 1", "stage 2"), f"this launcher ({kind}) shards them")
    if recipe in ("fsdp2", "deepspeed_zero3"):
        wanted |= {"samples": "generate_samples needs whole weights", "text only": "Some records have no volume"}
    if recipe == "deepspeed_zero3":
        wanted["merge"] = "python -m samf.training.adapter"
    return wanted


@pytest.mark.parametrize("recipe", RECIPES)
def test_refusals_name_the_reason_and_the_remedy(work, one, tmp_path, recipe):
    need(recipe)
    wanted = expected_refusals(recipe)
    base = without_cpu(full_options(work, tmp_path / "out", 2))
    text_only = {"tasks": ["multiple_choice"], "mixture": ["multiple_choice=1"]}
    text_only["vqa_files"] = [work / "phantoms/dataset/vqa/train_text_vqa.json"]
    stage = {"output_dir": tmp_path / "out", "data": work / "phantoms", "report_to": "none"}
    other = one.folder / "checkpoint-2" if recipe != "ddp" else make_foreign(one, tmp_path)
    cases = {
        "stage 1": ["pretrain_encoder", *flags(stage)],
        "stage 2": ["warmup_aggregator", *flags({**stage, "slice_encoder": work / "encoder"})],
        "samples": ["train", *flags({**base, "generate_samples": 1})],
        "merge": ["train", *flags({**base, "lora_rank": 2, "merge": True})],
        "text only": [
            "train",
            *flags({**base, **text_only}),
        ],
        "another launcher": ["train", *flags({**base, "resume_from_checkpoint": other})],
    }
    said = refusals(accelerate(recipe), tmp_path, {name: cases[name] for name in wanted})
    for name, words in wanted.items():
        assert words in said[name] and "\n" not in said[name], f"{name}: {said[name]}"
    assert not (tmp_path / "out/model.safetensors").exists()


def make_foreign(run: Run, folder):
    """Return a copy of a checkpoint without weights that looks as if FSDP had written it."""
    copied = shutil.copytree(run.folder / "checkpoint-2", folder / "checkpoint-2")
    (copied / "optimizer.pt").rename(copied / "optimizer.bin")
    return copied
