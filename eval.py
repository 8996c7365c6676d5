"""Answer the questions of a split with a SAMF model, and score the answers.

    python eval.py --model runs/ao2d --data /data/CT-RATE --split valid --output_dir runs/ao2d/eval
    torchrun --nproc_per_node 8 eval.py …     # or accelerate launch (torchrun on CPUs); the same predictions

`--config recipe.yaml` takes the same keys; the command line wins. The output folder gets predictions.jsonl (an interrupted
run resumes where it stopped), failures.jsonl, times.jsonl, results.json and results.md. `--shuffle_volumes` gives every
question a volume of another patient: what is still answered correctly did not come from the image. `--mcq likelihood`
chooses the option that the model finds most likely; `--permute_options true` also asks with the options in every rotation.
For tables, plots and a report of the output folder: `python -m samf.evaluation.report.scoreboard`.
"""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets
import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from samf.cache.entries import local_directory
from samf.cache.slice_cache import SliceCache
from samf.data.loading import load_records
from samf.data.options import check_on_error
from samf.data.schema import TASKS, JsonObject, Record
from samf.data.source_arguments import SourceArguments
from samf.evaluation.answering.generation import (
    PREDICTIONS,
    RESULTS,
    AnsweringOptions,
    GenerationSettings,
    evaluate,
    generate_predictions,
    shuffle_volumes,
)
from samf.evaluation.answering.settings import ChoiceMethod
from samf.evaluation.cohort import RECORD_COUNTS
from samf.evaluation.judge import REPLIES, Judge, JudgeError, build_judge, judge_predictions, judge_table
from samf.evaluation.judging.prompts import RANGES
from samf.evaluation.metrics.multiple_choice import not_rotated, position_bias, rotated_records
from samf.evaluation.prediction_rows import first_of_each_task, read_predictions
from samf.evaluation.results_table import results_table
from samf.evaluation.schema import PositionBias, Results
from samf.evaluation.scoring import write_results
from samf.evaluation.scoring_options import ScoringArguments, ScoringOptions
from samf.model.modeling_samf import SamfForConditionalGeneration
from samf.model.processing_samf import SamfProcessor
from samf.utils.distributed import Processes, default_device, join_processes, leave_processes
from samf.utils.files import write_json
from samf.utils.recipe import parse_recipe
from samf.utils.script_errors import input_errors

logger = logging.getLogger("samf.eval")
SCRIPT = "eval.py"


@dataclass
class EvalArguments(SourceArguments, ScoringArguments):
    """Arguments of eval.py."""

    model: str = field(metadata={"help": "folder or Hub id of a SAMF model"})
    data: str = field(
        metadata={
            "help": "folder in CT-RATE's layout, or another source that load_records reads; with dataset that one's folder, "
            "with volume_column any"
        }
    )
    output_dir: str = field(metadata={"help": "folder of predictions and results"})
    split: str = field(default="valid", metadata={"help": "train or valid"})
    tasks: list[str] = field(default_factory=lambda: ["report", "multiple_choice"], metadata={"help": ", ".join(TASKS)})
    batch_size: int | None = field(
        default=None, metadata={"help": "records answered at once; default: up to 64, by the size of keys and values"}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "limit of an answer; answers that reach it are counted"})
    num_beams: int = field(default=1, metadata={"help": "1 = greedy"})
    do_sample: bool = field(default=False, metadata={"help": "draw the tokens of the answers, by the seed"})
    temperature: float | None = field(default=None, metadata={"help": "of drawn tokens"})
    top_p: float | None = field(default=None, metadata={"help": "of drawn tokens"})
    mcq: ChoiceMethod = field(
        default="generate", metadata={"help": "multiple choice: generate an answer, or take the most likely option"}
    )
    permute_options: bool = field(
        default=False, metadata={"help": "also ask multiple choice in every rotation of the options: position bias"}
    )
    limit: int | None = field(default=None, metadata={"help": "records per task, the first ones; default: all"})
    seed: int = field(default=0, metadata={"help": "of the shuffled volumes and of drawn tokens"})
    shuffle_volumes: bool = field(default=False, metadata={"help": "give every question a volume of another patient"})
    dtype: str = field(
        default="auto", metadata={"help": "of the weights: auto (as saved), float32, bfloat16 or float16"}
    )
    device: str | None = field(default=None, metadata={"help": "e.g. cuda:1; default: an accelerator if there is one"})
    slice_cache: str | None = field(default=None, metadata={"help": "folder that keeps the slices of the volumes"})
    on_error: str = field(
        default="raise", metadata={"help": "a volume that can't be read: raise, or skip and list it in failures.jsonl"}
    )
    judge_endpoint: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible server of a judge, e.g. http://localhost:8000/v1"}
    )
    judge_model: str | None = field(default=None, metadata={"help": "the judge's name at the endpoint"})
    judge_ranges: int = field(default=3, metadata={"help": "ranges in the judge's prompt: 3 as in the paper, or 5"})
    judge_workers: int = field(default=8, metadata={"help": "concurrent prompts"})

    def __post_init__(self) -> None:
        self.check_source()
        if self.min_coverage and self.slice_cache is None:
            raise ValueError("min_coverage is checked when slices are made: give slice_cache too.")
        if self.slice_cache is not None:
            local_directory(self.slice_cache)
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"tasks names {unknown}; they are {', '.join(TASKS)}.")
        self.on_error = check_on_error(self.on_error)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1.")
        self.settings()
        self._check_judge()
        self.scoring_options().check()

    def _check_judge(self) -> None:
        """Check before the first answer what is needed after the last one."""
        if (self.judge_endpoint is None) != (self.judge_model is None):
            raise ValueError("judge_endpoint and judge_model go together.")
        if self.judge_ranges not in RANGES:
            raise ValueError(f"judge_ranges is {self.judge_ranges}; expected one of {', '.join(map(str, RANGES))}.")
        if self.judge_workers < 1:
            raise ValueError(f"judge_workers is {self.judge_workers}; it must be at least 1.")
        if self.judge_endpoint is not None:
            self.build_judge()

    def build_judge(self) -> Judge:
        """Return the judge at the endpoint."""
        return build_judge(endpoint=self.judge_endpoint, model=self.judge_model, workers=self.judge_workers)

    def settings(self) -> GenerationSettings:
        """Return how answers are generated.

        Raises:
            ValueError: see `GenerationSettings`.
        """
        return GenerationSettings(**{f.name: getattr(self, f.name) for f in fields(GenerationSettings)})

    def scoring_options(self) -> ScoringOptions:
        """Return the options of scoring; `seed` and `device` are those of the answers only."""
        options = {option.name: getattr(self, option.name) for option in fields(ScoringArguments)}
        return ScoringOptions(**{**options, "finding_names": self.finding_names or None})


def build_model(args: EvalArguments) -> tuple[SamfForConditionalGeneration, SamfProcessor]:
    """Return the model on this process's device, and its processor."""
    device = torch.device(args.device or default_device())
    with Processes().main_process_first():  # the first one copies the model's code to where all of them import it from
        model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=args.dtype)
        processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    return model.to(device), processor  # type: ignore[arg-type]  # transformers wraps `to` without its types


def choose_records(args: EvalArguments) -> Sequence[Record]:
    """Return the records of the split: at most `limit` of each task, with the volumes shuffled if that is asked for."""
    counts = Path(args.output_dir) / RECORD_COUNTS if Processes().is_first else None
    records: Sequence[Record] | datasets.Dataset = load_records(
        args.data,
        args.split,
        tasks=args.tasks,
        # With --on_error skip a missing file becomes a listed failure, as any other that can't be read.
        on_missing="keep" if args.on_error == "skip" else "raise",
        counts_file=counts,
        **args.record_options(),
    )
    if args.limit is not None:
        chosen = first_of_each_task(records, args.limit)
        if counts:
            count_as_left_out(counts, f"beyond the first {args.limit} of the task", len(records) - len(chosen))
        records = chosen
    logger.info("%d records: %s", len(records), dict(Counter(record["task"] for record in records)))
    return shuffle_volumes(records, args.seed) if args.shuffle_volumes else records


def count_as_left_out(path: Path, reason: str, count: int) -> None:
    """Add left-out records to the data loader's counts, so that the description of the cohort includes them.

    Args:
        path: records.json.
        reason: why they were left out.
        count: how many; 0 adds nothing.
    """
    counts = json.loads(path.read_text(encoding="utf-8"))
    counts["left_out"] += [{"reason": reason, "count": count}] if count else []
    write_json(path, counts)


def describe(args: EvalArguments) -> JsonObject:
    """Return what predictions depend on in addition to the generation settings and the records."""
    sources = {"model": args.model, "data": args.data}
    sources = {name: os.path.abspath(source) if os.path.exists(source) else source for name, source in sources.items()}
    return {**sources, "split": args.split, "shuffle_volumes": args.shuffle_volumes, "dtype": args.dtype}


def check_models(args: EvalArguments) -> None:
    """Raise ValueError where the labeller or BERTScore's model can't be loaded; only the first process needs them."""
    if not Processes().is_first:
        return
    try:
        args.scoring_options().check_models()
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(f"labeller {args.labeller!r}, bertscore_model {args.bertscore_model!r}: {error}") from error


def run(args: EvalArguments) -> Results | None:
    """Answer and score; return the content of `output_dir`/results.json, on other processes than the first None."""
    with input_errors(SCRIPT):  # before the first answer
        check_models(args)
        records = choose_records(args)
    model, processor = build_model(args)
    answering: AnsweringOptions = {
        "volume_store": build_slice_cache(args, processor),
        "on_error": check_on_error(args.on_error),
        "described_by": {**describe(args), "revision": getattr(model.config, "_commit_hash", None)},
    }
    bias = measure_position_bias(args, model, processor, records, answering) if args.permute_options else None
    results = evaluate(
        model, processor, records, args.output_dir, args.settings(), scoring=args.scoring_options(), **answering
    )
    if bias is not None and results is not None:
        results["position_bias"] = bias
        write_results(results, Path(args.output_dir) / RESULTS)
    return results


def build_slice_cache(args: EvalArguments, processor: SamfProcessor) -> SliceCache | None:
    """Return the cache of slices, if a folder is given."""
    if args.slice_cache is None:
        return None
    return SliceCache(args.slice_cache, processor.image_processor, args.min_coverage)


def measure_position_bias(
    args: EvalArguments,
    model: SamfForConditionalGeneration,
    processor: SamfProcessor,
    records: Sequence[Record],
    answering: AnsweringOptions,
) -> PositionBias | None:
    """Ask every multiple-choice question in each rotation of its options, in `output_dir`/rotated.

    Args:
        args: the arguments of the run.
        model: see `generate_predictions`.
        processor: see `generate_predictions`.
        records: the records of the run.
        answering: keyword arguments of `generate_predictions`.

    Returns:
        How far the answers depend on the position; None on other processes than the first.

    Raises:
        ValueError: no record can be rotated.
    """
    folder = Path(args.output_dir) / "rotated"
    rotated = rotated_records(records)
    if not rotated:
        raise ValueError("permute_options: no record is a multiple-choice question whose options can change places.")
    generate_predictions(model, processor, rotated, folder, args.settings(), **answering)
    if not Processes().is_first:
        return None
    bias = position_bias(read_predictions(folder / PREDICTIONS), intervals=args.resamples > 0)
    return {**bias, "left_out": not_rotated(records)}


def judge(args: EvalArguments) -> str:
    """Let the judge score the reports and the multiple choice; return its means as Markdown."""
    folder = Path(args.output_dir)
    rows = [row for row in read_predictions(folder / PREDICTIONS) if row["task"] in ("report", "multiple_choice")]
    scores = judge_predictions(rows, args.build_judge(), ranges=args.judge_ranges, replies=folder / REPLIES)
    write_json(folder / "judge.json", scores)
    return judge_table(scores)


def main(argv: list[str] | None = None) -> None:
    """Run the script: parse, answer, score, and judge if a judge is named."""
    join_processes()
    level = logging.INFO if Processes().is_first else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    with input_errors(SCRIPT):
        (args,) = parse_recipe(EvalArguments, argv)
    with logging_redirect_tqdm():  # keeps log lines and the progress bar apart
        results = run(args)
        if results is None:  # not the first process
            return
        sys.stdout.write(results_table(results))
        if args.judge_endpoint:
            try:
                sys.stdout.write(judge(args))
            except JudgeError as error:
                sys.exit(f"{SCRIPT}: {error}")
    folder = Path(args.output_dir)
    sys.stdout.write(
        f"\nWritten to {folder}: {PREDICTIONS}, {RESULTS}, {Path(RESULTS).with_suffix('.md')}. Next:\n"
        f"python -m samf.evaluation.report.scoreboard {folder / PREDICTIONS} --data {args.data} --split {args.split}\n"
    )


if __name__ == "__main__":
    main()
    leave_processes()
