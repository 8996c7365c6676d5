"""Whether the model looks at the volume: the loss with other patients' volumes, and where the fusion's weights lie."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from samf.model.outputs_samf import SamfSliceAttentions

logger = logging.getLogger(__name__)

# The softmax weights of each fusion that say which slices, or which words, it attends to.
WEIGHTS = {"samf": ("alpha",), "ao2d": ("alpha", "gamma"), "slice_tokens": ("slice_text",)}
OWN_LOSS, SHUFFLED_LOSS, GAP = "eval_own_loss", "eval_shuffled_loss", "eval_gap"


def measure_gap(metrics: Mapping[str, float]) -> dict[str, float]:
    """By how much other patients' volumes raise the loss, where both losses were measured."""
    if OWN_LOSS not in metrics or SHUFFLED_LOSS not in metrics:
        return {}
    return {GAP: metrics[SHUFFLED_LOSS] - metrics[OWN_LOSS]}


def warn_if_not_grounded(history: Sequence[Mapping[str, Any]], share: float, evaluations: int) -> bool:
    """Warn when the last so many gaps of a log are all below `share` of the last loss; returns whether it did."""
    gaps = [row[GAP] for row in history if GAP in row][-evaluations:]
    losses = [row[OWN_LOSS] for row in history if OWN_LOSS in row]
    blind = len(gaps) == evaluations and bool(losses) and max(gaps) < share * losses[-1]
    if blind:
        logger.warning(
            "The loss with other patients' volumes is the loss with the right ones (last %d gaps: %s, loss %.4g): the model "
            "doesn't look at the volumes. A falling loss alone doesn't show that it does. Pretrain or warm up what comes "
            "before the language model, or train longer.",
            evaluations,
            ", ".join(f"{gap:+.4g}" for gap in gaps),
            losses[-1],
        )
    return blind


def relative_entropy(weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Entropy of weights (…, K) as a share of that of equal weights: 1 = all alike, 0 = one has all. `kept` (…) counts them.

    One key alone has no other choice: it counts as 1.
    """
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(dim=-1)
    largest = kept.clamp(min=2).to(entropy.dtype).log()
    return torch.where(kept > 1, entropy / largest, torch.ones_like(entropy))


class SliceWeights:
    """Means over volumes of the fusion's softmax weights: relative entropy, and the largest weight.

    `alpha` and `gamma` lie over slices; `gamma` is averaged over the prompt's tokens. `slice_tokens` has neither, but
    `slice_text` over the prompt's tokens, averaged over slices.
    """

    def __init__(self, fusion_type: str) -> None:
        self.names = WEIGHTS[fusion_type]
        self.sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, attentions: SamfSliceAttentions, inputs: Mapping[str, torch.Tensor]) -> None:
        """Count a batch: what the model gave for `inputs`, which hold `prompt_mask` (B, T) and maybe `slice_mask` (B, S)."""
        some = next(weights for weights in attentions.to_tuple() if weights is not None)
        text = inputs["prompt_mask"].bool()  # (B, T)
        shape = (some.shape[0], some.shape[1] if attentions.slice_text is not None else attentions.alpha.shape[-1])
        slices = inputs.get("slice_mask")
        slices = torch.ones(shape, dtype=torch.bool, device=some.device) if slices is None else slices.bool()  # (B, S)
        seen = slices.any(dim=1, keepdim=True)  # (B, 1), a volume is there
        rows_and_keys = {"alpha": (seen, slices), "gamma": (text & seen, slices), "slice_text": (slices, text)}
        for name in self.names:
            self._add(name, getattr(attentions, name).float(), *rows_and_keys[name])

    def _add(self, name: str, weights: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> None:
        """weights (B, R, K) over keys (B, K), for the rows (B, R) that count."""
        kept = keys.sum(dim=1, keepdim=True).expand(weights.shape[:2])
        count = rows.sum(dim=1).clamp(min=1)
        means = [
            (values.masked_fill(~rows, 0).sum(dim=1) / count).sum()
            for values in (relative_entropy(weights, kept), weights.amax(dim=-1))
        ]
        sums = torch.stack([*means, rows.any(dim=1).sum().to(weights.dtype)])
        self.sums[name] = self.sums.get(name, 0) + sums

    def report(self, device: torch.device, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """`{name}_entropy` and `{name}_largest` over all processes, and forget what was counted."""
        report = {}
        for name in self.names:  # the same ones on every process, whatever it has seen
            entropy, largest, count = reduce(self.sums.get(name, torch.zeros(3, device=device))).tolist()
            if count:
                report |= {f"{name}_entropy": entropy / count, f"{name}_largest": largest / count}
        self.sums = {}
        return report
