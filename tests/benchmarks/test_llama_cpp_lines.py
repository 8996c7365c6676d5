"""llama.cpp's lines: the files have the language model's shapes and finite weights; no timing is judged."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from samf.benchmarks import llama_cpp_lines, quantized_lines, workloads
from samf.benchmarks import runner as benchmark

STAGES = ("llama_cpp", "llama_cpp_1")


def settings(folder=None, size="tiny"):
    return workloads.Settings(size, torch.device("cpu"), torch.float32, budget=0.01, folder=folder)


def run(stage, folder):
    return benchmark.run_stage(
        benchmark.parse_args(["model", "--size=tiny", f"--stage=quantized/{stage}", f"--folder={folder}"])
    )


@pytest.mark.parametrize("file", llama_cpp_lines.FILES)
@pytest.mark.parametrize("size", ["tiny", "full"])
def test_a_file_has_the_weights_of_the_language_model(size, file):
    text = settings(size=size).config().text_config
    with torch.device("meta"):
        shapes = [tuple(weight.shape) for weight in AutoModelForCausalLM.from_config(text).parameters()]
    assert sorted(tensor.shape for tensor in llama_cpp_lines.gguf_tensors(text, file).values()) == sorted(shapes)


@pytest.mark.parametrize(("file", "size"), [("Q4_0", 2.18e9), ("Q4_K_M", 2.39e9)])
def test_files_have_the_sizes_of_published_ones(file, size):
    """Phi-3-mini-4k in llama.cpp's own quantisation; a step reads all of it but the embeddings, and the cache."""
    text = settings(size="full").config().text_config
    tensors = llama_cpp_lines.gguf_tensors(text, file)
    weights = sum(tensor.nbytes for tensor in tensors.values())
    assert weights == pytest.approx(size, rel=0.003)
    read = llama_cpp_lines.bytes_per_token(text, file, 320)
    assert read == weights - tensors["token_embd.weight"].nbytes + 320 * 32 * 2 * 3072 * 2


@pytest.mark.parametrize("stage", STAGES)
def test_missing_packages_are_named(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install xllamacpp gguf" in run(stage, tmp_path)["skipped"]


def test_int4_is_compared_with_llama_cpp_where_it_was_measured(tmp_path):
    turn = {"decode": 2.0, "prefill": 10.0, "memory": 8e9, "bytes": 1e9}
    kept = {name: [turn, turn] for name in quantized_lines.FORMATS}
    kept["int4"] = [turn | {"decode": 6.0}, turn | {"decode": 8.0, "prefill": 30.0}]
    kept["llama.cpp Q4_0"] = [turn | {"decode": 4.0}, turn | {"decode": 4.0}]
    kept["llama.cpp Q4_K_M"] = [turn]  # the second turn failed
    (tmp_path / "speeds.json").write_text(json.dumps(kept), encoding="utf-8")
    found = {figure.name: list(figure.values) for figure in quantized_lines.compare(settings(tmp_path))}
    assert found["decode, int4 / llama.cpp Q4_0"] == [1.5, 2.0]
    assert found["prefill, int4 / llama.cpp Q4_0"] == [1.0, 3.0]
    assert found["decode, llama.cpp Q4_0, of the memory's speed"] == [50.0, 50.0]
    assert not any("Q4_K_M" in name for name in found)


@pytest.mark.parametrize("file", llama_cpp_lines.FILES)
def test_written_weights_are_small_and_of_the_right_types(file, tmp_path):
    """Read and dequantised by the gguf package."""
    gguf = pytest.importorskip("gguf")
    text = settings().config().text_config
    llama_cpp_lines.write_model(tmp_path / "model.gguf", text, file)
    expected = llama_cpp_lines.gguf_tensors(text, file)
    found = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    assert [tensor.name for tensor in found] == list(expected)
    for tensor in found:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert weights.shape == expected[tensor.name].shape
        assert tensor.tensor_type.name == expected[tensor.name].kind
        if tensor.tensor_type.name == "F32":
            assert (weights == 1).all()
        else:
            assert weights.std() > 0.01 and np.abs(weights).max() <= 1.01 * llama_cpp_lines.LARGEST_WEIGHT


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_random_blocks_are_small_in_every_type(kind):
    gguf = pytest.importorskip("gguf")
    tensor = llama_cpp_lines.Tensor((16, 512), kind)
    data = llama_cpp_lines.random_weights(tensor, np.random.default_rng(0))
    weights = gguf.quants.dequantize(data.reshape(16, -1), gguf.GGMLQuantizationType[kind])
    assert weights.shape == tensor.shape
    assert weights.std() > 0.005 and np.abs(weights).max() <= 1.1 * llama_cpp_lines.LARGEST_WEIGHT


def test_llama_cpp_answers_with_as_many_tokens_as_the_other_formats(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    results = [run(stage, tmp_path) for stage in STAGES]
    figures = {figure["name"]: figure for result in results for figure in result["figures"]}
    kept = json.loads((tmp_path / "speeds.json").read_text(encoding="utf-8"))
    for file in llama_cpp_lines.FILES:
        assert figures[f"decode, {file}"]["repeats"] == workloads.TINY.new_tokens - 1
        assert figures[f"prefill, {file}"]["note"] == "12 tokens"
        assert 0 < figures[f"peak of llama.cpp, {file}"]["median"] < 0.2
        (speeds,) = kept[f"llama.cpp {file}"]
        assert speeds["prefill"] == figures[f"prefill, {file}"]["median"]
        assert speeds.keys() == {"prefill", "decode", "memory", "bytes"}


def test_a_process_that_fails_says_why(tmp_path):
    pytest.importorskip("xllamacpp")
    with pytest.raises(RuntimeError, match="llama_cpp_process"):
        llama_cpp_lines.time_file(settings(tmp_path), "Q4_0")
