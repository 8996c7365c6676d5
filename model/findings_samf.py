"""The findings of a scan as the report pipeline gives them: by the findings head, or by the likelihood of statements."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .calibration_samf import finding_probabilities
from .report_samf import REPORT_QUESTION
from .statements_samf import Statements, statement_ratios


class FindingsMixin:
    """The report pipeline's methods about findings."""

    model: Any
    processor: Any

    if TYPE_CHECKING:
        device: torch.device

        def encode(self, scan: Any) -> Any:
            """Return the scan after the slice encoder."""

    def finding_logits(self, features: Mapping[str, np.ndarray], logits: torch.Tensor | None = None) -> list[float]:
        """Return the unscaled logit of each of `config.scored_findings` for one encoded scan.

        Args:
            features: as in [`EncodedScan`].
            logits: of the findings head (1, L), if they are known.
        """
        config = self.model.config
        if not config.finding_names:
            by_statements = config.finding_statements
            return list(self._ratios(features, REPORT_QUESTION, by_statements)) if by_statements else []
        if logits is None:
            tensors = {name: torch.tensor(value)[None].to(self.device) for name, value in features.items()}
            with torch.inference_mode():
                logits = self.model(**tensors).finding_logits
        return logits[0].float().tolist()

    def finding_probabilities(self, logits: Sequence[float]) -> dict[str, float]:
        """Return the calibrated probability of each finding by the logits of `finding_logits`; empty without any."""
        if not logits:
            return {}
        values = finding_probabilities(torch.tensor(logits), self.model.config).tolist()
        return dict(zip(self.model.config.scored_findings, values, strict=True))

    def finding_likelihoods(
        self,
        scan: Any,
        statements: Statements,
        question: str = REPORT_QUESTION,
        after: Mapping[str, str] | None = None,
    ) -> dict[str, float]:
        """Return how likely the language model is to say that each finding is present, rather than absent.

        The probability is that of the statements of presence among both kinds, not calibrated. Statements should be
        sentences, or their beginnings, as the reports of training have them.

        Args:
            scan: as in `__call__`.
            statements: by finding, what a report says when it is present and when it is absent:
                `{"Lung nodule": ["There is a nodule", ["No nodule", "There is no nodule"]]}`.
            question: the prompt that the statements answer.
            after: by finding, what the answer says before the statement; by default nothing.

        Raises:
            CTReadError: the scan can't be read.
        """
        ratios = self._ratios(self.encode(scan).features, question, statements, after)
        return dict(zip(statements, torch.tensor(ratios).sigmoid().tolist(), strict=True))

    def _ratios(self, features: Mapping[str, np.ndarray], *statements: Any) -> list[float]:
        return statement_ratios(self.model, self.processor, features, *statements)
