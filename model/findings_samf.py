"""The findings of a scan as the report pipeline gives them: by the findings head, or by the likelihood of statements."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .agreement_samf import said_of_findings
from .calibration_samf import finding_probabilities
from .report_samf import REPORT_QUESTION, split_sentences
from .statements_samf import Statements, statement_ratios


class FindingsMixin:
    """The report pipeline's methods about findings."""

    model: Any
    processor: Any

    if TYPE_CHECKING:
        device: torch.device

        def encode(self, scan: Any) -> Any:
            """Return the scan after the slice encoder."""

        def answer(self, jobs: Any, **generate_kwargs: Any) -> Any:
            """Return one report for each pair of an encoded scan and a question."""

    def finding_logits(self, scan: Any, logits: torch.Tensor | None = None) -> list[float]:
        """Return the unscaled logit of each of `config.scored_findings` for one scan; empty without a head or statements.

        Args:
            scan: an `EncodedScan`; without a findings head its report is written first, greedily.
            logits: of the findings head (1, L), if they are known.
        """
        config = self.model.config
        if not config.scored_findings:
            return []
        if not config.finding_names:
            return self._ratios_in(scan, self._greedy(scan, REPORT_QUESTION))
        if logits is None:
            tensors = {name: torch.tensor(value)[None].to(self.device) for name, value in scan.features.items()}
            with torch.inference_mode():
                logits = self.model(**tensors).finding_logits
        return logits[0].float().tolist()

    def finding_probabilities(self, logits: Sequence[float]) -> dict[str, float]:
        """Return the calibrated probability of each finding by the logits of `finding_logits`; empty without any."""
        if not logits:
            return {}
        values = finding_probabilities(torch.tensor(logits), self.model.config).tolist()
        return dict(zip(self.model.config.scored_findings, values, strict=True))

    def findings_of(self, scan: Any, question: str, text: str) -> Mapping[str, float]:
        """Return the probabilities of a report's findings: the head's, or those of statements in the places of its sentences.

        Args:
            scan: an `EncodedScan`.
            question: what was asked; without a head, only reports have findings.
            text: what the model wrote.
        """
        config = self.model.config
        if config.finding_names or not config.finding_statements or question != REPORT_QUESTION:
            return scan.findings
        return self.finding_probabilities(self._ratios_in(scan, text))

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
            after: by finding, what the answer says before the statement; a finding that it lacks stands at the beginning.
                None = the model's own answer, written first, greedily, up to the sentence that mentions the finding.

        Raises:
            CTReadError: the scan can't be read.
        """
        encoded = self.encode(scan)
        if after is None:
            after = text_before_findings(self._greedy(encoded, question), statements)
        ratios = statement_ratios(self.model, self.processor, encoded.features, question, statements, after)
        return dict(zip(statements, torch.tensor(ratios).sigmoid().tolist(), strict=True))

    def _greedy(self, scan: Any, question: str) -> str:
        return str(self.answer([(scan, question)], do_sample=False, num_beams=1)[0].text)

    def _ratios_in(self, scan: Any, text: str) -> list[float]:
        """Return the configuration's statements' ratios (L,), each in the place of a report where it says the same."""
        statements = self.model.config.finding_statements
        after = text_before_findings(text, statements)
        return statement_ratios(self.model, self.processor, scan.features, REPORT_QUESTION, statements, after)


def text_before_findings(text: str, names: Iterable[str]) -> dict[str, str]:
    """Return for each finding a report up to the first sentence that mentions it; the whole report where none does.

    Args:
        text: the report.
        names: of the findings; the labeller reads those of CT-RATE's 18.
    """
    spans, places = split_sentences(text), dict[str, int]()
    for (start, _), said in zip(spans, said_of_findings(text, spans), strict=True):
        for name in said:
            places.setdefault(name, start)
    return {name: text[: places.get(name, len(text))].strip() for name in names}
