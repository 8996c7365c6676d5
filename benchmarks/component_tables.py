"""Tiny configurations of the library's language models and slice encoders, for `components`."""

from samf.data.schema import JsonObject

VOCABULARY = 99
SWITCH = 32  # positions that the tiny longrope models rotate by their short factors
WINDOW = 16

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONGROPE = {
    "original_max_position_embeddings": SWITCH,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.05, 1.1, 1.2],
        "long_factor": [1.0, 4.0, 9.0, 16.0],
        "original_max_position_embeddings": SWITCH,
    },
}
MSCALE = {**LONGROPE, "rope_scaling": {**LONGROPE["rope_scaling"], "short_mscale": 1.1, "long_mscale": 1.3}}
# GPT-2 and related models have other names for their sizes.
GPT_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 64, "vocab_size": VOCABULARY}

# Name → model_type and settings in addition to SIZES.
LANGUAGE_MODELS: dict[str, tuple[str, JsonObject]] = {
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3, longrope": ("phi3", LONGROPE),
    "phimoe, longrope": ("phimoe", {**EXPERTS, **MSCALE, "lm_head_bias": True, "output_router_logits": True}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "llama": ("llama", {}),
    "llama, dynamic rope": (
        "llama",
        {"max_position_embeddings": SWITCH, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {**EXPERTS, "output_router_logits": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 8, "output_router_logits": True}),
    "gemma2": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": WINDOW}),
    "gemma3_text": ("gemma3_text", {"head_dim": 8, "sliding_window": WINDOW}),
    "granite": ("granite", {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "granitemoe": ("granitemoe", {**EXPERTS, "logits_scaling": 8.0, "output_router_logits": True}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": WINDOW}),
    "minicpm3": (
        "minicpm3",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    ),
    "olmo2": ("olmo2", {}),
    "glm4": ("glm4", {"head_dim": 8}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "gpt_oss": ("gpt_oss", {**EXPERTS, "head_dim": 8, "sliding_window": WINDOW}),
    "falcon_h1": (
        "falcon_h1",
        {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "gpt2": ("gpt2", GPT_SIZES),
    "gptj": ("gptj", {**GPT_SIZES, "rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "biogpt": ("biogpt", {}),
    "gemma3n_text": (
        "gemma3n_text",
        {
            "head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "layer_types": ["full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 2,
        },
    ),
    "bert": ("bert", {"is_decoder": True}),
    "bart": ("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}),
    "xlnet": ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "max_position_embeddings": None}),
}

IMAGE = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE |= {"intermediate_size": 64}
STAGES = {"image_size": 32, "depths": [1, 1], "hidden_sizes": [16, 32]}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}

SLICE_ENCODERS: dict[str, tuple[str, JsonObject]] = {
    "vit": ("vit", IMAGE),
    "deit": ("deit", IMAGE),
    "dinov2": ("dinov2", IMAGE),
    "dinov2_with_registers": ("dinov2_with_registers", IMAGE),
    "dinov3_vit": ("dinov3_vit", IMAGE),
    "beit": ("beit", IMAGE),
    "data2vec-vision": ("data2vec-vision", IMAGE),
    "vit_mae": ("vit_mae", IMAGE),
    "vit_msn": ("vit_msn", IMAGE),
    "ijepa": ("ijepa", IMAGE),
    "clip_vision_model": ("clip_vision_model", IMAGE),
    "siglip_vision_model": ("siglip_vision_model", IMAGE),
    "aimv2_vision_model": ("aimv2_vision_model", IMAGE),
    "swin": ("swin", WINDOWS),
    "swinv2": ("swinv2", WINDOWS),
    "convnext": ("convnext", {**STAGES, "num_stages": 2}),
    "convnextv2": ("convnextv2", {**STAGES, "num_stages": 2}),
    "resnet": ("resnet", {**STAGES, "embedding_size": 16, "layer_type": "basic"}),
    "clip": ("clip", {}),
    "siglip2_vision_model": ("siglip2_vision_model", {**IMAGE, "num_patches": 4}),
}
