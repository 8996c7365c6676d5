"""Language models with 4-bit and 8-bit weights on a CPU: rounding, products, gradients, saving, loading, pushing."""

import copy
import functools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_stand_in import HubStandIn
from peft import LoraConfig, get_peft_model
from tiny import FUSION_TYPES, tiny_batch, tiny_model
from torch import nn
from transformers import DynamicCache, Trainer, TrainingArguments

from samf import SamfForConditionalGeneration, SamfModel, SamfQuantizationConfig
from samf.model import file_memory_samf, generation_samf, quantized_linear_samf, quantized_plan_samf
from samf.model.cache_samf import grow_in_place
from samf.model.file_memory_samf import in_file, release_pages
from samf.model.onnx_product_samf import OnnxProduct, is_available
from samf.model.quantization_samf import describe_quantization, quantizable_layers, quantize
from samf.model.quantized_linear_samf import Int4Linear, Int8Linear, QuantizedLinear
from samf.model.quantized_plan_samf import ONNX_RUNTIME, TORCH, KernelPlan, find_plan, measure_plan
from samf.model.quantized_weights_samf import (
    _LAYOUTS,
    GROUP_SIZES,
    SAVED_LAYOUT,
    dequantize_4_bits,
    pack,
    padded,
    processor_layout,
    quantize_4_bits,
    quantize_8_bits,
    unpack,
)

GREEDY = {"max_new_tokens": 6, "do_sample": False}
LIBRARY = SamfForConditionalGeneration.from_pretrained


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    """The same choice on every processor; `plans` changes it."""

    def choose(compute="bfloat16", most_rows=16, library=TORCH):
        plan = functools.partial(KernelPlan, compute=compute, most_rows=most_rows, library=library)
        monkeypatch.setattr(quantized_linear_samf, "kernel_plan", plan)
        monkeypatch.setattr("samf.model.quantization_samf.kernel_plan", plan)

    choose()
    return choose


def random_linear(inputs=96, channels=80, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, channels, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def rounded_by_loops(weight, group_size):
    """Return each weight's nearest of 16 values, evenly spaced, of which one is 0 and which span its group's extremes."""
    result = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            group = weight[row, start : start + group_size]
            step = (group.max() - group.min()) / 15
            below = round(float(-group.min() / step))
            values = torch.arange(-below, 16 - below) * step
            nearest = (group[:, None] - values).abs().argmin(dim=1)
            result[row, start : start + group_size] = values[nearest]
    return result


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_4_bits_are_the_nearest_of_16_values_of_which_one_is_0(group_size):
    """Up to the rounding of scale and zero point to bfloat16."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    packed, scales = quantize_4_bits(weight, group_size)
    assert packed.dtype == torch.uint8 and packed.numel() == weight.numel() / 2
    found = dequantize_4_bits(packed, scales, SAVED_LAYOUT, torch.float32).T
    expected = rounded_by_loops(weight, group_size)
    error, least = (found - weight).norm(), (expected - weight).norm()
    assert least > 0 and error < 1.02 * least
    step = scales[..., 0].float().T.repeat_interleave(group_size, dim=1)
    assert ((found - weight).abs() <= 1.06 * step).all()  # half a step, half for the 0, and bfloat16's part of 8 steps
    middle = ((found - weight).abs() <= 0.56 * step).float().mean()
    assert middle > 0.98  # only the extremes are further away


def test_8_bits_are_within_half_a_step_of_each_weight():
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    rounded, scales = quantize_8_bits(weight)
    assert rounded.dtype == torch.int8 and int(rounded.abs().max()) == 127
    assert ((rounded * scales.float()[:, None] - weight).abs() <= 0.75 * scales.float()[:, None]).all()


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_equal_weights_stay_equal_and_finite(bits, value):
    linear = nn.Linear(64, 64, bias=False)
    nn.init.constant_(linear.weight, value)
    found = QuantizedLinear.for_bits(bits).from_linear(linear).full_weight()
    torch.testing.assert_close(found, linear.weight.detach(), rtol=0.01, atol=0)


def test_the_saved_layout_is_what_the_documentation_says():
    """Byte j of an input: channel j in the low half, channel 32 + j in the high half."""
    codes = torch.randint(16, (128, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, SAVED_LAYOUT)
    assert packed.shape == (2, 32, 32)
    for block, k, j in ((0, 0, 0), (0, 5, 31), (1, 31, 7)):
        assert packed[block, k, j] == codes[64 * block + j, k] + 16 * codes[64 * block + 32 + j, k]


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_every_layout_holds_the_same_weights(layout):
    codes = torch.randint(16, (192, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = torch.rand(2, 192, 2).bfloat16()
    packed = pack(codes, layout)
    assert torch.equal(unpack(packed, layout), codes)
    expected = dequantize_4_bits(pack(codes, SAVED_LAYOUT), scales, SAVED_LAYOUT, torch.float32)
    assert torch.equal(dequantize_4_bits(packed, scales, layout, torch.float32), expected)


def test_the_layout_of_this_processor_is_known():
    """Otherwise its own product would silently go unused."""
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        pytest.skip("this torch has no 4-bit product for CPUs")
    assert processor_layout() in _LAYOUTS


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "channels"), [(128, 64), (96, 80), (37, 5)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_a_layers_products_are_those_of_its_dequantised_weight(bits, inputs, channels, bias, group_size, plans):
    """torch's own product, and products of dequantised weights in both precisions; also for sizes that are padded."""
    linear = random_linear(inputs, channels, bias)
    layer = QuantizedLinear.for_bits(bits).from_linear(linear, group_size)
    assert layer.full_weight().shape == linear.weight.shape
    x = torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = nn.functional.linear(x.float(), layer.full_weight(), linear.bias).detach()
    for compute, most_rows, error in (("bfloat16", 16, 3e-3), ("bfloat16", 0, 6e-3), ("float32", 0, 4e-3)):
        plans(compute, most_rows)
        found = layer(x).detach()
        assert found.dtype == x.dtype and found.shape == (2, 3, channels)
        assert (found.float() - expected).norm() < error * expected.norm(), (compute, most_rows)
    plans("float32", 0)
    torch.testing.assert_close(layer(x.float()).detach(), expected, rtol=1e-4, atol=1e-4)
    assert layer(x[:0]).shape == (0, 3, channels)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_channels_are_dequantised_in_several_chunks(bits, plans, monkeypatch):
    layer = QuantizedLinear.for_bits(bits).from_linear(random_linear(128, 320))
    x = torch.randn(5, 128)
    plans("float32", 0)
    whole = layer(x)
    monkeypatch.setattr(quantized_linear_samf, "_CHUNK", 128 * 64)
    assert len(list(layer.chunks(torch.float32))) == 5
    torch.testing.assert_close(layer(x), whole)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_inputs_gradient_is_that_of_the_dequantised_layer(bits, compute, plans):
    plans(compute)
    layer = QuantizedLinear.for_bits(bits).from_linear(random_linear(100, 72, bias=True))
    x, weights = torch.randn(2, 3, 100), torch.randn(2, 3, 72)
    mine, reference = (x.clone().requires_grad_() for _ in range(2))
    (layer(mine) * weights).sum().backward()
    (nn.functional.linear(reference, layer.full_weight()) * weights).sum().backward()
    error = (mine.grad - reference.grad).norm() / reference.grad.norm()
    assert error < (1e-5 if compute == "float32" else 6e-3)
    assert layer.weight.grad is None


@pytest.mark.parametrize("bits", [4, 8])
def test_a_models_type_may_change_around_a_layer(bits):
    layer = QuantizedLinear.for_bits(bits).from_linear(random_linear())
    x = torch.randn(2, 96)
    before = layer(x)
    layer.to(torch.float32).to(torch.bfloat16)
    assert torch.equal(layer(x), before)


def test_a_layer_saves_one_layout_whatever_the_processor_reads(monkeypatch):
    linear = random_linear(64, 128)
    saved = Int4Linear.from_linear(linear).state_dict()["weight"]
    for layout in _LAYOUTS[1:]:
        monkeypatch.setattr(quantized_linear_samf, "processor_layout", lambda layout=layout: layout)
        other = Int4Linear.from_linear(linear)
        assert other.layout == layout and not torch.equal(other.weight, saved)
        assert torch.equal(other.state_dict()["weight"], saved)
        empty = Int4Linear(64, 128).arrange()
        empty.load_state_dict(other.state_dict())
        assert torch.equal(empty.full_weight(), other.full_weight())


# --- ONNX Runtime's product -------------------------------------------------------------------------------------------

needs_onnx = pytest.mark.skipif(not is_available(), reason="ONNX Runtime's product: pip install onnx onnxruntime")


def with_rounded_activations(rows, weight, block):
    """Return rows times a weight's transpose, each block of a row rounded to 255 values that span its largest value."""
    blocks = rows.view(len(rows), -1, block)
    steps = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / steps).round() * steps).view_as(rows) @ weight.T


@needs_onnx
@pytest.mark.parametrize(("inputs", "channels", "bias"), [(256, 64, False), (96, 80, True), (37, 5, True)])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (4, 128), (8, 64)])
def test_onnx_runtimes_product_is_that_of_the_dequantised_weight(bits, group_size, inputs, channels, bias, plans):
    plans("float32", None, ONNX_RUNTIME)
    linear = random_linear(inputs, channels, bias)
    layer = QuantizedLinear.for_bits(bits).from_linear(linear, group_size)
    block = group_size if bits == 4 else next(block for block in (128, 64, 32) if padded(inputs, 32) % block == 0)
    size = padded(inputs, block)
    for count in (1, 6, 70):
        x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))
        x[:, 3] *= 30  # one input is large, as in real language models
        found = layer(x).detach()
        rows, weight = (nn.functional.pad(values, (0, size - inputs)) for values in (x, layer.full_weight()))
        expected = with_rounded_activations(rows, weight, block) + (linear.bias.detach() if bias else 0)
        exact = nn.functional.linear(x, layer.full_weight(), linear.bias).detach()
        assert (found - expected).norm() < 4e-3 * exact.norm()
        assert (found - exact).norm() < 0.03 * exact.norm()
    assert layer(x[:0]).shape == (0, channels)


@needs_onnx
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtime_has_its_own_copy_of_the_weight(bits):
    """It must not go on reading memory that isn't its own."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (48, 128 * bits // 8), dtype=torch.uint8, generator=generator)
    scales = torch.rand(48, 2, generator=generator)
    zeros = torch.randint(2**bits, (48, 2), dtype=torch.uint8, generator=generator)
    product = OnnxProduct(codes, scales, zeros, bits)
    rows = torch.randn(3, 128, generator=generator)
    before = product(rows)
    for constant in (codes, scales, zeros):
        constant.zero_()
    assert torch.equal(product(rows), before) and before.abs().max() > 0


@needs_onnx
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_with_onnx_runtimes_product_copies_pickles_saves_and_loads(bits, plans):
    plans("float32", None, ONNX_RUNTIME)
    layer = QuantizedLinear.for_bits(bits).from_linear(random_linear(128, 96))
    other = QuantizedLinear.for_bits(bits).from_linear(random_linear(128, 96, seed=1))
    x = torch.randn(3, 128)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    plans("float32", 0)
    same = QuantizedLinear.for_bits(bits).from_linear(random_linear(128, 96))
    assert torch.equal(same.state_dict()["weight"], layer.state_dict()["weight"])


@needs_onnx
@pytest.mark.skipif(sys.platform != "linux", reason="the weights stay in memory on other systems")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_onnx_runtime_has_copied_is_in_a_file_whose_memory_is_freed(plans, bits):
    plans("bfloat16", 8, ONNX_RUNTIME)  # more rows are dequantised
    layer = QuantizedLinear.for_bits(bits).from_linear(random_linear(1024, 1024))
    rows = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0))
    content = layer.weight.data.clone()
    assert resident(layer.weight) > 0  # compared with memory that is there
    expected = rows @ layer.full_weight().mT
    assert resident(layer.weight) == 0
    assert (layer(rows) - expected).norm() < 0.01 * expected.norm()
    assert resident(layer.weight) == 0
    layer.weight.data[:] = content  # what is written to it isn't lost with the memory
    layer.weight.data.view(-1)[:5000] ^= 1
    release_pages(layer.weight)
    assert not torch.equal(layer.weight.data, content)
    layer.weight.data.view(-1)[:5000] ^= 1
    assert torch.equal(layer.weight.data, content)


@pytest.mark.skipif(sys.platform != "linux", reason="the weights stay in memory on other systems")
def test_parts_that_a_prompt_needs_once_hold_their_weights_only_while_they_compute(monkeypatch):
    monkeypatch.setattr("samf.model.quantization_samf._LEAST_IN_FILE", 1)
    model, batch = tiny_model(), tiny_batch("ao2d")
    expected = model.model(**batch).image_outputs.pooler_output
    quantize(model, SamfQuantizationConfig())
    torch.testing.assert_close(model.model(**batch).image_outputs.pooler_output, expected)
    for part in (model.model.slice_encoder, model.model.aggregator, model.model.fusion):
        assert {resident(parameter) for parameter in part.parameters()} == {0}
    assert model.config.vision_chunk_size == 8
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied.model(**batch).image_outputs.pooler_output, expected)


def resident(tensor):
    """Return the kilobytes in memory of the mapping that a tensor begins."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    (own,) = (text for text in mappings if text.startswith(f"{tensor.data_ptr():x}-"))
    return int(re.search(r"^Rss: +([0-9]+) kB", own, re.MULTILINE)[1])


def test_a_copy_in_a_file_has_the_same_content_and_needs_room(monkeypatch, tmp_path):
    tensor = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(in_file(tensor), tensor)
    copy = in_file(tensor)
    assert in_file(copy) is copy or sys.platform != "linux"
    monkeypatch.setattr(file_memory_samf.constants, "HF_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert in_file(tensor) is tensor


# --- The choice of the product ----------------------------------------------------------------------------------------


class Timed:
    """A layer whose products take given times: direct by row, dequantised a start and by row of each type."""

    bits, in_features = 4, 8

    def __init__(self, start=10.0, bfloat16=0.1, float32=0.4, row=1.0, onnx_row=None):
        self.start = start
        self.rates = {torch.bfloat16: bfloat16, torch.float32: float32}
        self.rows = {TORCH: row, ONNX_RUNTIME: onnx_row}
        self.libraries = [library for library, time in self.rows.items() if time is not None]

    def direct(self, rows, library):
        return self.rows[library] * len(rows)

    def dequantized(self, rows):
        return self.start + self.rates[rows.dtype] * len(rows)


@pytest.mark.parametrize(
    ("layer", "plan"),
    [
        (Timed(), KernelPlan(4, "bfloat16", 8)),  # 8 against 10.8; 16 against 11.6
        (Timed(bfloat16=3.0), KernelPlan(4, "float32", 16)),  # 16 against 16.4: no bfloat16 units
        (Timed(row=100.0), KernelPlan(4, "bfloat16", 0)),  # the direct product is never faster
        (Timed(row=None), KernelPlan(4, "bfloat16", 0)),  # there is none
        (Timed(row=1.0, onnx_row=2.0), KernelPlan(4, "bfloat16", 8)),
        (Timed(row=1.0, onnx_row=0.7), KernelPlan(4, "bfloat16", 16, ONNX_RUNTIME)),  # 11.2 against 11.6
        (Timed(row=1.0, onnx_row=0.17), KernelPlan(4, "bfloat16", 128, ONNX_RUNTIME)),  # 43.5 against 35.6
        (Timed(row=1.0, onnx_row=0.1), KernelPlan(4, "float32", None, ONNX_RUNTIME)),  # 25.6 against 35.6
        (Timed(row=None, onnx_row=0.18), KernelPlan(4, "bfloat16", 64, ONNX_RUNTIME)),  # 23.0 against 22.8
        (Timed(row=0.01), KernelPlan(4, "bfloat16", 256)),
    ],
)
def test_the_plan_is_the_fastest_for_each_number_of_rows(layer, plan):
    assert measure_plan(layer, seconds=lambda task: task()) == plan


def test_a_plan_is_measured_once_and_then_the_same_in_every_process(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized_plan_samf.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(quantized_plan_samf, "measure_plan", lambda layer: KernelPlan(layer.bits, "float32", 4))
    first = find_plan(4, Timed)
    assert (first.compute, first.most_rows) == ("float32", 4)
    assert "float32" in str(first) and "4 rows" in str(first)

    def fail():
        raise AssertionError("measured again")

    assert find_plan(4, fail) == first
    (file,) = (tmp_path / "samf").iterdir()
    file.write_text("{", encoding="utf-8")  # damaged: measured again
    assert find_plan(4, Timed) == first


def test_a_plan_of_this_processor_can_be_measured():
    plan = measure_plan(quantized_linear_samf._sample(4))
    assert plan.compute in ("bfloat16", "float32") and plan.library in (TORCH, ONNX_RUNTIME)
    assert plan.most_rows is None or plan.most_rows >= 0


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model whose language model isn't all padding."""
    path = tmp_path_factory.mktemp("whole")
    tiny_model(text={"hidden_size": 64, "intermediate_size": 128}).save_pretrained(path)
    return path


@pytest.fixture
def batch():
    return tiny_batch("ao2d")


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("library", [TORCH, pytest.param(ONNX_RUNTIME, marks=needs_onnx)])
@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@pytest.mark.parametrize(("bits", "error"), [(4, 0.35), (8, 0.05)])
def test_a_model_answers_about_as_before_and_reloads_bit_by_bit(bits, error, fusion_type, library, tmp_path, plans):
    if library == ONNX_RUNTIME:
        plans("float32", None, library)
    model = tiny_model(fusion_type=fusion_type, text={"hidden_size": 64, "intermediate_size": 128})
    model.save_pretrained(tmp_path / "whole")
    small = LIBRARY(tmp_path / "whole", quantization_config=SamfQuantizationConfig(bits=bits))
    batch = tiny_batch(fusion_type)
    expected, found = logits(model, batch), logits(small, batch)
    assert 0 < (found - expected).norm() < error * expected.norm()
    small.save_pretrained(tmp_path / "small")
    again = LIBRARY(tmp_path / "small")
    assert torch.equal(logits(again, batch), found)
    assert again.state_dict().keys() == small.state_dict().keys()
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    assert torch.equal(again.generate(**prompt, **GREEDY), small.generate(**prompt, **GREEDY))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(LIBRARY(tmp_path / "again"), batch), found)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_while_loading_equals_rounding_afterwards(bits, folder, batch):
    config = SamfQuantizationConfig(bits=bits)
    while_loading = LIBRARY(folder, quantization_config=config)
    afterwards = quantize(LIBRARY(folder), config)
    assert torch.equal(logits(while_loading, batch), logits(afterwards, batch))
    found, expected = while_loading.state_dict(), afterwards.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_only_the_language_model_is_rounded(compute, folder, plans):
    """Its layers in `bits`, its head in `head_bits`, embeddings in bfloat16, other weights in the hidden states' type."""
    plans(compute)
    model = LIBRARY(folder, quantization_config=SamfQuantizationConfig(bits=4))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            expected = Int8Linear if name == "lm_head" else Int4Linear if ".language_model." in name else None
            assert type(module) is expected if expected else not isinstance(module, QuantizedLinear), name
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            inside = "bfloat16" if "embed_tokens" in name else compute if ".language_model." in name else "float32"
            assert parameter.dtype == getattr(torch, inside), name
    assert model.get_input_embeddings()(torch.tensor([3])).dtype == getattr(torch, compute)
    assert all(buffer.dtype == torch.float32 for name, buffer in model.named_buffers() if "inv_freq" in name)
    text = describe_quantization(model)
    assert "9 layers" in text and "int4" in text and compute in text
    assert describe_quantization(tiny_model()) is None


def test_fallback_and_own_product_give_about_the_same_logits(folder, batch, plans):
    model = LIBRARY(folder, quantization_config=SamfQuantizationConfig(bits=4))
    plans("bfloat16", 1000)
    own = logits(model, batch).float()
    plans("bfloat16", 0)
    other = logits(model, batch).float()
    assert 0 < (own - other).norm() < 0.03 * own.norm()


def test_the_configuration_chooses_head_layers_and_groups(folder):
    model = LIBRARY(folder)
    names = quantizable_layers(model, SamfQuantizationConfig())
    assert names.pop("lm_head") == 8 and set(names.values()) == {4}
    assert len(names) == 8 and all(name.startswith("model.language_model.") for name in names)
    assert "lm_head" not in quantizable_layers(model, SamfQuantizationConfig(head_bits=None))
    assert quantizable_layers(model, SamfQuantizationConfig(head_bits=4))["lm_head"] == 4
    kept = quantizable_layers(model, SamfQuantizationConfig(skip_modules=["down_proj"]))
    assert len(kept) == 7 and not any(name.endswith("down_proj") for name in kept)
    small = quantize(model, SamfQuantizationConfig(group_size=32))
    assert small.model.language_model.layers[0].mlp.down_proj.scales.shape[0] == 128 // 32


def test_a_head_that_shares_the_embeddings_weight_keeps_it(tmp_path, batch):
    model = tiny_model(text={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "whole")
    small = LIBRARY(tmp_path / "whole", quantization_config=SamfQuantizationConfig())
    assert small.lm_head.weight is small.get_input_embeddings().weight
    assert small.lm_head.weight.dtype == torch.bfloat16
    small.save_pretrained(tmp_path / "small")
    again = LIBRARY(tmp_path / "small")
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again, batch), logits(small, batch))


def test_the_model_without_its_head_is_rounded_too(folder):
    model = SamfModel.from_pretrained(folder, quantization_config=SamfQuantizationConfig(bits=8))
    assert isinstance(model.language_model.layers[0].mlp.down_proj, Int8Linear)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.parametrize("window", [None, 14, 1000])
@pytest.mark.parametrize("bits", [None, 8])
def test_the_cache_that_grows_in_place_changes_no_token(window, options, bits, monkeypatch, batch):
    """Against the library's cache; 14 tokens are the prompt and a few more. Beams of a whole model keep the library's."""
    text = {"hidden_size": 64, "intermediate_size": 128, "sliding_window": window}
    model = tiny_model(text=text)
    if bits is not None:
        model = quantize(model, SamfQuantizationConfig(bits=bits))
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    if "prompt_lookup_num_tokens" in options:  # takes one prompt
        prompt = {name: value[:1] for name, value in prompt.items()}
    changed = []
    monkeypatch.setattr(generation_samf, "grow_in_place", lambda cache: changed.append(cache) or grow_in_place(cache))
    found = model.generate(**prompt, **options, **{**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12})
    assert any(isinstance(cache, DynamicCache) for cache in changed) == (bits is not None or "num_beams" not in options)
    monkeypatch.setattr(generation_samf, "grow_in_place", lambda cache: None)
    expected = model.generate(**prompt, **options, **{**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12})
    assert torch.equal(found, expected)


def test_gradients_reach_the_slices_through_a_rounded_language_model(folder, batch, plans):
    """As evidence needs them; against the same model with its rounded weights written out."""
    plans("float32")
    small = LIBRARY(folder, quantization_config=SamfQuantizationConfig(bits=4))
    whole = LIBRARY(folder)
    for name in quantizable_layers(whole, SamfQuantizationConfig()):
        whole.get_submodule(name).weight.data = small.get_submodule(name).full_weight()
    gradients = []
    for model in (small, whole):
        pixels = batch["pixel_values"].clone().requires_grad_()
        model(**{**batch, "pixel_values": pixels}).loss.backward()
        gradients.append(pixels.grad)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()
    assert gradients[1].norm() > 0


# --- What it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"bits": 3}, {"head_bits": 16}, {"group_size": 48}])
def test_unknown_bits_and_groups_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        SamfQuantizationConfig(**options)


def test_another_device_is_refused(folder):
    with pytest.raises(ValueError, match=r"is for a CPU.*BitsAndBytesConfig"):
        LIBRARY(folder, quantization_config=SamfQuantizationConfig(), device_map={"": "meta"})


def test_a_rounded_model_is_not_rounded_again(folder):
    model = LIBRARY(folder, quantization_config=SamfQuantizationConfig(bits=8))
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, SamfQuantizationConfig(bits=4))


def test_trainer_refuses_a_rounded_model(folder, tmp_path):
    model = LIBRARY(folder, quantization_config=SamfQuantizationConfig())
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model=model, args=TrainingArguments(tmp_path, use_cpu=True, report_to=[]))


# --- Adapters, repositories -------------------------------------------------------------------------------------------


def test_an_adapter_answers_on_top_of_a_rounded_model(folder, batch, tmp_path):
    """Trained on the whole model, then loaded on the rounded one, as `samf report --quantize` does."""
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(qkv_proj|down_proj)", init_lora_weights=False)
    wrapped = get_peft_model(LIBRARY(folder), lora)
    wrapped.get_base_model().save_pretrained(tmp_path / "adapter")
    whole = LIBRARY(tmp_path / "adapter")
    small = LIBRARY(tmp_path / "adapter", quantization_config=SamfQuantizationConfig(bits=8))
    plain = LIBRARY(folder, quantization_config=SamfQuantizationConfig(bits=8))
    expected = logits(whole, batch)
    assert (logits(small, batch) - expected).norm() < 0.05 * expected.norm()
    assert (logits(plain, batch) - expected).norm() > 0.2 * expected.norm()


SCRIPT = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "samf" or name.startswith("samf."):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForImageTextToText

inputs = torch.load(sys.argv[3], weights_only=True)
for repository, options in ((sys.argv[1], {}), (sys.argv[2], {"quantization_config": {"quant_method": "samf", "bits": 4}})):
    model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True, **options)
    with torch.no_grad():
        torch.save(model(**inputs).logits, f"{sys.argv[3]}.{'rounded' if options else 'saved'}")
"""


def test_a_pushed_model_loads_rounded_where_this_package_is_not(folder, batch, tmp_path):
    """From a stand-in for the Hub, in a fresh process: what was saved rounded, and whole weights rounded while loading."""
    push = f"""
import sys
from pathlib import Path
from samf import SamfForConditionalGeneration, SamfQuantizationConfig
model = SamfForConditionalGeneration.from_pretrained({str(folder)!r}, quantization_config=SamfQuantizationConfig())
model.push_to_hub("someone/small")
"""
    with HubStandIn() as hub:
        environment = {**os.environ, **hub.environment(tmp_path)}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        run = functools.partial(subprocess.run, env=environment, capture_output=True, encoding="utf-8", check=False)
        pushed = run([sys.executable, "-c", push])
        assert pushed.returncode == 0, pushed.stderr[-2000:]
        files = hub.files("someone/small")
        assert json.loads(files["config.json"])["quantization_config"]["bits"] == 4
        assert {"quantization_samf.py", "quantized_linear_samf.py", "model.safetensors"} <= files.keys()
        torch.save(batch, tmp_path / "batch.pt")
        (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
        script = [sys.executable, str(tmp_path / "script.py"), "someone/small", str(folder), str(tmp_path / "batch.pt")]
        loaded = run(script, cwd=tmp_path)
        assert loaded.returncode == 0, loaded.stderr[-2000:]
    saved, rounded = (torch.load(tmp_path / f"batch.pt.{name}", weights_only=True) for name in ("saved", "rounded"))
    assert torch.equal(saved, rounded)
    whole = logits(LIBRARY(folder), batch)
    assert 0 < (saved.float() - whole).norm() < 0.35 * whole.norm()
