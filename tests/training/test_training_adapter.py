"""LoRA by train.py: contents of an adapter's folder, loading, merging, resuming."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_run import history, options_of, prepare, run, train_here
from tiny import tiny_batch, tiny_config, tiny_model
from transformers import AutoModelForImageTextToText
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

from samf import SamfConfig, SamfForConditionalGeneration, SamfProcessor, train
from samf.data.collator import SamfCollator
from samf.data.loading import load_records
from samf.model.adapters_samf import adapter_base
from samf.training import launchers
from samf.training.adapter import add_lora, cast_trained, language_model_layers
from samf.training.arguments import TuningArguments
from samf.training.param_groups import PARTS, part_of
from samf.training.repository import check_whole

LORA = {"lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.1, "max_steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def batch(work) -> dict[str, torch.Tensor]:
    """Return a batch of two validation records as in training."""
    records = load_records(work / "phantoms", "valid", tasks=("report", "multiple_choice"))
    processor = SamfProcessor.from_pretrained(work / "trained")
    return SamfCollator(processor)([records[0], records[len(records) - 1]])


@pytest.fixture(scope="module")
def trained(work) -> Path:
    """Train an adapter and all other parts in full, and merge it."""
    train_here(work, "trained", **LORA, lora_embeddings=True, merge=True, finding_names=["Cardiomegaly"])
    return work / "trained"


def by_peft(folder: Path) -> PeftModel:
    base = SamfForConditionalGeneration.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, folder).eval()


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    model.eval()
    return model(**{name: value for name, value in batch.items() if name != "finding_targets"}).logits


def test_folder_and_merged_folder_give_equal_logits(trained, batch):
    adapted, merged = by_peft(trained), SamfForConditionalGeneration.from_pretrained(trained / "merged")
    expected = logits(adapted, batch)
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=1e-5)
    base = SamfForConditionalGeneration.from_pretrained(trained / "base")
    assert (logits(base, batch) - expected).abs().max() > 1e-2  # training has moved it
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, batch), logits(base, batch))
    assert SamfProcessor.from_pretrained(trained / "merged").image_token_id == merged.config.image_token_id
    texts = [file.read_text(encoding="utf-8") for file in (trained / "merged").glob("*.json")]
    assert not any(str(trained) in text for text in texts)


def test_a_folder_that_was_moved_has_its_base_model_within(trained, batch, tmp_path):
    """The adapter's configuration has the path on the machine, or in the folder, where it was trained."""
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved, ignore=shutil.ignore_patterns("merged"))
    config = json.loads((moved / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(trained / "base")
    config["base_model_name_or_path"] = "/another/machine/lora/base"
    (moved / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    expected = logits(SamfForConditionalGeneration.from_pretrained(trained), batch)
    for load in (SamfForConditionalGeneration, AutoModelForImageTextToText):
        assert torch.equal(logits(load.from_pretrained(moved), batch), expected)
    train.merge_adapter(moved, tmp_path / "merged")
    checkpoint = moved / "checkpoint-2"
    checkpoint.mkdir()
    for file in moved.glob("*.*"):
        shutil.copyfile(file, checkpoint / file.name)
    assert adapter_base(checkpoint) == str(moved / "base")
    shutil.rmtree(moved / "base")
    with pytest.raises(
        FileNotFoundError, match="/another/machine/lora/base, which isn't there.*moved/base. Put the base"
    ):
        SamfForConditionalGeneration.from_pretrained(moved)


def test_every_part_that_is_trained_is_in_the_folder(trained):
    weights = load_file(trained / "adapter_model.safetensors")
    assert {part_of(name) for name in weights} == set(PARTS)
    language = {name for name in weights if part_of(name) == "language_model"}
    full = {name for name in language if "lora_" not in name}
    assert {name.rsplit(".", 2)[1] for name in full} == {"embed_tokens", "lm_head"}
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in language - full}
    assert layers == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    changed = by_peft(trained).state_dict()
    base = SamfForConditionalGeneration.from_pretrained(trained / "base").state_dict()
    for name in ("model.fusion.mix.weight", "model.slice_encoder.embeddings.cls_token", "lm_head.weight"):
        module, _, weight = name.rpartition(".")
        kept = next(key for key in changed if "modules_to_save" in key and key.endswith(weight) and _same(key, name))
        assert not torch.equal(changed[kept], base[name]), name
    frozen = "model.language_model.layers.0.mlp.down_proj.weight"
    assert torch.equal(changed[f"base_model.model.{frozen.replace('.weight', '.base_layer.weight')}"], base[frozen])


def _same(key: str, name: str) -> bool:
    return key.replace("base_model.model.", "", 1).replace("modules_to_save.default.", "") == name


def test_an_adapter_alone_is_small(tmp_path):
    """Measured on disk for a model that is mostly language model, and by count for the default at full size."""
    config = tiny_config(text={"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8})
    model = SamfForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    tuning = TuningArguments(lora_rank=8)
    add_lora(model, tuning, ["language_model"], tmp_path / "base").save_pretrained(tmp_path / "adapter")
    size = {name: sum(file.stat().st_size for file in (tmp_path / name).iterdir()) for name in ("base", "adapter")}
    assert size["adapter"] < size["base"] / 20

    with torch.device("meta"):
        full = SamfForConditionalGeneration(SamfConfig())
    whole = sum(parameter.numel() for parameter in full.parameters())
    adapted = add_lora(full, TuningArguments(lora_rank=16), ["language_model"], "base")
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained == 32 * 16 * (3072 + 9216 + 3072 + 3072 + 3072 + 16384 + 8192 + 3072)
    assert 4 * trained < 2 * whole / 20  # in float32, beside a model in bfloat16


def test_load_adapter_gives_the_same_model(trained, batch):
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers' load_adapter: {error} (peft {peft.__version__} is installed)")
    model = SamfForConditionalGeneration.from_pretrained(trained / "base")
    model.load_adapter(str(trained))
    assert torch.equal(logits(model, batch), logits(by_peft(trained), batch))


def test_tied_embeddings_stay_tied(work, batch):
    train_here(work, "tied", text_model=work / "tied_text", **LORA, lora_embeddings=True, merge=True)
    model = by_peft(work / "tied")
    base = model.get_base_model()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    merged = SamfForConditionalGeneration.from_pretrained(work / "tied" / "merged")
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), rtol=0, atol=1e-5)


def test_an_adapter_on_a_saved_model_names_it_and_dora_merges(work, batch):
    run(work, "whole", max_steps=1)
    parts = ["language_model", "fusion"]
    options = {**LORA, "use_dora": True, "merge": True, "train_parts": parts, "learning_rates": {"fusion": 0.1}}
    train_here(work, "dora", model=work / "whole", **options)
    assert not (work / "dora" / "base").exists()
    base = SamfForConditionalGeneration.from_pretrained(work / "whole")
    model = PeftModel.from_pretrained(base, work / "dora")
    assert model.peft_config["default"].base_model_name_or_path == str(work / "whole")
    merged = SamfForConditionalGeneration.from_pretrained(work / "dora" / "merged")
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), rtol=0, atol=1e-5)


def test_an_adapter_resumes_where_it_was(work):
    options = {**LORA, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    train_here(work, "unbroken", **options)
    expected = load_file(work / "unbroken" / "adapter_model.safetensors")
    state = work / "broken"
    train_here(work, "broken", **options)
    for file in (state / "adapter_model.safetensors", state / "trainer_state.json"):
        file.unlink()
    train_here(work, "broken", **options, resume_from_checkpoint=state / "checkpoint-2")
    found = load_file(state / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_trained_weights_may_have_another_precision():
    model = SamfForConditionalGeneration(tiny_config()).to(torch.bfloat16)
    model = add_lora(model, TuningArguments(lora_rank=2), ["language_model", "fusion"], "base")
    cast_trained(model, "float32")
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_frozen_encoder_is_not_differentiated_for_peft():
    """With checkpointing, peft asks for gradients of input embeddings; the slice encoder's patches aren't meant."""
    model = tiny_model()
    model.gradient_checkpointing_enable()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=language_model_layers(model))).train()
    pixels = tiny_batch("samf")["pixel_values"]
    assert not model.model.encode_slices(pixels).last_hidden_state.requires_grad
    wrapped(**tiny_batch("samf")).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in wrapped.parameters() if weight.requires_grad)
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(torch.tensor([1])).requires_grad


def test_layers_of_another_language_model_are_found():
    config = tiny_config().to_dict()
    llama = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    model = SamfForConditionalGeneration(SamfConfig(**{**config, "text_config": llama}))
    assert "(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)" in language_model_layers(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 2, "train_parts": ["fusion"]}, "train_parts doesn't name"),
        ({"lora_rank": 2, "lora_targets": ".*nothing"}, "matches no layer; the default is"),
        ({"merge": True}, "merge is about an adapter, and lora_rank is 0"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"learning_rates": {"vision": 1e-3}}, "learning_rates names .'vision'."),
        ({"learning_rates": {"fusion": "fast"}}, "expected a mapping from parts to numbers"),
        ({"train_parts": ["fusion"], "learning_rates": {"aggregator": 1e-3}}, "aren't trained"),
        ({"trained_dtype": "int8"}, "--trained_dtype.*: invalid choice: 'int8'"),
        ({"lora_rank": 2, "push_to_hub": True}, "push the merged folder"),
    ],
)
def test_what_cannot_work_is_an_error_that_says_what_to_do(work, options, message):
    with pytest.raises((ValueError, SystemExit), match=message):
        run(work, "never", **options)


def test_an_adapter_on_an_adapter_is_an_error_that_says_merge_first(work, trained):
    with pytest.raises(ValueError, match=r"has an adapter already.*python -m samf.training.adapter .*trained MERGED"):
        train_here(work, "never", model=trained, **LORA)


def test_merging_under_zero_3_is_an_error_before_anything_is_loaded(work, monkeypatch):
    monkeypatch.setattr(launchers, "sharding", lambda training: "ZeRO-3")
    monkeypatch.setattr(train, "build_processor", lambda *_: pytest.fail("it loads"))
    with pytest.raises(ValueError, match=r"python -m samf.training.adapter .*never .*never/merged"):
        train_here(work, "never", **LORA, merge=True)


@pytest.mark.parametrize(
    ("weights", "message"), [({}, "there are no tensors"), ({"a": torch.zeros(0, 3), "b": torch.ones(2)}, "1 tensors")]
)
def test_weights_of_shards_that_were_not_gathered_are_an_error(tmp_path, weights, message):
    save_file({"whole": torch.ones(2)}, tmp_path / "a.safetensors")
    check_whole(tmp_path)
    save_file(weights, tmp_path / "b.safetensors")
    with pytest.raises(RuntimeError, match=f"b.safetensors: {message}"):
        check_whole(tmp_path)


def test_the_recipe_of_a_merge_can_be_run_later(trained, tmp_path, batch):
    train.merge_adapter(trained, tmp_path / "later")
    merged = SamfForConditionalGeneration.from_pretrained(tmp_path / "later")
    assert torch.equal(
        logits(merged, batch), logits(SamfForConditionalGeneration.from_pretrained(trained / "merged"), batch)
    )
    with pytest.raises(ValueError, match="no adapter"):
        train.merge_adapter(trained / "merged", tmp_path / "never")


def test_the_recipe_for_ct_rate_trains(work):
    """Use all its settings together at a small size: two precisions, checkpointing, lengths, an adapter and full parts."""
    recipe = Path(train.__file__).with_name("recipes") / "ct_rate_ao2d.yaml"
    options = options_of(work, "recipe", slice_cache=work / "cache", dataloader_num_workers=0, eval_strategy="no")
    options |= {"logging_steps": 1, "max_length": 300, "merge": True}
    del options["learning_rate"], options["per_device_train_batch_size"]
    train.main(["--config", str(recipe), *(f"--{key}={value}" for key, value in options.items())])
    losses = [row["loss"] for row in history(work / "recipe") if "loss" in row]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    weights = load_file(work / "recipe" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    merged = SamfForConditionalGeneration.from_pretrained(work / "recipe" / "merged")
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}
