"""Further modalities in the fusion: named, projected, appended, masked when absent."""

import numpy as np
import pytest
import torch
from tiny import FUSION_TYPES, tiny_batch, tiny_config, tiny_model

from samf import SamfForConditionalGeneration
from samf.model.modules_samf import SamfFusion

SOURCES = {"prior_volume": 16, "age_sex": 2}
ROWS = [{"prior_volume": torch.linspace(-1, 1, 16), "age_sex": [0.6, 1.0]}, {"age_sex": [0.4, 0.0]}]


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_their_projections_join_the_concatenation(fusion_type):
    """The mixed vector is the paper's plus, for each present source, its columns of W_fusion times its projection."""
    torch.manual_seed(0)
    model = tiny_model(fusion_type=fusion_type, extra_sources=SOURCES)
    fusion = model.model.fusion.double()
    plain = SamfFusion(tiny_config(fusion_type=fusion_type)).double()
    paper = fusion.mix.in_features - 2 * 32
    state = {key: value for key, value in fusion.state_dict().items() if not key.startswith("project_extra")}
    plain.load_state_dict({**state, "mix.weight": state["mix.weight"][:, :paper]})
    slices, volume, text = (torch.randn(shape).double() for shape in ((2, 5, 32), (2, 16), (2, 7, 32)))
    masks = torch.ones(2, 5).bool(), torch.ones(2, 7).bool()
    packed = model.pack_extra_sources(ROWS)
    with torch.no_grad():
        expected, _ = plain(slices, volume, text, *masks)
        actual, _ = fusion(slices, volume, text, *masks, packed["extra_values"].double(), packed["extra_mask"])
    weights = fusion.mix.weight.detach().numpy()[:, paper:]
    for row, sources in enumerate(ROWS):
        added = np.zeros(32)
        for place, name in enumerate(sorted(SOURCES)):
            if name in sources:
                layer = fusion.project_extra[name]
                weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
                vector = weight @ np.asarray(sources[name], dtype=np.float64) + bias
                added += weights[:, 32 * place : 32 * (place + 1)] @ vector
        np.testing.assert_allclose(actual[row].numpy(), expected[row].numpy() + added, rtol=1e-6, atol=1e-6)


def test_absent_is_absent_whatever_stands_there():
    """A masked vector, NaN included, changes neither logits nor gradients; none passed at all is the same as all masked."""
    model, batch = tiny_model(extra_sources=SOURCES), tiny_batch("ao2d")
    absent = {"extra_values": torch.full((2, 18), torch.nan), "extra_mask": torch.zeros(2, 2).bool()}
    output = model(**batch, **absent)
    output.loss.backward()
    assert torch.equal(output.logits, model(**batch).logits)
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_each_volume_sees_its_own_and_decoding_keeps_them():
    model, batch = tiny_model(extra_sources=SOURCES), tiny_batch("ao2d", answer=0)
    batch.pop("labels")
    packed = model.pack_extra_sources(ROWS)
    with torch.no_grad():
        both = model(**batch, **packed).logits
        for row in range(2):
            one = {key: value[row : row + 1] for key, value in (batch | packed).items()}
            torch.testing.assert_close(model(**one).logits, both[row : row + 1], rtol=0, atol=1e-5)
        assert (both - model(**batch).logits).abs().amax(dim=(1, 2)).min() > 1e-3
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for strategy in ({}, {"num_beams": 3}):
        cached = model.generate(**batch, **packed, **greedy, **strategy)
        assert torch.equal(model.generate(**batch, **packed, **greedy, **strategy, use_cache=False), cached)


def test_the_order_of_names_survives_saving(tmp_path):
    model, batch = tiny_model(extra_sources=SOURCES), tiny_batch("ao2d")
    model.save_pretrained(tmp_path)
    again = SamfForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**batch, **model.pack_extra_sources(ROWS)).logits
        assert torch.equal(again(**batch, **again.pack_extra_sources(ROWS)).logits, expected)


def test_without_sources_the_parameters_are_the_papers():
    assert set(tiny_model().state_dict()) == set(tiny_model(extra_sources={}).state_dict())
    assert not any("extra" in name for name in tiny_model().state_dict())


def test_wrong_sources_are_errors_that_say_what_was_found():
    model, batch = tiny_model(extra_sources=SOURCES), tiny_batch("ao2d")
    for row, message in (
        ({"weight": [1.0]}, "weight"),
        ({"age_sex": [1.0]}, "1 values"),
        ({"age_sex": [1.0, float("nan")]}, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            model.pack_extra_sources([row])
    with pytest.raises(ValueError, match=r"\(2, 18\)"):
        model(**batch, extra_values=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 0\)"):
        tiny_model()(**batch, extra_values=torch.zeros(2, 3))
    for sources in ({"a.b": 2}, {"a": 0}):
        with pytest.raises(ValueError, match="extra_sources"):
            tiny_config(extra_sources=sources)
