"""Answer a split with a SAMF model, and score the answers.

    python eval.py --model runs/ao2d --data /data/CT-RATE --split valid --output_dir runs/ao2d/eval

`--config recipe.yaml` gives the same keys; the command line wins. The output folder gets predictions.jsonl (a run that
was cut off goes on where it stopped), failures.jsonl, results.json and results.md. `--shuffle_volumes` gives every
question another patient's volume: what is still right then did not come from the image.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from samf.data.ct_rate import load_records
from samf.data.slice_cache import SliceCache
from samf.evaluation.generation import GenerationSettings, evaluate, shuffle_volumes
from samf.evaluation.scoring import TASKS, results_table
from samf.recipe import parse_recipe

logger = logging.getLogger("samf.eval")


@dataclass
class EvalArguments:
    model: str = field(metadata={"help": "folder or Hub id of a SAMF model"})
    data: str = field(metadata={"help": "folder in CT-RATE's layout, or another source that load_records reads"})
    output_dir: str = field(metadata={"help": "where predictions and results go"})
    split: str = field(default="valid", metadata={"help": "train or valid"})
    tasks: list[str] = field(default_factory=lambda: ["report", "multiple_choice"], metadata={"help": ", ".join(TASKS)})
    batch_size: int = field(default=8, metadata={"help": "records answered at once"})
    max_new_tokens: int = field(default=512, metadata={"help": "longest answer; answers that reach it are counted"})
    num_beams: int = field(default=1, metadata={"help": "1 = greedy"})
    limit: int | None = field(default=None, metadata={"help": "at most so many records of each task"})
    seed: int = field(default=0, metadata={"help": "of the shuffled volumes"})
    shuffle_volumes: bool = field(default=False, metadata={"help": "give every question another patient's volume"})
    dtype: str = field(
        default="auto", metadata={"help": "of the weights: auto (as saved), float32, bfloat16 or float16"}
    )
    device: str | None = field(default=None, metadata={"help": "e.g. cuda:1; default: an accelerator if there is one"})
    slice_cache: str | None = field(default=None, metadata={"help": "folder that keeps the volumes' slices"})
    on_error: str = field(default="stop", metadata={"help": "a volume that can't be read: stop, or skip and list it"})
    finding_names: list[str] = field(default_factory=list, metadata={"help": "findings scored; default: CT-RATE's 18"})
    bertscore_model: str | None = field(default=None, metadata={"help": "model for BERTScore F1, e.g. roberta-large"})
    bertscore_layers: int | None = field(default=None, metadata={"help": "its layer, where bert-score knows none"})

    def __post_init__(self):
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"tasks names {unknown}; they are {', '.join(TASKS)}.")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error is {self.on_error!r}; expected 'stop' or 'skip'.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be at least 1.")


def build_model(args: EvalArguments) -> tuple[PreTrainedModel, Any]:
    """The model on its device, and its processor."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(args.device or accelerator)
    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, dtype=args.dtype)
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    return model.to(device), processor


def choose_records(args: EvalArguments) -> Sequence[Any]:
    """The split's records: at most `limit` of each task, with the volumes shuffled when that is asked."""
    # With --on_error skip a missing file becomes a listed failure like any other that can't be read.
    on_missing = "keep" if args.on_error == "skip" else "error"
    records = load_records(args.data, args.split, tasks=args.tasks, on_missing=on_missing)
    if args.limit is not None:
        records = first_of_each_task(records, args.limit)
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


def describe(args: EvalArguments) -> dict[str, Any]:
    """What predictions depend on beside the generation settings and the records."""
    places = {"model": args.model, "data": args.data}
    places = {name: os.path.abspath(place) if os.path.exists(place) else place for name, place in places.items()}
    return {**places, "split": args.split, "shuffle_volumes": args.shuffle_volumes, "dtype": args.dtype}


def run(args: EvalArguments) -> dict[str, Any]:
    """Answer and score; returns the results that are also in `output_dir`/results.json."""
    records = choose_records(args)
    model, processor = build_model(args)
    return evaluate(
        model,
        processor,
        records,
        args.output_dir,
        GenerationSettings(args.batch_size, args.max_new_tokens, args.num_beams, seed=args.seed),
        slice_cache=SliceCache(args.slice_cache, processor.image_processor) if args.slice_cache else None,
        on_error=args.on_error,
        described_by=describe(args),
        finding_names=args.finding_names or None,
        bertscore_model=args.bertscore_model,
        bertscore_layers=args.bertscore_layers,
    )


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        (args,) = parse_recipe(EvalArguments, argv)
    except ValueError as error:
        sys.exit(f"eval.py: {error}")
    sys.stdout.write(results_table(run(args)))


if __name__ == "__main__":
    main()
