"""The paper's three stages on phantoms, over several seeds: does each stage do what it is for?

    python -m samf.data.phantom runs/phantoms --patients 500
    python -m samf.experiments.stages --data runs/phantoms --seeds 0 1 2 --output runs/stages

Stage 1 trains a slice encoder by DINO (nearest neighbours before and after), stage 2 warms an aggregator up over it (retrieval
before and after), stage 3 starts from both, or from random weights, and trains everything, or everything but the slice
encoder, by as many steps. What is finished is kept, so a broken call goes on where it ended. `stages.md` has means and
standard deviations over the seeds.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainingArguments, set_seed

from samf import pretrain_encoder, warmup_aggregator
from samf.experiments.phantoms import (
    COLUMNS,
    RECIPES,
    Figures,
    add_common_arguments,
    logged,
    open_output,
    run_stage,
    train_run,
    write_table,
)
from samf.pretraining.dino import DinoArguments
from samf.recipe import parse_recipe
from samf.training.parts import PARTS

DINO_RECIPE, WARMUP_RECIPE = RECIPES / "dino_phantoms.yaml", RECIPES / "warmup_phantoms.yaml"
STAGE_3 = "slice_tokens"  # of recipes/table3: nothing frozen
FROZEN = {"train_parts": [part for part in PARTS if part != "slice_encoder"], "cache_embeddings": True}
RANDOM, PRETRAINED = "random weights", "stages 1 and 2"
ROWS = {  # what stage 3 starts from, and options of it
    "scratch": (RANDOM, {}),
    "scratch_vit_frozen": (RANDOM, FROZEN),
    "stages": (PRETRAINED, {}),
    "stages_vit_frozen": (PRETRAINED, FROZEN),
}
SETTINGS = ("dino_steps", "max_steps", "language_steps", "warmup_steps", "valid_limit")
STAGE_COLUMNS = {
    "knn": "kNN accuracy",
    "retrieval_interleaved": "retrieval (every other slice)",
    "retrieval_contiguous": "retrieval (half the field)",
    **{name: title for name, title in COLUMNS.items() if not name.startswith(("alpha", "gamma"))},
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m samf.experiments.stages", description="The paper's three stages, on phantoms."
    )
    add_common_arguments(parser)
    parser.add_argument("--dino_steps", type=int, help="of the slice encoder; default: the recipe's")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="some of them; default: all")
    return parser.parse_args(argv)


def untrained_encoder(folder: Path, seed: int) -> Path:
    """A slice encoder as stage 1 begins with it, and the image processor it would get."""
    if not (folder / "config.json").is_file():
        kinds = (pretrain_encoder.EncoderArguments, DinoArguments, TrainingArguments)
        args, _, _ = parse_recipe(kinds, ["--config", str(DINO_RECIPE)])
        set_seed(seed)
        pretrain_encoder.build_image_processor(args).save_pretrained(folder)
        pretrain_encoder.build_encoder(args).save_pretrained(folder)
    return folder


def train_stages(args: argparse.Namespace, seed: int) -> dict[str, Figures]:
    """Figures of one seed, by row."""
    folder, cache = args.output / f"seed{seed}", args.output / "cache"
    common = {"data": [args.data], "slice_cache": cache, "seed": seed, "resume_from_checkpoint": "last"}
    options = {**common, "max_steps": args.dino_steps}
    encoder = run_stage(pretrain_encoder, [DINO_RECIPE], folder / "1_encoder", options)
    options = {**common, "slice_encoder": encoder, "max_steps": args.warmup_steps}
    aggregator = run_stage(warmup_aggregator, [WARMUP_RECIPE], folder / "2_aggregator", options)
    starts = {
        RANDOM: {"slice_encoder": untrained_encoder(folder / "untrained_encoder", seed)},
        PRETRAINED: {"slice_encoder": encoder, "aggregator": aggregator},
    }
    figures = {}
    for row in args.rows:
        start, options = ROWS[row]
        moment = 0 if start == RANDOM else -1  # of the earlier stages' logs: before their training, or after it
        figures[row] = {
            "knn": logged(encoder, "eval_knn_accuracy")[moment],
            "retrieval_interleaved": logged(aggregator, "eval_retrieval_interleaved")[moment],
            "retrieval_contiguous": logged(aggregator, "eval_retrieval_contiguous")[moment],
            **train_run(args, STAGE_3, folder / f"3_{row}", {**starts[start], **options, "seed": seed}),
        }
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    open_output(args, SETTINGS)
    results: dict[str, list[Figures]] = {}
    for seed in args.seeds:
        for name, figures in train_stages(args, seed).items():
            results.setdefault(name, []).append(figures)
        table = write_table(args.output, results, STAGE_COLUMNS, "stages")
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
