"""SAMF: slice encoder, aggregator, slice-attentive multimodal fusion, language model.

Paper: "From Slices to Volumes: Multi-Scale Fusion of 2D and 3D Features for CT Scan Report Generation", MICCAI 2025.
Equation numbers in this file are the paper's. Shapes: B volumes (and prompts), S slices, T tokens, d = d_proj.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_torchdynamo_exporting, torch_compilable_check

from .components_samf import (
    KEPT_OUTPUTS,
    CausalLanguageModel,
    build_language_model,
    encode_pixels,
    forget_longest_sequence,
    pool_slices,
    prepare_slice_encoder,
    takes_positions,
)
from .configuration_samf import IGNORE_INDEX, SamfConfig
from .generation_samf import SamfGenerationMixin, cached_tokens, warn_of_length
from .hub_samf import HubModel
from .model_card import hub_id

logger = logging.get_logger(__name__)

# What Trainer tells of a whole optimizer step, for the loss and for no other part.
LOSS_COUNTS = ("num_items_in_batch", "num_findings_in_batch")

# What forward hands on to the language model; another name among its arguments may be a misspelt one.
NOT_MISSPELT = {"cache", "past_key_values", "use_cache", "cache_position", "return_dict", "output_router_logits"}
RECORDED = ("output_attentions", "output_hidden_states")  # asked of the slice encoder too
MANY_ROWS, LARGE_WEIGHT = 16, 1 << 20
NUM_PLANES = 3  # axial, coronal, sagittal
DEPTH_FREQUENCIES = 16


def check(condition: torch.Tensor, message: str | Callable[[], str], compiled_message: str | None = None) -> None:
    """Raise ValueError with `message` unless all of `condition` holds; in a compiled graph RuntimeError, without a break.

    A graph can't write numbers into a message: it says `compiled_message`, by default `message`, which is then a string.
    """
    if torch.compiler.is_compiling() and not is_torchdynamo_exporting():
        torch._assert_async(condition.all(), compiled_message or message)
    else:
        torch_compilable_check(condition, message)


@dataclass
class SamfSliceAttentions(ModelOutput):
    """Softmax weights of the fusion, for the evidence view.

    Args:
        alpha (`torch.FloatTensor` (B, 1, S)): volume to slices, eq. 5 (`samf`, `ao2d`).
        beta (`torch.FloatTensor` (B, 1, T)): volume to prompt tokens, eq. 6 (`samf`, `ao2d`).
        gamma (`torch.FloatTensor` (B, T, S)): prompt tokens to slices, eq. 7 (`ao2d`); rows of other tokens mean nothing.
        slice_text (`torch.FloatTensor` (B, S, T)): slices to prompt tokens (`slice_tokens`).
    """

    alpha: torch.FloatTensor | None = None
    beta: torch.FloatTensor | None = None
    gamma: torch.FloatTensor | None = None
    slice_text: torch.FloatTensor | None = None


@dataclass
class SamfModelOutputWithPast(BaseModelOutputWithPast):
    """The language model's output, with:

    Args:
        image_outputs (`BaseModelOutputWithPooling`): slice embeddings (B, S, slice width) as `last_hidden_state`, the
            volume embedding (B, 1, volume_dim) as `pooler_output`.
        slice_attentions (`SamfSliceAttentions`): with `output_slice_attentions=True`.
        finding_logits (`torch.FloatTensor` (B, L)): one logit a name in `config.finding_names`.
        router_logits (`tuple[torch.FloatTensor]`): of a language model with experts, when it is asked for them.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    slice_attentions: SamfSliceAttentions | None = None
    finding_logits: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SamfCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`loss` and `logits` (B, T, vocabulary) of the language model, with the fields of [`SamfModelOutputWithPast`].

    `aux_loss` is the load-balancing loss of a language model with experts; with labels it is part of `loss`.
    """

    image_outputs: BaseModelOutputWithPooling | None = None
    slice_attentions: SamfSliceAttentions | None = None
    finding_logits: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None


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
    """Attention of the aggregator written out; query, key, value (B, heads, N, head width)."""
    scores = query @ key.mT * scaling  # (B, heads, N, N)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SlicePositionEmbedding(nn.Module):
    """Where a slice comes from: its plane, and how far along the plane's normal it lies.

    Depth enters as sines and cosines of the position in [0, 1], so that any number of slices can be read.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.plane = nn.Embedding(NUM_PLANES, dim)
        self.depth = nn.Linear(2 * DEPTH_FREQUENCIES, dim, bias=False)

    def forward(self, planes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """planes (B, S) in 0..2 and positions (B, S) in [0, 1] give (B, S, dim).

        Positions may also be the bits of float32 numbers as int32, which launchers that round floating inputs leave alone.
        """
        if positions.dtype == torch.int32:
            positions = positions.view(torch.float32)
        octaves = torch.arange(DEPTH_FREQUENCIES, device=positions.device, dtype=torch.float32) / 2
        phases = positions.float()[..., None] * math.pi * 2**octaves  # (B, S, frequencies)
        waves = torch.cat([phases.sin(), phases.cos()], dim=-1).to(self.depth.weight.dtype)
        return self.plane(planes) + self.depth(waves)


class SamfAggregatorAttention(nn.Module):
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
        """hidden_states (B, N, D), attention_mask as `create_bidirectional_mask` makes it."""
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
        """hidden_states (B, N, D) to the same shape."""
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
    """f_3d (eq. 2): a transformer encoder over the slice embeddings, read out at its own CLS token."""

    def __init__(self, config: SamfConfig):
        super().__init__()
        dim = config.slice_dim
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.layers = nn.ModuleList([SamfAggregatorLayer(config) for _ in range(config.aggregator_num_layers)])
        # A pre-norm stack leaves its sum unnormalised; the published post-norm form has no final norm.
        self.norm = (
            nn.LayerNorm(dim, eps=config.aggregator_layer_norm_eps)
            if config.aggregator_norm == "pre"
            else nn.Identity()
        )
        self.projection = nn.Linear(dim, config.volume_dim)

    def forward(self, slices: torch.Tensor, slice_mask: torch.Tensor | None = None) -> torch.Tensor:
        """slices (B, S, D), slice_mask (B, S) with True = a slice; returns z_3d (B, volume_dim)."""
        hidden_states = torch.cat([self.cls_token.expand(slices.shape[0], -1, -1), slices], dim=1)  # (B, 1 + S, D)
        if slice_mask is not None:
            slice_mask = F.pad(slice_mask, (1, 0), value=True)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=slice_mask
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask)
        return self.projection(self.norm(hidden_states[:, 0]))


def attend(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention whose values are its keys, over those that `mask` keeps.

    query (B, Q, d), key (B, K, d), mask (B, K) with True = keep. Returns the weighted sums (B, Q, d) and the weights
    (B, Q, K). Where nothing is kept the weights and the sums are zero.

    Scores are float32 even in half precision: unscaled sums over thousands of products overflow float16, and bfloat16
    would round them by more than the softmax can bear.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(precision) @ key.to(precision).mT * scale  # (B, Q, K)
    keep = mask[:, None, :]
    weights = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(~keep, 0)
    weights = weights.to(key.dtype)
    return weights @ key, weights


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over dim 1 of x (B, T, d) where `mask` (B, T) is True: (B, 1, d).

    Summed in float32: in float16 the sum over a long prompt would overflow, and in bfloat16 lose its last terms.
    """
    mask = mask.unsqueeze(-1)
    total = x.masked_fill(~mask, 0).sum(1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)


class FewRowsLinear(nn.Linear):
    """A linear layer that mostly gets one row a volume.

    Its time is then that of reading the weight once, and on a CPU the product with the rows as columns reads a weight
    that no cache holds more than twice as fast as the library's own form.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)  # (N, in)
        if torch.compiler.is_compiling() or x.device.type != "cpu":  # one graph for any number of rows
            return super().forward(x)
        if rows.shape[0] > MANY_ROWS or self.weight.numel() < LARGE_WEIGHT:
            return super().forward(x)
        output = (self.weight @ rows.mT).mT + self.bias  # (N, out)
        return output.reshape(*x.shape[:-1], -1)


class SamfFusion(nn.Module):
    """Slices, volume and prompt become the image tokens (paper, section 2.2).

    F_3d = W_3d z_3d (eq. 4), F_2d = W_2d z_2d (eq. 3), F_text = W_text E; then by `config.fusion_type`:

    - `samf`: W_fusion [F_3d ‖ F_2d3d ‖ F_text3d] (eq. 10), one vector;
    - `ao2d`: W_fusion [F_3d ‖ F_2d3d ‖ F_text3d ‖ F_text2d] (eq. 12), one vector;
    - `slice_tokens`: W_fusion [F_3d ‖ F_2d,s ‖ F_text,s] with F_text,s = softmax over T of F_2d,s·F_textᵀ applied to
      F_text: one vector a slice (ours).

    Eq. 9 prints F_3d as the value that beta weighs; beta sums to one, so that would only give F_3d back. Figure 2 and
    the published code weigh F_text, and so does this class. The scores are unscaled, as in the paper, unless
    `config.fusion_scale` is `"rsqrt"` (1/sqrt(d)).

    The vector of each of `config.extra_sources`, projected to d, is appended to every concatenation; zeros stand for one
    that is absent.
    """

    def __init__(self, config: SamfConfig):
        super().__init__()
        dim, text_dim = config.fusion_dim, config.text_config.hidden_size
        self.fusion_type = config.fusion_type
        self.scale = dim**-0.5 if config.fusion_scale == "rsqrt" else 1.0
        self.project_slices = nn.Linear(config.slice_dim, dim)  # W_2d, eq. 3
        self.project_volume = nn.Linear(config.volume_dim, dim)  # W_3d, eq. 4
        self.project_text = nn.Linear(text_dim, dim) if config.project_text else nn.Identity()
        taken = sorted(name for name in config.extra_sources if hasattr(nn.ModuleDict(), name))
        if taken:
            raise ValueError(
                f"SamfConfig.extra_sources has the names {taken}, which torch's modules use themselves; rename."
            )
        self.project_extra = nn.ModuleDict(
            {name: nn.Linear(width, dim) for name, width in config.extra_sources.items()}
        )
        parts = (4 if config.fusion_type == "ao2d" else 3) + len(config.extra_sources)
        self.mix = FewRowsLinear(dim * parts, text_dim)  # W_fusion, eqs. 10 and 12

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
        """
        slices (B, S, slice width), volume (B, volume_dim), text (B, T, text width); masks (B, S), (B, T), True = keep;
        extra_values (B, sum of the extra sources' widths), extra_mask (B, sources), None = all present.
        Returns image tokens (B, 1, text width), or (B, S, text width) for `slice_tokens`, and the softmax weights.
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
        """Each extra source's vector (B, 1, d), zero where the source is absent."""
        widths = [layer.in_features for layer in self.project_extra.values()]
        if values is None and not widths:
            return []
        shape = (volume.shape[0], sum(widths))
        if values is None:
            values, mask = volume.new_zeros(shape), volume.new_zeros(shape[0], len(widths))
        if tuple(values.shape) != shape or (mask is not None and tuple(mask.shape) != (shape[0], len(widths))):
            raise ValueError(
                f"extra_values has shape {tuple(values.shape)} and extra_mask {None if mask is None else tuple(mask.shape)}"
                f"; the sources {dict(zip(self.project_extra, widths, strict=True))} of {shape[0]} volumes make them "
                f"{shape} and {(shape[0], len(widths))}. SamfModel.pack_extra_sources makes both."
            )
        extra = []
        for index, (layer, part) in enumerate(
            zip(self.project_extra.values(), values.split(widths, dim=1), strict=True)
        ):
            absent = torch.zeros_like(part[:, :1], dtype=torch.bool) if mask is None else ~mask[:, index, None].bool()
            # Filled before and after: a NaN that stands for "unknown" shall not reach the layer's gradient.
            part = layer(part.masked_fill(absent, 0).to(layer.weight.dtype)).masked_fill(absent, 0)
            extra.append(part.unsqueeze(1))
        return extra


def fusion_text_mask(
    text_scope: str,
    image_mask: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which tokens are the fusion's text: (B, T) bool.

    With `text_scope="prompt"`: the explicit `prompt_mask`; else, with labels, the tokens before the first label that
    counts behind the volume, without those that are labels themselves (answers of earlier turns); else all. Image and
    padding tokens never count. No logit can then depend on a later answer token.
    With `"sequence"` (the published code): every token, padding, placeholders and answer included.

    Tokens beyond the end of `prompt_mask` were made by generate() and never count, so that the fused vector stays the
    same with the cache on or off.

    Args:
        image_mask (B, T) True = image placeholder; attention_mask (B, T), ignored unless 2-D; prompt_mask (B, <= T);
        labels (B, T), -100 = doesn't count.
    """
    batch, length = image_mask.shape
    attention_mask, prompt_mask, labels = (
        None if value is None else value.to(image_mask.device) for value in (attention_mask, prompt_mask, labels)
    )
    given = torch.ones_like(image_mask)
    if prompt_mask is not None:
        made = length - prompt_mask.shape[1]
        if made < 0 or prompt_mask.shape[0] != batch:
            raise ValueError(
                f"prompt_mask has shape {tuple(prompt_mask.shape)} for input of shape {(batch, length)}; it must cover "
                "the same tokens, or leave out those that generate() has added at the end."
            )
        given = F.pad(torch.ones_like(prompt_mask, dtype=torch.bool), (0, made), value=False)
        prompt_mask = F.pad(prompt_mask.bool(), (0, made), value=False)
    if text_scope == "sequence":
        return given
    if prompt_mask is not None:
        mask = prompt_mask
    elif labels is not None:
        answers = labels != IGNORE_INDEX
        behind = (image_mask.cumsum(dim=1) > 0) | ~image_mask.any(
            dim=1, keepdim=True
        )  # (B, T), the volume stands before
        mask = ~answers & ((answers & behind).cumsum(dim=1) == 0)
    else:
        mask = given
    mask = mask & ~image_mask
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape == mask.shape:
        mask = mask & attention_mask.bool()
    return mask


def place_image_tokens(
    inputs_embeds: torch.Tensor, image_mask: torch.Tensor, tokens: torch.Tensor, slice_mask: torch.Tensor
) -> torch.Tensor:
    """Put the image tokens where the placeholders stand.

    inputs_embeds (B, T, D), image_mask (B, T); tokens (B, 1, D): the same vector everywhere, or (B, S, D): the k-th
    placeholder of a row takes the token of its k-th slice that `slice_mask` (B, S) keeps. The parts of a model may lie on
    different devices: the result is where inputs_embeds are.
    """
    tokens = tokens.to(inputs_embeds.device, inputs_embeds.dtype)
    image_mask, slice_mask = image_mask.to(inputs_embeds.device), slice_mask.to(inputs_embeds.device)
    if tokens.shape[1] > 1:
        kept_first = slice_mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # (B, S)
        order = (image_mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, T), which placeholder of its row
        slots = kept_first.gather(1, order.clamp(max=tokens.shape[1] - 1))
        tokens = tokens.gather(1, slots.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))  # (B, T, D)
    return torch.where(image_mask.unsqueeze(-1), tokens, inputs_embeds)


class SamfPreTrainedModel(HubModel, PreTrainedModel):
    config_class = SamfConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["SamfAggregator", "SamfFusion", "SlicePositionEmbedding"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether `_init_weights` writes weights past `transformers.initialization`: no, ours and our parts' don't.

        With yes the library leaves out modules without weights of their own, and a part that fills its children's buffers
        from there (Falcon-H1) would load with uninitialised memory.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SamfAggregator):
            init.normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)


class SamfModel(SamfPreTrainedModel):
    """Slice encoder, aggregator, fusion and language model, without the language modelling head."""

    def __init__(self, config: SamfConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.slice_encoder = AutoModel.from_config(config.vision_config)
        prepare_slice_encoder(self.slice_encoder, config)
        self.slice_position = SlicePositionEmbedding(config.slice_dim) if _has_positions(config) else None
        self.aggregator = SamfAggregator(config)
        self.fusion = SamfFusion(config)
        self.finding_head = nn.Linear(config.volume_dim, len(config.finding_names)) if config.finding_names else None
        self.language_model = language_model or build_language_model(config.text_config).base_model
        self._takes_positions = takes_positions(self.language_model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def encode_slices(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """f_2d (eq. 1) on every slice in one call, or in chunks of `config.vision_chunk_size`.

        pixel_values (B, S, C, H, W). Returns z_2d (B, S, slice width) as `last_hidden_state`, and the encoder's hidden
        states and attentions (leading dimension B·S) when they are asked for and the slices fit one chunk.
        """
        if pixel_values.ndim != 5:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (volumes, slices, channels, height, width)."
            )
        batch, slices = pixel_values.shape[:2]
        flat = pixel_values.flatten(0, 1).to(self.slice_encoder.dtype)  # (B·S, C, H, W)
        chunk = self.config.vision_chunk_size
        parts = flat.split(chunk) if chunk else (flat,)  # a split into one can't be exported
        outputs = [encode_pixels(self.slice_encoder, part, **kwargs) for part in parts]
        pooled = torch.cat([pool_slices(output, self.config.slice_pooling) for output in outputs])  # (B·S, D)
        whole = outputs[0] if len(outputs) == 1 else {}
        return BaseModelOutputWithPooling(
            last_hidden_state=pooled.view(batch, slices, -1),
            hidden_states=whole.get("hidden_states"),
            attentions=whole.get("attentions"),
        )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        slice_mask: torch.Tensor | None = None,
        slice_planes: torch.Tensor | None = None,
        slice_positions: torch.Tensor | None = None,
        slice_embeddings: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Slice and volume embeddings; no prompt enters (eqs. 1 and 2).

        Args:
            pixel_values (B, S, C, H, W), or `slice_embeddings` (B, S, slice width) as this method gave them before.
            slice_mask (B, S) bool, True = a slice and not padding. slice_planes (B, S): 0 axial, 1 coronal, 2 sagittal.
            slice_positions (B, S) in [0, 1] along the plane's normal.

        Returns:
            z_2d (B, S, slice width) as `last_hidden_state`, z_3d (B, 1, volume_dim) as `pooler_output`.
        """
        if (pixel_values is None) == (slice_embeddings is None):
            raise ValueError("Pass exactly one of pixel_values and slice_embeddings.")
        if slice_embeddings is None:
            outputs = self.encode_slices(pixel_values, **kwargs)
        else:
            outputs = BaseModelOutputWithPooling(last_hidden_state=slice_embeddings.to(self.aggregator.cls_token.dtype))
        _check_slice_facts(slice_planes, slice_positions)
        _check_slice_shapes(
            outputs.last_hidden_state, slice_mask=slice_mask, slice_planes=slice_planes, slice_positions=slice_positions
        )
        slices = outputs.last_hidden_state
        slices = slices + self._positions(slices, slice_planes, slice_positions)
        outputs.pooler_output = self.aggregator(slices, slice_mask).unsqueeze(1)
        return outputs

    def _positions(
        self, slices: torch.Tensor, planes: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor | float:
        """What the plane and depth embeddings add to slices (B, S, D).

        Without planes and positions the slices count as equal thirds, one a plane, evenly spaced: what the image
        processor makes by default.
        """
        if self.slice_position is None:
            return 0.0
        if planes is None or positions is None:
            count = slices.shape[1]
            index = torch.arange(count, device=slices.device)
            per_plane = (count + NUM_PLANES - 1) // NUM_PLANES
            # By comparisons: a remainder by a size that isn't known yet has no form in ONNX.
            planes = sum((index >= plane * per_plane).long() for plane in range(1, NUM_PLANES))
            positions = ((index - planes * per_plane + 0.5) / per_plane).expand(slices.shape[0], -1)
            planes = planes.expand(slices.shape[0], -1)
        return self.slice_position(planes, positions).to(slices.device, slices.dtype)

    def pack_extra_sources(self, rows: Sequence[Mapping[str, Any] | None]) -> dict[str, torch.Tensor]:
        """Named vectors of each volume as `forward` takes them.

        Args:
            rows: for each volume a mapping from names in `config.extra_sources` to vectors (width,); a name that is
                missing or None is absent.

        Returns:
            extra_values (B, sum of widths), zero where absent, and extra_mask (B, sources) bool.

        Raises:
            ValueError: a name that the configuration doesn't have, a wrong width, or a value that isn't finite.
        """
        sources = self.config.extra_sources
        values = torch.zeros(len(rows), sum(sources.values()))
        mask = torch.zeros(len(rows), len(sources), dtype=torch.bool)
        columns = values.split(list(sources.values()), dim=1) if sources else ()
        for index, row in enumerate(rows):
            unknown = sorted(set(row or {}) - set(sources))
            if unknown:
                raise ValueError(f"Row {index} has extra sources {unknown}; config.extra_sources has {sources}.")
            for place, (name, width) in enumerate(sources.items()):
                if (row or {}).get(name) is None:
                    continue
                vector = torch.as_tensor(row[name], dtype=torch.float32).detach().cpu().flatten()
                if len(vector) != width or not vector.isfinite().all():
                    raise ValueError(
                        f"Row {index}: {name} is {vector.tolist()[:8]} ({len(vector)} values); expected {width} finite "
                        "ones. Leave the name out where it isn't known."
                    )
                columns[place][index] = vector
                mask[index, place] = True
        return {"extra_values": values.to(self.device), "extra_mask": mask.to(self.device)}

    def get_placeholder_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """(B, T) bool, True where an image placeholder stands."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = self.get_input_embeddings()(
            torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        )
        return (inputs_embeds == placeholder).all(dim=-1)

    def _check_placeholders(self, image_mask: torch.Tensor, slice_mask: torch.Tensor) -> None:
        """Each row must hold as many placeholders as its volume has image tokens; a row without a volume holds none."""
        if image_mask.shape[0] != slice_mask.shape[0]:
            raise ValueError(
                f"{slice_mask.shape[0]} volumes for {image_mask.shape[0]} prompts; give one volume a prompt, and an "
                "all-False row of slice_mask for a prompt without one."
            )
        expected = slice_mask.to(image_mask.device).sum(dim=1)
        if self.config.fusion_type != "slice_tokens":
            expected = (expected > 0) * self.config.num_image_tokens
        found = image_mask.sum(dim=1)
        check(
            found == expected,
            lambda: (
                f"Image features and image tokens do not match: the prompts hold {found.tolist()} placeholder tokens "
                f"(id {self.config.image_token_id}), the volumes give {expected.tolist()}. Let the processor expand the "
                "placeholder, and don't truncate its output. (Placeholders behind the end of prompt_mask don't count: "
                "pad it with the ids.)"
            ),
            "Image features and image tokens do not match: other numbers of placeholder tokens than the volumes give",
        )

    def _check_rows(self) -> None:
        """Raise ValueError where the placeholder has no embedding: torch would only say that an index is out of range."""
        rows = getattr(self.get_input_embeddings(), "num_embeddings", None)
        if rows is not None and self.config.image_token_id >= rows:
            raise ValueError(
                f"config.image_token_id is {self.config.image_token_id}, but the language model embeds {rows} tokens. Call "
                "resize_token_embeddings, or take a placeholder among its tokens."
            )

    def _check_no_placeholders(self, image_mask: torch.Tensor, others: dict[str, Any]) -> None:
        """Without a volume no placeholder may stand in image_mask (B, T); `others` are further arguments of forward."""

        def message() -> str:
            unknown = sorted(set(others) - TransformersKwargs.__optional_keys__ - NOT_MISSPELT)
            also = f" (forward got {', '.join(unknown)}, which it doesn't know)" if unknown else ""
            return (
                f"Image features and image tokens do not match: the prompts hold {image_mask.sum(dim=1).tolist()} "
                f"placeholder tokens (id {self.config.image_token_id}), but no volume came with them{also}. Pass all that "
                "the processor gives, pixel_values too (TRL's trainers do so for a data set whose `images` column names the "
                "volumes), or leave the placeholder out of a prompt without a volume."
            )

        check(
            ~image_mask.any(),
            message,
            "Image features and image tokens do not match: placeholder tokens, but no volume",
        )

    def _check_text_is_known(self, prompt_mask: Any, labels: Any, prefix_ids: Any, length: int, cached: int) -> None:
        """Refuse to guess what the fusion's text is: in training the answer is among the tokens, and a cache hides some."""
        if self.training and prompt_mask is None and labels is None and self.config.fusion_text_scope == "prompt":
            raise ValueError(
                "A training forward with a volume got neither labels nor prompt_mask: the fusion would read the answer, "
                "which leaks into the image tokens. Pass prompt_mask (B, T), True on the prompt's tokens: the processor "
                "gives it for a conversation or a text with an answer in it. Losses that are computed outside the model "
                "(label_smoothing_factor, compute_loss_func, preference and reward training) take the labels away and "
                "need it. For inference call model.eval()."
            )
        if cached and prefix_ids is None and (prompt_mask is None or prompt_mask.shape[1] != length):
            raise ValueError(
                f"The cache holds {cached} tokens before the volume, and the fusion reads the whole prompt's text: pass "
                "their ids as prefix_ids (generate() does, given the whole sequence), or a prompt_mask for these "
                f"{length} tokens alone."
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        slice_embeddings: torch.FloatTensor | None = None,
        slice_mask: torch.Tensor | None = None,
        slice_planes: torch.LongTensor | None = None,
        slice_positions: torch.FloatTensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        prefix_ids: torch.LongTensor | None = None,
        extra_values: torch.FloatTensor | None = None,
        extra_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_slice_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SamfModelOutputWithPast:
        """
        Args:
            input_ids (B, T) or inputs_embeds (B, T, text width), with image placeholders where a volume stands.
            pixel_values (B, S, C, H, W) or slice_embeddings (B, S, slice width); neither = text only.
            slice_mask, slice_planes, slice_positions (B, S): see `get_image_features`. A row of slice_mask that is all
                False is a prompt without a volume.
            prompt_mask (B, T) bool: the fusion's text; see `fusion_text_mask`, which also says what labels do. Training
                needs it or labels. Placeholders beyond its end are tokens that were made, not the volume's.
            prefix_ids (B, P): what a cache that isn't empty holds before these tokens. The fusion reads it too, and
                prompt_mask and attention_mask are then (B, P + T).
            extra_values (B, sum of widths), extra_mask (B, sources) bool: vectors of `config.extra_sources` in that order,
                and which are present (see `pack_extra_sources`). They enter with the volume: a row without one has no
                fused token for them. extra_values alone = all present; neither = all absent.
            output_slice_attentions: return alpha, beta and gamma.
            output_hidden_states, output_attentions: True = of the language model, and in `image_outputs` of the slice
                encoder.

        Returns:
            The language model's output and the fields of [`SamfModelOutputWithPast`]. With a volume and neither
            input_ids nor inputs_embeds, the language model isn't run: only the volume's fields are filled.
        """
        has_volume = pixel_values is not None or slice_embeddings is not None
        has_text = input_ids is not None or inputs_embeds is not None
        if (input_ids is not None and inputs_embeds is not None) or not (has_text or has_volume):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds, or a volume alone.")
        image_outputs = slice_attentions = finding_logits = None
        if has_volume:
            # Not a list of layers: their numbers are the language model's.
            recorded = {key: kwargs[key] for key in RECORDED if isinstance(kwargs.get(key), bool)}
            image_outputs = self.get_image_features(
                pixel_values, slice_mask, slice_planes, slice_positions, slice_embeddings, return_dict=True, **recorded
            )
            if self.finding_head is not None:
                finding_logits = self.finding_head(image_outputs.pooler_output[:, 0])
        if not has_text:
            return SamfModelOutputWithPast(image_outputs=image_outputs, finding_logits=finding_logits)

        if inputs_embeds is None:
            self._check_rows()
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_mask = self.get_placeholder_mask(input_ids, inputs_embeds)
        if has_volume:
            length = image_mask.shape[1]
            cached = 0 if torch.compiler.is_compiling() else cached_tokens(kwargs)
            self._check_text_is_known(prompt_mask, labels, prefix_ids, length, cached)
            if not torch.compiler.is_compiling():
                warn_of_length(self.config.text_config, cached + length, "Sequences with a volume")
            slices = image_outputs.last_hidden_state
            if self.config.slice_position_scope == "all":
                slices = slices + self._positions(slices, slice_planes, slice_positions)
            volume = image_outputs.pooler_output[:, 0]
            text = self._fusion_text(inputs_embeds, image_mask, attention_mask, prompt_mask, labels, prefix_ids)
            inputs_embeds, slice_attentions = self._fuse(
                inputs_embeds, text, slices, volume, slice_mask, extra_values, extra_mask
            )
        elif input_ids is not None:
            self._check_no_placeholders(image_mask, kwargs)

        if self._takes_positions:
            kwargs["position_ids"] = position_ids
        forget_longest_sequence(self.language_model, self.config.text_config)
        outputs = self.language_model(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        return SamfModelOutputWithPast(
            **{name: value for name, value in outputs.items() if name in KEPT_OUTPUTS},
            image_outputs=image_outputs,
            slice_attentions=slice_attentions if output_slice_attentions else None,
            finding_logits=finding_logits,
        )

    def _fusion_text(
        self,
        inputs_embeds: torch.Tensor,
        image_mask: torch.Tensor,
        attention_mask: torch.Tensor | None,
        prompt_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        prefix_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The text's embeddings (B, P + T, text width), which of them the fusion reads, and the placeholders (B, T)."""
        length, prefix = image_mask.shape[1], 0
        text, placeholders = inputs_embeds, image_mask
        if prefix_ids is not None:
            prefix = prefix_ids.shape[1]
            before = self.get_input_embeddings()(prefix_ids).to(text.device, text.dtype)
            text = torch.cat([before, text], dim=1)
            prefix_mask = (prefix_ids == self.config.image_token_id).to(image_mask.device)
            placeholders = torch.cat([prefix_mask, image_mask], dim=1)
            labels = None if labels is None else F.pad(labels, (prefix, 0), value=IGNORE_INDEX)
        text_mask = fusion_text_mask(self.config.fusion_text_scope, placeholders, attention_mask, prompt_mask, labels)
        if prompt_mask is not None and prompt_mask.shape[1] < prefix + length:  # the rest was made, or is proposed
            image_mask = image_mask.clone()
            image_mask[:, max(prompt_mask.shape[1] - prefix, 0) :] = False
        return text, text_mask, image_mask

    def _fuse(
        self,
        inputs_embeds: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        slices: torch.Tensor,
        volume: torch.Tensor,
        slice_mask: torch.Tensor | None,
        extra_values: torch.Tensor | None,
        extra_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, SamfSliceAttentions]:
        """inputs_embeds (B, T, text width) with the image tokens in place, and the fusion's weights.

        `text` is what `_fusion_text` gives.
        """
        text_embeds, text_mask, image_mask = text
        if slice_mask is None:
            slice_mask = torch.ones(slices.shape[:2], dtype=torch.bool, device=slices.device)
        self._check_placeholders(image_mask, slice_mask)
        device = slices.device  # a device map may put encoder, fusion and language model in different places
        tokens, slice_attentions = self.fusion(
            slices,
            volume.to(device),
            text_embeds.to(device, slices.dtype),
            slice_mask.to(device).bool(),
            text_mask.to(device),
            extra_values,
            extra_mask,
        )
        return place_image_tokens(inputs_embeds, image_mask, tokens, slice_mask), slice_attentions


def _check_slice_shapes(slices: torch.Tensor, **given: torch.Tensor | None) -> None:
    """What is said of slices (B, S, D) must be (B, S): broadcasting would show one volume to every prompt."""
    for name, value in given.items():
        if value is not None and value.shape != slices.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected (volumes, slices), here {tuple(slices.shape[:2])}, "
                "with padding where a volume has fewer slices."
            )


def _check_slice_facts(planes: torch.Tensor | None, positions: torch.Tensor | None) -> None:
    """Planes and positions come together, and positions unrounded: bfloat16 moves a slice by a tenth of its distance."""
    if (planes is None) != (positions is None):
        given, missing = (
            ("slice_planes", "slice_positions") if positions is None else ("slice_positions", "slice_planes")
        )
        raise ValueError(f"{given} came without {missing}. Pass both, as the processor gives them, or neither.")
    if positions is not None and positions.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"slice_positions are {positions.dtype}, which rounds away where neighbouring slices lie. Keep them float32 "
            "(the processor's outputs do under .to(device, dtype)), or pass the bits: positions.float().view(torch.int32)."
        )


def _has_positions(config: SamfConfig) -> bool:
    return config.slice_position_scope != "none"


def finding_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Binary cross-entropy of logits (B, L) against targets (B, L) of 0, 1 or -100 (unknown, which adds nothing).

    A row's loss is the sum over its known findings by L, the result the mean over rows, or their sum weighed by `weights`
    (B,). Divided by what every micro-batch knows, and not by how many findings happen to be known in it, the losses of
    micro-batches add up to that of the whole batch.
    """
    known = targets != IGNORE_INDEX
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.clamp(min=0).float(), reduction="none")
    rows = (losses * known).mean(dim=1)  # (B,)
    return rows.mean() if weights is None else (rows * weights).sum()


class SamfForConditionalGeneration(SamfPreTrainedModel, SamfGenerationMixin):
    """SAMF with its language modelling head: writes the report of a volume, or answers a question about it."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SamfConfig):
        super().__init__(config)
        causal = build_language_model(config.text_config)
        self.model = SamfModel(config, causal.base_model)
        self.lm_head = causal.get_output_embeddings()
        self.causal_lm = CausalLanguageModel(causal)
        self._tied_weights_keys = self.causal_lm.tied_weights_keys("model.language_model")
        for name, value in self.causal_lm.facts.items():
            setattr(self, name, value)
        self.post_init()

    @classmethod
    def from_component_pretrained(
        cls, slice_encoder: str, text_model: str, dtype: torch.dtype | str | None = None, **config: Any
    ) -> "SamfForConditionalGeneration":
        """A new model from a pretrained slice encoder and a pretrained language model; the parts between are random.

        Args:
            slice_encoder, text_model: Hub ids or folders, for example `facebook/dino-vitb16` and
                `microsoft/Phi-3-mini-4k-instruct`.
            dtype: of all weights; the language model's own when None or "auto".
            config: further arguments of [`SamfConfig`].
        """
        # Phi-3's repository points at modelling code that no longer runs: the library's own class is wanted.
        text = AutoModelForCausalLM.from_pretrained(text_model, dtype=dtype or "auto", trust_remote_code=False)
        encoder = AutoModel.from_pretrained(slice_encoder, dtype=text.dtype)  # the parts between can't mix two
        for part, source in ((encoder.config, slice_encoder), (text.config, text_model)):
            # The card names base models by their Hub ids; a local path would stand in every saved configuration.
            part._name_or_path = hub_id(str(source)) or ""
        samf_config = SamfConfig(vision_config=encoder.config, text_config=text.config, **config)
        with torch.device("meta"):  # no second copy of billions of weights
            model = cls(samf_config)
        prepare_slice_encoder(encoder, samf_config)
        model.model.slice_encoder = encoder
        model.model.language_model = text.base_model
        model.lm_head = text.get_output_embeddings()
        for part in (model.model.slice_position, model.model.aggregator, model.model.fusion, model.model.finding_head):
            if part is not None:
                part.to_empty(device=text.device).to(text.dtype)
                part.apply(model._init_weights)
        model.generation_config = text.generation_config
        model.tie_weights()
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As in the library, but never past a token in use, and never smaller without a word.

        A tokenizer often has fewer tokens than the language model has rows (Phi-3: 32,011 of 32,064), so the common
        `resize_token_embeddings(len(tokenizer))` would cut rows off.

        Raises:
            ValueError: the image placeholder's row would be lost.
        """
        rows = self.get_input_embeddings().num_embeddings
        if new_num_tokens is not None and new_num_tokens < rows:
            if new_num_tokens <= self.config.image_token_id:
                raise ValueError(
                    f"resize_token_embeddings({new_num_tokens}) would cut off the image placeholder's row "
                    f"{self.config.image_token_id}. The model has {rows} rows: it needs no resize for fewer tokens."
                )
            logger.warning(
                "resize_token_embeddings(%d) cuts %d of %d rows off. A tokenizer with fewer tokens than the model has "
                "rows needs no resize.",
                new_num_tokens,
                rows - new_num_tokens,
                rows,
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        return self.model.language_model

    def pack_extra_sources(self, rows: Sequence[Mapping[str, Any] | None]) -> dict[str, torch.Tensor]:
        """See [`SamfModel.pack_extra_sources`]."""
        return self.model.pack_extra_sources(rows)

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See [`SamfModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        slice_embeddings: torch.FloatTensor | None = None,
        slice_mask: torch.Tensor | None = None,
        slice_planes: torch.LongTensor | None = None,
        slice_positions: torch.FloatTensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        prefix_ids: torch.LongTensor | None = None,
        extra_values: torch.FloatTensor | None = None,
        extra_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        finding_targets: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_slice_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SamfCausalLMOutputWithPast:
        """
        Arguments of [`SamfModel.forward`], and:

        Args:
            labels (B, T): token ids, -100 = no loss. `loss` is the library's causal language modelling loss.
            finding_targets (B, L): 0, 1, or -100 for unknown, in the order of `config.finding_names`. Adds
                `config.finding_loss_weight` times their binary cross-entropy to the loss, each row's weighed by its share
                of the label tokens; with a volume and no text it is the whole loss. (No "label" in the name: Trainer
                would ask every evaluation batch for it. The old name, finding_labels, still works.)
            logits_to_keep: compute logits for the last so many tokens only (0 = all), or for these indices.
        """
        finding_targets = _renamed(finding_targets, kwargs)
        if finding_targets is not None and labels is None and (input_ids is not None or inputs_embeds is not None):
            self._check_findings_are_trained()
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            slice_embeddings=slice_embeddings,
            slice_mask=slice_mask,
            slice_planes=slice_planes,
            slice_positions=slice_positions,
            prompt_mask=prompt_mask,
            prefix_ids=prefix_ids,
            extra_values=extra_values,
            extra_mask=extra_mask,
            labels=labels,
            output_slice_attentions=output_slice_attentions,
            return_dict=True,
            **{key: value for key, value in kwargs.items() if key not in LOSS_COUNTS},
        )
        logits = loss = aux_loss = None
        if outputs.last_hidden_state is not None:
            own = self.causal_lm.run_head(
                self.lm_head,
                self.model.language_model,
                outputs,
                functools.partial(self._text_loss, **kwargs),
                attention_mask=attention_mask,
                labels=labels,
                logits_to_keep=logits_to_keep,
                output_router_logits=kwargs.get("output_router_logits"),
            )
            logits, loss, aux_loss = own.logits, own.loss, own.get("aux_loss")
        if finding_targets is not None:
            self._check_finding_targets(finding_targets, outputs.image_outputs, slice_mask)
            if outputs.finding_logits is not None:
                loss = self._add_finding_loss(loss, outputs.finding_logits, finding_targets, labels, **kwargs)
        rest = {key: value for key, value in outputs.items() if key != "last_hidden_state"}
        return SamfCausalLMOutputWithPast(loss=loss, logits=logits, aux_loss=aux_loss, **rest)

    def _text_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The loss that the language model's own forward asks for; `vocab_size` may be that before a resize."""
        return self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)

    def _check_findings_are_trained(self) -> None:
        """Raise ValueError in training: without labels beside a text, the loss is computed elsewhere."""
        if self.training:
            raise ValueError(
                "finding_targets came with a text and no labels: a loss that is computed outside the model "
                "(label_smoothing_factor, compute_loss_func) would drop the findings' loss. Leave that out, or take "
                "finding_targets out of the batch, or train the findings on volumes alone."
            )

    def _check_finding_targets(
        self, targets: torch.Tensor, image_outputs: Any, slice_mask: torch.Tensor | None
    ) -> None:
        """Raise ValueError where there is no head for targets (B, L), or where known ones stand beside no volume."""
        names = self.config.finding_names
        if not names or targets.ndim != 2 or targets.shape[1] != len(names):
            raise ValueError(
                f"finding_targets has shape {tuple(targets.shape)}, and config.finding_names has {len(names)} names: a model "
                "with a findings head takes (volumes, names), one without takes none."
            )
        known = targets != IGNORE_INDEX
        check((targets == 0) | (targets == 1) | ~known, "finding_targets holds other values than 0, 1 and -100.")
        present = torch.zeros_like(known[:, :1]) if image_outputs is None else torch.ones_like(known[:, :1])
        if slice_mask is not None:
            present = present & slice_mask.to(known.device).bool().any(dim=1, keepdim=True)
        check(present | ~known, "finding_targets holds 0 or 1 for a prompt without a volume; give -100 for it.")

    def _add_finding_loss(
        self,
        loss: torch.Tensor | None,
        finding_logits: torch.Tensor,
        targets: torch.Tensor,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_findings_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the text's loss (None = there is none) plus the weighted loss of the findings.

        Trainer sums the losses of accumulated micro-batches and passes what they have together. So rows are weighed by
        something that adds up over micro-batches, and how a step is split into them makes no difference: equally, where
        the caller gives `num_findings_in_batch`, the rows of the step that have known findings (train.py does), else by
        their share of the label tokens, `num_items_in_batch`, all that a plain Trainer counts.
        """
        targets, weights = targets.to(finding_logits.device), None
        if loss is not None:
            if num_findings_in_batch is not None:
                items, total = (targets != IGNORE_INDEX).any(dim=1), num_findings_in_batch  # (B,)
            else:
                items = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)  # (B,); the first token has no loss
                total = items.sum() if num_items_in_batch is None else num_items_in_batch
            total = torch.as_tensor(total, device=finding_logits.device)
            weights = items.to(finding_logits.device) / total
        findings = self.config.finding_loss_weight * finding_loss(finding_logits, targets, weights)
        return findings if loss is None else loss + findings.to(loss.device)

    def _get_name(self) -> str:
        """Trainer looks this name up for label smoothing: that of the table below, for subclasses and sharded models too."""
        return SamfForConditionalGeneration.__name__


def _renamed(finding_targets: torch.Tensor | None, others: dict[str, Any]) -> torch.Tensor | None:
    """`finding_targets`, or what came under its old name; that is taken out of `others`."""
    old = others.pop("finding_labels", None)
    if old is None:
        return finding_targets
    if finding_targets is not None:
        raise ValueError("finding_labels is the old name of finding_targets; pass one of them.")
    logger.warning_once("finding_labels is now called finding_targets; the old name will go.")
    return old


# Trainer's label smoothing shifts logits and labels for the classes of this table alone; without it, it trains copying.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(SamfConfig.model_type, SamfForConditionalGeneration.__name__)

__all__ = ["SamfForConditionalGeneration", "SamfModel", "SamfPreTrainedModel"]
