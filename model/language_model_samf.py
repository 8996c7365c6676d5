"""Run the library's language models by their own code.

A causal language model is more than its layers: some cap or scale their logits, have a bias on their head, add a loss of
their experts, or need their cache refilled at some length. SAMF keeps the layers as `model.language_model` and the head
as `lm_head`, and leaves the rest to the class of the causal language model.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from .inputs_samf import StepInputs

CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
KEPT_OUTPUTS = ("last_hidden_state", *CACHE_NAMES, "hidden_states", "attentions", "router_logits")
# What generate() asks a model class for; a composite model must answer as its language model does.
_GENERATION_FACTS = ("_is_stateful", "_can_compile_fullgraph")

# Settings of a rotary embedding as a configuration holds them; the keys depend on the type.
RopeParameters: TypeAlias = Mapping[str, Any]


# --- Rotary embeddings ------------------------------------------------------------------------------------------------


def _rope_parameters(config: PretrainedConfig) -> Iterator[RopeParameters]:
    """Yield the settings of each rotary embedding: one, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]


def rope_sets(config: PretrainedConfig, length: int) -> list[int]:
    """Return which factors rotate a sequence of `length` positions, for each embedding whose factors depend on it.

    For "longrope" that is 0 (short factors) or 1 (long factors); for "dynamic" it is 0 or, beyond the original length, the
    length itself. Keys that were rotated by other factors can't be reused: where this changes, a cache must be refilled.
    """
    sets = []
    for parameters in _rope_parameters(config):
        if parameters.get("rope_type") == "longrope":
            original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            sets.append(int(length > original))
        elif _is_dynamic(parameters):
            sets.append(length if length > config.max_position_embeddings else 0)
    return sets


def rope_stretch(config: PretrainedConfig) -> float:
    """Return the factor by which "dynamic" rotary embeddings extend `max_position_embeddings`; 1 for other types."""
    factors = [parameters["factor"] for parameters in _rope_parameters(config) if _is_dynamic(parameters)]
    return min(factors, default=1.0)


def forget_longest_sequence(language_model: nn.Module, config: PretrainedConfig) -> None:
    """Reset "dynamic" rotary embeddings to their initial factors.

    The library's embeddings keep the factors of the longest sequence seen so far, so logits would depend on earlier
    calls. From the initial factors they adapt to the next sequence.
    """
    if not any(map(_is_dynamic, _rope_parameters(config))):
        return
    for module in language_model.modules():
        kinds = getattr(module, "rope_type", None)
        for layers, kind in kinds.items() if isinstance(kinds, Mapping) else [(None, kinds)]:
            if not _is_dynamic({"rope_type": kind}):
                continue
            prefix = f"{layers}_" if layers else ""
            inv_freq, first = getattr(module, f"{prefix}inv_freq"), getattr(module, f"{prefix}original_inv_freq")
            module.register_buffer(f"{prefix}inv_freq", first.to(inv_freq.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _is_dynamic(parameters: RopeParameters) -> bool:
    return "dynamic" in (parameters.get("rope_type") or "")


def takes_positions(language_model: nn.Module) -> bool:
    """Return whether the layers take position_ids; those of ALiBi and recurrent models have no positions."""
    return "position_ids" in inspect.signature(type(language_model).forward).parameters


# --- The class of the causal language model ---------------------------------------------------------------------------


class _Output:
    """A language model's output as its head's class expects it: a field that SAMF's output lacks is None."""

    def __init__(self, output: ModelOutput):
        self._output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name, None)

    def __getitem__(self, index: int | str | slice) -> Any:
        return self._output[index]


class _Given:
    """Stand-in for a language model that has run: calling it returns the output; other attributes are its own."""

    def __init__(self, language_model: nn.Module, output: ModelOutput):
        self._language_model = language_model
        self._output = _Output(output)
        self.decoder = self  # OPT's head calls its model's decoder

    def __call__(self, *args: Any, **kwargs: Any) -> _Output:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._language_model, name)


# The modules and the loss function that stand in for the class's own.
_Part: TypeAlias = nn.Module | _Given | Callable[..., torch.Tensor]


class _Runner:
    """The `self` of a causal language model's own forward: its class's attributes, with SAMF's modules in place of its own.

    One for each call, since two threads may generate with one model.
    """

    def __init__(self, causal: PreTrainedModel, parts: Mapping[str, _Part]):
        self._causal = causal
        for name, part in parts.items():
            setattr(self, name, part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._causal, name)


class CausalLanguageModel:
    """The class of a causal language model without its weights: computes logits and prepares inputs as that class does.

    Args:
        causal: as `build_language_model` returns it. Its modules are removed from it.
    """

    def __init__(self, causal: PreTrainedModel):
        self.base_name = causal.base_model_prefix
        (self.head_name,) = (name for name, _ in causal.named_children() if name != self.base_name)
        self.takes_router_logits = "output_router_logits" in inspect.signature(type(causal).forward).parameters
        self.tied = dict(causal._tied_weights_keys or {})
        self.facts = {name: getattr(causal, name) for name in _GENERATION_FACTS if hasattr(causal, name)}
        causal._modules.clear()
        self.causal = causal

    def tied_weights_keys(self, prefix: str) -> dict[str, str]:
        """Return which weights are tied, by SAMF's names; `prefix` is the language model's, `"model.language_model"`."""
        names = {self.base_name: prefix, self.head_name: "lm_head"}

        def renamed(key: str) -> str:
            first, dot, rest = key.partition(".")
            return names.get(first, first) + dot + rest

        return {renamed(target): renamed(source) for target, source in self.tied.items()}

    def run_head(
        self,
        head: nn.Module,
        language_model: nn.Module,
        output: BaseModelOutputWithPast,
        loss_function: Callable[..., torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_router_logits: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Run the class's own forward on the output of its layers.

        Args:
            head: SAMF's `lm_head`, possibly wrapped.
            language_model: SAMF's; it isn't run.
            output: the layers' output with `last_hidden_state` (B, T, D).
            loss_function: takes logits, labels and further arguments that it may ignore.
            attention_mask: (B, T).
            labels: (B, T), -100 = no loss.
            logits_to_keep: compute logits for only the last so many tokens (0 = all), or for these indices.
            output_router_logits: as the class takes it; ignored by a class without experts.

        Returns:
            The class's own output: logits (B, kept, vocabulary), with labels the loss, with experts `aux_loss`.
        """
        parts: dict[str, _Part] = {
            self.base_name: _Given(language_model, output),
            self.head_name: head,
            "loss_function": loss_function,
        }
        options = {"output_router_logits": output_router_logits} if self.takes_router_logits else {}
        return type(self.causal).forward(
            _Runner(self.causal, parts),
            inputs_embeds=output.last_hidden_state,
            attention_mask=attention_mask,
            labels=labels,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **options,
        )

    def prepare_inputs(self, head: nn.Module, *args: Any, **kwargs: Any) -> tuple[StepInputs, bool]:
        """Prepare the inputs of a step of `generate()` as the class does.

        Args:
            head: SAMF's `lm_head`.
            args: of the class's `prepare_inputs_for_generation`.
            kwargs: of the class's `prepare_inputs_for_generation`.

        Returns:
            The inputs, and whether the class or its rotary embedding needs the cache refilled: the inputs then hold the
            whole sequence and no cache.
        """
        self.causal._modules[self.head_name] = head  # the class reads the type of its weights
        name = next((name for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if name is None:
            return self._prepare(*args, **kwargs), False
        without_cache = {**kwargs, name: None, "next_sequence_length": None}
        if self._outgrows_cache(kwargs[name], input_ids, kwargs.get("position_ids")):
            kwargs = without_cache
        inputs = self._prepare(*args, **kwargs)
        rebuilt = all(inputs.get(other) is None for other in CACHE_NAMES)
        if rebuilt and kwargs.get("next_sequence_length") is not None:
            # Older transformers: Phi-3 drops its cache, and then returns only the new tokens.
            inputs = self._prepare(*args, **without_cache)
        return inputs, rebuilt

    def _prepare(self, *args: Any, **kwargs: Any) -> StepInputs:
        prepare = cast(Callable[..., StepInputs], self.causal.prepare_inputs_for_generation)
        return prepare(*args, **kwargs)

    def _outgrows_cache(self, cache: Any, input_ids: torch.Tensor | None, position_ids: torch.Tensor | None) -> bool:
        """Return whether the next step rotates by other factors than those of the keys in the cache."""
        config = self.causal.config
        if input_ids is None or not rope_sets(config, 0):
            return False
        filled = int(cache.get_seq_length())
        length = input_ids.shape[1] if position_ids is None else int(position_ids.max()) + 1
        return filled > 0 and rope_sets(config, length) != rope_sets(config, length - (input_ids.shape[1] - filled))
