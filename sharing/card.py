"""The card of a repository: the folder's own, with what the run recorded; a card that a person changed stays as it is.

A generated card gets sections on training and evaluation, figures, and metadata. Of a person's card not a byte changes,
except that metadata which it lacks is added at the end of its metadata block.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCard

from samf.evaluation.markdown import markdown_table
from samf.model.model_card import MARK, is_generated, marked_card, public_name, with_repository
from samf.sharing.errors import ShareError
from samf.sharing.facts import Evaluation, RunFacts

_BLOCK = re.compile(r"\A---\r?\n(.*?)(\r?\n)?---\r?\n", re.DOTALL)
_MERGED_KEYS = ("library_name", "pipeline_tag", "base_model", "base_model_relation", "model-index")
_NOT_KNOWN = {"Data": "The training data are not recorded here.", "Metrics": "No metrics are recorded here."}
_TITLES = {"adapter": "Adapter of SAMF", "quantized": "SAMF, quantised", "merge": "SAMF, with its adapter merged"}


@dataclass(frozen=True)
class Relation:
    """How a model relates to others on the Hub, by the Hub's own terms.

    Attributes:
        kind: "adapter", "merge" or "quantized"; None = no relation is known.
        bases: Hub ids of the models that it was made from.
        revisions: the commits of those, where they are known.
        quantization: how weights are rounded, in words.
    """

    kind: str | None = None
    bases: Sequence[str] = ()
    revisions: Mapping[str, str] = field(default_factory=dict)
    quantization: str | None = None

    def metadata(self) -> dict[str, Any]:
        """Return the entries of a card's metadata."""
        if not self.bases or self.kind is None:
            return {}
        bases = list(self.bases) if len(self.bases) > 1 else self.bases[0]
        return {"base_model": bases, "base_model_relation": self.kind}

    def rows(self) -> dict[str, str]:
        """Return rows of the card's table."""
        names = [
            f"`{base}`" + (f" at `{self.revisions[base][:12]}`" if base in self.revisions else "")
            for base in self.bases
        ]
        rows = {"Made from": " and ".join(names)} if names else {}
        return rows | ({"Weights": self.quantization} if self.quantization else {})


def complete_card(card: str, repository: str, facts: RunFacts, figures: Mapping[str, str], relation: Relation) -> str:
    """Return a generated card with everything that its run recorded; of a person's card only the metadata is completed.

    Args:
        card: the text of README.md.
        repository: the Hub id.
        facts: what the run recorded.
        figures: path in the repository → what it shows.
        relation: to other models on the Hub.

    Raises:
        ShareError: a person's card has metadata that can't be read.
    """
    metadata = {**relation.metadata(), **_model_index(facts, repository)}
    if not is_generated(card):
        return add_metadata(card, metadata)
    found = ModelCard(MARK.sub("", with_repository(card, repository)), ignore_metadata_errors=True)
    content = found.data.to_dict()
    if "model-index" in metadata:
        metadata["model-index"] = _joined_index(content.get("model-index"), metadata["model-index"])
    text = found.text
    if relation.kind in _TITLES:
        text = re.sub(r"^# (?:Adapter of )?SAMF(?=:)", f"# {_TITLES[relation.kind]}", text, count=1, flags=re.MULTILINE)
    text = _add_rows(text, relation.rows())
    text = _replace_section(text, "Data", _data(facts))
    text = _replace_section(text, "Metrics", _metrics(facts, figures), keep=True)
    text = _insert_before(text, "Metrics", _training(facts, figures))
    block = yaml.safe_dump({**content, **metadata}, sort_keys=False, allow_unicode=True)
    return str(marked_card(block.strip(), text.strip("\n") + "\n"))


def add_metadata(card: str, metadata: Mapping[str, Any]) -> str:
    """Return a person's card with the metadata that it lacks; no line that is there changes.

    Args:
        card: the text of README.md.
        metadata: what a generated card would say.

    Raises:
        ShareError: its metadata can't be read.
    """
    match = _BLOCK.match(card)
    try:
        there = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise ShareError(
            f"README.md: its metadata can't be read ({error}); repair the block between --- lines."
        ) from error
    if match and not isinstance(there, dict | None):
        raise ShareError("README.md: its metadata isn't a mapping; repair the block between the --- lines.")
    missing = {key: metadata[key] for key in _MERGED_KEYS if key in metadata and key not in (there or {})}
    if not missing:
        return card
    added = yaml.safe_dump(missing, sort_keys=False, allow_unicode=True)
    if match is None:
        return f"---\n{added}---\n\n{card}"
    lines = match[1] if not match[1] or match[1].endswith("\n") else f"{match[1]}\n"
    return f"---\n{lines}{added}---\n{card[match.end() :]}"


def _model_index(facts: RunFacts, repository: str) -> dict[str, Any]:
    results = [
        result
        for each in facts.evaluations
        if not each.is_control
        for entry in each.index()
        for result in entry["results"]
    ]
    results = [result for result in results if result["metrics"]]
    return {"model-index": [{"name": repository.split("/")[-1], "results": results}]} if results else {}


def _joined_index(before: Any, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = before[0]["results"] if before else []
    return [{**new[0], "results": [*kept, *new[0]["results"]]}]


# --- Sections ---------------------------------------------------------------------------------------------------------


def _training(facts: RunFacts, figures: Mapping[str, str]) -> str:
    if not facts.training:
        return ""
    rows = [[name, public_name(value)] for name, value in facts.training.items()]
    blocks = ["## Training", "Recorded by the run.", markdown_table(["", ""], rows).strip()]
    return "\n\n".join([*blocks, *_images(figures, "loss.png")])


def _data(facts: RunFacts) -> str:
    return f"Trained on {facts.data}." if facts.data else ""


def _metrics(facts: RunFacts, figures: Mapping[str, str]) -> str:
    blocks = []
    for each in facts.evaluations:
        blocks += [f"### {_evaluation_title(each)}", _scores(each)]
        blocks += _images(figures, f"{each.name.replace('/', '_')}_")
    if facts.calibration is not None:
        blocks += [
            "### Calibration of the findings",
            *_calibration(facts.calibration),
            *_images(figures, "reliability.png"),
        ]
    return "\n\n".join(blocks)


def _evaluation_title(each: Evaluation) -> str:
    what = "another patient's volume for each question (control)" if each.is_control else "own volumes"
    return f"{each.data}, {each.settings.get('split', 'valid')}: {what}"


def _scores(each: Evaluation) -> str:
    rows = []
    for result in each.index()[0]["results"]:
        for metric in result["metrics"]:
            arguments = metric.get("args", {})
            interval = " to ".join(f"{bound:.3f}" for bound in arguments.get("interval_95", ()))
            rows.append([metric["name"], f"{metric['value']:.3f}", interval, arguments.get("patients", "")])
    return markdown_table(["", "value", "95 % interval", "patients"], rows)


def _calibration(report: Mapping[str, Any]) -> list[str]:
    errors = {name: report.get(name, {}).get("ece") for name in ("before", "after")}
    if None in errors.values():
        return []
    return [
        f"Expected calibration error on {report.get('scans', 'unknown')} held-out scans: {errors['before']:.3f} before, "
        f"{errors['after']:.3f} after scaling ({report.get('scaling')})."
    ]


def _images(figures: Mapping[str, str], start: str) -> list[str]:
    return [f"![{text}]({path})" for path, text in figures.items() if path.rpartition("/")[2].startswith(start)]


def _add_rows(text: str, rows: Mapping[str, str]) -> str:
    """Add rows at the end of the first table."""
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return re.sub(r"(\|---\|---\|\n(?:\|.*\n)*)", lambda match: match[1] + lines, text, count=1)


def _replace_section(text: str, title: str, content: str, *, keep: bool = False) -> str:
    """Replace a section's text where there is any to say; `keep` adds it to what the section says already."""
    pattern = re.compile(rf"(^## {title}\n\n)(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    match = pattern.search(text)
    if not content or match is None:
        return text
    before = match[2].strip() if keep and match[2].strip() != _NOT_KNOWN[title] else ""
    return (
        text[: match.start()] + match[1] + "\n\n".join(filter(None, [before, content])) + "\n\n" + text[match.end() :]
    )


def _insert_before(text: str, title: str, section: str) -> str:
    return text.replace(f"\n## {title}\n", f"\n{section}\n\n## {title}\n", 1) if section else text
