"""The paper's three stages on phantoms, over several seeds: does each stage serve its purpose?

    python -m samf.phantoms.dataset runs/phantoms --patients 500
    python -m samf.experiments.stages --data runs/phantoms --seeds 0 1 2 --output runs/stages

Stage 1 trains a slice encoder by DINO (kNN accuracy before and after), stage 2 warms up an aggregator (retrieval before and
after), stage 3 starts from both, from stage 1 only, or from random weights, for the same number of steps. It trains
everything, everything but the slice encoder, or everything with a lower rate for the slice encoder. Finished stages are
kept, so that an interrupted experiment resumes. `stages.md` has means and standard deviations over the seeds.
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
    Metrics,
    Options,
    add_common_arguments,
    logged,
    open_output,
    run_stage,
    train_run,
    write_table,
)
from samf.pretraining.dino import DinoArguments
from samf.training.param_groups import PARTS
from samf.utils.packaged import RECIPES
from samf.utils.recipe import parse_recipe

_DINO_RECIPE, _WARMUP_RECIPE = RECIPES / "dino_phantoms.yaml", RECIPES / "warmup_phantoms.yaml"
_STAGE_3 = "slice_tokens"  # of recipes/table3: nothing frozen
_FROZEN: Options = {"train_parts": [part for part in PARTS if part != "slice_encoder"], "cache_embeddings": True}
_SLOW: Options = {"learning_rates": '{"slice_encoder": 1e-4}'}  # a tenth of the rate of the other parts
_RANDOM, _STAGE_1, STAGES = "random weights", "stage 1", "stages 1 and 2"
# Row → what stage 3 starts from, and its options.
ROWS: dict[str, tuple[str, Options]] = {
    "scratch": (_RANDOM, {}),
    "scratch_vit_frozen": (_RANDOM, _FROZEN),
    "stage_1_vit_frozen": (_STAGE_1, _FROZEN),
    "stages": (STAGES, {}),
    "stages_vit_frozen": (STAGES, _FROZEN),
    "stages_vit_slow": (STAGES, _SLOW),
}
# What a patient's slices share is less explicit in DINO's embeddings than in those learned from labels: the warm-up takes
# longer to exceed chance, which at the recipe's rate it doesn't for every seed, and stage 3 needs more steps too.
STEPS = {"warmup_steps": 1200, "max_steps": 800}
_WARMUP_RATE = 3e-4
SETTINGS = ("dino_steps", "max_steps", "language_steps", "warmup_steps", "valid_limit")
_STAGE_COLUMNS = {
    "knn": "kNN accuracy",
    "retrieval_interleaved": "retrieval (every other slice)",
    "retrieval_contiguous": "retrieval (half the field of view)",
    **{name: title for name, title in COLUMNS.items() if not name.startswith(("alpha", "gamma", "hidden"))},
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m samf.experiments.stages", description="The paper's three stages, on phantoms."
    )
    add_common_arguments(parser, STEPS)
    parser.add_argument("--dino_steps", type=int, help="of the slice encoder; default: the recipe's")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="some of them; default: all")
    return parser.parse_args(argv)


def untrained_encoder(folder: Path, seed: int) -> Path:
    """Save a slice encoder as stage 1 initialises it, with its image processor, unless `folder` has one."""
    if not (folder / "config.json").is_file():
        kinds = (pretrain_encoder.EncoderArguments, DinoArguments, TrainingArguments)
        args, _, _ = parse_recipe(kinds, ["--config", str(_DINO_RECIPE)])
        set_seed(seed)
        pretrain_encoder.build_image_processor(args).save_pretrained(folder)
        pretrain_encoder.build_encoder(args).save_pretrained(folder)
    return folder


def train_stages(args: argparse.Namespace, seed: int) -> dict[str, Metrics]:
    """Train the stages with one seed; return row → metrics."""
    folder, cache = args.output / f"seed{seed}", args.output / "cache"
    common = {"data": [args.data], "slice_cache": cache, "seed": seed, "resume_from_checkpoint": "last"}
    options = {**common, "max_steps": args.dino_steps}
    encoder = run_stage(pretrain_encoder, [_DINO_RECIPE], folder / "1_encoder", options)
    options = {**common, "slice_encoder": encoder, "max_steps": args.warmup_steps, "learning_rate": _WARMUP_RATE}
    aggregator = run_stage(warmup_aggregator, [_WARMUP_RECIPE], folder / "2_aggregator", options)
    starts = {
        _RANDOM: {"slice_encoder": untrained_encoder(folder / "untrained_encoder", seed)},
        _STAGE_1: {"slice_encoder": encoder},
        STAGES: {"slice_encoder": encoder, "aggregator": aggregator},
    }
    knn = logged(encoder, "eval_knn_accuracy")  # first before training, last after it
    before, after = (
        {name: logged(aggregator, f"eval_{name}")[moment] for name in _STAGE_COLUMNS if name.startswith("retrieval")}
        for moment in (0, -1)
    )
    reached = {_RANDOM: {"knn": knn[0]}, _STAGE_1: {"knn": knn[-1], **before}, STAGES: {"knn": knn[-1], **after}}
    metrics = {}
    for row in args.rows:
        start, changes = ROWS[row]
        measured = train_run(args, _STAGE_3, folder / f"3_{row}", {**starts[start], **changes, "seed": seed})
        metrics[row] = {**reached[start], **measured}
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment and print its table."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    open_output(args, SETTINGS)
    results: dict[str, list[Metrics]] = {}
    for seed in args.seeds:
        for name, metrics in train_stages(args, seed).items():
            results.setdefault(name, []).append(metrics)
        table = write_table(args.output, results, _STAGE_COLUMNS, "stages")
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
