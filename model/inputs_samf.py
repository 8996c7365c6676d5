"""The tensors that enter the model, in two groups that both `forward` methods share."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch

# Arguments of forward by name; which ones there are, beyond those below, depends on the language model.
ModelInputs: TypeAlias = Mapping[str, Any]
StepInputs: TypeAlias = dict[str, Any]  # of one step of generate()


class VolumeInputs(NamedTuple):
    """One volume for each prompt: pixels or slice embeddings, and what is known of each slice.

    Attributes:
        pixel_values (`torch.Tensor` (B, S, C, H, W)): slices as the image processor returns them.
        slice_embeddings (`torch.Tensor` (B, S, slice width)): z_2d of an earlier call, in place of `pixel_values`.
        slice_mask (`torch.Tensor` (B, S) bool): True = a slice, False = padding. A row that is all False is a prompt
            without a volume. None = no padding.
        slice_planes (`torch.Tensor` (B, S)): 0 axial, 1 coronal, 2 sagittal.
        slice_positions (`torch.Tensor` (B, S)): position in [0, 1] along the plane's normal. Without planes and positions
            the slices count as equal thirds, one for each plane, evenly spaced: the image processor's default.
        extra_values (`torch.Tensor` (B, sum of widths)): vectors of `config.extra_sources`, in that order. They enter
            with the volume: a row without a volume has no fused token for them.
        extra_mask (`torch.Tensor` (B, sources) bool): which extra sources are present. `extra_values` without a mask =
            all present; neither = all absent. [`SamfModel.pack_extra_sources`] returns both.
    """

    pixel_values: torch.Tensor | None
    slice_embeddings: torch.Tensor | None
    slice_mask: torch.Tensor | None
    slice_planes: torch.Tensor | None
    slice_positions: torch.Tensor | None
    extra_values: torch.Tensor | None
    extra_mask: torch.Tensor | None


class PromptInputs(NamedTuple):
    """The prompts and answers, as ids or as embeddings.

    Attributes:
        input_ids (`torch.Tensor` (B, T)): token ids, with image placeholders in place of the volume.
        inputs_embeds (`torch.Tensor` (B, T, text width)): their embeddings, in place of `input_ids`.
        attention_mask (`torch.Tensor` (B, T)): as the language model takes it.
        position_ids (`torch.Tensor` (B, T)): as the language model takes it.
        prompt_mask (`torch.Tensor` (B, T) bool): the text that the fusion reads; see
            [`~image_tokens_samf.fusion_text_mask`]. Training with a volume needs it or `labels`. Placeholders after its
            end are generated tokens, not the volume's.
        prefix_ids (`torch.Tensor` (B, P)): ids of the tokens that a non-empty cache holds before these. The fusion reads
            them too; `prompt_mask` and `attention_mask` are then (B, P + T).
        labels (`torch.Tensor` (B, T)): token ids, -100 = no loss.
    """

    input_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor | None
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    prompt_mask: torch.Tensor | None
    prefix_ids: torch.Tensor | None
    labels: torch.Tensor | None
