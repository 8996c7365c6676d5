"""From logits of findings to probabilities: the only place where the configuration's calibration is applied."""

from collections.abc import Sequence

import torch

from .configuration_samf import SamfConfig


def finding_probabilities(logits: torch.Tensor, config: SamfConfig) -> torch.Tensor:
    """Return the probability of each finding, calibrated if the configuration has a temperature or a bias.

    Args:
        logits: (…, L), of the findings head, or log-likelihood ratios of statements; in the order of
            `config.scored_findings`.
        config: of the model.

    Returns:
        (…, L) in float32.
    """
    return scaled_logits(logits.float(), config.finding_temperature, config.finding_bias).sigmoid()


def scaled_logits(
    logits: torch.Tensor,
    temperature: Sequence[float] | torch.Tensor | None,
    bias: Sequence[float] | torch.Tensor | None,
) -> torch.Tensor:
    """Return logit / temperature + bias; temperatures are positive, so the order of patients by a finding stays.

    Args:
        logits: (…, L).
        temperature: one for each finding, (L,); None = 1.
        bias: one for each finding, (L,); None = 0.
    """
    if temperature is not None:
        logits = logits / torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    if bias is not None:
        logits = logits + torch.as_tensor(bias, dtype=logits.dtype, device=logits.device)
    return logits
