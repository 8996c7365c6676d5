"""The paper's table 3 in miniature: its recipes, and variants of ours, on phantoms over several seeds.

    python -m samf.phantoms.dataset runs/phantoms --patients 500
    python -m samf.experiments.table3 --data runs/phantoms --seeds 0 1 2 --output runs/table3

A run is a recipe, or a variant of a recipe, with one seed. Finished runs are kept, so that an interrupted experiment resumes;
other settings need another output folder. `table.md` has means and standard deviations over the seeds.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from samf import pretrain_encoder, warmup_aggregator
from samf.experiments.phantoms import (
    Metrics,
    add_common_arguments,
    open_output,
    run_stage,
    train_run,
    write_table,
)
from samf.utils.packaged import RECIPES
from samf.utils.recipe import read_recipe

ROWS = (
    *("samf_vit_frozen", "samf_aggregator_frozen", "samf_warmup", "samf_warmup_vit_frozen"),
    *("samf_warmup_aggregator_frozen", "samf_warmup_both_frozen", "ao2d_vit_frozen", "ao2d_aggregator_frozen"),
    *("ao2d_warmup", "ao2d_warmup_both_frozen", "ao2d_both_frozen", "slice_tokens"),
)
_VARIANT_RECIPE = "samf_warmup_vit_frozen"  # its slice embeddings are computed once
SETTINGS = ("max_steps", "language_steps", "encoder_steps", "warmup_steps", "valid_limit")


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        name: of the row.
        recipe: name in recipes/table3.
        overrides: keys that override the recipe's.
    """

    name: str
    recipe: str
    overrides: Mapping[str, str] = field(default_factory=dict)


def all_runs() -> dict[str, Run]:
    """Return all runs: the rows of the table, each fusion with and without scaling and positions, and the leak.

    The leak is the reference implementation's `fusion_text_scope`: in training its fusion reads the answer.
    """
    runs = [Run(name, name) for name in ROWS]
    for fusion in ("samf", "ao2d", "slice_tokens"):
        for scaled in (False, True):
            for positions in (False, True):
                name = f"{fusion}{'_scaled' if scaled else '_unscaled'}{'_positions' if positions else ''}"
                choices = {"fusion_type": fusion, "slice_position_scope": "all" if positions else "none"}
                if name != "samf_unscaled":  # equals the variants' recipe
                    runs.append(Run(name, _VARIANT_RECIPE, choices | ({"fusion_scale": "rsqrt"} if scaled else {})))
    leak = {"fusion_type": "ao2d", "slice_position_scope": "none", "fusion_text_scope": "sequence"}
    runs.append(Run("ao2d_unscaled_leak", _VARIANT_RECIPE, leak))
    return {run.name: run for run in runs}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m samf.experiments.table3", description="Table 3 in miniature, on phantoms."
    )
    add_common_arguments(parser)
    parser.add_argument("--encoder_steps", type=int, help="of the slice encoder; default: the recipe's")
    parser.add_argument("--runs", nargs="+", choices=all_runs(), default=list(all_runs()), help="default: all")
    return parser.parse_args(argv)


def prepare_encoder(args: argparse.Namespace) -> Path:
    """Train the slice encoder of all runs on findings, unless it exists; it stands in for stage 1."""
    recipe = RECIPES / "table3" / "phantom_encoder.yaml"
    return run_stage(pretrain_encoder, [recipe], args.output / "slice_encoder", {"max_steps": args.encoder_steps})


def prepare_warmup(args: argparse.Namespace, scope: str) -> Path:
    """Warm up the aggregator of all runs with a `slice_position_scope` of `scope`, unless it exists."""
    options = {
        "data": [args.data],
        "slice_encoder": prepare_encoder(args),
        "slice_cache": args.output / "cache",
        "slice_position_scope": scope,
        "max_steps": args.warmup_steps,
        "resume_from_checkpoint": "last",
    }
    recipes = [RECIPES / "warmup_phantoms.yaml"]
    return run_stage(warmup_aggregator, recipes, args.output / f"warmup_{scope}", options)


def run_metrics(args: argparse.Namespace, run: Run, seed: int) -> Metrics:
    """Train and measure a run, unless it is finished.

    Args:
        args: arguments of the experiment.
        run: what to train.
        seed: of weights and batches.
    """
    recipe = read_recipe(RECIPES / "table3" / f"{run.recipe}.yaml") | dict(run.overrides)
    options = {
        **run.overrides,
        "slice_encoder": prepare_encoder(args),
        "aggregator": prepare_warmup(args, recipe["slice_position_scope"]) if "aggregator" in recipe else None,
        "seed": seed,
    }
    return train_run(args, run.recipe, args.output / "runs" / f"{run.name}_seed{seed}", options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment and print its table."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    open_output(args, SETTINGS)
    results: dict[str, list[Metrics]] = {}
    for seed in args.seeds:  # every run once before any has a second seed
        for name in args.runs:
            results.setdefault(name, []).append(run_metrics(args, all_runs()[name], seed))
            write_table(args.output, results)
    sys.stdout.write(write_table(args.output, results) + "\n")


if __name__ == "__main__":
    main()
