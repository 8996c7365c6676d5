"""peft adapters on the language model, the other parts trained in full."""

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import FUSION_TYPES, image_tokens, tiny_batch, tiny_model
from transformers import AutoModelForImageTextToText
from transformers.integrations.peft import MIN_PEFT_VERSION, check_peft_version

from samf import SamfForConditionalGeneration

TARGETS = r".*language_model.*\.(qkv_proj|o_proj|gate_up_proj|down_proj)"
FULL_PARTS = ["aggregator", "slice_position", "fusion", "finding_head"]


def adapter(**options) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=FULL_PARTS, **options)


def moved(model):
    """The model with every trained weight away from its start, where an adapter changes nothing."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def adapted(fusion_type: str = "ao2d", **options):
    return get_peft_model(tiny_model(fusion_type=fusion_type, finding_names=["a", "b"]), adapter(**options))


@pytest.fixture
def own_adapters():
    """The library's own add_adapter and load_adapter, which ask for a peft of about their own age."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers' add_adapter: {error} (peft {peft.__version__} is installed)")


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_causality_and_sight_hold_with_an_adapter(use_dora, fusion_type):
    model, batch = moved(adapted(fusion_type, use_dora=use_dora)), tiny_batch(fusion_type)
    position = batch["input_ids"].shape[1] - 3
    changed = batch["input_ids"].clone()
    changed[:, position] = (changed[:, position] - 6 + 11) % 93 + 6
    shape = batch["pixel_values"].shape
    with torch.no_grad():
        before, after = model(**batch).logits, model(**{**batch, "input_ids": changed}).logits
        black, white = (model(**{**batch, "pixel_values": torch.full(shape, grey)}).logits for grey in (-2.0, 2.0))
        with model.disable_adapter():
            assert not torch.allclose(model(**batch).logits, before)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position:], after[:, position:])
    assert (black - white)[:, image_tokens(fusion_type) :].abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_trains_itself_and_the_parts_beside_it(checkpointing):
    model = adapted().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(**tiny_batch("ao2d"), finding_targets=torch.tensor([[1, 0], [0, 1]])).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == with_gradient
    for part in FULL_PARTS:
        assert any(f".{part}." in name for name in trained)
    assert not any("slice_encoder" in name or name.endswith("base_layer.weight") for name in trained)


def test_a_saved_adapter_comes_back_on_its_base_model(tmp_path):
    """By peft; the findings head and the fusion come with it, and the base is as it was."""
    base = tiny_model(finding_names=["a", "b"])
    base.save_pretrained(tmp_path / "base")
    model = moved(get_peft_model(SamfForConditionalGeneration.from_pretrained(tmp_path / "base"), adapter()))
    model.save_pretrained(tmp_path / "adapter")
    batch = tiny_batch("ao2d")
    fresh = SamfForConditionalGeneration.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected, output = model(**batch), again(**batch)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.finding_logits, expected.finding_logits)
        assert not torch.allclose(base(**batch).logits, expected.logits)


def test_the_librarys_own_adapters_and_pefts_are_one(own_adapters, tmp_path):
    """add_adapter trains as get_peft_model does; load_adapter and the adapter's folder alone give the model back."""
    tiny_model(finding_names=["a", "b"]).save_pretrained(tmp_path / "base")
    model = SamfForConditionalGeneration.from_pretrained(tmp_path / "base")
    model.add_adapter(adapter())
    moved(model).save_pretrained(tmp_path / "adapter")
    again = SamfForConditionalGeneration.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(
        SamfForConditionalGeneration.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    batch = tiny_batch("ao2d")
    with torch.no_grad():
        expected = model(**batch)
        for loaded in (again, whole, by_peft):
            output = loaded.eval()(**batch)
            assert torch.equal(output.logits, expected.logits)
            assert torch.equal(output.finding_logits, expected.finding_logits)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_merging_changes_no_logit(use_dora):
    model = moved(adapted(use_dora=use_dora))
    batch = tiny_batch("ao2d")
    with torch.no_grad():
        expected = model(**batch)
        merged = model.merge_and_unload()
        output = merged(**batch)
    assert isinstance(merged, SamfForConditionalGeneration)
    assert set(merged.state_dict()) == set(tiny_model(finding_names=["a", "b"]).state_dict())
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.finding_logits, expected.finding_logits)


def test_an_adapted_model_generates_what_its_merged_form_generates():
    batch = tiny_batch("ao2d", answer=0)
    batch.pop("labels")
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    torch.manual_seed(5)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)).eval()
    tokens = model.generate(**batch, **greedy)
    assert torch.equal(model.merge_and_unload().generate(**batch, **greedy), tokens)
