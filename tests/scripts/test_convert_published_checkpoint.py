"""Conversion against the published layout, rebuilt here from torch's own modules and the paper's equations."""

import argparse
import json
import logging
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import TEXTS
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Phi3Config,
    Phi3ForCausalLM,
    ViTModel,
)

from samf import SamfForConditionalGeneration, SamfImageProcessor
from samf.phantoms.tokenizer import train_small_tokenizer
from samf.scripts import conversion_processor, conversion_sources, conversion_weights
from samf.scripts import convert_published_checkpoint as convert
from samf.scripts.conversion_arguments import ConvertArguments
from samf.scripts.conversion_checks import ConversionError
from samf.scripts.conversion_sources import choose_file

IMAGE_TOKENS, IMAGE_ID, BOS = 4, 11, 2
TEXT_SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": BOS,
    "eos_token_id": 3,
}


class DinoBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 2 * dim), "fc2": nn.Linear(2 * dim, dim)})

    def forward(self, x):
        heads = [part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in self.attn["qkv"](self.norm1(x)).chunk(3, -1)]
        mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](mixed)
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Dino(nn.Module):
    """A ViT under DINO's names: images (N, 3, 32, 32) to CLS embeddings (N, dim)."""

    def __init__(self, dim=128, patch=16, image_size=32):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch) ** 2, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.blocks = nn.Sequential(DinoBlock(dim), DinoBlock(dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images):
        patches = self.patch_embed["proj"](images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))[:, 0]


class Aggregator(nn.Module):
    def __init__(self, dim=128, volume_dim=24):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        layer = nn.TransformerEncoderLayer(dim, 8, 80, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.volume_proj = nn.Linear(dim, volume_dim)

    def forward(self, slices):
        return self.volume_proj(self.transformer_encoder(torch.cat([self.cls_token[0], slices])[None])[0, 0])


class Fusion(nn.Module):
    """Eqs. 3 to 12 of one volume: volume (24,), slices (S, 128), text (T, 64) to (64,)."""

    def __init__(self, ao2d):
        super().__init__()
        self.project_3d, self.project_2d = nn.Linear(24, 64), nn.Linear(128, 64)
        self.project_text = nn.Linear(64, 64) if ao2d else None
        self.fusion_layer = nn.Linear(64 * (4 if ao2d else 3), 64)

    def forward(self, volume, slices, text):
        f3d, f2d = self.project_3d(volume), self.project_2d(slices)
        text = text if self.project_text is None else self.project_text(text)
        parts = [f3d, (f2d @ f3d).softmax(0) @ f2d, (text @ f3d).softmax(0) @ text]
        if self.project_text is not None:
            parts.append(torch.stack([(f2d @ token).softmax(0) @ f2d for token in text]).mean(0))
        return self.fusion_layer(torch.cat(parts))


def published_model(fusion):
    """A random model whose state dict has the published names."""
    torch.manual_seed(3)
    model = Phi3ForCausalLM(Phi3Config(**TEXT_SIZES, attn_implementation="eager"))
    model.model.vision_tower = nn.ModuleDict({"vision_tower": Dino()})
    model.model.mm_projector = Aggregator()
    model.model.mm_fusion = Fusion(fusion == "ao2d")
    randomise(model)
    return model.eval()


def randomise(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.15)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def published_logits(model, input_ids, images):
    """input_ids (B, T) with the placeholders after BOS, images (B, S, 3, 32, 32); `model` may be wrapped by peft."""
    parts = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    embeds = parts.embed_tokens(input_ids)
    fused = []
    for volume, text in zip(images, embeds, strict=True):
        slices = parts.vision_tower["vision_tower"](volume)
        fused.append(parts.mm_fusion(parts.mm_projector(slices), slices, text))
    image = torch.stack(fused)[:, None].expand(-1, IMAGE_TOKENS, -1)
    return model(inputs_embeds=torch.cat([embeds[:, :1], image, embeds[:, 1 + IMAGE_TOKENS :]], 1)).logits


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(5)
    input_ids = torch.randint(12, 40, (2, 16), generator=generator)
    input_ids[:, 0], input_ids[:, 1 : 1 + IMAGE_TOKENS] = BOS, IMAGE_ID
    return input_ids, torch.rand(2, 5, 3, 32, 32, generator=generator)


def write_config(folder):
    """config.json as the reference implementation saves it, with the settings of modules that it doesn't use."""
    config = Phi3Config(**TEXT_SIZES).to_dict()
    config |= {
        "model_type": "llava_phi3",
        "vision_tower": "dino_large",
        "image_size": [32, 256, 256],
        "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_index(folder, file, weights, save):
    """`weights` in two files under an index."""
    names = sorted(weights)
    stem, suffix = file.split(".", 1)
    shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for shard, kept in shards.items():
        save({name: weights[name].contiguous() for name in kept}, folder / shard)
    weight_map = {name: shard for shard, kept in shards.items() for name in kept}
    (folder / f"{file}.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def write_sharded_safetensors(model, folder):
    write_config(folder)
    write_index(folder, "model.safetensors", model.state_dict(), save_file)
    torch.save(model.state_dict(), folder / "merged_model.bin")  # the published merge leaves both
    return folder


def write_sharded_bin(model, folder):
    write_config(folder)
    write_index(folder, "pytorch_model.bin", model.state_dict(), torch.save)
    torch.save({"not": "weights"}, folder / "training_args.bin")
    return folder


def write_merged_bin(model, folder):
    torch.save(model.state_dict(), folder / "merged_model.bin")
    return folder


def write_old_format_bin(model, folder):
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(state, folder / "anything.pth", _use_new_zipfile_serialization=False)
    return folder


WRITERS = [write_sharded_safetensors, write_sharded_bin, write_merged_bin, write_old_format_bin]


def arguments(source, folder, **options):
    options = {"text_heads": 4, "num_image_tokens": IMAGE_TOKENS, "image_token_id": IMAGE_ID, **options}
    return ConvertArguments(source=str(source), output_dir=str(folder / "converted"), **options)


def converted_logits(folder, inputs, **options):
    model = SamfForConditionalGeneration.from_pretrained(folder / "converted", attn_implementation="eager", **options)
    with torch.no_grad():
        return model, model(input_ids=inputs[0], pixel_values=inputs[1]).logits


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("fusion", ["samf", "ao2d"])
def test_logits_of_the_published_layout(fusion, write, inputs, tmp_path):
    (tmp_path / "source").mkdir()
    published = published_model(fusion)
    with torch.no_grad():
        expected = published_logits(published, *inputs)
    convert.convert_model(arguments(write(published, tmp_path / "source"), tmp_path))
    model, logits = converted_logits(tmp_path, inputs)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1  # an all but constant output would prove nothing
    config = model.config
    assert (config.fusion_type, config.project_text) == (fusion, fusion == "ao2d")
    assert (config.fusion_text_scope, config.slice_position_scope) == ("sequence", "none")
    assert config.vision_config.layer_norm_eps == 1e-6


@pytest.mark.parametrize(("alpha", "options"), [(32, {}), (8, {"lora_alpha": 8.0})])
def test_lora_is_merged(alpha, options, inputs, tmp_path):
    """peft's own forward pass, on the state dict that it gives."""
    published = published_model("ao2d")
    linears = [
        name
        for name, module in published.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in ("vision_tower", "mm_", "lm_head"))
    ]
    assert len(linears) == 8
    lora = LoraConfig(r=4, lora_alpha=alpha, target_modules=linears, lora_dropout=0.05, task_type="CAUSAL_LM")
    wrapped = get_peft_model(published, lora).eval()
    randomise(wrapped)
    torch.save(wrapped.state_dict(), tmp_path / "model_with_lora.bin")
    convert.convert_model(arguments(tmp_path / "model_with_lora.bin", tmp_path, **options))
    with torch.no_grad():
        expected = published_logits(wrapped, *inputs)
        without = published_logits(published_model("ao2d"), *inputs)
    torch.testing.assert_close(converted_logits(tmp_path, inputs)[1], expected, rtol=0, atol=1e-4)
    assert (without - expected).abs().max() > 0.1


def test_lora_is_merged_in_full_precision():
    """bfloat16 weights are rounded once, at the end."""
    weight, up, down = torch.randn(6, 8), torch.randn(6, 4), torch.randn(4, 8)
    parts = {"base_layer": weight, "lora_A.default": down, "lora_B.default": up}
    parts = {f"base_model.model.x.{name}.weight": value.bfloat16() for name, value in parts.items()}
    merged = conversion_weights.merge_lora(parts, 8.0, "test")["x.weight"]
    exact = weight.bfloat16().double() + 8 / 4 * (up.bfloat16().double() @ down.bfloat16().double())
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.double(), exact, rtol=2**-8, atol=1e-6)


def test_modules_that_lora_trained_whole_win_over_their_originals(tmp_path):
    weights = {
        "base_model.model.lm_head.original_module.weight": torch.zeros(2, 2),
        "base_model.model.lm_head.modules_to_save.default.weight": torch.ones(2, 2),
        "base_model.model.model.norm.weight": torch.ones(2),
    }
    merged = conversion_weights.merge_lora(weights, 32, "test")
    assert set(merged) == {"lm_head.weight", "model.norm.weight"} and (merged["lm_head.weight"] == 1).all()


# --------------------------------------------------------------------------------------------------- the whole repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A converted folder with a tokenizer, and the tokenizer that it was given."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "source").mkdir()
    model = published_model("ao2d")
    train_small_tokenizer(TEXTS, 400).save_pretrained(folder / "source")
    for path in (folder / "source").iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace("<image>", "<im_patch>"), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder / "source")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<bx_start>", "<bx_end>"]})
    tokenizer.save_pretrained(folder / "source")
    model.resize_token_embeddings(len(tokenizer))
    randomise(model)
    write_sharded_safetensors(model, folder / "source")
    sampling = {"do_sample": False, "temperature": 0.3, "eos_token_id": [3, 7], "pad_token_id": tokenizer.pad_token_id}
    (folder / "source" / "generation_config.json").write_text(json.dumps(sampling), encoding="utf-8")
    convert.convert_model(arguments(folder / "source", folder, image_token_id=None))
    return folder / "converted", tokenizer


def test_folder_is_a_complete_repository(repository):
    folder, _ = repository
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "README.md", "requirements.txt", "modeling_samf.py"}
    assert names >= {"processing_samf.py", "image_processing_samf.py", "ct_volume.py", "tokenizer.json"}
    assert [path.name for path in folder.parent.iterdir()] in (["source", "converted"], ["converted", "source"])
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [3, 7] and model.generation_config.temperature != 0.3
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Converted from | source" in card and "published" in card
    for path in folder.glob("*.json"):
        assert "/tmp" not in path.read_text(encoding="utf-8"), path


def test_prompt_is_the_published_one(repository, tmp_path):
    """BOS, placeholders under their old id, question; the answer after a space, and EOS."""
    folder, tokenizer = repository
    processor = AutoProcessor.from_pretrained(folder)
    patch = tokenizer.convert_tokens_to_ids("<im_patch>")
    assert processor.image_token_id == patch and processor.image_processor.preset == "published"
    assert processor.image_processor.size == 32
    nibabel.save(nibabel.Nifti1Image(np.zeros((32, 32, 9), dtype=np.int16), np.eye(4)), tmp_path / "scan.nii")
    conversation = [
        {
            "role": "user",
            "content": [{"type": "volume", "path": str(tmp_path / "scan.nii")}, {"type": "text", "text": TEXTS[0]}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": TEXTS[2]}]},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    plain = {"add_special_tokens": False}
    head = [tokenizer.bos_token_id] + [patch] * IMAGE_TOKENS + tokenizer(TEXTS[0], **plain)["input_ids"]
    prompt = processor.apply_chat_template(conversation[:1], add_generation_prompt=True, **options)
    assert prompt["input_ids"][0].tolist() == head
    whole = processor.apply_chat_template(conversation, return_assistant_tokens_mask=True, **options)
    text = tokenizer.bos_token + "<im_patch>" * IMAGE_TOKENS + TEXTS[0] + " " + TEXTS[2] + tokenizer.eos_token
    assert whole["input_ids"][0].tolist() == tokenizer(text, **plain)["input_ids"]
    assert whole["assistant_masks"].sum() > 5 and whole["assistant_masks"][0, -1] == 1
    model = AutoModelForImageTextToText.from_pretrained(folder)
    made = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert made.shape[1] <= len(head) + 3


def test_phi3_tokenizer_has_the_placeholder_where_the_published_code_put_it(test_data):
    args = ConvertArguments("x", "y", tokenizer=str(test_data / "tokenizers" / "phi3"))
    tokenizer = conversion_processor.load_tokenizer(conversion_sources.Checkpoint("x", (), None), args)
    assert len(tokenizer) == conversion_processor.DEFAULT_IMAGE_TOKEN_ID


def test_tokenizer_that_needs_a_missing_library_says_so(test_data, tmp_path, monkeypatch):
    shutil.copyfile(test_data / "tokenizers" / "phi3" / "tokenizer.model", tmp_path / "tokenizer.model")
    monkeypatch.setattr(conversion_processor, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install sentencepiece"):
        conversion_processor.load_tokenizer(
            conversion_sources.Checkpoint("x", (), tmp_path), ConvertArguments("x", "y")
        )


def test_without_a_tokenizer_the_folder_has_the_image_processor(tmp_path, caplog):
    torch.save(published_model("samf").state_dict(), tmp_path / "model.bin")
    with caplog.at_level(logging.WARNING):
        convert.convert_model(arguments(tmp_path / "model.bin", tmp_path))
    assert SamfImageProcessor.from_pretrained(tmp_path / "converted").preset == "published"
    assert any("--tokenizer" in message for message in caplog.messages)
    assert any("leaks" in message and "padding" in message for message in caplog.messages)


def test_dtype_option_and_shards(tmp_path, monkeypatch):
    """Rounding while converting gives what converting rounded weights gives."""
    monkeypatch.setattr(convert, "MAX_SHARD_SIZE", "200KB")
    tensors = []
    for dtype, option in ((torch.float32, "bfloat16"), (torch.bfloat16, "auto")):
        torch.save(published_model("samf").to(dtype).state_dict(), tmp_path / "model.bin")
        convert.convert_model(arguments(tmp_path / "model.bin", tmp_path, dtype=option))
        assert len(list((tmp_path / "converted").glob("model-*.safetensors"))) > 2
        model = SamfForConditionalGeneration.from_pretrained(tmp_path / "converted", dtype="auto")
        assert model.dtype == torch.bfloat16
        tensors.append(model.state_dict())
        shutil.rmtree(tmp_path / "converted")
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0] | tensors[1])


# ---------------------------------------------------------------------------------------------------------------- errors


def test_every_key_is_accounted_for(tmp_path):
    state = published_model("ao2d").state_dict()
    file = tmp_path / "model.bin"

    def message(changed):
        torch.save(changed, file)
        with pytest.raises(ConversionError) as error:
            convert.convert_model(arguments(file, tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]  # nothing half done stays
        return str(error.value)

    unknown = ["model.vision_tower.vision_tower.blocks.0.ls1.gamma", "model.mm_fusion.project_age.weight"]
    text = message({**state, **{name: torch.zeros(1) for name in unknown}})
    assert all(name in text for name in unknown) and "unknown entries" in text
    text = message({**state, "model.layers.0.self_attn.rotary.weight": torch.zeros(1)})
    assert "model.layers.0.self_attn.rotary.weight" in text
    for names in (
        [
            "model.mm_fusion.fusion_layer.bias",
            "model.vision_tower.vision_tower.blocks.1.attn.qkv.weight",
            "lm_head.weight",
        ],
        ["model.mm_fusion.fusion_layer.weight", "model.mm_projector.volume_proj.weight"],  # these tell sizes
    ):
        text = message({name: value for name, value in state.items() if name not in names})
        assert "lacks" in text and all(name in text for name in names)
    text = message({**state, "lm_head.weight": torch.zeros(41, 64)})
    assert "lm_head.weight [41, 64], expected [40, 64]" in text
    text = message({**state, "model.mm_fusion.fusion_layer.weight": torch.zeros(64, 320)})
    assert "320" in text and "3 or 4 parts of 64" in text
    text = message({**state, "base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight": torch.zeros(4, 48)})
    assert "layers.0.mlp.down_proj" in text and "other half" in text


def test_what_shapes_cannot_tell_is_asked_for(tmp_path):
    torch.save(published_model("ao2d").state_dict(), tmp_path / "model.bin")
    for options, words in [
        ({"text_heads": 5}, "--text_heads"),
        ({"text_heads": None}, "width 64.*--text_heads"),
        ({"slice_encoder_heads": 3}, "--slice_encoder_heads"),
        ({"image_size": 224}, "image size 32"),
        ({"image_token_id": None}, "32011.*--image_token_id"),
    ]:
        with pytest.raises(ConversionError, match=words):
            convert.convert_model(arguments(tmp_path / "model.bin", tmp_path, **options))


def test_bad_sources_are_named(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.bin")
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    (tmp_path / "cut.bin").write_bytes(b"PK\3\4 not really")
    for source, words in [
        (tmp_path / "whole.bin", r"whole\.bin.*state_dict\(\)"),
        (tmp_path / "cut.safetensors", "cut.safetensors"),
        (tmp_path / "cut.bin", "cut.bin"),
        (tmp_path / "missing", "no such file"),
        (tmp_path, "3 weight files.*--file"),
    ]:
        with pytest.raises(ConversionError, match=words):
            convert.convert_model(arguments(source, tmp_path))
    with pytest.raises(ConversionError, match="part is 'all'"):
        ConvertArguments("a", "b", part="all")
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "file").touch()
    with pytest.raises(ConversionError, match="exists already"):
        convert.convert_model(arguments(tmp_path / "whole.bin", tmp_path))


DOWN = "model.layers.0.mlp.down_proj"  # [64, 48]
WRAPPED = f"base_model.model.{DOWN}"


@pytest.fixture(scope="module")
def state():
    return dict(published_model("ao2d").state_dict())


def adapter(rank=4, other_rank=None):
    names = (f"{WRAPPED}.lora_A.default.weight", f"{WRAPPED}.lora_B.default.weight")
    return dict(zip(names, (torch.ones(rank, 48), torch.ones(64, other_rank or rank)), strict=True))


def changed(state, name, place, value):
    tensor = state[name].clone()
    tensor.view(-1)[place] = value
    return {name: tensor}


# What is added to, or put over, a whole checkpoint, and what the error must name.
BAD_TENSORS = {
    "a parallel copy": (
        lambda state: {"module.lm_head.weight": state["lm_head.weight"] * 0},
        ["module.lm_head.weight"],
    ),
    "a wrapped copy": (
        lambda state: {f"{WRAPPED}.base_layer.weight": torch.zeros(64, 48)},
        ["base_layer", f"{DOWN}.weight"],
    ),
    "a trained copy": (
        lambda state: {"lm_head.modules_to_save.default.weight": torch.zeros(40, 64)},
        ["modules_to_save", "lm_head.weight"],
    ),
    "one adapter twice": (
        lambda state: adapter() | {name.removeprefix("base_model.model."): v for name, v in adapter().items()},
        ["lora_A", WRAPPED],
    ),
    "ZeRO-3's placeholder": (lambda state: adapter(rank=0), ["without values", f"{WRAPPED}.lora_A.default.weight"]),
    "an empty weight": (lambda state: {"lm_head.weight": torch.zeros(0)}, ["without values", "lm_head.weight"]),
    "ranks that differ": (lambda state: adapter(4, 8), [DOWN, "[4, 48]", "[64, 8]"]),
    "an adapter of another width": (
        lambda state: adapter() | {f"{WRAPPED}.lora_A.default.weight": torch.ones(4, 50)},
        [DOWN, "[4, 50]"],
    ),
    "NaN": (lambda state: changed(state, "lm_head.weight", 7, float("nan")), ["NaN or infinite", "lm_head.weight"]),
    "infinity": (
        lambda state: changed(state, f"{DOWN}.weight", -1, float("-inf")),
        ["NaN or infinite", f"{DOWN}.weight"],
    ),
    "NaN in an adapter": (
        lambda state: adapter() | {f"{WRAPPED}.lora_B.default.weight": torch.full((64, 4), float("nan"))},
        ["NaN or infinite", "lora_B"],
    ),
    "whole numbers": (
        lambda state: {"lm_head.weight": torch.ones(40, 64, dtype=torch.int8)},
        ["torch.int8", "lm_head.weight"],
    ),
    "a missing dimension": (
        lambda state: {f"{DOWN}.weight": torch.zeros(48)},
        ["layers.0.mlp.down_proj.weight", "2 dimensions"],
    ),
    "qkv that isn't three": (
        lambda state: {"model.vision_tower.vision_tower.blocks.0.attn.qkv.bias": torch.zeros(385)},
        ["blocks.0.attn.qkv.bias", "[385]"],
    ),
    "a layer left out": (
        lambda state: {"model.layers.9.mlp.down_proj.weight": torch.zeros(64, 48)},
        ["lacks layer 2", "layers.9"],
    ),
    "a number as a name": (lambda state: {3: torch.zeros(1)}, ["names an entry 3"]),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_named(case, state, tmp_path):
    make, words = BAD_TENSORS[case]
    torch.save({**state, **make(state)}, tmp_path / "model.bin")
    with pytest.raises(ConversionError) as error:
        convert.convert_model(arguments(tmp_path / "model.bin", tmp_path))
    assert "model.bin" in str(error.value) and all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "converted").exists()


def test_values_too_large_for_the_wanted_type_are_named(state, tmp_path):
    torch.save({**state, **changed(state, "lm_head.weight", 0, 1e5)}, tmp_path / "model.bin")
    with pytest.raises(ConversionError, match=r"lm_head\.weight is too large for float16"):
        convert.convert_model(arguments(tmp_path / "model.bin", tmp_path, dtype="float16"))


def test_two_names_of_one_weight_of_a_backbone(dinos, tmp_path):
    """transformers' ViT under its old and its new names."""
    state = old_vit_names(dinos["teacher"].state_dict())
    torch.save({**state, "layers.0.mlp.fc1.bias": torch.zeros(256)}, tmp_path / "dino.pth")
    with pytest.raises(
        ConversionError, match=r"encoder\.layer\.0\.intermediate\.dense\.bias and layers\.0\.mlp\.fc1\.bias"
    ):
        convert_encoder(tmp_path / "dino.pth", tmp_path)
    torch.save(
        changed(state, "layernorm.bias", 0, float("nan")) | {"head.weight": torch.zeros(0)}, tmp_path / "dino.pth"
    )
    with pytest.raises(ConversionError, match=r"dino\.pth: holds NaN.*layernorm\.bias"):
        convert_encoder(tmp_path / "dino.pth", tmp_path)


BAD_JSON = {
    "model.safetensors.index.json": [
        '{"weight_map": {',
        "[]",
        "{}",
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../b"}}',
    ],
    "config.json": ["{", "[1]", b"\xff\xfe{\x00"],
    "generation_config.json": ['{"eos_token_id": ', "3"],
    "adapter_config.json": ["{"],
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_broken_json_is_named(name, state, tmp_path):
    (tmp_path / "source").mkdir()
    write_sharded_safetensors(published_model("ao2d"), tmp_path / "source")
    for text in BAD_JSON[name]:
        (tmp_path / "source" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConversionError, match=name.replace(".", r"\.")):
            convert.convert_model(arguments(tmp_path / "source", tmp_path))


def test_shards_are_what_their_index_says(tmp_path):
    (tmp_path / "source").mkdir()
    write_sharded_safetensors(published_model("ao2d"), tmp_path / "source")
    first = tmp_path / "source" / "model-00001-of-00002.safetensors"
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, first)
    with pytest.raises(ConversionError, match=f"model-00001-of-00002.safetensors: lacks tensors.*{name}"):
        convert.convert_model(arguments(tmp_path / "source", tmp_path))
    save_file({**tensors, "lm_head.weight": torch.full((40, 64), torch.inf)}, first)
    with pytest.raises(
        ConversionError, match=r"model-00001-of-00002.safetensors: holds NaN or infinite.*lm_head\.weight"
    ):
        convert.convert_model(arguments(tmp_path / "source", tmp_path))
    first.unlink()
    with pytest.raises(ConversionError, match="aren't there: model-00001"):
        convert.convert_model(arguments(tmp_path / "source", tmp_path))


def test_an_adapter_config_beside_the_weights_must_be_theirs(state, tmp_path):
    """It says how the adapters were scaled; or that there is an adapter, which conversion would leave out."""

    def convert_with(settings, weights, name="model_with_lora.bin", **options):
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        shutil.rmtree(tmp_path / "converted", ignore_errors=True)
        (tmp_path / "source").mkdir()
        torch.save(weights, tmp_path / "source" / name)
        (tmp_path / "source" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **settings}))
        convert.convert_model(arguments(tmp_path / "source", tmp_path, **options))

    whole = {**state, **adapter()}
    convert_with({"lora_alpha": 32}, whole)
    convert_with({"lora_alpha": 8}, whole, lora_alpha=8.0)
    merged = load_file(tmp_path / "converted" / "model.safetensors")[
        f"model.language_model.{DOWN.removeprefix('model.')}.weight"
    ]
    torch.testing.assert_close(merged, state[f"{DOWN}.weight"] + 8 / 4 * 4)  # B A of ones is the rank everywhere
    for settings, weights, words in [
        ({"lora_alpha": 16}, whole, "lora_alpha is 16.*with 32.*--lora_alpha 16"),
        ({"lora_alpha": 32, "use_rslora": True}, whole, "use_rslora"),
        ({"lora_alpha": 32, "rank_pattern": {"down_proj": 8}}, whole, "rank_pattern"),
        ({"peft_type": "IA3"}, whole, "IA3"),
        ({"lora_alpha": 32}, state, "not in these weights"),
    ]:
        with pytest.raises(ConversionError, match=f"adapter_config.json.*{words}"):
            convert_with(settings, weights)
    convert.convert_model(
        arguments(tmp_path / "source" / "model_with_lora.bin", tmp_path)
    )  # by its own name: without it


@pytest.mark.parametrize("option", [{"lora_alpha": 0.0}, {"lora_alpha": float("nan")}, {"text_heads": -4}])
def test_options_that_cannot_be_are_named(option):
    with pytest.raises(ConversionError, match=next(iter(option))):
        ConvertArguments("a", "b", **option)


def test_choice_among_several_files():
    files = [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "merged_model.bin",
        "dino.pth",
        "a.json",
    ]
    assert choose_file(files, "x") == files[0]
    assert choose_file(files, "x", "dino.pth") == "dino.pth"
    assert choose_file(["dino.pth", "training_args.bin", "README.md"], "x") == "dino.pth"
    assert choose_file(["pytorch_model.bin", "model.safetensors"], "x") == "model.safetensors"
    for names in (["a.pth", "b.pth"], ["README.md"]):
        with pytest.raises(ConversionError, match="--file"):
            choose_file(names, "x")
    with pytest.raises(ConversionError, match="'c.pth'.*a.pth"):
        choose_file(["a.pth"], "x", "c.pth")


def test_hub_source_fetches_what_is_needed(tmp_path, monkeypatch, inputs):
    """A stand-in for the Hub with a folder in place of a repository."""
    (tmp_path / "hub").mkdir()
    published = published_model("samf")
    write_sharded_safetensors(published, tmp_path / "hub")
    (tmp_path / "hub" / "dino_backbone.pth").touch()
    asked = []

    def list_repo_files(repo, revision):
        asked.append((repo, revision))
        return [path.name for path in (tmp_path / "hub").iterdir()]

    def snapshot_download(repo, revision, allow_patterns):
        asked.append((repo, revision))
        (tmp_path / "cache").mkdir()
        for path in (tmp_path / "hub").iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copyfile(path, tmp_path / "cache" / path.name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(conversion_sources, "list_repo_files", list_repo_files)
    monkeypatch.setattr(conversion_sources, "snapshot_download", snapshot_download)
    convert.convert_model(arguments("serag-ai/SAMF", tmp_path, revision="v1"))
    assert asked == [("serag-ai/SAMF", "v1")] * 2
    kinds = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert kinds == {".json", ".safetensors"}  # neither the merged copy nor the backbone
    with torch.no_grad():
        expected = published_logits(published, *inputs)
    torch.testing.assert_close(converted_logits(tmp_path, inputs)[1], expected, rtol=0, atol=1e-4)
    assert "serag-ai/SAMF at v1" in (tmp_path / "converted" / "README.md").read_text(encoding="utf-8")


def test_command_line(tmp_path, caplog):
    torch.save(published_model("samf").state_dict(), tmp_path / "model.bin")
    options = ["--source", str(tmp_path / "model.bin"), "--output_dir", str(tmp_path / "out"), "--image_token_id", "11"]
    with pytest.raises(SystemExit, match="--text_heads"):
        convert.main(options)
    convert.main([*options, "--text_heads", "4", "--num_image_tokens", "4"])
    assert (tmp_path / "out" / "config.json").is_file()


# --------------------------------------------------------------------------------------------------------- slice encoders

OLD_VIT_NAMES = [
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("blocks.", "encoder.layer."),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
]


def old_vit_names(state):
    """The names that transformers gave ViT's parameters for years."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("norm."):
            name = f"layer{name}"
        for dino, vit in OLD_VIT_NAMES:
            name = name.replace(dino, vit)
        if "attn.qkv" in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{part}")] = third.clone()
        else:
            renamed[name] = value
    return renamed


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


HEAD = {"mlp.0.weight": torch.zeros(2), "last_layer.weight_g": torch.zeros(2), "last_layer.weight_v": torch.zeros(2)}


def facebook(teacher, student):
    return {
        "student": prefixed("module.backbone.", student) | prefixed("module.head.", HEAD),
        "teacher": prefixed("backbone.", teacher) | prefixed("head.", HEAD),
        "optimizer": {"param_groups": [{"lr": np.float64(0.1)}], "state": {}},
        "dino_loss": {"center": torch.zeros(1, 2)},
        "args": argparse.Namespace(arch="vit_base"),
        "epoch": 7,
    }


def lightly(teacher, student):
    heads = prefixed("teacher_head.layers.", HEAD) | prefixed("student_head.layers.", HEAD)
    return prefixed("student_backbone.", student) | prefixed("teacher_backbone.", teacher) | heads


def lightning(teacher, student):
    teacher, student = (prefixed("vit.", state) | {"vit.mask_token": torch.zeros(1)} for state in (teacher, student))
    return {"state_dict": lightly(teacher, student) | {"criterion.center": torch.zeros(1)}, "epoch": 3}


FORMS = {
    "plain": (lambda teacher, student: teacher, False),
    "compiled and wrapped": (lambda teacher, student: prefixed("module._orig_mod.backbone.", teacher), False),
    "with classifier": (lambda teacher, student: teacher | prefixed("head.", {"weight": torch.zeros(2, 2)}), False),
    "facebook": (facebook, True),
    "lightly": (lightly, True),
    "lightly around a transformers ViT": (lambda *two: lightly(*map(old_vit_names, two)), True),
    "lightly in lightning": (lightning, True),
    "transformers": (lambda teacher, student: prefixed("vit.", old_vit_names(teacher)), False),
}


@pytest.fixture(scope="module")
def dinos():
    torch.manual_seed(11)
    teacher, student = Dino().eval(), Dino().eval()
    randomise(teacher)
    randomise(student)
    return {"teacher": teacher, "student": student}


def convert_encoder(source, folder, **options):
    shutil.rmtree(folder / "encoder", ignore_errors=True)
    args = ConvertArguments(str(source), str(folder / "encoder"), part="slice_encoder", **options)
    convert.convert_slice_encoder(args)
    return AutoModel.from_pretrained(folder / "encoder", add_pooling_layer=False)


def assert_same_embeddings(encoder, dino):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).last_hidden_state[:, 0], dino(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_backbones_of_all_kinds(form, dinos, tmp_path, caplog):
    make, two_branches = FORMS[form]
    torch.save(make(dinos["teacher"].state_dict(), dinos["student"].state_dict()), tmp_path / "dino.pth")
    with caplog.at_level(logging.INFO):
        encoder = convert_encoder(tmp_path / "dino.pth", tmp_path)
    assert_same_embeddings(encoder, dinos["teacher"])
    assert encoder.config.layer_norm_eps == 1e-6
    assert {path.suffix for path in (tmp_path / "encoder").iterdir()} == {".json", ".safetensors"}
    if two_branches:
        assert any("left out" in message and "head" in message for message in caplog.messages)
        assert_same_embeddings(convert_encoder(tmp_path / "dino.pth", tmp_path, branch="student"), dinos["student"])
    else:
        with pytest.raises(ConversionError, match="no student"):
            convert_encoder(tmp_path / "dino.pth", tmp_path, branch="student")


def test_transformers_folder(dinos, tmp_path):
    """As this release of transformers saves it, with the pooler and another epsilon of its configuration."""
    torch.save(dinos["teacher"].state_dict(), tmp_path / "dino.pth")
    encoder = convert_encoder(tmp_path / "dino.pth", tmp_path)
    encoder.config.layer_norm_eps = 1e-3
    whole = ViTModel(encoder.config).eval()
    whole.load_state_dict(encoder.state_dict(), strict=False)
    whole.save_pretrained(tmp_path / "vit")
    assert "pooler.dense.weight" in load_file(tmp_path / "vit" / "model.safetensors")
    again = convert_encoder(tmp_path / "vit", tmp_path)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images).last_hidden_state, whole(images).last_hidden_state)
    assert again.config.layer_norm_eps == 1e-3


def test_train_builds_a_model_on_a_converted_encoder(dinos, tmp_path):
    torch.save(dinos["teacher"].state_dict(), tmp_path / "dino.pth")
    convert_encoder(tmp_path / "dino.pth", tmp_path)
    Phi3ForCausalLM(Phi3Config(**TEXT_SIZES)).save_pretrained(tmp_path / "text")
    model = SamfForConditionalGeneration.from_component_pretrained(
        str(tmp_path / "encoder"), str(tmp_path / "text"), image_token_id=IMAGE_ID, volume_dim=16
    )
    assert_same_embeddings(model.model.slice_encoder, dinos["teacher"])


def test_bad_backbones_are_named(dinos, tmp_path):
    state = dinos["teacher"].state_dict()

    def message(changed, **options):
        torch.save(changed, tmp_path / "dino.pth")
        with pytest.raises(ConversionError) as error:
            convert_encoder(tmp_path / "dino.pth", tmp_path, **options)
        return str(error.value)

    assert "image size 32" in message(state, image_size=224)
    assert "5 patches" in message({**state, "pos_embed": torch.zeros(1, 6, 128)})
    assert "register_tokens" in message({**state, "register_tokens": torch.zeros(1, 4, 128)})
    assert "blocks.1.attn.qkv.weight" in message({k: v for k, v in state.items() if k != "blocks.1.attn.qkv.weight"})
    assert "more than once" in message({**state, "backbone.cls_token": state["cls_token"]})
    assert "no teacher" in message(prefixed("student_backbone.", state), branch="teacher")
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "model.safetensors")
    Path(tmp_path / "config.json").write_text('{"model_type": "dinov2"}', encoding="utf-8")
    (tmp_path / "dino.pth").unlink()
    with pytest.raises(ConversionError, match="'dinov2'"):
        convert_encoder(tmp_path, tmp_path)
