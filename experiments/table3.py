"""Table 3 in miniature: its recipes, and choices of ours, on phantoms over several seeds.

    python -m samf.phantoms.dataset runs/phantoms --patients 500
    python -m samf.experiments.table3 --data runs/phantoms --seeds 0 1 2 --output runs/table3

A run is one recipe, or one of the variants of a recipe, with one seed; what is finished is kept, so a broken call goes on where
it ended; other settings need another output folder. `table.md` has the mean and standard deviation over the seeds.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from samf import pretrain_encoder, warmup_aggregator
from samf.experiments.phantoms import (
    RECIPES,
    Figures,
    add_common_arguments,
    open_output,
    run_stage,
    train_run,
    write_table,
)
from samf.utils.recipe import read_recipe

ROWS = (
    *("samf_vit_frozen", "samf_aggregator_frozen", "samf_warmup", "samf_warmup_vit_frozen"),
    *("samf_warmup_aggregator_frozen", "samf_warmup_both_frozen", "ao2d_vit_frozen", "ao2d_aggregator_frozen"),
    *("ao2d_warmup", "ao2d_warmup_both_frozen", "ao2d_both_frozen", "slice_tokens"),
)
VARIANT_RECIPE = "samf_warmup_vit_frozen"  # its slice embeddings are made once
SETTINGS = ("max_steps", "language_steps", "encoder_steps", "warmup_steps", "valid_limit")


@dataclass(frozen=True)
class Run:
    """One line of the table.

    Args:
        recipe: of recipes/table3.
        overrides: keys given over it.
    """

    name: str
    recipe: str
    overrides: Mapping[str, str] = field(default_factory=dict)


def all_runs() -> dict[str, Run]:
    """Every row of the table, then each fusion with scores scaled or not, positions on or off, then the published leak."""
    runs = [Run(name, name) for name in ROWS]
    for fusion in ("samf", "ao2d", "slice_tokens"):
        for scaled in (False, True):
            for positions in (False, True):
                name = f"{fusion}{'_scaled' if scaled else '_unscaled'}{'_positions' if positions else ''}"
                choices = {"fusion_type": fusion, "slice_position_scope": "all" if positions else "none"}
                if name != "samf_unscaled":  # the variants' recipe itself
                    runs.append(Run(name, VARIANT_RECIPE, choices | ({"fusion_scale": "rsqrt"} if scaled else {})))
    leak = {"fusion_type": "ao2d", "slice_position_scope": "none", "fusion_text_scope": "sequence"}
    runs.append(Run("ao2d_unscaled_leak", VARIANT_RECIPE, leak))
    return {run.name: run for run in runs}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m samf.experiments.table3", description="Table 3 in miniature, on phantoms."
    )
    add_common_arguments(parser)
    parser.add_argument("--encoder_steps", type=int, help="of the slice encoder; default: the recipe's")
    parser.add_argument("--runs", nargs="+", choices=all_runs(), default=list(all_runs()), help="default: all")
    return parser.parse_args(argv)


def prepare_encoder(args: argparse.Namespace) -> Path:
    """A slice encoder that knows findings, the same one for all runs: what stage 1 is for."""
    recipe = RECIPES / "table3" / "phantom_encoder.yaml"
    return run_stage(pretrain_encoder, [recipe], args.output / "slice_encoder", {"max_steps": args.encoder_steps})


def prepare_warmup(args: argparse.Namespace, scope: str) -> Path:
    """A warmed-up aggregator with positions as `scope` says, the same one for all runs."""
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


def figures_of(args: argparse.Namespace, run: Run, seed: int) -> Figures:
    """Train and evaluate a run, if that isn't done."""
    recipe = read_recipe(RECIPES / "table3" / f"{run.recipe}.yaml") | dict(run.overrides)
    options = {
        **run.overrides,
        "slice_encoder": prepare_encoder(args),
        "aggregator": prepare_warmup(args, recipe["slice_position_scope"]) if "aggregator" in recipe else None,
        "seed": seed,
    }
    return train_run(args, run.recipe, args.output / "runs" / f"{run.name}_seed{seed}", options)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    open_output(args, SETTINGS)
    results: dict[str, list[Figures]] = {}
    for seed in args.seeds:  # every run once before any has a second seed
        for name in args.runs:
            results.setdefault(name, []).append(figures_of(args, all_runs()[name], seed))
            write_table(args.output, results)
    sys.stdout.write(write_table(args.output, results) + "\n")


if __name__ == "__main__":
    main()
