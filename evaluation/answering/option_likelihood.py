"""Multiple choice without parsing: the option that the model itself finds most likely.

Each option is written as the answer that training uses, "(b) text of option b" and the end token, after the same prompt.
The prompt's mask is passed to the model explicitly, so that the fused vector is that of the prompt and the same for all
options.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from samf.data.prompts import LETTERS
from samf.data.schema import IGNORE_INDEX, Record
from samf.model.modeling_samf import SamfForConditionalGeneration

__all__ = ["OptionCollator", "answer_log_likelihoods", "option_rows", "option_texts"]

# Records → right-padded tensors with `labels` and `prompt_mask`.
_TrainingCollator: TypeAlias = Callable[[Sequence[Record]], Mapping[str, torch.Tensor]]


def option_texts(record: Record) -> list[str]:
    """Return the possible answers to a multiple-choice record.

    Raises:
        ValueError: fewer than two options, or more than there are letters.
    """
    choices = record.get("choices") or []
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(
            f"Record {record.get('id')!r} has {len(choices)} choices; the likelihood of options needs 2 to {len(LETTERS)}."
        )
    return [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]


def option_rows(records: Sequence[Record]) -> list[Record]:
    """Return each record once per option, with that option as its answer."""
    return [{**record, "answer": text, "finding_labels": []} for record in records for text in option_texts(record)]


class OptionCollator:
    """Records → batches of at most `rows` option rows, in the order of `option_rows`.

    Args:
        collator: makes training batches: right-padded, with `labels` on the answer, and `prompt_mask`.
        rows: as many as fit the model at once.
    """

    def __init__(self, collator: _TrainingCollator, rows: int):
        self.collator = collator
        self.rows = rows

    def __call__(self, records: Sequence[Record]) -> list[Mapping[str, torch.Tensor]]:
        """Return the training batches of all options of the records."""
        rows = option_rows(records)
        return [self.collator(rows[start : start + self.rows]) for start in range(0, len(rows), self.rows)]


@torch.no_grad()
def answer_log_likelihoods(
    model: SamfForConditionalGeneration, batch: Mapping[str, torch.Tensor]
) -> list[tuple[float, int]]:
    """Return log p(answer | volume, prompt) of each row of a training batch, and the number of the answer's tokens.

    Args:
        model: a SAMF model.
        batch: `input_ids` and `labels` (B, T), the volumes' tensors, and `prompt_mask` (B, T), without which the fusion
            would read the answer.

    Raises:
        ValueError: no `prompt_mask`.
    """
    if batch.get("prompt_mask") is None:
        raise ValueError("The batch has no prompt_mask; without it the image tokens would depend on the answer.")
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "finding_targets")}
    columns = (labels != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]  # (A,), where an answer of the batch has a token
    logits = model(**inputs, logits_to_keep=columns - 1, use_cache=False).logits  # (B, A, vocabulary)
    tokens = labels[:, columns]  # (B, A)
    counted = tokens != IGNORE_INDEX
    log_probs = logits.float().log_softmax(dim=-1).gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)  # (B, A)
    sums = (log_probs * counted).sum(dim=1)
    return list(zip(sums.tolist(), counted.sum(dim=1).tolist(), strict=True))
