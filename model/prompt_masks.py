"""Where a batch's answers are, and the mask of the prompt's text: what the fusion may read."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import BatchFeature

from .chat_template_samf import IMAGE_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# `sanitize_control_tokens=True` writes the first character before a token that a user typed, and the second after it.
_MARKERS = re.compile("[\U000f0000\U000f0001]")
PLACEHOLDER = re.compile(f"(?<!\U000f0000){IMAGE_TOKEN}")


class RenderedConversation(NamedTuple):
    """Text of a whole conversation, and the (start, end) of each answer in it; None if the template doesn't mark answers."""

    text: str
    answers: list[tuple[int, int]] | None


class TokenizedText(NamedTuple):
    """Text as it was tokenized, and whether the tokenizer added its special tokens.

    It includes the markers of sanitized tokens, is not expanded by image tokens, and ends at the message to be continued.
    """

    text: str
    add_special_tokens: bool


def mask_prompt(inputs: BatchFeature, answers: Iterable[Any], image_token_id: int) -> Any:
    """Return the mask of the prompt's text in the form of `input_ids`: a tensor or an array (B, T), or lists.

    The prompt's text is everything before the first answer token after the volume, without answers, image tokens and
    padding.

    Args:
        inputs: `input_ids` (B, T) and, if there is one, `attention_mask`.
        answers: a mask (T,) per row, True for the tokens of answers.
        image_token_id: id of the image token.
    """
    ids = inputs["input_ids"]
    rows = []
    for row, (tokens, answer) in enumerate(zip(ids, answers, strict=True)):
        tokens, answer = torch.as_tensor(tokens), torch.as_tensor(answer).bool()
        image = tokens == image_token_id
        after_volume = image.cumsum(0) == image.sum()  # from the last image token on
        rows.append(((after_volume & answer).cumsum(0) == 0) & ~answer & ~image & _attended(inputs, row))
    if isinstance(ids, torch.Tensor):
        return torch.stack(rows)
    return np.stack(rows) if isinstance(ids, np.ndarray) else [row.tolist() for row in rows]


def find_marked_answers(
    inputs: BatchFeature,
    conversations: Sequence[RenderedConversation],
    tokenized: Sequence[TokenizedText],
    tokenizer: "PreTrainedTokenizerBase",
    image_token_id: int,
) -> list[torch.Tensor] | None:
    """Return where the answers of rendered conversations are among the tokens.

    Args:
        inputs: `input_ids` (B, T) and, if there is one, `attention_mask`.
        conversations: the whole conversations.
        tokenized: what was tokenized of them; may be empty if no conversation holds an answer.
        tokenizer: the tokenizer.
        image_token_id: id of the image token.

    Returns:
        A mask (T,) per row; None if it can't be determined.
    """
    masks = []
    for row, conversation in enumerate(conversations):
        if conversation.answers is None:
            return None
        ids = torch.as_tensor(inputs["input_ids"][row])
        mask = torch.zeros_like(ids, dtype=torch.bool)
        if conversation.answers and not (tokenized and _is_start(tokenized[row].text, conversation.text)):
            return None
        attended = _attended(inputs, row).nonzero()[:, 0]
        for span in conversation.answers:
            first, last = (
                _token_at(tokenizer, tokenized[row], character, ids[attended].tolist(), image_token_id)
                for character in span
            )
            mask[attended[first:last]] = True
        masks.append(mask)
    return masks


def find_answers(
    input_ids: Iterable[Any], header: Sequence[int], end: int | None, pad: int | None, image_token_id: int
) -> list[torch.Tensor] | None:
    """Return where the answers are in texts that were not rendered by a chat template.

    Args:
        input_ids: token ids (B, T), or lists of different lengths.
        header: token ids that the chat template writes before an answer.
        end: token id that ends an answer; None if the template marks none.
        pad: token id of the padding.
        image_token_id: id of the image token.

    Returns:
        A mask (T,) per row, True from after a header to the next end token; None if no text holds an answer, or one with a
        volume has no header after the volume.
    """
    masks = []
    for row in map(torch.as_tensor, input_ids):
        starts = [start + len(header) for start in _occurrences(row.tolist(), list(header))]
        volume = (row == image_token_id).nonzero()
        if len(volume) and (not starts or starts[-1] <= int(volume[-1]) or (end is None and len(starts) > 1)):
            return None
        mask = torch.zeros_like(row, dtype=torch.bool)
        for start in starts:
            mask[start : _answer_stop(row, start, end)] = True
        masks.append(mask if pad == end else mask & (row != pad))
    return masks if any(mask.any() for mask in masks) else None


def _answer_stop(row: torch.Tensor, start: int, end: int | None) -> int:
    """Return the index after the first end token from `start` on, or after the last token if there is none."""
    ends = [] if end is None else (row[start:] == end).nonzero().flatten().tolist()
    return start + ends[0] + 1 if ends else len(row)


def _attended(inputs: BatchFeature, row: int) -> torch.Tensor:
    """Return which tokens of a row are attended (T,)."""
    if "attention_mask" in inputs:
        return torch.as_tensor(inputs["attention_mask"][row]) == 1
    return torch.ones(len(inputs["input_ids"][row]), dtype=torch.bool)


def _is_start(tokenized: str, whole: str) -> bool:
    return whole.startswith(_MARKERS.sub("", tokenized))


def _token_at(
    tokenizer: "PreTrainedTokenizerBase", tokenized: TokenizedText, character: int, ids: list[int], image_token_id: int
) -> int:
    """Return the index of a row's first token that extends beyond a character of its text without markers."""
    text = tokenized.text
    characters = [index for index, letter in enumerate(text) if not _MARKERS.match(letter)]
    if character >= len(characters):
        return len(ids)
    before = PLACEHOLDER.sub(IMAGE_TOKEN * ids.count(image_token_id), text[: characters[character]])
    options = {"sanitize_control_tokens": True} if _MARKERS.search(text) else {}
    prefix = tokenizer(before, add_special_tokens=tokenized.add_special_tokens, **options)["input_ids"]
    differs = (index for index, pair in enumerate(zip(prefix, ids, strict=False)) if pair[0] != pair[1])
    return next(differs, min(len(prefix), len(ids)))


def _occurrences(ids: list[int], part: list[int]) -> list[int]:
    """Return the indices at which `part` begins within `ids`."""
    return [start for start in range(len(ids)) if part and ids[start : start + len(part)] == part]
