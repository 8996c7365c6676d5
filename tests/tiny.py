"""Tiny models and inputs that several test files share."""

from typing import Any

import torch

from samf import SamfConfig, SamfForConditionalGeneration, SamfImageProcessor, SamfProcessor
from samf.phantoms.tokenizer import train_small_tokenizer

TEXTS = [
    "Write the radiology report of this chest CT.",
    "Which finding is present? (a) consolidation (b) emphysema (c) cardiomegaly (d) lung nodule",
    "Heart size is normal. Pericardial effusion was not observed. A consolidation is seen in the right lower lobe.",
]
FUSION_TYPES = ("samf", "ao2d", "slice_tokens")
SLICES = 6  # two per plane
IMAGE_TOKENS = 4
IMAGE_ID = 5


def tiny_config(**options: Any) -> SamfConfig:
    """Return the configuration of a model of width 32."""
    vision = {
        "model_type": "vit",
        "image_size": 32,
        "patch_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
    }
    text = {
        "model_type": "phi3",
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    settings = {"image_token_id": IMAGE_ID, "num_image_tokens": IMAGE_TOKENS, "volume_dim": 16, **options}
    return SamfConfig(vision_config=vision, text_config=text | settings.pop("text", {}), **settings)


def tiny_model(seed: int = 0, **options: Any) -> SamfForConditionalGeneration:
    """Return a model whose weights are so large that no part of it is close to a constant function."""
    torch.manual_seed(seed)
    model = SamfForConditionalGeneration(tiny_config(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if "fusion" in name else 0.15)
    return model


def image_tokens(fusion_type: str) -> int:
    """Return the number of image tokens per volume."""
    return SLICES if fusion_type == "slice_tokens" else IMAGE_TOKENS


def tiny_batch(fusion_type: str, rows: int = 2, prompt: int = 7, answer: int = 5, seed: int = 1) -> dict[str, Any]:
    """Return a batch without padding: image tokens, `prompt` tokens and `answer` tokens, with labels on the answer."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((rows, image_tokens(fusion_type)), IMAGE_ID)
    text = torch.randint(6, 99, (rows, prompt + answer), generator=generator)
    input_ids = torch.cat([images, text], dim=1)
    labels = input_ids.clone()
    labels[:, : images.shape[1] + prompt] = -100
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "pixel_values": torch.randn(rows, SLICES, 3, 32, 32, generator=generator),
    }


def tiny_processor(num_image_tokens: int | None = IMAGE_TOKENS, **settings: Any) -> SamfProcessor:
    """Return a processor with a small tokenizer; `settings` are the image processor's."""
    image_processor = SamfImageProcessor(**{"slices_per_plane": 2, "size": 32, **settings})
    return SamfProcessor(image_processor, train_small_tokenizer(TEXTS, 400), num_image_tokens=num_image_tokens)


def model_for(processor: SamfProcessor, seed: int = 0, **options: Any) -> SamfForConditionalGeneration:
    """Return a tiny model with the processor's vocabulary and image tokens."""
    tokenizer = processor.tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if processor.num_image_tokens is None:
        options["fusion_type"] = "slice_tokens"
    else:
        options["num_image_tokens"] = processor.num_image_tokens
    return tiny_model(seed, text=text, image_token_id=processor.image_token_id, **options)
