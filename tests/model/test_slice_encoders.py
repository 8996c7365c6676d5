"""The library's image encoders as slice encoders: what z_2d is read from, what it needs, and what is refused by name."""

import pytest
import torch
from transformers import AutoModel

from samf import SamfConfig, SamfModel
from samf.benchmarks.components import (
    ANSWER,
    IMAGE_ID,
    SLICE_ENCODERS,
    randomise,
    samf_config,
    text_config,
    train_in_processes,
    try_slice_encoder,
    vision_config,
    volume_batch,
)
from samf.cache.embedding_cache import encoder_fingerprint
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.pretraining.contrastive import build_slices_model

REFUSED = {
    "clip": "CLIPConfig, which has no hidden_size",
    "siglip2_vision_model": "Siglip2VisionModel .*spatial_shapes",
}
POOLINGS = {
    "vit": "cls",
    "dinov2": "cls",
    "beit": "cls",
    "vit_mae": "cls",
    "clip_vision_model": "cls",
    "siglip_vision_model": "pooler",
    "aimv2_vision_model": "pooler",  # its cls_token is its pooling head's
    "convnext": "pooler",
    "resnet": "pooler",
    "ijepa": "mean",
    "swin": "mean",
}
QUICK = ("vit_mae", "siglip_vision_model", "convnext", "ijepa")
ACCEPTED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in SLICE_ENCODERS
    if name not in REFUSED
]


@pytest.mark.parametrize("name", ACCEPTED)
def test_z_2d_is_what_the_encoders_own_class_gives(name):
    """Each slice by itself; the same twice; float32 pixels into bfloat16 weights; the same after save and load."""
    row = try_slice_encoder(name)
    assert row["pooling"] == POOLINGS.get(name, row["pooling"])
    assert all(float(row[key]) < 1e-5 for key in ("own", "reload")), row
    assert (row["same twice"], row["bfloat16"]) == ("yes", "yes")


@pytest.mark.parametrize("name", REFUSED)
def test_an_encoder_that_needs_more_than_pixels_is_refused_by_name(name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        SamfModel(samf_config(vision=name))


@pytest.mark.parametrize(
    ("name", "pooling", "message"),
    [
        ("siglip_vision_model", "cls", "SiglipVisionModel has no CLS token.*'pooler'"),
        ("ijepa", "cls", "IJepaModel has no CLS token.*'mean'"),
        ("convnext", "cls", "ConvNextModel has no CLS token"),
        ("aimv2_vision_model", "cls", "Aimv2VisionModel has no CLS token"),
        ("ijepa", "pooler", "IJepaModel has none; set 'mean'"),
    ],
)
def test_a_pooling_that_an_encoder_has_not_is_an_error_that_names_one_it_has(name, pooling, message):
    with pytest.raises(ValueError, match=message):
        SamfModel(samf_config(vision=name, slice_pooling=pooling))


def test_the_pooling_that_holds_is_saved_and_a_pooling_that_is_asked_for_is_kept(tmp_path):
    model = SamfModel(samf_config(vision="siglip_vision_model"))
    model.save_pretrained(tmp_path)
    assert SamfConfig.from_pretrained(tmp_path).slice_pooling == "pooler"
    model = randomise(SamfModel(samf_config(vision="convnext", slice_pooling="mean")))
    pixels = volume_batch()["pixel_values"]
    with torch.no_grad():
        features = model.slice_encoder(pixels.flatten(0, 1)).last_hidden_state  # (B·S, D, H, W)
        z_2d = model.get_image_features(pixels).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(z_2d, features.mean(dim=(2, 3)))


@pytest.mark.parametrize("name", ["dinov2", "siglip_vision_model", "clip_vision_model"])
def test_every_weight_of_an_encoder_gets_a_gradient(name):
    """DistributedDataParallel waits for each, and dies at the second step for want of one."""
    model = SamfForConditionalGeneration(samf_config(vision=name)).train()
    model(**volume_batch(answer=ANSWER)).loss.backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["dinov2", "clip_vision_model"])
def test_weights_that_z_2d_doesnt_use_are_kept_and_not_trained(name, tmp_path):
    """In a new model from a saved encoder and in stage 2's: they come back with the file, and no optimizer sees them."""
    own = randomise(AutoModel.from_config(vision_config(name)))
    own.save_pretrained(tmp_path)
    model = build_slices_model(str(tmp_path), "float32")
    unused = {"dinov2": "embeddings.mask_token", "clip_vision_model": "post_layernorm.weight"}[name]
    trained = {key for key, _ in model.slice_encoder.named_parameters()}
    assert unused not in trained and len(trained) > 10
    state = model.slice_encoder.state_dict()
    assert all(torch.equal(state[key], value) for key, value in own.state_dict().items())


def test_float32_pixels_into_half_precision_are_the_rounded_pixels():
    model = randomise(SamfModel(samf_config(vision="beit"))).bfloat16()
    pixels = volume_batch()["pixel_values"]
    with torch.no_grad():
        mixed, rounded = (model.get_image_features(p).pooler_output for p in (pixels, pixels.bfloat16()))
    assert torch.equal(mixed, rounded)


def test_embeddings_are_named_by_all_that_computes_them():
    """Equal weights read with other heads, activation, eps or pooling give other embeddings, and another name."""

    def model(**settings):
        pooling = settings.pop("slice_pooling", None)
        vision = {**vision_config("vit").to_dict(), **settings}
        return SamfModel(
            SamfConfig(
                vision_config=vision,
                text_config=text_config("llama"),
                image_token_id=IMAGE_ID,
                volume_dim=16,
                slice_pooling=pooling,
            )
        )

    first = model()
    names = [encoder_fingerprint(first)]
    for other in (
        {"num_attention_heads": 2},
        {"hidden_act": "relu"},
        {"layer_norm_eps": 1e-3},
        {"slice_pooling": "mean"},
    ):
        changed = model(**other)
        changed.load_state_dict(first.state_dict())
        names.append(encoder_fingerprint(changed))
    assert len(set(names)) == 5
    same = model(hidden_dropout_prob=0.3, initializer_range=0.1)  # of training alone
    same.load_state_dict(first.state_dict())
    assert encoder_fingerprint(same) == names[0]


@pytest.mark.slow
def test_two_steps_in_two_processes():
    names = [("vision", name) for name in SLICE_ENCODERS if name not in REFUSED]
    assert set(train_in_processes(names).values()) == {"yes"}
