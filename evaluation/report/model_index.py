"""Scores as the Hub's model cards hold them (`model-index`)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import yaml
from huggingface_hub import metadata_load, metadata_save

from samf.evaluation.report.systems import System
from samf.evaluation.results_table import value_at
from samf.evaluation.schema import Interval
from samf.utils.files import atomic_path

# Path of a metric in the results → its type on the Hub, and its name in the card.
_INDEX = {
    "report": {
        "text.bleu_1": ("bleu", "BLEU-1"),
        "text.bleu_4": ("bleu", "BLEU-4"),
        "text.meteor": ("meteor", "METEOR"),
        "text.rouge_l": ("rouge", "ROUGE-L"),
        "text.cider": ("cider", "CIDEr"),
        "text.bertscore_f1": ("bertscore", "BERTScore F1"),
        "findings.macro.f1": ("f1", "Findings, macro-F1"),
        "findings.micro.f1": ("f1", "Findings, micro-F1"),
        "findings.crg": ("crg", "CRG"),
    },
    "multiple_choice": {
        "multiple_choice.accuracy": ("accuracy", "Accuracy"),
        "multiple_choice.precision": ("precision", "Precision (macro)"),
        "multiple_choice.recall": ("recall", "Recall (macro)"),
        "multiple_choice.f1": ("f1", "F1 (macro)"),
    },
}
UNNAMED = "unnamed"  # data set without --dataset
_TASK_NAMES = {"report": "Chest CT report generation", "multiple_choice": "Chest CT multiple-choice question answering"}


class MetricArguments(TypedDict):
    """How a metric was measured."""

    patients: int
    interval_95: NotRequired[list[float]]
    over: NotRequired[str]


class IndexMetric(TypedDict):
    """One metric of a result."""

    type: str
    name: str
    value: float
    args: NotRequired[MetricArguments]


class IndexTask(TypedDict):
    """The task of a result."""

    type: str
    name: str


class IndexDataset(TypedDict, total=False):
    """The data set of a result."""

    type: str
    name: str
    split: str


class IndexResult(TypedDict):
    """The metrics of one task on one data set."""

    task: IndexTask
    dataset: IndexDataset
    metrics: list[IndexMetric]


class IndexEntry(TypedDict):
    """The results of one model."""

    name: str
    results: list[IndexResult]


def model_index(
    system: System, *, dataset: str = UNNAMED, dataset_name: str = UNNAMED, split: str = "valid"
) -> list[IndexEntry]:
    """Return the `model-index` of a model card: every available metric with its interval.

    Args:
        system: what was evaluated.
        dataset: Hub id of the data set.
        dataset_name: its name in the card.
        split: its part.
    """
    results: list[IndexResult] = []
    for task, names in _INDEX.items():
        scores = system.results["tasks"].get(task)
        if not scores:
            continue
        metrics = []
        for path, (kind, name) in names.items():
            value = value_at(scores, path)
            if value is not None:
                metrics.append(_index_metric(kind, name, value, scores["intervals"].get(path), scores["n"][path]))
        judged = system.judged(task)
        if system.judge and judged and judged["mean"] is not None:
            name = f"Judge, of {judged['highest']:g} ({system.judge['judge'].get('model')})"
            metrics.append(_index_metric("llm_judge", name, judged["mean"], judged["interval"], judged["patients"]))
        results.append(
            {
                "task": {"type": "image-text-to-text", "name": _TASK_NAMES[task]},
                "dataset": {"type": dataset, "name": dataset_name, "split": split},
                "metrics": metrics,
            }
        )
    return [{"name": system.name, "results": results}]


def _index_metric(kind: str, name: str, value: float, interval: Interval, patients: int) -> IndexMetric:
    arguments: MetricArguments = {"patients": patients}
    if interval:
        arguments |= {"interval_95": [round(bound, 4) for bound in interval], "over": "patients"}
    return {"type": kind, "name": name, "value": round(value, 4), "args": arguments}


def write_to_card(card: str | os.PathLike, index: Sequence[IndexEntry]) -> None:
    """Write a `model_index` into the metadata of a model card.

    Results of the same task on the same part of the same data set are replaced; everything else in the card stays. A card
    without a model name gets its folder's name.

    Args:
        card: README.md of a model.
        index: what `model_index` returned.

    Raises:
        FileNotFoundError: there is no such card.
        ValueError: its metadata can't be read.
    """
    card = Path(card)
    if not card.is_file():
        raise FileNotFoundError(
            f"{card}: no such file; expected a model card, which saving a model writes (README.md)."
        )
    try:
        metadata = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{card}: its metadata can't be read ({error}); repair the block between the --- lines."
        ) from error
    (new,) = index
    before = (metadata.get("model-index") or [{"name": card.resolve().parent.name, "results": []}])[0]
    kept = [result for result in before["results"] if not any(_same_test(result, other) for other in new["results"])]
    metadata["model-index"] = [{"name": before["name"], "results": [*kept, *new["results"]]}]
    with atomic_path(card) as temporary:
        temporary.write_bytes(card.read_bytes())
        metadata_save(temporary, metadata)


def _same_test(first: IndexResult, second: IndexResult) -> bool:
    """Return whether two results are of the same task and the same part of a data set."""
    return _test_of(first) == _test_of(second)


def _test_of(result: IndexResult) -> tuple[str | None, str | None, str | None]:
    """Return a result's task and its data set and part; None for what a card of others lacks."""
    task, dataset = cast(Mapping[str, str], result.get("task", {})), result.get("dataset", {})
    return task.get("name"), dataset.get("type"), dataset.get("split")
