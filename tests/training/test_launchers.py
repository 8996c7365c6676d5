"""Sharding launchers and changed numbers of processes: precision, refusals, resuming."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from launch import environment, logged
from safetensors.torch import load_file
from small_run import history, options_of, prepare, train_here
from tiny import tiny_batch, tiny_model
from transformers import Trainer

from samf import pretrain_encoder, train, warmup_aggregator
from samf.training.launchers import (
    float32_names,
    float32_weights,
    keep_float32_losses,
    refuse_strangers,
    touch_unread_parts,
    whole_count,
)
from samf.training.trainer import SamfTrainer

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("launchers"))


def test_fsdp2_leaves_losses_and_summed_gradients_in_float32():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16  # what accelerate does by itself
    keep_float32_losses(SimpleNamespace(fsdp_plugin=plugin))
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    keep_float32_losses(SimpleNamespace())  # no such launcher


@pytest.mark.parametrize("count", [674, 2049, 65_537])
def test_counts_of_tokens_survive_the_rounding_of_floating_inputs(count):
    given = torch.tensor(count) / 1  # Trainer's division makes it float32
    assert given.to(torch.bfloat16).item() != count
    passed = whole_count(given)
    assert not passed.is_floating_point() and passed.item() == count
    assert whole_count(7) == 7 and whole_count(None) is None


@pytest.mark.parametrize("launcher", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_models_get_the_count_of_tokens_as_an_integer(monkeypatch, launcher):
    seen = []
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, *args, **kwargs: seen.append(kwargs) or torch.zeros(()))
    trainer = SamfTrainer.__new__(SamfTrainer)
    trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
    trainer._findings_in_step = None
    setattr(trainer, launcher, True)
    model = SimpleNamespace(training=True)
    trainer.compute_loss(model, {"pixel_values": None}, num_items_in_batch=torch.tensor(674.0))
    assert seen[0]["num_items_in_batch"].dtype == torch.int64


def test_a_batch_without_a_volume_leaves_a_zero_gradient_in_every_part():
    model = tiny_model(finding_names=["a"])
    batch = tiny_batch("ao2d", rows=2)
    text = {name: batch[name] for name in ("attention_mask", "labels")}
    text["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, 1)
    plain = model(**text).loss
    missing = [name for name, weight in model.named_parameters() if "aggregator" in name and weight.grad is not None]
    assert not missing
    loss = touch_unread_parts(model, plain)
    assert torch.equal(loss, plain)
    loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        if "language_model" not in name and "lm_head" not in name:
            assert not weight.grad.any(), name


def test_weights_are_saved_in_the_precision_that_was_given_to_the_launcher():
    """DeepSpeed casts the model's own weights to bfloat16, and its optimizer keeps float32 copies."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2).bfloat16(), torch.nn.Linear(2, 1))
    model[2].requires_grad_(False)
    names = float32_names(model)
    assert names == {"0.weight", "0.bias"}
    masters = {weight: weight.detach().clone() for weight in model.parameters()}
    model.bfloat16()
    found = float32_weights(model, names, lambda weight: masters[weight])
    assert set(found) == names
    assert torch.equal(found["0.weight"], masters[model[0].weight]) and found["0.weight"].dtype == torch.float32
    assert not torch.equal(model[0].weight.float(), found["0.weight"])  # bfloat16 had lost digits


@pytest.mark.parametrize("script", [pretrain_encoder, warmup_aggregator])
@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_stages_of_few_weights_refuse_shards_before_they_load_anything(monkeypatch, tmp_path, script, kind):
    name = "EncoderArguments" if script is pretrain_encoder else "WarmupArguments"
    training = SimpleNamespace(
        distributed_state=SimpleNamespace(distributed_type=f"DistributedType.{kind}"), deepspeed=None, fsdp=None
    )
    parsed = (getattr(script, name)(slice_encoder="/nowhere") if name == "WarmupArguments" else SimpleNamespace(),)
    parsed += (SimpleNamespace(),) if script is pretrain_encoder else ()
    monkeypatch.setattr(script, "parse_recipe", lambda *_: (*parsed, training))
    with pytest.raises(ValueError, match=rf"this launcher \({kind}\) shards them.*ddp.yaml"):
        script.main([])


@pytest.mark.parametrize("script", [train, pretrain_encoder, warmup_aggregator])
def test_processes_that_take_themselves_for_the_only_one_are_refused(monkeypatch, script):
    """As accelerate starts them from the recipes for GPUs on a machine without one."""
    arguments = {train: 4, pretrain_encoder: 2, warmup_aggregator: 1}[script]
    parsed = (SimpleNamespace(**dict.fromkeys(("lora_rank", "objective"), 0)) for _ in range(arguments))
    monkeypatch.setattr(script, "parse_recipe", lambda *_: (*parsed, SimpleNamespace(world_size=1)))
    monkeypatch.setattr(script, "card_settings", lambda *_: None, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="started 2 processes.*torchrun --nproc_per_node 2"):
        script.main([])


def test_a_process_of_its_own_and_processes_that_see_each_other_are_accepted(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # a cluster names its size, and nobody has launched several
    refuse_strangers(SimpleNamespace(world_size=1))
    monkeypatch.setenv("LOCAL_RANK", "1")
    refuse_strangers(SimpleNamespace(world_size=2))


def test_a_run_resumes_with_as_many_records_a_step_or_says_what_to_set(work):
    options = {"max_steps": 4, "learning_rate": 3e-3, "aggregator_dropout": 0.0, "logging_steps": 1}
    options |= {"save_strategy": "steps", "save_steps": 2}
    train_here(work, "shape", **options)
    unbroken = logged(work / "shape")
    state = work / "shape/checkpoint-2"
    resumed = {**options, "resume_from_checkpoint": state, "per_device_train_batch_size": 2}
    with pytest.raises(ValueError, match=r"4 records per step on 1 processes; this one has 2 .*accumulation_steps 2"):
        train_here(work, "halved", **resumed)
    with pytest.raises(ValueError, match="their product is 4"):
        train_here(work, "odd", **{**resumed, "per_device_train_batch_size": 3})
    train_here(work, "accumulated", **resumed, gradient_accumulation_steps=2)
    assert logged(work / "accumulated") == pytest.approx(unbroken, abs=1e-5)
    train_here(work, "restarted", **resumed, ignore_data_skip=True)
    assert len(logged(work / "restarted")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_sharding_launchers_train_as_plain_processes_do(work, tmp_path, recipe):
    """`accelerate launch` with the recipe as it is, on two CPU processes; with frozen bfloat16 and trained float32 weights."""
    if "deepspeed" in recipe and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    precision = {"dtype": "bfloat16", "trained_dtype": "float32", "bf16": True, "lora_rank": 2}
    options = {**precision, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "lora_dropout": 0.0}
    options |= {"aggregator_dropout": 0.0, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 3}
    settings = options_of(work, "", **options)
    run_launched(None, {**settings, "output_dir": tmp_path / "plain"})
    run_launched(recipe, {**settings, "output_dir": tmp_path / recipe})
    names = ("loss", "eval_own_loss", "eval_shuffled_loss")
    plain, sharded = ([logged(tmp_path / run, name) for name in names] for run in ("plain", recipe))
    assert sum(sharded, []) == pytest.approx(sum(plain, []), rel=2e-3)
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in sum(sharded, []))
    saved = load_file(tmp_path / recipe / "adapter_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in saved.values())


@pytest.mark.slow
def test_zero2_trains_on_batches_without_a_volume(work, tmp_path):
    pytest.importorskip("deepspeed")
    questions = [work / f"phantoms/dataset/vqa/{name}_vqa.json" for name in ("train_text", "train")]
    options = {"max_steps": 6, "logging_steps": 1, "per_device_train_batch_size": 1, "vqa_files": questions}
    settings = options_of(work, "", **options, tasks=["multiple_choice"], output_dir=tmp_path / "out")
    run_launched("deepspeed_zero2", settings)
    assert len(history(tmp_path / "out")) >= 6


def run_launched(recipe: str | None, settings: dict) -> None:
    """Run train.py on two CPU processes, under torchrun or under `accelerate launch` with one of our recipes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(REPOSITORY / "train.py")]
    if recipe is not None:
        settings = {key: value for key, value in settings.items() if key != "use_cpu"}
        precision = "bf16" if settings.get("bf16") else "no"
        launcher = ["-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
        launcher += [
            f"--config_file={REPOSITORY / 'recipes/accelerate' / recipe}.yaml",
            f"--mixed_precision={precision}",
        ]
        launcher += [str(REPOSITORY / "tests/cpu_shards.py"), str(REPOSITORY / "train.py")]
    flags = [
        part
        for key, value in settings.items()
        for part in ([f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"])
    ]
    backends = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"} if recipe else {}
    done = subprocess.run(
        [sys.executable, *launcher, *flags],
        env={**environment(), **backends},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
