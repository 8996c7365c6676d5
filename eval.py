"""Answer a split with a SAMF model, and score the answers.

    python eval.py --model runs/ao2d --data /data/CT-RATE --split valid --output_dir runs/ao2d/eval
    torchrun --nproc_per_node 8 eval.py …     # or accelerate launch; the same predictions. On CPUs torchrun alone

`--config recipe.yaml` gives the same keys; the command line wins. The output folder gets predictions.jsonl (a run that
was cut off goes on where it stopped), failures.jsonl, times.jsonl, results.json and results.md. `--shuffle_volumes` gives
every question another patient's volume: what is still right then did not come from the image. `--mcq likelihood` takes
the option that the model finds most likely, `--permute_options true` asks with the options in every rotation as well.
Tables, figures and a report of what is in the output folder: `python -m samf.evaluation.report.scoreboard`.
"""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from samf.cache.slice_cache import SliceCache
from samf.data.loading import load_records
from samf.data.schema import TASKS
from samf.data.source_arguments import SourceArguments
from samf.evaluation.answering.generation import (
    PREDICTIONS,
    RESULTS,
    GenerationSettings,
    evaluate,
    generate_predictions,
    shuffle_volumes,
)
from samf.evaluation.judge import RANGES, REPLIES, Judge, JudgeError, build_judge, judge_predictions, judge_table
from samf.evaluation.metrics.clinical_metrics import make_labeller
from samf.evaluation.metrics.multiple_choice import not_rotated, position_bias, rotated_records
from samf.evaluation.scoring import (
    RECORD_COUNTS,
    check_options,
    read_predictions,
    results_table,
    write_results,
)
from samf.utils.distributed import (
    Processes,
    default_device,
    join_processes,
    leave_processes,
)
from samf.utils.files import write_json
from samf.utils.recipe import parse_recipe

logger = logging.getLogger("samf.eval")

# Options of scoring that can be checked without loading a model.
CHECKED = ("bertscore_model", "bertscore_layers", "radeval", "resamples", "metadata")
SCORING = ("labeller", "bertscore_model", "bertscore_layers", "radeval", "resamples", "metadata")


@dataclass
class EvalArguments(SourceArguments):
    model: str = field(metadata={"help": "folder or Hub id of a SAMF model"})
    data: str = field(
        metadata={
            "help": "folder in CT-RATE's layout, or another source that load_records reads; with volume_column any"
        }
    )
    output_dir: str = field(metadata={"help": "where predictions and results go"})
    split: str = field(default="valid", metadata={"help": "train or valid"})
    tasks: list[str] = field(default_factory=lambda: ["report", "multiple_choice"], metadata={"help": ", ".join(TASKS)})
    batch_size: int = field(default=8, metadata={"help": "records answered at once"})
    max_new_tokens: int = field(default=512, metadata={"help": "longest answer; answers that reach it are counted"})
    num_beams: int = field(default=1, metadata={"help": "1 = greedy"})
    do_sample: bool = field(default=False, metadata={"help": "draw the answers' tokens, by the seed"})
    temperature: float | None = field(default=None, metadata={"help": "of drawn tokens"})
    top_p: float | None = field(default=None, metadata={"help": "of drawn tokens"})
    mcq: str = field(
        default="generate", metadata={"help": "multiple choice: generate an answer, or take the option's likelihood"}
    )
    permute_options: bool = field(
        default=False, metadata={"help": "ask multiple choice in every rotation of the options too: does place matter?"}
    )
    limit: int | None = field(default=None, metadata={"help": "at most so many records of each task"})
    seed: int = field(default=0, metadata={"help": "of the shuffled volumes and of drawn tokens"})
    shuffle_volumes: bool = field(default=False, metadata={"help": "give every question another patient's volume"})
    dtype: str = field(
        default="auto", metadata={"help": "of the weights: auto (as saved), float32, bfloat16 or float16"}
    )
    device: str | None = field(default=None, metadata={"help": "e.g. cuda:1; default: an accelerator if there is one"})
    slice_cache: str | None = field(default=None, metadata={"help": "folder that keeps the volumes' slices"})
    on_error: str = field(default="stop", metadata={"help": "a volume that can't be read: stop, or skip and list it"})
    finding_names: list[str] = field(default_factory=list, metadata={"help": "findings scored; default: CT-RATE's 18"})
    labeller: str = field(default="rules", metadata={"help": "rules, radbert, or a path of RadBertClassifier.pth"})
    bertscore_model: str | None = field(default=None, metadata={"help": "model for BERTScore F1, e.g. roberta-large"})
    bertscore_layers: int | None = field(default=None, metadata={"help": "its layer, where bert-score knows none"})
    radeval: list[str] = field(
        default_factory=list, metadata={"help": "metrics of the library RadEval: radgraph, ratescore, green"}
    )
    resamples: int = field(default=1000, metadata={"help": "0: no intervals"})
    metadata: str | None = field(default=None, metadata={"help": "CT-RATE's metadata CSV, for subgroups"})
    judge_endpoint: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible server of a judge, e.g. http://localhost:8000/v1"}
    )
    judge_model: str | None = field(default=None, metadata={"help": "the judge's name at the endpoint"})
    judge_ranges: int = field(default=3, metadata={"help": "ranges in the judge's prompt: 3 as in the paper, or 5"})
    judge_workers: int = field(default=8, metadata={"help": "prompts under way at once"})

    def __post_init__(self):
        self.check_source()
        if self.min_coverage and self.slice_cache is None:
            raise ValueError("min_coverage is checked when slices are made: give slice_cache too.")
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"tasks names {unknown}; they are {', '.join(TASKS)}.")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error is {self.on_error!r}; expected 'stop' or 'skip'.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1.")
        self.settings()
        self._check_scoring()

    def _check_scoring(self) -> None:
        """What is wanted after the last answer is checked before the first one."""
        if (self.judge_endpoint is None) != (self.judge_model is None):
            raise ValueError("judge_endpoint and judge_model go together.")
        if self.judge_ranges not in RANGES:
            raise ValueError(f"judge_ranges is {self.judge_ranges}; expected one of {', '.join(map(str, RANGES))}.")
        if self.judge_workers < 1:
            raise ValueError(f"judge_workers is {self.judge_workers}; it must be at least 1.")
        if self.judge_endpoint is not None:
            self.build_judge()
        check_options(finding_names=self.finding_names or None, **{name: getattr(self, name) for name in CHECKED})

    def build_judge(self) -> Judge:
        return build_judge(endpoint=self.judge_endpoint, model=self.judge_model, workers=self.judge_workers)

    def settings(self) -> GenerationSettings:
        """Raises ValueError for what can't be generated with."""
        names = ("batch_size", "max_new_tokens", "num_beams", "do_sample", "seed", "temperature", "top_p", "mcq")
        return GenerationSettings(**{name: getattr(self, name) for name in names})


def build_model(args: EvalArguments) -> tuple[PreTrainedModel, Any]:
    """The model on this process's device, and its processor."""
    device = torch.device(args.device or default_device())
    with Processes().main_process_first():  # the first one copies the model's code to where all import it from
        model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=args.dtype)
        processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    return model.to(device), processor


def choose_records(args: EvalArguments) -> Sequence[Any]:
    """The split's records: at most `limit` of each task, with the volumes shuffled when that is asked."""
    # With --on_error skip a missing file becomes a listed failure like any other that can't be read.
    on_missing = "keep" if args.on_error == "skip" else "raise"
    counts = Path(args.output_dir) / RECORD_COUNTS if Processes().is_first else None
    options = {"on_missing": on_missing, "counts_file": counts, **args.record_options()}
    records = load_records(args.data, args.split, tasks=args.tasks, **options)
    if args.limit is not None:
        chosen = first_of_each_task(records, args.limit)
        if counts:
            count_as_left_out(counts, f"beyond the first {args.limit} of the task", len(records) - len(chosen))
        records = chosen
    logger.info("%d records: %s", len(records), dict(Counter(record["task"] for record in records)))
    return shuffle_volumes(records, args.seed) if args.shuffle_volumes else records


def first_of_each_task(records: Sequence[Any], limit: int) -> list[Any]:
    taken: Counter[str] = Counter()
    chosen = []
    for record in records:
        taken[record["task"]] += 1
        if taken[record["task"]] <= limit:
            chosen.append(record)
    return chosen


def count_as_left_out(path: Path, reason: str, count: int) -> None:
    """Add a reason to the loader's counts, so that the cohort's statement has it."""
    counts = json.loads(path.read_text(encoding="utf-8"))
    counts["left_out"] += [{"reason": reason, "count": count}] if count else []
    write_json(path, counts)


def describe(args: EvalArguments) -> dict[str, Any]:
    """What predictions depend on beside the generation settings and the records."""
    places = {"model": args.model, "data": args.data}
    places = {name: os.path.abspath(place) if os.path.exists(place) else place for name, place in places.items()}
    return {**places, "split": args.split, "shuffle_volumes": args.shuffle_volumes, "dtype": args.dtype}


def check_models(args: EvalArguments) -> None:
    """Raise OptionError where the labeller or BERTScore's model can't be loaded; only the first process needs them."""
    if not Processes().is_first:
        return
    try:
        make_labeller(args.labeller)
        if args.bertscore_model is not None:
            AutoConfig.from_pretrained(args.bertscore_model)
    except (ValueError, OSError, ImportError) as error:
        raise OptionError(f"labeller {args.labeller!r}, bertscore_model {args.bertscore_model!r}: {error}") from error


class OptionError(ValueError):
    """An option that could only fail after the last answer."""


def run(args: EvalArguments) -> dict[str, Any]:
    """Answer and score; returns the results that are also in `output_dir`/results.json ({} but in the first process)."""
    check_models(args)
    records = choose_records(args)
    model, processor = build_model(args)
    answering = {
        "settings": args.settings(),
        "volume_store": build_slice_cache(args, processor),
        "on_error": args.on_error,
        "described_by": {**describe(args), "revision": getattr(model.config, "_commit_hash", None)},
    }
    bias = measure_position_bias(args, model, processor, records, answering) if args.permute_options else None
    results = evaluate(
        model,
        processor,
        records,
        args.output_dir,
        **answering,
        finding_names=args.finding_names or None,
        scoring={name: getattr(args, name) for name in SCORING},
    )
    if bias is not None and results:
        results["position_bias"] = bias
        write_results(results, Path(args.output_dir) / RESULTS)
    return results


def build_slice_cache(args: EvalArguments, processor: Any) -> SliceCache | None:
    """Where prepared volumes come from, if a folder is given."""
    if args.slice_cache is None:
        return None
    return SliceCache(args.slice_cache, processor.image_processor, args.min_coverage)


def measure_position_bias(
    args: EvalArguments, model: PreTrainedModel, processor: Any, records: Sequence[Any], answering: Mapping[str, Any]
) -> dict[str, Any]:
    """Ask every multiple-choice question in each rotation of its options, in `output_dir`/rotated."""
    folder = Path(args.output_dir) / "rotated"
    rotated = rotated_records(records)
    if not rotated:
        raise ValueError("permute_options: no record is a multiple-choice question whose options can change places.")
    generate_predictions(model, processor, rotated, folder, **answering)
    if not Processes().is_first:
        return {}
    bias = position_bias(read_predictions(folder / PREDICTIONS), intervals=args.resamples > 0)
    return {**bias, "left_out": not_rotated(records)}


def judge(args: EvalArguments) -> str:
    """Let the judge score the reports and the multiple choice; returns its means as Markdown."""
    folder = Path(args.output_dir)
    rows = [row for row in read_predictions(folder / PREDICTIONS) if row["task"] in ("report", "multiple_choice")]
    scores = judge_predictions(rows, args.build_judge(), ranges=args.judge_ranges, replies=folder / REPLIES)
    write_json(folder / "judge.json", scores)
    return judge_table(scores)


def main(argv: list[str] | None = None) -> None:
    join_processes()
    level = logging.INFO if Processes().is_first else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        (args,) = parse_recipe(EvalArguments, argv)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"eval.py: {error}")
    with logging_redirect_tqdm():  # log lines and the progress bar don't tear each other
        try:
            results = run(args)
        except OptionError as error:
            sys.exit(f"eval.py: {error}")
        if not results:  # another process than the first
            return
        sys.stdout.write(results_table(results))
        if args.judge_endpoint:
            try:
                sys.stdout.write(judge(args))
            except JudgeError as error:
                sys.exit(f"eval.py: {error}")
    folder = Path(args.output_dir)
    sys.stdout.write(
        f"\nWritten to {folder}: {PREDICTIONS}, {RESULTS}, {Path(RESULTS).with_suffix('.md')}. Next:\n"
        f"python -m samf.evaluation.report.scoreboard {folder / PREDICTIONS} --data {args.data} --split {args.split}\n"
    )


if __name__ == "__main__":
    main()
    leave_processes()
