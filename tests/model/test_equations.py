"""The paper's equations by loops over numbers, with weights that hide nothing: drawn biases and norm weights.

A new model's biases are 0 and its norm weights 1: a term that is lost, or a norm that is taken twice, changes nothing
there. Expected values come from the weights, the published sizes and formulas written here in another form.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from tiny import IMAGE_ID, SLICES, image_tokens, tiny_batch, tiny_config, tiny_model
from transformers import GenerationConfig, LogitsProcessor, Phi3ForCausalLM, ViTModel

from samf import SamfConfig, SamfForConditionalGeneration, SamfImageProcessor
from samf.model.modules_samf import SlicePositionEmbedding

HEADS, EPS, WIDTH = 4, 0.1, 24  # an eps that shows, and a width that is no other part's
SMALL = {"aggregator_num_heads": HEADS, "aggregator_layer_norm_eps": EPS, "aggregator_ffn_dim": 20}


def drawn_model(**options) -> SamfForConditionalGeneration:
    """A tiny model in float64 whose biases and norm weights are drawn too."""
    model = tiny_model(**options).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 + ("norm.weight" in name))
    return model


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def linear(layer: torch.nn.Linear, rows: np.ndarray) -> np.ndarray:
    weight, bias = array(layer.weight), array(layer.bias)
    return np.array([[line @ row + shift for line, shift in zip(weight, bias, strict=True)] for row in rows])


def softmax(scores: list[float]) -> np.ndarray:
    exponents = np.exp(np.array(scores) - max(scores))
    return exponents / exponents.sum()


def layer_norm(norm: torch.nn.LayerNorm, rows: np.ndarray) -> np.ndarray:
    centred = [row - sum(row) / len(row) for row in rows]
    scaled = [row / math.sqrt(sum(row**2) / len(row) + EPS) for row in centred]
    return np.array(scaled) * array(norm.weight) + array(norm.bias)


def attend_heads(attention: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Multi-head self-attention of tokens (N, D): each head on its own part of the width."""
    query, key, value = (linear(getattr(attention, f"{name}_proj"), tokens) for name in "qkv")
    width = tokens.shape[1] // HEADS
    mixed = np.zeros_like(value)
    for part in (slice(head * width, (head + 1) * width) for head in range(HEADS)):
        for place in range(len(tokens)):
            weights = softmax([query[place, part] @ other / math.sqrt(width) for other in key[:, part]])
            mixed[place, part] = sum(weight * other for weight, other in zip(weights, value[:, part], strict=True))
    return linear(attention.o_proj, mixed)


def feed_forward(layer: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    return linear(layer.down_proj, np.maximum(linear(layer.up_proj, tokens), 0))


def aggregate(aggregator: torch.nn.Module, slices: np.ndarray, norm: str, pooling: str = "cls") -> np.ndarray:
    """z_3d of eq. 2 for slices (S, D): Vaswani et al. 2017 with the norm after each block, or Xiong et al. 2020 before."""
    tokens = np.concatenate([array(aggregator.cls_token)[0], slices])
    for layer in aggregator.layers:
        first, second = partial(layer_norm, layer.attention_norm), partial(layer_norm, layer.feed_forward_norm)
        if norm == "post":
            tokens = first(tokens + attend_heads(layer.attention, tokens))
            tokens = second(tokens + feed_forward(layer, tokens))
        else:
            tokens = tokens + attend_heads(layer.attention, first(tokens))
            tokens = tokens + feed_forward(layer, second(tokens))
    tokens = tokens if norm == "post" else layer_norm(aggregator.norm, tokens)
    read_out = tokens[0] if pooling == "cls" else np.concatenate([tokens[0], tokens[1:].max(axis=0)])
    return linear(aggregator.projection, read_out[None])[0]


def places(embedding: SlicePositionEmbedding, planes: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Plane embedding plus W_depth of 16 waves that turn by half a circle · √2^k over the field: (S, D)."""
    turned = [np.exp(1j * np.pi * positions), np.exp(1j * np.pi * math.sqrt(2) * positions)]
    while len(turned) < 16:
        turned.append(turned[-2] ** 2)  # twice the angle
    waves = np.concatenate([np.imag(turned), np.real(turned)]).T
    return array(embedding.plane.weight)[planes] + waves @ array(embedding.depth.weight).T


def fuse(model: SamfForConditionalGeneration, slices, volume, text, scale: float) -> np.ndarray:
    """Equations 3 to 12 for one volume: slices (S, D), z_3d and the kept text (T, D) to image tokens (1 or S, D)."""
    fusion = model.model.fusion
    f2d, f3d = linear(fusion.project_slices, slices), linear(fusion.project_volume, volume[None])[0]
    ftext = linear(fusion.project_text, text) if len(text) else np.zeros((0, WIDTH))

    def weigh(query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.zeros(WIDTH)
        weights = softmax([query @ row * scale for row in rows])
        return sum(weight * row for weight, row in zip(weights, rows, strict=True))

    if model.config.fusion_type == "slice_tokens":
        return linear(fusion.mix, np.array([np.concatenate([f3d, row, weigh(row, ftext)]) for row in f2d]))
    parts = [f3d, weigh(f3d, f2d), weigh(f3d, ftext)]
    if model.config.fusion_type == "ao2d":
        parts.append(sum((weigh(token, f2d) for token in ftext), np.zeros(WIDTH)) / max(len(ftext), 1))
    return linear(fusion.mix, np.concatenate(parts)[None])


def embeddings_read(model: SamfForConditionalGeneration, **inputs) -> torch.Tensor:
    """What the language model is given: (B, T, text width)."""
    read = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return read[0]


@pytest.mark.parametrize("pooling", ["cls", "cls_max"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_volume_embedding_and_its_findings_are_equation_2(norm, pooling):
    """Padded slices take no part; every bias, norm and eps does."""
    options = {**SMALL, "aggregator_norm": norm, "slice_position_scope": "none", "finding_names": ["a", "b", "c"]}
    options["aggregator_pooling"] = pooling
    model = drawn_model(**options)
    slices = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    with torch.no_grad():
        output = model(slice_embeddings=slices, slice_mask=mask)
    for row in range(2):
        expected = aggregate(model.model.aggregator, array(slices[row][mask[row]]), norm, pooling)
        np.testing.assert_allclose(array(output.image_outputs.pooler_output[row, 0]), expected, rtol=1e-9, atol=1e-12)
        logits = linear(model.model.finding_head, expected[None])[0]
        np.testing.assert_allclose(array(output.finding_logits[row]), logits, rtol=1e-9, atol=1e-12)


def test_a_row_without_a_volume_has_finite_gradients():
    model = drawn_model(**SMALL, aggregator_pooling="cls_max", finding_names=["a"])
    slices = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    output = model(slice_embeddings=slices, slice_mask=torch.tensor([[True] * 3, [False] * 3]))
    output.finding_logits.sum().backward()
    assert torch.isfinite(output.finding_logits).all() and torch.isfinite(slices.grad).all()
    assert slices.grad[0].any() and not slices.grad[1].any()


@pytest.mark.parametrize(
    ("fusion_type", "scale", "scope"),
    [
        ("samf", None, "none"),
        ("samf", "rsqrt", "all"),
        ("ao2d", None, "all"),
        ("ao2d", "rsqrt", "aggregator"),
        ("slice_tokens", None, "aggregator"),
        ("slice_tokens", "rsqrt", "all"),
    ],
)
def test_the_image_tokens_are_the_papers_equations(fusion_type, scale, scope):
    """From z_2d to what the language model reads. Scores are divided by √d or by nothing; a prompt without text adds zeros."""
    options = {"fusion_type": fusion_type, "fusion_scale": scale, "slice_position_scope": scope, "fusion_dim": WIDTH}
    model, batch = drawn_model(**SMALL, **options), tiny_batch(fusion_type, rows=3)
    generator = torch.Generator().manual_seed(7)
    facts = {
        "slice_planes": torch.randint(0, 3, (3, SLICES), generator=generator),
        "slice_positions": torch.randint(1, 64, (3, SLICES), generator=generator) / 64,
    }
    slices = torch.randn(3, SLICES, 32, generator=generator).double()
    prompt = (batch["labels"] == -100) & (batch["input_ids"] != IMAGE_ID)
    prompt[1] &= prompt[1].cumsum(0) == 1  # one token
    prompt[2] = False
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "prompt_mask": prompt}
    read = embeddings_read(model, **inputs, **facts, slice_embeddings=slices)
    words = model.get_input_embeddings()(batch["input_ids"])
    for row in range(3):
        plain = placed = array(slices[row])
        if scope != "none":
            planes, positions = (facts[f"slice_{name}"][row].numpy() for name in ("planes", "positions"))
            placed = plain + places(model.model.slice_position, planes, positions.astype(float))
        volume = aggregate(model.model.aggregator, placed, "post")
        fused = placed if scope == "all" else plain
        text = array(words[row][prompt[row]])
        expected = fuse(model, fused, volume, text, 1.0 if scale is None else 1 / math.sqrt(WIDTH))
        count = image_tokens(fusion_type)
        found = array(read[row, :count])
        # The waves are float32.
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-4, atol=1e-4)
        assert torch.equal(read[row, count:], words[row, count:])


def test_depth_is_read_as_sines_and_cosines_in_half_octaves():
    """The slowest wave turns by half a circle from one end of the field to the other; every second one doubles its angle."""
    embedding = SlicePositionEmbedding(32)
    with torch.no_grad():
        embedding.plane.weight.zero_()
        embedding.depth.weight.copy_(torch.eye(32))
    positions = torch.tensor([[0, 0.25, 0.5, 1, 0.371, 0.371 * math.sqrt(0.5)]])
    waves = array(embedding(torch.zeros(1, 6, dtype=torch.long), positions)[0])
    sine, cosine = waves[:, :16], waves[:, 16:]
    half = math.sqrt(0.5)
    np.testing.assert_allclose(sine[:4, 0], [0, half, 1, 0], atol=1e-6)
    np.testing.assert_allclose(cosine[:4, 0], [1, half, 0, -1], atol=1e-6)
    np.testing.assert_allclose(waves[5, [1, 17]], waves[4, [0, 16]], atol=1e-6)  # √2 times as fast
    for wave in range(14):
        np.testing.assert_allclose(sine[:, wave + 2], 2 * sine[:, wave] * cosine[:, wave], atol=1e-3)
        np.testing.assert_allclose(cosine[:, wave + 2], cosine[:, wave] ** 2 - sine[:, wave] ** 2, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_slices_of_unknown_place_count_as_the_image_processors(count):
    """Equal thirds, one a plane, each slice in the middle of its share."""
    made = SamfImageProcessor(slices_per_plane=count, size=8)(np.zeros((12, 12, 12), np.int16))
    slices = torch.randn(1, 3 * count, 32, generator=torch.Generator().manual_seed(0)).double()
    model = drawn_model()
    with torch.no_grad():
        without = model.get_image_features(slice_embeddings=slices).pooler_output
        places = {name: made[name] for name in ("slice_planes", "slice_positions")}
        torch.testing.assert_close(model.get_image_features(slice_embeddings=slices, **places).pooler_output, without)


def test_mean_pooling_averages_over_every_token_of_the_slice_encoder():
    model, pixels = drawn_model(slice_pooling="mean"), tiny_batch("ao2d")["pixel_values"].double()
    with torch.no_grad():
        found = model.get_image_features(pixels).last_hidden_state.flatten(0, 1)
        tokens = array(model.model.slice_encoder(pixels.flatten(0, 1)).last_hidden_state)  # CLS and four patches
    assert tokens.shape[1] == 5
    np.testing.assert_allclose(array(found), sum(tokens[:, place] for place in range(5)) / 5, rtol=1e-9, atol=1e-12)


def test_a_prompt_without_a_volume_weighs_no_slice():
    """Softmax over nothing is zero, not an even share of padding."""
    model, batch = tiny_model(), tiny_batch("ao2d")
    batch["input_ids"][1, : image_tokens("ao2d")] = 7
    mask = torch.tensor([[True] * SLICES, [False] * SLICES])
    with torch.no_grad():
        weights = model(**batch, slice_mask=mask, output_slice_attentions=True).slice_attentions
    torch.testing.assert_close(weights.alpha[0].sum(), torch.tensor(1.0))
    assert weights.alpha[1].eq(0).all() and weights.gamma[1].eq(0).all()


def test_only_the_logits_that_are_asked_for_are_made():
    model, batch = tiny_model(), tiny_batch("ao2d")
    del batch["labels"]
    with torch.no_grad():
        whole = model(**batch).logits
        for keep, expected in (
            (0, whole),
            (1, whole[:, -1:]),
            (5, whole[:, -5:]),
            (torch.tensor([2, 9]), whole[:, [2, 9]]),
        ):
            torch.testing.assert_close(model(**batch, logits_to_keep=keep).logits, expected)


def test_an_embedding_matrix_never_loses_the_placeholders_row():
    model = tiny_model()
    with pytest.raises(ValueError, match=f"placeholder's row {IMAGE_ID}"):
        model.resize_token_embeddings(IMAGE_ID)  # rows 0 to IMAGE_ID - 1
    assert model.get_input_embeddings().num_embeddings == 99
    model.resize_token_embeddings(IMAGE_ID + 1)
    with torch.no_grad():
        batch = tiny_batch("ao2d")
        logits = model(batch["input_ids"].clamp(max=IMAGE_ID)[:, : image_tokens("ao2d")], batch["pixel_values"]).logits
    assert logits.shape[-1] == IMAGE_ID + 1


@pytest.mark.parametrize("path", ["attention", "feed-forward"])
def test_dropout_falls_on_each_step_of_the_aggregator(path):
    """As in Vaswani et al. and torch's layer: on a block's inner values and on its output, so that kept ones are scaled twice.

    Each block is set to hand a one through: at p = 0.5 it becomes 0 or 2 with one dropout, 0 or 4 with two.
    """
    layer = tiny_model(aggregator_norm="pre", aggregator_dropout=0.5, aggregator_ffn_dim=32).model.aggregator.layers[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        first, second = (
            (layer.attention.v_proj, layer.attention.o_proj)
            if path == "attention"
            else (layer.up_proj, layer.down_proj)
        )
        first.bias.fill_(1)
        second.weight.copy_(torch.eye(32))
        torch.manual_seed(0)
        trained = layer.train()(torch.zeros(256, 1, 32))  # one token: its attention is 1
        kept = layer.eval()(torch.zeros(256, 1, 32))
    assert trained.unique().tolist() == [0, 4]
    assert (trained == 4).float().mean() == pytest.approx(0.25, abs=0.05)
    assert kept.eq(1).all()


class Always(LogitsProcessor):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


def test_a_new_model_stops_at_every_end_token_of_its_language_model(tmp_path):
    """Phi-3's generation_config.json names three, its configuration one."""
    config = tiny_config()
    ViTModel(config.vision_config).save_pretrained(tmp_path / "encoder")
    text = Phi3ForCausalLM(config.text_config)
    text.generation_config = GenerationConfig(eos_token_id=[3, 17, 23], pad_token_id=1, bos_token_id=2)
    text.save_pretrained(tmp_path / "text")
    model = SamfForConditionalGeneration.from_component_pretrained(
        str(tmp_path / "encoder"), str(tmp_path / "text"), image_token_id=IMAGE_ID, num_image_tokens=4, volume_dim=16
    )
    batch = tiny_batch("ao2d", rows=1)
    del batch["labels"]
    made = {}
    for token in (3, 17, 23, 30):
        ids = model.generate(**batch, max_new_tokens=3, do_sample=False, logits_processor=[Always(token)])
        made[token] = ids.shape[1] - batch["input_ids"].shape[1]
    assert made == {3: 1, 17: 1, 23: 1, 30: 3}
    model.save_pretrained(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [3, 17, 23]


def test_the_papers_defaults():
    """Aggregator, fusion and backbones as published; the two settings of our own are the fusion's text and the places."""
    config = SamfConfig()
    aggregator = {
        "num_layers": 2,
        "num_heads": 8,
        "ffn_dim": 1024,
        "activation": "relu",
        "dropout": 0.1,
        "layer_norm_eps": 1e-5,
        "norm": "post",
    }
    assert {name: getattr(config, f"aggregator_{name}") for name in aggregator} == aggregator
    assert (config.volume_dim, config.num_image_tokens, config.image_token_id) == (256, 256, 32011)
    assert (config.fusion_type, config.fusion_scale, config.project_text, config.extra_sources) == (
        "ao2d",
        None,
        True,
        {},
    )
    assert (config.fusion_text_scope, config.slice_position_scope) == ("prompt", "aggregator")
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (3072, 32, 32)
    assert (text.intermediate_size, text.vocab_size, text.max_position_embeddings) == (8192, 32064, 4096)
    assert text.sliding_window == 2047  # of Phi-3-mini-4k-instruct's config.json
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (768, 12, 12)
    assert (vision.intermediate_size, vision.image_size, vision.patch_size) == (3072, 224, 16)
