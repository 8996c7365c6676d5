"""The probability of a finding by the language model itself: how likely it is to write that it is present, or absent.

For a model without a findings head. After the prompt, log p("A nodule is seen.") - log p("No nodule is seen.") is a logit of
the finding. The slice encoder and the prompt run once for all statements of a scan: their keys and values are shared.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from .inputs_samf import ModelInputs
from .language_model_samf import CACHE_NAMES, rope_sets

# By finding: what a report says when it is present, and when it is absent; a sentence, its beginning, or several of either.
Statements: TypeAlias = Mapping[str, Sequence[str | Sequence[str]]]
BATCH_SIZE = 8  # statements that are scored together; each has a copy of the prompt's keys and values


def statement_ratios(
    model: Any,
    processor: Any,
    volume: Mapping[str, Any],
    question: str,
    statements: Statements,
    after: Mapping[str, str] | None = None,
) -> list[float]:
    """Return log p(present) - log p(absent) of each finding for one scan.

    Of several sentences that say the same, the probabilities are added. The end of the answer isn't scored: each statement
    is read as its beginning, so that "There is a nodule" stands for every sentence that begins so.

    Args:
        model: a SAMF model.
        processor: its processor.
        volume: `slice_embeddings` (S, D), `slice_planes` and `slice_positions` (S,).
        question: the prompt's text.
        statements: see `Statements`.
        after: by finding, what the answer says before the statement; by default nothing.
    """
    sides = [
        [f"{before} {text}" if (before := (after or {}).get(name, "").strip()) else text for text in _as_list(side)]
        for name, pair in statements.items()
        for side in pair
    ]
    prompt, rows = _encode(processor, volume, question, [text for side in sides for text in side])
    prompt = {name: value.to(model.device) for name, value in prompt.items()}
    sums = iter(log_likelihoods(model, prompt, rows))
    totals = [torch.logsumexp(torch.tensor([next(sums) for _ in side], dtype=torch.float64), 0) for side in sides]
    return [float(present - absent) for present, absent in zip(totals[::2], totals[1::2], strict=True)]


def _as_list(side: str | Sequence[str]) -> list[str]:
    return [side] if isinstance(side, str) else list(side)


def _encode(
    processor: Any, volume: Mapping[str, Any], question: str, answers: Sequence[str]
) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Return the model's inputs for the prompt, of one row, and the tokens of each answer as training would cut them.

    Raises:
        ValueError: the chat template doesn't mark answers, or joins them with the prompt.
    """
    asked = {
        "role": "user",
        "content": [{"type": "volume", "volume": dict(volume)}, {"type": "text", "text": question}],
    }
    encoded = processor.apply_chat_template(
        [[asked, {"role": "assistant", "content": answer}] for answer in answers],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": False},
    )
    marks = [row.index(1) if 1 in row else 0 for row in encoded["assistant_masks"]]
    length = marks[0]
    ids = encoded["input_ids"]
    if length == 0 or any(
        mark != length or row[:length] != ids[0][:length] for mark, row in zip(marks, ids, strict=True)
    ):
        raise ValueError(
            "The chat template doesn't mark where an answer begins, which the likelihood of statements needs."
        )
    ends = [max(place for place, mark in enumerate(row) if mark) for row in encoded["assistant_masks"]]
    prompt = {
        "input_ids": torch.tensor([ids[0][:length]]),
        "attention_mask": torch.ones(1, length, dtype=torch.long),
        "prompt_mask": torch.tensor([list(encoded["prompt_mask"][0])[:length]]),
    }
    names = ("slice_embeddings", "slice_mask", "slice_planes", "slice_positions")
    return prompt | {name: torch.as_tensor(encoded[name])[:1] for name in names}, [
        row[length:end]
        for row, end in zip(ids, ends, strict=True)  # without the token that ends the answer
    ]


@torch.inference_mode()
def log_likelihoods(
    model: Any, prompt: ModelInputs, rows: Sequence[Sequence[int]], batch_size: int = BATCH_SIZE
) -> list[float]:
    """Return log p(tokens | prompt) of each row of tokens.

    The prompt is read once. Where its keys can't be reused (a recurrent language model, or rotary embeddings that change at
    this length), each row is read with the prompt.

    Args:
        model: a SAMF model.
        prompt: its inputs for one prompt (1, P) and its volume.
        rows: token ids that follow the prompt; each has at least one.
        batch_size: rows that are read together.
    """
    length, config = prompt["input_ids"].shape[1], model.config.text_config
    longest = length + max(map(len, rows))
    if getattr(model, "_is_stateful", False) or rope_sets(config, longest) != rope_sets(config, length):
        return [_whole(model, prompt, row) for row in rows]
    first = model(**prompt, use_cache=True, logits_to_keep=1)
    name = next(name for name in CACHE_NAMES if getattr(first, name, None) is not None)
    start = first.logits[0, -1].float().log_softmax(-1)  # (V,)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # equal lengths together: less padding
    sums = [0.0] * len(rows)
    for begin in range(0, len(rows), batch_size):
        chosen = order[begin : begin + batch_size]
        cache = copy.deepcopy(getattr(first, name))
        cache.batch_repeat_interleave(len(chosen))
        values = _continue(model, {name: cache}, length, [rows[index] for index in chosen])
        for index, value in zip(chosen, values, strict=True):
            sums[index] = float(start[rows[index][0]]) + value
    return sums


def _continue(model: Any, cache: ModelInputs, length: int, rows: Sequence[Sequence[int]]) -> list[float]:
    """Return the log-probability of each row's tokens from the second on, given the prompt and the first.

    Args:
        model: a SAMF model.
        cache: the prompt's keys and values for each row, by their argument's name.
        length: tokens of the prompt.
        rows: token ids.
    """
    widest = max(map(len, rows))
    if widest == 1:
        return [0.0] * len(rows)
    ids = torch.tensor([[*row, *[row[-1]] * (widest - len(row))] for row in rows], device=model.device)  # (N, T)
    counted = torch.tensor([[place < len(row) for place in range(widest)] for row in rows], device=model.device)
    before = torch.ones(len(rows), length, dtype=torch.long, device=model.device)
    mask = torch.cat([before, counted.long()], dim=1)  # (N, P + T)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=True, **cache).logits[:, :-1]  # (N, T - 1, V)
    values = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (N, T - 1)
    return (values * counted[:, 1:]).sum(dim=1).tolist()


def _whole(model: Any, prompt: ModelInputs, row: Sequence[int]) -> float:
    """Return the log-probability of tokens that are read together with the prompt."""
    tokens = torch.tensor([row], device=model.device)
    ids = torch.cat([prompt["input_ids"], tokens], dim=1)
    mask = torch.ones_like(ids)
    logits = model(
        **{**prompt, "input_ids": ids, "attention_mask": mask}, use_cache=False, logits_to_keep=len(row) + 1
    ).logits[0, :-1]  # (T, V)
    return float(logits.float().log_softmax(-1).gather(-1, tokens[0, :, None]).sum())
