"""What `generate()` must know of a volume: when it is read, what its prompt is, and which tokens are never made."""

import functools
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PretrainedConfig
from transformers.generation import SuppressTokensLogitsProcessor
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import logging

from .language_model_samf import rope_sets, rope_stretch

logger = logging.get_logger(__name__)

# What generate() needs at the first step alone: the prompt's cache already holds what they gave.
VOLUME_INPUTS = (
    "pixel_values",
    "slice_embeddings",
    "slice_mask",
    "slice_planes",
    "slice_positions",
    "prompt_mask",
    "prefix_ids",
    "extra_values",
    "extra_mask",
)


class SamfGenerationMixin(GenerationMixin):
    """The library's generation for a model whose image tokens depend on the whole prompt."""

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, str | None, dict[str, torch.Tensor]]:
        """Before generate() adds tokens, mark what it was given as the prompt.

        Without this a step that reads the whole sequence again (cache off, assisted decoding) would count made tokens
        as the fusion's text, and the fused vector would move.
        """
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        if has_volume(model_kwargs) and model_kwargs.get("prompt_mask") is None:
            mask = model_kwargs.get("attention_mask")
            if mask is None or mask.ndim != 2:
                mask = torch.ones(inputs.shape[:2], device=inputs.device)
            model_kwargs["prompt_mask"] = mask.bool()
        return inputs, name, model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """The library's, after the slices are encoded: not again for each beam."""
        if expand_size > 1:
            self._encode_once(model_kwargs)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _encode_once(self, model_kwargs: dict[str, Any]) -> None:
        """Put slice embeddings in the place of pixels."""
        if model_kwargs.get("pixel_values") is not None:
            pixel_values = model_kwargs.pop("pixel_values").to(self.model.slice_encoder.device)
            model_kwargs["slice_embeddings"] = self.model.encode_slices(pixel_values).last_hidden_state

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The library's, where the lengths are known and nothing has been computed yet.

        Raises:
            ValueError: a volume with `prefill_chunk_size`, or assisted decoding behind a cache that isn't empty.
        """
        if generation_mode == GenerationMode.ASSISTED_GENERATION and cached_tokens(model_kwargs):
            raise ValueError(
                "Prompt look-up and assisted decoding read the whole prompt again behind a cache that isn't empty, and "
                "give other tokens. Leave out the cache, or prompt_lookup_num_tokens and assistant_model."
            )
        if has_volume(model_kwargs):
            if generation_config.prefill_chunk_size is not None:
                raise ValueError(
                    f"prefill_chunk_size={generation_config.prefill_chunk_size} cuts the prompt into pieces, but the "
                    "fusion reads the whole prompt at once. Leave prefill_chunk_size out for prompts with a volume."
                )
            length = generation_config.max_length
            warn_of_length(
                self.config.text_config, length, f"Image tokens, prompt and answer, {length} tokens together,"
            )
            refilled = rope_sets(self.config.text_config, length) != rope_sets(self.config.text_config, 0)
            if refilled or not generation_config.use_cache:  # some steps or all then read the whole prompt again
                self._encode_once(model_kwargs)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """The library's, and the image placeholder is never made.

        Suppressed first, so that top-k and top-p choose among real tokens, and last, so that no processor that a user
        adds brings it back.
        """
        processors = super()._get_logits_processor(*args, **kwargs)
        suppress = SuppressTokensLogitsProcessor(
            [self.config.image_token_id], device=kwargs.get("device") or self.device
        )
        return LogitsProcessorList([suppress, *processors, suppress])

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate() looks the cache's name up in it
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The language model's own inputs, without a volume that the cache holds, and with the prompt that it hides."""
        inputs, rebuilt = self.causal_lm.prepare_inputs(self.lm_head, *args, **kwargs)
        if rebuilt:  # the language model wants its cache filled anew: the volume is read again with the prompt
            return inputs | {key: kwargs[key] for key in VOLUME_INPUTS if kwargs.get(key) is not None}
        if not kwargs.get("use_cache", True):
            return inputs
        whole = args[0] if args else kwargs.get("input_ids")  # (B, cached + read now), or what is read now alone
        if kwargs.get("is_first_iteration", False) and self._reads_volume(inputs, whole):
            return inputs | self._find_prefix(inputs, whole)
        inputs = {key: value for key, value in inputs.items() if key not in VOLUME_INPUTS}
        if not kwargs.get("is_first_iteration", False) and inputs.get("input_ids") is not None:
            # Prompt look-up and assistants may propose a placeholder. It is never accepted, so any other token does.
            ids = inputs["input_ids"]
            inputs["input_ids"] = ids.masked_fill(ids == self.config.image_token_id, 0)
        return inputs

    def _reads_volume(self, inputs: dict[str, Any], whole: torch.Tensor | None) -> bool:
        """Whether a first step has the volume still to read: not so when the cache that it was passed holds it."""
        ids = inputs.get("input_ids")
        if cached_tokens(inputs) == 0 or ids is None:
            return True
        mask = inputs.get("prompt_mask")
        if mask is not None:  # beyond it stand tokens that were made or are proposed
            ids = ids[:, : max(mask.shape[1] - (whole.shape[1] - ids.shape[1]), 0)]
        return bool((ids == self.config.image_token_id).any())

    def _find_prefix(self, inputs: dict[str, Any], whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """The ids (B, P) that the cache holds before the volume: the fusion reads the whole prompt's text."""
        ids = inputs.get("input_ids")
        if not has_volume(inputs) or ids is None or whole.shape[1] == ids.shape[1]:
            return {}
        return {"prefix_ids": whole[:, : whole.shape[1] - ids.shape[1]].to(ids.device)}


def has_volume(inputs: dict[str, Any]) -> bool:
    return any(inputs.get(key) is not None for key in ("pixel_values", "slice_embeddings"))


def cached_tokens(inputs: dict[str, Any]) -> int:
    """How many tokens the cache among a model's inputs holds."""
    cache = inputs.get("cache", inputs.get("past_key_values"))  # the name before transformers 5.24
    return 0 if cache is None else int(cache.get_seq_length())


def find_window(text_config: PretrainedConfig) -> int | None:
    """How many tokens back a language model sees, if no layer of it sees farther."""
    kinds = getattr(text_config, "layer_types", None) or ["sliding_attention"]
    window = getattr(text_config, "sliding_window", None)
    return window if all(kind == "sliding_attention" for kind in kinds) else None


def warn_of_length(text_config: PretrainedConfig, length: int, what: str) -> None:
    """Warn where `what` of `length` tokens is more than the language model sees at once, or than it has positions for."""
    window, positions = find_window(text_config), getattr(text_config, "max_position_embeddings", None)
    if window is not None and length > window:
        logger.warning_once(
            f"{what} exceed what the language model sees at once: each of its layers looks {window} tokens back "
            "(sliding_window), so tokens farther from the image tokens don't see the volume. Use fewer image tokens, a "
            "shorter prompt, or a smaller max_new_tokens."
        )
    positions = None if positions is None else int(positions * rope_stretch(text_config))
    if positions is not None and length > positions:
        logger.warning_once(
            f"{what} exceed the {positions} positions that the language model was made for (max_position_embeddings): "
            "what it says past them means little. Use fewer image tokens, a shorter prompt, or a smaller max_new_tokens."
        )
