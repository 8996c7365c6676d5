"""What the models return: the fields of the library's outputs plus those of the volume."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils.generic import ModelOutput


@dataclass
class SamfSliceAttentions(ModelOutput):
    """Softmax weights of the fusion, for the evidence view.

    Args:
        alpha (`torch.Tensor` (B, 1, S)): volume to slices, eq. 5 (`samf`, `ao2d`).
        beta (`torch.Tensor` (B, 1, T)): volume to prompt tokens, eq. 6 (`samf`, `ao2d`).
        gamma (`torch.Tensor` (B, T, S)): prompt tokens to slices, eq. 7 (`ao2d`). Rows of tokens outside the prompt have
            no meaning.
        slice_text (`torch.Tensor` (B, S, T)): slices to prompt tokens (`slice_tokens`).
    """

    alpha: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    slice_text: torch.Tensor | None = None


@dataclass
class SamfModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the language model's layers, and of the volume.

    Args:
        image_outputs (`BaseModelOutputWithPooling`): slice embeddings (B, S, slice width) as `last_hidden_state`, the
            volume embedding (B, 1, volume_dim) as `pooler_output`.
        slice_attentions (`SamfSliceAttentions`): only with `output_slice_attentions=True`.
        finding_logits (`torch.Tensor` (B, L)): one logit for each name in `config.finding_names`.
        router_logits (`tuple[torch.Tensor]`): of a mixture-of-experts language model, with `output_router_logits=True`.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    slice_attentions: SamfSliceAttentions | None = None
    finding_logits: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class SamfCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`loss` and `logits` (B, T, vocabulary) of the language model, with the fields of [`SamfModelOutputWithPast`].

    Args:
        aux_loss (`torch.Tensor`): load-balancing loss of a mixture-of-experts language model; with labels, `loss`
            includes it.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    slice_attentions: SamfSliceAttentions | None = None
    finding_logits: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None
