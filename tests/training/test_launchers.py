"""Sharding launchers and changed numbers of processes: precision, refusals, resuming."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from launch import logged
from small_run import prepare, train_here
from tiny import tiny_batch, tiny_model
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import Trainer

from samf import SamfForConditionalGeneration, pretrain_encoder, warmup_aggregator
from samf.training.checkpoint_kind import kind_mismatch
from samf.training.launchers import (
    check_launcher,
    float32_names,
    float32_weights,
    keep_float32_losses,
    sharding,
    touch_unread_parts,
    whole_count,
)
from samf.training.trainer import SamfTrainer


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


def test_a_sharded_model_is_saved_under_its_own_class_and_with_its_own_code(tmp_path):
    """`fully_shard` makes a class of its own, in a module of torch's."""
    model = tiny_model()
    kinds = (FSDPModule, SamfForConditionalGeneration)
    model.__class__ = type("FSDPSamf", kinds, {"__module__": fully_shard.__module__})
    model.save_pretrained(tmp_path)
    assert type(model).__name__ == "FSDPSamf"
    auto_map = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"]
    for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"):
        assert auto_map[name] == "modeling_samf.SamfForConditionalGeneration", name
    assert (tmp_path / "modeling_samf.py").is_file() and not list(tmp_path.glob("_fsdp*"))


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
@pytest.mark.parametrize("kind", ["ZeRO-2", "FSDP"])
def test_stages_of_few_weights_refuse_shards_before_they_load_anything(monkeypatch, tmp_path, script, kind):
    name = "EncoderArguments" if script is pretrain_encoder else "WarmupArguments"
    training = run_under(
        monkeypatch, "MULTI_GPU", processes=2, fsdp=kind == "FSDP", zero=2 if kind == "ZeRO-2" else None
    )
    parsed = (getattr(script, name)(slice_encoder="/nowhere") if name == "WarmupArguments" else SimpleNamespace(),)
    parsed += (SimpleNamespace(),) if script is pretrain_encoder else ()
    monkeypatch.setattr(script, "parse_recipe", lambda *_: (*parsed, training))
    with pytest.raises(ValueError, match=rf"this launcher \({kind}\) shards them.*ddp.yaml"):
        script.main([])


def run_under(monkeypatch, kind: str, *, processes: int = 1, fsdp: bool = False, zero: int | None = None):
    """Return arguments as they are before a Trainer exists, when only the environment tells of FSDP."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(fsdp).lower())
    return SimpleNamespace(
        distributed_state=SimpleNamespace(distributed_type=f"DistributedType.{kind}"),
        deepspeed_plugin=None if zero is None else SimpleNamespace(zero_stage=zero),
        fsdp=None,
        device="cpu",
        world_size=1 if kind == "NO" else processes,
    )


def test_what_the_launcher_shards_is_known_before_a_trainer_exists(monkeypatch):
    for kind, fsdp, zero, expected in (
        ("MULTI_GPU", True, None, "FSDP"),
        ("MULTI_GPU", False, 3, "ZeRO-3"),
        ("MULTI_GPU", False, None, None),
        ("NO", False, None, None),
    ):
        training = run_under(monkeypatch, kind, processes=1 if kind == "NO" else 2, fsdp=fsdp, zero=zero)
        assert sharding(training) == expected
        check_launcher(training)


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU"])
def test_fsdp_that_accelerate_would_leave_out_is_refused(monkeypatch, kind):
    with pytest.raises(ValueError, match=r"asks for FSDP.*found 2 on cpu, where accelerate would train without shards"):
        check_launcher(run_under(monkeypatch, kind, processes=2, fsdp=True))


def test_processes_that_are_not_connected_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"started 2 processes.*doesn't connect them.*--use_cpu true"):
        check_launcher(run_under(monkeypatch, "NO", processes=2))


def test_a_process_of_its_own_in_a_cluster_that_names_its_size_is_accepted(monkeypatch):
    training = run_under(monkeypatch, "NO", processes=2)
    monkeypatch.delenv("LOCAL_RANK")
    check_launcher(training)


@pytest.mark.parametrize("name", ["tp", "cp", "sp"])
def test_meshes_of_other_dimensions_are_refused(monkeypatch, name):
    training = run_under(monkeypatch, "MULTI_GPU", processes=2)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    check_launcher(training)
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "2")
    with pytest.raises(ValueError, match=rf"asks for {name}_size 2: .*fsdp2.yaml"):
        check_launcher(training)


@pytest.mark.parametrize(
    ("files", "now", "processes", "message"),
    [
        (["optimizer.pt"], None, 4, None),
        (["optimizer.bin"], "FSDP", 4, None),
        (["optimizer_0/.metadata"], None, 2, "written under FSDP, and this run trains without shards"),
        (["optimizer.pt"], "ZeRO-2", 2, "written without shards, and this run trains under ZeRO-2"),
        (["global_step2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "FSDP", 2, "written under ZeRO-2"),
        (["global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt"], "ZeRO-2", 2, "written under ZeRO-3"),
        ([f"global_step2/zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in (0, 1)], "ZeRO-2", 2, None),
        ([f"global_step2/zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in (0, 1)], "ZeRO-2", 4, "of 2 processes"),
    ],
)
def test_a_checkpoint_of_another_launcher_is_told_from_its_files(monkeypatch, tmp_path, files, now, processes, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    zero = int(now[-1]) if now and now.startswith("ZeRO") else None
    training = run_under(monkeypatch, "MULTI_GPU", processes=processes, fsdp=now == "FSDP", zero=zero)
    found = kind_mismatch(tmp_path, training)
    assert found is None if message is None else message in found


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
