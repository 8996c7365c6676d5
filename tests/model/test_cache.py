"""The cache that grows in place holds what the library's holds, whatever is done to it."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticCache

from samf.model import cache_samf
from samf.model.cache_samf import GrowingLayer, GrowingSlidingWindowLayer, grow_in_place


def states(tokens, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, tokens, 4, generator=generator) for _ in range(2))


@pytest.fixture(params=[None, 8, 1000])
def layers(request, monkeypatch):
    """A layer of each kind, without a window, with one that is passed, and with one that isn't."""
    monkeypatch.setattr(cache_samf, "_SPARE", 3)  # so that buffers are also outgrown
    if request.param is None:
        return GrowingLayer(), DynamicLayer()
    return GrowingSlidingWindowLayer(request.param), DynamicSlidingWindowLayer(request.param)


def same(mine, library):
    assert mine.get_seq_length() == library.get_seq_length()
    assert mine.get_mask_sizes(1) == library.get_mask_sizes(1)
    assert torch.equal(mine.keys, library.keys) and torch.equal(mine.values, library.values)


def test_prompt_and_tokens_are_returned_as_by_the_library(layers):
    mine, library = layers
    for seed, tokens in enumerate([5, 1, 1, 1, 1, 2, 1, 1, 3, 1]):
        for found, expected in zip(
            mine.update(*states(tokens, seed)), library.update(*states(tokens, seed)), strict=True
        ):
            assert torch.equal(found, expected)
        same(mine, library)


def test_beams_and_cropping_change_what_is_appended_to(layers):
    mine, library = layers
    for layer in layers:
        layer.update(*states(4, 0))
        layer.update(*states(1, 1))
        layer.reorder_cache(torch.tensor([1, 1]))
        layer.update(*states(1, 2))
        layer.crop(-2)
        layer.update(*states(1, 3))
        layer.batch_repeat_interleave(2)
        layer.update(*states(1, 4, batch=4))
        layer.batch_select_indices(torch.tensor([0, 3]))
        layer.update(*states(1, 5))
    same(mine, library)


def test_copies_grow_apart(layers):
    """As a cached prompt is copied for each question."""
    mine, library = layers
    for layer in layers:
        layer.update(*states(3, 0))
        layer.update(*states(1, 1))
    copies = copy.deepcopy(mine), copy.deepcopy(library)
    for seed, pair in ((2, layers), (3, copies)):
        for layer in pair:
            layer.update(*states(1, seed))
    same(mine, library)
    same(*copies)


def test_tokens_are_appended_without_a_copy():
    layer = GrowingLayer()
    layer.update(*states(5, 0))
    layer.update(*states(1, 1))
    place = layer.keys.data_ptr()
    for seed in range(20):
        layer.update(*states(1, seed))
    assert layer.keys.data_ptr() == place and layer.get_seq_length() == 26


def test_states_with_gradients_are_the_librarys():
    """Writing into a buffer would change what the backward pass of an earlier token needs."""
    layer = GrowingLayer()
    layer.update(*states(2, 0))
    keys = states(1, 1)[0].requires_grad_()
    found, _ = layer.update(keys, states(1, 1)[1])
    layer.update(*states(1, 2))
    found.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_only_empty_dynamic_caches_are_changed():
    from tiny import tiny_config

    text = tiny_config().text_config
    cache = DynamicCache(config=text)
    grow_in_place(cache)
    assert {type(layer) for layer in cache.layers} <= {GrowingLayer, GrowingSlidingWindowLayer} and cache.layers
    lazy, filled = DynamicCache(), DynamicCache()
    filled.update(*states(2, 0), 0)
    for other in (lazy, filled):
        grow_in_place(other)
        other.update(*states(1, 1), 0)
    assert type(lazy.layers[0]) is GrowingLayer and type(filled.layers[0]) is DynamicLayer
    static = StaticCache(config=text, max_cache_len=8)
    before = [type(layer) for layer in static.layers]
    grow_in_place(static)
    assert [type(layer) for layer in static.layers] == before
