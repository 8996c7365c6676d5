"""`generate()` for prompts with a volume: when it is read, which tokens are its prompt, and which are never generated."""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PretrainedConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.utils import logging

from .cache_samf import grow_in_place
from .configuration_samf import SamfConfig
from .inputs_samf import ModelInputs, StepInputs
from .language_model_samf import CACHE_NAMES, CausalLanguageModel, rope_sets, rope_stretch

logger = logging.get_logger(__name__)

# Arguments that only the first step of generate() needs: later the cache holds what came of them.
_VOLUME_INPUTS = (
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

    if TYPE_CHECKING:
        config: SamfConfig
        model: Any
        lm_head: nn.Module
        causal_lm: CausalLanguageModel

        @property
        def device(self) -> torch.device:
            """Return the device of the weights."""

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: StepInputs
    ) -> tuple[torch.Tensor, str | None, dict[str, torch.Tensor]]:
        """Mark the tokens that `generate()` was given as the prompt, before it adds others.

        Otherwise a step that reads the whole sequence again (no cache, assisted decoding) would count generated tokens as
        the fusion's text, and the fused vector would change.
        """
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)  # type: ignore[misc]
        if has_volume(model_kwargs) and model_kwargs.get("prompt_mask") is None:
            mask = model_kwargs.get("attention_mask")
            if mask is None or mask.ndim != 2:
                mask = torch.ones(inputs.shape[:2], device=inputs.device)
            model_kwargs["prompt_mask"] = mask.bool()
        return inputs, name, model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[torch.LongTensor, StepInputs]:
        """Encode the slices once, not again for each beam, and then expand the inputs as the library does."""
        if expand_size > 1:
            self._encode_once(model_kwargs)
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )

    def _encode_once(self, model_kwargs: StepInputs) -> None:
        """Replace the pixels with their slice embeddings."""
        if model_kwargs.get("pixel_values") is not None:
            pixel_values = model_kwargs.pop("pixel_values").to(self.model.slice_encoder.device)
            model_kwargs["slice_embeddings"] = self.model.encode_slices(pixel_values).last_hidden_state

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: StepInputs,
        generation_mode: GenerationMode,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Check the settings against the volume, and then prepare the cache as the library does.

        At this point the lengths are known and nothing has been computed.

        Raises:
            ValueError: a volume with `prefill_chunk_size`, or assisted decoding with a cache that isn't empty.
        """
        if generation_mode == GenerationMode.ASSISTED_GENERATION and cached_tokens(model_kwargs):
            raise ValueError(
                "Prompt look-up and assisted decoding read the whole prompt again after a cache that isn't empty, and "
                "generate other tokens. Leave out the cache, or prompt_lookup_num_tokens and assistant_model."
            )
        if has_volume(model_kwargs):
            if generation_config.prefill_chunk_size is not None:
                raise ValueError(
                    f"prefill_chunk_size={generation_config.prefill_chunk_size} splits the prompt, but the "
                    "fusion reads the whole prompt at once. Leave prefill_chunk_size out for prompts with a volume."
                )
            length = generation_config.max_length
            warn_of_length(
                self.config.text_config, length, f"Image tokens, prompt and answer, {length} tokens together,"
            )
            refilled = rope_sets(self.config.text_config, length) != rope_sets(self.config.text_config, 0)
            if refilled or not generation_config.use_cache:  # then some or all steps read the whole prompt again
                self._encode_once(model_kwargs)
        given = {name for name in CACHE_NAMES if model_kwargs.get(name) is not None}
        result = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, *args, **kwargs
        )
        reordered = generation_config.num_beams > 1 and not getattr(
            self, "is_quantized", False
        )  # in a new place each step
        if self.device.type == "cpu" and not reordered:
            for name in set(CACHE_NAMES) - given:
                grow_in_place(model_kwargs.get(name))
        return result

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Return the library's processors, and suppress the image placeholder.

        It is suppressed first, so that top-k and top-p choose among real tokens, and last, so that no processor of the
        caller restores it.
        """
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        suppress = SuppressTokensLogitsProcessor(
            [self.config.image_token_id], device=str(kwargs.get("device") or self.device)
        )
        return LogitsProcessorList([suppress, *processors, suppress])

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate() looks the cache's name up in it
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> StepInputs:
        """Prepare a step's inputs as the language model does, without a volume that the cache already holds.

        Args:
            *args: as in the library.
            **kwargs: as in the library.

        Returns:
            The model's arguments. If the cache hides the start of the prompt, they include its ids as `prefix_ids`.
        """
        inputs, rebuilt = self.causal_lm.prepare_inputs(self.lm_head, *args, **kwargs)
        if rebuilt:  # the language model refills its cache: the volume is read again with the prompt
            return inputs | {key: kwargs[key] for key in _VOLUME_INPUTS if kwargs.get(key) is not None}
        if not kwargs.get("use_cache", True):
            return inputs
        whole = args[0] if args else kwargs.get("input_ids")  # (B, cached + read now), or only (B, read now)
        if kwargs.get("is_first_iteration", False) and self._reads_volume(inputs, whole):
            return inputs | self._find_prefix(inputs, whole)
        inputs = {key: value for key, value in inputs.items() if key not in _VOLUME_INPUTS}
        if not kwargs.get("is_first_iteration", False) and inputs.get("input_ids") is not None:
            # Prompt look-up and assistants may propose a placeholder. It is never accepted, so any token can replace it.
            ids = inputs["input_ids"]
            inputs["input_ids"] = ids.masked_fill(ids == self.config.image_token_id, 0)
        return inputs

    def _reads_volume(self, inputs: StepInputs, whole: torch.Tensor | None) -> bool:
        """Return whether a first step still has to read the volume: not if the cache that it was passed holds it."""
        ids = inputs.get("input_ids")
        if cached_tokens(inputs) == 0 or ids is None:
            return True
        mask = inputs.get("prompt_mask")
        if mask is not None and whole is not None:  # the tokens after it were generated or are proposed
            ids = ids[:, : max(mask.shape[1] - (whole.shape[1] - ids.shape[1]), 0)]
        return bool((ids == self.config.image_token_id).any())

    def _find_prefix(self, inputs: StepInputs, whole: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Return the ids (B, P) that the cache holds before the volume, since the fusion reads the whole prompt."""
        ids = inputs.get("input_ids")
        if not has_volume(inputs) or ids is None or whole is None or whole.shape[1] == ids.shape[1]:
            return {}
        return {"prefix_ids": whole[:, : whole.shape[1] - ids.shape[1]].to(ids.device)}


def has_volume(inputs: ModelInputs) -> bool:
    """Return whether a model's arguments hold a volume."""
    return any(inputs.get(key) is not None for key in ("pixel_values", "slice_embeddings"))


def cached_tokens(inputs: ModelInputs) -> int:
    """Return the number of tokens in the cache among a model's arguments."""
    cache = inputs.get("cache", inputs.get("past_key_values"))  # the name before transformers 5.24
    return 0 if cache is None else int(cache.get_seq_length())


def find_window(text_config: PretrainedConfig) -> int | None:
    """Return how many tokens back a language model attends, None if any of its layers attends to all."""
    kinds = getattr(text_config, "layer_types", None) or ["sliding_attention"]
    window: int | None = getattr(text_config, "sliding_window", None)
    return window if all(kind == "sliding_attention" for kind in kinds) else None


def warn_of_length(text_config: PretrainedConfig, length: int, what: str) -> None:
    """Warn if a sequence exceeds the language model's attention window or its positions.

    Args:
        text_config: the language model's configuration.
        length: number of tokens.
        what: the subject of the warning, in the plural.
    """
    window, positions = find_window(text_config), getattr(text_config, "max_position_embeddings", None)
    if window is not None and length > window:
        logger.warning_once(
            f"{what} exceed the language model's attention window: each of its layers attends {window} tokens back "
            "(sliding_window), so tokens farther from the image tokens don't see the volume. Use fewer image tokens, a "
            "shorter prompt, or a smaller max_new_tokens."
        )
    positions = None if positions is None else int(positions * rope_stretch(text_config))
    if positions is not None and length > positions:
        logger.warning_once(
            f"{what} exceed the {positions} positions that the language model supports (max_position_embeddings): text "
            "beyond them is unreliable. Use fewer image tokens, a shorter prompt, or a smaller max_new_tokens."
        )
