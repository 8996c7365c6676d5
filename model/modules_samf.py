"""The modules of the paper: slice positions, aggregator f_3d and slice-attentive fusion.

Paper: "From Slices to Volumes: Multi-Scale Fusion of 2D and 3D Features for CT Scan Report Generation", MICCAI 2025.
Equation numbers are the paper's. Shapes: B volumes (and prompts), S slices, T tokens, D = slice width, d = d_proj.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_samf import SamfConfig
from .extra_sources_samf import check_source_names, split_sources
from .outputs_samf import SamfSliceAttentions
from .workarounds_samf import FewRowsLinear, restore_positions

NUM_PLANES = 3  # axial, coronal, sagittal
DEPTH_FREQUENCIES = 16


class SlicePositionEmbedding(nn.Module):
    """Embedding of a slice's origin: its plane, and its position along the plane's normal.

    The position in [0, 1] enters as sines and cosines, so that a volume may have any number of slices.

    Args:
        dim: width D of the slice embeddings.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.plane = nn.Embedding(NUM_PLANES, dim)
        self.depth = nn.Linear(2 * DEPTH_FREQUENCIES, dim, bias=False)

    def forward(self, planes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the plane and depth embeddings, (B, S, D).

        Args:
            planes: (B, S), 0 axial, 1 coronal, 2 sagittal.
            positions: (B, S) in [0, 1], or the bits of float32 values as int32 (see `restore_positions`).
        """
        positions = restore_positions(positions)
        octaves = torch.arange(DEPTH_FREQUENCIES, device=positions.device, dtype=torch.float32) / 2
        phases = positions.float()[..., None] * math.pi * 2**octaves  # (B, S, frequencies)
        waves = torch.cat([phases.sin(), phases.cos()], dim=-1).to(self.depth.weight.dtype)
        return self.plane(planes) + self.depth(waves)


def default_slice_places(batch: int, slices: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return default planes and positions of slices: equal thirds, one for each plane, evenly spaced.

    This is the order in which the image processor returns slices by default.

    Args:
        batch: number of volumes B.
        slices: number of slices S of each volume.
        device: where the tensors are created.

    Returns:
        planes (B, S) int64 and positions (B, S) float32.
    """
    index = torch.arange(slices, device=device)
    per_plane = (slices + NUM_PLANES - 1) // NUM_PLANES
    # By comparisons: a remainder by a symbolic size has no form in ONNX.
    planes = (index >= per_plane).long() + (index >= 2 * per_plane).long()
    positions = (index - planes * per_plane + 0.5) / per_plane
    return planes.expand(batch, -1), positions.expand(batch, -1)


# --- Aggregator, eq. 2 ------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the aggregator's attention without a fused kernel.

    Args:
        module: the attention module; dropout is active while it trains.
        query: (B, heads, N, head width).
        key: as `query`.
        value: as `query`.
        attention_mask: added to the scores (B, heads, N, N); None = no mask.
        scaling: factor of the scores.
        dropout: probability of dropping a weight.
        kwargs: ignored; other attention implementations take more.

    Returns:
        The output (B, N, heads, head width) and the weights (B, heads, N, N).
    """
    scores = query @ key.mT * scaling  # (B, heads, N, N)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SamfAggregatorAttention(nn.Module):
    """Multi-head self-attention of the aggregator, with the attention implementation that the configuration names."""

    def __init__(self, config: SamfConfig):
        super().__init__()
        dim = config.slice_dim
        self.config = config
        self.head_dim = dim // config.aggregator_num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.aggregator_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return the attention's output, (B, N, D).

        Args:
            hidden_states: (B, N, D).
            attention_mask: as `create_bidirectional_mask` returns it.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)  # (B, heads, N, head width)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.dropout if self.training else 0.0
        output, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout)
        return self.o_proj(output.reshape(hidden_states.shape))


class SamfAggregatorLayer(GradientCheckpointingLayer):
    """One transformer encoder layer; LayerNorm after each block (paper) or before it."""

    def __init__(self, config: SamfConfig):
        super().__init__()
        dim = config.slice_dim
        self.pre_norm = config.aggregator_norm == "pre"
        self.attention = SamfAggregatorAttention(config)
        self.attention_norm = nn.LayerNorm(dim, eps=config.aggregator_layer_norm_eps)
        self.up_proj = nn.Linear(dim, config.aggregator_ffn_dim)
        self.activation = ACT2FN[config.aggregator_activation]
        self.down_proj = nn.Linear(config.aggregator_ffn_dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=config.aggregator_layer_norm_eps)
        self.dropout = nn.Dropout(config.aggregator_dropout)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the layer's output, (B, N, D).

        Args:
            hidden_states: (B, N, D).
            attention_mask: as `create_bidirectional_mask` returns it.
        """
        if self.pre_norm:
            hidden_states = hidden_states + self._attend(self.attention_norm(hidden_states), attention_mask)
            return hidden_states + self._feed_forward(self.feed_forward_norm(hidden_states))
        hidden_states = self.attention_norm(hidden_states + self._attend(hidden_states, attention_mask))
        return self.feed_forward_norm(hidden_states + self._feed_forward(hidden_states))

    def _attend(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.dropout(self.attention(hidden_states, attention_mask))

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down_proj(self.dropout(self.activation(self.up_proj(hidden_states)))))


class SamfAggregator(nn.Module):
    """f_3d (eq. 2): a transformer encoder over the slice embeddings, read out at its own CLS token.

    With `config.aggregator_pooling="cls_max"` (not in the paper) the maximum over the slices joins the CLS token: a small
    finding is in one or two of many slices, and the CLS token's attention has to learn to look there.
    """

    def __init__(self, config: SamfConfig):
        super().__init__()
        dim = config.slice_dim
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.layers = nn.ModuleList([SamfAggregatorLayer(config) for _ in range(config.aggregator_num_layers)])
        # The residual stream of a pre-norm stack needs a final norm; the published post-norm form has none.
        self.norm = (
            nn.LayerNorm(dim, eps=config.aggregator_layer_norm_eps)
            if config.aggregator_norm == "pre"
            else nn.Identity()
        )
        self.reads_maximum = config.aggregator_pooling == "cls_max"
        self.projection = nn.Linear(dim * (1 + self.reads_maximum), config.volume_dim)

    def forward(self, slices: torch.Tensor, slice_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the volume embedding z_3d, (B, volume_dim).

        Args:
            slices: z_2d, (B, S, D).
            slice_mask: (B, S) bool, True = a slice, False = padding; None = no padding.
        """
        hidden_states = torch.cat([self.cls_token.expand(slices.shape[0], -1, -1), slices], dim=1)  # (B, 1 + S, D)
        if slice_mask is not None:
            slice_mask = F.pad(slice_mask, (1, 0), value=True)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=slice_mask
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        if not self.reads_maximum:
            return self.projection(self.norm(hidden_states[:, 0]))
        hidden_states = self.norm(hidden_states)
        maximum = hidden_states[:, 1:]
        if slice_mask is not None:
            padding = ~slice_mask[:, 1:, None]
            maximum = maximum.masked_fill(padding, torch.finfo(maximum.dtype).min)
            maximum = maximum.masked_fill(padding.all(dim=1, keepdim=True), 0)  # a row without a volume
        return self.projection(torch.cat([hidden_states[:, 0], maximum.amax(dim=1)], dim=-1))


# --- Fusion, eqs. 3 to 12 ---------------------------------------------------------------------------------------------


def attend(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by softmax over the keys that `mask` keeps; the keys are also the values.

    Scores are float32 even in half precision: unscaled sums over thousands of products overflow float16, and rounding
    them to bfloat16 would change the softmax visibly.

    Args:
        query: (B, Q, d).
        key: (B, K, d).
        mask: (B, K) bool, True = keep.
        scale: factor of the scores.

    Returns:
        The weighted sums (B, Q, d) and the weights (B, Q, K); both are zero where nothing is kept.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(precision) @ key.to(precision).mT * scale  # (B, Q, K)
    keep = mask[:, None, :]
    weights = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(~keep, 0)
    weights = weights.to(key.dtype)
    return weights @ key, weights


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over dim 1 of x (B, T, d) where `mask` (B, T) is True, as (B, 1, d).

    Summed in float32: over a long prompt a float16 sum overflows, and a bfloat16 sum loses its last terms.
    """
    mask = mask.unsqueeze(-1)
    total = x.masked_fill(~mask, 0).sum(1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)


class SamfFusion(nn.Module):
    """Fusion of slices, volume and prompt into the image tokens (paper, section 2.2).

    F_3d = W_3d z_3d (eq. 4), F_2d = W_2d z_2d (eq. 3), F_text = W_text E; then by `config.fusion_type`:

    - `samf`: W_fusion [F_3d ‖ F_2d3d ‖ F_text3d] (eq. 10), one vector;
    - `ao2d`: W_fusion [F_3d ‖ F_2d3d ‖ F_text3d ‖ F_text2d] (eq. 12), one vector;
    - `slice_tokens` (not in the paper): W_fusion [F_3d ‖ F_2d,s ‖ F_text,s] with F_text,s = softmax over T of
      F_2d,s·F_textᵀ applied to F_text, one vector for each slice.

    Eq. 9 prints F_3d as the value that beta weighs. Since beta sums to one, that would return F_3d itself. Figure 2 and
    the reference implementation weigh F_text, and so does this class. The scores are unscaled, as in the paper, unless
    `config.fusion_scale` is `"rsqrt"` (1/sqrt(d)).

    The vector of each of `config.extra_sources`, projected to d, is appended to every concatenation; an absent one is
    zero.

    Raises:
        ValueError: an extra source has a name that `torch.nn.ModuleDict` reserves.
    """

    def __init__(self, config: SamfConfig):
        super().__init__()
        dim, text_dim = config.fusion_dim, config.text_config.hidden_size
        self.fusion_type = config.fusion_type
        self.scale = dim**-0.5 if config.fusion_scale == "rsqrt" else 1.0
        self.extra_sources = dict(config.extra_sources)
        self.project_slices = nn.Linear(config.slice_dim, dim)  # W_2d, eq. 3
        self.project_volume = nn.Linear(config.volume_dim, dim)  # W_3d, eq. 4
        self.project_text = nn.Linear(text_dim, dim) if config.project_text else nn.Identity()
        check_source_names(self.extra_sources)
        self.project_extra = nn.ModuleDict({name: nn.Linear(width, dim) for name, width in self.extra_sources.items()})
        parts = (4 if config.fusion_type == "ao2d" else 3) + len(self.extra_sources)
        # W_fusion, eqs. 10 and 12. Saved weights and optimizer states have it under this name.
        self.mix = FewRowsLinear(dim * parts, text_dim)

    def forward(
        self,
        slices: torch.Tensor,
        volume: torch.Tensor,
        text: torch.Tensor,
        slice_mask: torch.Tensor,
        text_mask: torch.Tensor,
        extra_values: torch.Tensor | None = None,
        extra_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, SamfSliceAttentions]:
        """Fuse slices, volume and prompt.

        Args:
            slices: z_2d, (B, S, slice width).
            volume: z_3d, (B, volume_dim).
            text: E, the prompt's token embeddings, (B, T, text width).
            slice_mask: (B, S) bool, True = keep.
            text_mask: (B, T) bool, True = keep.
            extra_values: (B, sum of the extra sources' widths); None = all absent.
            extra_mask: (B, sources) bool, True = present; None = all present.

        Returns:
            Image tokens (B, 1, text width), or (B, S, text width) for `slice_tokens`, and the softmax weights.
        """
        extra = self._project_extra(volume, extra_values, extra_mask)  # sources x (B, 1, d)
        slices = self.project_slices(slices)  # (B, S, d)
        volume = self.project_volume(volume).unsqueeze(1)  # (B, 1, d)
        text = self.project_text(text)  # (B, T, d)
        if self.fusion_type == "slice_tokens":
            slice_text, weights = attend(slices, text, text_mask, self.scale)  # (B, S, d)
            parts = [volume.expand_as(slices), slices, slice_text, *(part.expand_as(slices) for part in extra)]
            return self.mix(torch.cat(parts, dim=-1)), SamfSliceAttentions(slice_text=weights)

        volume_slices, alpha = attend(volume, slices, slice_mask, self.scale)  # eqs. 5 and 8
        volume_text, beta = attend(volume, text, text_mask, self.scale)  # eqs. 6 and 9
        parts, gamma = [volume, volume_slices, volume_text], None
        if self.fusion_type == "ao2d":
            text_slices, gamma = attend(text, slices, slice_mask, self.scale)  # eq. 7, (B, T, d)
            parts.append(masked_mean(text_slices, text_mask))  # eq. 11
        return self.mix(torch.cat(parts + extra, dim=-1)), SamfSliceAttentions(alpha=alpha, beta=beta, gamma=gamma)

    def _project_extra(
        self, volume: torch.Tensor, values: torch.Tensor | None, mask: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Return each extra source's projected vector (B, 1, d), zero where the source is absent."""
        extra = []
        sources = split_sources(self.extra_sources, volume, values, mask)
        layers = cast(Iterable[nn.Linear], self.project_extra.values())
        for layer, (vector, absent) in zip(layers, sources, strict=True):
            # Filled before and after the layer: a NaN in place of an unknown value must not reach its gradient.
            projected = layer(vector.masked_fill(absent, 0).to(layer.weight.dtype)).masked_fill(absent, 0)
            extra.append(projected.unsqueeze(1))
        return extra
