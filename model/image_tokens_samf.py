"""Image tokens in the prompt: which text the fusion reads, and where its vectors go."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_samf import SamfConfig
from .constants_samf import IGNORE_INDEX
from .inputs_samf import PromptInputs


class FusionText(NamedTuple):
    """The text of a batch as the fusion sees it.

    Attributes:
        embeds: token embeddings of the cached prefix and the prompt, (B, P + T, text width).
        mask: which of them the fusion reads, (B, P + T) bool.
        image_mask: the volume's placeholders among the prompt's tokens, (B, T) bool.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    image_mask: torch.Tensor


def fusion_text_mask(
    text_scope: str,
    image_mask: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return which tokens are the fusion's text, (B, T) bool.

    With `text_scope="prompt"` these are, in this order of precedence, the tokens of `prompt_mask`; with `labels`, the
    tokens before the first label after the volume, except those that are labels themselves (answers of earlier turns);
    else all tokens. Image and padding tokens never count. No logit then depends on a later answer token.

    With `"sequence"` (the reference implementation) every token counts, including padding, placeholders and answer.

    Tokens after the end of `prompt_mask` were added by `generate()` and never count, so that the fused vector is the same
    with and without a cache.

    Args:
        text_scope: `config.fusion_text_scope`, `"prompt"` or `"sequence"`.
        image_mask: (B, T), True = image placeholder.
        attention_mask: (B, T), 0 = padding; ignored unless it has this shape.
        prompt_mask: (B, up to T), True = prompt text.
        labels: (B, T), -100 = no loss.

    Raises:
        ValueError: `prompt_mask` has more tokens than the input, or another batch size.
    """
    batch, length = image_mask.shape
    attention_mask, prompt_mask, labels = (
        None if value is None else value.to(image_mask.device) for value in (attention_mask, prompt_mask, labels)
    )
    given = torch.ones_like(image_mask)
    if prompt_mask is not None:
        added = length - prompt_mask.shape[1]
        if added < 0 or prompt_mask.shape[0] != batch:
            raise ValueError(
                f"prompt_mask has shape {tuple(prompt_mask.shape)} for input of shape {(batch, length)}; it must cover "
                "the same tokens, or leave out those that generate() has added at the end."
            )
        given = F.pad(torch.ones_like(prompt_mask, dtype=torch.bool), (0, added), value=False)
        prompt_mask = F.pad(prompt_mask.bool(), (0, added), value=False)
    if text_scope == "sequence":
        return given
    if prompt_mask is not None:
        mask = prompt_mask
    elif labels is not None:
        answers = labels != IGNORE_INDEX
        after_volume = (image_mask.cumsum(dim=1) > 0) | ~image_mask.any(dim=1, keepdim=True)  # (B, T)
        mask = ~answers & ((answers & after_volume).cumsum(dim=1) == 0)
    else:
        mask = given
    mask = mask & ~image_mask
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape == mask.shape:
        mask = mask & attention_mask.bool()
    return mask


def find_fusion_text(
    config: SamfConfig,
    embed: nn.Module,
    inputs_embeds: torch.Tensor,
    image_mask: torch.Tensor,
    prompt: PromptInputs,
) -> FusionText:
    """Return the text that the fusion reads, including the prefix that a non-empty cache hides.

    Args:
        config: the model's configuration.
        embed: the language model's input embeddings.
        inputs_embeds: embeddings of the prompt's tokens, (B, T, text width).
        image_mask: their placeholders, (B, T) bool.
        prompt: the inputs of `forward`.
    """
    length, prefix = image_mask.shape[1], 0
    embeds, placeholders, labels = inputs_embeds, image_mask, prompt.labels
    if prompt.prefix_ids is not None:
        prefix = prompt.prefix_ids.shape[1]
        before = embed(prompt.prefix_ids).to(embeds.device, embeds.dtype)
        embeds = torch.cat([before, embeds], dim=1)
        prefix_mask = (prompt.prefix_ids == config.image_token_id).to(image_mask.device)
        placeholders = torch.cat([prefix_mask, image_mask], dim=1)
        labels = None if labels is None else F.pad(labels, (prefix, 0), value=IGNORE_INDEX)
    mask = fusion_text_mask(config.fusion_text_scope, placeholders, prompt.attention_mask, prompt.prompt_mask, labels)
    if prompt.prompt_mask is not None and prompt.prompt_mask.shape[1] < prefix + length:
        image_mask = image_mask.clone()  # the tokens after the prompt were generated, or are proposed
        image_mask[:, max(prompt.prompt_mask.shape[1] - prefix, 0) :] = False
    return FusionText(embeds, mask, image_mask)


def place_image_tokens(
    inputs_embeds: torch.Tensor, image_mask: torch.Tensor, tokens: torch.Tensor, slice_mask: torch.Tensor
) -> torch.Tensor:
    """Replace the placeholders' embeddings with the image tokens.

    Args:
        inputs_embeds: (B, T, D).
        image_mask: (B, T) bool, True = placeholder.
        tokens: (B, 1, D), the same vector for every placeholder, or (B, S, D): the k-th placeholder of a row takes the
            token of the k-th slice that `slice_mask` keeps.
        slice_mask: (B, S) bool, True = a slice.

    Returns:
        (B, T, D) on the device of `inputs_embeds`; a device map may place the fusion elsewhere.
    """
    tokens = tokens.to(inputs_embeds.device, inputs_embeds.dtype)
    image_mask, slice_mask = image_mask.to(inputs_embeds.device), slice_mask.to(inputs_embeds.device)
    if tokens.shape[1] > 1:
        kept_first = slice_mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # (B, S)
        order = (image_mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, T), index of the placeholder in its row
        slots = kept_first.gather(1, order.clamp(max=tokens.shape[1] - 1))
        tokens = tokens.gather(1, slots.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))  # (B, T, D)
    return torch.where(image_mask.unsqueeze(-1), tokens, inputs_embeds)
