"""Scoreboard: scores, tables, plots and cases of one or two systems, in one folder.

    python -m samf.evaluation.report.scoreboard runs/ao2d/eval/predictions.jsonl --output runs/ao2d/eval/scoreboard \\
        --against runs/samf/eval/predictions.jsonl --names Ao2D SAMF --data /data/CT-RATE

writes to the folder
- `results.json`, `results.md`: all scores with intervals; `against.json`, `against.md`: those of the other system,
- `scoreboard.md`: our values next to the paper's tables 1, 2 and 3; with `--against` the differences with their tests, and
  both systems' reports of the same cases, with what agrees with the reference and what contradicts it,
- `report.html`: the same with plots, and the worst and best cases with slice images (`--data`); self-contained,
- `model_index.yaml`: the scores as the Hub's model cards hold them; `--card README.md` writes them into a card.

A judge's scores are read from `judge.json`, statistics of generation from `results.json` in the predictions file's folder,
if their content belongs to these predictions.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import yaml

from samf.data.loading import load_records
from samf.data.schema import Record
from samf.evaluation.comparison import PERMUTATIONS, compare_predictions
from samf.evaluation.judge import compare_judged, judge_table
from samf.evaluation.markdown import markdown_table
from samf.evaluation.report.html_report import (
    Block,
    Heading,
    Image,
    Legend,
    Paragraph,
    Reports,
    Section,
    case_blocks,
    markdown_blocks,
    render_page,
)
from samf.evaluation.report.model_index import UNNAMED, model_index, write_to_card
from samf.evaluation.report.paper_comparison import paper_comparison, paper_table
from samf.evaluation.report.plots import finding_bars, interval_plot, judge_calibration, length_histogram, to_png
from samf.evaluation.report.side_by_side import (
    Case,
    ChoiceComparison,
    ExtremeReports,
    choose_reports,
    common_rows,
    compare_choices,
    extreme_reports,
    mark_report,
    side_by_side,
)
from samf.evaluation.report.slice_images import SliceImages, draw_slices
from samf.evaluation.report.systems import System, load_system
from samf.evaluation.results_table import comparison_table, results_table
from samf.evaluation.schema import Comparison
from samf.evaluation.scoring import write_results
from samf.evaluation.scoring_options import ScoringOptions, scoring_parser
from samf.utils.files import atomic_write, write_json

__all__ = [
    "System",
    "load_system",
    "model_index",
    "paper_comparison",
    "paper_table",
    "scoreboard_markdown",
    "write_scoreboard",
    "write_to_card",
]

_CASES = 5


class DatasetName(TypedDict):
    """The data set in the model index: keywords of `model_index`."""

    dataset: str
    dataset_name: str
    split: str


# --- Markdown ---------------------------------------------------------------------------------------------------------


def scoreboard_markdown(systems: Sequence[System], comparison: Comparison | None = None) -> str:
    """Return the scoreboard as Markdown, without plots and images.

    Args:
        systems: one or two systems.
        comparison: what `compare_predictions` returned for the second and the first.
    """
    blocks = ["# Scoreboard", "For research only, not for diagnosis."]
    blocks += ["## Comparison with the paper", paper_comparison(systems)]
    for system in systems:
        blocks += [f"## {system.name}", _scores_markdown(system)]
    if comparison is not None:
        names = [system.name for system in systems]
        blocks += [f"## {names[1]} to {names[0]}", comparison_table(comparison, names[::-1]).strip()]
        blocks += _case_markdown(systems)
    return "\n\n".join(block for block in blocks if block) + "\n"


def _scores_markdown(system: System) -> str:
    """Return all scores of a system, its judge's included, as Markdown."""
    judged = judge_table(system.judge) if system.judge else ""
    return f"{results_table(system.results)}\n{judged}".strip()


def _case_markdown(systems: Sequence[System]) -> list[str]:
    first, second = systems
    cases, choices = _compared_cases(systems)
    blocks = []
    if cases:
        text = (
            "✓ agrees with the reference, ✗ contradicts it or its side, ? isn't in it; only the 18 findings are marked."
        )
        blocks += ["### The same reports", text, side_by_side(cases, (first.name, second.name))]
    if choices.questions:
        blocks += ["### The same questions", _choice_table(choices, (first.name, second.name))]
    return blocks


def _compared_cases(systems: Sequence[System]) -> tuple[list[Case], ChoiceComparison]:
    first, second = (system.rows for system in systems)
    return choose_reports(first, second, _CASES), compare_choices(first, second, _CASES)


def _choice_table(choices: ChoiceComparison, names: Sequence[str]) -> str:
    """Return what `compare_choices` returned as Markdown tables; `names` are those of the two systems."""
    header = [f"{choices.questions} questions", "both right", *(f"only {name}" for name in names), "neither"]
    table = markdown_table(header, [["", choices.both, choices.only_first, choices.only_second, choices.neither]])
    rows = [[case.id, case.question, case.reference, case.first, case.second] for case in choices.cases]
    rows = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    return f"{table}\n\n{markdown_table(['id', 'question', 'right', *names], rows)}" if rows else table


# --- HTML -------------------------------------------------------------------------------------------------------------


def _html_sections(
    systems: Sequence[System], comparison: Comparison | None, extremes: ExtremeReports, images: SliceImages
) -> list[Section]:
    """Return the sections of the HTML report.

    Args:
        systems: one or two systems.
        comparison: what `compare_predictions` returned for the second and the first.
        extremes: the first system's worst and best reports.
        images: slice images of their volumes.
    """
    sections = [Section("Plots", _plots(systems))]
    sections.append(Section("Comparison with the paper", markdown_blocks(paper_comparison(systems))))
    for system in systems:
        blocks = markdown_blocks(_scores_markdown(system))
        calibration = judge_calibration(system.rows, system.judge) if system.judge else None
        if calibration:
            blocks.append(Image(to_png(calibration), "calibration of the judge"))
        sections.append(Section(system.name, blocks))
    if comparison is not None:
        sections += _comparison_sections(systems, comparison)
    return [*sections, Section(f"Worst and best cases of {systems[0].name}", _extreme_blocks(extremes, images))]


def _plots(systems: Sequence[System]) -> list[Block]:
    results = {system.name: system.results for system in systems}
    rows = {system.name: system.rows for system in systems}
    plots = [interval_plot(results, task) for task in ("report", "multiple_choice")]
    plots += [finding_bars(results), length_histogram(rows)]
    return [Image(to_png(plot), plot.axes[0].get_title()) for plot in plots if plot]


def _comparison_sections(systems: Sequence[System], comparison: Comparison) -> list[Section]:
    names = [system.name for system in systems]
    cases, choices = _compared_cases(systems)
    table = markdown_blocks(comparison_table(comparison, names[::-1]))
    sections = [Section(f"{names[1]} to {names[0]}", table)]
    if cases:
        sections.append(Section("The same reports", [Legend(), *case_blocks(cases, names)]))
    if choices.questions:
        sections.append(Section("The same questions", markdown_blocks(_choice_table(choices, names))))
    return sections


def _extreme_blocks(extremes: ExtremeReports, images: SliceImages) -> list[Block]:
    blocks: list[Block] = []
    for title, cases in (("Worst", extremes.worst), ("Best", extremes.best)):
        if cases:
            blocks.append(Heading(3, title))
        for row, score in cases:
            blocks.append(Heading(4, f"{row.get('id')}: agreement {score:.2f}"))
            image = images.get(row.get("id"))
            if isinstance(image, Path):
                blocks.append(Image(image.read_bytes(), f"slices of {row.get('scan_id')}"))
            elif image:
                blocks.append(Paragraph(image, is_note=True))
            marked = mark_report(str(row["prediction"]), str(row["reference"]))
            blocks.append(Reports(str(row["reference"]), [("prediction", marked)]))
    return [Legend(), *blocks] if blocks else []


# --- Files ------------------------------------------------------------------------------------------------------------


def write_scoreboard(
    output: str | os.PathLike[str],
    systems: Sequence[System],
    *,
    comparison: Comparison | None = None,
    records: Iterable[Record] | None = None,
    dataset: DatasetName | None = None,
) -> None:
    """Write all files of the scoreboard.

    Args:
        output: folder to write.
        systems: one or two systems; the model index and the worst and best cases are the first one's.
        comparison: what `compare_predictions` returned for the second and the first system.
        records: records of the data set, for slice images.
        dataset: keywords of `model_index`.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for system, name in zip(systems, ("results.json", "against.json"), strict=False):
        write_results(system.results, output / name)
    if comparison is not None:
        write_json(output / "comparison.json", comparison)
    atomic_write(output / "scoreboard.md", scoreboard_markdown(systems, comparison))
    index = model_index(systems[0], **dataset) if dataset else model_index(systems[0])
    atomic_write(
        output / "model_index.yaml", yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)
    )
    extremes = extreme_reports(systems[0].rows)
    images: SliceImages = {}
    if records is not None:
        shown = [row for row, _ in (*extremes.worst, *extremes.best)]
        images = draw_slices(shown, records, output / "pictures")
    title = " and ".join(system.name for system in systems)
    atomic_write(output / "report.html", render_page(title, _html_sections(systems, comparison, extremes, images)))


# --- Command line -------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write scores, tables, plots and cases of a predictions.jsonl to one folder.",
        parents=[scoring_parser()],
    )
    parser.add_argument("predictions", type=Path, help="predictions.jsonl of the system")
    parser.add_argument("--output", type=Path, help="folder to write; default: scoreboard in the predictions' folder")
    parser.add_argument("--against", type=Path, help="another system's predictions of the same records")
    parser.add_argument("--names", nargs="+", default=["this system", "other system"], help="one name per system")
    parser.add_argument("--judge", type=Path, help="judge.json; default: the one in the predictions' folder")
    parser.add_argument("--against_judge", type=Path, help="the other system's judge.json")
    parser.add_argument("--data", help="the data set, as for eval.py, for slice images")
    parser.add_argument("--split", default="valid", help="train or valid")
    parser.add_argument("--card", type=Path, help="model card (README.md) whose metadata gets the scores")
    parser.add_argument("--dataset", help="Hub id of the data set, for the model index, e.g. ibrahimhamamci/CT-RATE")
    parser.add_argument("--dataset_name", help="its name in the model index; default: the end of --dataset")
    parser.add_argument("--permutations", type=int, default=PERMUTATIONS, help="of the test of two systems")
    return parser


def _build_systems(args: argparse.Namespace) -> tuple[list[System], Comparison | None]:
    """Return the scored systems and, with `--against`, their comparison."""
    options = ScoringOptions.from_namespace(args)
    names = [*args.names, "other system"]
    systems = [load_system(names[0], args.predictions, args.judge, options)]
    if args.against is None:
        return systems, None
    systems.append(load_system(names[1], args.against, args.against_judge, options))
    if not any(common_rows(systems[0].rows, systems[1].rows, task) for task in systems[0].results["tasks"]):
        raise ValueError(f"{args.against} answers none of the records of {args.predictions}; rows are matched by id.")
    comparison = compare_predictions(args.against, args.predictions, options, permutations=args.permutations)
    ours, other = (system.judge for system in systems)
    if ours and other:
        judged = compare_judged(other, ours, systems[0].rows, permutations=args.permutations)
        for task, tested in judged.items():
            comparison["tasks"].setdefault(task, {}).update(tested)
    return systems, comparison


def main(argv: Sequence[str] | None = None) -> None:
    """Write a scoreboard as the command line asks."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.card and not args.dataset:
        parser.error("--card needs --dataset: a card must name the data set of its scores")
    if args.card and not args.card.is_file():
        parser.error(f"--card {args.card}: no such file; expected a model card (README.md)")
    output = args.output or args.predictions.with_name("scoreboard")
    try:
        systems, comparison = _build_systems(args)
        # A missing volume becomes a case without an image.
        records = load_records(args.data, args.split, on_missing="keep") if args.data else None
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"scoreboard: {error}")
    named = args.dataset or UNNAMED
    name = args.dataset_name or named.split("/")[-1]
    dataset: DatasetName = {"dataset": named, "dataset_name": name, "split": args.split}
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
