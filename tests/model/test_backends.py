"""One model, whatever computes it: attention implementation, compiler, precision, devices, quantised weights."""

import functools
import inspect
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import FUSION_TYPES, SLICES, image_tokens, tiny_batch, tiny_model
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from samf import SamfForConditionalGeneration
from samf.model.hub_samf import restrict_to_language_model

ATTENTIONS = (
    "eager",
    "sdpa",
    pytest.param("flex_attention", marks=pytest.mark.slow),  # compiles a kernel for each layer's shape
    pytest.param("flash_attention_2", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
)


def model_with(attention: str, fusion_type: str, **options) -> SamfForConditionalGeneration:
    model = tiny_model(fusion_type=fusion_type, **options)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_implementations_agree_on_padded_volumes_and_prompts(attention, fusion_type):
    """Slices and tokens that are padding are masked in each implementation."""
    batch = tiny_batch(fusion_type)
    batch["attention_mask"][0, -3:] = 0
    batch["slice_mask"] = torch.ones(2, SLICES, dtype=torch.bool)
    if fusion_type != "slice_tokens":
        batch["slice_mask"][1, -2:] = False
    model = model_with(attention, fusion_type)
    assert model.model.aggregator.config._attn_implementation == attention
    with torch.no_grad():
        expected = model_with("eager", fusion_type)(**batch)
        actual = model(**batch)
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(actual.logits[kept], expected.logits[kept], rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_causality_and_sight_hold_in_each_attention_implementation(attention, fusion_type):
    model, batch = model_with(attention, fusion_type), tiny_batch(fusion_type)
    position = batch["input_ids"].shape[1] - 3
    changed = batch["input_ids"].clone()
    changed[:, position] = (changed[:, position] - 6 + 11) % 93 + 6
    shape = batch["pixel_values"].shape
    with torch.no_grad():
        before, after = model(**batch).logits, model(**{**batch, "input_ids": changed}).logits
        black, white = (model(**{**batch, "pixel_values": torch.full(shape, grey)}).logits for grey in (-2.0, 2.0))
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position:], after[:, position:])
    assert (black - white)[:, image_tokens(fusion_type) :].abs().max() > 1e-3


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, to compile")],
        ),
    ],
)
def test_the_slice_encoder_and_a_decoding_step_compile_without_graph_breaks(backend):
    """fullgraph=True raises at the first break; compiled = eager."""
    model, batch = tiny_model(), tiny_batch("ao2d", answer=0)
    batch.pop("labels")
    flat = batch["pixel_values"].flatten(0, 1)
    encoder = torch.compile(model.model.slice_encoder, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected = model.model.slice_encoder(pixel_values=flat).last_hidden_state
        torch.testing.assert_close(encoder(pixel_values=flat).last_hidden_state, expected, rtol=0, atol=1e-5)

    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, **greedy)
    steps = []
    forward = model.forward
    compiled = torch.compile(forward, fullgraph=True, backend=backend)

    def step(*args, **kwargs):
        if kwargs.get("pixel_values") is not None:  # the prefill checks the prompts by their values: not one graph
            return forward(*args, **kwargs)
        steps.append(kwargs["input_ids"].shape[1])
        return compiled(*args, **kwargs)

    step.__signature__ = inspect.signature(forward)
    model.forward = step
    assert torch.equal(model.generate(**batch, **greedy, cache_implementation="static"), expected)
    assert steps == [1] * 5


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_full_precision(dtype, fusion_type):
    """Autocast, and weights in half precision: logits near those of float32, everywhere finite, gradients too."""
    batch = tiny_batch(fusion_type)
    model = tiny_model(fusion_type=fusion_type)
    expected = model(**batch).logits.detach()
    with torch.autocast("cpu", dtype=dtype):
        output = model(**batch)
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    half = tiny_model(fusion_type=fusion_type).to(dtype)
    with torch.no_grad():
        logits = half(**{**batch, "pixel_values": batch["pixel_values"].to(dtype)}).logits
    for actual in (output.logits.detach(), logits):
        assert (actual.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_scores_too_large_for_half_precision(fusion_type):
    """The paper's scores are unscaled: products over thousands of dimensions pass 65,504, float16's largest number."""
    model = tiny_model(fusion_type=fusion_type)
    with torch.no_grad():
        for layer in (model.model.fusion.project_slices, model.model.fusion.project_volume):
            layer.bias.fill_(200.0)  # each score is at least 32 * 200 * 200
        model.model.fusion.mix.weight.mul_(1e-3)
        batch = tiny_batch(fusion_type)
        expected = model(**batch).logits
        logits = model.half()(**{**batch, "pixel_values": batch["pixel_values"].half()}).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_weights_left_on_disk_give_the_same_tokens(fusion_type, tmp_path):
    """device_map="auto" with less memory than the model takes: the rest is read from disk layer by layer."""
    model = tiny_model(fusion_type=fusion_type, finding_names=["a"], extra_sources={"age": 1})
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    options = {"device_map": "auto", "max_memory": {"cpu": size // 2}, "offload_folder": str(tmp_path / "offload")}
    offloaded = SamfForConditionalGeneration.from_pretrained(tmp_path / "model", **options)
    assert "disk" in offloaded.hf_device_map.values()
    batch = tiny_batch(fusion_type, answer=0)
    batch.pop("labels")
    batch |= model.pack_extra_sources([{"age": [0.5]}, None])
    greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(offloaded.generate(**batch, **greedy), model.generate(**batch, **greedy))


@pytest.mark.parametrize("skip", ["modules_to_not_convert", "llm_int8_skip_modules"])
def test_quantisation_is_the_language_models_alone_unless_it_names_what_it_skips(skip):
    """Every linear layer outside the language model is skipped by the library's own rule, and none within it."""
    given = SimpleNamespace(**{skip: None})
    patterns = getattr(restrict_to_language_model(given), skip)
    assert getattr(given, skip) is None
    for model in (tiny_model(finding_names=["a"], extra_sources={"age": 1}), tiny_model().model):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert should_convert_module(name, patterns) == ("language_model." in name), name
    named = SimpleNamespace(**{skip: ["lm_head"]})
    assert restrict_to_language_model(named) is named


def eight_bits():
    quantization = pytest.importorskip("torchao.quantization", reason="8-bit weights: pip install torchao")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def four_bits():
    pytest.importorskip("bitsandbytes", reason="4-bit weights: pip install bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def is_quantised(layer):
    return any(type(part).__module__.startswith(("torchao", "bitsandbytes")) for part in (layer, layer.weight))


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@pytest.mark.parametrize(("config", "error"), [(eight_bits, 0.05), (four_bits, 0.35)])
def test_a_quantised_language_model_answers_about_as_the_whole_one(config, error, fusion_type, tmp_path):
    """Every linear layer of the language model is quantised, none elsewhere; saved and reloaded it is the same."""
    model = tiny_model(fusion_type=fusion_type, text={"hidden_size": 64, "intermediate_size": 128})
    model.save_pretrained(tmp_path / "whole")
    load = functools.partial(SamfForConditionalGeneration.from_pretrained, device_map="cpu")
    small = load(tmp_path / "whole", quantization_config=config()).eval()
    linear = {name: module for name, module in small.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all(is_quantised(module) == name.startswith("model.language_model.") for name, module in linear.items())
    small.save_pretrained(tmp_path / "small")
    batch = tiny_batch(fusion_type)
    with torch.no_grad():
        expected, actual = model(**batch).logits, small(**batch).logits
        assert 0 < (actual - expected).norm() < error * expected.norm()
        assert torch.equal(load(tmp_path / "small").eval()(**batch).logits, actual)
