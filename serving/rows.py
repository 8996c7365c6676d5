"""The rows of a batch while they are generated: each has its own end, its own client and its own limit."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

End = Literal["stop", "length", "cancelled"]


class Row:
    """The tokens of one answer as they come.

    Args:
        decode: returns the text of tokens.
        end_ids: tokens that end an answer.
        limit: tokens that the answer may have.
        is_cancelled: whether the answer isn't wanted any more.
        on_text: takes each further piece of the text; None = only the whole text is wanted.
        on_end: is called when the answer has ended.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        end_ids: Collection[int],
        limit: int,
        is_cancelled: Callable[[], bool],
        on_text: Callable[[str], None] | None,
        on_end: Callable[["Row"], None],
    ) -> None:
        self._decode = decode
        self._end_ids = end_ids
        self._limit = limit
        self._is_cancelled = is_cancelled
        self._on_text = on_text
        self._on_end = on_end
        self._sent = ""
        self.prompt_tokens = 0
        self.tokens: list[int] = []
        self.end: End | None = None

    def text(self) -> str:
        """Return the text so far, without blanks around it."""
        ended = self.end == "stop"
        return self._decode(self.tokens[:-1] if ended else self.tokens).strip()

    def add(self, token: int) -> None:
        """Take the next token, unless the answer has ended."""
        if self.end is not None:
            return
        self.tokens.append(token)
        if token in self._end_ids:
            self.end = "stop"
        elif len(self.tokens) >= self._limit:
            self.end = "length"
        elif self._is_cancelled():
            self.end = "cancelled"
        if self._on_text is not None and self.end != "cancelled":
            self._send(self._on_text)
        if self.end is not None:
            self._on_end(self)

    def _send(self, on_text: Callable[[str], None]) -> None:
        """Hand on what is new of the text and certain: a character may be several tokens, and a text ends without blanks."""
        text = self.text()
        if self.end is None:
            text = text.rstrip("\ufffd")
        if text.startswith(self._sent) and len(text) > len(self._sent):
            on_text(text[len(self._sent) :])
            self._sent = text


class RowWatcher(BaseStreamer, StoppingCriteria):
    """Hands each step's tokens of `generate` to the rows of the batch, and ends those that are done.

    Args:
        rows: one per row of the batch.
        pad_id: pads the prompts on the left.
    """

    def __init__(self, rows: Sequence[Row], pad_id: int | None) -> None:
        self._rows = rows
        self._pad_id = pad_id
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts (B, T), and then the tokens (B,) of each step."""
        if self._prompt_seen:
            for row, token in zip(self._rows, value.tolist(), strict=True):
                row.add(token)
            return
        self._prompt_seen = True
        for row, ids in zip(self._rows, value, strict=True):
            kept = (ids != self._pad_id).nonzero() if self._pad_id is not None else ids
            row.prompt_tokens = len(ids) - int(kept[0]) if len(kept) and self._pad_id is not None else len(ids)

    def end(self) -> None:
        """Take the end of the generation, of which each row knows already."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Return which rows are done, (B,)."""
        done = [row.end is not None for row in self._rows]
        return torch.tensor(done, device=input_ids.device)
