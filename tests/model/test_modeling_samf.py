"""The model's equations, invariants and behaviour as a member of the library."""

import json

import numpy as np
import pytest
import torch
from tiny import FUSION_TYPES, IMAGE_ID, SLICES, image_tokens, tiny_batch, tiny_config, tiny_model, tiny_processor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, ViTConfig, ViTModel

from samf import SamfConfig, SamfForConditionalGeneration, SamfModel
from samf.model.image_tokens_samf import fusion_text_mask, place_image_tokens
from samf.model.losses_samf import finding_loss
from samf.model.modules_samf import SamfFusion, SlicePositionEmbedding, masked_mean
from samf.model.workarounds_samf import FewRowsLinear


def softmax(scores: list[float]) -> np.ndarray:
    exponents = np.exp(np.array(scores) - max(scores))
    return exponents / exponents.sum()


def linear(layer: torch.nn.Module, rows: np.ndarray) -> np.ndarray:
    if isinstance(layer, torch.nn.Identity):
        return rows
    weight, bias = (parameter.detach().double().numpy() for parameter in (layer.weight, layer.bias))
    return np.array(
        [
            [sum(w * x for w, x in zip(line, row, strict=True)) + b for line, b in zip(weight, bias, strict=True)]
            for row in rows
        ]
    )


def fuse_by_loops(fusion: SamfFusion, factor, slices, volume, text, keep_slices, keep_text) -> np.ndarray:
    """Equations 3 to 12 of the paper for one volume, written as sums over kept slices and tokens."""
    f2d = linear(fusion.project_slices, slices)[keep_slices]
    f3d = linear(fusion.project_volume, volume[None])[0]
    ftext = linear(fusion.project_text, text)[keep_text]

    def weigh(query, rows):
        weights = softmax([sum(q * r for q, r in zip(query, row, strict=True)) * factor for row in rows])
        return sum(weight * row for weight, row in zip(weights, rows, strict=True))

    if fusion.fusion_type == "slice_tokens":
        return linear(fusion.mix, np.array([np.concatenate([f3d, row, weigh(row, ftext)]) for row in f2d]))
    parts = [f3d, weigh(f3d, f2d), weigh(f3d, ftext)]
    if fusion.fusion_type == "ao2d":
        parts.append(sum(weigh(token, f2d) for token in ftext) / len(ftext))
    return linear(fusion.mix, np.concatenate(parts)[None])


@pytest.mark.parametrize("scale", [None, "rsqrt"])
@pytest.mark.parametrize("project_text", [True, False])
@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_fusion_is_the_papers_equations(fusion_type, project_text, scale):
    """Masked slices and tokens take no part; eq. 11 averages over the prompt's tokens only."""
    torch.manual_seed(3)
    fusion = SamfFusion(tiny_config(fusion_type=fusion_type, project_text=project_text, fusion_scale=scale)).double()
    slices, volume, text = (torch.randn(shape).double() for shape in ((2, 5, 32), (2, 16), (2, 7, 32)))
    slice_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    text_mask = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]]).bool()
    with torch.no_grad():
        tokens, _ = fusion(slices, volume, text, slice_mask, text_mask)
    factor = 1 / np.sqrt(32) if scale else 1.0
    for row in range(2):
        parts = (part[row].numpy() for part in (slices, volume, text, slice_mask, text_mask))
        expected = fuse_by_loops(fusion, factor, *parts)
        actual = tokens[row][slice_mask[row]] if fusion_type == "slice_tokens" else tokens[row]
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_aggregator_is_torchs_transformer_encoder(norm):
    """The published aggregator is `nn.TransformerEncoder` with a CLS token; ours gives the same for the same weights."""
    aggregator = tiny_model(aggregator_norm=norm, aggregator_dropout=0.0).model.aggregator
    reference = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(32, 8, 1024, 0.0, "relu", batch_first=True, norm_first=norm == "pre"),
        2,
        norm=torch.nn.LayerNorm(32) if norm == "pre" else None,
        enable_nested_tensor=False,
    ).eval()
    names = {"self_attn.out_proj": "attention.o_proj", "linear1": "up_proj", "linear2": "down_proj"}
    names |= {"norm1": "attention_norm", "norm2": "feed_forward_norm"}
    with torch.no_grad():
        for theirs, ours in zip(reference.layers, aggregator.layers, strict=True):
            for kind in ("weight", "bias"):
                parts = [getattr(getattr(ours.attention, f"{part}_proj"), kind) for part in "qkv"]
                getattr(theirs.self_attn, f"in_proj_{kind}").copy_(torch.cat(parts))
                for their_name, our_name in names.items():
                    getattr(theirs.get_submodule(their_name), kind).copy_(getattr(ours.get_submodule(our_name), kind))
        slices, mask = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
        tokens = torch.cat([aggregator.cls_token.expand(2, -1, -1), slices], dim=1)
        padding = torch.cat([torch.zeros(2, 1).bool(), ~mask], dim=1)
        expected = aggregator.projection(reference(tokens, src_key_padding_mask=padding)[:, 0])
        torch.testing.assert_close(aggregator(slices, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["labels", "prompt_mask", "both"])
@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_no_logit_depends_on_a_later_answer_token(fusion_type, given):
    model, batch = tiny_model(fusion_type=fusion_type), tiny_batch(fusion_type)
    batch["prompt_mask"] = batch["labels"] == -100
    if given != "both":
        batch.pop("labels" if given == "prompt_mask" else "prompt_mask")
    first = batch["input_ids"].shape[1] - 5
    with torch.no_grad():
        before = model(**batch).logits
        for position in range(first, first + 5):
            changed = {key: value.clone() for key, value in batch.items()}
            changed["input_ids"][:, position] = (changed["input_ids"][:, position] - 6 + 11) % 93 + 6
            after = model(**changed).logits
            assert torch.equal(before[:, :position], after[:, :position])
            assert not torch.equal(before[:, position:], after[:, position:])


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_the_published_text_scope_leaks_the_answer(fusion_type):
    """What the test above guards against: with the published scope, the last answer token moves the logits before it."""
    model, batch = tiny_model(fusion_type=fusion_type, fusion_text_scope="sequence"), tiny_batch(fusion_type)
    changed = batch["input_ids"].clone()
    changed[:, -1] = (changed[:, -1] - 6 + 11) % 93 + 6
    with torch.no_grad():
        before, after = model(**batch).logits, model(**{**batch, "input_ids": changed}).logits
    assert not torch.equal(before[:, :-1], after[:, :-1])


def test_prompt_rule():
    """Explicit mask, else tokens before the first label, else all; never images or padding; made tokens never count."""
    image = torch.tensor([[0, 1, 1, 0, 0, 0, 0]]).bool()
    attention = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, -100, -100, 7, 8]])
    prompt = torch.tensor([[1, 1, 1, 1, 0, 0]]).bool()

    def positions(**given):
        return fusion_text_mask("prompt", image, **given)[0].nonzero().flatten().tolist()

    assert positions() == [0, 3, 4, 5, 6]
    assert positions(attention_mask=attention) == [3, 4, 5, 6]
    assert positions(attention_mask=attention, labels=labels) == [3, 4]
    assert positions(attention_mask=attention, labels=labels, prompt_mask=prompt) == [3]
    sequence = fusion_text_mask("sequence", image, attention_mask=attention, labels=labels, prompt_mask=prompt)
    assert sequence[0].tolist() == [True] * 6 + [False]
    with pytest.raises(ValueError, match="prompt_mask has shape"):
        fusion_text_mask("prompt", image, prompt_mask=torch.ones(1, 9).bool())


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_left_padding_changes_nothing(fusion_type):
    model, batch = tiny_model(fusion_type=fusion_type), tiny_batch(fusion_type)
    padded = dict(batch)
    for key, value in (("input_ids", 1), ("attention_mask", 0), ("labels", -100)):
        padded[key] = torch.nn.functional.pad(batch[key], (4, 0), value=value)
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain, left = model(**batch), model(**padded)
    torch.testing.assert_close(left.logits[:, 4:], plain.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(left.loss, plain.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_black_and_white_volumes_differ(fusion_type):
    model, batch = tiny_model(fusion_type=fusion_type), tiny_batch(fusion_type)
    shape = batch["pixel_values"].shape
    with torch.no_grad():
        black = model(**{**batch, "pixel_values": torch.full(shape, -2.0)}).logits
        white = model(**{**batch, "pixel_values": torch.full(shape, 2.0)}).logits
    after_images = image_tokens(fusion_type)
    assert (black - white)[:, after_images:].abs().max() > 1e-3


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@pytest.mark.parametrize(
    "strategy",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}, {"num_beams": 2, "use_cache": False}],
)
def test_every_way_of_decoding_reads_one_fused_vector(fusion_type, strategy):
    """The fused tokens don't move while tokens are made: with the cache on or off, in beams, with looked-up candidates."""
    model, batch = tiny_model(fusion_type=fusion_type), tiny_batch(fusion_type, rows=1, answer=0)
    batch.pop("labels")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    fused = []
    model.model.fusion.register_forward_hook(lambda module, inputs, output: fused.append(output[0][:1]))
    model.generate(**batch, **options, **strategy)
    assert all(torch.allclose(tokens, fused[0], atol=1e-6) for tokens in fused)
    assert len(fused) == 1 or strategy.get("use_cache") is False
    if strategy != {"num_beams": 3} and strategy.get("num_beams") is None:
        assert torch.equal(model.generate(**batch, **options, **strategy), model.generate(**batch, **options))


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_a_left_padded_batch_generates_what_each_prompt_generates_alone(fusion_type):
    model = tiny_model(fusion_type=fusion_type)
    long = tiny_batch(fusion_type, rows=1, prompt=9, answer=0)
    short = tiny_batch(fusion_type, rows=1, prompt=4, answer=0, seed=2)
    both = {
        "input_ids": torch.cat([long["input_ids"], torch.nn.functional.pad(short["input_ids"], (5, 0), value=1)]),
        "attention_mask": torch.cat([long["attention_mask"], torch.nn.functional.pad(short["attention_mask"], (5, 0))]),
        "pixel_values": torch.cat([long["pixel_values"], short["pixel_values"]]),
    }
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(**both, **options)[:, -8:]
    for row, single in enumerate((long, short)):
        single.pop("labels")
        assert torch.equal(together[row], model.generate(**single, **options)[0, -8:])


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_padded_slices_take_no_part(fusion_type):
    """A batch of volumes with different slice counts gives each volume what it gets alone."""
    model = tiny_model(fusion_type=fusion_type, slice_position_scope="all")
    planes, positions = torch.tensor([[0, 0, 1, 1, 2, 2]]), torch.tensor([[0.25, 0.75] * 3])
    one = {"pixel_values": torch.randn(1, 6, 3, 32, 32), "slice_planes": planes, "slice_positions": positions}
    padded = {
        "pixel_values": torch.cat([one["pixel_values"], torch.randn(1, 3, 3, 32, 32)], dim=1),
        "slice_planes": torch.nn.functional.pad(planes, (0, 3)),
        "slice_positions": torch.nn.functional.pad(positions, (0, 3)),
        "slice_mask": torch.tensor([[True] * 6 + [False] * 3]),
    }
    text = {key: value[:1] for key, value in tiny_batch(fusion_type).items() if key != "pixel_values"}
    with torch.no_grad():
        torch.testing.assert_close(model(**text, **padded).logits, model(**text, **one).logits, rtol=0, atol=1e-5)


def test_place_image_tokens_gives_each_placeholder_its_slice():
    embeds = torch.zeros(2, 6, 1)
    image_mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1]]).bool()
    slice_mask = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
    tokens = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
    placed = place_image_tokens(embeds, image_mask, tokens, slice_mask)[..., 0]
    assert placed.tolist() == [[0, 1, 2, 3, 0, 0], [0, 0, 0, 5, 0, 6]]


def test_without_positions_the_slices_are_a_set_and_with_them_a_sequence():
    batch = tiny_batch("ao2d")
    shuffled = {
        **batch,
        "pixel_values": batch["pixel_values"][:, torch.randperm(SLICES, generator=torch.Generator().manual_seed(0))],
    }
    with torch.no_grad():
        for scope, same in (("none", True), ("aggregator", False), ("all", False)):
            model = tiny_model(slice_position_scope=scope)
            assert torch.allclose(model(**batch).logits, model(**shuffled).logits, atol=1e-5) is same


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_a_prompt_without_a_volume_in_a_mixed_batch(fusion_type):
    """Its logits are those of a text-only call, and its neighbour's those of a call with the volume alone."""
    model, batch = tiny_model(fusion_type=fusion_type), tiny_batch(fusion_type)
    batch["input_ids"][1, : image_tokens(fusion_type)] = 7
    mixed = {**batch, "slice_mask": torch.tensor([[True] * SLICES, [False] * SLICES])}
    with torch.no_grad():
        logits = model(**mixed).logits
        alone = model(**{key: value[:1] for key, value in batch.items()}).logits
        text = model(input_ids=batch["input_ids"][1:], attention_mask=batch["attention_mask"][1:]).logits
    torch.testing.assert_close(logits[:1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1:], text, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_a_wrong_number_of_placeholders_is_an_error_that_gives_both_numbers(fusion_type):
    model, batch = tiny_model(fusion_type=fusion_type), tiny_batch(fusion_type)
    expected = image_tokens(fusion_type)
    batch["input_ids"][0, 0] = 7
    with pytest.raises(ValueError, match=rf"hold \[{expected - 1}, {expected}\].*give \[{expected}, {expected}\]"):
        model(**batch)
    with pytest.raises(ValueError, match="1 volumes for 2 prompts"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:1]})


def test_chunks_record_the_hidden_states_of_all_slices():
    pixels = tiny_batch("ao2d")["pixel_values"]
    with torch.no_grad():
        expected, found = (
            tiny_model(vision_chunk_size=size).model.encode_slices(pixels, output_hidden_states=True)
            for size in (None, 5)
        )
    assert len(found.hidden_states) == len(expected.hidden_states) > 1 and found.attentions is None
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)


def test_chunks_embeddings_and_attention_implementations_give_the_same_logits():
    batch = tiny_batch("ao2d")
    with torch.no_grad():
        expected = tiny_model()(**batch).logits
        assert torch.allclose(tiny_model(vision_chunk_size=5)(**batch).logits, expected, atol=1e-5)
        eager = tiny_model()
        eager.set_attn_implementation("eager")
        assert torch.allclose(eager(**batch).logits, expected, atol=1e-5)
        model = tiny_model()
        embeddings = model.get_image_features(batch.pop("pixel_values")).last_hidden_state
        assert torch.allclose(model(**batch, slice_embeddings=embeddings).logits, expected, atol=1e-5)


def test_slice_attentions_are_distributions_over_what_is_kept():
    for fusion_type in FUSION_TYPES:
        model, batch = tiny_model(fusion_type=fusion_type), tiny_batch(fusion_type)
        with torch.no_grad():
            weights = model(**batch, output_slice_attentions=True).slice_attentions
        prompt = (batch["labels"] == -100) & (batch["input_ids"] != IMAGE_ID)
        for name, value in weights.items():
            torch.testing.assert_close(value.sum(-1), torch.ones(value.shape[:-1]))
            if name in ("beta", "slice_text"):
                assert value.masked_select(~prompt[:, None]).eq(0).all()
        assert set(weights) == {"samf": {"alpha", "beta"}, "ao2d": {"alpha", "beta", "gamma"}}.get(
            fusion_type, {"slice_text"}
        )


def test_finding_loss_by_hand_and_in_the_models_loss():
    """A known finding counts 1/L of its row, whatever else is known; a row counts by its share of the label tokens."""
    logits, targets = torch.tensor([[0.5, -1.0], [2.0, 3.0]]), torch.tensor([[1, -100], [0, 1]])
    first = -np.log(1 / (1 + np.exp(-0.5))) / 2
    second = -(np.log(1 - 1 / (1 + np.exp(-2.0))) + np.log(1 / (1 + np.exp(-3.0)))) / 2
    assert finding_loss(logits, targets).item() == pytest.approx((first + second) / 2, rel=1e-6)
    weighed = finding_loss(logits, targets, torch.tensor([0.25, 0.75])).item()
    assert weighed == pytest.approx(0.25 * first + 0.75 * second, rel=1e-6)
    assert finding_loss(logits, torch.full((2, 2), -100)).item() == 0

    model, batch = tiny_model(finding_names=["a", "b"], finding_loss_weight=0.3), tiny_batch("ao2d")
    batch["labels"][0, :-2] = -100  # 2 label tokens and 5
    with torch.no_grad():
        text = model(**batch)
        both = model(**batch, finding_targets=targets)
        alone = model(pixel_values=batch["pixel_values"], finding_targets=targets)
        half = model(**batch, finding_targets=targets, num_items_in_batch=torch.tensor(14))
        old_name = model(**batch, finding_labels=targets)
    rows = [finding_loss(text.finding_logits[row : row + 1], targets[row : row + 1]) for row in range(2)]
    torch.testing.assert_close(both.loss, text.loss + 0.3 * (2 * rows[0] + 5 * rows[1]) / 7)
    torch.testing.assert_close(alone.loss, 0.3 * (rows[0] + rows[1]) / 2)
    assert alone.logits is None and torch.equal(old_name.loss, both.loss)
    torch.testing.assert_close(half.loss, both.loss / 2)  # two such micro-batches make one batch's loss


def test_finding_targets_that_mean_nothing_are_errors():
    batch, targets = tiny_batch("ao2d"), torch.tensor([[1, 0], [0, 1]])
    text = {"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_ID, 7), "labels": batch["labels"]}
    model = tiny_model(finding_names=["a", "b"])
    with pytest.raises(ValueError, match="0 names"):
        tiny_model()(**batch, finding_targets=targets)
    with pytest.raises(ValueError, match=r"\(2, 1\), and config.finding_names has 2"):
        model(**batch, finding_targets=targets[:, :1])
    with pytest.raises(ValueError, match="other values"):
        model(**batch, finding_targets=targets - 1)
    with pytest.raises(ValueError, match="without a volume"):
        model(**text, finding_targets=targets)
    assert model(**text, finding_targets=torch.full((2, 2), -100)).loss == model(**text).loss


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_every_parameter_gets_a_gradient_with_and_without_checkpointing(fusion_type):
    batch = tiny_batch(fusion_type) | {"finding_targets": torch.tensor([[1, 0], [0, 1]])}
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(fusion_type=fusion_type, finding_names=["a", "b"], aggregator_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_save_and_load_keep_every_weight_and_setting(tmp_path):
    model = tiny_model(
        fusion_type="slice_tokens", finding_names=["a"], slice_position_scope="all", fusion_scale="rsqrt"
    )
    model.save_pretrained(tmp_path)
    again = SamfForConditionalGeneration.from_pretrained(tmp_path)
    for name in set(SamfConfig.__init__.__annotations__) - {"kwargs"}:
        ours, theirs = getattr(model.config, name), getattr(again.config, name)
        if name.endswith("_config"):  # loading enters the weights' dtype
            ours, theirs = ({**config.to_dict(), "dtype": None} for config in (ours, theirs))
        assert ours == theirs, name
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    batch = tiny_batch("slice_tokens")
    with torch.no_grad():
        expected = model(**batch).logits
        for auto in (AutoModel, AutoModelForCausalLM):
            assert torch.equal(auto.from_pretrained(tmp_path)(**batch).logits, expected)
        base = SamfModel.from_pretrained(tmp_path)
        torch.testing.assert_close(model.lm_head(base(**batch).last_hidden_state), expected)


def test_a_folder_names_the_class_that_was_saved_as_automodels(tmp_path):
    """A base model by itself too; it leaves no trace in what the whole model saves later."""
    model = tiny_model()
    for name, part in (("base", model.model), ("whole", model)):
        part.save_pretrained(tmp_path / name)
        auto_map = json.loads((tmp_path / name / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModel"] == f"modeling_samf.{type(part).__name__}"


def test_new_model_from_components_keeps_their_weights(tmp_path):
    config = tiny_config()
    encoder, text = (
        ViTModel(ViTConfig(**config.vision_config.to_dict())),
        Phi3ForCausalLM(Phi3Config(**config.text_config.to_dict())),
    )
    encoder.save_pretrained(tmp_path / "encoder")
    text.save_pretrained(tmp_path / "text")
    model = SamfForConditionalGeneration.from_component_pretrained(
        str(tmp_path / "encoder"), str(tmp_path / "text"), image_token_id=IMAGE_ID, num_image_tokens=4, volume_dim=16
    )
    assert not any(parameter.is_meta or parameter.isnan().any() for parameter in model.parameters())
    state = model.state_dict()
    for prefix, part in (("model.slice_encoder.", encoder), ("model.language_model.", text.model)):
        for name, value in part.state_dict().items():
            assert "pooler" in name or torch.equal(state[prefix + name], value)
    assert torch.equal(state["lm_head.weight"], text.lm_head.weight)
    assert set(state) == set(tiny_model().state_dict())
    assert 0.01 < model.model.fusion.mix.weight.std() < 0.03
    batch = tiny_batch("ao2d")
    z_2d = model.get_image_features(batch["pixel_values"]).last_hidden_state
    expected = encoder.eval()(batch["pixel_values"].flatten(0, 1)).last_hidden_state[:, 0]
    torch.testing.assert_close(z_2d.flatten(0, 1), expected)


def test_a_new_model_has_one_precision_where_its_components_have_two(tmp_path):
    """As DINO's float32 and Phi-3's bfloat16 are: the parts between couldn't mix them."""
    config = tiny_config()
    ViTModel(ViTConfig(**config.vision_config.to_dict())).save_pretrained(tmp_path / "encoder")
    text = Phi3ForCausalLM(Phi3Config(**config.text_config.to_dict())).to(torch.bfloat16)
    text.save_pretrained(tmp_path / "text")
    for dtype, expected in ((None, torch.bfloat16), ("auto", torch.bfloat16), ("float32", torch.float32)):
        model = SamfForConditionalGeneration.from_component_pretrained(
            str(tmp_path / "encoder"),
            str(tmp_path / "text"),
            dtype,
            image_token_id=IMAGE_ID,
            num_image_tokens=4,
            volume_dim=16,
        )
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        batch = tiny_batch("ao2d")
        batch["pixel_values"] = batch["pixel_values"].to(expected)
        assert model(**batch).logits.isfinite().all()


def test_places_of_slices_survive_a_launcher_that_rounds_what_floats():
    """FSDP and DeepSpeed cast floating inputs to bfloat16, where 0.9012 and 0.9001 are one number."""
    embedding = SlicePositionEmbedding(8)
    planes, positions = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0.9012, 0.9001]])
    expected = embedding(planes, positions)
    assert not torch.allclose(embedding(planes, positions.to(torch.bfloat16)), expected, atol=1e-3)
    assert torch.equal(embedding(planes, positions.view(torch.int32)), expected)


def test_defaults_are_the_papers_sizes():
    config = SamfConfig()
    assert (config.vision_config.hidden_size, config.vision_config.patch_size, config.vision_config.layer_norm_eps) == (
        768,
        16,
        1e-6,
    )
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers, config.text_config.vocab_size) == (
        3072,
        32,
        32064,
    )
    assert (config.volume_dim, config.num_image_tokens, config.fusion_dim) == (256, 256, 3072)
    with torch.device("meta"):
        model = SamfForConditionalGeneration(config)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    assert parts["slice_encoder"] == 85_798_656  # ViT-B/16 without a pooler
    assert parts["language_model"] + model.lm_head.weight.numel() == 3_821_079_552  # Phi-3-mini


@pytest.mark.parametrize(
    "setting",
    [
        {"fusion_type": "sum"},
        {"aggregator_num_heads": 7},
        {"project_text": False, "fusion_dim": 8},
        {"num_image_tokens": 0},
        {"aggregator_activation": "rellu"},
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        tiny_config(**setting)


def test_names_and_ids_that_a_model_cannot_have_are_errors():
    with pytest.raises(ValueError, match=r"\['type', 'values'\]"):
        tiny_model(extra_sources={"values": 3, "age": 1, "type": 2})
    with pytest.raises(ValueError, match="image_token_id is 500, but the language model embeds 99"):
        tiny_model(image_token_id=500)(**tiny_batch("ao2d"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_setting_the_attention_implementation_sets_it_in_every_part(attention):
    model = tiny_model()
    model.set_attn_implementation({"sdpa": "eager", "eager": "sdpa"}[attention])
    model.set_attn_implementation(attention)
    parts = (model.model.slice_encoder, model.model.aggregator.layers[0].attention, model.model.language_model)
    assert [part.config._attn_implementation for part in parts] == [attention] * 3


@pytest.mark.parametrize("name", ["slice_mask", "slice_planes", "slice_positions"])
def test_what_is_said_of_other_slices_is_an_error(name):
    """One volume with the masks of two must not become the volume of both prompts."""
    model, batch = tiny_model(slice_position_scope="all"), tiny_batch("ao2d")
    given = {"slice_mask": torch.ones(2, SLICES).bool(), "slice_planes": torch.zeros(2, SLICES).long()}
    given["slice_positions"] = torch.full((2, SLICES), 0.5)
    model(**batch, **given)
    for wrong in (given[name][:1], given[name][:, :-1]):
        with pytest.raises(ValueError, match=rf"{name} has shape .*here \(2, {SLICES}\)"):
            model(**batch, **{**given, name: wrong})
    with pytest.raises(ValueError, match="slice_mask has shape"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:1]}, **given)


def test_hidden_states_and_attentions_of_the_slice_encoder_come_with_those_of_the_language_model():
    model, batch = tiny_model(), tiny_batch("ao2d")
    model.set_attn_implementation("eager")
    flat = batch["pixel_values"].flatten(0, 1)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        expected = model.model.slice_encoder(flat, output_hidden_states=True, output_attentions=True)
        assert model(**batch).image_outputs.hidden_states is None
        some = model(**batch, output_hidden_states=[0])  # layers of the language model
    assert [state.shape[:2] for state in output.hidden_states] == [batch["input_ids"].shape] * 3
    torch.testing.assert_close(output.image_outputs.hidden_states, expected.hidden_states)
    torch.testing.assert_close(output.image_outputs.attentions, expected.attentions)
    assert some.image_outputs.hidden_states is None


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_a_layer_for_few_rows_is_a_linear_layer(rows):
    layer, x = FewRowsLinear(1536, 1024), torch.randn(rows, 1, 1536, requires_grad=True)
    output = layer(x)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    inputs = (x, layer.weight, layer.bias)
    for actual, wanted in zip(
        torch.autograd.grad(output.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_a_training_forward_does_not_guess_where_the_answer_begins():
    model, batch = tiny_model().train(), tiny_batch("ao2d")
    given = {name: value for name, value in batch.items() if name != "labels"}
    for part in (model, model.model):
        with pytest.raises(ValueError, match="neither labels nor prompt_mask"):
            part(**given)
        part(**given, prompt_mask=batch["labels"] == -100)
    model(**batch)
    model.eval()(**given)
    tiny_model(fusion_text_scope="sequence").train()(**given)  # the published code reads all


def test_the_text_of_a_late_volume_lies_before_the_first_answer_behind_it():
    """By labels alone: an answer of an earlier turn is no text, and what the user says behind it is."""
    #                     user  answer  user  volume  user  answer  user
    image = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]]).bool()
    labels = torch.tensor([[-100, -100, 8, 9, -100, -100, -100, -100, 8, 9, -100]])
    mask = fusion_text_mask("prompt", image, labels=labels)
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 4, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_over_a_long_prompt_is_the_mean_in_half_precision(dtype):
    x = torch.rand(2, 3000, 3, generator=torch.Generator().manual_seed(0)).add(60).to(dtype)
    mask = torch.arange(3000)[None] < torch.tensor([[3000], [2000]])
    expected = torch.stack([row[:count].double().mean(0) for row, count in zip(x, (3000, 2000), strict=True)])
    assert torch.equal(masked_mean(x, mask)[:, 0], expected.to(dtype))


def test_half_given_and_rounded_slice_facts_are_errors():
    model, pixels = tiny_model(), tiny_batch("ao2d")["pixel_values"]
    planes, positions = torch.zeros(2, SLICES).long(), torch.full((2, SLICES), 0.5)
    with pytest.raises(ValueError, match="slice_planes came without slice_positions"):
        model.get_image_features(pixels, slice_planes=planes)
    with pytest.raises(ValueError, match="slice_positions came without slice_planes"):
        model.get_image_features(pixels, slice_positions=positions)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match="too coarse to tell neighbouring slices apart"):
            model.get_image_features(pixels, slice_planes=planes, slice_positions=positions.to(dtype))


def test_inputs_in_bfloat16_keep_the_places_of_slices():
    """The usual `inputs.to(device, dtype)`: the depth embedding is that of the exact positions."""
    processor = tiny_processor(slices_per_plane=24)
    inputs = processor(volumes=[np.zeros((12, 14, 16), np.int16)], text=["<image> Which finding?"], return_tensors="pt")
    alone = processor.image_processor([np.zeros((12, 14, 16), np.int16)])
    expected = ((torch.arange(24) + 0.5) / 24).repeat(3)[None]
    for features in (inputs, alone):
        moved = features.to("cpu", torch.bfloat16)
        assert moved["pixel_values"].dtype == torch.bfloat16
        torch.testing.assert_close(moved["slice_positions"], expected, rtol=0, atol=1e-6)


def test_a_compiled_graph_checks_the_placeholders_without_a_break():
    model, batch = tiny_model(), tiny_batch("ao2d")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
        wrong = {**batch, "input_ids": batch["input_ids"].clone()}
        wrong["input_ids"][:, 3] = 7
        with pytest.raises(RuntimeError, match="do not match"):
            compiled(**wrong)


def test_parts_of_a_model_may_lie_on_several_devices():
    """Three GPUs that aren't there: only where each tensor lies is computed."""
    with FakeTensorMode():
        image_mask = torch.empty(2, 9, dtype=torch.bool, device="cuda:0")
        embeds = torch.empty(2, 9, 8, device="cuda:1")
        slice_mask = torch.ones(2, 6, dtype=torch.bool, device="cuda:0")
        for width in (1, 6):  # one vector a volume, and one a slice
            placed = place_image_tokens(embeds, image_mask, torch.empty(2, width, 8, device="cuda:2"), slice_mask)
            assert placed.device == torch.device("cuda:1")


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_a_cache_before_the_volume_changes_nothing(fusion_type):
    """Logits of the whole sequence in one pass are those behind a cached beginning, given the beginning's ids."""
    model, batch = tiny_model(fusion_type=fusion_type), tiny_batch(fusion_type)
    start = torch.randint(6, 99, (2, 5), generator=torch.Generator().manual_seed(3))
    whole = torch.cat([start, batch["input_ids"]], dim=1)
    labels = torch.nn.functional.pad(batch["labels"], (5, 0), value=-100)
    given = {"pixel_values": batch["pixel_values"], "attention_mask": torch.ones_like(whole)}
    mask = labels == -100
    with torch.no_grad():
        expected = model(input_ids=whole, prompt_mask=mask, **given).logits[:, 5:]
        by_labels = model(input_ids=whole, labels=labels, **given).loss

        def behind_cache(**options):
            name = "cache" if "cache" in model(input_ids=start[:, :1], use_cache=True) else "past_key_values"
            cache = model(input_ids=start, use_cache=True)[name]
            return model(input_ids=batch["input_ids"], use_cache=True, **{name: cache}, **given, **options)

        torch.testing.assert_close(behind_cache(prefix_ids=start, prompt_mask=mask).logits, expected, rtol=0, atol=1e-5)
        again = behind_cache(prefix_ids=start, labels=batch["labels"]).loss
        torch.testing.assert_close(again, by_labels, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="The cache holds 5 tokens before the volume"):
            behind_cache()


def test_placeholders_behind_the_prompts_mask_were_made():
    """They take no image token, and leave those of the prompt as they are."""
    model, batch = tiny_model(), tiny_batch("ao2d", answer=0)
    batch.pop("labels")
    made = {**batch, "prompt_mask": batch["attention_mask"].bool()}
    for name, value in (("input_ids", IMAGE_ID), ("attention_mask", 1)):
        made[name] = torch.nn.functional.pad(batch[name], (0, 2), value=value)
    with torch.no_grad():
        torch.testing.assert_close(model(**made).logits[:, :-2], model(**batch).logits, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="do not match"):
            model(**{name: value for name, value in made.items() if name != "prompt_mask"})
