"""Image grounding, the use that a model makes of the volume: its loss with other patients' volumes, its fusion's weights."""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from samf.model.outputs_samf import SamfSliceAttentions

logger = logging.getLogger(__name__)

# The softmax weights of each fusion over slices or, for slice_tokens, over the prompt's tokens.
_WEIGHTS = {"samf": ("alpha",), "ao2d": ("alpha", "gamma"), "slice_tokens": ("slice_text",)}
_OWN_LOSS, _SHUFFLED_LOSS, _GAP = "eval_own_loss", "eval_shuffled_loss", "eval_gap"


def measure_gap(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return by how much other patients' volumes raise the loss; {} where one of the losses wasn't measured."""
    if _OWN_LOSS not in metrics or _SHUFFLED_LOSS not in metrics:
        return {}
    return {_GAP: metrics[_SHUFFLED_LOSS] - metrics[_OWN_LOSS]}


def warn_if_not_grounded(history: Sequence[Mapping[str, float]], share: float, evaluations: int) -> bool:
    """Warn when the last gaps of a log are all below a share of the last loss.

    Args:
        history: Trainer's log.
        share: Of the last validation loss with own volumes.
        evaluations: Number of gaps that must be below it.

    Returns:
        Whether it warned.
    """
    gaps = [row[_GAP] for row in history if _GAP in row][-evaluations:]
    losses = [row[_OWN_LOSS] for row in history if _OWN_LOSS in row]
    blind = len(gaps) == evaluations and bool(losses) and max(gaps) < share * losses[-1]
    if blind:
        logger.warning(
            "Other patients' volumes don't raise the loss (last %d gaps: %s, loss %.4g): the model doesn't look at the "
            "volumes, which a falling loss doesn't show. Pretrain the slice encoder, warm up the aggregator, or train longer.",
            evaluations,
            ", ".join(f"{gap:+.4g}" for gap in gaps),
            losses[-1],
        )
    return blind


def relative_entropy(weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the entropy of weights (…, K) relative to that of equal weights: 1 = all equal, 0 = one has all.

    Args:
        weights: Softmax weights (…, K); 0 for masked keys.
        kept: Number of keys (…) that aren't masked. With a single key the relative entropy is 1.
    """
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(dim=-1)
    largest = kept.clamp(min=2).to(entropy.dtype).log()
    return torch.where(kept > 1, entropy / largest, torch.ones_like(entropy))


class SliceWeights:
    """Averages two statistics of the fusion's softmax weights over volumes: relative entropy, and the largest weight.

    `alpha` and `gamma` are weights over slices; `gamma` is averaged over the prompt's tokens. `slice_tokens` has neither,
    but `slice_text`, weights over the prompt's tokens that are averaged over slices.

    Args:
        fusion_type: Of the model.
    """

    def __init__(self, fusion_type: str) -> None:
        self.names = _WEIGHTS[fusion_type]
        self.sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, attentions: SamfSliceAttentions, inputs: Mapping[str, torch.Tensor]) -> None:
        """Add a batch.

        Args:
            attentions: The model's weights for `inputs`.
            inputs: Have `prompt_mask` (B, T) and may have `slice_mask` (B, S).
        """
        some = next(weights for weights in attentions.to_tuple() if weights is not None)
        text = inputs["prompt_mask"].bool()  # (B, T)
        shape = (some.shape[0], some.shape[1] if attentions.slice_text is not None else attentions.alpha.shape[-1])
        slices = inputs.get("slice_mask")
        slices = torch.ones(shape, dtype=torch.bool, device=some.device) if slices is None else slices.bool()  # (B, S)
        seen = slices.any(dim=1, keepdim=True)  # (B, 1), whether there is a volume
        rows_and_keys = {"alpha": (seen, slices), "gamma": (text & seen, slices), "slice_text": (slices, text)}
        for name in self.names:
            self._add(name, getattr(attentions, name).float(), *rows_and_keys[name])

    def _add(self, name: str, weights: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> None:
        """Add weights (B, R, K) over the keys (B, K) that aren't masked, for the rows (B, R) that count."""
        kept = keys.sum(dim=1, keepdim=True).expand(weights.shape[:2])
        count = rows.sum(dim=1).clamp(min=1)
        means = [
            (values.masked_fill(~rows, 0).sum(dim=1) / count).sum()
            for values in (relative_entropy(weights, kept), weights.amax(dim=-1))
        ]
        sums = torch.stack([*means, rows.any(dim=1).sum().to(weights.dtype)])
        self.sums[name] = self.sums.get(name, 0) + sums

    def report(self, device: torch.device, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the means `{name}_entropy` and `{name}_largest` over all processes, and start again.

        Args:
            device: For the sums of a process that has added nothing.
            reduce: Sums a tensor over the processes.
        """
        report: dict[str, float] = {}
        for name in self.names:  # the same names on every process, for the collective call
            entropy, largest, count = reduce(self.sums.get(name, torch.zeros(3, device=device))).tolist()
            if count:
                report |= {f"{name}_entropy": entropy / count, f"{name}_largest": largest / count}
        self.sums = {}
        return report
