"""A training step against its published form: equal losses and gradients; exponents; DINO against lightly's example."""

import copy
import json

import pytest
import torch

from samf.benchmarks import growth_lines, growth_plot
from samf.benchmarks.published_step import TextShape, published_loss, text_batch
from samf.benchmarks.step_lines import CACHED, FEW, PIXELS, PUBLISHED, step_batch, step_config, step_model
from samf.benchmarks.workloads import Settings


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings("tiny", torch.device("cpu"), torch.float32, 0.0, tmp_path)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("trains_encoder", [True, False])
def test_our_loss_and_gradients_are_those_of_the_published_form(settings, trains_encoder):
    """Single slices, equal rows, padding and all logits against one call, one row, short padding and the labels' logits."""
    model = step_model(settings, trains_encoder)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # LoRA's B is zero at first
            if weight.ndim > 1:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    padded, short = step_batch(settings, PUBLISHED), step_batch(settings, PIXELS)
    assert padded["input_ids"].shape[1] == 20 and short["input_ids"].shape[1] == 13  # four of them image tokens
    theirs, ours = published_loss(model, padded), model(**short, skip_logits=True).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    expected, found = gradients(model, theirs), gradients(model, ours)
    assert set(found) == set(expected) and len(found) > 10
    assert any("slice_encoder" in name for name in found) == trains_encoder
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_every_form_has_the_same_texts_and_its_own_padding(settings):
    batches = {form: step_batch(settings, form) for form in (PUBLISHED, PIXELS, CACHED, FEW)}
    label_tokens = {form: batch["labels"][batch["labels"] != -100].tolist() for form, batch in batches.items()}
    assert all(tokens == label_tokens[PUBLISHED] and len(tokens) == 9 for tokens in label_tokens.values())
    images = step_config(settings).image_token_id
    assert [int((batch["input_ids"] == images).sum()) for batch in batches.values()] == [8, 8, 8, 4]
    assert "pixel_values" not in batches[CACHED]


def test_text_batches_have_prompts_answers_and_padding(settings):
    batch = text_batch(step_config(settings), TextShape((5, 3), 2, 6), 6)
    assert batch["attention_mask"].sum(dim=1).tolist() == [4 + 5, 4 + 3]
    assert batch["prompt_mask"].nonzero().tolist() == [[0, 4], [0, 5], [1, 4], [1, 5]]
    assert (batch["labels"] != -100).sum(dim=1).tolist() == [3, 1]


def test_the_example_of_lightly_computes_our_dino_loss(settings):
    """From equal weights, with the same teacher's temperature: one call per view against one per size."""
    pytest.importorskip("lightly", reason="DINO needs lightly: pip install 'lightly>=1.6'")
    from samf.benchmarks import dino_lines

    encoder, args, views = dino_lines.dino_setup(settings)
    ours = dino_lines.OurStep(copy.deepcopy(encoder), args, views)
    ours.model.teacher_temp = 0.04
    example = dino_lines.ExampleStep(encoder, args, views)
    example.head.load_state_dict(ours.model.student.head.state_dict())
    example.teacher_head.load_state_dict(ours.model.student.head.state_dict())
    assert example() == pytest.approx(ours(), rel=1e-5)


def test_exponents_are_those_of_power_laws():
    sizes = [1, 2, 4, 8]
    assert growth_lines.fitted_exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert growth_lines.last_exponent(sizes, [5 + size**2 for size in sizes]) == pytest.approx(1.717, abs=1e-3)
    assert growth_lines.fitted_exponent(sizes, [0, 0, 0, 0]) == growth_lines.last_exponent(sizes, [1, 1, 0, 0]) == 0


def test_memory_is_measured_since_the_reset():
    def allocate() -> None:
        torch.ones(30_000_000)

    assert growth_lines._measure(allocate).megabytes == pytest.approx(120, abs=20)
    assert growth_lines._measure(lambda: None).megabytes < 20


def test_growth_is_drawn_by_line_and_unit(tmp_path):
    pytest.importorskip("matplotlib")
    figures = [("10 slices", "s", 1.0), ("20 slices", "s", 2.0), ("10 slices", "MB", 5.0), ("20 slices", "MB", 6.0)]
    stage = {"line": "slices", "figures": [dict(zip(("name", "unit", "median"), row, strict=True)) for row in figures]}
    stage["figures"].append({"name": "exponent of time, fitted", "unit": "", "median": 1.0})
    file, image = tmp_path / "growth.json", tmp_path / "growth.svg"
    file.write_text(json.dumps({"command": "growth", "stages": [stage]}), encoding="utf-8")
    assert growth_plot.read_growth(file) == {"slices": {"s": [(10, 1.0), (20, 2.0)], "MB": [(10, 5.0), (20, 6.0)]}}
    growth_plot.main([str(file), str(image)])
    assert image.stat().st_size > 1000
    file.write_text(json.dumps({"command": "model", "stages": []}), encoding="utf-8")
    with pytest.raises(ValueError, match="figures of 'model'; expected those of python -m samf.benchmarks growth"):
        growth_plot.read_growth(file)
