"""The model gives what the paper's published code gave for the same weights ($SAMF_TEST_REFERENCE)."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, safe_open

from samf import SamfConfig, SamfForConditionalGeneration

# Published names → ours, in order; qkv and in_proj are cut in three beforehand.
NAMES = [
    (r"^lm_head", "lm_head"),
    (r"^model\.vision_tower\.vision_tower\.", "model.slice_encoder."),
    (r"patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"slice_encoder\.cls_token", "slice_encoder.embeddings.cls_token"),
    (r"slice_encoder\.pos_embed", "slice_encoder.embeddings.position_embeddings"),
    (r"slice_encoder\.norm\.", "slice_encoder.layernorm."),
    (r"slice_encoder\.blocks", "slice_encoder.layers"),
    (r"(slice_encoder\.layers\.\d+)\.attn\.proj", r"\1.attention.o_proj"),
    (r"(slice_encoder\.layers\.\d+)\.attn\.([qkv])\.", r"\1.attention.\2_proj."),
    (r"(slice_encoder\.layers\.\d+)\.norm1", r"\1.layernorm_before"),
    (r"(slice_encoder\.layers\.\d+)\.norm2", r"\1.layernorm_after"),
    (r"^model\.mm_projector\.transformer_encoder\.", "model.aggregator."),
    (r"^model\.mm_projector\.volume_proj", "model.aggregator.projection"),
    (r"^model\.mm_projector\.", "model.aggregator."),
    (r"(aggregator\.layers\.\d+)\.self_attn\.out_proj", r"\1.attention.o_proj"),
    (r"(aggregator\.layers\.\d+)\.self_attn\.([qkv])\.", r"\1.attention.\2_proj."),
    (r"(aggregator\.layers\.\d+)\.norm1", r"\1.attention_norm"),
    (r"(aggregator\.layers\.\d+)\.norm2", r"\1.feed_forward_norm"),
    (r"(aggregator\.layers\.\d+)\.linear1", r"\1.up_proj"),
    (r"(aggregator\.layers\.\d+)\.linear2", r"\1.down_proj"),
    (r"^model\.mm_fusion\.fusion_layer", "model.fusion.mix"),
    (r"^model\.mm_fusion\.project_2d", "model.fusion.project_slices"),
    (r"^model\.mm_fusion\.project_3d", "model.fusion.project_volume"),
    (r"^model\.mm_fusion\.", "model.fusion."),
    (r"^model\.(embed_tokens|layers|norm)", r"model.language_model.\1"),
]


def our_weights(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {}
    for name, value in published.items():
        match = re.search(r"(attn\.qkv\.|self_attn\.in_proj_)(weight|bias)$", name)
        parts = {name: value}
        if match:
            prefix = name[: match.start()] + match.group().split(".")[0]
            parts = {f"{prefix}.{part}.{match[2]}": third for part, third in zip("qkv", value.chunk(3), strict=True)}
        for part_name, part in parts.items():
            for pattern, replacement in NAMES:
                part_name = re.sub(pattern, replacement, part_name)
            weights[part_name] = part
    return weights


def published_model(path) -> tuple[SamfForConditionalGeneration, dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    vision, text, aggregator = (json.loads(facts[key]) for key in ("vision", "config", "aggregator"))
    config = SamfConfig(
        vision_config={
            "model_type": "vit",
            "image_size": vision["img_size"],
            "patch_size": vision["patch_size"],
            "hidden_size": vision["embed_dim"],
            "num_hidden_layers": vision["depth"],
            "num_attention_heads": vision["num_heads"],
            "intermediate_size": vision["embed_dim"] * vision["mlp_ratio"],
            "layer_norm_eps": vision["layer_norm_eps"],
        },
        text_config={"model_type": "phi3", **text},
        image_token_id=120,
        fusion_type=facts["fusion"],
        project_text=facts["fusion"] == "ao2d",
        fusion_text_scope="sequence",
        slice_position_scope="none",
        volume_dim=aggregator["volume_dim"],
        attn_implementation="eager",
    )
    model = SamfForConditionalGeneration(config).eval()
    tensors = load_file(path)
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    model.load_state_dict(our_weights(weights))  # strict: every key is accounted for
    return model, tensors


@pytest.mark.parametrize("fusion", ["samf", "ao2d"])
def test_outputs_of_the_published_code(fusion, test_reference):
    model, tensors = published_model(test_reference / f"published_{fusion}_tiny.safetensors")
    given = {key.removeprefix("input/"): value for key, value in tensors.items() if key.startswith("input/")}
    expected = {key.removeprefix("output/"): value for key, value in tensors.items() if key.startswith("output/")}
    pixel_values = (given["images_u8"].float() / 255)[:, :, None].expand(-1, -1, 3, -1, -1)
    fused = []
    model.model.fusion.register_forward_hook(lambda module, inputs, output: fused.append(output[0]))
    ids, labels = given["input_ids"], given["labels"]
    with torch.no_grad():
        outputs = model(input_ids=ids, pixel_values=pixel_values, labels=labels)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(outputs.image_outputs.last_hidden_state, expected["slice_embeddings"], **close)
    torch.testing.assert_close(outputs.image_outputs.pooler_output[:, 0], expected["volume_embedding"], **close)
    torch.testing.assert_close(fused[0], expected["fused_token"], **close)
    torch.testing.assert_close(outputs.logits[:, -40:], expected["logits_last40"], rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.loss, expected["loss"].reshape(()), rtol=0, atol=1e-4)
