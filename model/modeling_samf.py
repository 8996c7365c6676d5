"""SAMF: slice encoder, aggregator, slice-attentive multimodal fusion, language model.

Paper: "From Slices to Volumes: Multi-Scale Fusion of 2D and 3D Features for CT Scan Report Generation", MICCAI 2025.
Equation numbers are the paper's; modules_samf.py holds the equations, this file the models. Shapes: B volumes (and
prompts), S slices, T tokens, L findings.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .checks_samf import (
    check_finding_targets,
    check_findings_are_trained,
    check_inputs,
    check_no_placeholders,
    check_pixels,
    check_placeholder_row,
    check_placeholders,
    check_resize,
    check_slice_places,
    check_slice_shapes,
    check_text_is_known,
)
from .components_samf import build_language_model, load_components
from .configuration_samf import SamfConfig
from .extra_sources_samf import SourceVector, pack_sources
from .generation_samf import SamfGenerationMixin, cached_tokens, warn_of_length
from .hub_samf import HubModel
from .image_tokens_samf import FusionText, find_fusion_text, place_image_tokens
from .inputs_samf import ModelInputs, PromptInputs, VolumeInputs
from .language_model_samf import KEPT_OUTPUTS, CausalLanguageModel, forget_longest_sequence, takes_positions
from .losses_samf import LOSS_COUNTS, finding_loss, finding_weights, predicting_states, take_finding_targets
from .modules_samf import SamfAggregator, SamfFusion, SlicePositionEmbedding, default_slice_places, masked_mean
from .outputs_samf import SamfCausalLMOutputWithPast, SamfModelOutputWithPast, SamfSliceAttentions
from .slice_encoder_samf import encode_pixels, join_layers, pool_slices, prepare_slice_encoder

_RECORDED = ("output_attentions", "output_hidden_states")  # asked of the slice encoder too


class SamfPreTrainedModel(HubModel, PreTrainedModel):
    """What SAMF's models have in common: initialisation, saving, and what the library asks of a model class."""

    config: SamfConfig
    config_class = SamfConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # as in the library's own models
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
        """Return False: `_init_weights` writes weights only through `transformers.initialization`.

        With True the library leaves out modules without weights of their own, and a part that fills its children's
        buffers from there (Falcon-H1) would load with uninitialised memory.
        """
        return False

    def enable_input_require_grads(self) -> None:
        """Let gradients reach the input embeddings' outputs, as peft asks with gradient checkpointing.

        The library would also ask it of the slice encoder's patches: a frozen encoder would then be run a second time and
        differentiated, for gradients of nothing.
        """
        self.disable_input_require_grads()  # peft asks twice
        self.get_decoder().enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        self.get_decoder().disable_input_require_grads()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SamfAggregator):
            init.normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)


class SamfModel(SamfPreTrainedModel):
    """Slice encoder, aggregator, fusion and language model, without the language modelling head.

    Args:
        config: the model's configuration.
        language_model: the layers of the language model; built from `config.text_config` when None.
    """

    slice_encoder: PreTrainedModel
    language_model: PreTrainedModel

    def __init__(self, config: SamfConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.slice_encoder = AutoModel.from_config(config.vision_config)
        prepare_slice_encoder(self.slice_encoder, config)
        has_positions = config.slice_position_scope != "none"
        self.slice_position = SlicePositionEmbedding(config.slice_dim) if has_positions else None
        self.aggregator = SamfAggregator(config)
        self.fusion = SamfFusion(config)
        self.finding_head = nn.Linear(config.volume_dim, len(config.finding_names)) if config.finding_names else None
        self.language_model = language_model or cast(
            PreTrainedModel, build_language_model(config.text_config).base_model
        )
        self._takes_positions = takes_positions(self.language_model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the language model's input embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's input embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """Return the language model's layers."""
        return self.language_model

    def encode_slices(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Encode every slice by f_2d (eq. 1), in one call or in chunks of `config.vision_chunk_size`.

        Args:
            pixel_values: (B, S, C, H, W).
            **kwargs: further arguments of the slice encoder.

        Returns:
            z_2d (B, S, slice width) as `last_hidden_state`. The encoder's hidden states and attentions, with leading
            dimension B·S, are included if they are asked for.
        """
        check_pixels(pixel_values)
        batch, slices = pixel_values.shape[:2]
        flat = pixel_values.flatten(0, 1).to(self.slice_encoder.dtype)  # (B·S, C, H, W)
        chunk = self.config.vision_chunk_size
        parts = flat.split(chunk) if chunk else (flat,)  # a split into one can't be exported
        outputs = [encode_pixels(self.slice_encoder, part, **kwargs) for part in parts]
        pooled = torch.cat([pool_slices(output, self.config.slice_pooling) for output in outputs])  # (B·S, D)
        return BaseModelOutputWithPooling(
            last_hidden_state=pooled.view(batch, slices, -1),
            hidden_states=join_layers(outputs, "hidden_states"),
            attentions=join_layers(outputs, "attentions"),
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
        """Return slice and volume embeddings (eqs. 1 and 2); they don't depend on the prompt.

        Args:
            pixel_values: (B, S, C, H, W).
            slice_mask: (B, S) bool, True = a slice, False = padding.
            slice_planes: (B, S), 0 axial, 1 coronal, 2 sagittal.
            slice_positions: (B, S) in [0, 1] along the plane's normal.
            slice_embeddings: (B, S, slice width), as this method returned them before, in place of `pixel_values`.
            **kwargs: further arguments of the slice encoder.

        Returns:
            z_2d (B, S, slice width) as `last_hidden_state`, z_3d (B, 1, volume_dim) as `pooler_output`.
        """
        if pixel_values is not None and slice_embeddings is None:
            outputs = self.encode_slices(pixel_values, **kwargs)
        elif slice_embeddings is not None and pixel_values is None:
            outputs = BaseModelOutputWithPooling(last_hidden_state=slice_embeddings.to(self.aggregator.cls_token.dtype))
        else:
            raise ValueError("Pass exactly one of pixel_values and slice_embeddings.")
        slices = cast(torch.Tensor, outputs.last_hidden_state)
        check_slice_places(slice_planes, slice_positions)
        check_slice_shapes(slices, slice_mask=slice_mask, slice_planes=slice_planes, slice_positions=slice_positions)
        slices = self._add_positions(slices, slice_planes, slice_positions)
        outputs.pooler_output = self.aggregator(slices, slice_mask).unsqueeze(1)
        return outputs

    def _add_positions(
        self, slices: torch.Tensor, planes: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """Return slices (B, S, D) plus their plane and depth embeddings, if the model has these."""
        if self.slice_position is None:
            return slices
        if planes is None or positions is None:
            planes, positions = default_slice_places(slices.shape[0], slices.shape[1], slices.device)
        return slices + self.slice_position(planes, positions).to(slices.device, slices.dtype)

    def pack_extra_sources(self, rows: Sequence[Mapping[str, SourceVector | None] | None]) -> dict[str, torch.Tensor]:
        """Return the named vectors of each volume as `forward` takes them.

        Args:
            rows: for each volume a mapping from names in `config.extra_sources` to vectors (width,); a name that is
                missing or None is absent.

        Returns:
            extra_values (B, sum of widths), zero where absent, and extra_mask (B, sources) bool.

        Raises:
            ValueError: a name that the configuration doesn't have, a wrong width, or a value that isn't finite.
        """
        values, mask = pack_sources(self.config.extra_sources, rows)
        return {"extra_values": values.to(self.device), "extra_mask": mask.to(self.device)}

    def get_placeholder_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Return where the image placeholders are, (B, T) bool: by id, or by embedding without `input_ids`."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = self.get_input_embeddings()(
            torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        )
        return (inputs_embeds == placeholder).all(dim=-1)

    @can_return_tuple
    def forward(  # type: ignore[misc]  # position_ids is also one of TransformersKwargs
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        slice_embeddings: torch.Tensor | None = None,
        slice_mask: torch.Tensor | None = None,
        slice_planes: torch.Tensor | None = None,
        slice_positions: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        prefix_ids: torch.Tensor | None = None,
        extra_values: torch.Tensor | None = None,
        extra_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_slice_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SamfModelOutputWithPast:
        """Read volumes and prompts; a volume without a text fills only the volume's fields of the output.

        Args:
            input_ids: (B, T). [`~inputs_samf.PromptInputs`] describes the prompt's arguments in full.
            pixel_values: (B, S, C, H, W); [`~inputs_samf.VolumeInputs`] describes the volume's arguments.
            attention_mask: (B, T).
            position_ids: (B, T).
            inputs_embeds: (B, T, text width), in place of `input_ids`.
            slice_embeddings: (B, S, slice width), in place of `pixel_values`.
            slice_mask: (B, S) bool, True = a slice.
            slice_planes: (B, S), 0 axial, 1 coronal, 2 sagittal.
            slice_positions: (B, S) in [0, 1].
            prompt_mask: (B, T) bool, True = the text that the fusion reads.
            prefix_ids: (B, P), tokens that the cache holds.
            extra_values: (B, sum of the extra sources' widths).
            extra_mask: (B, sources) bool, True = present.
            labels: (B, T), -100 = no loss; they tell the prompt from the answer when there is no `prompt_mask`.
            output_slice_attentions: return the fusion's softmax weights.
            **kwargs: of the language model; `output_hidden_states` and `output_attentions` also of the slice encoder.
        """
        volume = VolumeInputs(
            pixel_values, slice_embeddings, slice_mask, slice_planes, slice_positions, extra_values, extra_mask
        )
        prompt = PromptInputs(input_ids, inputs_embeds, attention_mask, position_ids, prompt_mask, prefix_ids, labels)
        check_inputs(prompt, volume)
        image_outputs, finding_logits = self._read_volume(volume, kwargs)
        has_text = input_ids is not None or inputs_embeds is not None
        embeds, attentions = self._embed_prompt(prompt, volume, image_outputs, kwargs) if has_text else (None, None)
        language = {} if embeds is None else self._run_language_model(embeds, prompt, kwargs)
        return SamfModelOutputWithPast(
            **language,
            image_outputs=image_outputs,
            slice_attentions=attentions if output_slice_attentions else None,
            finding_logits=finding_logits,
        )

    def _read_volume(
        self, volume: VolumeInputs, others: ModelInputs
    ) -> tuple[BaseModelOutputWithPooling | None, torch.Tensor | None]:
        """Return the volume's embeddings and the findings' logits (B, L); None where there is no volume or no head."""
        if volume.pixel_values is None and volume.slice_embeddings is None:
            return None, None
        # Only flags: a list of layers counts the language model's layers.
        recorded = {name: others[name] for name in _RECORDED if isinstance(others.get(name), bool)}
        outputs = self.get_image_features(
            volume.pixel_values,
            volume.slice_mask,
            volume.slice_planes,
            volume.slice_positions,
            volume.slice_embeddings,
            return_dict=True,
            **recorded,
        )
        return outputs, None if self.finding_head is None else self.finding_head(outputs.pooler_output[:, 0])

    def _embed_prompt(
        self,
        prompt: PromptInputs,
        volume: VolumeInputs,
        image_outputs: BaseModelOutputWithPooling | None,
        others: ModelInputs,
    ) -> tuple[torch.Tensor, SamfSliceAttentions | None]:
        """Return the prompts' embeddings (B, T, text width) with the image tokens in place, and the fusion's weights."""
        embed, inputs_embeds = self.get_input_embeddings(), prompt.inputs_embeds
        if inputs_embeds is None:
            check_placeholder_row(getattr(embed, "num_embeddings", None), self.config.image_token_id)
            inputs_embeds = embed(prompt.input_ids)
        image_mask = self.get_placeholder_mask(prompt.input_ids, inputs_embeds)
        if image_outputs is None:
            if prompt.input_ids is not None:
                check_no_placeholders(self.config.image_token_id, image_mask, others)
            return inputs_embeds, None
        length = image_mask.shape[1]
        cached = 0 if torch.compiler.is_compiling() else cached_tokens(others)
        check_text_is_known(self.config, prompt, self.training, length, cached)
        if not torch.compiler.is_compiling():
            warn_of_length(self.config.text_config, cached + length, "Sequences with a volume")
        text = find_fusion_text(self.config, embed, inputs_embeds, image_mask, prompt)
        return self._fuse(inputs_embeds, text, volume, image_outputs)

    def _fuse(
        self,
        inputs_embeds: torch.Tensor,
        text: FusionText,
        volume: VolumeInputs,
        image_outputs: BaseModelOutputWithPooling,
    ) -> tuple[torch.Tensor, SamfSliceAttentions]:
        """Return the embeddings (B, T, text width) with the image tokens in place, and the fusion's weights."""
        slices = cast(torch.Tensor, image_outputs.last_hidden_state)
        volume_embedding = cast(torch.Tensor, image_outputs.pooler_output)[:, 0]
        if self.config.slice_position_scope == "all":
            slices = self._add_positions(slices, volume.slice_planes, volume.slice_positions)
        slice_mask = volume.slice_mask
        if slice_mask is None:
            slice_mask = torch.ones(slices.shape[:2], dtype=torch.bool, device=slices.device)
        check_placeholders(self.config, text.image_mask, slice_mask)
        device = slices.device  # a device map may put encoder, fusion and language model on different devices
        tokens, attentions = self.fusion(
            slices,
            volume_embedding.to(device),
            text.embeds.to(device, slices.dtype),
            slice_mask.to(device).bool(),
            text.mask.to(device),
            volume.extra_values,
            volume.extra_mask,
        )
        return place_image_tokens(inputs_embeds, text.image_mask, tokens, slice_mask), attentions

    def _run_language_model(
        self, inputs_embeds: torch.Tensor, prompt: PromptInputs, others: ModelInputs
    ) -> Mapping[str, Any]:
        """Return the fields of the language model's output that SAMF's has too."""
        positions = {"position_ids": prompt.position_ids} if self._takes_positions else {}
        forget_longest_sequence(self.language_model, self.config.text_config)
        outputs = self.language_model(
            attention_mask=prompt.attention_mask, inputs_embeds=inputs_embeds, **{**others, **positions}
        )
        return {name: value for name, value in outputs.items() if name in KEPT_OUTPUTS}


class SamfForConditionalGeneration(SamfPreTrainedModel, SamfGenerationMixin):
    """SAMF with its language modelling head: writes the report of a volume, or answers a question about it.

    `forward` adds `config.finding_loss_weight` times the binary cross-entropy of `finding_targets` to the text's loss, with
    the row weights of [`~losses_samf.finding_weights`]; with a volume and no text it is the whole loss. (The name has no
    "label" in it: Trainer would ask every evaluation batch for it. The old name, `finding_labels`, still works.)

    Args:
        config: the model's configuration.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SamfConfig):
        super().__init__(config)
        causal = build_language_model(config.text_config)
        self.model = SamfModel(config, cast(PreTrainedModel, causal.base_model))
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
        """Return a new model from a pretrained slice encoder and language model; the modules between are random.

        Args:
            slice_encoder: Hub id or folder, for example `facebook/dino-vitb16`.
            text_model: Hub id or folder, for example `microsoft/Phi-3-mini-4k-instruct`.
            dtype: of all weights; None or `"auto"` = the language model's own.
            **config: further arguments of [`SamfConfig`].
        """
        encoder, text = load_components(slice_encoder, text_model, dtype)
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
        """Return the language model's input embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's input embeddings."""
        self.model.set_input_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the token embeddings as the library does, but never below a token in use, and warn when rows are lost.

        A tokenizer often has fewer tokens than the language model has rows (Phi-3: 32,011 of 32,064), so the common
        `resize_token_embeddings(len(tokenizer))` would drop rows.

        Args:
            new_num_tokens: rows after the resize; None = unchanged.
            pad_to_multiple_of: as in the library.
            mean_resizing: as in the library.

        Raises:
            ValueError: the image placeholder's row would be lost.
        """
        rows: int | None = getattr(self.get_input_embeddings(), "num_embeddings", None)
        if rows is not None:
            check_resize(self.config, rows, new_num_tokens)
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def get_output_embeddings(self) -> nn.Module:
        """Return the language modelling head."""
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        """Return the language model's layers."""
        return self.model.language_model

    def pack_extra_sources(self, rows: Sequence[Mapping[str, SourceVector | None] | None]) -> dict[str, torch.Tensor]:
        """Return [`SamfModel.pack_extra_sources`] of `rows`."""
        return self.model.pack_extra_sources(rows)

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return [`SamfModel.get_image_features`] of the same arguments."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(  # type: ignore[misc]  # position_ids is also one of TransformersKwargs
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        slice_embeddings: torch.Tensor | None = None,
        slice_mask: torch.Tensor | None = None,
        slice_planes: torch.Tensor | None = None,
        slice_positions: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        prefix_ids: torch.Tensor | None = None,
        extra_values: torch.Tensor | None = None,
        extra_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        finding_targets: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        output_slice_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SamfCausalLMOutputWithPast:
        """Return logits and, with labels or finding targets, the loss.

        Args:
            input_ids: (B, T). The volume's and the prompt's arguments are those of [`SamfModel.forward`].
            pixel_values: (B, S, C, H, W).
            attention_mask: (B, T).
            position_ids: (B, T).
            inputs_embeds: (B, T, text width), in place of `input_ids`.
            slice_embeddings: (B, S, slice width), in place of `pixel_values`.
            slice_mask: (B, S) bool, True = a slice.
            slice_planes: (B, S), 0 axial, 1 coronal, 2 sagittal.
            slice_positions: (B, S) in [0, 1].
            prompt_mask: (B, T) bool, True = the text that the fusion reads.
            prefix_ids: (B, P), tokens that the cache holds.
            extra_values: (B, sum of the extra sources' widths).
            extra_mask: (B, sources) bool, True = present.
            labels: (B, T), -100 = no loss, for the library's causal language modelling loss.
            finding_targets: (B, L), 0, 1 or -100 for unknown, in the order of `config.finding_names`.
            logits_to_keep: compute logits for only the last so many tokens (0 = all), or for these indices.
            skip_logits: with labels, run the head on the tokens that have a loss and return no logits.
            output_slice_attentions: return the fusion's softmax weights.
            **kwargs: of the language model and its loss.
        """
        targets = take_finding_targets(finding_targets, kwargs)
        volume = VolumeInputs(
            pixel_values, slice_embeddings, slice_mask, slice_planes, slice_positions, extra_values, extra_mask
        )
        prompt = PromptInputs(input_ids, inputs_embeds, attention_mask, position_ids, prompt_mask, prefix_ids, labels)
        if targets is not None and labels is None and (input_ids is not None or inputs_embeds is not None):
            check_findings_are_trained(self.training)
        options = {name: value for name, value in kwargs.items() if name not in LOSS_COUNTS}
        options |= {"output_slice_attentions": output_slice_attentions, "return_dict": True}
        outputs = self.model(**prompt._asdict(), **volume._asdict(), **options)
        # The number of labels isn't known to a compiler.
        if skip_logits and labels is not None and not torch.compiler.is_compiling():
            logits, loss, aux_loss = self._run_head_on_labels(outputs, prompt, kwargs)
        else:
            logits, loss, aux_loss = self._run_head(outputs, prompt, kwargs, logits_to_keep)
        if targets is not None:
            check_finding_targets(self.config.finding_names, targets, outputs.image_outputs is not None, slice_mask)
            if outputs.finding_logits is not None:
                loss = self._add_finding_loss(loss, outputs.finding_logits, targets, labels, **kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return SamfCausalLMOutputWithPast(loss=loss, logits=logits, aux_loss=aux_loss, **rest)

    def _run_head(
        self,
        outputs: SamfModelOutputWithPast,
        prompt: PromptInputs,
        others: ModelInputs,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the logits, the text's loss and its experts' part; None where there is no text or no labels."""
        if outputs.last_hidden_state is None:
            return None, None, None
        own = self.causal_lm.run_head(
            self.lm_head,
            self.model.language_model,
            outputs,
            functools.partial(self._text_loss, **others),
            attention_mask=prompt.attention_mask,
            labels=prompt.labels,
            logits_to_keep=logits_to_keep,
            output_router_logits=others.get("output_router_logits"),
        )
        return own.logits, own.loss, own.get("aux_loss")

    def _run_head_on_labels(
        self, outputs: SamfModelOutputWithPast, prompt: PromptInputs, others: ModelInputs
    ) -> tuple[None, torch.Tensor | None, torch.Tensor | None]:
        """Return what `_run_head` does, without logits: those of image, prompt and padding tokens add nothing to the loss."""
        if outputs.last_hidden_state is None:
            return None, None, None
        hidden, labels = predicting_states(outputs.last_hidden_state, cast(torch.Tensor, prompt.labels))
        needed = type(outputs)(**{**outputs, "last_hidden_state": hidden})
        _, loss, aux_loss = self._run_head(needed, prompt._replace(labels=labels), {**others, "shift_labels": labels})
        return None, loss, aux_loss

    def _text_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return the loss that the language model's own forward asks for; its `vocab_size` may predate a resize."""
        return self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)

    def _add_finding_loss(
        self,
        loss: torch.Tensor | None,
        logits: torch.Tensor,
        targets: torch.Tensor,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_findings_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the text's loss (None = there is none) plus the weighted loss of the findings."""
        targets, weights = targets.to(logits.device), None
        if loss is not None and labels is not None:
            weights = finding_weights(targets, labels, num_items_in_batch, num_findings_in_batch)
        findings = self.config.finding_loss_weight * finding_loss(logits, targets, weights)
        return findings if loss is None else loss + findings.to(loss.device)

    def _get_name(self) -> str:
        """Return the name by which Trainer looks up label smoothing below, also for subclasses and sharded models."""
        return SamfForConditionalGeneration.__name__


# Trainer's label smoothing shifts logits and labels only for the classes of this table; without the shift a model would
# be trained to copy its input.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(SamfConfig.model_type, SamfForConditionalGeneration.__name__)

# The last ones are defined in modules_samf.py and losses_samf.py, and are kept importable from here.
__all__ = [
    "SamfForConditionalGeneration",
    "SamfModel",
    "SamfPreTrainedModel",
    "SamfAggregator",
    "SamfFusion",
    "SlicePositionEmbedding",
    "finding_loss",
    "masked_mean",
]
