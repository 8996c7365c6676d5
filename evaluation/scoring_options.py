"""Options of scoring: the one list that eval.py, samf.evaluation.scoring and the scoreboard read."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from samf.data.ct_rate.tables import CT_RATE_LABELS
from samf.evaluation.metrics.bertscore import check_bertscore
from samf.evaluation.metrics.bootstrap import RESAMPLES
from samf.evaluation.metrics.clinical_metrics import Labeller, make_labeller
from samf.evaluation.metrics.radeval_metrics import check_radeval
from samf.evaluation.metrics.subgroups import read_subgroups
from samf.evaluation.schema import ScoringSettings

__all__ = ["ScoringArguments", "ScoringOptions", "choose_options", "scoring_parser"]


@dataclass(kw_only=True)
class ScoringArguments:
    """Options of scoring that every command line has.

    Attributes:
        finding_names: the labels of CT-RATE's 18 that count in the finding scores; None = all.
        labeller: "rules", "radbert", or a path or Hub id of RadBertClassifier.pth.
        bertscore_model, bertscore_layers: model and layer of BERTScore, see `text_metrics.bertscore`; None = no BERTScore.
        radeval: metrics of the library RadEval for reports: radgraph, ratescore, green.
        resamples: 0 = no intervals. Intervals are computed, not drawn: any other number gives the same ones.
        metadata: CT-RATE's metadata CSV, for a table of subgroups.
    """

    finding_names: list[str] | None = field(default=None, metadata={"help": "findings scored; default: CT-RATE's 18"})
    labeller: str = field(
        default="rules", metadata={"help": "rules, radbert, or a path or Hub id of RadBertClassifier.pth"}
    )
    bertscore_model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model for BERTScore, e.g. roberta-large"}
    )
    bertscore_layers: int | None = field(
        default=None, metadata={"help": "layer of it that is compared, where bert-score does not know it"}
    )
    radeval: list[str] = field(
        default_factory=list, metadata={"help": "metrics of the library RadEval: radgraph, ratescore, green"}
    )
    resamples: int = field(default=RESAMPLES, metadata={"help": "0: no intervals"})
    metadata: str | None = field(
        default=None, metadata={"help": "CT-RATE's metadata CSV: scores by sex, age, scanner and kernel"}
    )


@dataclass(kw_only=True)
class ScoringOptions(ScoringArguments):
    """All options of scoring, as `score_predictions` takes them.

    Attributes:
        device: of BERTScore's model and of RadBERT, e.g. "cuda".
        seed: of the shuffled baseline, and of the test of two systems.
        baselines: also score systems that read no image, and look for template collapse.
    """

    device: str | None = field(default=None, metadata={"help": "for BERTScore and RadBERT, e.g. cuda"})
    seed: int = field(default=0, metadata={"help": "of the shuffled baseline and of the test of two systems"})
    baselines: bool = field(
        default=True, metadata={"help": "baselines that read no image; --no_baselines leaves them out"}
    )

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> "ScoringOptions":
        """Return the options among the arguments of a parser made with `scoring_parser`."""
        return cls(**{option.name: getattr(namespace, option.name) for option in fields(cls)})

    @property
    def findings(self) -> tuple[str, ...]:
        """Return the names of the findings that count."""
        return CT_RATE_LABELS if self.finding_names is None else tuple(self.finding_names)

    def check(self) -> None:
        """Check all that can be checked without predictions and without loading a model.

        Raises:
            ValueError: an unknown finding, metric or layer, or a negative number of resamples.
            FileNotFoundError: no such metadata file.
            ImportError: BERTScore is asked for and bert-score is not installed.
        """
        unknown = sorted(set(self.findings) - set(CT_RATE_LABELS))
        if unknown or not self.findings:
            raise ValueError(f"Unknown findings {unknown}; the labeller knows {', '.join(CT_RATE_LABELS)}.")
        if self.resamples < 0:
            raise ValueError(f"resamples is {self.resamples}; expected 0 (no intervals) or more.")
        check_radeval(self.radeval)
        if self.bertscore_model is not None:
            check_bertscore(self.bertscore_model, self.bertscore_layers)
        if self.metadata is not None:
            read_subgroups(self.metadata, [])

    def check_models(self) -> None:
        """Load the labeller and the configuration of BERTScore's model.

        Raises:
            ValueError, OSError, ImportError: one of them can't be loaded.
        """
        self.build_labeller()
        if self.bertscore_model is not None:
            from transformers import AutoConfig

            AutoConfig.from_pretrained(self.bertscore_model)

    def build_labeller(self) -> Labeller:
        """Return the labeller of reports; loads its weights if it has any."""
        return make_labeller(self.labeller, device=self.device)

    def as_settings(self) -> ScoringSettings:
        """Return what scores depend on in addition to the predictions, for results.json."""
        return {
            "finding_names": list(self.findings),
            "labeller": self.labeller,
            "bertscore_model": self.bertscore_model,
            "bertscore_layers": self.bertscore_layers,
            "radeval": list(self.radeval),
            "seed": self.seed,
            "baselines": self.baselines,
            "metadata": None if self.metadata is None else Path(self.metadata).name,
        }


def scoring_parser() -> argparse.ArgumentParser:
    """Return a parser of `ScoringOptions`, for the `parents` of a command line's own parser."""
    from transformers import HfArgumentParser  # the API needs no parser

    return HfArgumentParser(ScoringOptions, add_help=False)  # type: ignore[arg-type]  # any dataclass is right


def choose_options(options: ScoringOptions | None, changes: Mapping[str, Any]) -> ScoringOptions:
    """Return the options, or the defaults, with the fields that `changes` names replaced."""
    return replace(options or ScoringOptions(), **changes)
