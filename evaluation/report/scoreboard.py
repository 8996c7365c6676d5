"""Everything about an evaluation in one folder, by one command.

    python -m samf.evaluation.report.scoreboard runs/ao2d/eval/predictions.jsonl --output runs/ao2d/eval/scoreboard \\
        --against runs/samf/eval/predictions.jsonl --names Ao2D SAMF --data /data/CT-RATE

writes there
- `results.json`, `results.md`: all scores with intervals; `against.json`, `against.md`: those of the other system,
- `scoreboard.md`: the figures beside the paper's tables 1, 2 and 3; with `--against` the differences with their tests, and
  both systems' reports on the same cases, with what agrees with the reference and what contradicts it,
- `report.html`: the same, with plots, and the worst and best cases with pictures of their slices (`--data`); one file,
  nothing in it is loaded from elsewhere,
- `model_index.yaml`: the scores as the Hub's model cards have them; `--card README.md` puts them into a card.

Scores of a judge are taken from a `judge.json` beside each predictions file, what generation took from its `results.json`:
as far as they are of these predictions, which is told by content.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, metadata_save

from samf.data.loading import load_records
from samf.evaluation.answering.answer_folder import answer_statistics
from samf.evaluation.judge import compare_judged, judge_table, judged_rows
from samf.evaluation.metrics.clinical_metrics import RADEVAL_METRICS
from samf.evaluation.report import html_report
from samf.evaluation.report.paper_tables import COLUMNS, PAPER_TABLES, SOURCE, PaperTable
from samf.evaluation.report.side_by_side import choose_reports, common_rows, compare_choices, side_by_side
from samf.evaluation.results_table import BASELINE_NAMES, comparison_table, figure, markdown_table, results_table
from samf.evaluation.scoring import (
    PERMUTATIONS,
    RESAMPLES,
    compare_predictions,
    read_predictions,
    score_predictions,
    write_results,
)
from samf.model.ct_volume import read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.reporting.slice_view import WINDOWS, save_slice_image
from samf.utils.files import atomic_path, atomic_write, write_json
from samf.utils.text_files import read_text

logger = logging.getLogger(__name__)

CASES = 5
PICTURE_SLICES = 4  # of each plane


@dataclass(frozen=True)
class System:
    """A system that is evaluated: its name, its predictions, their scores, and its judge's scores if there are any."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]
    judge: Mapping[str, Any] | None = None


def load_system(name: str, path: str | os.PathLike, judge: str | os.PathLike | None = None, **scoring: Any) -> System:
    """Read and score a predictions file.

    Args:
        name: what the system is called.
        path: predictions.jsonl.
        judge: a judge.json; default: the one beside the file, if any. Only scores of rows that are in the file count.
        scoring: keywords of `score_predictions`.

    `model`, `generation` and `position_bias` are taken over from the results.json beside the file where it is of the same
    predictions; `answers` holds token counts and times by task. What is of others is left out, and the notes say so.
    Raises what `score_predictions` raises, FileNotFoundError without the named judge's file, and ValueError for a file that
    can't be read or, where it is named, is of other predictions.
    """
    path = Path(path)
    rows, notes = read_predictions(path), {}
    judged = _load_judged(path, judge, rows, notes)  # first: scoring takes minutes
    results = score_predictions(path, **scoring)
    results["notes"] |= notes
    before = _results_beside(path, rows, results)
    results |= {name: before[name] for name in _TAKEN_OVER if name in before}
    results["answers"] = before.get("generation", {}).get("tasks") or answer_statistics(rows)
    return System(name, rows, results, judged)


# What results.json holds that can't be computed from the predictions.
_TAKEN_OVER = ("model", "generation", "position_bias")


def _results_beside(path: Path, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> dict[str, Any]:
    """The results.json beside a predictions file, as far as it is of these predictions; else a note in the new results.

    One of an older version doesn't say of which predictions it is: then their number must be the same, and the note says it.
    """
    file, notes = path.with_name("results.json"), results["notes"]
    before = _read_json(file) or {}
    if not any(name in before for name in _TAKEN_OVER):
        return {}
    digest, made = before.get("predictions_digest"), before.get("generation") or {}
    if digest == results["predictions_digest"]:
        return before
    if digest is None and made.get("written", 0) + made.get("resumed", 0) == len(rows):
        notes["results.json"] = f"doesn't say of which answers it is; their number, {len(rows)}, is the same."
        return before
    notes["results.json"] = "is of other answers than these; what it says of generation is not shown."
    logger.warning("%s is of other predictions than %s; it is not used.", file, path)
    return {}


def _load_judged(
    path: Path, judge: str | os.PathLike | None, rows: Sequence[Mapping[str, Any]], notes: dict[str, str]
) -> Mapping[str, Any] | None:
    file = Path(judge) if judge else path.with_name("judge.json")
    scores = _read_json(file)
    if scores is None:
        if judge:
            raise FileNotFoundError(f"{file}: no such file; expected the judge.json that samf.evaluation.judge writes.")
        return None
    try:
        judged = judged_rows(scores, rows)
    except ValueError as error:
        raise ValueError(f"{file}: {error} Make it again, or move it away.") from error
    if judged is None:
        message = f"{file}: its scores are of other answers than {path}."
        if judge:
            raise ValueError(f"{message} Name the judge.json that was made of this file.")
        logger.warning("%s They are not used.", message)
        notes["judge.json"] = "its scores are of other answers than these; they are not shown."
    return judged


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); make it again, or move it away.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: a JSON {type(content).__name__}; expected an object. Make it again, or move it away."
        )
    return content


# --- beside the paper ---------------------------------------------------------------------------------------------

# In the published code BLEU is a mean over samples; ours with pooled counts stands in a row of its own.
_AS_PUBLISHED = {"bleu_1": "mean_bleu_1", "bleu_4": "mean_bleu_4"}


def paper_table(table: PaperTable, systems: Sequence[System]) -> str:
    """A table of the paper with our rows below it, as Markdown."""
    rows = [_paper_row(row.name, row.values, row.suspect, table.columns) for row in table.rows]
    for system in systems:
        scores = system.results["tasks"].get(table.task)
        if scores:
            rows += _our_rows(system, scores, table)
    rows += _baseline_rows(systems[:1], table)
    header = [f"Table {table.number}: {table.title}", *(COLUMNS[column] for column in table.columns)]
    notes = [f"- {note}" for note in table.notes]
    return markdown_table(header, rows) + ("\n\n" + "\n".join(notes) if notes else "")


def _paper_row(name: str, values: Mapping[str, float], suspect: Sequence[str], columns: Sequence[str]) -> list[str]:
    cells = [f"{values[c]:.3f}{' (?)' if c in suspect else ''}" if c in values else "" for c in columns]
    return [f"{name} (paper{', suspect' if suspect else ''})", *cells]


def _our_rows(system: System, scores: Mapping[str, Any], table: PaperTable) -> list[list[str]]:
    rows = [
        _row(f"**{system.name}** (n {scores['patients']})", scores, table, scores["intervals"]),
        _row(
            f"{system.name}, BLEU with pooled counts", {"text": scores["text"]}, table, scores["intervals"], pooled=True
        ),
    ]
    judged = _judged(system, table.task)
    if "judge" in table.columns and judged.get("mean") is not None:
        rows[0][1 + table.columns.index("judge")] = figure(judged["mean"], judged["interval"], judged["patients"])
    return rows


def _baseline_rows(systems: Sequence[System], table: PaperTable) -> list[list[str]]:
    """What reads no image, scored on the first system's records."""
    rows = []
    for system in systems:
        baselines = system.results["tasks"].get(table.task, {}).get("baselines") or {}
        for name in ("constant_report", "nearest_label_prior", "shuffled"):
            if name in baselines:
                rows.append(_row(BASELINE_NAMES[name], baselines[name], table, baselines[name].get("intervals")))
        if "most_frequent_letter" in baselines:
            letter = baselines["most_frequent_letter"]
            intervals = {f"multiple_choice.{name}": drawn for name, drawn in letter.get("intervals", {}).items()}
            rows.append(_row(f"constant: always ({letter['letter']})", {"multiple_choice": letter}, table, intervals))
    return rows


def _row(
    name: str,
    scores: Mapping[str, Any],
    table: PaperTable,
    intervals: Mapping[str, Any] | None = None,
    *,
    pooled: bool = False,
) -> list[str]:
    cells = []
    for column in table.columns:
        if pooled and column not in _AS_PUBLISHED:
            cells.append("")  # the row above has it
            continue
        path = _path(column, pooled)
        value = _look_up(scores, path)
        cells.append("" if value is None else figure(value, (intervals or {}).get(path)))
    return [name, *cells]


def _path(column: str, pooled: bool) -> str:
    if column in ("accuracy", "precision", "recall", "f1"):
        return f"multiple_choice.{column}"
    return f"text.{column if pooled else _AS_PUBLISHED.get(column, column)}"


def _look_up(scores: Mapping[str, Any], path: str) -> float | None:
    found: Any = scores
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _judged(system: System, task: str) -> Mapping[str, Any]:
    return (system.judge or {}).get("tasks", {}).get(task) or {}


def paper_comparison(systems: Sequence[System]) -> str:
    """Tables 1 to 3 with our rows, as Markdown, and what to heed when reading them."""
    names = ", ".join(sorted({str(system.judge["judge"].get("model")) for system in systems if system.judge}))
    notes = [
        f"- The paper's figures: {SOURCE}. It gives no intervals; ours are 95 %, over patients (n).",
        "- BLEU in our first row is the mean over samples, as the published code computes it, with our tokenisation.",
        "- The constant report and the shuffled answers read no image: what they score is what a metric gives for nothing.",
        f"- Llama score: the paper's judge was a 70-billion-parameter Llama with CT-CHAT's prompt; "
        f"{f'ours is {names} with our prompt' if names else 'no judge.json was found'}.",
    ]
    return "\n\n".join([*(paper_table(table, systems) for table in PAPER_TABLES), "\n".join(notes)])


# --- model index --------------------------------------------------------------------------------------------------

# Figure → the Hub's name of the metric, and what it is called in the card.
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
UNNAMED = "unnamed"  # the data set, unless --dataset names it
_TASK_NAMES = {"report": "Chest CT report generation", "multiple_choice": "Chest CT multiple-choice question answering"}


def model_index(
    system: System, *, dataset: str = UNNAMED, dataset_name: str = UNNAMED, split: str = "valid"
) -> list[dict[str, Any]]:
    """The `model-index` of a model card: every figure that is there, with its interval. `dataset` is its Hub id."""
    entries = []
    for task, names in _INDEX.items():
        scores = system.results["tasks"].get(task)
        if not scores:
            continue
        metrics = []
        for path, (kind, name) in names.items():
            value = _look_up(scores, path)
            if value is not None:
                metrics.append(_index_entry(kind, name, value, scores["intervals"].get(path), scores["n"][path]))
        judged = _judged(system, task)
        if judged.get("mean") is not None:
            name = f"Judge, of {judged['highest']:g} ({system.judge['judge'].get('model')})"
            metrics.append(_index_entry("llm_judge", name, judged["mean"], judged["interval"], judged["patients"]))
        entries.append(
            {
                "task": {"type": "image-text-to-text", "name": _TASK_NAMES[task]},
                "dataset": {"type": dataset, "name": dataset_name, "split": split},
                "metrics": metrics,
            }
        )
    return [{"name": system.name, "results": entries}]


def _index_entry(kind: str, name: str, value: float, interval: Sequence[float] | None, n: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": kind, "name": name, "value": round(value, 4), "args": {"patients": n}}
    if interval:
        entry["args"] |= {"interval_95": [round(bound, 4) for bound in interval], "over": "patients"}
    return entry


def write_to_card(card: str | os.PathLike, index: Sequence[Mapping[str, Any]]) -> None:
    """Put a `model_index` into the metadata of a model card (README.md), beside what is there.

    Results of the same task on the same part of the same data set are replaced; the card's text and its model's name stay.
    A card without a name gets its folder's.
    Raises FileNotFoundError without a card, ValueError where its metadata can't be read.
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


def _same_test(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two results are of the same task and the same part of a data set."""
    places = (("task", "name"), ("dataset", "type"), ("dataset", "split"))
    return all(first.get(group, {}).get(name) == second.get(group, {}).get(name) for group, name in places)


# --- pictures -----------------------------------------------------------------------------------------------------


def draw_slices(
    rows: Iterable[Mapping[str, Any]], records: Iterable[Mapping[str, Any]], folder: Path
) -> dict[Any, Any]:
    """A picture of the slices of each row's volume: id → its path, or the reason why there is none.

    `records` are those of the data set, which know where the volumes lie; rows and records are matched by id.
    """
    wanted = {row.get("id") for row in rows}
    volumes = {record["id"]: record for record in records if record["id"] in wanted and record["volume"] is not None}
    processor = SamfImageProcessor(
        slices_per_plane=PICTURE_SLICES, hu_windows=(WINDOWS["lung"],), image_mean=0.5, image_std=0.5
    )
    drawn: dict[Any, Any] = {}
    for number, row_id in enumerate(wanted):
        record = volumes.get(row_id)
        if record is None:
            drawn[row_id] = "No volume of this id is in the data."
            continue
        try:
            volume = read_ct(record["volume"], rescale=record.get("rescale"))
            path = folder / f"slices_{number}.png"
            drawn[row_id] = save_slice_image(volume, path, image_processor=processor)
        except (OSError, ValueError) as error:
            logger.warning("%s: no picture of its slices: %s", row_id, error)
            drawn[row_id] = f"The volume can't be shown: {type(error).__name__}."
    return drawn


# --- the whole ----------------------------------------------------------------------------------------------------


def scoreboard_markdown(systems: Sequence[System], comparison: Mapping[str, Any] | None = None) -> str:
    """Everything but pictures, as Markdown."""
    blocks = ["# Scoreboard", "For research only, not for diagnosis.", "## Beside the paper", paper_comparison(systems)]
    for system in systems:
        blocks += [f"## {system.name}", _system_text(system)]
    if comparison is not None:
        names = [system.name for system in systems]
        blocks += [f"## {names[1]} to {names[0]}", comparison_table(comparison, names[::-1]).strip()]
        blocks += _case_blocks(systems)
    return "\n\n".join(block for block in blocks if block) + "\n"


def _system_text(system: System) -> str:
    """All figures of a system, its judge's too, as Markdown."""
    judged = judge_table(system.judge) if system.judge else ""
    return f"{results_table(system.results)}\n{judged}".strip()


def _case_blocks(systems: Sequence[System]) -> list[str]:
    first, second = systems
    cases, choices = _cases(systems)
    blocks = []
    if cases:
        text = "✓ agrees with the reference, ✗ contradicts it or its side, ? isn't in it; of the 18 findings alone."
        blocks += ["### The same reports", text, side_by_side(cases, (first.name, second.name))]
    if choices["questions"]:
        blocks += ["### The same questions", choice_comparison(choices, (first.name, second.name))]
    return blocks


def _cases(systems: Sequence[System]) -> tuple[list[Any], dict[str, Any]]:
    first, second = (system.rows for system in systems)
    return choose_reports(first, second, CASES), compare_choices(first, second, CASES)


def choice_comparison(choices: Mapping[str, Any], names: Sequence[str]) -> str:
    """What `compare_choices` returns, as Markdown tables."""
    header = [f"{choices['questions']} questions", "both right", f"{names[0]} alone", f"{names[1]} alone", "neither"]
    table = markdown_table(header, [["", *(choices[n] for n in ("both", "only_first", "only_second", "neither"))]])
    rows = [[case.id, case.question, case.reference, case.first, case.second] for case in choices["cases"]]
    rows = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    return f"{table}\n\n{markdown_table(['id', 'question', 'right', *names], rows)}" if rows else table


def html_sections(
    systems: Sequence[System], comparison: Mapping[str, Any] | None, pictures: Mapping[Any, Any]
) -> list[tuple[str, str]]:
    """Headings and HTML of the report."""
    results = {system.name: system.results for system in systems}
    rows = {system.name: system.rows for system in systems}
    plots = [html_report.interval_plot(results, task) for task in ("report", "multiple_choice")]
    plots += [html_report.finding_bars(results), html_report.length_histogram(rows)]
    sections = [("Figures", "".join(html_report.picture(plot, "figures of the evaluation") for plot in plots if plot))]
    sections.append(("Beside the paper", html_report.markdown_to_html(paper_comparison(systems))))
    for system in systems:
        text = html_report.markdown_to_html(_system_text(system))
        calibration = html_report.judge_calibration(system.rows, system.judge) if system.judge else None
        plot = html_report.picture(calibration, "calibration of the judge") if calibration else ""
        sections.append((system.name, text + plot))
    if comparison is not None:
        sections += _comparison_sections(systems, comparison)
    sections.append((f"Worst and best cases of {systems[0].name}", _extreme_cases(systems[0], pictures)))
    return sections


def _comparison_sections(systems: Sequence[System], comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = [system.name for system in systems]
    cases, choices = _cases(systems)
    table = html_report.markdown_to_html(comparison_table(comparison, names[::-1]))
    sections = [(f"{names[1]} to {names[0]}", table)]
    if cases:
        sections.append(("The same reports", html_report.legend() + html_report.cases_html(cases, names)))
    if choices["questions"]:
        text = html_report.markdown_to_html(choice_comparison(choices, names))
        sections.append(("The same questions", text))
    return sections


def _extreme_cases(system: System, pictures: Mapping[Any, Any]) -> str:
    blocks = []
    for kind, cases in html_report.extreme_reports(system.rows).items():
        if cases:
            blocks.append(f"<h3>{kind.capitalize()}</h3>")
        for row, score in cases:
            shown = pictures.get(row.get("id"))
            path, why = (shown, "") if isinstance(shown, Path) else (None, shown or "")
            blocks.append(html_report.case_html(row, score, path, why))
    return html_report.legend() + "".join(blocks) if blocks else ""


def write_scoreboard(
    output: str | os.PathLike,
    systems: Sequence[System],
    *,
    comparison: Mapping[str, Any] | None = None,
    records: Iterable[Mapping[str, Any]] | None = None,
    dataset: Mapping[str, str] | None = None,
) -> None:
    """Write all files of the scoreboard.

    Args:
        systems: one or two; the first is the one that the model index and the cases are about.
        comparison: what `compare_predictions` gave for the second and the first system.
        records: of the data set, for pictures of slices. dataset: keywords of `model_index`.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for system, name in zip(systems, ("results.json", "against.json"), strict=False):
        write_results(system.results, output / name)
    if comparison is not None:
        write_json(output / "comparison.json", comparison)
    atomic_write(output / "scoreboard.md", scoreboard_markdown(systems, comparison))
    index = yaml.safe_dump(
        {"model-index": model_index(systems[0], **(dataset or {}))}, sort_keys=False, allow_unicode=True
    )
    atomic_write(output / "model_index.yaml", index)
    pictures: dict[Any, Any] = {}
    if records is not None:
        extreme = [row for cases in html_report.extreme_reports(systems[0].rows).values() for row, _ in cases]
        pictures = draw_slices(extreme, records, output / "pictures")
    title = " and ".join(system.name for system in systems)
    atomic_write(output / "report.html", html_report.page(title, html_sections(systems, comparison, pictures)))


# --- command line -------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Scores, tables beside the paper's, plots and cases of a predictions.jsonl, in one folder."
    )
    parser.add_argument("predictions", type=Path, help="predictions.jsonl of the system")
    parser.add_argument("--output", type=Path, help="folder to write; default: scoreboard beside the predictions")
    parser.add_argument("--against", type=Path, help="another system's predictions of the same records")
    parser.add_argument("--names", nargs="+", default=["this system", "other system"], help="one name a system")
    parser.add_argument("--judge", type=Path, help="judge.json; default: the one beside the predictions")
    parser.add_argument("--against_judge", type=Path, help="the other system's judge.json")
    parser.add_argument("--data", help="the data set, as for eval.py, for pictures of slices")
    parser.add_argument("--split", default="valid", help="train or valid")
    parser.add_argument("--card", type=Path, help="model card (README.md) whose metadata gets the scores")
    parser.add_argument("--dataset", help="what the records are of, for the model index, e.g. ibrahimhamamci/CT-RATE")
    parser.add_argument("--dataset_name", help="its name in the model index; default: the end of --dataset")
    scoring = parser.add_argument_group("scoring, as in samf.evaluation.scoring")
    scoring.add_argument("--finding_names", nargs="+", metavar="NAME", help="findings that count; default: all 18")
    scoring.add_argument("--labeller", default="rules", help="rules, radbert, or a path of RadBertClassifier.pth")
    scoring.add_argument("--bertscore_model", help="Hub id or folder of the model for BERTScore")
    scoring.add_argument("--bertscore_layers", type=int, help="its layer, where bert-score has none on record")
    scoring.add_argument("--radeval", nargs="+", default=(), choices=RADEVAL_METRICS, help="metrics of RadEval")
    scoring.add_argument("--device", help="for BERTScore and RadBERT, e.g. cuda")
    scoring.add_argument("--resamples", type=int, default=RESAMPLES, help="0: no intervals")
    scoring.add_argument("--permutations", type=int, default=PERMUTATIONS, help="of the test of two systems")
    scoring.add_argument("--metadata", help="CT-RATE's metadata CSV, for subgroups")
    return parser


_SCORING = (
    "finding_names",
    "labeller",
    "bertscore_model",
    "bertscore_layers",
    "radeval",
    "device",
    "resamples",
    "metadata",
)
_COMPARING = ("finding_names", "labeller", "bertscore_model", "bertscore_layers", "radeval", "device")


def build_systems(args: argparse.Namespace) -> tuple[list[System], dict[str, Any] | None]:
    """The systems that are named, scored, and with `--against` what the tests say."""
    options = {name: getattr(args, name) for name in _SCORING}
    names = [*args.names, "other system"]
    systems = [load_system(names[0], args.predictions, args.judge, **options)]
    if args.against is None:
        return systems, None
    systems.append(load_system(names[1], args.against, args.against_judge, **options))
    if not any(common_rows(systems[0].rows, systems[1].rows, task) for task in systems[0].results["tasks"]):
        raise ValueError(f"{args.against} answers none of the records of {args.predictions}; rows are matched by id.")
    compared = {**{name: options[name] for name in _COMPARING}, "permutations": args.permutations}
    comparison = compare_predictions(args.against, args.predictions, **compared)
    ours, other = (system.judge for system in systems)
    if ours and other:
        judged = compare_judged(other, ours, systems[0].rows, permutations=args.permutations)
        for task, tested in judged.items():
            comparison["tasks"].setdefault(task, {}).update(tested)
    return systems, comparison


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.card and not args.dataset:
        parser.error("--card needs --dataset: a card must say what the figures were measured on")
    if args.card and not args.card.is_file():
        parser.error(f"--card {args.card}: no such file; expected a model card (README.md)")
    output = args.output or args.predictions.with_name("scoreboard")
    try:
        systems, comparison = build_systems(args)
        # A volume that is missing becomes a case without a picture.
        records = load_records(args.data, args.split, on_missing="keep") if args.data else None
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"scoreboard: {error}")
    named = args.dataset or UNNAMED
    dataset = {"dataset": named, "dataset_name": args.dataset_name or named.split("/")[-1], "split": args.split}
    write_scoreboard(output, systems, comparison=comparison, records=records, dataset=dataset)
    if args.card:
        try:
            write_to_card(args.card, model_index(systems[0], **dataset))
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"scoreboard: {error}")
    sys.stdout.write(f"{paper_comparison(systems)}\n\n{output / 'report.html'}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    main()
