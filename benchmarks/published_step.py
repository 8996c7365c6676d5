"""A training step in the form of the paper's published code, on SAMF's own weights: the reference of `step_lines`.

It encodes slices one at a time, multiplies W_fusion by as many equal rows as there are image tokens, pads every text to the
same length, and runs the head on all tokens. The loss and the gradients are those of `SamfForConditionalGeneration`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from samf.benchmarks.speed_lines import repeated_fusion
from samf.data.schema import IGNORE_INDEX

Batch = dict[str, torch.Tensor]


class TextShape(NamedTuple):
    """The texts of a batch.

    Attributes:
        lengths: tokens of question and answer of each row.
        prompt: tokens of the question.
        padded: length to which the published form pads.
    """

    lengths: Sequence[int]
    prompt: int
    padded: int


def text_batch(config: Any, texts: TextShape, padded: int) -> Batch:
    """Return image tokens, questions and answers, padded on the right.

    Args:
        config: of the model.
        texts: lengths of the rows.
        padded: tokens of every row, without image tokens.
    """
    rows, generator = len(texts.lengths), torch.Generator().manual_seed(3)
    text = torch.randint(3, config.image_token_id, (rows, max(texts.lengths)), generator=generator)
    text = F.pad(text, (0, padded - text.shape[1]), value=config.text_config.pad_token_id)  # (B, T)
    place = torch.arange(padded)
    is_text = place < torch.tensor(texts.lengths)[:, None]  # (B, T)
    images = torch.full((rows, config.num_image_tokens), config.image_token_id)
    answers = text.masked_fill(~is_text | (place < texts.prompt), IGNORE_INDEX)
    return {
        "input_ids": torch.cat([images, text], dim=1),
        "attention_mask": torch.cat([torch.ones_like(images), is_text.long()], dim=1),
        "prompt_mask": torch.cat([images < 0, (place < texts.prompt).expand(rows, -1)], dim=1),
        "labels": torch.cat([torch.full_like(images, IGNORE_INDEX), answers], dim=1),
    }


def published_slices(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return z_2d (B, S, D) of pixel_values (B, S, C, H, W), one slice of each volume at a time."""
    slices = (pixel_values[:, index, None] for index in range(pixel_values.shape[1]))
    return torch.cat([model.model.encode_slices(pixels).last_hidden_state for pixels in slices], dim=1)


def published_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return the loss of a batch with `pixel_values` in the published form; `model` is not wrapped by peft."""
    inner, ids = model.model, batch["input_ids"]
    slices = published_slices(model, batch["pixel_values"])
    volume = inner.get_image_features(slice_embeddings=slices).pooler_output[:, 0]
    embeds = model.get_input_embeddings()(ids)  # (B, T, text width)
    slice_mask = torch.ones(slices.shape[:2], dtype=torch.bool, device=slices.device)
    given = (slices, volume, embeds, slice_mask, batch["prompt_mask"])
    rows = repeated_fusion(inner.fusion, *given, model.config.num_image_tokens)
    is_image = (ids == model.config.image_token_id)[..., None]
    placed = embeds.masked_scatter(is_image, rows.to(embeds.dtype))
    hidden = inner.language_model(inputs_embeds=placed, attention_mask=batch["attention_mask"]).last_hidden_state
    logits = model.lm_head(hidden)
    loss: torch.Tensor = model.loss_function(logits=logits, labels=batch["labels"], vocab_size=logits.shape[-1])
    return loss
