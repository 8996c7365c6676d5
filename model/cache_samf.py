"""A cache of keys and values that grows in place.

The library's grows by concatenation: each token copies all keys and values of each layer. With 4-bit weights that is as
much memory traffic as a fifth of the weights at 300 tokens, and more with each token; a batch of 64 prompts copies 64 times
as much.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    _Layer = DynamicLayer
else:
    _Layer = object

_SPARE = 256  # tokens that a buffer has room for when it is made


class _InPlace(_Layer):
    """Mixin of a layer's cache: appends to buffers that have room, as long as nothing else has changed the states."""

    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values and return all, as the library does.

        Args:
            key_states: (B, heads, new tokens, width).
            value_states: as `key_states`.
            *args: as in the library.
            **kwargs: as in the library.
        """
        if not self._appends(key_states):
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = self._room or (None, None)
        cached_keys, cached_values = cast(torch.Tensor, self.keys), cast(torch.Tensor, self.values)
        self._room = (_with_room(keys, cached_keys, key_states), _with_room(values, cached_values, value_states))
        self.keys = _append(self._room[0], cached_keys, key_states)
        self.values = _append(self._room[1], cached_values, value_states)
        self._count(key_states.shape[-2])
        return self.keys, self.values

    def _appends(self, states: torch.Tensor) -> bool:
        """Return whether the states are only appended to those that are cached."""
        tracked = torch.compiler.is_compiling() or (torch.is_grad_enabled() and states.requires_grad)
        return self.is_initialized and self.keys is not None and self.keys.numel() > 0 and not tracked

    def _count(self, tokens: int) -> None:
        """Take note of tokens that were appended."""


class GrowingLayer(_InPlace, DynamicLayer):
    """The cache of a layer that attends to all tokens."""


class GrowingSlidingWindowLayer(_InPlace, DynamicSlidingWindowLayer):
    """The cache of a layer with a window; beyond the window it is the library's."""

    def _appends(self, states: torch.Tensor) -> bool:
        inside = self.get_seq_length() + states.shape[-2] < self.sliding_window
        return inside and not getattr(self, "record_past", False) and super()._appends(states)

    def _count(self, tokens: int) -> None:
        self.cumulative_length += tokens


def _with_room(buffer: torch.Tensor | None, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return a buffer that begins with the cached states and has room for new ones.

    Args:
        buffer: the last one; None = there is none.
        states: (B, heads, tokens, width); the front of `buffer`, unless the cache was reordered or set.
        new: (B, heads, new tokens, width).
    """
    batch, heads, length, width = states.shape
    needed = length + new.shape[-2]
    is_front = buffer is not None and buffer.data_ptr() == states.data_ptr() and buffer.shape[:2] == states.shape[:2]
    if buffer is not None and is_front and buffer.shape[2] >= needed:
        return buffer
    buffer = states.new_empty(batch, heads, needed + _SPARE, width)
    buffer[:, :, :length] = states
    return buffer


def _append(buffer: torch.Tensor, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Write new states behind the cached ones in their buffer and return both.

    Args:
        buffer: as `_with_room` returned it.
        states: those that are cached.
        new: those that are added.
    """
    length = states.shape[-2]
    buffer[:, :, length : length + new.shape[-2]] = new
    return buffer[:, :, : length + new.shape[-2]]


def grow_in_place(cache: object) -> None:
    """Replace the layers of an empty `DynamicCache`; any other cache, and other kinds of layers, stay as they are."""
    if type(cache) is not DynamicCache or cache.get_seq_length() > 0:
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = GrowingSlidingWindowLayer(layer.sliding_window)
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
