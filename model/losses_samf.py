"""Which hidden states the text's loss needs; the findings' loss, and how it adds to the text's over micro-batches."""

import torch
from torch.nn import functional as F
from transformers.utils import logging

from .constants_samf import IGNORE_INDEX
from .inputs_samf import StepInputs

logger = logging.get_logger(__name__)

# Totals over a whole optimizer step that Trainer passes to forward; only the loss reads them.
LOSS_COUNTS = ("num_items_in_batch", "num_findings_in_batch")


def predicting_states(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states that predict a label, (1, N, D), and these N labels, (1, N).

    Args:
        hidden: of the last layer, (B, T, D).
        labels: (B, T), -100 = no loss; token t is predicted from the hidden state of token t - 1.
    """
    targets = labels[:, 1:].to(hidden.device)
    kept = targets != IGNORE_INDEX
    return hidden[:, :-1][kept].unsqueeze(0), targets[kept].unsqueeze(0)


def finding_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the binary cross-entropy of the findings.

    A row's loss is the sum over its known findings divided by L. Dividing by L and not by the number of known findings
    makes the losses of micro-batches add up to that of the whole batch.

    Args:
        logits: (B, L).
        targets: (B, L), 0, 1, or -100 for unknown, which adds nothing.
        weights: (B,), one for each row; the result is then their weighted sum. None = the mean over rows.
    """
    known = targets != IGNORE_INDEX
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.clamp(min=0).float(), reduction="none")
    rows = (losses * known).mean(dim=1)  # (B,)
    return rows.mean() if weights is None else (rows * weights).sum()


def finding_weights(
    targets: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    num_findings: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Return the weight of each row's findings in a loss that also has a text.

    Trainer sums the losses of accumulated micro-batches and passes the totals of the whole step. Rows are weighted by
    counts that add up over micro-batches, so that the split of a step into micro-batches doesn't change its loss.

    Args:
        targets: (B, L), -100 = unknown.
        labels: (B, T), -100 = no loss; read only without `num_findings`.
        num_items: label tokens of the whole step, all that a plain Trainer counts. A row's weight is its share of them.
        num_findings: rows of the whole step that have known findings (train.py passes it); these weigh equally.

    Returns:
        (B,) on the device of `targets`.
    """
    total: torch.Tensor | int
    if num_findings is not None:
        items, total = (targets != IGNORE_INDEX).any(dim=1), num_findings  # (B,)
    else:
        items = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)  # (B,); the first token has no loss
        total = items.sum() if num_items is None else num_items
    return items.to(targets.device) / torch.as_tensor(total, device=targets.device)


def take_finding_targets(targets: torch.Tensor | None, others: StepInputs) -> torch.Tensor | None:
    """Return `finding_targets`, also if it was passed under its old name.

    Args:
        targets: what `forward` got as `finding_targets`.
        others: its further keyword arguments; the old name is removed from them.

    Raises:
        ValueError: both names were passed.
    """
    old = others.pop("finding_labels", None)
    if old is None:
        return targets
    if targets is not None:
        raise ValueError("finding_labels is the old name of finding_targets; pass one of them.")
    logger.warning_once("finding_labels is now called finding_targets; the old name will be removed.")
    return old
