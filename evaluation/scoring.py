"""From predictions.jsonl alone to scores and a table, so that any system's output can be scored in the same way.

    python -m samf.evaluation.scoring runs/samf/predictions.jsonl --output runs/samf/results.json

Each line is one JSON object with `id`, `scan_id`, `task`, `question`, `choices`, `reference` and `prediction`; `tokens`
and `truncated`, which eval.py adds, are counted where they are present.
"""

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from samf.data.ct_rate import CT_RATE_LABELS
from samf.evaluation.finding_labeller import effusion_sides, label_reports
from samf.evaluation.multiple_choice import score_multiple_choice
from samf.evaluation.text_metrics import text_metrics

logger = logging.getLogger(__name__)

FIELDS = ("id", "scan_id", "task", "question", "choices", "reference", "prediction")
TASKS = ("report", "multiple_choice", "short_answer", "long_answer")
TEXT_NAMES = {
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "bertscore_f1": "BERTScore F1",
}


class PredictionsError(ValueError):
    """A predictions file that can't be scored; the message names the file, the line and the remedy."""


def read_predictions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a predictions file. Raises PredictionsError: no file, no rows, bad JSON, or missing fields."""
    path = Path(path)
    if not path.is_file():
        raise PredictionsError(f"{path}: no such file; expected the predictions.jsonl that eval.py writes.")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_parse_row(line, f"{path}, line {number}"))
    if not rows:
        raise PredictionsError(f"{path}: holds no predictions; expected one JSON object a line.")
    return rows


def _parse_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PredictionsError(
            f"{place}: not JSON ({error}); expected one object a line. Remove or repair it."
        ) from error
    if not isinstance(row, dict):
        raise PredictionsError(f"{place}: a JSON {type(row).__name__}; expected an object with {', '.join(FIELDS)}.")
    check_row(row, place)
    return row


def check_row(row: Mapping[str, Any], place: str) -> None:
    """Raise PredictionsError unless a row has what its task's scores need."""
    missing = [name for name in ("task", "reference", "prediction") if row.get(name) is None]
    if row.get("task") == "multiple_choice" and not row.get("choices"):
        missing.append("choices")
    if missing:
        raise PredictionsError(f"{place}: lacks {', '.join(missing)}; expected the fields {', '.join(FIELDS)}.")
    if row["task"] not in TASKS:
        raise PredictionsError(f"{place}: task {row['task']!r} is unknown; expected one of {', '.join(TASKS)}.")


def score_predictions(
    path_or_rows: str | os.PathLike | Iterable[Mapping[str, Any]],
    *,
    finding_names: Sequence[str] | None = None,
    bertscore_model: str | None = None,
    bertscore_layers: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Scores of every task in a predictions file, or in its rows.

    Args:
        finding_names: the labels of CT-RATE's 18 that count in the per-finding scores; None = all.
        bertscore_model, bertscore_layers, device: see `text_metrics.bertscore_f1`.

    Returns `counts` (predictions, scans, duplicate_ids), `tasks` (task → count, empty, truncated, `text`, `findings`
    for reports, `multiple_choice`) and `not_available` (metric → remedy). All of it can be written as JSON.
    Raises PredictionsError for rows that can't be scored, ValueError for an unknown finding.
    """
    names = _check_findings(finding_names)
    if isinstance(path_or_rows, str | os.PathLike):
        rows = read_predictions(path_or_rows)
    else:
        rows = list(path_or_rows)
        for position, row in enumerate(rows):
            check_row(row, f"row {position}")
        if not rows:
            raise PredictionsError("There are no predictions to score.")
    options = {"bertscore_model": bertscore_model, "bertscore_layers": bertscore_layers, "device": device}
    tasks, not_available = {}, {}
    for task in TASKS:
        chosen = [row for row in rows if row["task"] == task]
        if chosen:
            tasks[task] = _score_task(task, chosen, names, options)
            not_available |= tasks[task]["text"].pop("not_available")
    return {"counts": _count(rows), "tasks": tasks, "not_available": not_available}


def _check_findings(finding_names: Sequence[str] | None) -> tuple[str, ...]:
    names = CT_RATE_LABELS if finding_names is None else tuple(finding_names)
    unknown = sorted(set(names) - set(CT_RATE_LABELS))
    if unknown or not names:
        raise ValueError(f"Unknown findings {unknown}; the labeller knows {', '.join(CT_RATE_LABELS)}.")
    return names


def _count(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    ids = Counter(row["id"] for row in rows if row.get("id") is not None)
    duplicates = sum(count - 1 for count in ids.values())
    if duplicates:
        logger.warning("%d predictions repeat the id of an earlier one; all of them are scored.", duplicates)
    scans = {row["scan_id"] for row in rows if row.get("scan_id") is not None}
    return {"predictions": len(rows), "scans": len(scans), "duplicate_ids": duplicates}


def _score_task(
    task: str, rows: Sequence[Mapping[str, Any]], finding_names: tuple[str, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    predictions = [str(row["prediction"]) for row in rows]
    references = [str(row["reference"]) for row in rows]
    text = text_metrics(predictions, references, **options)
    scores: dict[str, Any] = {
        "count": len(rows),
        "empty": text["empty_predictions"],
        "truncated": sum(bool(row.get("truncated")) for row in rows),
        "text": {**text["scores"], "not_available": text["not_available"]},
    }
    if task == "report":
        scores["findings"] = score_findings(predictions, references, finding_names)
    if task == "multiple_choice":
        scores["multiple_choice"] = score_multiple_choice(predictions, references, [row["choices"] for row in rows])
    return scores


def score_findings(
    predictions: Sequence[str], references: Sequence[str], finding_names: Sequence[str] = CT_RATE_LABELS
) -> dict[str, Any]:
    """Precision, recall and F1 of the findings that the rule-based labeller reads in reports against their references.

    Returns `per_finding` (name → precision, recall, f1, support, predicted), `micro` over all cells, `macro` over the
    findings that occur in some reference (`macro_findings` of them), and `effusion_side`: among the references that
    name an effusion's side, how many predictions name the same.
    """
    columns = [CT_RATE_LABELS.index(name) for name in finding_names]
    truth, found = label_reports(references)[:, columns], label_reports(predictions)[:, columns]
    per_finding = {}
    for column, name in enumerate(finding_names):
        per_finding[name] = {
            **_precision_recall_f1(truth[:, column], found[:, column]),
            "support": int(truth[:, column].sum()),
            "predicted": int(found[:, column].sum()),
        }
    occurring = [scores for scores in per_finding.values() if scores["support"]]
    macro = {
        key: float(np.mean([scores[key] for scores in occurring])) if occurring else None
        for key in ("precision", "recall", "f1")
    }
    return {
        "per_finding": per_finding,
        "micro": _precision_recall_f1(truth.ravel(), found.ravel()),
        "macro": macro,
        "macro_findings": len(occurring),
        "effusion_side": _score_sides(predictions, references),
    }


def _precision_recall_f1(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    values = precision_recall_fscore_support(truth, found, average="binary", zero_division=0)[:3]
    return dict(zip(("precision", "recall", "f1"), map(float, values), strict=True))


def _score_sides(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    pairs = [
        (sides, effusion_sides(text))
        for text, ref in zip(predictions, references, strict=True)
        if (sides := effusion_sides(ref))
    ]
    right = sum(expected == named for expected, named in pairs)
    return {"count": len(pairs), "accuracy": right / len(pairs) if pairs else None}


# --- tables -----------------------------------------------------------------------------------------------------


def results_table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: text metrics by task, multiple choice, findings, and what is not available."""
    tasks = results["tasks"]
    blocks = [_text_table(tasks)]
    if "multiple_choice" in tasks:
        blocks.append(_choice_table(tasks["multiple_choice"]["multiple_choice"]))
    if "report" in tasks:
        blocks.append(_finding_table(tasks["report"]["findings"]))
    notes = _generation_notes(results.get("generation"))
    notes += [f"- {TEXT_NAMES.get(name, name)}: not available. {why}" for name, why in results["not_available"].items()]
    return "\n\n".join(block for block in [*blocks, "\n".join(notes)] if block) + "\n"


def _generation_notes(summary: Mapping[str, Any] | None) -> list[str]:
    if not summary:
        return []
    failures = f", {summary['failures']} failed (failures.jsonl lists them)" if summary["failures"] else ""
    return [
        f"- {summary['written']} answers in {summary['seconds']:.0f} s, {summary['resumed']} from before{failures}."
    ]


def _text_table(tasks: Mapping[str, Any]) -> str:
    header = ["task", "answers", "empty", "truncated", *TEXT_NAMES.values()]
    rows = [
        [task, s["count"], s["empty"], s["truncated"], *(_figure(s["text"][name]) for name in TEXT_NAMES)]
        for task, s in tasks.items()
    ]
    return markdown_table(header, rows)


def _choice_table(scores: Mapping[str, Any]) -> str:
    header = ["multiple choice", "accuracy", "precision", "recall", "F1", "chance", "unparsed"]
    values = [_figure(scores[key]) for key in ("accuracy", "precision", "recall", "f1", "chance")]
    return markdown_table(header, [[f"{scores['count']} questions", *values, scores["unparsed"]]])


def _finding_table(findings: Mapping[str, Any]) -> str:
    def row(name: str, scores: Mapping[str, Any]) -> list[Any]:
        figures = [_figure(scores[key]) for key in ("precision", "recall", "f1")]
        return [name, *figures, scores.get("support", ""), scores.get("predicted", "")]

    rows = [row(name, scores) for name, scores in findings["per_finding"].items()]
    rows.append(row(f"**macro** ({findings['macro_findings']} findings)", findings["macro"]))
    rows.append(row("**micro**", findings["micro"]))
    table = markdown_table(["finding in reports", "precision", "recall", "F1", "in references", "in predictions"], rows)
    sides = findings["effusion_side"]
    if not sides["count"]:
        return table
    return f"{table}\n\nSide of effusion right in {_figure(sides['accuracy'])} of {sides['count']} reports with one."


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column left-aligned, the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


# --- files and command line -------------------------------------------------------------------------------------


def write_atomic(path: str | os.PathLike, text: str) -> None:
    """Write a text file under a temporary name, then rename it: a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_results(results: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write results as JSON to `path` and as a Markdown table beside it (same name, .md)."""
    write_atomic(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_atomic(Path(path).with_suffix(".md"), results_table(results))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score a predictions.jsonl.")
    parser.add_argument("predictions", help="the file to score")
    parser.add_argument("--output", help="results as JSON, with a Markdown table beside it")
    parser.add_argument("--finding_names", nargs="+", metavar="NAME", help="findings that count; default: CT-RATE's 18")
    parser.add_argument("--bertscore_model", help="Hub id or folder of the model for BERTScore F1")
    parser.add_argument("--bertscore_layers", type=int, help="layer of it that is compared, where bert-score has none")
    parser.add_argument("--device", help="for BERTScore, e.g. cuda")
    options = vars(parser.parse_args(argv))
    predictions, output = options.pop("predictions"), options.pop("output")
    try:
        results = score_predictions(predictions, **options)
    except ValueError as error:
        sys.exit(f"scoring: {error}")
    if output:
        write_results(results, output)
    sys.stdout.write(results_table(results))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    main()
